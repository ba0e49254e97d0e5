"""What the loop asks of data, and how any iterable gives it.

Owns the `Stream` protocol (a seekable source of batches) and the reading of other people's loaders, which
are told the epoch and skipped forward. Owns no order and no batch: those are the streams' own, in
`windows.py`, `segments.py` and `examples.py`. Never asks for a batch before its reader does.
"""

from collections.abc import Iterable, Iterator
from itertools import islice
from typing import Any, Protocol, TypeVar

from fivestep.errors import UsageError

BatchT_co = TypeVar("BatchT_co", covariant=True)


class Stream(Protocol[BatchT_co]):
    """A seekable source: batch p of epoch e depends on the stream's seed, e and p, and on nothing else."""

    def __len__(self) -> int:
        """Batches in an epoch, the same in every epoch."""
        ...

    def epoch(self, epoch: int, start: int = 0) -> Iterator[BatchT_co]:
        """Batches start, start + 1, ... of an epoch; seeking to `start` costs no more than starting at 0."""
        ...


def batches(data: Stream[Any] | Iterable[Any], epoch: int, start: int = 0) -> Iterator[Any]:
    """The batches start, start + 1, ... of an epoch of any data.

    A stream seeks. Any other iterable (a DataLoader, a list, a generator) is told the epoch wherever it has
    a `set_epoch`, then `iter(data)` is called, at once, and `start` batches are drawn and dropped when the
    first one is asked for. Raises UsageError for what cannot be iterated.
    """
    if is_stream(data):
        return data.epoch(epoch, start)  # type: ignore[union-attr]
    if not hasattr(type(data), "__iter__") and not hasattr(type(data), "__getitem__"):
        raise UsageError(
            f"data must be a stream or an iterable of batches (a DataLoader, a list, a generator); "
            f"got {type(data).__name__}"
        )
    _tell_epoch(data, epoch)
    return islice(iter(data), start, None)  # type: ignore[arg-type]


def is_stream(data: Any) -> bool:
    """Whether `data` seeks by itself."""
    return callable(getattr(data, "epoch", None))


def batches_per_epoch(data: Stream[Any] | Iterable[Any]) -> int | None:
    """`len(data)`, or None where it is not known."""
    try:
        return len(data)  # type: ignore[arg-type]
    except (TypeError, NotImplementedError):
        return None


def own_generators(data: Any) -> list[Any]:
    """The random generators that a loader or its samplers keep for themselves (`generator=`), each once."""
    found = [getattr(place, "generator", None) for place in _places(data)]
    return list({id(generator): generator for generator in found if hasattr(generator, "get_state")}.values())


def _places(data: Any) -> list[Any]:
    """A loader and its samplers, each once."""
    batch_sampler = getattr(data, "batch_sampler", None)
    places = (data, getattr(data, "sampler", None), batch_sampler, getattr(batch_sampler, "sampler", None))
    return list({id(place): place for place in places}.values())


def _tell_epoch(data: Any, epoch: int) -> None:
    """Call `set_epoch(epoch)`, once an object, on a loader and its samplers, whose order may depend on it."""
    for place in _places(data):
        set_epoch = getattr(place, "set_epoch", None)
        if callable(set_epoch):
            set_epoch(epoch)
