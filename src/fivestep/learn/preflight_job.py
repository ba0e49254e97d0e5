"""The job that a preflight examines: its objects, a few of its batches, and copies of both to try things on.

    RECIPE | RUN | FILE.toml    -> configuration -> the run's own model, streams, objective, optimizers
    FILE.py:function            -> (model, loader, criterion, optimizer), or those and a validation loader

Owns what a check may take from a job: copies, seeded forward passes, rows and tokens of a batch. Judges nothing. The
job's own objects are never trained, and stay as they were; its loaders are iterated.
"""

import math
import random
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass, field
from functools import cached_property
from inspect import Parameter, signature
from itertools import islice
from time import perf_counter
from typing import Any

import msgspec
import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from fivestep.data.generators import random_state_kept
from fivestep.data.stream import batches
from fivestep.errors import FivestepError, NonFiniteError, UsageError, brief, named
from fivestep.loop.batch import cut, parts, rebuilt, tensors, to_device, without_empty
from fivestep.loop.evaluate import Passes
from fivestep.loop.language import NextToken, TruncatedBPTT
from fivestep.loop.modes import enter_training
from fivestep.loop.objective import as_objective
from fivestep.loop.optimizer import HeldParameters, as_optimizers, optimized
from fivestep.loop.precision import autocast
from fivestep.loop.step import TrainStep
from fivestep.run.build import (
    WINDOWED,
    build_data,
    build_device,
    build_job,
    build_schedule,
    step_options,
    use_threads,
)
from fivestep.run.config import Config, load_config
from fivestep.run.doctor import configuration
from fivestep.run.forecast import Forecast, forecast, matmul_rate, plan
from fivestep.run.memory import free
from fivestep.run.rehearsal import imported, is_function, named_function

DRAWN, VALIDATED = 12, 4  # batches of training and of validation that are kept
PATIENCE = 12.0  # seconds that one part of a check may take
HEAVY = 1.0  # seconds of a micro-batch's matrix products, from which on a recipe is examined on smaller ones
SMALLER = {"batch_size": 2, "accumulate": 1, "block_size": 32, "bptt": 16, "eval_batch_size": 2}


class NotApplicableError(Exception):
    """A check has nothing to say of this job; the message says why."""


@dataclass(frozen=True)
class Examined:
    """A job, and what has been drawn of its data."""

    name: str
    model: nn.Module
    criterion: Any
    optimizers: list[Optimizer]
    train: Any
    val: Any = None
    scheduler: Callable[[int], float] | None = None
    options: Mapping[str, Any] = field(default_factory=dict)  # precision, clip_norm, clip_value
    steps: int | None = None  # planned; None where that is not known
    batches: list[Any] = field(default_factory=list)
    val_batches: list[Any] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    config: Config | None = None  # as it was given
    facts: Forecast | None = None  # of that configuration

    @property
    def device(self) -> torch.device:
        return next(iter(self.model.parameters())).device

    @cached_property
    def objective(self) -> Any:
        """The criterion as the loop asks it: what the loss of a batch is, and what its mean is over."""
        return as_objective(self.criterion)

    def copy(self, rate: float | None = None, **options: Any) -> TrainStep:
        """The five steps on a model, a criterion and optimizers of its own, as they are before training.

        rate: of plain Adam in the optimizers' place. options: of the step, where they are not the job's.
        """
        model, criterion, optimizers = deepcopy((self.model, self.criterion, self.optimizers))
        if rate is not None:
            optimizers = [plain_adam([one for one in optimized(optimizers) if one.requires_grad], rate)]
        return TrainStep(model, criterion, optimizers, **{**self.options, **options})

    def outputs(self, batch: Any, training: bool = False, seed: int = 0) -> Tensor:
        """What a fresh copy of the model makes of a batch, `[rows, ...]`, or `[rows, time, ...]` of tokens.

        Of an objective of the job's own, whose batches are no pairs, it is the loss.
        """
        own = self.copy()
        model = own.model
        (enter_training(model, set()) if training else model.eval())
        seed_all(seed)
        if not is_pair(batch):
            return loss_of(own, batch).detach().float().view(1, 1)
        return rows_first(self, self.raw_outputs(model, batch), batch).detach().float()

    def raw_outputs(self, model: nn.Module, batch: Any) -> Any:
        """The model's output, or the objective's own reading of it where the model carries a state."""
        with autocast(self.options.get("precision", "fp32"), self.device):
            if isinstance(self.objective, TruncatedBPTT):
                return self.objective.forward(model, batch, None)[0]
            return model(self.pair(batch)[0])

    def pair(self, batch: Any) -> tuple[Any, Any]:
        """Inputs and targets."""
        if is_pair(batch):
            return batch[0], batch[1]
        raise NotApplicableError("its batches are no pairs (inputs, targets)")

    @cached_property
    def step_seconds(self) -> float:
        """What a step of the first batch takes: the least of three, after a warm-up."""
        with aside():
            own, seconds = self.copy(), []
            enter_training(own.model, set())
            for _ in range(2 if self.facts is not None and self.facts.flop > 1e8 else 4):
                start = perf_counter()
                updated(own, self.batches[0])
                seconds.append(perf_counter() - start)
            return min(seconds[1:])

    @cached_property
    def small_seconds(self) -> float:
        """The same of a plain step of Adam on the first of the small batches."""
        with aside():
            learn(self, self.small[:1], 1, 1e-3)
            start = perf_counter()
            learn(self, self.small[:1], 3, 1e-3)
            return (perf_counter() - start) / 3

    def afford(self, steps: float, each: float | None = None) -> None:
        """Raise NotApplicableError where so many steps, of `each` so many seconds, would take too long here."""
        each = self.step_seconds if each is None else each
        if steps * each > PATIENCE:
            took = f"{steps:.0f} steps of {each:.2g} s"
            raise NotApplicableError(f"left out: it takes {took}, and {PATIENCE:.0f} s are allowed")

    @cached_property
    def repeatable(self) -> bool:
        """Whether equal seeds give equal outputs, in training and in evaluation."""
        batch = self.batches[0]
        return all(
            not apart(self.outputs(batch, training), self.outputs(batch, training)) for training in (False, True)
        )

    def require_repeatable(self) -> None:
        """Raise NotApplicableError where outputs differ by themselves."""
        if not self.repeatable:
            raise NotApplicableError("the model's outputs are not repeatable, so they cannot be compared")

    @cached_property
    def small(self) -> list[Any]:
        """The first batches, of at most 16 rows (4 of tokens): what is quickly learned."""
        return [take(self, batch, 0, 4 if tokens(self, batch) else 16) for batch in self.batches]

    @cached_property
    def quick_rate(self) -> float:
        """Of three learning rates of Adam the one that lowers the loss of a small batch furthest in 6 steps."""
        self.afford(18, self.small_seconds)
        tried = {rate: learn(self, self.small[:1], 6, rate)[1][-1] for rate in (1e-3, 1e-2, 1e-1)}
        return min(tried, key=lambda rate: tried[rate] if np.isfinite(tried[rate]) else np.inf)


# --- what a check does with a job ---


def is_pair(batch: Any) -> bool:
    """Whether a batch is inputs and targets."""
    return isinstance(batch, tuple | list) and len(batch) == 2


@contextmanager
def aside() -> Iterator[None]:
    """Inside: equal seeds each time. Afterwards: every global random state is as before."""
    with random_state_kept():
        seed_all(0)
        yield


def seed_all(seed: int) -> None:
    """Seed the global generators of the host and of every device."""
    torch.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed)


def loss_of(own: TrainStep, batch: Any, objective: Any = None) -> Tensor:
    """The mean loss of a batch, in the run's arithmetic; `objective`: in the place of the step's own."""
    with own.autocast:
        mean: Tensor = (own.objective if objective is None else objective).loss(own.model, batch, None)[0]
    return mean


def updated(own: TrainStep, batch: Any) -> float:
    """Make one step, without a hidden state; the loss before it, infinite where the step was not finite."""
    own.state.carry = None
    try:
        made = own(batch)
    except NonFiniteError:
        return math.inf
    return math.inf if made is None else made.loss.item()


def learn(
    job: Examined,
    data: list[Any],
    steps: int,
    rate: float,
    inputs: Callable[[Tensor], Tensor] | None = None,
    enough: float = -np.inf,
    patience: float = np.inf,
) -> tuple[TrainStep, list[float]]:
    """A copy that learned `data` by plain Adam, without dropout, and the loss before each step.

    The rate falls from `rate` to 0 in a straight line. inputs: what is made of each tensor of the inputs first. Ends
    early at a loss of `enough`, at one that is not finite, and after `patience` seconds.
    """
    own, losses, begun = job.copy(rate, clip_norm=1.0, clip_value=None), [], perf_counter()
    own.model.eval()  # no dropout; what is looked for is whether it can learn at all
    with torch.backends.cudnn.flags(enabled=False):  # its recurrent layers have no backward in eval()
        for step in range(steps):
            batch = data[step % len(data)]
            own.optimizers[0].param_groups[0]["lr"] = rate * (1 - step / steps)
            losses.append(updated(own, batch if inputs is None else with_inputs(job, batch, inputs)))
            if not enough < losses[-1] < np.inf or perf_counter() - begun > patience:
                break
    return own, losses


def plain_adam(parameters: list[nn.Parameter], rate: float) -> torch.optim.Adam:
    """Adam as one kernel, which is several times faster on a large table."""
    return torch.optim.Adam(parameters, lr=rate, fused=all(one.is_floating_point() for one in parameters) or None)


def scored(job: Examined, own: TrainStep, data: list[Any], inputs: Callable[[Tensor], Tensor] | None = None) -> float:
    """The mean loss over `data` in evaluation."""
    own.model.eval()
    objective = own.objective.in_evaluation() if hasattr(own.objective, "in_evaluation") else own.objective
    total, weight, passes = 0.0, 0.0, Passes()
    with torch.no_grad():
        for batch in data:
            count = float(objective.count(batch))
            given = batch if inputs is None else with_inputs(job, batch, inputs)
            total += float(passes(loss_of, own, given, objective)) * count if count else 0.0
            weight += count
    return total / weight if weight else np.nan


def with_inputs(job: Examined, batch: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """`batch` with each tensor of its inputs changed."""
    features, labels = job.pair(batch)
    return type(batch)([_mapped(features, change), labels])


def _mapped(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    if isinstance(value, Tensor):
        return change(value)
    return rebuilt(value, [_mapped(part, change) for part in parts(value)])


def row_count(job: Examined, batch: Any) -> int:
    """How many examples a batch holds: its columns where it is of segments."""
    found = tensors(job.pair(batch)[0])
    if not found or not found[0].ndim:
        raise NotApplicableError("its inputs hold no tensor with rows")
    return found[0].shape[1 if isinstance(job.objective, TruncatedBPTT) else 0]


def take(job: Examined, batch: Any, begin: int, end: int) -> Any:
    """The rows begin .. end - 1 of a batch; what has other rows, or none that are known, stays as it is."""
    try:
        size = row_count(job, batch)
    except NotApplicableError:
        return batch
    if isinstance(job.objective, TruncatedBPTT):
        return job.objective.share(batch, begin, end)
    return cut(batch, size, begin, end, keep=True)


def tokens(job: Examined, batch: Any) -> tuple[Tensor, Tensor] | None:
    """Ids and target ids, both `[rows, time]`; None where a batch is no sequence of ids with a target for each."""
    if not is_pair(batch):
        return None
    x, y = batch
    if not (isinstance(x, Tensor) and isinstance(y, Tensor) and x.ndim == 2 and x.numel() == y.numel()):
        return None
    if x.is_floating_point() or y.is_floating_point() or x.shape[1] < 2:
        return None
    return (x.T, y.view_as(x).T) if isinstance(job.objective, TruncatedBPTT) else (x, y.reshape(x.shape))


def predicts_next(job: Examined) -> bool:
    """Whether it is a language model: by its objective, or by targets that are its inputs, shifted by one."""
    found = tokens(job, job.batches[0])
    return found is not None and (isinstance(job.objective, NextToken) or shifted(*found, 1) > 0.9)


def shifted(x: Tensor, y: Tensor, by: int) -> float:
    """The share of the targets that are the inputs `by` places on; ignored targets do not count."""
    if x.shape[1] <= abs(by):
        return 0.0
    there = x[:, by:] if by >= 0 else x[:, :by]
    wanted = y[:, : y.shape[1] - by] if by >= 0 else y[:, -by:]
    kept = wanted >= 0
    return float((there == wanted)[kept].float().mean()) if kept.any() else 0.0


def upright(job: Examined, x: Tensor) -> Tensor:
    """Inputs with their examples first, and back: segments have them second."""
    return x.T if isinstance(job.objective, TruncatedBPTT) else x


def rows_first(job: Examined, outputs: Any, batch: Any) -> Tensor:
    """A model's outputs as one tensor `[rows, ...]`, `[rows, time, ...]` where the batch is of tokens."""
    size, found = row_count(job, batch), tokens(job, batch)
    made = [one for one in tensors(outputs) if one.is_floating_point() and one.ndim]
    if isinstance(job.objective, TruncatedBPTT):
        return made[0].view(-1, size, *made[0].shape[1:]).transpose(0, 1)
    if found is not None and made:
        time, first = found[0].shape[1], made[0]
        if first.ndim >= 3 and first.shape[:2] == (size, time):
            return first
        if first.ndim == 3 and first.shape[::2] == (size, time):  # [rows, classes, time], as cross-entropy has it
            return first.transpose(1, 2)
        if first.shape[0] == size * time:
            return first.view(size, time, *first.shape[1:])
    made = [one.reshape(size, -1) for one in made if one.shape[0] == size]
    if not made:
        raise NotApplicableError("the model's output has no row for each row of its inputs")
    return torch.cat(made, dim=1)


def apart(one: Tensor, other: Tensor) -> float:
    """The largest difference, in units of the largest number that there is; infinite beside what is no number.

    What is equal, NaN with NaN, is not apart.
    """
    unequal = (one != other) & ~(one.isnan() & other.isnan())
    if not unequal.any():
        return 0.0
    differ = float((one - other)[unequal].abs().max())
    if not math.isfinite(differ):
        return math.inf
    largest = max(float(value[value.isfinite()].abs().max()) for value in (one, other))
    return differ / max(largest, 1e-30)


# --- where a job comes from ---


def examined(source: str | None, flags: Mapping[str, Any]) -> Examined:
    """The job that `source` names. Raises UsageError for what names none, or makes none."""
    if is_function(source):
        return of_function(str(source), flags)
    return of_config(load_config(configuration(source), flags), source)


def of_function(source: str, flags: Mapping[str, Any]) -> Examined:
    """The job that a function of the user's returns; his file is run, in this process."""
    if other := [name for name in flags if name not in ("max_iters", "threads")]:
        raise UsageError(f"--{other[0].replace('_', '-')} is of recipes; {source} says itself what it trains")
    use_threads(flags.get("threads"))
    made = returned(source)
    if not isinstance(made, tuple | list) or not 4 <= len(made) <= 5:
        held = f"{len(made)} things" if isinstance(made, tuple | list) else named(made)
        raise UsageError(
            f"{source} returned {held}; it must return model, loader, criterion, optimizer, and a validation loader "
            "where there is one"
        )
    model, train, criterion, optimizer, val = made if len(made) == 5 else (*made, None)
    if not isinstance(model, nn.Module):
        raise UsageError(f"the first thing that {source} returned is {named(model)}; it must be an nn.Module")
    return examined_objects(source, model, train, criterion, optimizer, val, steps=flags.get("max_iters"))


def returned(source: str) -> Any:
    """What the function returns. Whatever it raises is a UsageError: nothing can be examined then."""
    before = sys.dont_write_bytecode
    sys.dont_write_bytecode = True  # nothing is left beside the user's files
    try:
        function = imported(named_function(source))
        required = [p for p in signature(function).parameters.values() if p.default is Parameter.empty]
        if [p for p in required if p.kind not in (Parameter.VAR_POSITIONAL, Parameter.VAR_KEYWORD)]:
            raise UsageError(
                f"{source} takes arguments; for a preflight it must take none, and return model, loader, criterion, "
                "optimizer (a function of a run is for doctor --resume)"
            )
        return function()
    except FivestepError:
        raise
    except Exception as error:
        raise UsageError(f"{source} raised {type(error).__name__}: {brief(error)}") from error
    finally:
        sys.dont_write_bytecode = before


def examined_objects(
    name: str, model: nn.Module, train: Any, criterion: Any, optimizer: Any, val: Any = None, **rest: Any
) -> Examined:
    """A job of these objects. Raises UsageError where they do not fit together, or cannot be copied."""
    optimizers = as_optimizers(optimizer)
    HeldParameters(model, criterion, optimizers)  # refuses
    device = next(model.parameters()).device
    with aside():
        drawn, validation = (
            [to_device(batch, device) for batch in islice(without_empty(batches(data, 0)), most)]
            for data, most in ((train, DRAWN), (() if val is None else val, VALIDATED))
        )
    if not drawn:
        raise UsageError(f"the data of {name} ({type(train).__name__}) gave no batch")
    if val is not None and not validation:
        raise UsageError(
            f"the validation data of {name} ({type(val).__name__}) gave no batch; leave it out, or fill it"
        )
    job = Examined(name, model, criterion, optimizers, train, val, batches=drawn, val_batches=validation, **rest)
    try:
        job.copy()
    except FivestepError:  # of the objects as they are, not of copying them
        raise
    except Exception as error:
        raise UsageError(
            f"the model, criterion or optimizer of {name} cannot be copied ({brief(error)}): what is tried is tried "
            "on copies, so leave out what copy.deepcopy does not take"
        ) from error
    with aside():
        try:
            loss_of(job.copy(), job.batches[0])
        except FivestepError:
            raise
        except Exception as error:
            kind = type(error).__name__
            raise UsageError(f"the first batch of {name} has no loss: {kind}: {brief(error)}") from error
    return job


def of_config(config: Config, source: str | None = None) -> Examined:
    """The job of a recipe, a run or a TOML file."""
    if "-" in config.data:
        raise UsageError("the data is standard input, which is there only once; give a file (--data)")
    name, device, data = source or config.recipe, build_device(config.device), build_data(config)
    use_threads(config.threads)
    facts = foreseen(config, data, device)
    used, notes = config, []
    if facts is not None and too_heavy(config, facts, device):
        used = msgspec.structs.replace(
            config, **{key: min(getattr(config, key) or n, n) for key, n in SMALLER.items()}
        )
        cut = f"--batch-size {used.batch_size} --block-size {used.block_size}"
        notes.append(f"a step of it is too much for this machine: tried on batches of {cut}")
        data = build_data(used)
    job = build_job(used, data)
    options = {key: step_options(used, job)[key] for key in ("precision", "clip_norm", "clip_value")}
    whole = data if used is config else build_data(config)  # as it was asked for
    length = plan(config, whole)
    return examined_objects(
        name,
        job.model,
        data.train,
        job.objective,
        job.optimizers,
        data.val,
        scheduler=build_schedule(config, whole.train),
        options=options,
        steps=length.steps,
        notes=notes,
        config=config,
        facts=facts,
    )


def foreseen(config: Config, data: Any, device: torch.device) -> Forecast | None:
    """The forecast; None for a model that does what tensors without values cannot."""
    try:
        with aside():
            return forecast(config, data, device)
    except FivestepError:
        raise
    except Exception:
        return None


def too_heavy(config: Config, facts: Forecast, device: torch.device) -> bool:
    """Whether a micro-batch is too much to be tried many times here, by its arithmetic or its memory."""
    rows = config.batch_size // config.accumulate
    length = config.block_size if config.model in WINDOWED else config.bptt
    units = rows * (1 if config.model == "mlp" else length)
    there = free(device)
    seconds = facts.flop * units / matmul_rate(device, config.precision)
    return seconds > HEAVY or (there is not None and 2 * facts.peak[0] > there)
