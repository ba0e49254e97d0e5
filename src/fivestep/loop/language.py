"""Objectives of language models: next tokens of windows, and of contiguous segments whose state is carried.

Owns what a batch of tokens means, what is carried, and the figures of a mean loss; the protocol is `objective.py`'s.
"""

import math
from typing import Any

from torch import Tensor, nn

from fivestep.errors import UsageError, named
from fivestep.loop.batch import detach
from fivestep.loop.counting import option
from fivestep.loop.objective import Supervised
from fivestep.loop.vocabulary import checked_fused, fused_loss
from fivestep.models.contract import with_hidden


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
