"""What the loop does with a batch whose inside it does not know: move it, detach it, count its rows.

Does not know what a batch means; that is the objective's.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor


def to_device(batch: Any, device: torch.device) -> Any:
    """`batch` with every tensor in it on `device`; nested tuples, lists and mappings keep their kind."""
    if isinstance(batch, Tensor):
        return batch if batch.device == device else batch.to(device, non_blocking=True)
    if isinstance(batch, Mapping):
        moved = {key: to_device(value, device) for key, value in batch.items()}
        return moved if type(batch) is dict else _like(batch, moved)
    if isinstance(batch, tuple) and hasattr(batch, "_fields"):
        return type(batch)(*(to_device(value, device) for value in batch))
    if isinstance(batch, list | tuple):
        return type(batch)([to_device(value, device) for value in batch])
    return batch.to(device) if hasattr(batch, "to") else batch


def _like(batch: Any, moved: dict[Any, Any]) -> Any:
    # Mappings with their own `.to` (a tokenizer's output) know best how to be rebuilt.
    return batch.to(next(iter(tensors(moved))).device) if hasattr(batch, "to") and moved else moved


def tensors(batch: Any) -> list[Tensor]:
    """Every tensor in a nested batch, in order."""
    if isinstance(batch, Tensor):
        return [batch]
    if isinstance(batch, Mapping):
        batch = batch.values()
    elif not isinstance(batch, list | tuple):
        return []
    return [tensor for value in batch for tensor in tensors(value)]


def rows(batch: Any) -> int:
    """How many rows `batch` holds: the first dimension of its first tensor (1 for a number, or for none)."""
    found = tensors(batch)
    return found[0].shape[0] if found and found[0].ndim else 1


def detach(carry: Any) -> Any:
    """`carry` cut from the graph of the batch that made it: a tensor, or tuples, lists, dicts of them."""
    if isinstance(carry, Tensor):
        return carry.detach()
    if isinstance(carry, list | tuple):
        return type(carry)([detach(value) for value in carry])
    if isinstance(carry, dict):
        return {key: detach(value) for key, value in carry.items()}
    return carry


def shapes(value: Any) -> str:
    """The shapes in `value`, for an error: `[41, 16]`, or `[41, 16] and [41]`, or the type's name."""
    found = tensors(value)
    return " and ".join(str(list(tensor.shape)) for tensor in found) or type(value).__name__
