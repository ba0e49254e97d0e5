"""Whose run a directory is, under torchrun: a later round of the launch that began it goes on with it, unasked.

    runs/NAME/.launch   the round that trained here last, and the launchers of its processes

torchrun starts the same command again when a process is lost or one more comes. What its earlier round began is then
there already, and is no other's run. Owns that file; without torchrun there is none.
"""

import json
from pathlib import Path

from fivestep import processes
from fivestep.data.files import read_bounded, write_durably

LAUNCH = ".launch"
MOST = 1 << 20  # bytes


def mark(run: Path) -> None:
    """Write down that this launch trains here. Raises OSError."""
    if processes.launchers():
        told = {"round": processes.this_round(), "launchers": processes.launchers()}
        write_durably(run / LAUNCH, json.dumps(told).encode())


def begun_by_us(run: Path) -> bool:
    """Whether this launch began the run, in this round or an earlier one."""
    return _read(run)[1]


def begun_before(run: Path) -> bool:
    """Whether an earlier round of this launch began the run, and this one has not gone on with it yet."""
    last, ours = _read(run)
    return ours and last != processes.this_round()


def _read(run: Path) -> tuple[str, bool]:
    """The round that trained there last, and whether it was of this launch."""
    try:
        told = json.loads(read_bounded(run / LAUNCH, MOST))
        return told["round"], not set(told["launchers"]).isdisjoint(processes.launchers())
    except (OSError, ValueError, RecursionError, KeyError, TypeError):
        return "", False
