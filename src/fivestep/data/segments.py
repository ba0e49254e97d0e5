"""Segments of a text for truncated back-propagation through time.

    tokens  a b c d e f g h i j k l m   cut into 2 columns    a g      data = rows i .. i + seq_len - 1
                                                              b h      target = one row later, flattened
                                                              . .

Owns the columns and the cut. The order never changes: column c of a batch goes on where column c of the batch
before ended, so a carried state meets the text that follows it. Where an epoch is cut may vary, as a pure function of
(seed, epoch). A batch is a copy, and aliases no tokens.
"""

import math
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from fivestep.data.order import Int64Array, drawn
from fivestep.data.tokenizer import Ids
from fivestep.data.tokens import JoinedIds, readable, runs
from fivestep.data.windows import IGNORED
from fivestep.errors import UsageError

MIN_LENGTH, SPREAD = 5, 5  # tokens, of variable segments
LEAST_BPTT = 2 * MIN_LENGTH  # below, the shortest length would be the rule
DRAWS = 1 << 32  # uniform numbers are drawn below this


class Segments:
    """Training segments: (data [seq_len, batch_size], target [seq_len * batch_size]), both int64.

    The columns are word_language_model's: `len(tokens) // batch_size` rows, the remainder dropped, and
    `seq_len = min(bptt, rows - 1 - i)` for i = 0, bptt, ...; the short tail is kept. Raises UsageError for
    fewer than two tokens a column or a size below 1.

    variable: each epoch is cut into segments of other lengths, around `bptt` (see `variable_lengths`), so that the
    borders, over which no gradient flows, fall elsewhere each time; an epoch then has about as many batches, and
    `batches_in(epoch)` says how many. Give the objective the same base length: `TruncatedBPTT(bptt=...)`.
    """

    def __init__(
        self, tokens: Ids | JoinedIds, batch_size: int, bptt: int, variable: bool = False, seed: int = 0
    ) -> None:
        _check_sizes(batch_size, bptt)
        if variable and bptt < LEAST_BPTT:
            raise UsageError(f"variable segments need --bptt {LEAST_BPTT} or more; got --bptt {bptt}")
        self.rows = len(tokens) // batch_size
        if self.rows < 2:
            raise UsageError(
                f"the training split has {len(tokens):,} tokens, but --batch-size {batch_size} columns need at least "
                f"{2 * batch_size:,}: lower --batch-size, or give more text (--data, --val-fraction)"
            )
        self.tokens, self.batch_size, self.bptt = tokens, batch_size, bptt
        self.variable, self.seed = variable, seed
        self._cuts: tuple[int, Int64Array] | None = None  # of the epoch read last
        self._ids, self._columns = readable(tokens), np.arange(batch_size) * self.rows  # where each column begins

    def __len__(self) -> int:
        return self.batches_in(0)

    def batches_in(self, epoch: int) -> int:
        """How many batches an epoch has."""
        return len(self.cuts(epoch)) - 1 if self.variable else -(-(self.rows - 1) // self.bptt)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return self.epoch(0)

    def epoch(self, epoch: int, start: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """Batches start, start + 1, ... of an epoch."""
        for position in range(start, self.batches_in(epoch)):
            i, end = self._cut(epoch, position)
            columns = runs(self._ids, i + self._columns, end + 1 - i)  # [batch_size, seq_len + 1]
            yield _turned(columns[:, :-1]), _turned(columns[:, 1:]).view(-1)

    def _cut(self, epoch: int, position: int) -> tuple[int, int]:
        """The row where a segment begins, and the one where the next begins, or the last one ends."""
        if self.variable:
            begin, end = self.cuts(epoch)[position : position + 2].tolist()
            return begin, end
        return position * self.bptt, min((position + 1) * self.bptt, self.rows - 1)

    def cuts(self, epoch: int) -> Int64Array:
        """The rows where an epoch's variable segments begin, and the row where the last one ends: [batches + 1]."""
        last = self.rows - 1
        if self._cuts is None or self._cuts[0] != epoch:
            begins = np.cumsum(variable_lengths(self.bptt, last // MIN_LENGTH + 1, self.seed, epoch))
            self._cuts = epoch, np.concatenate([[0], begins[begins < last], [last]])
        cuts: Int64Array = self._cuts[1]
        return cuts

    def offsets(self, epoch: int, position: int) -> Int64Array:
        """Where in the tokens each column of a batch begins: [batch_size]."""
        return self._cut(epoch, position)[0] + self._columns


def longest(bptt: int) -> int:
    """What no variable segment exceeds: the largest number that the draws below can give, 6.66 deviations up."""
    return bptt + math.ceil(SPREAD * math.sqrt(2 * math.log(DRAWS)))


def variable_lengths(bptt: int, n: int, seed: int, epoch: int) -> Int64Array:
    """`n` lengths of segments, at least MIN_LENGTH: normal around `bptt`, or (one in 20) around half of it.

    The standard deviation is 5 tokens (Merity, Keskar and Socher 2018, "Regularizing and optimizing LSTM language
    models", section 5). A pure function of its arguments.
    """
    halves, radii, angles = drawn(0, 3 * n, DRAWS, seed, epoch).reshape(3, n)
    normal = np.sqrt(-2 * np.log((radii + 1) / DRAWS)) * np.cos(2 * np.pi * angles / DRAWS)  # Box and Muller 1958
    base = np.where(halves < DRAWS // 20, bptt / 2, bptt)
    lengths: Int64Array = np.maximum(MIN_LENGTH, base + SPREAD * normal).astype(np.int64)
    return lengths


class CoveringSegments:
    """Evaluation segments, shaped as `Segments`: each of the `len(tokens) - 1` targets exactly once.

    Columns of L = ceil((len - 1) / batch_size) inputs overlap by one token, so no target falls between two;
    past the end inputs are 0 and targets -100, which cross-entropy ignores. A text with fewer targets than
    columns gets as many columns as it has targets. Raises UsageError for fewer than 2 tokens or a size
    below 1.
    """

    def __init__(self, tokens: Ids | JoinedIds, batch_size: int, bptt: int) -> None:
        _check_sizes(batch_size, bptt)
        if len(tokens) < 2:
            raise UsageError(f"a split needs 2 tokens or more to have a target; it has {len(tokens)}")
        self.tokens, self.bptt = tokens, bptt
        self.batch_size = min(batch_size, len(tokens) - 1)
        self.length = -(-(len(tokens) - 1) // self.batch_size)  # L
        self._ids = readable(tokens)

    def __len__(self) -> int:
        return -(-self.length // self.bptt)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return self.epoch(0)

    def epoch(self, epoch: int, start: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """Batches start, start + 1, ...; the epoch changes nothing."""
        last = len(self.tokens) - 1
        for position in range(start, len(self)):
            seq_len = min(self.bptt, self.length - position * self.bptt)
            begins = self.offsets(epoch, position)
            columns = runs(self._ids, begins, seq_len + 1)  # [batch_size, seq_len + 1]
            data, target = _turned(columns[:, :-1]), _turned(columns[:, 1:])
            if begins[-1] + seq_len > last:
                past = torch.from_numpy(begins + np.arange(seq_len)[:, None] >= last)  # [seq_len, batch_size]
                data[past], target[past] = 0, IGNORED
            yield data, target.view(-1)

    def offsets(self, epoch: int, position: int) -> Int64Array:
        """Where in the tokens each column of a batch begins, a padded one past the end: [batch_size]."""
        return position * self.bptt + np.arange(self.batch_size) * self.length


def _check_sizes(batch_size: int, bptt: int) -> None:
    if batch_size < 1 or bptt < 1:
        raise UsageError(
            f"--batch-size and --bptt must be 1 or more; got --batch-size {batch_size} and --bptt {bptt}"
        )


def _turned(columns: Ids) -> Tensor:
    """Columns side by side, as a copy: [seq_len, columns]."""
    return torch.from_numpy(columns.T.astype(np.int64, order="C"))
