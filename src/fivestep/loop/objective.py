"""What is learned from a batch: how much there is to learn from, and the mean loss over it.

An objective is anything with

    count(batch)                -> what the mean is over: a number, or a scalar tensor on the batch's device
    loss(model, batch, carry)   -> (mean, carry): the mean loss over that count, and what the next batch needs

Count comes from the targets alone, so that a step can sum the counts of its whole window before the first
forward pass. `Supervised`, `NextToken` and `TruncatedBPTT` are the objectives of the three workloads; a torch loss
or a function `(outputs, targets) -> mean` becomes a `Supervised`. Does not step, move or average anything.
"""

import math
from collections.abc import Callable
from inspect import signature
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from fivestep.errors import UsageError, named
from fivestep.loop.batch import detach, rows, shapes
from fivestep.loop.counting import count_targets, divisor, kept_targets


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

    def scored(self, outputs: Any, targets: Any) -> tuple[Any, Any]:
        """Outputs [n, classes] and targets [n] of what is not ignored (padding at a split's end), for metrics to see.

        Where nothing is ignored they stay as they are.
        """
        if self.over != "classes" or targets.is_floating_point() or outputs.ndim < 2:
            return outputs, targets
        kept = kept_targets(self.criterion, targets)
        return (outputs, targets) if kept.all() else (outputs.movedim(1, -1)[kept], targets[kept])

    def size(self, batch: Any) -> tuple[int, int]:
        """Samples and target tokens in `batch`, from its shape: what the clock counts."""
        return rows(self.pair(batch)[1]), 0

    def forward(self, model: nn.Module, batch: Any, carry: Any) -> tuple[Any, Any, Any]:
        """What the criterion compares: outputs and targets, and the carry for the next batch."""
        features, labels = self.pair(batch)
        return model(features), labels, None

    def compare(self, outputs: Any, targets: Any) -> Tensor:
        """The mean loss; shapes that do not fit are refused instead of broadcast."""
        if self.over == "elements" and isinstance(outputs, Tensor) and outputs.shape != targets.shape:
            raise UsageError(self.misfit(outputs, targets))
        try:
            return self.criterion(outputs, targets)
        except (RuntimeError, ValueError, IndexError, TypeError) as error:
            if isinstance(error, torch.OutOfMemoryError) or self.over == "rows":
                raise
            raise UsageError(f"{self.misfit(outputs, targets)}: {error}") from error

    def misfit(self, outputs: Any, targets: Any) -> str:
        """The sentence for outputs that do not fit their targets."""
        name = getattr(self.criterion, "__name__", type(self.criterion).__name__)
        per_token = self.over == "classes" and isinstance(outputs, Tensor) and outputs.ndim == 3
        hint = "; for logits [batch, time, vocab_size] use fivestep.NextToken()" if per_token else ""
        if self.over == "elements" and isinstance(outputs, Tensor) and outputs.numel() == targets.numel():
            hint = "; give both the same shape, e.g. labels.unsqueeze(1)"
        return f"{name} cannot compare the model's output {shapes(outputs)} with targets {shapes(targets)}{hint}"

    def loss(self, model: nn.Module, batch: Any, carry: Any) -> tuple[Tensor, Any]:
        """The mean loss over `count(batch)`, and the next batch's carry."""
        outputs, targets, carry = self.forward(model, batch, carry)
        return self.compare(outputs, targets), carry

    def figures(self, loss: float) -> dict[str, float]:
        """What else a mean loss says, by name; nothing here."""
        return {}


class NextToken(Supervised):
    """Each position predicts the next token: `xb`, `yb` [batch, time], logits [batch, time, vocab_size].

    `chars_per_token` (1.0 for characters) adds bits per character to the figures.
    """

    def __init__(self, criterion: Callable[..., Tensor] | None = None, chars_per_token: float | None = None):
        super().__init__(criterion or nn.CrossEntropyLoss())
        self.chars_per_token = chars_per_token

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

    def figures(self, loss: float) -> dict[str, float]:
        """Perplexity, exp(loss), and bits per character where a token's length is known."""
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
    """

    def size(self, batch: Any) -> tuple[int, int]:
        """Columns and target tokens."""
        data = self.pair(batch)[0]
        return data.shape[1], data.numel()

    def forward(self, model: nn.Module, batch: Any, carry: Any) -> tuple[Any, Any, Any]:
        """Outputs flattened to [seq_len * batch_size, ntokens], the targets, and the detached hidden state."""
        data, target = self.pair(batch)
        if carry is None and hasattr(model, "init_hidden"):
            carry = model.init_hidden(data.shape[1])  # type: ignore[operator]
        output = model(data) if carry is None else with_hidden(model, data, carry)
        output, hidden = output if isinstance(output, tuple) else (output, None)
        return output.flatten(0, -2), target.flatten(), detach(hidden)


def with_hidden(model: nn.Module, data: Tensor, hidden: Any) -> Any:
    """`model(data, hidden)`; a model that returns a hidden state but does not take one is named."""
    try:
        return model(data, hidden)
    except TypeError as error:
        try:
            signature(model.forward).bind(data, hidden)
        except TypeError:
            raise UsageError(
                f"{type(model).__name__} returns a hidden state but its forward takes none: "
                "write forward(self, data, hidden=None), or return the output alone"
            ) from error
        raise


def as_objective(criterion: Any) -> Any:
    """`criterion` itself where it is an objective, else `Supervised(criterion)`."""
    if isinstance(criterion, Objective) and not isinstance(criterion, type):
        return criterion
    return Supervised(criterion)
