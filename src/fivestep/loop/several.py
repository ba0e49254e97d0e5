"""This process as one of several: its part of each window, and the sums with the other ranks.

Answers what `Alone` answers (`world.py`). `parallel.py` has the model's side: DDP or shards, and gradients.
"""

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from fivestep import processes
from fivestep.interrupts import asked
from fivestep.loop.batch import to_device
from fivestep.loop.clock import Clock
from fivestep.loop.parallel import Parallel
from fivestep.loop.shares import Shares, Sharing, as_shares
from fivestep.loop.state import State
from fivestep.loop.window import Window
from fivestep.loop.world import Alone


class RankWindow(Window):
    """This rank's part of a window; count, rate and size are those of the whole window."""

    __slots__ = ("parallel", "shares")

    def __init__(self, shares: Shares, parallel: Parallel):
        super().__init__(shares.batches)
        self.shares, self.parallel = shares, parallel
        self.counts, self.count, self.whole = shares.counts, shares.count, shares.whole

    def count_targets(self, objective: Any, device: torch.device) -> None:
        """Move the batches to `device`; the ranks have counted together already."""
        self.batches = [to_device(batch, device) for batch in self.batches]

    def rate(self, objective: Any) -> float:
        """Return what the objective multiplies the learning rate of this step by."""
        return self.shares.rate

    def sizes(self, objective: Any) -> list[tuple[int, int]]:
        """Return samples and tokens of the whole window, in one pair."""
        self.parallel.columns = self.shares.size[0] // len(self.batches)
        return [self.shares.size]


class Several(Alone):
    """One rank of several."""

    def __init__(self, parallel: Parallel, objective: Any, state: State):
        self.parallel, self.model, self.own_random = parallel, parallel.model, parallel  # type: ignore[assignment]
        self.objective, self.state = objective, state

    def begin_training(self, data: Any) -> None:
        """Prepare for a loop over `data`; from here on no rank leaves alone."""
        self.sharing = Sharing(self.objective, data)
        asked()

    def begin_epoch(self, state: State, data: Any) -> None:
        """Reset what counts from the start of an epoch, and let all ranks draw the same order."""
        super().begin_epoch(state, data)
        if state.is_new_epoch():
            state.sharers = processes.size()
            self.sharing.begin(data, state.clock.epoch)

    def agreed(self, drawn: list[Any], state: State) -> list[Any]:
        """Return this rank's share of each micro-batch; empty where the data of all ranks has ended."""
        return self.sharing.agreed(drawn, state.clock, state.position)

    def all_ended(self, ended: bool) -> bool:
        """Return whether the epoch has ended on every rank."""
        return self.sharing.all_ended(ended)

    def count_time(self, clock: Clock, seconds: float) -> None:
        """Count the time of rank 0, so that a trigger in seconds fires on all ranks at once."""
        self.parallel.take_up(clock, seconds)

    def window(self, objective: Any, batches: Iterable[Any]) -> Window:
        """Return this rank's part of the window of a step."""
        processes.at(f"step {self.state.clock.step + 1}: forward and backward")
        return RankWindow(as_shares(objective, tuple(batches)), self.parallel)

    def passes(self, window: Window) -> Iterator[tuple[Any, Any]]:
        """Yield each micro-batch with its count; the gradients of all ranks are summed with the last one."""
        for number, pair in enumerate(super().passes(window), 1):
            self.parallel.last(number == len(window.batches))
            yield pair

    def summed(self, losses: list[Tensor], window: Window) -> Tensor:
        """Return the loss of the window over all ranks, after their gradients are summed."""
        assert isinstance(window, RankWindow)
        return self.parallel.complete(super().summed(losses, window), window.shares.same)

    def hear(self) -> None:
        """Take up what other ranks said with the sums of this step."""
        self.parallel.hear()
