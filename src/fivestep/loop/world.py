"""Who trains: one process alone, or this process as one of several.

    Alone     the window of a step is whole, and its loss is the loss
    Several   this rank has a part of each window; loss, count and update are those of all ranks (`several.py`)

The step and the loop are written once, against what both answer, and mention neither.
"""

from collections.abc import Iterable
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from fivestep.loop.arithmetic import size_of
from fivestep.loop.batch import is_empty
from fivestep.loop.clock import Clock
from fivestep.loop.shares import check_sharers
from fivestep.loop.state import State
from fivestep.loop.window import Window


class Alone:
    """One process."""

    own_loss: Tensor  # of the last window, as far as this process has computed it

    def __init__(self, model: nn.Module, state: State):
        self.model, self.state, self.own_random = model, state, nullcontext()
        self.sized: list[tuple[int, int]] = []  # the sizes of the first window

    # --- the loop asks ---

    def begin_training(self, data: Any) -> None:
        """Prepare for a loop over `data`."""

    def begin_epoch(self, state: State, data: Any) -> None:
        """Reset what counts from the start of an epoch; where training resumes within one, nothing."""
        if state.is_new_epoch():
            state.carry = None
            state.epoch_loss.reset()
            state.sharers = 1
        check_sharers(state, data)

    def agreed(self, drawn: list[Any], state: State) -> list[Any]:
        """Return what this process computes on of the micro-batches that were drawn; empty at the epoch's end."""
        return drawn

    def all_ended(self, ended: bool) -> bool:
        """Return whether the epoch has ended in every process."""
        return ended

    def count_time(self, clock: Clock, seconds: float) -> None:
        """Add the seconds of a step to the clock."""
        clock.seconds += seconds

    # --- the step asks ---

    def window(self, objective: Any, batches: Iterable[Any]) -> Window:
        """Return the window of a step from its micro-batches."""
        window = Window(list(batches), self.state.place)
        if not self.sized:  # the clock counts after the update, too late for a wrong size
            self.sized = [size_of(objective, batch) for batch in window.batches if not is_empty(batch)]
        return window

    def passes(self, window: Window) -> Iterable[tuple[Any, Any]]:
        """Return each micro-batch with its count, in order."""
        return zip(window.batches, window.counts, strict=True)

    def summed(self, losses: list[Tensor], window: Window) -> Tensor:
        """Return the loss of the window, a scalar, from those of its micro-batches."""
        self.own_loss = losses[0] if len(losses) == 1 else torch.stack(losses).sum()
        return self.own_loss

    def hear(self) -> None:
        """Take up what other processes said with the sums of this step, where the host has waited for it anyway."""
