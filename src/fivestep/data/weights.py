"""Weights of corpora: `wiki/:0.7` as given to `--data`, and the whole numbers that stand for them.

Owns the reading and the arithmetic, which is exact. Which windows follow from it is `mixture.py`'s.
"""

import re
from collections.abc import Mapping, Sequence
from fractions import Fraction
from math import gcd, lcm
from typing import Any

from fivestep.errors import UsageError

WEIGHTED = re.compile(r"(.+):(\d+(?:\.\d+)?(?:[eE][-+]?\d{1,2})?)")
MOST_SHARES = 10_000  # what the whole numbers may add up to: a mixture repeats itself after that many windows
MANNER = "give each corpus a weight above 0, as in --data wiki/:0.7 --data code/:0.3"


def weighted(sources: Sequence[str]) -> dict[str, Fraction] | None:
    """The weight of each source, or None where no source has one.

    A weight stands behind the last colon: a decimal number. Raises UsageError where only some have one, where one is
    0, or a source comes twice.
    """
    found = [WEIGHTED.fullmatch(source) for source in sources]
    if not any(found):
        return None
    if not all(found):
        plain = next(source for source, match in zip(sources, found, strict=True) if not match)
        raise UsageError(f"--data {plain} has no weight, but others have: {MANNER}")
    weights: dict[str, Fraction] = {}
    for match in found:
        assert match is not None
        if match[1] == "-":
            raise UsageError("--data - is standard input, which cannot be one of several: give files")
        if match[1] in weights:
            raise UsageError(f"--data {match[1]} comes twice: {MANNER}")
        weights[match[1]] = Fraction(match[2])
    shares(list(weights.values()))
    return weights


def as_sources(table: Mapping[str, Any]) -> list[str]:
    """The sources of a table of weights, as a configuration file may give them: {"wiki/": 0.7, "code/": 0.3}."""
    for source, weight in table.items():
        if (
            isinstance(weight, bool)
            or not isinstance(weight, int | float)
            or WEIGHTED.fullmatch(f"a:{weight}") is None
        ):
            raise UsageError(f"data.{source} = {weight!r} is no weight: {MANNER}")
    return [f"{source}:{weight}" for source, weight in table.items()]


def shares(weights: Sequence[Fraction | float]) -> list[int]:
    """The smallest whole numbers in the ratio of the weights: 0.7 and 0.3 -> 7 and 3.

    A float counts as the decimal number that it is written as. Raises UsageError for one that is not above 0, and
    where the numbers add up to more than `MOST_SHARES`: the ratio could not be kept within a few thousand windows.
    """
    try:
        exact = [weight if isinstance(weight, Fraction) else Fraction(str(weight)) for weight in weights]
    except ValueError:  # NaN and infinity
        exact = []
    if not exact or min(exact) <= 0:
        raise UsageError(f"the weights {', '.join(map(str, weights)) or 'are none'}: {MANNER}")
    scale = lcm(*(weight.denominator for weight in exact))
    whole = [int(weight * scale) for weight in exact]
    found = [count // gcd(*whole) for count in whole]
    if sum(found) > MOST_SHARES:
        raise UsageError(
            f"the weights {', '.join(str(float(weight)) for weight in exact)} are in the ratio "
            f"{':'.join(map(str, found))}, too fine to keep: round them, to a sum of 1 and at most four decimals"
        )
    return found
