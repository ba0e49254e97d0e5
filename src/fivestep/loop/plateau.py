"""What to do when validation stops improving: a lower learning rate, back to the best weights, or the end.

    validation loss -> Plateau.judge -> "" | "annealed" | "stopped early"

A validation *improves* when its loss is below every one before it; NaN never does. Owns the counts and the annealing
factor, which are part of the state; applies nothing to an optimizer: the step multiplies its rate by `annealing`.
"""

import math
from dataclasses import dataclass
from typing import Any

from fivestep.errors import UsageError

ANNEALED, STOPPED = "annealed", "stopped early"


@dataclass(frozen=True, slots=True)
class PlateauRule:
    """The settings.

    anneal: what the learning rate is divided by (word_language_model: 4); None: never.
    patience: validations without improvement, since the best or the last annealing, that are let pass.
    stop_after: validations in a row without improvement that end the training; None: never.
    to_best: back to the weights and the optimizer of the best validation, at each annealing and at an early stop.
    """

    anneal: float | None = None
    patience: int = 0
    stop_after: int | None = None
    to_best: bool = False

    def __post_init__(self) -> None:
        number = isinstance(self.anneal, int | float) and not isinstance(self.anneal, bool)
        if self.anneal is not None and not (number and 1 < self.anneal < math.inf):
            raise UsageError(f"anneal = {self.anneal!r} must be above 1: the rate is divided by it (--anneal)")
        for name, least in (("patience", 0), ("stop_after", 1)):
            value = getattr(self, name)
            if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < least):
                flag = {"patience": "anneal_patience (--anneal-patience)", "stop_after": "early_stop (--early-stop)"}
                raise UsageError(f"{flag[name]} = {value!r} must be a whole number of validations, {least} or more")
        if self.to_best and self.anneal is None and self.stop_after is None:
            raise UsageError("to_best (--to-best) needs anneal or early_stop (--anneal, --early-stop) to act on")

    @property
    def acts(self) -> bool:
        """Whether there is anything to do."""
        return self.anneal is not None or self.stop_after is not None


@dataclass(slots=True)
class Plateau:
    """The state: what validation reached, and what came of it."""

    best_loss: float = math.inf
    since_best: int = 0  # validations
    since_annealed: int = 0  # validations without improvement, since the best or the last annealing
    annealing: float = 1.0  # the learning rate's factor
    best: dict[str, Any] | None = None  # model and optimizers at the best validation, where they are wanted

    def stopped(self, rule: PlateauRule) -> bool:
        """Whether validation has not improved for so long that training ends."""
        return rule.stop_after is not None and self.since_best >= rule.stop_after

    def judge(self, loss: float, rule: PlateauRule) -> str:
        """Take in one validation; what it brings: `""`, `"annealed"` or `"stopped early"`."""
        if loss < self.best_loss:
            self.best_loss, self.since_best, self.since_annealed = loss, 0, 0
            return ""
        self.since_best += 1
        self.since_annealed += 1
        if self.stopped(rule):
            return STOPPED
        if rule.anneal is not None and self.since_annealed > rule.patience:
            self.annealing /= rule.anneal
            self.since_annealed = 0
            return ANNEALED
        return ""
