"""Averages that are sums over counts.

A mean over batches of uneven size is `sum(mean_i * count_i) / sum(count_i)`; the plain mean of batch means is
wrong as soon as one batch is short. Nothing is read from the device until a result is asked for.
"""

import math
from typing import Any

import torch
from torch import Tensor

from fivestep import processes

CHUNK = 256  # pending scalars are packed into one tensor at this many
CHUNKS = 64  # and folded, which reads the device, at this many chunks: memory is bounded


class Mean:
    """The count-weighted mean of device scalars, folded on the host, in float64, in the order they came."""

    __slots__ = ("_packed", "_pending", "_taken", "total", "weight")

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """Start anew."""
        self.total, self.weight = 0.0, 0.0
        self._taken = 0  # entries that are pending no more
        self._pending: list[tuple[Tensor, Any]] = []
        self._packed: list[tuple[Tensor, list[Any]]] = []

    @property
    def entries(self) -> int:
        """How many means it was given."""
        return self._taken + len(self._pending)

    def add(self, value: Tensor, count: Any) -> None:
        """Take in a batch's mean `value` (a scalar, detached) over `count` (a number or a scalar tensor)."""
        self._pending.append((value, count))
        if len(self._pending) == CHUNK:
            self._pack()
            if len(self._packed) == CHUNKS:
                self._fold()

    def result(self) -> float:
        """The mean so far; NaN over nothing. Reads the device."""
        self._fold()
        return self.total / self.weight if self.weight else math.nan

    def sum_over_processes(self) -> None:
        """Make the sums those of all processes, of which each had batches of its own. Reads the device."""
        self._fold()
        self.total, self.weight = processes.totals(self.total, self.weight)

    def state_dict(self) -> dict[str, float]:
        """The sums, as numbers. Reads the device."""
        self._fold()
        return {"total": self.total, "weight": self.weight, "entries": self.entries}

    def load_state_dict(self, saved: dict[str, float]) -> None:
        """Go on from saved sums."""
        self.reset()
        self.total, self.weight, self._taken = saved["total"], saved["weight"], int(saved["entries"])

    def _pack(self) -> None:
        values, counts = [list(column) for column in zip(*self._pending, strict=True)]
        if all(isinstance(count, Tensor) for count in counts):
            counts = [torch.stack(counts)]  # one tensor, one read
        self._packed.append((torch.stack(values), counts))
        self._taken += len(values)
        self._pending = []

    def _fold(self) -> None:
        if self._pending:
            self._pack()
        for values, counts in self._packed:
            stacked = isinstance(counts[0], Tensor) and counts[0].ndim
            numbers = counts[0].tolist() if stacked else [float(count) for count in counts]
            # A left fold, one by one: the sum does not depend on when it was asked for.
            for value, count in zip(values.tolist(), numbers, strict=True):
                if count:  # over nothing there is no mean: 0/0 of an all-ignored micro-batch stays out
                    self.total += value * count
                    self.weight += count
        self._packed = []
