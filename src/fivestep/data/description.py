"""What data a training reads, in plain values that a later start can compare: length, batch size, order, content.

Owns the description. Draws no batch, calls no code of a user's dataset, and reads a sample of what lies in memory.
"""

import hashlib
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import BatchSampler, DataLoader, TensorDataset
from torch.utils.data.distributed import DistributedSampler

from fivestep.data.loading import is_map_style
from fivestep.data.stream import FirstBatches, batches_per_epoch, is_stream

BLOCKS, BLOCK = 64, 512  # a sample of an array: so many blocks, evenly spread, of so many values
HOW_READ = ("batch_size", "block_size", "bptt", "variable", "seed", "replacement", "shuffle", "n")  # of our streams


def described(data: Any) -> dict[str, Any]:
    """Describe `data` by what is known without drawing from it. The names say what each value is."""
    if isinstance(data, DataLoader):
        return _loader(data)
    found: dict[str, Any] = described(data.stream) | {"by_rows": False} if isinstance(data, FirstBatches) else {}
    if not callable(getattr(data, "set_epoch", None)) and (batches := batches_per_epoch(data)) is not None:
        found["batches"] = batches
    if isinstance(data, list | tuple) and data:
        found["content"] = sample_digest([data[0], data[len(data) // 2], data[-1]])
    if is_stream(data) and type(data).__module__.startswith("fivestep."):
        found["stream"] = type(data).__name__
        found |= {name: getattr(data, name) for name in HOW_READ if isinstance(getattr(data, name, None), int)}
        found["by_rows"] = getattr(data, "ordered_by_rows", False)
        content = sample_digest([vars(data).get(name) for name in ("tokens", "features", "labels")])
        found |= {"content": content} if content else {}
    return {name: value for name, value in found.items() if value is not None}


def _loader(loader: DataLoader[Any]) -> dict[str, Any]:
    sampler = loader.batch_sampler if type(loader.batch_sampler) is not BatchSampler else loader.sampler
    found: dict[str, Any] = {"batch_size": loader.batch_size, "drop_last": loader.drop_last}
    if loader.batch_size is None and isinstance(getattr(loader.batch_sampler, "batch_size", None), int):
        found["batch_size"] = loader.batch_sampler.batch_size  # type: ignore[union-attr]
    if is_map_style(loader):
        found["rows"] = _length(loader.dataset)
        found["sampler"] = type(sampler).__name__
        found["by_rows"] = type(loader.batch_sampler) is BatchSampler
        if not isinstance(sampler, DistributedSampler):  # its part depends on the number of processes
            found["batches"] = _length(loader)
    if isinstance(loader.dataset, TensorDataset):
        found["content"] = sample_digest(loader.dataset.tensors)
    return {name: value for name, value in found.items() if value is not None}


def _length(thing: Any) -> int | None:
    try:
        return len(thing)
    except (TypeError, NotImplementedError):
        return None


def sample_digest(value: Any) -> str | None:
    """Hash a sample of the arrays in `value`; None where there is none. Equal content gives equal text."""
    digest, arrays = hashlib.sha256(), 0
    for array in _arrays(value):
        arrays += 1
        digest.update(f"{array.dtype} {list(array.shape)}".encode())
        flat = array.reshape(-1)
        step = max(BLOCK, len(flat) // BLOCKS)
        for at in [*range(0, len(flat), step), max(0, len(flat) - BLOCK)]:
            part = flat[at : at + BLOCK]
            digest.update(_bytes(part))
    return digest.hexdigest()[:16] if arrays else None


def _arrays(value: Any) -> list[Any]:
    if isinstance(value, Tensor):
        plain = value.layout is torch.strided and not value.is_meta and not hasattr(value, "full_tensor")
        return [value.detach()] if plain else []
    if isinstance(value, np.ndarray):
        return [value] if value.dtype.kind in "biufc" else []
    if isinstance(value, Mapping):
        value = list(value.values())
    return [array for one in value for array in _arrays(one)] if isinstance(value, list | tuple) else []


def _bytes(part: Any) -> bytes:
    if isinstance(part, Tensor):
        part = part.cpu().contiguous().view(torch.uint8).numpy()
    return np.ascontiguousarray(part).tobytes()
