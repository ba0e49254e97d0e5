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

import math
from collections.abc import Callable
from copy import copy
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from fivestep.errors import UsageError, named
from fivestep.loop.batch import cut, detach, rows, shapes
from fivestep.loop.counting import count_targets, divisor, misfit, option, without_smoothing
from fivestep.loop.vocabulary import checked_fused, fused_loss
from fivestep.models.contract import with_hidden


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
        if not isinstance(batch, tuple | list) or len(batch) != 2:
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
        return model(features), labels, None

    def compare(self, outputs: Any, targets: Any) -> Tensor:
        """The mean loss; shapes that do not fit are refused instead of broadcast."""
        if self.over == "elements" and isinstance(outputs, Tensor) and outputs.shape != targets.shape:
            raise UsageError(misfit(self.criterion, self.over, outputs, targets))
        try:
            return self.criterion(outputs, targets)
        except (RuntimeError, ValueError, IndexError, TypeError) as error:
            if isinstance(error, torch.OutOfMemoryError) or self.over == "rows":
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


class NextToken(Supervised):
    """Each position predicts the next token: `xb`, `yb` [batch, time], logits [batch, time, vocab_size].

    `chars_per_token` (1.0 for characters) adds bits per character to the figures. `fused`: True, or "auto" (where it
    wins), for a loss that never holds all logits: equal to rounding, not bit for bit (`loop/vocabulary.py`).
    """

    def __init__(self, criterion: Any = None, chars_per_token: float | None = None, fused: bool | str = False):
        super().__init__(criterion or nn.CrossEntropyLoss())
        self.chars_per_token, self.fused = chars_per_token, checked_fused(fused)

    def size(self, batch: Any) -> tuple[int, int]:
        """Windows and target tokens."""
        yb = self.pair(batch)[1]
        return yb.shape[0], yb.numel()

    def forward(self, model: nn.Module, batch: Any, carry: Any) -> tuple[Any, Any, Any]:
        """Logits [batch * time, vocab_size] and targets [batch * time]."""
        xb, yb = self.pair(batch)
        logits = model(xb)
        if not isinstance(logits, Tensor):
            raise UsageError(
                f"NextToken needs logits [batch, time, vocab_size] from the model, got {named(logits)}; "
                "for a model that returns (output, hidden) use fivestep.TruncatedBPTT()"
            )
        return logits.flatten(0, -2), yb.flatten(), None

    def loss(self, model: nn.Module, batch: Any, carry: Any) -> tuple[Tensor, Any]:
        """The mean loss over `count(batch)`, and the next batch's carry."""
        return fused_loss(self, model, batch, carry) or super().loss(model, batch, carry)

    def figures(self, loss: float) -> dict[str, float]:
        """Perplexity, exp(loss), and bits per character where a token's length is known; none of a smoothed loss."""
        if option(self.criterion, "label_smoothing", 0.0):
            return {}
        figures = {"perplexity": math.exp(loss) if loss < 700 else math.inf if loss == loss else math.nan}
        if self.chars_per_token:
            figures["bits_per_char"] = loss / math.log(2) / self.chars_per_token
        return figures


class TruncatedBPTT(NextToken):
    """Contiguous segments, the hidden state carried and detached (Williams & Peng 1990).

    `data` [seq_len, batch_size], `target` [seq_len * batch_size], `output` [seq_len, batch_size, ntokens]. A model
    that returns `(output, hidden)` gets `hidden` back with the next segment; one that returns the output alone is
    stateless. At an epoch's start the hidden state is `model.init_hidden(batch_size)` where the model has that,
    else nothing is passed.

    bptt: the base length of segments of varying length (`Segments(variable=True)`): each step's learning rate is
    multiplied by seq_len / bptt, so that a token weighs the same in a short segment (Merity et al. 2018, section 5).
    """

    def __init__(
        self,
        criterion: Any = None,
        chars_per_token: float | None = None,
        bptt: int | None = None,
        fused: bool | str = False,
    ):
        super().__init__(criterion, chars_per_token, fused)
        self.bptt = bptt

    def rate_scale(self, batch: Any) -> float:
        """The learning rate's factor for a segment: its length over the base length."""
        return 1.0 if self.bptt is None else self.pair(batch)[0].shape[0] / self.bptt

    def size(self, batch: Any) -> tuple[int, int]:
        """Columns and target tokens."""
        data = self.pair(batch)[0]
        return data.shape[1], data.numel()

    def share(self, batch: Any, begin: int, end: int) -> Any:
        """The columns begin .. end - 1 of a segment."""
        data, target = self.pair(batch)
        return data[:, begin:end], target.view_as(data)[:, begin:end].reshape(-1)

    def forward(self, model: nn.Module, batch: Any, carry: Any) -> tuple[Any, Any, Any]:
        """Outputs flattened to [seq_len * batch_size, ntokens], the targets, and the detached hidden state."""
        data, target = self.pair(batch)
        if carry is None and hasattr(model, "init_hidden"):
            carry = model.init_hidden(data.shape[1])  # type: ignore[operator]
        output = model(data) if carry is None else with_hidden(model, data, carry)
        output, hidden = output if isinstance(output, tuple) else (output, None)
        return output.flatten(0, -2), target.flatten(), detach(hidden)


def as_objective(criterion: Any) -> Any:
    """`criterion` itself where it is an objective, else `Supervised(criterion)`."""
    if isinstance(criterion, Objective) and not isinstance(criterion, type):
        return criterion
    return Supervised(criterion)
