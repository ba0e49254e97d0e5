"""What the loop does with a batch whose inside it does not know: move it, detach it, count its rows.

Does not know what a batch means; that is the objective's.
"""

from collections import UserDict
from collections.abc import Iterable, Iterator, Mapping
from copy import copy
from operator import is_
from typing import Any

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy

from fivestep.errors import UsageError, named

PLAIN_CONTAINERS = (list, tuple, Mapping)


def to_device(batch: Any, device: torch.device) -> Any:
    """`batch` with every tensor in it on `device`; what has a `.to` uses it, containers keep their kind."""
    if isinstance(batch, Tensor):
        return batch if batch.device == device else batch.to(device, non_blocking=True)
    if type(batch) in (tuple, list):
        for one in batch:  # by hand: on each step's path
            if type(one) is not Tensor or one.device != device:
                break
        else:
            return batch
    if hasattr(batch, "to"):  # a PackedSequence, a tokenizer's output
        return batch.to(device)
    old = parts(batch)
    new = [to_device(value, device) for value in old]
    return batch if all(map(is_, new, old)) else rebuilt(batch, new)


def in_shards(value: Any) -> bool:
    """Whether it is a DTensor: this process holds a part of it. (Their module takes 0.3 s to import.)"""
    return isinstance(value, Tensor) and hasattr(value, "full_tensor")


def parts(value: Any) -> list[Any]:
    """What a tuple, list or mapping holds; nothing for anything else."""
    if isinstance(value, Mapping):
        return list(value.values())
    return list(value) if isinstance(value, list | tuple) else []


def rebuilt(value: Any, new: list[Any]) -> Any:
    """A container of the kind of `value` that holds `new` in place of its parts; anything else as it is."""
    if isinstance(value, UserDict):  # a tokenizer's output is one
        again = copy(value)
        again.data = dict(zip(value, new, strict=True))
        return again
    if isinstance(value, Mapping):
        return dict(zip(value, new, strict=True))
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*new)
    return type(value)(new) if isinstance(value, list | tuple) else value


def whole(value: Any) -> Any:
    """`value` with each tensor gathered that lies in shards. All processes must ask at once, and in one order."""
    if in_shards(value):
        return value.full_tensor()
    return value if isinstance(value, Tensor) else rebuilt(value, [whole(one) for one in parts(value)])


def tensors(batch: Any) -> list[Tensor]:
    """Every tensor in a nested batch, in order."""
    return [batch] if isinstance(batch, Tensor) else [tensor for value in parts(batch) for tensor in tensors(value)]


def rows(batch: Any) -> int:
    """How many rows `batch` holds: the first dimension of its first tensor (1 for a number, or for none)."""
    found = [batch] if isinstance(batch, Tensor) else tensors(batch)
    return found[0].shape[0] if found and found[0].ndim else 1


def is_empty(batch: Any) -> bool:
    """Return whether `batch` holds no data: None, a container without parts, or tensors without elements only.

    What is neither a tensor nor a container (text, a number, another class) is data.
    """
    if isinstance(batch, Tensor):
        return batch.numel() == 0
    if batch is None:
        return True
    return isinstance(batch, PLAIN_CONTAINERS) and all(map(is_empty, parts(batch)))


def without_empty(stream: Iterable[Any]) -> Iterator[Any]:
    """Return the batches of `stream` that hold data."""
    return (batch for batch in stream if not is_empty(batch))


def distinct(tensor: Tensor) -> Tensor:
    """Return the view of `tensor` that holds each element of its memory once.

    torch refuses to write into an expanded tensor, where one element of memory is seen as many.
    """
    if not is_lazy(tensor) and tensor.layout is torch.strided and 0 in tensor.stride():
        for dimension, (size, stride) in enumerate(zip(tensor.shape, tensor.stride(), strict=True)):
            if stride == 0 and size > 1:
                tensor = tensor.narrow(dimension, 0, 1)
    return tensor


def cut(value: Any, n: int, begin: int, end: int, keep: bool = False) -> Any:
    """The rows begin .. end - 1 of a batch of n: of tensors with n rows, or a multiple; None where it has others.

    Numbers, text and scalars stay as they are; with `keep`, so does what has other rows.
    """
    lost = value if keep else None
    if isinstance(value, Tensor):
        if not value.ndim:
            return value
        if value.shape[0] == n:
            return value[begin:end]
        if not n or value.shape[0] % n:
            return lost
        each = value.shape[0] // n
        return value[begin * each : end * each]
    if isinstance(value, str | int | float | None):
        return value
    if not isinstance(value, list | tuple | Mapping):
        return lost
    if isinstance(value, list | tuple) and len(value) == n and all(isinstance(one, str) for one in value):
        return type(value)(value[begin:end])  # the texts of the rows
    inside = [cut(one, n, begin, end, keep) for one in parts(value)]
    if any(one is None and part is not None for one, part in zip(inside, parts(value), strict=True)):
        return None
    return rebuilt(value, inside)


def without_first_rows(stream: Iterator[Any], begin: int) -> Iterator[Any]:
    """Yield the batches of `stream`, the first one without its first rows. Raises UsageError where it has no rows."""
    for batch in stream:
        if begin and begin < (n := rows(batch)):
            batch = cut(batch, n, begin, n)
            if batch is None:
                raise UsageError("a batch cannot be cut by rows: change the batch size at an epoch's end")
            yield batch
        elif not begin:
            yield batch
        begin = 0


def detach(carry: Any) -> Any:
    """`carry` cut from the graph of the batch that made it: tensors, numbers, text, and containers of them.

    Raises UsageError for anything else: it could hold a graph, and could not be saved.
    """
    if isinstance(carry, Tensor):
        return carry.detach()
    if not isinstance(carry, list | tuple | Mapping | str | int | float | None):
        raise UsageError(f"a hidden state must be tensors in tuples, lists or dicts; got {named(carry)}")
    return rebuilt(carry, [detach(value) for value in parts(carry)])


def shapes(value: Any) -> str:
    """The shapes in `value`, for an error: `[41, 16]`, or `[41, 16] and [41]`, or the type's name."""
    found = tensors(value)
    return " and ".join(str(list(tensor.shape)) for tensor in found) or type(value).__name__
