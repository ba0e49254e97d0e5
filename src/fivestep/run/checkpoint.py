"""A training on disk: a directory a checkpoint, whole or not there at all.

    checkpoints/step-00000250/   model.safetensors   the weights as they are evaluated and used
                                 state.safetensors   every other tensor of the state
                                 state.json          the rest of it, and where the tensors belong
                                 manifest.json       step, validation loss, size and digest of every file, its own too

Where the training is in shards, each process writes what it holds: model-00001-of-00004.safetensors, and state-00001
likewise (`shards.py`). Any number of processes reads either form.

Written beside, flushed, fsynced, renamed, the folder fsynced; only then are older ones pruned. The newest is `last`,
the one with the lowest validation loss `best`. safetensors and JSON only: loading runs no code. Each file is checked
against its digest before it is used; one that is damaged is named. Which to keep and when to save is `run.py`'s.
"""

import hashlib
import json
import math
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from fivestep import processes
from fivestep.data.files import Digested, make_folder, opened, put_away, remove_folder, sync_folder
from fivestep.errors import FivestepError, UsageError, brief, named, suggestion
from fivestep.loop.batch import in_shards
from fivestep.loop.canonical_names import canonical, load_weights_into, weights_of
from fivestep.loop.form import check_weights
from fivestep.run import strict_json
from fivestep.run.running import running
from fivestep.run.shards import Snapshot, Stored, sharding_info
from fivestep.run.tree import UnreadableError, flattened, restored

FORMAT, VERSION, IN_SHARDS = "fivestep-checkpoint", 4, 5  # the versions of the two forms
EARLIER = {2: VERSION, 3: IN_SHARDS}  # they write NaN and infinity bare, and are read too
WEIGHTS, TENSORS, TREE, MANIFEST = "model.safetensors", "state.safetensors", "state.json", "manifest.json"
WHICH = ("best", "last")
WHY_NONE = {  # by the state of the run
    "running": "it is still training, and has not saved one yet; wait for the first",
    "killed": "it was killed before it saved one; start it again",
    "unknown": "it has not saved one yet, or was killed before",
    None: "it ended before it saved one; start it again",
}
NAME = re.compile(r"step-(\d{8,18})(?:-(\d{1,6}))?")
MOST_JSON, MOST_HEADER, MOST_MANIFEST = 1 << 27, 1 << 24, 1 << 20  # bytes: more is none of ours
DTYPES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.int64: "I64",
    torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
    torch.uint16: "U16", torch.uint32: "U32", torch.uint64: "U64", torch.complex64: "C64",
    torch.float8_e4m3fn: "F8_E4M3", torch.float8_e5m2: "F8_E5M2",
}  # fmt: skip


Layout = Mapping[str, Tensor]
Kinds = Mapping[str, tuple[torch.Size, torch.dtype]]


class DamagedError(UsageError):
    """A checkpoint that is not as it was written; the message names the file."""


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint's directory and what its manifest says."""

    path: Path
    step: int
    serial: int  # of those of one step
    val_loss: float | None
    files: dict[str, tuple[int, str]]  # name -> bytes, SHA-256

    def of(self, name: str) -> list[str]:
        """The files of WEIGHTS or of TENSORS: one, or one of each process."""
        return sorted(file for file in self.files if file == name or file.startswith(_stem(name) + "-"))

    def bytes_of(self, name: str) -> int:
        """The size of these files."""
        return sum(self.files[file][0] for file in self.of(name))


def _stem(name: str) -> str:
    return name.removesuffix(".safetensors")


def part_name(name: str, number: int, of: int) -> str:
    """The file of WEIGHTS or TENSORS that process `number` of `of` writes: `model-00001-of-00004.safetensors`."""
    return f"{_stem(name)}-{number + 1:05}-of-{of:05}.safetensors"


# --- writing ---


def save_checkpoint(folder: Path, weights: dict[str, Any], state: Any, step: int, val_loss: float | None) -> Path:
    """Write a new checkpoint of `step` into `folder`; it is durable when this returns.

    weights: the model's, as they are evaluated; state: a tree, as `State.state_dict()` gives it, whose "model" is
    left out where it is `weights` itself. Both are read, not kept. Raises FivestepError; what was there stays.
    """
    final, beside = _places(folder, step)
    try:
        remove_folder(beside)
        make_folder(beside)
        files = _written(beside, weights, state)
        _complete(beside, final, VERSION, step, val_loss, files)
    except (OSError, RuntimeError, ValueError) as error:
        remove_folder(beside, careful=False)
        raise FivestepError(_cannot(final, error)) from error
    return final


def save_shards(
    folder: Path,
    weights: Snapshot,
    rest: Snapshot,
    step: int,
    val_loss: float | None,
    first: Callable[[], None],
    tell: Callable[[Any], list[Any]],
) -> None:
    """The same by all processes at once, each what it holds; durable, in all, when this returns.

    rest: as `weights`, of the state; its tree has no "model" where that is `weights`. first: what process 0 does
    before. tell: what each process says, to all. Raises FivestepError, in all, where one of them failed.
    """
    own = processes.is_first()
    begun = _attempt(lambda: _begun(folder, step, first)) if own else None
    name, problem = tell(begun)[0]
    if problem:
        raise FivestepError(_cannot(folder / f"step-{step:08}", problem))
    final, beside = folder / name, folder / f".{name}.part"
    files: dict[str, list[Any]] = {}
    told = tell(_attempt(lambda: _written_parts(beside, weights, rest)))
    for written, error in told:
        files |= written or {}
        problem = problem or error
    if own:
        ended = _attempt(lambda: _complete(beside, final, IN_SHARDS, step, val_loss, files)) if not problem else None
        problem = ended[1] if ended else problem
        if problem:
            remove_folder(beside, careful=False)
    problem = tell(problem)[0]
    if problem:
        raise FivestepError(_cannot(final, problem))


def _attempt(work: Callable[[], Any]) -> tuple[Any, str | None]:
    """What `work` gives, or who failed in it and with what: for the others, who would wait for ever."""
    try:
        return work(), None
    except Exception as error:
        return None, f"{processes.host()}: {brief(error)}"


def _begun(folder: Path, step: int, first: Callable[[], None]) -> str:
    """Make the folder to write into; the name that it will have."""
    final, beside = _places(folder, step)
    first()
    remove_folder(beside)
    make_folder(beside)
    return final.name


def _written_parts(folder: Path, weights: Snapshot, rest: Snapshot) -> dict[str, list[Any]]:
    """Write this process's files; each one's size and digest."""
    rank, size = processes.rank(), processes.size()
    files = {}
    for kind, (tree, pieces) in ((WEIGHTS, weights), (TENSORS, rest)):
        tensors = {name: piece.tensor for name, piece in pieces.items()}
        aliases = {"aliases": json.dumps(_aliases(tree))} if kind == WEIGHTS else {}
        name = part_name(kind, rank, size)
        files[name] = write_through(folder / name, _safetensors(tensors, {**aliases, **sharding_info(pieces)}))
    if rank == 0:
        files[TREE] = write_through(folder / TREE, [_encoded(weights.tree, rest.tree, rest.tree["model"] is None)])
    sync_folder(folder)
    return files


def _places(folder: Path, step: int) -> tuple[Path, Path]:
    """The directory of a new checkpoint of `step`, and where it is written."""
    serials = [serial for path in _folders(folder) for at, serial in [_numbers(path)] if at == step]
    final = folder / (f"step-{step:08}" + (f"-{max(serials) + 1}" if serials else ""))
    return final, folder / f".{final.name}.part"


def _complete(beside: Path, final: Path, version: int, step: int, val_loss: float | None, files: Any) -> None:
    """Write the manifest, and give the folder its name: from then on it is there."""
    manifest = {"format": FORMAT, "version": version, "name": final.name, "step": step, "val_loss": val_loss}
    manifest["files"] = files
    write_through(beside / MANIFEST, [sealed(strict_json.encoded(manifest))])
    sync_folder(beside)
    beside.rename(final)
    sync_folder(final.parent)


def _cannot(final: Path, error: Any) -> str:
    return f"cannot save {final}: {error}; earlier checkpoints are as they were"


def _written(folder: Path, weights: dict[str, Any], state: dict[str, Any]) -> dict[str, list[Any]]:
    """Write the three files; each one's size and digest."""
    shared = state.get("model") is weights
    model, tensors = flattened(weights)
    tree, rest = flattened({**state, "model": None} if shared else state)
    content = _encoded(model, tree, shared)
    return {
        WEIGHTS: write_through(folder / WEIGHTS, _safetensors(tensors, {"aliases": json.dumps(_aliases(model))})),
        TENSORS: write_through(folder / TENSORS, _safetensors(rest, {})),
        TREE: write_through(folder / TREE, [content]),
    }


def _encoded(weights: Any, state: Any, shared: bool) -> bytes:
    """The content of state.json."""
    whole = {"weights": weights, "state": state, "shared": shared}
    content = json.dumps(whole, separators=(",", ":"), allow_nan=False).encode()
    if len(content) > MOST_JSON:
        raise ValueError(f"its {TREE} would have {len(content):,} bytes, and is read only up to {MOST_JSON:,}")
    return content


def _aliases(model: Any) -> dict[str, str]:
    """Of tied weights, the name that each is stored under: for other readers of the file."""
    marks = {name: mark["$tensor"] for name, mark in model.items() if isinstance(mark, dict)}
    stored = set(marks.values())
    return {name: kept for name, kept in marks.items() if name not in stored}


def write_through(path: Path, parts: Any) -> list[Any]:
    """Write a file through to the disk; its size and digest."""
    with opened(path) as file:
        digested = Digested(file)
        for part in parts:
            digested.write(part)
        os.fsync(file)
    return [digested.size, digested.hexdigest()]


def _safetensors(tensors: dict[str, Tensor], metadata: dict[str, str]) -> Iterator[Any]:
    """The parts of a safetensors file."""
    kinds = {name: (tensor.shape, tensor.dtype) for name, tensor in tensors.items()}
    return _streamed(kinds, metadata, tensors.__getitem__)


def _streamed(kinds: Kinds, metadata: dict[str, str], tensor: Callable[[str], Tensor]) -> Iterator[Any]:
    """The parts of a safetensors file, one tensor after another: never a second copy of all."""
    kinds = dict(sorted(kinds.items(), key=lambda item: (-item[1][1].itemsize, item[0])))  # so all are aligned
    header: dict[str, Any] = {"__metadata__": {"format": "pt", **metadata}}
    end = 0
    for name, (shape, dtype) in kinds.items():
        if dtype not in DTYPES:
            raise ValueError(f"{name!r} is {dtype}, which safetensors does not know")
        begin, end = end, end + shape.numel() * dtype.itemsize
        header[name] = {"dtype": DTYPES[dtype], "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    if len(text) > MOST_HEADER:
        raise ValueError(f"a header would have {len(text):,} bytes, and is read only up to {MOST_HEADER:,}")
    yield len(text).to_bytes(8, "little") + text
    for name in kinds:
        yield _bytes(tensor(name))


def _bytes(tensor: Tensor) -> Any:
    """A tensor's values as they are in memory."""
    flat: Any = tensor.detach().cpu().contiguous().reshape(-1)
    return memoryview(flat.view(torch.uint8).numpy()) if flat.numel() else b""


def sealed(manifest: dict[str, Any]) -> bytes:
    """A manifest with the digest of itself, in the one form that is accepted."""
    text = json.dumps(manifest, indent=1, sort_keys=True).encode()
    seal = json.dumps({**manifest, "seal": hashlib.sha256(text).hexdigest()}, indent=1, sort_keys=True)
    return seal.encode()


def check_saveable(model: nn.Module) -> None:
    """Raise UsageError where the model's state holds anything but tensors."""
    for name, value in weights_of(model).items():
        if not isinstance(value, Tensor) or value.layout is not torch.strided or value.dtype not in DTYPES:
            kind = (
                (value.layout if value.layout is not torch.strided else value.dtype)
                if isinstance(value, Tensor)
                else named(value)
            )
            raise UsageError(f"the model's state {name!r} is {kind}; only dense tensors can be saved")
        places = () if is_lazy(value) else zip(value.stride(), value.shape, strict=True)
        if any(step == 0 and size > 1 for step, size in places):
            raise UsageError(
                f"the model's state {name!r} is expanded: one value stands in many places, and none can be put back; "
                "register a .clone() of it, or persistent=False"
            )


def prune(folder: Path, keep: Callable[[list[Checkpoint]], set[Path]]) -> None:
    """Remove the checkpoints that `keep` does not name; a damaged one stays. What cannot be removed stays too."""
    found = checkpoints(folder)
    kept = keep(found)
    for checkpoint in found:
        if checkpoint.path not in kept:
            put_away(checkpoint.path)


def remove_leftovers(folder: Path) -> None:
    """Remove what a process left there that was killed while it saved or pruned."""
    for left in folder.glob(".step-*.part"):
        remove_folder(left, careful=False)


# --- reading ---


def _folders(folder: Path) -> list[Path]:
    return [path for path in entries(folder) if NAME.fullmatch(path.name)]


def entries(folder: Path) -> list[Path]:
    """What is in `folder`; nothing where there is no such folder. Raises FivestepError where it cannot be read: that
    a run has no checkpoint must be known before it begins anew."""
    try:
        return list(folder.iterdir())
    except (FileNotFoundError, NotADirectoryError):
        return []
    except OSError as error:
        raise FivestepError(f"cannot read {folder}: {error.strerror or error}") from error


def _numbers(path: Path) -> tuple[int, int]:
    step, serial = NAME.fullmatch(path.name).groups()  # type: ignore[union-attr]
    return int(step), int(serial or 0)


def newest_first(folder: Path) -> list[Path]:
    """The directories of all checkpoints in `folder`, sound or not."""
    return sorted(_folders(folder), key=_numbers, reverse=True)


def misnamed(folder: Path) -> list[Path]:
    """What looks like a checkpoint in `folder` and has a name that none has: somebody renamed it."""
    strange = [path for path in entries(folder) if not NAME.fullmatch(path.name) and path.name[:1] != "."]
    return sorted(path for path in strange if path.name.startswith("step-") or os.path.lexists(path / MANIFEST))


def checkpoints(folder: Path) -> list[Checkpoint]:
    """The checkpoints in `folder` with a sound manifest, oldest first."""
    found = []
    for path in reversed(newest_first(folder)):
        try:
            found.append(read_manifest(path))
        except DamagedError:
            continue
    return found


def read_manifest(path: Path) -> Checkpoint:
    """What the manifest in `path` says. Raises DamagedError."""
    file = path / MANIFEST
    step, serial = _numbers(path)
    try:
        if path.is_symlink():
            raise DamagedError(f"{path} is a link; a checkpoint is a directory of the run's own")
        content = _read(file, MOST_MANIFEST)
        manifest: dict[str, Any] = json.loads(content)
        if manifest["format"] == FORMAT and manifest["version"] not in (VERSION, IN_SHARDS, *EARLIER):
            found = repr(manifest["version"])[:40]
            raise DamagedError(f"{file} is of format {found}; this fivestep reads 2 to {IN_SHARDS}")
        body = {name: value for name, value in manifest.items() if name != "seal"}
        if content != sealed(body) or manifest["format"] != FORMAT:
            raise DamagedError(f"{file} is damaged: its digest is not its own")
        manifest = strict_json.decoded(manifest)
        if manifest["name"] != path.name or manifest["step"] != step:
            raise DamagedError(f"{file} is that of another checkpoint: {path.name} has been renamed, or mixed up")
        if set(manifest["files"]) != _names(manifest):
            raise DamagedError(f"{file} is damaged: it names other files than a checkpoint has")
        files = {name: (int(size), str(digest)) for name, (size, digest) in manifest["files"].items()}
        val_loss = None if manifest["val_loss"] is None else float(manifest["val_loss"])
        return Checkpoint(path, step, serial, val_loss, files)
    except OSError as error:
        raise DamagedError(f"{file} cannot be read: {error.strerror or error}") from error
    except DamagedError:
        raise
    except (ValueError, KeyError, TypeError, RecursionError, AttributeError, ArithmeticError) as error:
        raise DamagedError(f"{file} is damaged: it is no manifest") from error


def _names(manifest: dict[str, Any]) -> set[str]:
    """The files that a checkpoint has: three, or two of each process and the tree."""
    if EARLIER.get(manifest["version"], manifest["version"]) == VERSION:
        return {WEIGHTS, TENSORS, TREE}
    of = len(manifest["files"]) // 2
    return {part_name(name, number, of) for number in range(of) for name in (WEIGHTS, TENSORS)} | {TREE}


def _read(path: Path, most: int) -> bytes:
    """A regular file of at most so many bytes; a link is not followed."""
    with opened(path, reading=True) as file:
        if os.fstat(file).st_size > most:
            raise DamagedError(f"{path} is damaged: it is larger than any of its kind")
        with os.fdopen(os.dup(file), "rb") as stream:
            return stream.read()


def best_of(found: list[Checkpoint]) -> Checkpoint | None:
    """The lowest validation loss, the earliest step of equals, its newest of one step."""
    scored = [one for one in found if one.val_loss is not None and not math.isnan(one.val_loss)]
    return min(scored, key=lambda one: (one.val_loss, one.step, -one.serial), default=None)


def find(folder: Path, which: str) -> Checkpoint | None:
    """The `last` checkpoint, or the `best`, by their manifests; the last where nothing was validated."""
    if which not in WHICH:
        raise UsageError(
            f"weights = '{which}' is not one of {', '.join(WHICH)} (--weights){suggestion(which, WHICH)}"
        )
    found = checkpoints(folder)
    best = best_of(found) if which == "best" else None
    return best or (found[-1] if found else None)


def verify(checkpoint: Checkpoint, names: Iterable[str] | None = None) -> None:
    """Raise DamagedError, naming it, for a file that is not as it was written: one of these, or of all."""
    for name in checkpoint.files if names is None else names:
        path, (size, digest) = checkpoint.path / name, checkpoint.files[name]
        try:
            with opened(path, reading=True) as file:
                if os.fstat(file).st_size != size:
                    raise DamagedError(f"{path} is damaged: it has {os.fstat(file).st_size:,} bytes, not {size:,}")
                with os.fdopen(os.dup(file), "rb") as stream:
                    if hashlib.file_digest(stream, "sha256").hexdigest() != digest:
                        raise DamagedError(f"{path} is damaged: its digest is not the manifest's")
        except OSError as error:
            raise DamagedError(f"{path} cannot be read: {error.strerror or error}") from error


def load_state(checkpoint: Checkpoint, verified: bool = False, layout: Layout | None = None) -> dict[str, Any]:
    """The tree that was saved as `state`. Raises DamagedError.

    verified: somebody has looked at every file's digest. layout: as `State.layout` gives it: of the tensors that it
    names, only what lies in this process is read.
    """
    if not verified:
        verify(checkpoint)
    content = _content(checkpoint)
    state = _restored(checkpoint, TENSORS, content["state"], layout)
    if content["shared"] and isinstance(state, dict):
        state["model"] = _restored(checkpoint, WEIGHTS, content["weights"], layout, "model.")
    if not isinstance(state, dict):
        raise DamagedError(f"{checkpoint.path / TREE} is damaged: it holds no state")
    return state


def load_checkpoint(checkpoint: Checkpoint, model: nn.Module) -> None:
    """Copy a checkpoint's weights into `model`. Raises DamagedError, and UsageError for another model's."""
    verify(checkpoint, [*checkpoint.of(WEIGHTS), TREE])
    layout = {name: value for name, value in weights_of(model).items() if in_shards(value)}
    weights = _restored(checkpoint, WEIGHTS, _content(checkpoint)["weights"], layout)
    try:
        check_weights(weights, model)
        load_weights_into(model, weights)  # copied into the live, aligned storage, never put in its place
    except (RuntimeError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UsageError(f"{checkpoint.path / WEIGHTS} does not fit the model: {brief(error)}") from error


def first_sound(path: Path, which: str, use: Callable[[Checkpoint], None], say: Callable[[str], None]) -> Checkpoint:
    """`use` the `best` or `last` checkpoint of the run at `path`, or the next that is sound; `say` is told why."""
    folder = path / "checkpoints"
    if folder.is_symlink():
        raise UsageError(f"{folder} is a link: a run's checkpoints are its own")
    wanted = find(folder, which)
    for one in newest_first(folder):
        try:
            read_manifest(one)
        except DamagedError as error:  # it may be the one that was asked for
            say(str(error))
    for one in misnamed(folder):
        say(f"{one} is no checkpoint: it has been renamed")
    others = [one for one in reversed(checkpoints(folder)) if wanted and one.path != wanted.path]
    for checkpoint in [wanted, *others] if wanted else []:
        try:
            use(checkpoint)
            return checkpoint
        except DamagedError as error:
            say(str(error))
    if newest_first(folder) or misnamed(folder):
        raise UsageError(f"no checkpoint of {path} is sound")
    raise UsageError(f"{path} holds no checkpoint: {WHY_NONE[running(path)]}")


def weights_file(checkpoint: Checkpoint, about: dict[str, str]) -> Iterator[Any]:
    """A checkpoint's weights as one safetensors file, part after part, with `about` in its header.

    Raises DamagedError, before the first part.
    """
    verify(checkpoint, [*checkpoint.of(WEIGHTS), TREE])
    try:
        stored = Stored(checkpoint.path, [checkpoint.path / file for file in checkpoint.of(WEIGHTS)])
        aliases = {canonical(a): canonical(b) for a, b in _aliases(_content(checkpoint)["weights"]).items()}
        kinds, stored_as = stored.kinds(), {canonical(name): name for name in stored.kinds()}
    except (OSError, SafetensorError, ValueError, KeyError, TypeError, RuntimeError) as error:
        raise DamagedError(f"{checkpoint.path / WEIGHTS} is damaged: {brief(error)}") from error
    return _streamed(
        {name: kinds[kept] for name, kept in stored_as.items()},
        {"aliases": json.dumps(aliases), **about},
        lambda name: stored.tensor(stored_as[name]),
    )


def _content(checkpoint: Checkpoint) -> dict[str, Any]:
    """The JSON of a checkpoint: "weights", "state", "shared"."""
    path = checkpoint.path / TREE
    try:
        content = json.loads(_read(path, MOST_JSON), object_pairs_hook=_unique)
    except OSError as error:
        raise DamagedError(f"{path} cannot be read: {error.strerror or error}") from error
    except (ValueError, RecursionError) as error:
        raise DamagedError(f"{path} is damaged: {brief(error)}") from error
    if not isinstance(content, dict) or content.keys() != {"weights", "state", "shared"}:
        raise DamagedError(f"{path} is damaged: it is no tree of a state")
    return content


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    table = dict(pairs)
    if len(table) < len(pairs):
        raise ValueError("a name stands in it twice")
    return table


def _restored(checkpoint: Checkpoint, name: str, encoded: Any, layout: Layout | None = None, prefix: str = "") -> Any:
    """A tree with its tensors, which are in the files of `name`."""
    path = checkpoint.path / name
    try:
        return restored(encoded, _tensors(checkpoint, name, layout or {}, prefix))
    except OSError as error:
        raise DamagedError(f"{path} cannot be read: {error.strerror or error}") from error
    except (SafetensorError, UnreadableError, ValueError, KeyError, TypeError, RuntimeError, RecursionError) as error:
        raise DamagedError(f"{path} does not go with its {TREE}, or is damaged: {brief(error)}") from error


def _tensors(checkpoint: Checkpoint, name: str, layout: Layout, prefix: str) -> dict[str, Tensor]:
    files = [checkpoint.path / file for file in checkpoint.of(name)]
    for path in files:
        with opened(path, reading=True) as file:  # a header of 100 MB would take a gigabyte and seconds
            if int.from_bytes(os.read(file, 8), "little") > MOST_HEADER:
                raise ValueError("its header is larger than any of its kind")
    if layout or name not in checkpoint.files:
        return Stored(checkpoint.path, files).tensors(layout, prefix)
    with safe_open(files[0], "pt", device="cpu") as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
