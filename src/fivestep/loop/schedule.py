"""The learning rate as a function of completed updates.

Pure functions: `step` (completed updates, 0 before the first) to a factor of the base learning rate. Give one to
`scheduler=` with its arguments bound: `partial(warmup_cosine, max_iters=1000, warmup_iters=100)`. Nothing is
counted here, so accumulation, processes, skipped updates and a resume cannot move a schedule.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from fivestep.errors import UsageError, named
from fivestep.loop.clock import Clock, Trigger


def constant(step: int, *, warmup_iters: int = 0) -> float:
    """1, after a linear warm-up: (step + 1) / warmup_iters for the first `warmup_iters` updates."""
    return min(1.0, (step + 1) / warmup_iters) if warmup_iters else 1.0


def warmup_cosine(step: int, *, max_iters: int, warmup_iters: int = 0, floor: float = 0.0) -> float:
    """Linear warm-up, then half a cosine from 1 to `floor` at `max_iters` (Loshchilov & Hutter 2017), then `floor`.

    warmup_cosine(0, max_iters=100, warmup_iters=10) == 0.1; (9) == (10) == 1.0; (55) == 0.5; (100) == 0.0
    """
    if step < warmup_iters:
        return constant(step, warmup_iters=warmup_iters)
    return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * _progress(step, max_iters, warmup_iters)))


def warmup_linear(step: int, *, max_iters: int, warmup_iters: int = 0, floor: float = 0.0) -> float:
    """Linear warm-up, then a straight line from 1 to `floor` at `max_iters`, then `floor`.

    warmup_linear(10, max_iters=110, warmup_iters=10) == 1.0; (60) == 0.5; (110) == 0.0
    """
    if step < warmup_iters:
        return constant(step, warmup_iters=warmup_iters)
    return floor + (1 - floor) * (1 - _progress(step, max_iters, warmup_iters))


def warmup_stable_decay(
    step: int, *, max_iters: int, decay_iters: int, warmup_iters: int = 0, floor: float = 0.0
) -> float:
    """Linear warm-up, then 1, then a straight line to `floor` over the last `decay_iters` of `max_iters` updates.

    (WSD; Hu et al. 2024, section 4.) The stable part can be trained on for as long as one likes, and decayed from
    anywhere. warmup_stable_decay(50, max_iters=100, decay_iters=20) == 1.0; (90) == 0.5; (100) == 0.0
    """
    if step < warmup_iters:
        return constant(step, warmup_iters=warmup_iters)
    remaining = max(0, max_iters - step) / max(1, decay_iters)
    return floor + (1 - floor) * min(1.0, remaining)


def _progress(step: int, max_iters: int, warmup_iters: int) -> float:
    return min(1.0, (step - warmup_iters) / max(1, max_iters - warmup_iters))


def as_schedulers(scheduler: Any) -> list[LRScheduler]:
    """The torch schedulers in `scheduler`: one, a list, or none where it is a function or None."""
    if scheduler is None or (callable(scheduler) and not isinstance(scheduler, type)):
        return []
    schedulers = list(scheduler) if isinstance(scheduler, list | tuple) else [scheduler]
    if any(isinstance(one, ReduceLROnPlateau) for one in schedulers):
        raise UsageError(
            "ReduceLROnPlateau follows a validation loss, which a step does not know: give fs.fit anneal=, or step "
            "it in your own loop over fs.train"
        )
    if not all(isinstance(one, LRScheduler) for one in schedulers):
        raise UsageError(
            f"the scheduler is {named(scheduler)}; it must be a torch scheduler, or a function of completed updates"
        )
    return schedulers


class LearningRate:
    """Applies `scheduler`: a function before each update, or torch schedulers after, `every` so often.

    The groups are read anew each time: loading a state, or adding a group, replaces them.
    """

    def __init__(self, optimizers: Sequence[Optimizer], scheduler: Any, every: int | str, clock: Clock):
        self.optimizers, self.schedulers = optimizers, as_schedulers(scheduler)
        self.trigger = Trigger(every, "scheduler_every")
        self.unscaled: list[tuple[dict[str, Any], Any]] = []  # groups and their rates, within an update
        self.factor: Callable[[int], float] | None = scheduler if callable(scheduler) else None
        if self.factor is not None and clock.step == 0:
            for optimizer in optimizers:
                for group in optimizer.param_groups:
                    group["initial_lr"] = _number(group["lr"])  # torch's own name for the base rate
                    if not group["initial_lr"]:
                        raise UsageError("the learning rate is 0, and so is any factor of it: set the optimizer's lr")

    def before_update(self, step: int, scale: float = 1.0) -> Any:
        """Set the rate of the update that follows `step` completed ones, times `scale`; returns the first group's.

        The scale (annealing, a segment's length) holds for this update alone: a torch scheduler computes its next
        rate from the one it finds. Raises UsageError for a rate that is not finite: it would make the weights so.
        """
        if self.factor is not None:
            factor = self.factor(step)
            if not isinstance(factor, int | float):
                raise UsageError(f"the scheduler gave {named(factor)} after step {step}; it must give a number")
            for optimizer in self.optimizers:
                for group in optimizer.param_groups:
                    rate = group.setdefault("initial_lr", _number(group["lr"])) * factor
                    if not math.isfinite(rate):
                        raise UsageError(f"the scheduler gave a learning rate of {rate} after step {step}")
                    set_rate(group, rate)
        self.unscaled = []
        if scale != 1.0:
            groups = [group for optimizer in self.optimizers for group in optimizer.param_groups]
            self.unscaled = [(group, _number(group["lr"])) for group in groups]
            for group, rate in self.unscaled:
                set_rate(group, rate * scale)
        rate = self.optimizers[0].param_groups[0]["lr"]
        return rate.clone() if isinstance(rate, Tensor) else rate  # a tensor is refilled by the next update

    def unscale(self) -> None:
        """Take the scale of an update away."""
        for group, rate in self.unscaled:
            set_rate(group, rate)
        self.unscaled = []

    def after_update(self, passed: float, clock: Clock) -> None:
        """Take the scale away; step the torch schedulers where a multiple was reached since `passed` so many."""
        self.unscale()
        if self.schedulers and self.trigger.passed(clock) > passed:
            for scheduler in self.schedulers:
                scheduler.step()


def set_rate(group: dict[str, Any], rate: float) -> None:
    """Give a parameter group a learning rate; a tensor is refilled, never replaced."""
    if isinstance(group["lr"], Tensor):
        group["lr"].fill_(rate)
    else:
        group["lr"] = rate


def _number(rate: Any) -> Any:
    return rate.item() if isinstance(rate, Tensor) else rate
