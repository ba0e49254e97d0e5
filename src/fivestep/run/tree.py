"""A tree of state as JSON and named tensors, and back: what `State.state_dict()` holds, without a pickle.

    {"step": 3, "carry": (h,)}   <->   {"step": 3, "carry": {"$tuple": [{"$tensor": "carry.0"}]}}, {"carry.0": h}

Leaves are tensors, numbers, strings, bytes, booleans and None; branches are lists, tuples, and dicts whose keys are
strings or numbers. A tensor that stands in two places is stored once. Pure functions; reads and writes no file.
"""

import base64
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fivestep.errors import UsageError, named

MARKS = ("$tensor", "$tuple", "$dict", "$bytes", "$float")
Tensors = dict[str, Tensor]


class UnreadableError(ValueError):
    """JSON that is no tree of ours."""


def flattened(tree: Any, same: Callable[[Tensor], Any] = id) -> tuple[Any, Tensors]:
    """The JSON and the tensors of a tree; `same` is equal of two that are one.

    Raises UsageError for a leaf of another kind, naming its place.
    """
    tensors: Tensors = {}
    return _encoded(tree, "", tensors, {}, same), tensors


def _encoded(value: Any, path: str, tensors: Tensors, known: dict[Any, str], same: Callable[[Tensor], Any]) -> Any:
    def inner(key: Any, part: Any) -> Any:
        return _encoded(part, f"{path}.{key}" if path else str(key), tensors, known, same)

    match value:
        case Tensor():
            if value.layout is not torch.strided or value.is_quantized:
                raise UsageError(f"the state {path!r} is a {value.layout} tensor; only dense tensors can be saved")
            if (one := same(value)) not in known:
                known[one] = _free(path, tensors)
                tensors[known[one]] = value
            return {"$tensor": known[one]}
        case np.bool_() | np.integer() | np.floating():
            return _number(value.item())
        case float():
            return _number(value)
        case None | bool() | int() | str():
            return value
        case bytes():
            return {"$bytes": base64.b64encode(value).decode()}
        case list():
            return [inner(i, part) for i, part in enumerate(value)]
        case tuple() if hasattr(value, "_fields"):
            raise UsageError(
                f"the state {path!r} is a {type(value).__name__}: the names of its fields would be lost; use a dict"
            )
        case tuple():
            return {"$tuple": [inner(i, part) for i, part in enumerate(value)]}
        case dict():
            if all(isinstance(key, str) and not key.startswith("$") for key in value):
                return {key: inner(key, part) for key, part in value.items()}
            for key in value:
                if not isinstance(key, str | int | float | None):
                    raise UsageError(f"the state {path!r} has the key {named(key)}; keys must be strings or numbers")
            return {"$dict": [[key, inner(key, part)] for key, part in value.items()]}
    raise UsageError(
        f"the state {path!r} is {named(value)}, which cannot be saved without running code when it is loaded; "
        "a state holds tensors, numbers, strings, bytes, None, lists, tuples and dicts"
    )


def _number(value: Any) -> Any:
    """Return a number as strict JSON has it, which knows no NaN and no infinity."""
    if isinstance(value, float) and not math.isfinite(value):
        return {"$float": str(value)}
    return value


def _free(path: str, taken: Tensors) -> str:
    """A name for a tensor: its path, unless a key with a dot in it has led there before."""
    name = path or "tensor"
    while name in taken or name == "__metadata__":  # that one is safetensors' own
        name += "'"
    return name


def restored(encoded: Any, tensors: Tensors) -> Any:
    """The tree that `flattened` was given. Raises UnreadableError."""
    if isinstance(encoded, list):
        return [restored(part, tensors) for part in encoded]
    if not isinstance(encoded, dict):
        return encoded
    mark = next((key for key in encoded if key in MARKS), None)
    if mark is None:
        return {key: restored(part, tensors) for key, part in encoded.items()}
    try:
        (content,) = encoded.values()
        match mark:
            case "$tensor":
                return tensors[content]
            case "$bytes":
                return base64.b64decode(content, validate=True)
            case "$float":
                return float(content)
            case "$tuple":
                return tuple(restored(part, tensors) for part in _listed(content))
            case _:
                return {key: restored(part, tensors) for key, part in _listed(content)}
    except (ValueError, KeyError, TypeError) as error:
        raise UnreadableError(f"its {mark} cannot be read ({type(error).__name__})") from error


def _listed(content: Any) -> list[Any]:
    if not isinstance(content, list):
        raise UnreadableError("it has no list where one belongs")
    return content
