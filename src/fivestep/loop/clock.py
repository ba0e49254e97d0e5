"""One clock for everything that happens now and then: evaluate, log, save, sample, stop.

Owns the units (`250` steps, `1ep`, `10Mtok`, `5min`), the triggers and the limits. Does not read the time:
the loop writes `seconds`, so that a trigger is a function of the clock alone.
"""

import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from decimal import Decimal
from operator import index
from typing import Any

from fivestep.errors import UsageError, named

UNITS = {
    "": ("step", 1),
    "step": ("step", 1),
    "steps": ("step", 1),
    "ep": ("epoch", 1),
    "smp": ("samples", 1),
    "tok": ("tokens", 1),
    "s": ("seconds", 1),
    "min": ("seconds", 60),
    "h": ("seconds", 3600),
}
SCALES = {"": 1, "k": 10**3, "M": 10**6, "G": 10**9, "B": 10**9}
MOST, LARGEST_BATCH = 2**63, 2**43  # a count, and a batch, is below: a million largest batches fit
HOW_OFTEN = "a number of steps (250, 10k), epochs (1ep), samples (50ksmp), tokens (10Mtok) or time (30s, 5min, 2h)"


@dataclass(slots=True)
class Clock:
    """What training has completed: updates, epochs, samples, target tokens, and seconds.

    The seconds are those of drawing batches and stepping; what the caller does between two steps, evaluation among
    it, is not training and is not counted. `waiting` is the part of them that was spent on drawing batches.
    """

    step: int = 0
    epoch: int = 0
    samples: int = 0
    tokens: int = 0
    seconds: float = 0.0
    waiting: float = 0.0

    def count(self, samples: int, tokens: int) -> None:
        """Add a batch's size (see `checked_size`). Raises UsageError for a sum that does not fit 64 bits."""
        if self.samples + samples >= MOST or self.tokens + tokens >= MOST:
            raise UsageError(
                f"the run has counted {self.samples:,} samples and {self.tokens:,} tokens, and a count must stay "
                "below 2**63. Check the objective's size(batch)"
            )
        self.samples += samples
        self.tokens += tokens


def checked_size(returned: Any) -> tuple[int, int]:
    """Return what an objective's `size` returned, as two whole numbers. Raises UsageError for anything else."""
    needs = "it must return two whole numbers, samples and tokens. Correct the objective's size()"
    try:
        samples, tokens = (int(index(number)) for number in returned)
    except (TypeError, ValueError, RuntimeError) as error:
        parts = returned if isinstance(returned, tuple | list) else [returned]
        raise UsageError(f"size(batch) returned {', '.join(map(named, parts))}; {needs}") from error
    if not (0 <= samples < LARGEST_BATCH and 0 <= tokens < LARGEST_BATCH):
        raise UsageError(
            f"size(batch) returned {samples:,} samples and {tokens:,} tokens; each must be from 0 to "
            f"{LARGEST_BATCH - 1:,}. Correct the objective's size()"
        )
    return samples, tokens


def parse_amount(text: int | str, flag: str) -> tuple[str, float]:
    """`"10Mtok"` -> `("tokens", 1e7)`: the clock's field and how much of it."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([kMGB]?)([a-z]*)", str(text).strip())
    if not match or match[3] not in UNITS:
        raise UsageError(f"{flag} = {text!r} is not {HOW_OFTEN}")
    unit, size = UNITS[match[3]]
    amount = float(Decimal(match[1]) * SCALES[match[2]] * size)
    if amount >= MOST:
        raise UsageError(f"{flag} = {str(text)[:40]!r} is too large: give less than 2**63")
    if amount <= 0 or (unit != "seconds" and amount != int(amount)):
        raise UsageError(f"{flag} = {text!r} must be a whole number above 0 of steps, epochs, samples or tokens")
    return unit, amount


def parse_steps(text: int | str, flag: str) -> int:
    """Return a number of steps: `250`, `"10k"`. Raises UsageError, for an amount of anything else too."""
    if re.fullmatch(r"\s*-?\d{1,4000}\s*", str(text)):
        unit, amount = "step", int(text)
    else:
        unit, size = parse_amount(text, flag)
        amount = int(size)
    if unit != "step":
        other = ". For epochs, samples, tokens or time use until (--until)" if flag.startswith("max_iters") else ""
        raise UsageError(f"{flag} = {text!r} is not a number of steps. Give one, such as 250 or 10k{other}")
    if amount >= MOST:
        raise UsageError(f"{flag} = {str(text)[:40]!r} is too large: give less than 2**63")
    return amount


class Trigger:
    """Due whenever the clock has passed a multiple of `every`; `None` is never due.

    A function of two clocks and nothing else: a resumed run fires where the uninterrupted one would.
    """

    def __init__(self, every: int | str | None, flag: str):
        self.unit, self.every = ("step", math.inf) if every is None else parse_amount(every, flag)

    def passed(self, clock: Clock) -> float:
        """How many multiples the clock has reached."""
        now: float = getattr(clock, self.unit)
        return now // self.every

    def due(self, since: Clock, clock: Clock) -> bool:
        """Whether a multiple was reached since an earlier clock."""
        return self.passed(clock) > self.passed(since)


def check_accumulate(accumulate: int) -> None:
    """The number of micro-batches a step must be a whole one."""
    if isinstance(accumulate, bool) or not isinstance(accumulate, int) or not 1 <= accumulate < MOST:
        needs = "a whole number, 1 or more, and below 2**63 (--accumulate)"
        raise UsageError(f"accumulate = {accumulate!r:.40} must be {needs}")


class Limit:
    """Where training ends: at the first of the given epochs, updates (`max_iters`) or amount (`until`)."""

    def __init__(self, epochs: int | None, max_iters: int | str | None, until: int | str | None = None):
        if isinstance(max_iters, str):
            max_iters = parse_steps(max_iters, "max_iters (--max-iters)")
        given = {"epochs": epochs, "max_iters": max_iters}
        for name, value in given.items():
            if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 0):
                flag = "--" + name.replace("_", "-")
                raise UsageError(f"{name} = {value!r} must be a whole number, 0 or more ({flag})")
        self.ends: list[tuple[str, float]] = []
        if epochs is not None:
            self.ends.append(("epoch", epochs))
        if max_iters is not None:
            self.ends.append(("step", max_iters))
        if until is not None:
            self.ends.append(parse_amount(until, "until (--until)"))

    def reached(self, clock: Clock) -> bool:
        """Whether the clock stands at, or past, one of the ends."""
        for unit, end in self.ends:  # noqa: SIM110  (on each step's path: a generator costs half a microsecond)
            if getattr(clock, unit) >= end:
                return True
        return False

    def total_steps(self, steps_in: Callable[[int], int | None]) -> int | None:
        """The number of updates, where it is known beforehand (not for tokens or seconds).

        steps_in: how many updates so many epochs have, or None.
        """
        totals = [int(end) for unit, end in self.ends if unit == "step"]
        totals += [steps for unit, end in self.ends if unit == "epoch" and (steps := steps_in(int(end))) is not None]
        return min(totals, default=None)
