"""A sample of text along the way: written with the current weights, shown under the bar, kept in a file.

A watcher. Training does not notice it: modes and random states are put back, and the draws come from a generator of
their own. Owns when; how text is written is the caller's.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from fivestep.loop.clock import Clock, Trigger
from fivestep.loop.evaluate import undisturbed
from fivestep.loop.step import StepResult


class Samples:
    """Every `every` ("500", "1ep", "5min"): `keep(step, write())`, with the weights of that step (the averaged
    ones, where there are).
    """

    def __init__(
        self,
        every: int | str,
        write: Callable[[], str],
        keep: Callable[[int, str], None],
    ):
        self.trigger = Trigger(every, "sample_every (--sample-every)")
        self.write, self.keep = write, keep
        self.last: Clock | None = None

    def __call__(self, result: StepResult, rows: list[dict[str, Any]]) -> None:
        """Write one where it is due."""
        state = result.state
        if self.trigger.due(self.last or state.begun, state.clock):
            self.last = replace(state.clock)
            with state.averaged(), undisturbed(state.model):
                text = self.write()
            self.keep(result.step, text)
