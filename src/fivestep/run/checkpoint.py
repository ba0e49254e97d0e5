"""Weights on disk: a directory a checkpoint, whole or not there at all.

    checkpoints/step-00000250/   model.safetensors, manifest.json (step, validation loss, digest of every file)

Written beside, flushed, fsynced, renamed; only then are older ones pruned. The newest is `last`, the one with the
lowest validation loss `best`. safetensors and JSON only: loading runs no code.
"""

import hashlib
import json
import math
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from fivestep.data.files import sync_folder, written_whole
from fivestep.errors import FivestepError, UsageError, named, suggestion

FORMAT, VERSION = "fivestep-checkpoint", 1
WEIGHTS, MANIFEST = "model.safetensors", "manifest.json"
WHICH = ("best", "last")


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint's directory and what its manifest says."""

    path: Path
    step: int
    val_loss: float | None
    files: dict[str, str]  # name -> SHA-256


def save_checkpoint(folder: Path, model: nn.Module, step: int, val_loss: float | None) -> Path:
    """Write `folder`/step-N and prune all but the last and the best. Tied weights are stored once."""
    final, beside = folder / f"step-{step:08}", folder / f".step-{step:08}.part"
    try:
        for left_over in folder.glob(".step-*.part"):  # of a process that was killed
            shutil.rmtree(left_over)
        beside.mkdir(parents=True)
        _write(beside, model, step, val_loss)
        shutil.rmtree(final, ignore_errors=True)
        beside.rename(final)
    except (OSError, SafetensorError, RuntimeError, ValueError) as error:
        shutil.rmtree(beside, ignore_errors=True)
        raise FivestepError(f"cannot save {final}: {error}; earlier checkpoints are as they were") from error
    sync_folder(folder)
    kept = {found.path for found in (find(folder, "last"), find(folder, "best")) if found}
    for checkpoint in checkpoints(folder):
        if checkpoint.path not in kept:
            shutil.rmtree(checkpoint.path)
    return final


def _write(folder: Path, model: nn.Module, step: int, val_loss: float | None) -> None:
    tensors, aliases = distinct(model.state_dict())
    save_file(tensors, str(folder / WEIGHTS), {"aliases": json.dumps(aliases)})
    manifest = {
        "format": FORMAT,
        "version": VERSION,
        "step": step,
        "val_loss": val_loss,
        "files": {WEIGHTS: _digest(folder / WEIGHTS)},
    }
    with (folder / WEIGHTS).open("rb") as file:
        os.fsync(file.fileno())
    with written_whole(folder / MANIFEST) as file:
        file.write(json.dumps(manifest, indent=2).encode())


def distinct(state: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors to write, contiguous and sharing no memory, and for tied ones the name that stands for both."""
    tensors: dict[str, Tensor] = {}
    aliases: dict[str, str] = {}
    names: dict[Any, str] = {}
    for name, tensor in state.items():
        storage = tensor.untyped_storage()
        place = (storage.data_ptr(), tensor.storage_offset(), tensor.shape, tensor.stride(), tensor.dtype)
        if tensor.numel() and place in names:
            aliases[name] = names[place]
            continue
        names[place] = name
        whole = tensor.is_contiguous() and storage.nbytes() == tensor.numel() * tensor.element_size()
        tensors[name] = tensor.detach() if whole else tensor.detach().clone(memory_format=torch.contiguous_format)
    return tensors, aliases


def check_saveable(model: nn.Module) -> None:
    """Raise UsageError where the model's state holds anything but tensors."""
    for name, value in model.state_dict().items():
        if not isinstance(value, Tensor) or value.layout is not torch.strided:
            kind = value.layout if isinstance(value, Tensor) else named(value)
            raise UsageError(f"the model's state {name!r} is {kind}; only dense tensors can be saved")


def checkpoints(folder: Path) -> list[Checkpoint]:
    """The checkpoints in `folder`, oldest first; a directory without a sound manifest is none."""
    found = [read_manifest(path.parent) for path in folder.glob(f"step-*/{MANIFEST}")]
    return sorted((one for one in found if one), key=lambda one: one.step)


def read_manifest(path: Path) -> Checkpoint | None:
    """What the manifest in `path` says; None where it is not one of ours."""
    try:
        manifest: dict[str, Any] = json.loads((path / MANIFEST).read_bytes())
        if (manifest["format"], manifest["version"]) != (FORMAT, VERSION):
            return None
        val_loss = None if manifest["val_loss"] is None else float(manifest["val_loss"])
        return Checkpoint(path, int(manifest["step"]), val_loss, {WEIGHTS: str(manifest["files"][WEIGHTS])})
    except (OSError, ValueError, KeyError, TypeError):
        return None


def find(folder: Path, which: str) -> Checkpoint | None:
    """The `last` checkpoint, or the `best`: the lowest validation loss, the earliest of equals; else the last."""
    if which not in WHICH:
        raise UsageError(
            f"weights = '{which}' is not one of {', '.join(WHICH)} (--weights){suggestion(which, WHICH)}"
        )
    found = checkpoints(folder)
    scored = [one for one in found if one.val_loss is not None and not math.isnan(one.val_loss)]
    if which == "best" and scored:
        return min(scored, key=lambda one: (one.val_loss, one.step))
    return found[-1] if found else None


def load_checkpoint(checkpoint: Checkpoint, model: nn.Module) -> None:
    """Copy a checkpoint's weights into `model`. Raises UsageError for a damaged file or another model's."""
    path = checkpoint.path / WEIGHTS
    try:
        if _digest(path) != checkpoint.files[WEIGHTS]:
            raise UsageError(f"{path} is damaged: its digest is not the manifest's")
        with safe_open(path, "pt", device="cpu") as file:
            aliases = json.loads(file.metadata()["aliases"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        # Copied into the live, aligned storage, never put in its place.
        model.load_state_dict({**tensors, **{name: tensors[kept] for name, kept in aliases.items()}})
    except UsageError:
        raise
    except OSError as error:
        raise UsageError(f"{path} cannot be read: {error.strerror or error}") from error
    except (SafetensorError, RuntimeError, ValueError, KeyError, TypeError) as error:
        raise UsageError(f"{path} does not fit the model: {error}") from error


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
