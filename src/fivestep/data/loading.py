"""What a map-style torch DataLoader does, in two halves: index lists here, items wherever its workers are.

    batch_sampler or sampler ──► Lists ──► requests (key of the epoch, index list) ──► private DataLoader ──► batches
         in this process, on the generators that torch itself would use                 │
                                                            Fetch, in each worker or here: items, collated

Owns how index lists are drawn and how items are fetched, so that neither depends on how many workers there are, and
lists can be drawn again without reading the dataset. Does not know of positions or of saving; the reader does.
"""

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

from fivestep.data.generators import HostState, mixed, seed_host, undisturbed

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
        self.drawn = 0

    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> Any:
        if self.drawn == 0 or self.early:
            request = next(self.source)
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

    Random augmentation is seeded: each item by (key of the epoch, index), a batch of a dataset with `__getitems__`
    by its first index. The global generators are left as they were. Most datasets draw nothing and need not pay
    for that, so a batch is first fetched as it is; where that moved a generator it is fetched again, seeded, and
    every later one is seeded at once.
    """

    def __init__(self, loader: DataLoader[Any]):
        self.dataset, self.collate, self.batched = loader.dataset, loader.collate_fn, loader.batch_sampler is not None
        self.quiet = draws_nothing(self.dataset) and self.collate in (default_collate, default_convert)
        self.draws = False

    def __getitems__(self, request: tuple[int, Any]) -> Any:
        key, index = request
        if self.quiet:
            return self._fetched(index, None)
        if not self.draws:
            before = HostState()
            batch = self._fetched(index, None)
            if before.is_now():
                return batch
            before.restore()
            self.draws = True
        with undisturbed():
            return self._fetched(index, key)

    def _fetched(self, index: Any, key: int | None) -> Any:
        dataset: Any = self.dataset
        if not self.batched:
            items = dataset[index] if key is None else self._seeded(index, key)
        elif getattr(dataset, "__getitems__", None):
            if key is not None:
                seed_host(mixed(key, next(iter(index), None)))
            items = dataset.__getitems__(index)
        else:
            items = [dataset[i] for i in index] if key is None else [self._seeded(i, key) for i in index]
        return self.collate(items)

    def _seeded(self, index: Any, key: int) -> Any:
        seed_host(mixed(key, index))
        return self.dataset[index]


def draws_nothing(dataset: Any) -> bool:
    """Whether a dataset is known to draw no random number: tensors, and subsets and concatenations of them."""
    if type(dataset) is Subset:
        return draws_nothing(dataset.dataset)
    if type(dataset) is ConcatDataset:
        return all(map(draws_nothing, dataset.datasets))
    return type(dataset) is TensorDataset


class WorkerStart:
    """The `worker_init_fn` of a private loader: shows the user's dataset as the worker's, and calls the user's."""

    def __init__(self, own: Callable[[int], Any] | None):
        self.own = own

    def __call__(self, worker: int) -> None:
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
            worker_init_fn=WorkerStart(loader.worker_init_fn),
            generator=generator,
            **options,
        )


def _as_it_is(batch: Any) -> Any:
    return batch
