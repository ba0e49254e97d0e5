"""trace.jsonl: a line a step, for comparing two runs of one training: what it read, and its loss.

    {"step": 3, "items": [[17, 4, 9]], "batches": "9f86d0...", "weights": "2c26b4...", "random": "fcde2b...",
     "loss": "0x1.8p+1", "grad_norm": "0x1.4p+0", "lr": "0x1.3p-12"}

`items` are a loader's indices or a stream's offsets, a list a batch, null where they are not known; `batches` is the
SHA-256 of what is in the window, `weights` that of the model before the step, `random` that of torch's generators
then. A resume cuts the lines past its step. Not made to outlive a power cut.
"""

import hashlib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fivestep.loop.batch import parts, whole
from fivestep.loop.state import State
from fivestep.run.metrics import append_rows, readable_rows
from fivestep.run.strict_json import loads

TRACE = "trace.jsonl"


class Trace:
    """Writes a run's trace; `begin` is told each window, `end` when its step may be complete."""

    def __init__(self, folder: Path):
        self.path = folder / TRACE
        self.begun: dict[str, Any] | None = None

    def cut(self, step: int) -> None:
        """Keep the lines of the steps up to `step`."""
        if self.path.exists():
            lines = self.path.read_bytes().splitlines(keepends=True)
            kept = [line for line in lines if line.endswith(b"\n") and loads(line)["step"] <= step]
            os.truncate(self.path, sum(map(len, kept)))  # steps only grow: these are the first

    def begin(self, state: State, window: list[Any]) -> None:
        """The next step will read `window`."""
        where = state.reader.where(state.clock.epoch, state.position, len(window)) if state.reader else {}
        items = next(iter(where.values()), None)
        self.begun = {"step": state.clock.step + 1, "items": plain(items), "batches": digest(window)}
        self.begun |= {"weights": digest(state.model.state_dict()), "random": digest(drawing(state))}

    def end(self, state: State) -> None:
        """Write the step that was begun, where it is complete: not one that failed, or was left out."""
        begun, self.begun = self.begun, None
        if begun is not None and state.last is not None and state.last["step"] == begun["step"]:
            figures = {"loss": "loss", "grad_norm": "grad_norm", "lr": "learning_rate"}
            told = {name: float(state.last[of]).hex() for name, of in figures.items()}
            append_rows(self.path, [{**begun, **told}])


def drawing(state: State) -> list[Tensor]:
    """The states of torch's generators: of the CPU, and of the GPU where there is one."""
    return [torch.get_rng_state(), *(torch.cuda.get_rng_state_all() if state.cuda else [])]


def read_trace(folder: Path) -> list[dict[str, Any]]:
    """The lines of the run's trace, oldest first; none where there is no file."""
    return list(readable_rows(folder / TRACE)) if (folder / TRACE).exists() else []


def digest(value: Any) -> str:
    """SHA-256 of a nest of tensors, arrays, numbers and text: kinds, shapes and bits."""
    found = hashlib.sha256()
    _feed(found, value)
    return found.hexdigest()


def _feed(found: Any, value: Any) -> None:
    if isinstance(value, Tensor):
        value = whole(value)  # of a model in shards, in a group of one
        value = value.detach().to_dense() if value.layout is not torch.strided else value.detach()
        found.update(f"{value.dtype} {list(value.shape)}".encode())
        flat = value.cpu().contiguous().reshape(-1)
        found.update(flat.view(torch.uint8).numpy() if flat.numel() else b"")
    elif isinstance(value, np.ndarray) and value.dtype != object:
        found.update(f"{value.dtype} {list(value.shape)}".encode() + value.tobytes())
    elif inside := parts(value):
        found.update(f"{list(value) if isinstance(value, Mapping) else len(inside)}".encode())
        for part in inside:
            _feed(found, part)
    else:  # an object's own text may hold its address
        text = value if isinstance(value, bool | int | float | str | bytes | None) else type(value).__name__
        found.update(repr(text).encode())


def plain(items: Any) -> Any:
    """`items` as JSON takes it: whole numbers stay, other keys of a dataset become text."""
    if isinstance(items, list | tuple):
        return [plain(item) for item in items]
    if isinstance(items, Tensor | np.ndarray | np.generic):
        return items.tolist()
    return items if isinstance(items, int | str | None) else repr(items)
