"""What a run will need, before it is started: parameters, memory, arithmetic, time.

    the run's own TrainStep on tensors without storage   -> every allocation, every matrix product   (`forecast`)
    three real steps and one evaluation batch of the run -> seconds, memory in use                   (`measure`)

Owns the figures; `dry_run.py` shows them. Makes no directory and keeps nothing. The forecast follows the allocations
of the very step that will run, so no formula for a model is in it, and it needs no memory of their size.
"""

import math
import warnings
from dataclasses import dataclass
from itertools import islice
from time import perf_counter

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from fivestep.data.stream import batches
from fivestep.loop.batch import to_device
from fivestep.loop.clock import Limit, parse_amount
from fivestep.loop.evaluate import evaluate
from fivestep.loop.precision import autocast
from fivestep.loop.step import TrainStep
from fivestep.loop.train import train
from fivestep.run.build import Data, build_job, build_objective, step_options
from fivestep.run.config import Config
from fivestep.run.ledger import Ledger, Shapes, count_flops, nbytes, uncounted
from fivestep.run.memory import forget_peak, held, peak_held

STEPS = 3  # real ones; the first warms up


@dataclass(frozen=True)
class Forecast:
    """What a step needs: elements, bytes, and FLOP of forward and backward together."""

    parts: dict[str, int]  # parameters by top-level part, shared ones with the first that has them
    trainable: int
    weights: int  # buffers included
    gradients: int
    optimizer_state: int
    average: int  # averaged weights
    activations: int  # that one micro-batch keeps from forward for backward
    batch: int  # of at most two micro-batches, where they live on the run's device
    largest: tuple[int, str]  # the largest tensor that a step makes, and the operation that makes it
    peak: tuple[int, str]  # the most that is held at once, from the second step on
    evaluation_peak: int
    saved: int  # of the weights in a checkpoint
    flop: float  # of a token, or of a sample where the data has no tokens
    uncounted: list[str]  # operations with products in them that `flop` leaves out

    @property
    def parameters(self) -> int:
        return sum(self.parts.values())


@dataclass(frozen=True)
class Plan:
    """How long the run is."""

    unit: str  # "tokens" or "samples"
    per_epoch: int  # of these
    steps_per_epoch: int
    steps: int | None  # None where it is not known beforehand
    evaluations: int | None

    @property
    def per_step(self) -> float:
        """Tokens or samples of a step, on average."""
        return self.per_epoch / self.steps_per_epoch


@dataclass(frozen=True)
class Measured:
    """What three real steps took."""

    warmup_seconds: float
    step_seconds: float
    evaluation_seconds: float  # of one batch
    peak: int | None  # bytes, beside what the process held before; None where the system does not tell


def forecast(config: Config, data: Data, device: torch.device) -> Forecast:
    """Two steps and one evaluation batch of the run, on tensors without storage.

    Of accumulated micro-batches two are taken: the second one finds the gradients of the first, as all later ones do.
    """
    drawn = list(islice(batches(data.train, 0), min(2, config.accumulate)))
    val_batch = next(iter(batches(data.val, 0)))
    with warnings.catch_warnings(), Shapes() as shapes, Ledger(device) as ledger:
        warnings.filterwarnings("ignore", message="Accessing the data pointer of FakeTensor")
        with device:
            job = build_job(config, data)
        for group in [group for optimizer in job.optimizers for group in optimizer.param_groups]:
            if device.type == "cuda" and group.get("foreach", False) is None:
                group["foreach"] = True  # torch's own choice there, which it does not make for these tensors
        model, objective, weights = job.model, job.objective, ledger.live
        window, val_batch = tree_map_only(Tensor, shapes.from_tensor, (drawn, val_batch))
        ledger.add(window)
        before = ledger.live
        with autocast(config.precision, device):
            kept = objective.loss(model, to_device(window[0], device), None)
        activations = ledger.live - before
        del kept
        step = TrainStep(model, objective, job.optimizers, **{**step_options(config, job), "graph": False})
        with count_flops() as counter:
            step(*window)
        ledger.rewind()
        step(*window)  # as every later one: beside the optimizer's state
        peak, largest = ledger.peak, ledger.largest
        ledger.rewind()
        with torch.no_grad(), step.state.average.in_place(), autocast(config.precision, device):
            objective.loss(model.eval(), to_device(val_batch, device), None)
        samples, tokens = (sum(sizes) for sizes in zip(*map(objective.size, window), strict=True))
        return Forecast(
            parts=by_part(model),
            trainable=sum(p.numel() for p in model.parameters() if p.requires_grad),
            weights=weights,
            gradients=nbytes([p.grad for p in model.parameters()]),
            optimizer_state=nbytes([dict(optimizer.state) for optimizer in step.optimizers]),
            average=nbytes(step.state.average.weights),
            activations=activations,
            batch=before - weights,
            largest=largest,
            peak=peak,
            evaluation_peak=ledger.peak[0],
            saved=nbytes(model.state_dict()),
            flop=counter.get_total_flops() / (tokens or samples),
            uncounted=uncounted(ledger.operations),
        )


def by_part(model: nn.Module) -> dict[str, int]:
    """Parameters by top-level part of the model; what two parts share counts where it comes first."""
    parts: dict[str, int] = {}
    for name, parameter in model.named_parameters():
        part = name.partition(".")[0]
        parts[part] = parts.get(part, 0) + parameter.numel()
    return parts


def plan(config: Config, data: Data, step_seconds: float | None = None) -> Plan:
    """The run's length; limits and intervals given as time need the `step_seconds` of a measured step."""
    objective, count = build_objective(config), len(data.train)
    if getattr(data.train, "variable", False):  # segments of drawn lengths
        sizes = list(map(objective.size, batches(data.train, 0)))
    else:  # all alike, but for the last
        first, last = (objective.size(next(iter(batches(data.train, 0, at)))) for at in (0, count - 1))
        sizes = [((count - 1) * first[0], (count - 1) * first[1]), last]
    samples, tokens = map(sum, zip(*sizes, strict=True))
    steps_per_epoch = -(-count // config.accumulate)
    per_step = {
        "step": 1.0,
        "epoch": 1 / steps_per_epoch,
        "samples": samples / steps_per_epoch,
        "tokens": tokens / steps_per_epoch,
        "seconds": step_seconds or 0.0,
    }
    ends = [
        end / per_step[unit]
        for unit, end in Limit(config.epochs, config.max_iters, config.until).ends
        if per_step[unit]
    ]
    steps = math.ceil(round(min(ends), 6)) if ends else None
    unit, every = parse_amount(config.eval_every, "eval_every (--eval-every)")
    evaluations = None
    if steps is not None and per_step[unit]:
        evaluations = math.ceil(round(steps * per_step[unit] / every, 6))  # the run's end is validated as well
    return Plan("tokens" if tokens else "samples", tokens or samples, steps_per_epoch, steps, evaluations)


def measure(config: Config, data: Data, device: torch.device) -> Measured:
    """Three steps of the run, with its own model, stream, optimizer and precision, and one evaluation batch."""
    before = held(device)
    job = build_job(config, data)
    steps = train(
        job.model,
        data.train,
        job.objective,
        job.optimizers,
        accumulate=config.accumulate,
        **{**step_options(config, job), "graph": False},
    )
    seconds, told = [], False
    for number in range(STEPS):
        if number == 1:
            told = forget_peak(device)
        start = perf_counter()
        float(next(steps).loss)  # HOST READ: the step is over
        seconds.append(perf_counter() - start)
    peak = peak_held(device) if told else None
    batch = next(iter(batches(data.val, 0)))
    start = perf_counter()
    evaluate(job.model, [batch], job.objective, metrics=job.metrics, precision=config.precision)
    evaluation_seconds = perf_counter() - start
    used = None if before is None or peak is None else peak - before
    return Measured(seconds[0], sum(seconds[1:]) / (STEPS - 1), evaluation_seconds, used)


def matmul_rate(device: torch.device, precision: str, size: int = 1024) -> float:
    """FLOP a second of a square matrix product, the best of three: what a step cannot exceed by much."""
    matrix = torch.ones(size, size, dtype=torch.float32 if precision == "fp32" else torch.bfloat16, device=device)
    seconds = []
    for _ in range(4):  # the first warms up
        start = perf_counter()
        float((matrix @ matrix)[0, 0])  # HOST READ: the product is there
        seconds.append(perf_counter() - start)
    return 2 * size**3 / min(seconds[1:])
