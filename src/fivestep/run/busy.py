"""Whether other processes keep the cores busy: then threads that wait for each other can cost more than they bring.

    processor time of all processes - our own, over a span of wall time = cores that others used

Owns that measurement and the sentence on it. Linux only (/proc/stat); elsewhere nothing is said. Imports no torch.
"""

import os
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter

STAT = Path("/proc/stat")
SHORTEST = 0.5  # seconds of a span that can be judged: the system counts in ticks of 10 ms


@dataclass(frozen=True)
class Moment:
    """A point in time, in seconds, all but `wall` summed over the cores that we may use (`cores`)."""

    wall: float
    busy: float  # of every process
    ours: float  # of this process and the children that it waited for
    cores: int


def moment() -> Moment | None:
    """Now; None where the system does not tell."""
    try:
        allowed = os.sched_getaffinity(0)
        ticks = [
            [int(part) for part in counts]
            for name, *counts in map(str.split, STAT.read_text().splitlines())
            if name.startswith("cpu") and name[3:].isdecimal() and int(name[3:]) in allowed
        ]
        # proc_stat(5): user, nice, system, idle, iowait, irq, softirq, steal
        busy = sum(sum(counts[:3]) + sum(counts[5:8]) for counts in ticks) / os.sysconf("SC_CLK_TCK")
    except (OSError, ValueError, AttributeError):
        return None
    return Moment(perf_counter(), busy, sum(os.times()[:4]), len(ticks))


def busy_note(before: Moment | None, now: Moment | None, threads: int) -> str | None:
    """A sentence where `threads` and what others used between the two moments are more than the cores; else None."""
    if before is None or now is None or now.wall - before.wall < SHORTEST or threads < 2:
        return None
    others = (now.busy - before.busy - (now.ours - before.ours)) / (now.wall - before.wall)
    if others + threads <= now.cores + 0.5:
        return None
    fewer = max(1, int(now.cores - others))
    return (
        f"note: other processes keep {others:.1f} of the {now.cores} cores busy, and {threads} threads that wait for "
        f"each other may be slower than fewer: try --threads {fewer}"
    )
