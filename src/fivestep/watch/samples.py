"""A sample of text along the way: written with the current weights, shown under the bar, kept in a file.

A watcher. Training does not notice it: modes and random states are put back, and the draws come from a generator of
their own. Owns when, and how much of a sample is shown; how text is written is the caller's.
"""

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from fivestep.loop.clock import Clock, Trigger
from fivestep.loop.evaluate import undisturbed
from fivestep.loop.result import StepResult

SCREEN_LINES = 20  # of a sample that is shown; its file has all


def on_screen(text: str, kept: Path) -> str:
    """`text` for a person: blank lines one at a time, and `SCREEN_LINES` lines at most; `kept` holds all of it."""
    lines = re.sub(r"\n\s*\n", "\n\n", text.strip()).splitlines()
    if len(lines) <= SCREEN_LINES:
        return "\n".join(lines)
    return "\n".join([*lines[:SCREEN_LINES], f"... (whole in {kept})"])


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
