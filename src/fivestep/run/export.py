"""A run's weights to give away: one plain safetensors file beside what is needed to use it, in a folder of its own.

    model.safetensors   the best or the last weights, whole, whoever wrote them in how many parts
    config.toml  environment.json  tokenizer.json   the run's own, where it has them: what `fs.load` reads
    manifest.json       step, validation loss, size and digest of every file, its own too

Owns what is in such a folder, its writing and its reading. Builds no model and reads no state but weights.
"""

import json
import os
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from fivestep.data.files import expanded, folder_written_whole, read_bounded
from fivestep.errors import FivestepError, UsageError, brief
from fivestep.loop.canonical_names import load_weights_into
from fivestep.loop.form import check_weights
from fivestep.run.checkpoint import (
    MANIFEST,
    MOST_MANIFEST,
    WEIGHTS,
    Checkpoint,
    DamagedError,
    best_of,
    checkpoints,
    first_sound,
    sealed,
    verify,
    weights_file,
    write_through,
)
from fivestep.run.names import CONFIG, ENVIRONMENT, METRICS, TOKENIZER

FORMAT, VERSION = "fivestep-export", 1
BESIDE = {CONFIG: 1 << 20, ENVIRONMENT: 1 << 20, TOKENIZER: 1 << 30}  # bytes at most


def export(path: str | Path, out: str | Path, which: str = "best", say: Any = print) -> Checkpoint:
    """Write the `best` or `last` weights of the run at `path` into the new folder `out`, whole or not at all.

    Where these are damaged, the next that are sound are taken, and `say` is told. One tensor at a time is held.
    Raises UsageError for what is no run and a folder that holds something, FivestepError where it cannot be written.
    """
    run, folder = expanded(path), expanded(out)
    if not (run / "checkpoints").is_dir() and not (run / METRICS).is_file():
        raise UsageError(f"{path} {'holds no checkpoint' if run.exists() else 'does not exist'}: give a run")
    if os.path.lexists(folder) and (not folder.is_dir() or any(folder.iterdir())):
        raise UsageError(f"{out} is there already, and nothing is overwritten: give another --out")
    above = next(one for one in folder.absolute().parents if os.path.lexists(one))
    if not above.is_dir():
        raise UsageError(f"{out} cannot be made: {above} is no folder (--out)")
    made: list[Checkpoint] = []
    which = which_weights(run, which)
    first_sound(run, which, lambda checkpoint: made.append(written(checkpoint, run, folder, which)), say)
    return made[0]


def written(checkpoint: Checkpoint, run: Path, folder: Path, which: str) -> Checkpoint:
    """Write one checkpoint's weights, and what is beside them. Raises DamagedError before anything is made."""
    content = weights_file(checkpoint, {"step": str(checkpoint.step), "weights": which})
    try:
        with folder_written_whole(folder) as filled:
            files: dict[str, Any] = {WEIGHTS: write_through(filled / WEIGHTS, content)}
            for name, most in BESIDE.items():
                if (run / name).is_file():
                    files[name] = write_through(filled / name, [read_bounded(run / name, most)])
            about = {"format": FORMAT, "version": VERSION, "step": checkpoint.step, "val_loss": checkpoint.val_loss}
            write_through(filled / MANIFEST, [sealed({**about, "weights": which, "files": files})])
    except OSError as error:
        raise FivestepError(f"cannot write {folder}: {error.strerror or error}") from error
    except (SafetensorError, RuntimeError, ValueError) as error:  # it was pruned, or changed, meanwhile
        raise DamagedError(f"{checkpoint.path} cannot be read: {brief(error)}") from error
    return Checkpoint(folder, checkpoint.step, 0, checkpoint.val_loss, files)


def which_weights(path: Path, which: str) -> str:
    """Return whether `which` means the best or the last weights there: a run that was never validated has no best."""
    if is_export(path):
        return str(json.loads(read_bounded(path / MANIFEST, MOST_MANIFEST))["weights"])
    return "last" if which == "best" and best_of(checkpoints(path / "checkpoints")) is None else which


def is_export(path: Path) -> bool:
    """Whether `path` is such a folder: a run has no manifest of its own."""
    return (path / MANIFEST).is_file() and (path / WEIGHTS).is_file()


def read_export(path: Path) -> Checkpoint:
    """What the manifest of an exported folder says. Raises DamagedError."""
    file = path / MANIFEST
    try:
        content = read_bounded(file, MOST_MANIFEST)
        manifest = json.loads(content)
        known = (manifest["format"], manifest["version"]) == (FORMAT, VERSION)
        if not known or content != sealed({name: value for name, value in manifest.items() if name != "seal"}):
            raise DamagedError(f"{file} is damaged, or of another version: its digest is not its own")
        files = {name: (int(size), str(digest)) for name, (size, digest) in manifest["files"].items()}
        return Checkpoint(path, int(manifest["step"]), 0, manifest["val_loss"], files)
    except OSError as error:
        raise DamagedError(f"{file} cannot be read: {error.strerror or error}") from error
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise error if isinstance(error, DamagedError) else DamagedError(f"{file} is damaged: no manifest") from error


def load_export(path: Path, model: nn.Module) -> int:
    """Copy the weights of an exported folder into `model`; their step. Raises UsageError."""
    found = read_export(path)
    verify(found, [WEIGHTS])
    try:
        weights = read_weights(path / WEIGHTS)
        check_weights(weights, model)
        load_weights_into(model, weights)
    except (SafetensorError, RuntimeError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UsageError(f"{path / WEIGHTS} does not fit the model: {brief(error)}") from error
    return found.step


def read_weights(file: Path) -> dict[str, Tensor]:
    """The tensors of a file of weights, tied ones under each of their names."""
    with safe_open(file, "pt", device="cpu") as stored:
        aliases = json.loads((stored.metadata() or {}).get("aliases", "{}"))
        tensors = {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118
    return tensors | {name: tensors[kept] for name, kept in aliases.items()}
