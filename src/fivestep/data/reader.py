"""How a training reads any data, so that it can go on exactly, in this process or a new one.

`build_reader(data)` picks one of four ways, once:

    a stream, a list, a tuple                     Reader          seeks
    a map-style torch DataLoader                  LoaderReader    draws its index lists again, never its items
    a loader or dataset with a state_dict()       StatefulReader  uses it, and load_state_dict()
    any other iterable                            DrawingReader   draws it again, says so, and drops what was consumed

Owns what a resume needs of the data: random states of the epoch's start, the loader's own generators, what its
workers have asked for ahead. Does not know the model, the step or how states are written.
"""

import warnings
import weakref
from collections import deque
from collections.abc import Callable, Iterator
from copy import deepcopy
from itertools import chain, count, islice, repeat
from typing import Any

import torch
from torch.utils.data import BatchSampler, DataLoader, IterableDataset

from fivestep.data.generators import (
    HostState,
    mixed,
    owned_generators,
    random_state,
    random_state_kept,
    restore,
    restore_random_state,
    state_of,
    undisturbed,
)
from fivestep.data.loading import (
    END,
    Lists,
    Requests,
    distributed_sampler,
    draws_early,
    index_sampler,
    is_map_style,
    private_loader,
)
from fivestep.data.stream import batches, batches_per_epoch, is_stream, tell_epoch
from fivestep.errors import UsageError, named
from fivestep.interrupts import left_at_once

SAMPLER_PARTS = frozenset({"sampler", "batch_sampler"})  # attributes in which a sampler keeps others
DATA_PARTS = frozenset({"dataset", "datasets", "transform", "transforms", "target_transform", "collate_fn"})
REMEMBERED = 256  # batches whose indices `where` can name


class Reader:
    """Reads a stream, a list or a tuple, which seek by themselves; the other ways are its subclasses.

    `notice` is one sentence that the user should see, where there is one.
    """

    kind = "seek"
    draws = False  # whether beginning an epoch, and drawing its first window, uses random states
    draws_always = False  # whether drawing any window may

    def __init__(self, data: Any):
        self.data = data
        self.notice: str | None = None

    def epoch(self, epoch: int, position: int = 0, begun: bool = False) -> Iterator[Any]:
        """The batches of an epoch from `position` on; from 0 it is a new one, else it goes on within that epoch."""
        whole = batches_per_epoch(self.data, epoch) if position else None
        if whole is not None and position > whole:
            raise UsageError(
                f"cannot go on after batch {position} of the epoch: the data has only {whole}; "
                "give the data that the training began with"
            )
        return batches(self.data, epoch, position)

    def draw(self, take: Callable[..., list[Any]], stream: Iterator[Any]) -> list[Any]:
        """`take(stream)`; an end that is asked for meanwhile breaks off the wait."""
        return left_at_once(take, stream)

    def ended(self, stream: Iterator[Any]) -> bool:
        """Return whether the epoch has no further batch; `stream` is asked for one, as a `for` loop would.

        A batch that comes is dropped, and everything is put back, so that `epoch` gives it again.
        """
        random, place = random_state(), deepcopy(self.state_dict())
        try:
            if next(stream, END) is END:
                return True
        except BaseException:
            self._give_back(random, place)
            raise
        self._give_back(random, place)
        return False

    def _give_back(self, random: dict[str, Any], place: dict[str, Any]) -> None:
        self.load_state_dict(place)
        restore_random_state(random)

    def finish(self) -> None:
        """Release the epoch's iterator: it has been asked beyond its last batch."""

    def state_dict(self) -> dict[str, Any]:
        """What a resume of the next step needs: tensors, numbers, text, None, lists and dicts (what a user's
        `state_dict()` returns, as it is). To be asked between two steps, or between two epochs."""
        return {"kind": self.kind}

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        """Put back what `state_dict` returned; of another kind of data, nothing."""

    def where(self, epoch: int, position: int, n: int = 1) -> dict[str, list[Any]]:
        """What names the batches position .. position + n - 1: {"offsets": ...} of a stream, {"indices": ...} of a
        loader, a list a batch; {} where that is not known."""
        offsets = getattr(self.data, "offsets", None)
        if not is_stream(self.data) or not callable(offsets):
            return {}
        return {"offsets": [offsets(epoch, position + i).tolist() for i in range(n)]}

    def _no_way_on(self) -> UsageError:
        return UsageError(
            f"cannot go on within an epoch of {named(self.data)}: "
            "give the data that this epoch began with, and that can be iterated again"
        )


class LoaderReader(Reader):
    """Reads a map-style DataLoader through a private one over the same dataset, which lives as long as the reader.

    Random states are used as by `iter(loader)` itself, so that a deterministic dataset gives the bits of a plain
    `for batch in loader`. A resume puts back the states of the epoch's start, draws the consumed index lists anew
    and puts the present states back; no item is read twice. Samplers with `state_dict` and `load_state_dict` are
    put where they were.
    """

    kind = "loader"
    draws = True

    def __init__(self, data: DataLoader[Any]):
        super().__init__(data)
        self.sampler = index_sampler(data)
        self.early = draws_early(self.sampler)
        inner = self.sampler.sampler if type(self.sampler) is BatchSampler else None
        self.stateful: Any = next((sampler for sampler in (self.sampler, inner) if _saves(sampler)), None)
        seen: set[int] = set()
        self.ordering: dict[str, Any] = {}  # generators behind the order: it is drawn again from the epoch's start
        for name in ("generator", "batch_sampler", "sampler"):
            self.ordering |= owned_generators(getattr(data, name), name, SAMPLER_PARTS, seen)
        self.fetching: dict[str, Any] = {}  # generators behind the items: they go on
        for name in ("dataset", "collate_fn"):
            self.fetching |= owned_generators(getattr(data, name), name, DATA_PARTS, seen)

        self.generator = torch.Generator()
        self.requests = Requests()
        self.private = private_loader(data, self.requests, self.generator)
        # How torch's own iter() uses random states: part of a run, and kept where it goes on with other workers.
        self.ways = {"seed_once": data.persistent_workers, "iterated_twice": data.num_workers > 0}
        self.lazy = self.stateful is not None  # the sampler draws later than at its first list
        self.seed: int | None = None  # as torch draws it for its workers
        self.by_index = False  # an earlier version began this epoch, and seeded each item by its index
        self.start: dict[str, Any] | None = None  # what this epoch's order is drawn from
        self.lists: Lists | None = None
        self.ahead: deque[Any] = deque()  # asked for by workers, and not handed out
        self.recent: deque[tuple[int, int, Any]] = deque(maxlen=REMEMBERED)
        self.handed = 0  # batches of this epoch
        self.saved: dict[str, Any] | None = None  # of a sampler with a state, until its epoch goes on

    def epoch(self, epoch: int, position: int = 0, begun: bool = False) -> Iterator[Any]:
        """As `Reader.epoch`; a loader with workers asks them at once, as torch's own does."""
        saved, self.saved = self.saved, None
        tell_epoch(self.data, epoch)
        waiting: list[Any] = []
        if position == 0 and not begun:
            self.by_index = False
            self.start = self._present()
            self.lists = self._opened(epoch)
        elif self.start is None:
            raise self._no_way_on()
        elif saved is not None and self._goes_on(saved, position):
            self.lists, waiting = self._continued(saved, epoch), saved["ahead"]
        else:
            self.lists = self._drawn_again(epoch, position)
        self.ahead.clear()
        self.handed = position
        self.generator.manual_seed(mixed(self.seed or 0, epoch))
        seeds = self._seeds(epoch, position)
        self.requests.source = _requested(seeds, self.by_index, chain(waiting, self.lists), self.ahead)
        return self._handed_out(iter(self.private), epoch)

    def ended(self, stream: Iterator[Any]) -> bool:
        """As `Reader.ended`, but only an index list is asked for. One that comes is kept, and no item is read."""
        return not self.ahead and next(self.requests.source, None) is None

    def _seeds(self, epoch: int, position: int) -> Iterator[int]:
        """Return the seeds of the epoch's batches from `position` on, for what the items draw.

        A seed depends on the epoch and on the place of the batch's first item in the epoch's order of draws. Ranks
        that read batches of their own (DistributedSampler) have seeds of their own.
        """
        key, of_each = mixed(self.seed or 0, epoch), self.data.batch_size or 1
        if self.by_index:
            return repeat(key)
        rank = getattr(distributed_sampler(self.data), "rank", 0)
        return (mixed(key, place * of_each, rank) for place in count(position))

    def _present(self) -> dict[str, Any]:
        """What the order of the epoch that begins now depends on."""
        return {
            "random": random_state(),
            "generators": {name: state_of(generator) for name, generator in self.ordering.items()},
            "seed": self.seed,
            "sampler": self.stateful.state_dict() if self.stateful is not None else None,
        }

    def _opened(self, epoch: int) -> Lists:
        """As torch's `iter(loader)`: iterate the sampler, draw a seed for workers; its reset iterates once more."""
        source = iter(self.sampler)
        if self.seed is None or not self.ways["seed_once"]:
            drawn = torch.empty((), dtype=torch.int64).random_(generator=self.data.generator)
            self.seed = int(drawn.item())
            if self.ways["iterated_twice"]:
                source = iter(self.sampler)
        track = HostState.seeded(mixed(self.seed, epoch, "order")) if self.lazy else None
        return self._lists(source, track, epoch)

    def _lists(self, source: Iterator[Any], track: HostState | None, epoch: int) -> Lists:
        itself = weakref.ref(self)  # no cycle: workers end when the last reference to them does, not some time later

        def again(drawn: int) -> Lists:
            reader = itself()
            assert reader is not None
            reader.lazy = True
            return reader._drawn_again(epoch, drawn)

        return Lists(source, self.early, track, again)

    def _drawn_again(self, epoch: int, position: int) -> Lists:
        """The order of this epoch, with `position` lists drawn, and the present random states as they were."""
        assert self.start is not None
        if self.stateful is not None:
            self.stateful.load_state_dict(self.start["sampler"])
        with random_state_kept(self.start["random"]):
            for name, generator in self.ordering.items():
                restore(generator, self.start["generators"][name])
            self.seed = self.start["seed"]
            lists = self._opened(epoch)
            if not position:  # a sampler draws at its first list: now, from the states of the epoch's start
                lists.source = chain(list(islice(lists.source, 1)), lists.source)
            if not lists.skip(position):
                raise UsageError(
                    f"cannot go on after batch {position} of the epoch: the loader's sampler gave only {lists.drawn}"
                )
        return lists

    def _goes_on(self, saved: dict[str, Any], position: int) -> bool:
        """Whether a sampler's saved state is of this place, and within the epoch: at its end a sampler may already
        have been reset, and what it says would begin the next epoch."""
        within = not saved.get("ended") and saved["drawn"] < (batches_per_epoch(self.data) or 0)
        return bool(saved["handed"] == position and within)

    def _continued(self, saved: dict[str, Any], epoch: int) -> Lists:
        """A sampler with a state, from where it was saved, on its own track."""
        self.stateful.load_state_dict(saved["sampler"])
        with undisturbed():
            track = HostState.of(saved["track"])
            track.restore()
            source = iter(self.sampler)
            lists = self._lists(source, HostState(), epoch)
        lists.drawn = saved["drawn"]
        return lists

    def _handed_out(self, fetched: Iterator[Any], epoch: int) -> Iterator[Any]:
        for batch in fetched:
            self.recent.append((epoch, self.handed, self.ahead.popleft()))
            self.handed += 1
            yield batch

    def state_dict(self) -> dict[str, Any]:
        """As `Reader.state_dict`: about 20 kB, whatever the dataset's size."""
        generators = self.ordering | self.fetching
        saved = {
            "kind": self.kind,
            "ways": dict(self.ways),
            "seeded_by": "index" if self.by_index else "place",
            "lazy": self.lazy,
            "seed": self.seed,
            "start": self.start,
            "generators": {name: state_of(generator) for name, generator in generators.items()},
            "sampler": None,
        }
        if self.stateful is not None and self.lists is not None:
            assert self.lists.track is not None
            saved["sampler"] = {
                "sampler": self.stateful.state_dict(),
                "track": self.lists.track.state_dict(),
                "ahead": list(self.ahead),
                "drawn": self.lists.drawn,
                "handed": self.handed,
                "ended": self.lists.ended,
            }
        return saved

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        """As `Reader.load_state_dict`. Raises UsageError where a generator was kept that this loader lacks."""
        if saved["kind"] != self.kind:
            return
        generators = self.ordering | self.fetching
        if saved["start"] is not None:
            _rehearse(saved["start"]["random"], self.ordering, saved["start"]["generators"])
            _check_table(saved["start"], {"random", "generators", "seed", "sampler"})
        _check_table(saved["ways"], set(self.ways))
        if not all(isinstance(way, bool) for way in (saved["lazy"], *saved["ways"].values())):
            raise ValueError("its ways are not those of a loader")
        seeded_by = saved.get("seeded_by", "index")  # earlier versions did not say so
        if seeded_by not in ("index", "place"):
            raise ValueError(f"its items are seeded by {str(seeded_by)[:20]!r}; it must be 'place' or 'index'")
        for place in (saved, *([saved["start"]] if saved["start"] is not None else [])):
            if type(place["seed"]) not in (int, type(None)):
                raise ValueError("its seed is no whole number")
        if saved["sampler"] is not None:
            names = {"sampler", "track", "ahead", "drawn", "handed"}  # earlier versions did not save "ended"
            _check_table(saved["sampler"], names | ({"ended"} & saved["sampler"].keys()))
            if not self.stateful:
                raise ValueError("its sampler kept a state, and this one has none")
        _restore_each(generators, saved["generators"])
        self.ways, self.lazy, self.seed = dict(saved["ways"]), saved["lazy"], saved["seed"]
        self.start, self.saved, self.by_index = saved["start"], saved["sampler"], seeded_by == "index"
        if (
            self.stateful is not None and self.saved is not None
        ):  # where no epoch goes on, the next one begins from here
            self.stateful.load_state_dict(self.saved["sampler"])

    def where(self, epoch: int, position: int, n: int = 1) -> dict[str, list[Any]]:
        """As `Reader.where`, for the last 256 batches that were handed out."""
        known = {(of, at): index for of, at, index in self.recent}
        wanted = [(epoch, position + i) for i in range(n)]
        return {"indices": [known[key] for key in wanted]} if all(key in known for key in wanted) else {}


def _requested(
    seeds: Iterator[int], by_index: bool, lists: Iterator[Any], ahead: deque[Any]
) -> Iterator[tuple[int, bool, Any]]:
    """Yield what a private loader is asked for (see `Fetch`), and note each index list in `ahead`."""
    for index in lists:
        if isinstance(index, Iterator):  # a sampler's iterator can be read once, and `ahead` is saved
            index = list(index)
        ahead.append(index)
        yield next(seeds), by_index, index


class StatefulReader(Reader):
    """Reads a loader (torchdata's StatefulDataLoader) or an iterable dataset that can save where it is."""

    kind = "stateful"
    draws = True

    def __init__(self, data: Any, holder: Any):
        super().__init__(data)
        self.holder = holder
        self.generators = owned_generators(data, "data", SAMPLER_PARTS, set())
        # torch's loaders make a new iterator each epoch. Loading the state of a finished one would make two, and draw
        # twice: between epochs it is done only for what a part may keep in itself.
        parts = [getattr(data, name, None) for name in ("dataset", "sampler", "batch_sampler")]
        self.anew = isinstance(data, DataLoader) and not any(map(_saves, parts))
        self.start: dict[str, Any] | None = None
        self.handed = 0
        self.source: Iterator[Any] = iter(())
        self.saved: Any = None  # loaded, and not yet read on from
        self.at_end = False  # so it was saved: its dataset has ended, and may already have begun anew

    def epoch(self, epoch: int, position: int = 0, begun: bool = False) -> Iterator[Any]:
        """As `Reader.epoch`. Raises UsageError for any position but the one that was saved."""
        tell_epoch(self.data, epoch)
        saved, self.saved = self.saved, None
        if position == 0 and not begun:
            self.start = random_state()
            if saved is not None and not self.anew:
                self.holder.load_state_dict(saved)
            self.source = iter(self.data)
            if saved is not None and isinstance(self.data, DataLoader) and self.data.generator is None:
                restore_random_state(self.start)  # the same process would have drawn one seed, or none
                if not self.data.persistent_workers:
                    torch.empty((), dtype=torch.int64).random_()
        elif self.start is None or position != self.handed:
            raise self._no_way_on()
        elif self.at_end:
            self.source = iter(())
        else:
            with random_state_kept(self.start):  # what iter() itself draws was drawn when the epoch began
                own = {name: state_of(generator) for name, generator in self.generators.items()}
                self.holder.load_state_dict(self.holder.state_dict() if saved is None else saved)
                self.source = iter(self.data)
            if getattr(self.data, "num_workers", 0) == 0:  # else workers have asked ahead, and will ask again
                _restore_each(self.generators, own)
        self.at_end, self.handed = False, position
        return self._counted(self.source)

    def draw(self, take: Callable[..., list[Any]], stream: Iterator[Any]) -> list[Any]:
        """`take(stream)`, whole: a window half drawn could not be drawn again."""
        return take(stream)

    def finish(self) -> None:
        """As `Reader.finish`."""
        self.source = iter(())

    def _counted(self, source: Iterator[Any]) -> Iterator[Any]:
        for batch in source:
            self.handed += 1
            yield batch

    def state_dict(self) -> dict[str, Any]:
        """As `Reader.state_dict`; what the loader itself returns is under "data"."""
        with undisturbed():
            state = self.holder.state_dict() if self.saved is None else self.saved
        # torch notes the end of a dataset when it makes the last batch, if that is a short one.
        ended = self.at_end
        if self.holder is not self.data:
            ended = ended or bool(getattr(getattr(self.source, "_dataset_fetcher", None), "ended", False))
        own = {name: state_of(generator) for name, generator in self.generators.items()}
        place = {"start": self.start, "handed": self.handed, "ended": ended}
        return {"kind": self.kind, **place, "generators": own, "data": state}

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        """As `Reader.load_state_dict`."""
        if saved["kind"] == self.kind:
            if saved["start"] is not None:
                _rehearse(saved["start"], {}, {})
            self.start, self.handed = saved["start"], saved["handed"]
            self.saved, self.at_end, self.source = saved["data"], saved["ended"], iter(())
            _restore_each(self.generators, saved["generators"])


class DrawingReader(Reader):
    """Reads any other iterable: what was consumed is drawn again, under the random states of the epoch's start."""

    kind = "draw"
    draws = draws_always = True

    def __init__(self, data: Any):
        super().__init__(data)
        self.start: dict[str, Any] | None = None
        self.resumed = False  # from a state in which an epoch had begun, and not read since
        seen: set[int] = set()
        self.generators: dict[str, Any] = owned_generators(data, "data", SAMPLER_PARTS | DATA_PARTS, seen)

    def epoch(self, epoch: int, position: int = 0, begun: bool = False) -> Iterator[Any]:
        """As `Reader.epoch`; raises UsageError for an iterator that has been used."""
        if position == 0 and not begun:
            self.start = {
                "random": random_state(),
                "generators": {name: state_of(generator) for name, generator in self.generators.items()},
            }
            stream = batches(self.data, epoch)
            if self.resumed and isinstance(self.data, DataLoader) and self.data.persistent_workers:
                restore_random_state(self.start["random"])  # workers that live on draw no seed at their second epoch
            self.resumed = False
            return stream
        if isinstance(self.data, Iterator) or self.start is None:
            raise self._no_way_on()
        self._say(position)
        with random_state_kept(self.start["random"]):
            _restore_each(self.generators, self.start["generators"])
            stream = batches(self.data, epoch)
            for _ in islice(stream, position):
                pass
        return stream

    def _say(self, position: int) -> None:
        kind = type(getattr(self.data, "dataset", self.data)).__name__
        if self.notice is None:
            self.notice = (
                f"{kind} cannot seek: going on draws the epoch's first {position} batches again and drops them; "
                f"state_dict() and load_state_dict() on {kind} would save that time"
            )
            warnings.warn(self.notice, stacklevel=3)

    def state_dict(self) -> dict[str, Any]:
        """As `Reader.state_dict`."""
        generators = {name: state_of(generator) for name, generator in self.generators.items()}
        return {"kind": self.kind, "start": self.start, "generators": generators}

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        """As `Reader.load_state_dict`."""
        if saved["kind"] == self.kind:
            if saved["start"] is not None:
                _rehearse(saved["start"]["random"], self.generators, saved["start"]["generators"])
            self.start, self.resumed = saved["start"], saved["start"] is not None
            _restore_each(self.generators, saved["generators"])


def build_reader(data: Any) -> Reader:
    """The reader of any data: the first of the four ways that fits it."""
    if is_stream(data) or isinstance(data, list | tuple):
        return Reader(data)
    if _saves(data):
        return StatefulReader(data, data)
    if is_map_style(data):
        return LoaderReader(data)
    dataset = getattr(data, "dataset", None)
    if isinstance(data, DataLoader) and isinstance(dataset, IterableDataset) and data.num_workers == 0:
        return StatefulReader(data, dataset) if _saves(dataset) else DrawingReader(data)
    return DrawingReader(data)


def _saves(thing: Any) -> bool:
    """Whether `thing` can save and load its place."""
    both: list[Callable[..., Any] | None] = [getattr(thing, name, None) for name in ("state_dict", "load_state_dict")]
    return all(map(callable, both))


def _restore_each(generators: dict[str, Any], saved: dict[str, Any]) -> None:
    missing = sorted(saved.keys() - generators.keys())
    if missing:
        raise UsageError(
            f"the saved state has a random generator at {missing[0]}, which this data lacks: "
            "give the data that the training began with"
        )
    for name, state in saved.items():
        restore(generators[name], state)


def _check_table(value: Any, names: set[str]) -> None:
    if not isinstance(value, dict) or value.keys() != names:
        raise ValueError(f"it has no table of {', '.join(sorted(names))}")


def _rehearse(random: dict[str, Any], generators: dict[str, Any], states: dict[str, Any]) -> None:
    """Raise now, and leave every generator as it is, where a saved start could not be put back later."""
    present = {name: state_of(generator) for name, generator in generators.items()}
    with random_state_kept(random):
        try:
            for name, generator in generators.items():
                restore(generator, states[name])
        finally:
            for name, generator in generators.items():
                restore(generator, present[name])
