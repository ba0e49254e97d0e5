"""Tensors of which each process writes its part, in files that torch's distributed checkpoint reads.

    live tensors, some in shards -> torch's planner: what of each lies here -> pieces, copied to the host
    pieces                       -> a safetensors file a process, whose header says where each belongs
    any such files               -> torch's reader: whole tensors, or the shards of any other number of processes

torch plans and reads; the bytes are written by `checkpoint.py`, as all of a checkpoint's: torch's own writer holds
them twice more, flushes nothing and tells its plan by pickle. Knows no state, no manifest and no run.
"""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fivestep import processes
from fivestep.loop.batch import in_shards
from fivestep.loop.copies import Copies, place
from fivestep.loop.parallel import owner
from fivestep.run.tree import flattened


class Piece(NamedTuple):
    """What one process holds of a tensor."""

    tensor: Tensor
    offsets: list[int]  # of its first element in the whole tensor, by dimension


class Snapshot(NamedTuple):
    """A tree as `flattened` encodes it, and this process's pieces of its tensors, by name."""

    tree: Any
    pieces: dict[str, Piece]


def supported() -> bool:
    """Whether this torch reads safetensors that several processes wrote."""
    from torch.distributed import checkpoint

    return hasattr(checkpoint, "HuggingFaceStorageReader")


def snapshot(live: Any, copies: Copies) -> Snapshot:
    """What this process has to write of a tree, in memory of `copies`: of what all have, process 0 writes it."""
    tree, tensors = flattened(live, same=place)
    pieces = {name: Piece(copies.of(held), offsets) for name, (held, offsets) in own_pieces(tensors).items()}
    return Snapshot(tree, pieces)


def own_pieces(tensors: Mapping[str, Tensor]) -> dict[str, Piece]:
    """The pieces that this process writes, where they lie now. As torch's planner tells them, without the others."""
    from torch.distributed.checkpoint.default_planner import DefaultSavePlanner

    first = processes.is_first()
    own = {name: value for name, value in tensors.items() if (_is_own(value) if in_shards(value) else first)}
    planner = DefaultSavePlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
    planner.set_up_planner(own, is_coordinator=first)
    items = planner.create_local_plan().items
    found: list[Any] = [(one.index.fqn, planner.resolve_data(one), one.tensor_data) for one in items]
    return {name: Piece(tensor, list(about.chunk.offsets)) for name, tensor, about in found}


def _is_own(value: Any) -> bool:
    """Of the processes that hold the same part, whether this is the first."""
    places = value.device_mesh.get_coordinate() or ()
    return all(not kind.is_replicate() or at == 0 for at, kind in zip(places, value.placements, strict=True))


def sharding_info(pieces: Mapping[str, Piece]) -> dict[str, str]:
    """What a file's header says of the places of its tensors, as torch's distributed checkpoint has it."""
    places = {name: {"saved_offsets": piece.offsets} for name, piece in pieces.items()}
    return {"DCP_VERSION": "1.0", "DCP_SHARDING_INFO": json.dumps(places, separators=(",", ":"))}


class Stored:
    """The tensors that lie in some safetensors files of `folder`: whole, or in pieces over several of them."""

    def __init__(self, folder: Path, files: Iterable[Path]):
        from torch.distributed.checkpoint.filesystem import FileSystem
        from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader

        class Listing(FileSystem):
            """Only these: a checkpoint's weights and the rest of its state have names of their own."""

            def ls(self, path: Any) -> list[str]:
                return names

        names = [str(file) for file in files]
        self.reader = HuggingFaceStorageReader(str(folder))
        self.reader.fs = Listing()
        self.metadata: Any = self.reader.read_metadata()

    def kinds(self) -> dict[str, tuple[torch.Size, torch.dtype]]:
        """Shape and type of each tensor, whole."""
        known = self.metadata.state_dict_metadata
        return {name: (torch.Size(one.size), one.properties.dtype) for name, one in known.items()}

    def read(self, into: dict[str, Tensor]) -> None:
        """Fill tensors by name: of those in shards, what lies in this process. No process waits for another."""
        from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner

        planner = DefaultLoadPlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
        planner.set_up_planner(into, self.metadata, is_coordinator=True)
        self.reader.set_up_storage_reader(self.metadata, is_coordinator=True)
        plan = self.reader.prepare_local_plan(planner.create_local_plan())
        self.reader.read_data(planner.finish_plan(plan), planner).wait()

    def tensor(self, name: str) -> Tensor:
        """One of them, whole."""
        made = _room(*self.kinds()[name], None)
        self.read({name: made})
        return made

    def tensors(self, layout: Mapping[str, Tensor], prefix: str = "") -> dict[str, Tensor]:
        """All of them: in shards where the `layout` of a state has a tensor of such a name and shape in shards."""
        made = {name: _room(*kind, owner(layout, prefix + name)) for name, kind in self.kinds().items()}
        self.read(made)
        return made


def _room(shape: torch.Size, dtype: torch.dtype, own: Tensor | None) -> Tensor:
    """Memory for a tensor on the host, or for this process's part of it where `own` lies."""
    if own is not None and own.shape == shape:
        return torch.empty_like(own, dtype=dtype, requires_grad=False)
    return torch.empty(shape, dtype=dtype)
