"""Windows of several corpora, drawn by weight: a stream, pure in `(seed, epoch, position)`.

    weights 0.7, 0.3 -> shares 7 : 3 -> a block of 1,030 windows: 721 of one corpus, 309 of the other, permuted
    window 5,000 -> block 4, place 880 -> the corpus there, and which of its windows: those of 4 blocks and
    of the places before it in this one -> that window of the corpus's own stream (`windows.py`)

Every block has the weights' exact proportions, and so does every stretch of blocks. The windows of a corpus come in
the order of its own stream, epoch after epoch: it is passed through as often as its weight asks, whatever the others
do. There is no state but the position: a seek computes one block. Owns the choice; the interleaving is `order.py`'s.
"""

from collections.abc import Iterator, Mapping, Sequence
from fractions import Fraction
from itertools import chain, islice
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fivestep.data.order import Int64Array, interleaved
from fivestep.data.tokenizer import Ids
from fivestep.data.tokens import JoinedIds, readable, runs
from fivestep.data.weights import shares
from fivestep.data.windows import Windows
from fivestep.errors import UsageError

BLOCK = 1024  # windows of a block, at least: its making is shared by many batches


class NoOneTextError(UsageError, AttributeError):
    """What is said where one text is needed; who only looks whether there is one (`hasattr`) finds none."""


class Mixture:
    """Training windows of several corpora: `(xb, yb)`, each int64 [batch, block_size], every batch full.

    corpora: 1-D ids by name. weights: how many windows are drawn from each, in proportion. An epoch has as many
    windows as the corpora have together, rounded up to a batch; how often each corpus is passed through is its own
    count (`passes`). Raises UsageError for a corpus too short for a window, and for weights that `shares` refuses.
    """

    def __init__(
        self,
        corpora: Mapping[str, Ids | JoinedIds],
        weights: Sequence[Fraction | float],
        block_size: int,
        batch_size: int,
        seed: int = 0,
        replacement: bool = False,
    ) -> None:
        if len(weights) != len(corpora):
            raise UsageError(f"{len(corpora)} corpora need as many weights; got {len(weights)}")
        ratio = shares(weights)
        repeats = -(-BLOCK // sum(ratio))
        self.names, self.shares = list(corpora), [share * repeats for share in ratio]
        self.block_size, self.batch_size, self.seed = block_size, batch_size, seed
        self.streams = [
            _windows(name, tokens, block_size, batch_size, _seed_of(seed, number), replacement)
            for number, (name, tokens) in enumerate(corpora.items())
        ]
        self.windows = sum(stream.windows for stream in self.streams)
        self._ids = [readable(tokens) for tokens in corpora.values()]
        self._before = np.cumsum([0, *(len(tokens) for tokens in corpora.values())])[:-1]
        self._block: tuple[int, Int64Array, Int64Array] | None = None  # the one made last: number, owners, begins

    def __len__(self) -> int:
        return -(-self.windows // self.batch_size)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return self.epoch(0)

    def epoch(self, epoch: int, start: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """Batches start, start + 1, ... of an epoch."""
        for position in range(start, len(self)):
            owners, begins = self.chosen(epoch, position)
            found = np.empty((self.batch_size, self.block_size + 1), np.int64)
            for number, ids in enumerate(self._ids):
                rows = np.flatnonzero(owners == number)
                if rows.size:
                    found[rows] = runs(ids, begins[rows], self.block_size + 1)
            yield torch.from_numpy(found[:, :-1].copy()), torch.from_numpy(found[:, 1:].copy())

    def chosen(self, epoch: int, position: int) -> tuple[Int64Array, Int64Array]:
        """The number of each row's corpus, and where in its tokens the row begins: [batch_size] each."""
        first = (epoch * len(self) + position) * self.batch_size  # windows drawn before
        parts, at, size = [], first, sum(self.shares)
        while at < first + self.batch_size:
            block, place = divmod(at, size)
            stop = min(size, place + first + self.batch_size - at)
            parts.append([whole[place:stop] for whole in self._made(block)])
            at += stop - place
        owners, begins = (np.concatenate(both) for both in zip(*parts, strict=True))
        return owners, begins

    def offsets(self, epoch: int, position: int) -> Int64Array:
        """Where each row of a batch begins, as if the corpora stood one after the other: [batch_size]."""
        owners, begins = self.chosen(epoch, position)
        found: Int64Array = self._before[owners] + begins
        return found

    @property
    def tokens(self) -> Ids:
        """What a stream of one text has. Raises NoOneTextError."""
        raise NoOneTextError("a mixture has no one text (--data with weights): give one of its corpora alone")

    def passes(self, epochs: float = 1) -> dict[str, float]:
        """How often each corpus has been passed through after so many epochs."""
        drawn = epochs * len(self) * self.batch_size
        parts = zip(self.names, self.shares, self.streams, strict=True)
        return {name: drawn * share / sum(self.shares) / stream.windows for name, share, stream in parts}

    def _made(self, block: int) -> tuple[Int64Array, Int64Array]:
        """The corpus of each place of a block, and where its window begins there: [sum(shares)] each."""
        if self._block is None or self._block[0] != block:
            owners = interleaved(self.shares, block, self.seed)
            begins = np.empty_like(owners)
            for number, (share, stream) in enumerate(zip(self.shares, self.streams, strict=True)):
                begins[owners == number] = stream.draws(block * share, (block + 1) * share)
            self._block = block, owners, begins
        return self._block[1:]


class InTurn:
    """Streams that cover a split each, one after the other: every target of every one once."""

    def __init__(self, streams: Sequence[Any]) -> None:
        self.streams = list(streams)

    def __len__(self) -> int:
        return sum(map(len, self.streams))

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return self.epoch(0)

    def epoch(self, epoch: int, start: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """Batches start, start + 1, ...: those of the first stream, then those of the second."""
        return chain.from_iterable(self._from(stream, epoch, skipped) for stream, skipped in self._places(start))

    def _places(self, start: int) -> Iterator[tuple[Any, int]]:
        for stream in self.streams:
            yield stream, min(start, len(stream))
            start = max(0, start - len(stream))

    @staticmethod
    def _from(stream: Any, epoch: int, skipped: int) -> Iterator[tuple[Tensor, Tensor]]:
        return islice(stream.epoch(epoch, skipped), len(stream) - skipped)


def _windows(
    name: str, tokens: Ids | JoinedIds, block_size: int, batch_size: int, seed: int, replacement: bool
) -> Windows:
    try:
        return Windows(tokens, block_size, batch_size, seed, replacement)
    except UsageError as error:
        raise UsageError(f"of the corpus {name}, {error}") from error


def _seed_of(seed: int, number: int) -> int:
    """A corpus's own seed: corpora of one length must not be read in one order."""
    if seed < 0:
        raise UsageError(f"--seed must be 0 or more; got {seed}")
    return int(np.random.SeedSequence([seed, number]).generate_state(1, np.uint64)[0])
