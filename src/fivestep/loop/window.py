"""The window of one step: its micro-batches, how many targets each has, and how many all have together.

Owns the counting. `shares.py` has the window of one rank among several, which answers the same questions.
"""

from collections.abc import Callable
from typing import Any

import torch

from fivestep.loop.arithmetic import counted, rate_scale, size_of, window_count
from fivestep.loop.batch import to_device


class Window:
    """The micro-batches of one step.

    batches: what this process computes on. whole: the same of all processes. counts, count: what the mean of each
    batch is over, and of all together; both are set by `count_targets`. place: returns the place in the data, for
    errors; empty where the caller draws the batches.
    """

    __slots__ = ("batches", "count", "counts", "place", "whole")

    def __init__(self, batches: list[Any], place: Callable[[], str] = str):
        self.batches = self.whole = batches
        self.place = place
        self.counts: list[Any] = []
        self.count: Any = 0

    def count_targets(self, objective: Any, device: torch.device) -> None:
        """Move the batches to `device`, leave out the empty ones, and count. Raises UsageError for a count of 0."""
        moved = [to_device(batch, device) for batch in self.batches]
        self.batches, self.counts = counted(objective, moved, where=self.place)
        self.whole, self.count = self.batches, window_count(self.counts)

    def rate(self, objective: Any) -> float:
        """Return what the objective multiplies the learning rate of this step by."""
        return rate_scale(objective, self.batches)

    def sizes(self, objective: Any) -> list[tuple[int, int]]:
        """Return samples and tokens, for the clock, of each batch."""
        return [size_of(objective, batch) for batch in self.batches]
