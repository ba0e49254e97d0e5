"""One iteration of the real loop, seen from where a run stands: before a step, after it, and before the next.

    steps(TrainStep, data, ...) -- before_step --> the five steps -- yield --> ... -- before_step --> ...
                                       |                  |                          |
                                  a copy of all      gradients, as             a copy of all,
                                  it starts from     backward leaves them      changed by one update

The training is what `fivestep train` makes, stepped by `loop/step.py`; nothing is put in its place. Owns the copies,
and computing on them again from the same random state. What is made of them is `explain_measure.py`'s.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from copy import deepcopy
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from fivestep.data.generators import random_state, random_state_kept
from fivestep.loop.arithmetic import rate_scale
from fivestep.loop.batch import parts, rebuilt, to_device
from fivestep.loop.clock import Limit
from fivestep.loop.copies import copied
from fivestep.loop.lean import backward
from fivestep.loop.result import StepResult
from fivestep.loop.state import State
from fivestep.loop.step import TrainStep
from fivestep.loop.train import steps
from fivestep.run.build import Job, step_options
from fivestep.run.config import Config


@dataclass
class Moment:
    """All that a step starts from: its window, and copies of model, optimizer states, hidden state, random states."""

    window: list[Any]
    model: nn.Module
    optimizers: list[dict[str, dict[str, Any]]]  # of each its state, by the parameter's name
    carry: Any
    random: dict[str, Any]
    step: int  # completed updates
    epoch: int  # from 0
    position: int  # micro-batches of the epoch that are behind

    def again(self) -> AbstractContextManager[None]:
        """Inside, random numbers come as they came to this step; afterwards the generators are as before."""
        return random_state_kept(self.random)

    def in_double(self) -> "Moment":
        """The same in float64, with a model of its own."""
        return replace(
            self,
            window=[in_double(batch) for batch in self.window],
            model=deepcopy(self.model).double(),
            optimizers=[],
            carry=in_double(self.carry),
        )


@dataclass
class Iteration:
    """A step as it was made. Gradients by the parameter's name."""

    five: TrainStep
    before: Moment
    after: Moment  # before the next step
    result: StepResult
    gradients: dict[str, Tensor]  # as backward left them
    clipped: dict[str, Tensor]  # as the update took them: `.grad` after the step
    following: dict[str, Tensor]  # of the next batch, as backward left them
    rates: list[list[float]]  # of each optimizer's groups
    previous: list[Any] | None = None  # the window before


class Observer:
    """Stands where a run stands in the loop, from step `at` on; keeps nothing on a disk."""

    def __init__(self, five: TrainStep, at: int):
        self.five, self.at = five, at
        self.names = {id(parameter): name for name, parameter in five.model.named_parameters()}
        self.moments: dict[int, Moment] = {}  # by completed updates
        self.seen: dict[str, Tensor] = {}
        self.handles: list[Any] = []
        self.window: list[Any] | None = None
        self.previous: list[Any] | None = None

    def keep(self, state: State) -> None:
        """Between two steps there is nothing to save."""

    def before_drawing(self, state: State) -> None:
        """Nothing is resumed, so nothing is remembered."""

    def before_step(self, state: State, window: list[Any]) -> None:
        """The next step will read `window`."""
        if state.clock.step < self.at:
            self.previous = window if state.clock.step == self.at - 1 else None
            return
        device = self.five.parameters[0].device
        self.moments[state.clock.step] = Moment(
            [to_device(batch, device) for batch in window],
            deepcopy(state.model),
            [self.held(optimizer) for optimizer in self.five.optimizers],
            copied(state.carry),
            random_state(),
            state.clock.step,
            state.clock.epoch,
            state.position,
        )
        self.seen = {}
        if not self.handles:
            for parameter in self.five.parameters:
                self.handles.append(parameter.register_post_accumulate_grad_hook(self.see))  # type: ignore[no-untyped-call]

    def held(self, optimizer: torch.optim.Optimizer) -> dict[str, dict[str, Any]]:
        """A copy of what `optimizer` remembers of each parameter."""
        return {self.names[id(p)]: copied(dict(optimizer.state.get(p, {}))) for p in held_by(optimizer)}

    def see(self, parameter: Tensor) -> None:
        """`.grad` as it stands after a backward: of the whole window so far."""
        scale = self.five.state.loss_scale
        assert parameter.grad is not None
        self.seen[self.names[id(parameter)]] = parameter.grad.detach() / scale.scale

    def leave(self) -> None:
        """Take the hooks away."""
        for handle in self.handles:
            handle.remove()


def observed(
    config: Config,
    job: Job,
    step: int = 0,
    saved: dict[str, Any] | None = None,
    told: Callable[[int], None] | None = None,
) -> Iteration:
    """Train `job` up to `step` completed updates, and observe the next one.

    saved: a state to go on from, of at most so many updates. told: is called with the updates so far. The steps are
    the eager ones, of which a graph is a program. Trains one step beyond, whose gradient shows what a reset is for.
    Raises NonFiniteError where a step is not finite.
    """
    five = TrainStep(job.model, job.objective, job.optimizers, **{**step_options(config, job), "graph": False})
    if saved is not None:
        five.state.load_state_dict(saved)
    observer = Observer(five, step)
    loop = steps(five, job.data.train, Limit(None, None), config.accumulate, observer)
    try:
        result = next(loop)
        while result.step <= step:
            if told is not None:
                told(result.step)
            result = next(loop)
        first = observer.seen
        clipped = {name: p.grad.detach().clone() for name, p in five.model.named_parameters() if p.grad is not None}
        rates = rates_of(five, observer.moments[step].window)
        next(loop)
    finally:
        observer.leave()
        loop.close()  # type: ignore[attr-defined]
    before, after = observer.moments[step], observer.moments[step + 1]
    previous = observer.previous if before.position else None
    return Iteration(five, before, after, result, first, clipped, observer.seen, rates, previous)


def held_by(optimizer: torch.optim.Optimizer) -> list[Any]:
    """The parameters of an optimizer, in its order."""
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def rates_of(five: TrainStep, window: list[Any]) -> list[list[float]]:
    """The learning rates of the update just made: those of the groups, times what held for this update alone."""
    scale = five.state.plateau.annealing * rate_scale(five.objective, window)
    return [[float(group["lr"]) * scale for group in optimizer.param_groups] for optimizer in five.optimizers]


def in_double(value: Any) -> Any:
    """`value` with every tensor of fractions in it as float64."""
    if isinstance(value, Tensor):
        return value.double() if value.is_floating_point() else value
    return rebuilt(value, [in_double(part) for part in parts(value)])


def window_loss(five: TrainStep, moment: Moment, model: nn.Module, precise: bool = False) -> Tensor:
    """The mean loss of a window under `model`, from the moment's hidden state, without gradients.

    precise: without autocast. Random numbers are drawn as they come: see `Moment.again`.
    """
    with torch.no_grad():
        means = [mean * share for mean, share in window_losses(five, moment, model, precise)]
    return means[0] if len(means) == 1 else torch.stack(means).sum()


def window_losses(
    five: TrainStep, moment: Moment, model: nn.Module, precise: bool = False
) -> Iterator[tuple[Tensor, float]]:
    """The mean loss of each micro-batch, and its share in the window's: 1 for a single one."""
    objective, carry = five.objective, moment.carry
    counts = [float(objective.count(batch)) for batch in moment.window]
    for batch, count in zip(moment.window, counts, strict=True):
        with torch.autocast(five.parameters[0].device.type, enabled=False) if precise else five.autocast:
            mean, carry = objective.loss(model, batch, carry)
        yield mean, count / sum(counts)


def added_up(five: TrainStep, moment: Moment, left: dict[str, Tensor]) -> dict[str, Tensor]:
    """`.grad` after a backward of the moment's window that began with `left` instead of nothing."""
    model = deepcopy(moment.model)
    for name, parameter in model.named_parameters():
        parameter.grad = left[name].clone() if name in left else None
    with moment.again():
        for mean, share in window_losses(five, moment, model):
            backward(mean * share, None)
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@dataclass
class Path:
    """What each part of a model gave out, in order: name, kind, and the first tensor of it."""

    parts: list[tuple[str, str, tuple[int, ...], torch.dtype]] = field(default_factory=list)

    def see(self, name: str, module: nn.Module, inputs: Any, output: Any) -> None:
        """A forward hook."""
        first = output
        while isinstance(first, tuple | list) and first:
            first = first[0]
        if isinstance(first, Tensor):
            self.parts.append((name, type(module).__name__, tuple(first.shape), first.dtype))


@contextmanager
def path_seen(model: nn.Module) -> Iterator[Path]:
    """Inside, a forward of `model` leaves what its parts gave out; lists and sequences are looked into."""
    path = Path()
    handles = [module.register_forward_hook(partial(path.see, name)) for name, module in parts_of(model)]
    try:
        yield path
    finally:
        for handle in handles:
            handle.remove()


def parts_of(model: nn.Module, prefix: str = "") -> Iterator[tuple[str, nn.Module]]:
    """The children of a model by name, and those of its lists in their place."""
    for name, child in model.named_children():
        if isinstance(child, nn.ModuleList | nn.Sequential):
            yield from parts_of(child, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", child
