"""Snapshots of trees of tensors: copies that later steps do not change.

Tensors that are one memory (tied weights) stay one. Memory of an earlier snapshot can be used again: fresh pages cost
more than the copy itself. Owns the copying; what is in the tree is `state.py`'s.
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from fivestep.loop.batch import in_shards, parts, rebuilt

NUMBERS = frozenset({int, float, bool})


class Copies:
    """Copies tensors to `device` (their own if None), into `spare` ones of the same kind where there are any."""

    def __init__(self, device: str | None = None, spare: Iterable[Tensor] = ()):
        self.device = device
        self.made: dict[Any, Tensor] = {}  # place in memory -> its copy
        self.spare: dict[Any, list[Tensor]] = {}
        for tensor in spare:
            self.spare.setdefault(_kind(tensor), []).append(tensor)

    def of(self, value: Any) -> Any:
        """The same tree with tensors of its own."""
        if type(value) is list and NUMBERS.issuperset(map(type, value)):
            return value.copy()  # the words of a generator: one by one they would take half a millisecond
        if not isinstance(value, Tensor):
            return rebuilt(value, [self.of(part) for part in parts(value)])
        if value.layout is not torch.strided or not value.numel() or in_shards(value):
            return value.detach().clone()
        where = place(value)
        if where not in self.made:
            spare = self.spare.get(_kind(value))
            self.made[where] = (
                spare.pop().copy_(value.detach())
                if spare
                else value.detach().to(self.device or value.device, copy=True)
            )
        return self.made[where]


def place(value: Any) -> Any:
    """What two tensors that are one memory, read in one way, have in common; of shards, this process's part."""
    part = value.to_local() if in_shards(value) else value
    if part.layout is not torch.strided or not part.numel():
        return id(value)
    view = part.is_conj(), part.is_neg()  # two views of one memory with other values
    return part.data_ptr(), value.shape, part.stride(), part.dtype, part.device, view


def copied(value: Any) -> Any:
    """A snapshot of one tree."""
    return Copies().of(value)


def _kind(tensor: Tensor) -> Any:
    return tensor.shape, tensor.stride(), tensor.dtype
