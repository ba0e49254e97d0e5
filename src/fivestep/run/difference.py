"""The first difference between two runs of one training, by name: in state, weights and rows. Times do not count.

    difference("runs/whole", "runs/resumed") -> None, or "step 40: optimizers.0.state.3.exp_avg differs (max 1.2e-7)"

Reads both, changes neither. Weights, optimizer state, random states and positions are compared bit for bit.
"""

import re
from collections.abc import Collection, Iterator
from itertools import zip_longest
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fivestep.errors import UsageError
from fivestep.run.checkpoint import load_state, newest_first, read_manifest
from fivestep.run.metrics import TIMES, read_rows
from fivestep.run.names import METRICS

KINDS = ("rows", "weights", "optimizer", "random states", "position")
OF = {  # the parts of a state; what is not named here is of the position
    "model": "weights", "criterion": "weights", "average": "weights", "optimizers": "optimizer",
    "schedulers": "optimizer", "loss_scale": "optimizer", "plateau": "optimizer", "random": "random states",
}  # fmt: skip
GENERATOR = re.compile(r"((?:.*\.)?(?:random|start|track)\.(?:python|numpy))\.")
UNCOMPARED = {"clock.seconds", "clock.waiting", "told.seconds", "told.waiting", "run.metrics"}


def difference(one: Path, other: Path) -> str | None:
    """What differs first between the runs at `one` and `other`; None where nothing does."""
    return next(iter(differences(one, other).values()), None)


def differences(one: Path, other: Path, besides: Collection[str] = ()) -> dict[str, str]:
    """The first difference of each of `KINDS`, in that order; what is the same is left out.

    besides: parts of the state that do not count, as `unseeded` names them.
    """
    found = {}
    for left, right in zip_longest(rows(one), rows(other)):
        if left != right:
            found["rows"] = f"metrics.jsonl: {_row_difference(left, right)}"
            break
    for name, text in _state_differences(one, other):
        generator = GENERATOR.match(name)
        if generator is None or generator[1] not in besides:
            found.setdefault(OF.get(name.split(".")[0], "position"), f"{name} {text}")
    return {kind: found[kind] for kind in KINDS if kind in found}


def unseeded(one: Path, other: Path) -> set[str]:
    """Of two trainings that were not interrupted, the states of Python's and NumPy's global generators that differ.

    A process that does not seed these two begins with others each time, mostly without ever drawing from them.
    """
    matches = [GENERATOR.match(name) for name, _ in _state_differences(one, other)]
    return {match[1] for match in matches if match}


def _state_differences(one: Path, other: Path) -> Iterator[tuple[str, str]]:
    yield from state_differences(newest(one), newest(other))


def state_differences(one: Any, other: Any) -> Iterator[tuple[str, str]]:
    """(name, difference) of each part of two states that is not the same, bit for bit; times do not count."""
    left, right = (dict(_leaves(state, "")) for state in (one, other))
    for name in dict.fromkeys([*left, *right]):
        if name in UNCOMPARED or name.startswith(
            "settings."
        ):  # what a training was begun with is no part of its state
            continue
        if (name in left) != (name in right):
            yield name, "is in one state only"
        elif text := _leaf_difference(left[name], right[name]):
            yield name, text


def newest(path: Path) -> dict[str, Any]:
    """The newest checkpoint's state. Raises UsageError where there is none, or it is damaged."""
    folders = newest_first(path / "checkpoints")
    if not folders:
        raise UsageError(f"{path} holds no checkpoint")
    return load_state(read_manifest(folders[0]))


def rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a run that are not only events, without what depends on time."""
    kept = [row for row in read_rows(path / METRICS) if "split" in row]
    return [{name: value for name, value in row.items() if name not in TIMES} for row in kept]


def _row_difference(left: dict[str, Any] | None, right: dict[str, Any] | None) -> str:
    if left is None or right is None:
        row: Any = left or right
        return f"the {row['split']} row of step {row['step']} is in one only"
    for name in dict.fromkeys([*left, *right]):
        if repr(left.get(name)) != repr(right.get(name)):
            return f"step {left['step']} ({left['split']}): {name} is {left.get(name)!r} and {right.get(name)!r}"
    return "rows differ"


def _leaves(tree: Any, path: str) -> Iterator[tuple[str, Any]]:
    parts = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list | tuple) else None
    if parts is None:
        yield path, tree
        return
    for key, part in parts:
        yield from _leaves(part, f"{path}.{key}" if path else str(key))


def _leaf_difference(left: Any, right: Any) -> str:
    if not isinstance(left, Tensor) or not isinstance(right, Tensor):
        return "" if type(left) is type(right) and repr(left) == repr(right) else f"is {left!r} and {right!r}"
    if (left.shape, left.dtype) != (right.shape, right.dtype):
        return f"is {left.dtype} {list(left.shape)} and {right.dtype} {list(right.shape)}"
    flat = [tensor.contiguous().reshape(-1).view(torch.uint8) for tensor in (left, right)]
    if torch.equal(*flat):
        return ""
    largest = (left.double() - right.double()).abs().max().item() if not left.is_complex() else float("nan")
    return f"differs (by {largest:.3g} at most)"
