"""The learning rate as a function of completed updates.

Pure functions: `step` (completed updates, 0 before the first) to a factor of the base learning rate. Give one to
`scheduler=` with its arguments bound: `partial(warmup_cosine, max_iters=1000, warmup_iters=100)`. Nothing is
counted here, so accumulation, processes, skipped updates and a resume cannot move a schedule.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any
from weakref import WeakKeyDictionary

import torch
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
        for scheduler in self.schedulers:
            check_owner(scheduler, optimizers)
        for optimizer in optimizers:
            last = LAST_RATES.get(optimizer, [])
            for group in optimizer.param_groups:
                by_hand = settle(group, last)
                if self.factor is not None:
                    if by_hand:
                        group["initial_lr"] = _number(group["lr"])  # torch's own name for the base rate
                    base = group.setdefault("initial_lr", _number(group["lr"]))
                    if not base and clock.step == 0:
                        raise UsageError("the learning rate is 0, and so is any factor of it: set the optimizer's lr")

    def before_update(self, step: int, scale: float = 1.0) -> Any:
        """Set the rate of the update that follows `step` completed ones, times `scale`; returns the first group's.

        The scale (annealing, a segment's length) holds for this update alone: a torch scheduler computes its next
        rate from the one it finds. Raises UsageError for a rate that is not finite: it would make the weights so.
        """
        self.unscale()  # a step may have failed between here and `after_update`
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
        if scale != 1.0:
            groups = [group for optimizer in self.optimizers for group in optimizer.param_groups]
            self.unscaled = [(group, _number(group["lr"])) for group in groups]
            for group, rate in self.unscaled:
                set_rate(group, rate * scale)
        if self.factor is not None or scale != 1.0:
            self._note_rates()
        rate = self.optimizers[0].param_groups[0]["lr"]
        return copied_rate(rate)

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
            self._note_rates()

    def _note_rates(self) -> None:
        """Note the rates that this schedule leaves in the optimizers, so that others are known to be set by hand."""
        unscaled = iter(self.unscaled)
        for optimizer in self.optimizers:
            LAST_RATES[optimizer] = [
                (group, copied_rate(group["lr"]), next(unscaled, (group, None))[1])
                for group in optimizer.param_groups
            ]


LAST_RATES: WeakKeyDictionary[Optimizer, list[tuple[dict[str, Any], Any, Any]]] = WeakKeyDictionary()
"""Of each optimizer: the groups that a schedule has last set a rate of, that rate, and the one without annealing."""


def settle(group: dict[str, Any], last: list[tuple[dict[str, Any], Any, Any]]) -> bool:
    """Take away the annealing that a failed step has left in a group; return whether a user has set its rate by hand.

    Only a group that a schedule has set before can tell: torch's LambdaLR reads a base rate from "initial_lr" where
    there is one, whatever the rate is.
    """
    for one, rate, unscaled in last:
        if one is group:
            by_hand = not same_rate(group["lr"], rate) and not (
                unscaled is not None and same_rate(group["lr"], unscaled)
            )
            if not by_hand and unscaled is not None:
                set_rate(group, unscaled)
            return by_hand
    return False


def same_rate(rate: Any, noted: Any) -> bool:
    """Return whether a rate is the very one that was noted: an equal number set by hand is another object."""
    if isinstance(rate, Tensor):
        return bool(rate == torch.as_tensor(noted, dtype=rate.dtype, device=rate.device))
    return rate is noted


def copied_rate(rate: Any) -> Any:
    """Return a rate that later updates do not change."""
    return rate.clone() if isinstance(rate, Tensor) else rate


def check_owner(scheduler: LRScheduler, optimizers: Sequence[Optimizer]) -> None:
    """Raise UsageError where a torch scheduler was built for an optimizer that is not stepped here."""
    owner = getattr(scheduler, "optimizer", None)
    if owner is not None and not any(owner is optimizer for optimizer in optimizers):
        raise UsageError(
            f"the scheduler ({named(scheduler)}) belongs to another optimizer, so it would not change this learning "
            "rate. Build it with the optimizer that you pass here"
        )


def set_rate(group: dict[str, Any], rate: float) -> None:
    """Give a parameter group a learning rate; a tensor is refilled, never replaced."""
    if isinstance(group["lr"], Tensor):
        group["lr"].fill_(rate)
    else:
        group["lr"] = rate


def _number(rate: Any) -> Any:
    return rate.item() if isinstance(rate, Tensor) else rate
