"""What the loop asks of data, and how any iterable gives it.

Owns the `Stream` protocol (a seekable source of batches) and the plain way to read any iterable, told the epoch and
skipped forward; `reader.py` knows how to go on exactly. Owns no order and no batch: those are the streams' own, in
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
        """Batches in an epoch; where that differs from one to the next, `batches_in(epoch)` tells, and this of 0."""
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
    check_batched(data)
    tell_epoch(data, epoch)
    return islice(iter(data), start, None)  # type: ignore[arg-type]


def is_stream(data: Any) -> bool:
    """Whether `data` seeks by itself."""
    return callable(getattr(data, "epoch", None))


def check_batched(data: Any) -> None:
    """Raise UsageError for a torch Dataset that no loader makes batches of, such as a TensorDataset."""
    mapped = any(
        (cls.__module__, cls.__name__) == ("torch.utils.data.dataset", "Dataset") for cls in type(data).__mro__
    )
    if mapped and not hasattr(data, "__iter__") and not is_stream(data):
        kind = type(data).__name__
        raise UsageError(
            f"the data is a {kind} without a loader, so each item would be a batch. Wrap it: DataLoader(dataset, "
            "batch_size=32). If its items are already batches, use batch_size=None"
        )


def batches_per_epoch(data: Stream[Any] | Iterable[Any], epoch: int = 0) -> int | None:
    """The batches of an epoch: `data.batches_in(epoch)` where there is that, else `len(data)`; None if not known."""
    try:
        if hasattr(data, "batches_in"):
            return int(data.batches_in(epoch))
        return len(data)  # type: ignore[arg-type]
    except (TypeError, NotImplementedError):
        return None


def nothing_drawn(data: Any, epoch: int) -> str:
    """The sentence for an epoch without a batch."""
    if epoch == 0:
        return (
            f"the data ({type(data).__name__}) gave no batch: is it empty, or shorter than one batch with drop_last?"
        )
    return f"the data ({type(data).__name__}) gave no batch in epoch {epoch + 1}: it can be iterated only once"


def steps_in(data: Stream[Any] | Iterable[Any], accumulate: int, epochs: int) -> int | None:
    """Updates in the first `epochs` epochs, the last window of each perhaps short; None where that is not known."""
    if not hasattr(data, "batches_in"):
        batches = batches_per_epoch(data)
        return None if batches is None else epochs * -(-batches // accumulate)
    return sum(-(-int(data.batches_in(epoch)) // accumulate) for epoch in range(epochs))


class FirstBatches:
    """The first `n` batches of a stream, the same in every epoch: what a model that learns at all can learn by heart.

    Raises UsageError where n is below 1 or the stream is shorter.
    """

    def __init__(self, stream: Stream[Any], n: int):
        if not 1 <= n <= len(stream):
            raise UsageError(
                f"overfit_batches = {n} must be 1 to {len(stream)}, the batches of an epoch (--overfit-batches)"
            )
        self.stream, self.n = stream, n
        self.variable = getattr(stream, "variable", False)

    def __len__(self) -> int:
        return self.n

    def __iter__(self) -> Iterator[Any]:
        return self.epoch(0)

    def epoch(self, epoch: int, start: int = 0) -> Iterator[Any]:
        """Batches start .. n - 1 of the stream's own epoch 0."""
        return islice(self.stream.epoch(0, start), max(0, self.n - start))


def _places(data: Any) -> list[Any]:
    """A loader and its samplers, each once."""
    batch_sampler = getattr(data, "batch_sampler", None)
    places = (data, getattr(data, "sampler", None), batch_sampler, getattr(batch_sampler, "sampler", None))
    return list({id(place): place for place in places}.values())


def tell_epoch(data: Any, epoch: int) -> None:
    """Call `set_epoch(epoch)`, once an object, on a loader and its samplers, whose order may depend on it."""
    for place in _places(data):
        set_epoch = getattr(place, "set_epoch", None)
        if callable(set_epoch):
            set_epoch(epoch)
