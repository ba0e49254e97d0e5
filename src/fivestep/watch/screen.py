"""rich, imported without a trace: its import draws from Python's global generator, which is the user's."""

import random

_state = random.getstate()

from rich.console import Console  # noqa: E402
from rich.progress import (  # noqa: E402
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

random.setstate(_state)

__all__ = [
    "BarColumn",
    "Console",
    "MofNCompleteColumn",
    "Progress",
    "TextColumn",
    "TimeElapsedColumn",
    "TimeRemainingColumn",
]
