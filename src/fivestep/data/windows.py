"""Windows of a text: `(xb, yb)`, each int64 [batch, block_size], `yb` one token later than `xb`.

Owns the cut and the gather. The order is `order.py`'s, the ids `tokens.py`'s; models that carry a state from
batch to batch read `segments.py` instead. A batch is a copy: it never aliases the tokens.
"""

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from fivestep.data.order import Int64Array, drawn, read
from fivestep.data.tokenizer import Ids
from fivestep.data.tokens import JoinedIds, readable, runs
from fivestep.errors import UsageError

IGNORED = -100  # the target that torch's cross-entropy leaves out


class Windows:
    """Training windows in shuffled order: a stream, pure in `(seed, epoch, position)`.

    tokens: 1-D ids, mapped or not, of one file or many. Without replacement an epoch passes once over the text: n
    windows that do not overlap, cut from a phase of [0, block_size) that the epoch draws, visited in permuted order;
    the last batch is short. At most two windows' worth of tokens stay out, other ones each epoch. With replacement
    every window starts anywhere, uniformly, and every batch is full (nanoGPT's sampling); an epoch has as
    many batches. Raises UsageError for a text of fewer than block_size + 1 tokens or a size below 1.
    """

    ordered_by_rows = True  # an epoch's order of rows is the same whatever the batch size

    def __init__(
        self, tokens: Ids | JoinedIds, block_size: int, batch_size: int, seed: int = 0, replacement: bool = False
    ) -> None:
        _check_sizes(block_size, batch_size)
        if len(tokens) < block_size + 1:
            raise UsageError(
                f"the training split has {len(tokens):,} tokens, but a window of --block-size {block_size} needs "
                f"{block_size + 1:,}: lower --block-size, or give more text (--data, --val-fraction)"
            )
        self.tokens, self.block_size, self.batch_size = tokens, block_size, batch_size
        self.seed, self.replacement = seed, replacement
        # One window fewer than fit, so that every phase leaves room and n is the same in every epoch.
        self.windows = max(1, (len(tokens) - 1) // block_size - 1)
        self._ids = readable(tokens)

    def __len__(self) -> int:
        return -(-self.windows // self.batch_size)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return self.epoch(0)

    def epoch(self, epoch: int, start: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """Batches start, start + 1, ... of an epoch."""
        for offsets in self._offsets(epoch, start, len(self)):
            found = runs(self._ids, offsets, self.block_size + 1)  # [batch, block_size + 1]
            yield _int64(found[:, :-1]), _int64(found[:, 1:])

    def offsets(self, epoch: int, position: int) -> Int64Array:
        """Where in the tokens each row of a batch begins: [batch]."""
        (offsets,) = self._offsets(epoch, position, position + 1)
        return offsets

    def draws(self, start: int, stop: int) -> Int64Array:
        """Where the windows start .. stop - 1 begin, counted on from epoch to epoch: [stop - start]."""
        parts = [np.empty(0, np.int64)]
        while start < stop:
            epoch, first = divmod(start, self.windows)
            count = min(stop - start, self.windows - first)
            parts += self._begins(epoch, first, first + count, count)
            start += count
        return np.concatenate(parts)

    def _offsets(self, epoch: int, first: int, last: int) -> Iterator[Int64Array]:
        """The offsets of the batches first .. last - 1."""
        return self._begins(epoch, first * self.batch_size, last * self.batch_size, self.batch_size)

    def _begins(self, epoch: int, start: int, stop: int, size: int) -> Iterator[Int64Array]:
        """Where the windows start .. stop - 1 of an epoch begin, `size` at a time."""
        if self.replacement:
            n = len(self.tokens) - self.block_size
            yield from read(n, size, self.seed, epoch, start=start, stop=stop, replacement=True)
            return
        room = min(self.block_size, len(self.tokens) - self.windows * self.block_size)
        phase = drawn(0, 1, room, self.seed, epoch)
        for windows in read(self.windows, size, self.seed, epoch, start=start, stop=min(stop, self.windows)):
            yield phase + windows * self.block_size


class CoveringWindows:
    """Evaluation windows: in order, each of the `len(tokens) - 1` targets exactly once, every epoch alike.

    The last window is padded: input 0, target -100, which cross-entropy ignores. The last batch may have
    fewer rows. Raises UsageError for fewer than 2 tokens or a size below 1.
    """

    def __init__(self, tokens: Ids | JoinedIds, block_size: int, batch_size: int) -> None:
        _check_sizes(block_size, batch_size)
        if len(tokens) < 2:
            raise UsageError(f"a split needs 2 tokens or more to have a target; it has {len(tokens)}")
        self.tokens, self.block_size, self.batch_size = tokens, block_size, batch_size
        self.windows = -(-(len(tokens) - 1) // block_size)
        self._ids = readable(tokens)

    def __len__(self) -> int:
        return -(-self.windows // self.batch_size)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return self.epoch(0)

    def epoch(self, epoch: int, start: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """Batches start, start + 1, ...; the epoch changes nothing."""
        for position in range(start, len(self)):
            offsets, last = self.offsets(epoch, position), len(self.tokens) - 1
            found = runs(self._ids, offsets, self.block_size + 1)  # [batch, block_size + 1]
            xb, yb = _int64(found[:, :-1]), _int64(found[:, 1:])
            if (inside := last - int(offsets[-1])) < self.block_size:  # only of the last window
                xb[-1, inside:], yb[-1, inside:] = 0, IGNORED
            yield xb, yb

    def offsets(self, epoch: int, position: int) -> Int64Array:
        """Where in the tokens each row of a batch begins: [batch]."""
        first = position * self.batch_size
        return np.arange(first, min(first + self.batch_size, self.windows)) * self.block_size


def _check_sizes(block_size: int, batch_size: int) -> None:
    if block_size < 1 or batch_size < 1:
        raise UsageError(
            f"--block-size and --batch-size must be 1 or more; got --block-size {block_size} and "
            f"--batch-size {batch_size}"
        )


def _int64(found: Ids) -> Tensor:
    return torch.from_numpy(found.astype(np.int64, order="C"))  # always a copy
