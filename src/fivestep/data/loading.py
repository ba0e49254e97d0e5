"""What a map-style torch DataLoader does, in two halves: index lists here, items wherever its workers are.

    batch_sampler or sampler ──► Lists ──► requests (seed, index list) ──► private DataLoader ──► batches
         in this process, on the generators that torch itself would use                 │
                                                            Fetch, in each worker or here: items, collated

Owns how index lists are drawn and how items are fetched, so that neither depends on how many workers there are, and
lists can be drawn again without reading the dataset. Does not know of positions or of saving; the reader does.
"""

import multiprocessing
import os
import warnings
from collections.abc import Callable, Iterator
from itertools import islice
from typing import Any

import torch
from torch.utils.data import (
    BatchSampler,
    ConcatDataset,
    DataLoader,
    Dataset,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    Subset,
    SubsetRandomSampler,
    TensorDataset,
    WeightedRandomSampler,
    default_collate,
    default_convert,
    get_worker_info,
)

from fivestep.data.generators import HostState, mixed, seed_host, seeded, undisturbed

# These draw from the global generators when they are first asked, and never later.
EARLY = (SequentialSampler, RandomSampler, SubsetRandomSampler, WeightedRandomSampler, DistributedSampler)
END = object()


def is_map_style(loader: Any) -> bool:
    """Whether `loader` is a torch DataLoader that is iterated as torch does it, over a dataset asked by index."""
    if not isinstance(loader, DataLoader) or isinstance(loader.dataset, IterableDataset):
        return False
    if isinstance(loader.dataset, getattr(torch.utils.data, "MapDataPipe", ())):
        return False
    own = ("__iter__", "_get_iterator", "_index_sampler", "_auto_collation")
    return all(getattr(type(loader), name, None) is getattr(DataLoader, name, None) for name in own)


def index_sampler(loader: DataLoader[Any]) -> Any:
    """What yields the loader's requests: lists of indices, or single indices where batch_size is None."""
    return loader.sampler if loader.batch_sampler is None else loader.batch_sampler


def distributed_sampler(data: Any) -> Any:
    """Return the torch.utils.data.DistributedSampler of a loader, or None."""
    inner = getattr(getattr(data, "batch_sampler", None), "sampler", None)
    found = [one for one in (getattr(data, "sampler", None), inner) if isinstance(one, DistributedSampler)]
    return found[0] if found else None


def draws_early(sampler: Any) -> bool:
    """Whether a sampler is known to draw from the global generators at its first list only, or never."""
    if type(sampler) is BatchSampler:
        sampler = sampler.sampler
    return type(sampler) in EARLY or isinstance(sampler, list | tuple | range)


class Lists:
    """The index lists of one epoch.

    The first is drawn on the global generators, as the loader itself would. So are the later ones of the samplers
    that draw no more from them. Any other sampler is looked at: one that does draw later is iterated anew, its
    later lists on a track of random states of its own (`track`, seeded by the epoch's key), because on the global
    generators they would depend on what the model draws in between, and could not be drawn again.

    `again(n)` gives a new `Lists` of the same epoch with n drawn; it is called once, with `lazy` True from then on.
    """

    def __init__(self, source: Iterator[Any], early: bool, track: HostState | None, again: Callable[[int], "Lists"]):
        self.source, self.early, self.track, self.again = source, early, track, again
        self.drawn, self.ended = 0, False

    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> Any:
        if self.drawn == 0 or self.early:
            request = next(self.source, END)
        elif self.track is not None:
            request = self._on_its_track()
        else:
            before = HostState()
            request = next(self.source, END)
            if not before.is_now():
                before.restore()
                anew = self.again(self.drawn)
                self.source, self.track = anew.source, anew.track
                request = self._on_its_track()
        if request is END:
            self.ended = True
            raise StopIteration
        self.drawn += 1
        return request

    def _on_its_track(self) -> Any:
        assert self.track is not None
        with undisturbed():
            self.track.restore()
            try:
                return next(self.source, END)
            finally:
                self.track = HostState()

    def skip(self, n: int) -> bool:
        """Draw n lists, which are known not to move the global generators beyond the first; whether there were n."""
        if n > 0 and self.track is not None:
            if next(self, END) is END:
                return False
            with undisturbed():  # one change of track for all the others
                self.track.restore()
                self._advance(n - 1)
                self.track = HostState()
        else:
            self._advance(n)
        return self.drawn == n

    def _advance(self, n: int) -> None:
        self.drawn += sum(1 for _ in islice(self.source, n))


class Requests:
    """The batch sampler of a private loader: yields whatever `source` yields, epoch after epoch."""

    def __init__(self) -> None:
        self.source: Iterator[Any] = iter(())

    def __iter__(self) -> Iterator[Any]:
        return self.source


class Fetch(Dataset[Any]):
    """The dataset of a private loader: fetches and collates one request, in a worker or in this process.

    While a batch is fetched, the global generators run from the request's seed; afterwards they are as before. The
    items of a batch draw one after the other, so an index that is drawn twice is augmented anew. No item is fetched
    twice. `by_index` is the rule of earlier versions, for an epoch that such a version began: each item is seeded by
    its index.
    """

    def __init__(self, loader: DataLoader[Any]):
        self.dataset, self.collate, self.batched = loader.dataset, loader.collate_fn, loader.batch_sampler is not None
        self.quiet = draws_nothing(self.dataset) and self.collate in (default_collate, default_convert)

    def __getitems__(self, request: tuple[int, bool, Any]) -> Any:
        seed, by_index, index = request
        if self.quiet:
            return self.collate(self._items(index))
        with seeded(seed):
            return self.collate(self._items_by_index(index, seed) if by_index else self._items(index))

    def _items(self, index: Any) -> Any:
        dataset: Any = self.dataset
        if not self.batched:
            return dataset[index]
        if getattr(dataset, "__getitems__", None):
            return dataset.__getitems__(index)
        return [dataset[i] for i in index]

    def _items_by_index(self, index: Any, seed: int) -> Any:
        dataset: Any = self.dataset
        if self.batched and not getattr(dataset, "__getitems__", None):
            return [self._item_by_index(i, seed) for i in index]
        seed_host(mixed(seed, next(iter(index), None) if self.batched else index))
        return self._items(index)

    def _item_by_index(self, index: Any, seed: int) -> Any:
        seed_host(mixed(seed, index))
        return self.dataset[index]


def draws_nothing(dataset: Any) -> bool:
    """Whether a dataset is known to draw no random number: tensors, and subsets and concatenations of them."""
    if type(dataset) is Subset:
        return draws_nothing(dataset.dataset)
    if type(dataset) is ConcatDataset:
        return all(map(draws_nothing, dataset.datasets))
    return type(dataset) is TensorDataset


class WorkerStart:
    """The `worker_init_fn` of a private loader: shows the user's dataset as the worker's, and calls the user's.

    A worker whose parent is killed before it starts ends here: torch's watchdog, which begins later, would take the
    process that adopts it for its parent, and let it live for ever.
    """

    def __init__(self, own: Callable[[int], Any] | None, context: Any = None):
        self.own = own
        method = getattr(context, "get_start_method", multiprocessing.get_start_method)()
        self.parent = None if method == "forkserver" else os.getpid()

    def __call__(self, worker: int) -> None:
        if self.parent not in (None, os.getppid()):
            os._exit(1)
        info = get_worker_info()
        object.__setattr__(info, "dataset", info.dataset.dataset)  # type: ignore[union-attr]  # it is frozen
        if self.own is not None:
            self.own(worker)


def private_loader(loader: DataLoader[Any], requests: Requests, generator: torch.Generator) -> DataLoader[Any]:
    """A loader over the same dataset, with the same workers, that is fed with `requests`.

    Batches come in the order of the requests, also where the loader has in_order=False: another could not be
    repeated.
    """
    options: dict[str, Any] = {}
    if loader.num_workers > 0:
        options = {
            "prefetch_factor": loader.prefetch_factor,
            "persistent_workers": loader.persistent_workers,
            "multiprocessing_context": loader.multiprocessing_context,
        }
    if getattr(loader, "pin_memory_device", ""):
        options["pin_memory_device"] = loader.pin_memory_device
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the user's own loader has said it
        return DataLoader(
            Fetch(loader),
            batch_sampler=requests,
            num_workers=loader.num_workers,
            collate_fn=_as_it_is,
            pin_memory=loader.pin_memory,
            timeout=loader.timeout,
            worker_init_fn=WorkerStart(loader.worker_init_fn, loader.multiprocessing_context),
            generator=generator,
            **options,
        )


def _as_it_is(batch: Any) -> Any:
    return batch
