"""What is learned from a batch: how much there is to learn from, and the mean loss over it.

An objective is anything with

    count(batch)                -> what the mean is over: a number, or a scalar tensor on the batch's device
    loss(model, batch, carry)   -> (mean, carry): the mean loss over that count, and what the next batch needs

and, where it likes: `size(batch)` -> samples and tokens for the clock, `figures(loss)` -> what else a loss says,
`rate_scale(batch)` -> a factor of this step's learning rate, `in_evaluation()` -> the objective that judges,
`forward` and `compare` -> what metrics look at.

Count comes from the targets alone, so that a step can sum the counts of its whole window before the first
forward pass. `Supervised`, `NextToken` and `TruncatedBPTT` are the objectives of the three workloads; a torch loss
or a function `(outputs, targets) -> mean` becomes a `Supervised`. Does not step, move or average anything.
"""

from collections.abc import Callable
from copy import copy
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from fivestep.errors import UsageError, named
from fivestep.loop.batch import cut, rows, shapes
from fivestep.loop.counting import (
    compared,
    count_targets,
    divisor,
    is_torch_loss,
    misfit,
    named_criterion,
    option,
    unfit,
    without_smoothing,
)
from fivestep.loop.forward_signature import other_dtype, other_inputs, takes

PAIR = (tuple, list)  # asked at each step: a union would be built anew


@runtime_checkable
class Objective(Protocol):
    """What a step needs to know about a batch (see the module's docstring)."""

    def count(self, batch: Any) -> Any: ...
    def loss(self, model: nn.Module, batch: Any, carry: Any) -> tuple[Tensor, Any]: ...


class Supervised:
    """`criterion(model(features), labels)` on batches `(features, labels)`."""

    def __init__(self, criterion: Callable[..., Tensor]):
        if isinstance(criterion, type) or not callable(criterion):
            raise UsageError(
                f"the criterion is {named(criterion)}; it must be a loss such as nn.MSELoss(), or a function"
            )
        self.criterion = criterion
        self.over = divisor(criterion)  # what its mean is over: elements, classes or rows

    def pair(self, batch: Any) -> tuple[Any, Any]:
        """`batch` as `(features, labels)`; anything else is refused."""
        if not isinstance(batch, PAIR) or len(batch) != 2:
            held = f"{len(batch)} parts" if isinstance(batch, tuple | list | dict) else shapes(batch)
            raise UsageError(
                f"a batch must be a pair (features, labels); got {type(batch).__name__} with {held}. "
                "For batches of another shape pass an objective with count() and loss() as criterion"
            )
        return batch[0], batch[1]

    def count(self, batch: Any) -> Any:
        """What the criterion divides by: elements, non-ignored targets (or their summed class weights), or rows."""
        return count_targets(self.criterion, self.over, self.pair(batch)[1])

    def size(self, batch: Any) -> tuple[int, int]:
        """Samples and target tokens in `batch`, from its shape: what the clock counts."""
        return rows(self.pair(batch)[1]), 0

    def share(self, batch: Any, begin: int, end: int) -> Any:
        """The samples begin .. end - 1 of a batch, of as many as `size` tells; None where it cannot be cut."""
        return cut(batch, self.size(batch)[0], begin, end)

    def forward(self, model: nn.Module, batch: Any, carry: Any) -> tuple[Any, Any, Any]:
        """What the criterion compares: outputs and targets, and the carry for the next batch."""
        features, labels = self.pair(batch)
        try:
            return model(features), labels, None
        except (TypeError, ValueError, RuntimeError) as error:
            if sentence := other_inputs(model, features) or other_dtype(model, features, error):
                raise UsageError(sentence) from error
            raise

    def compare(self, outputs: Any, targets: Any) -> Tensor:
        """The mean loss; shapes that do not fit are refused instead of broadcast."""
        if self.over == "elements" and isinstance(outputs, Tensor) and unfit(self.criterion, outputs, targets):
            raise UsageError(misfit(self.criterion, self.over, outputs, targets))
        try:
            mean: Tensor = compared(self.criterion, self.over, outputs, targets)
            return mean
        except (RuntimeError, ValueError, IndexError, TypeError, AttributeError) as error:
            if isinstance(error, torch.OutOfMemoryError):
                raise
            if isinstance(error, TypeError) and not takes(self.criterion, outputs, targets):
                raise UsageError(
                    f"{named_criterion(self.criterion)} cannot be called as criterion(outputs, targets): {error}. A "
                    "loss that takes other arguments needs an objective with count() and loss() "
                    "(docs/objectives.md)"
                ) from error
            if self.over == "rows" and not is_torch_loss(self.criterion):
                raise
            sentence = misfit(self.criterion, self.over, outputs, targets)
            raise UsageError(f"{sentence}: {error}") from error

    def loss(self, model: nn.Module, batch: Any, carry: Any) -> tuple[Tensor, Any]:
        """The mean loss over `count(batch)`, and the next batch's carry."""
        outputs, targets, carry = self.forward(model, batch, carry)
        return self.compare(outputs, targets), carry

    def figures(self, loss: float) -> dict[str, float]:
        """What else a mean loss says, by name; nothing here."""
        return {}

    def in_evaluation(self) -> "Supervised":
        """The same without label smoothing, which is a means of training: a smoothed loss says little of the data."""
        if not option(self.criterion, "label_smoothing", 0.0):
            return self
        plain = copy(self)
        plain.criterion = without_smoothing(self.criterion)
        return plain


def as_objective(criterion: Any) -> Any:
    """`criterion` itself where it is an objective, else `Supervised(criterion)`."""
    if isinstance(criterion, Objective) and not isinstance(criterion, type):
        return criterion
    return Supervised(criterion)
