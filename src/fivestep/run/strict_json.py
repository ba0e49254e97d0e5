"""Strict JSON: NaN and infinity are written as null, and named beside it.

    {"loss": nan, "step": 3}   ->   {"loss": null, "step": 3, "nonfinite": {"loss": "nan"}}

Owns this rule. JSON has no NaN and no Infinity, and other readers (jq, JavaScript, databases) refuse a file that
holds them. `loads` gives the floats back. It also reads the bare NaN and Infinity of files that were written earlier.
"""

import json
import math
from typing import Any

NONFINITE = "nonfinite"  # the key that names the values
NAMES = {"nan", "inf", "-inf"}


def dumps(value: Any, **how: Any) -> str:
    """Return `value` as strict JSON; `how` is passed on to `json.dumps`."""
    return json.dumps(encoded(value), allow_nan=False, **how)


def loads(text: str | bytes) -> Any:
    """Return what `dumps` was given. Raises ValueError and RecursionError."""
    return decoded(json.loads(text))


def encoded(value: Any) -> Any:
    """Replace each non-finite float by None; the object around it names the value under "nonfinite"."""
    if isinstance(value, dict):
        found = {name: names for name, part in value.items() if (names := _names(part)) is not None}
        table = {name: encoded(part) for name, part in value.items()}
        return {**table, NONFINITE: found} if found else table
    if isinstance(value, list | tuple):
        return [encoded(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _names(value: Any) -> Any:
    """Return the name of a non-finite float; for a list, a list of such names; None where all is finite."""
    if isinstance(value, list | tuple):
        names = [_names(part) for part in value]
        return names if any(name is not None for name in names) else None
    return str(float(value)) if isinstance(value, float) and not math.isfinite(value) else None


def decoded(value: Any) -> Any:
    """Put the floats that "nonfinite" names back in their places."""
    if isinstance(value, list):
        return [decoded(part) for part in value]
    if not isinstance(value, dict):
        return value
    names = value.get(NONFINITE)
    if not isinstance(names, dict):
        return {name: decoded(part) for name, part in value.items()}
    return {name: _put(decoded(part), names.get(name)) for name, part in value.items() if name != NONFINITE}


def _put(value: Any, names: Any) -> Any:
    if value is None and isinstance(names, str) and names in NAMES:
        return float(names)
    if isinstance(value, list) and isinstance(names, list) and len(value) == len(names):
        return [_put(part, name) for part, name in zip(value, names, strict=True)]
    return value
