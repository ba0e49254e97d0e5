"""Rows of tensors: `(features, labels)` batches, and two small sets of rows to learn from.

Owns the batches of the `regression` and `digits` recipes, and their data. The order is `order.py`'s. A user's own
Dataset needs none of this: any DataLoader serves (`stream.py`).
"""

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from fivestep.data.order import Int64Array, permuted, read
from fivestep.errors import UsageError
from fivestep.extras import installing

Split = tuple[Tensor, Tensor]


class Examples:
    """Batches (features[rows], labels[rows]): a stream, pure in `(seed, epoch, position)`.

    features, labels: the same number of rows. Each row is seen once an epoch, in permuted order or, with
    `shuffle=False`, in the order given; the last batch is short. Batches are copies, on the tensors' device.
    Raises UsageError for no rows, unequal numbers of rows, or a batch size below 1.
    """

    ordered_by_rows = True  # an epoch's order of rows is the same whatever the batch size

    def __init__(
        self, features: Tensor, labels: Tensor, batch_size: int, seed: int = 0, shuffle: bool = True
    ) -> None:
        if batch_size < 1:
            raise UsageError(f"--batch-size must be 1 or more; got {batch_size}")
        if features.ndim == 0 or labels.ndim == 0 or not 0 < len(features) == len(labels):
            raise UsageError(
                f"features and labels must have the same number of rows, 1 or more; "
                f"got shapes {list(features.shape)} and {list(labels.shape)}"
            )
        self.features, self.labels = features, labels
        self.batch_size, self.seed, self.shuffle = batch_size, seed, shuffle

    def __len__(self) -> int:
        return -(-len(self.features) // self.batch_size)

    def __iter__(self) -> Iterator[Split]:
        return self.epoch(0)

    def epoch(self, epoch: int, start: int = 0) -> Iterator[Split]:
        """Batches start, start + 1, ... of an epoch."""
        for rows in self._rows(epoch, start, len(self)):
            index = torch.from_numpy(rows)
            yield self.features[index], self.labels[index]

    def offsets(self, epoch: int, position: int) -> Int64Array:
        """The rows of a batch: [batch]."""
        (rows,) = self._rows(epoch, position, position + 1)
        return rows

    def _rows(self, epoch: int, first: int, last: int) -> Iterator[Int64Array]:
        """The rows of the batches first .. last - 1."""
        n, size = len(self.features), self.batch_size
        if self.shuffle:
            yield from read(n, size, self.seed, epoch, start=first * size, stop=min(last * size, n))
        else:
            yield from (np.arange(at, min(at + size, n)) for at in range(first * size, min(last * size, n), size))


def line(
    examples: int = 1000, noise: float = 0.1, seed: int = 0, slope: float = 2.0, intercept: float = 1.0
) -> dict[str, Split]:
    """Points about a line: y = slope * x + intercept + noise * e, x uniform in [-1, 1], e standard normal.

    Returns (x, y), float32 [n, 1] each, by split: 80 % "train", 10 % "val", 10 % "test". The best mean
    squared error is about noise ** 2. Draws from a generator of its own. Raises UsageError for fewer than
    10 examples.
    """
    if examples < 10:
        raise UsageError(f"a line needs at least 10 examples, so that no split is empty; got {examples}")
    generator = torch.Generator().manual_seed(seed)
    x = torch.rand(examples, 1, generator=generator) * 2 - 1
    y = slope * x + intercept + noise * torch.randn(examples, 1, generator=generator)
    return _split(x, y)


def digits(seed: int = 0) -> dict[str, Split]:
    """scikit-learn's 1,797 handwritten digits of 8 x 8 grey levels, shuffled by `seed`, then split 80/10/10.

    Returns (features float32 [n, 64] in [0, 1], labels int64 [n]) for "train", "val" and "test". Raises
    UsageError where scikit-learn is missing.
    """
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise UsageError(f"the digits come with scikit-learn: {installing('digits')}") from None
    images, labels = load_digits(return_X_y=True)
    rows = permuted(np.arange(len(labels)), len(labels), seed, epoch=0)
    features = torch.from_numpy((images[rows] / 16).astype(np.float32))
    return _split(features, torch.from_numpy(labels[rows].astype(np.int64)))


def _split(features: Tensor, labels: Tensor) -> dict[str, Split]:
    train, val = len(features) * 8 // 10, len(features) // 10
    spans = {"train": slice(train), "val": slice(train, train + val), "test": slice(train + val, None)}
    return {split: (features[span], labels[span]) for split, span in spans.items()}
