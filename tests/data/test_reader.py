"""Going on exactly: any data, mid-epoch, at its edge and between epochs, in new objects, with other workers."""

import copy
import os
import random
import subprocess
import sys
import textwrap
import time
from contextlib import nullcontext
from itertools import islice

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import (
    BatchSampler,
    ConcatDataset,
    DataLoader,
    Dataset,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    Sampler,
    Subset,
    SubsetRandomSampler,
    TensorDataset,
    WeightedRandomSampler,
    get_worker_info,
)

import fivestep as fs
from fivestep.data.generators import mixed, random_state, seed_host, undisturbed
from fivestep.data.reader import DrawingReader, LoaderReader, Reader, StatefulReader, build_reader
from tests.same import assert_same_bits

ROWS, BATCH, EPOCHS = 22, 4, 3
PER_EPOCH = 6  # the last batch is short


class Rows(Dataset):
    """Rows that note who asked for them (in this process), with random augmentation of a chosen kind."""

    def __init__(self, noise=None):
        generator = torch.Generator().manual_seed(0)
        self.features = torch.randn(ROWS, 3, generator=generator)
        self.noise, self.asked = noise, []
        self.own = np.random.default_rng(4)

    def __len__(self):
        return ROWS

    def __getitem__(self, index):
        self.asked.append(int(index))
        drawn = {
            None: lambda: 0.0,
            "python": random.random,
            "gauss": lambda: random.gauss(0, 1),
            "numpy": np.random.randn,  # which holds every second number back
            "torch": lambda: torch.rand(()).item(),
            "owned": lambda: self.own.random(),
            "sometimes": lambda: random.random() if index % 7 == 3 else 0.0,
        }[self.noise]()
        return self.features[index] + drawn, self.features[index].sum().view(1)


class AtOnce(Rows):
    def __getitems__(self, indices):
        shift = torch.rand(()) if self.noise else 0.0
        return [(self.features[i] + shift, self.features[i].sum().view(1)) for i in indices]


class Lazy(Sampler):
    """Draws each index when it is asked, from a walk that depends on all that it has drawn."""

    def __init__(self, draw):
        self.draw = draw

    def __len__(self):
        return ROWS

    def __iter__(self):
        at = 0
        for _ in range(ROWS):
            at = (at + self.draw()) % ROWS
            yield at


class Walk(Lazy):
    """The same with a generator of its own."""

    def __init__(self):
        self.rng = np.random.RandomState(6)
        super().__init__(lambda: self.rng.randint(ROWS))


class Hasty(Sampler):
    """A batch sampler that draws in `__iter__` itself, at once."""

    def __len__(self):
        return PER_EPOCH

    def __iter__(self):
        return iter(torch.split(torch.randperm(ROWS), BATCH))


class Saving(Sampler):
    """A sampler with a state, which draws lazily from the global generator and cannot be drawn again."""

    def __init__(self):
        self.at, self.left = 0, ROWS

    def __len__(self):
        return ROWS

    def __iter__(self):
        while self.left:
            self.left -= 1
            self.at = (self.at + random.randrange(ROWS)) % ROWS
            yield self.at
        self.left = ROWS

    def state_dict(self):
        return {"at": self.at, "left": self.left}

    def load_state_dict(self, saved):
        self.at, self.left = saved["at"], saved["left"]


class Wrapped(Sampler):
    """A sampler that hands on what another gives."""

    def __init__(self, base):
        self.base = base

    def __len__(self):
        return len(self.base)

    def __iter__(self):
        return iter(self.base)


def by_torch():
    return int(torch.randint(ROWS, ()))


SAMPLERS = {
    "in order": dict,
    "shuffled": lambda: {"shuffle": True},
    "own generator": lambda: {"shuffle": True, "generator": torch.Generator().manual_seed(5)},
    "dropping the last": lambda: {"shuffle": True, "generator": torch.Generator().manual_seed(5), "drop_last": True},
    "sampler's generator": lambda: {
        "sampler": RandomSampler(range(ROWS), replacement=True, generator=torch.Generator().manual_seed(5))
    },
    "sampler in a sampler": lambda: {
        "sampler": Wrapped(RandomSampler(range(ROWS), generator=torch.Generator().manual_seed(5)))
    },
    "subset": lambda: {"sampler": SubsetRandomSampler(range(ROWS))},
    "weighted": lambda: {"sampler": WeightedRandomSampler([1.0, 2.0] * (ROWS // 2), ROWS)},
    "lazy torch": lambda: {"sampler": Lazy(by_torch)},
    "lazy python": lambda: {"sampler": Lazy(lambda: random.randrange(ROWS))},
    "lazy numpy": lambda: {"sampler": Lazy(lambda: int(abs(np.random.randn()) * 9))},
    "lazy, own generator": lambda: {"sampler": Walk()},
    "own batches": lambda: {"batch_sampler": Hasty()},
    "own lazy batches": lambda: {"batch_sampler": BatchSampler(Lazy(by_torch), BATCH, drop_last=False)},
    "with a state": lambda: {"sampler": Saving()},
}


def loader(sampler="shuffled", noise=None, workers=0, kind=Rows, **options):
    chosen = SAMPLERS[sampler]()
    if "batch_sampler" not in chosen:
        chosen.setdefault("batch_size", BATCH)
    return DataLoader(kind(noise), num_workers=workers, **chosen, **options)


def start():
    random.seed(1)
    np.random.seed(2)
    torch.manual_seed(3)


def job():
    torch.manual_seed(8)
    model = nn.Sequential(nn.Linear(3, 8), nn.Dropout(0.5), nn.Linear(8, 1))
    return model, torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)


def trained(data, saved=None, epochs=EPOCHS):
    """Losses, snapshots after each step and after each epoch, and everything at the end; one call an epoch."""
    model, optimizer = job()
    state = fs.TrainStep(model, nn.MSELoss(), optimizer).state
    start()
    if saved is not None:
        for disturbed in (random, np.random):
            disturbed.seed(99)
        torch.manual_seed(99)
        state.load_state_dict(copy.deepcopy(saved))
    losses, steps, edges = [], [], []
    while state.clock.epoch < epochs:
        for result in fs.train(model, data, nn.MSELoss(), optimizer, epochs=state.clock.epoch + 1, state=state):
            losses.append(float(result.loss))
            if saved is None:
                steps.append(state.state_dict())
        edges.append(state.state_dict())
    return losses, steps, edges, model, str(random_state())


def assert_goes_on(make, other=None, at=(0, 5, 8)):
    """A run of `make()`'s data, and runs that go on from it in new objects (`other()`'s), are equal to the bit."""
    losses, steps, edges, model, states = trained(make())
    per_epoch = len(losses) // EPOCHS
    where = [(steps[i], i + 1) for i in at] + [(edges[i], (i + 1) * per_epoch) for i in (0, 1)]
    for saved, done in where:
        rest, *_, resumed, ends = trained((other or make)(), saved)
        assert rest == losses[done:], f"after step {done}, position {saved['position']}"
        assert_same_bits(resumed, model)
        assert ends == states, f"random states, after step {done}"
    return losses


def plain(data):
    model, optimizer = job()
    start()
    losses = []
    model.train()
    for _ in range(EPOCHS):
        for features, labels in data:
            optimizer.zero_grad()
            loss = nn.functional.mse_loss(model(features), labels)
            loss.backward()
            optimizer.step()
            losses.append(float(loss.detach()))
    return losses, str(random_state())


TWO = [pytest.mark.multiprocess]
EAGER = ["in order", "shuffled", "own generator", "sampler's generator", "subset", "weighted", "own batches"]


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_goes_on(sampler):
    assert_goes_on(lambda: loader(sampler))


@pytest.mark.parametrize(
    "noise, kind",
    [*((noise, Rows) for noise in ("python", "gauss", "numpy", "torch", "owned", "sometimes")), ("torch", AtOnce)],
)
def test_goes_on_with_augmentation(noise, kind):
    clean = trained(loader(kind=kind))[0]
    assert assert_goes_on(lambda: loader(noise=noise, kind=kind)) != clean


@pytest.mark.multiprocess
@pytest.mark.parametrize(
    "sampler, noise, persistent",
    [
        ("own generator", "numpy", True),
        ("lazy torch", "python", False),
        ("own batches", None, False),
        ("with a state", None, True),
    ],
)
def test_goes_on_with_workers(sampler, noise, persistent):
    """What workers have asked for ahead is not lost, and not drawn twice."""
    assert_goes_on(lambda: loader(sampler, noise, 2, persistent_workers=persistent), at=(2, 5))


class Stripes(IterableDataset):
    """Rows in order, each worker its own."""

    def __iter__(self):
        worker = get_worker_info()
        for i in range(worker.id, ROWS, worker.num_workers):
            yield Rows().features[i], Rows().features[i].sum(0, keepdim=True)


@pytest.mark.multiprocess
@pytest.mark.filterwarnings("ignore:Stripes cannot seek")
@pytest.mark.parametrize("persistent", [False, True])
def test_goes_on_with_an_iterable_dataset_in_workers(persistent):
    assert_goes_on(lambda: DataLoader(Stripes(), BATCH, num_workers=2, persistent_workers=persistent), at=(2, 5))


@pytest.mark.multiprocess
def test_the_number_of_workers_does_not_matter():
    """Neither from the start nor where a run goes on with another number of them."""

    def here(workers=0):
        return loader("lazy torch", "sometimes", workers)

    def away():
        return here(2)

    assert trained(here())[0] == trained(here(1))[0]
    assert_goes_on(here, away, at=(2,))
    assert_goes_on(away, here, at=(0, 5))
    assert_goes_on(lambda: loader(workers=2, persistent_workers=True), loader, at=(8,))
    assert_goes_on(lambda: loader("with a state", workers=2), lambda: loader("with a state"), at=(8,))


@pytest.mark.parametrize("sampler", [*EAGER, "dropping the last"])
def test_equal_to_a_plain_loop(sampler):
    """A deterministic dataset, with dropout drawing in between: losses, and what the generators are left at."""
    losses, _, _, _, states = trained(loader(sampler))
    assert (losses, states) == plain(loader(sampler))


def test_a_dataset_that_takes_lists():
    """batch_size=None: the sampler's lists are the dataset's keys."""

    def make():
        rows = TensorDataset(Rows().features, Rows().features.sum(1, keepdim=True))
        return DataLoader(rows, batch_size=None, sampler=BatchSampler(RandomSampler(rows), BATCH, drop_last=False))

    assert_goes_on(make)
    losses, _, _, _, states = trained(make())
    assert (losses, states) == plain(make())


@pytest.mark.multiprocess
@pytest.mark.parametrize("sampler, persistent", [("shuffled", True), ("own batches", False)])
def test_equal_to_a_plain_loop_with_workers(sampler, persistent):
    losses, _, _, _, states = trained(loader(sampler, workers=2, persistent_workers=persistent))
    assert (losses, states) == plain(loader(sampler, workers=2, persistent_workers=persistent))


@pytest.mark.parametrize("noise", [None, "python", "numpy", "torch"])
def test_fetching_moves_no_generator_here(noise):
    data = loader("in order", noise)
    reader = build_reader(data)
    batches = reader.epoch(0)
    next(batches)
    random.gauss(0, 1), np.random.randn()  # each holds a second number back
    before = str(random_state())
    for _ in batches:
        assert str(random_state()) == before
    again = build_reader(loader("in order", noise))
    whole = [features for features, _ in again.epoch(0)]
    assert len({tuple(row) for features in whole for row in (features - data.dataset.features[0])}) == ROWS


def test_augmentation_differs_between_epochs_and_seeds():
    """With persistent workers torch draws a seed once; each epoch must have other noise all the same."""
    seen = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        reader = build_reader(loader("in order", "torch"))
        reader.ways["seed_once"] = True
        seen += [torch.cat([features for features, _ in reader.epoch(epoch)]) for epoch in (0, 1)]
    assert all(not torch.equal(seen[i], seen[j]) for i in range(4) for j in range(i))


class Zeros(Rows):
    """Rows of zeros, so that a batch is what was drawn."""

    def __init__(self, noise="torch"):
        super().__init__(noise)
        self.features = torch.zeros(ROWS, 3)


class ZerosAtOnce(Zeros):
    def __getitems__(self, indices):
        return [(torch.rand(1), torch.zeros(1)) for _ in indices]


def noisy(items):
    return torch.rand(len(items), 1), torch.zeros(len(items))


ONE = [[3, 3, 3, 3], [3, 3, 5, 5], [5, 3, 3, 3]]  # batches of two indices
REPEATED = {
    "python": lambda **options: DataLoader(Zeros("python"), batch_sampler=ONE, **options),
    "numpy": lambda **options: DataLoader(Zeros("numpy"), batch_sampler=ONE, **options),
    "torch": lambda **options: DataLoader(Zeros("torch"), batch_sampler=ONE, **options),
    "at once": lambda **options: DataLoader(ZerosAtOnce(), batch_sampler=ONE, **options),
    "collate": lambda **options: DataLoader(Zeros(None), batch_sampler=ONE, collate_fn=noisy, **options),
    "single": lambda **options: DataLoader(Zeros("torch"), batch_size=None, sampler=[3] * 9, **options),
}


def drawn(data, epoch=0, position=0, saved=None):
    """The first number of every item."""
    start()
    reader = build_reader(data)
    if saved is not None:
        reader.load_state_dict(saved)
    features = [features.view(-1, features.shape[-1])[:, 0] for features, _ in reader.epoch(epoch, position)]
    return torch.cat(features).tolist(), reader


@pytest.mark.multiprocess
@pytest.mark.parametrize("name", REPEATED)
def test_an_item_that_is_drawn_twice_is_augmented_anew(name):
    first, reader = drawn(REPEATED[name]())
    assert len(first) == len(set(first)) == len(set(map(abs, first))) > 8
    assert drawn(REPEATED[name](num_workers=2, persistent_workers=True))[0] == first
    saved = copy.deepcopy(reader.state_dict())
    assert drawn(REPEATED[name](), position=2, saved=saved)[0] == first[-len(drawn_after(first, name)) :]
    other = drawn(REPEATED[name](), epoch=1)[0]
    assert not set(first) & set(other)


def drawn_after(first, name):
    """What two batches leave of them."""
    return first[2:] if name == "single" else first[8:]


@pytest.mark.parametrize("noise", ["sometimes", "torch"])
def test_each_item_is_fetched_once(noise):
    data = loader(noise=noise)
    trained(data)
    assert sorted(data.dataset.asked) == sorted([*range(ROWS)] * EPOCHS)


def test_ranks_that_read_their_own_items_draw_their_own_numbers():
    def of_rank(rank):
        sampler = DistributedSampler(range(ROWS), 2, rank, shuffle=False)
        return drawn(DataLoader(Zeros(), batch_size=BATCH, sampler=sampler))[0]

    assert not set(of_rank(0)) & set(of_rank(1))


def test_neighbouring_batches_and_epochs_draw_unrelated_numbers():
    data = DataLoader(Zeros(), batch_size=None, sampler=[0] * 2000)
    first, second = (torch.tensor(drawn(data, epoch)[0]) for epoch in (0, 1))
    assert abs(first.mean() - 0.5) < 0.04
    for left, right in ((first[1:], first[:-1]), (first, second)):
        assert abs(torch.corrcoef(torch.stack([left, right]))[0, 1]) < 0.1


@pytest.mark.parametrize("kind", [Zeros, ZerosAtOnce])
def test_an_epoch_that_an_earlier_version_began_keeps_its_rule(kind):
    """There each item was seeded by its index, a dataset with `__getitems__` by the batch's first."""

    def make():
        return DataLoader(kind(), batch_size=BATCH, shuffle=True)

    start()
    reader = build_reader(make())
    list(islice(reader.epoch(0), 2))
    saved = copy.deepcopy(reader.state_dict())
    assert saved.pop("seeded_by") == "place"
    new = build_reader(make())
    new.load_state_dict(copy.deepcopy(saved))
    for features, _ in new.epoch(0, 2):
        (asked,) = new.where(0, new.handed - 1)["indices"]
        seeds = asked if kind is Zeros else asked[:1]
        with undisturbed():
            expected = []
            for index in seeds:
                seed_host(mixed(mixed(new.seed, 0), index))
                expected.append(torch.rand(1 if kind is Zeros else len(asked)))
        assert torch.equal(features[:, 0], torch.cat(expected))
        assert new.state_dict()["seeded_by"] == "index"
    list(new.epoch(1))
    assert new.state_dict()["seeded_by"] == "place"
    with pytest.raises(ValueError, match="must be 'place' or 'index'"):
        new.load_state_dict({**saved, "seeded_by": "moon"})


def test_nothing_is_read_twice():
    data = loader()
    *_, steps, _, _, _ = trained(data)
    assert sorted(data.dataset.asked) == sorted([*range(ROWS)] * EPOCHS)
    fresh = loader()
    trained(fresh, steps[3], epochs=1)
    assert len(fresh.dataset.asked) == ROWS - 4 * BATCH
    assert fresh.dataset.asked == data.dataset.asked[4 * BATCH : ROWS]


class Counting(Rows):
    """Notes in shared memory what was asked, by any process."""

    def __init__(self, noise=None):
        super().__init__(noise)
        self.count = torch.zeros(ROWS).share_memory_()

    def __getitem__(self, index):
        self.count[index] += 1
        return super().__getitem__(index)


@pytest.mark.multiprocess
def test_nothing_is_read_twice_by_workers():
    data = loader(workers=2, kind=Counting)
    _, steps, _, _, _ = trained(data, epochs=1)
    assert data.dataset.count.tolist() == [1.0] * ROWS
    fresh = loader(workers=2, kind=Counting)
    trained(fresh, steps[3], epochs=1)
    assert fresh.dataset.count.sum() == ROWS - 4 * BATCH


class Told(Rows):
    """Rows that say what the worker's start has found and set."""

    tag = 0.0

    def __getitem__(self, index):
        return torch.tensor([self.tag, float(get_worker_info().dataset is self), 0.0]), torch.zeros(1)


def tag(worker):
    get_worker_info().dataset.tag = 7.0


@pytest.mark.multiprocess
def test_a_workers_start_finds_the_users_dataset():
    data = loader(workers=2, kind=Told, worker_init_fn=tag)
    for features, _ in build_reader(data).epoch(0):
        assert (features[:, 0] == 7.0).all() and (features[:, 1] == 1.0).all()


@pytest.mark.multiprocess
@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
def test_a_worker_whose_parent_was_killed_while_it_started_ends():
    script = """
        import os, time
        from fivestep.data.loading import WorkerStart

        if os.fork() == 0:
            middle, start = os.getpid(), WorkerStart(lambda worker: None)
            if os.fork() == 0:
                while os.getppid() == middle:
                    time.sleep(0.01)
                try:
                    start(0)
                finally:
                    print("alive", flush=True)
            os._exit(0)
        os.wait()
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)], capture_output=True, text=True, timeout=120
    )
    assert (done.returncode, done.stdout) == (0, ""), done.stderr


@pytest.mark.multiprocess
def test_persistent_workers_survive_epochs():
    data = loader(workers=2, persistent_workers=True, kind=Told, worker_init_fn=tag)
    model, optimizer = job()
    state = fs.TrainStep(model, nn.MSELoss(), optimizer).state
    workers = []
    for epoch in (0, 1):
        list(state.reading(data).epoch(epoch))
        workers.append([worker.pid for worker in state.reader.private._iterator._workers])
    assert workers[0] == workers[1]


def test_a_failed_window_is_drawn_again():
    """A batch that was handed out and never counted comes again, of a sampler with a state too."""
    for sampler in ("shuffled", "lazy torch", "with a state"):
        start()
        reader = build_reader(loader(sampler))
        whole = [features for features, _ in islice(reader.epoch(0), 4)]
        new = build_reader(loader(sampler))
        new.load_state_dict(copy.deepcopy(reader.state_dict()))
        rest = [features for features, _ in new.epoch(0, 2)]
        assert torch.equal(rest[0], whole[2]) and torch.equal(rest[1], whole[3]) and len(rest) == PER_EPOCH - 2


def test_where():
    data = loader("own generator")
    reader = build_reader(data)
    handed = [features for features, _ in islice(reader.epoch(0), 4)]
    named = reader.where(0, 1, 2)["indices"]
    assert torch.equal(data.dataset.features[named[0]], handed[1])
    assert torch.equal(data.dataset.features[named[1]], handed[2])
    assert reader.where(0, 4) == {} and reader.where(1, 0) == {}
    from fivestep.data.examples import Examples

    stream = Examples(torch.arange(10.0)[:, None], torch.arange(10), batch_size=4)
    offsets = build_reader(stream).where(2, 1)["offsets"]
    assert [labels.tolist() for _, labels in islice(stream.epoch(2, 1), 1)] == offsets
    assert build_reader([1, 2]).where(0, 0) == {}


def test_the_way_is_chosen():
    assert type(build_reader(Unsized())) is StatefulReader, "nobody's length is asked for"
    assert type(build_reader([1])) is Reader
    assert type(build_reader(loader())) is LoaderReader
    assert type(build_reader(Protocol())) is StatefulReader
    assert type(build_reader(DataLoader(Shards(), batch_size=2))) is StatefulReader
    assert type(build_reader(DataLoader(Shards(), batch_size=2, num_workers=1))) is DrawingReader
    assert type(build_reader(iter([1]))) is DrawingReader

    class Own(DataLoader):
        def __iter__(self):
            return super().__iter__()

    assert type(build_reader(Own(Rows()))) is DrawingReader


def test_tensors_are_known_to_draw_nothing():
    tensors = TensorDataset(torch.arange(9.0))
    known = ConcatDataset([Subset(tensors, [1, 2]), tensors])
    assert build_reader(DataLoader(known)).private.dataset.quiet
    assert not build_reader(DataLoader(known, collate_fn=list)).private.dataset.quiet
    assert not build_reader(DataLoader(ConcatDataset([known, Rows()]))).private.dataset.quiet


def masked(items):
    features, labels = zip(*items, strict=True)
    return torch.stack(features) * (torch.rand(len(items), 3) > 0.3), torch.stack(labels)


def test_a_collate_function_may_draw():
    assert_goes_on(lambda: loader(collate_fn=masked))


# --- loaders and datasets that save where they are ---


class Protocol:
    """A loader with the protocol of torchdata's StatefulDataLoader: ends, and begins anew, as it does."""

    def __init__(self):
        self.rows, self.at, self.order, self.asked = Rows(), 0, None, 0

    def __len__(self):
        return PER_EPOCH

    def __iter__(self):
        if self.order is None:
            self.order = torch.randperm(ROWS)
        while self.at < PER_EPOCH:
            chosen = self.order[self.at * BATCH : (self.at + 1) * BATCH]
            self.at, self.asked = self.at + 1, self.asked + 1
            yield self.rows.features[chosen], self.rows.features[chosen].sum(1, keepdim=True)
        self.at, self.order = 0, None

    def state_dict(self):
        return {"at": self.at, "order": self.order}

    def load_state_dict(self, saved):
        self.at, self.order = saved["at"], saved["order"]


class Unsized(Protocol):
    def __len__(self):
        raise TypeError("not known")


class Shards(IterableDataset):
    def __init__(self):
        self.at = 0

    def __iter__(self):
        rows = Rows().features
        while self.at < ROWS:
            row = rows[self.at]
            self.at += 1
            yield row, row.sum().view(1)
        self.at = 0

    def state_dict(self):
        return {"at": self.at}

    def load_state_dict(self, saved):
        self.at = saved["at"]


def test_what_saves_its_place():
    assert_goes_on(Protocol)
    assert_goes_on(lambda: DataLoader(Shards(), batch_size=BATCH))
    saved = trained(Protocol(), epochs=1)[1][3]
    data = Protocol()
    trained(data, saved, epochs=1)
    assert data.asked == PER_EPOCH - 4


def test_a_limit_at_the_epochs_end_ends_the_loaders_epoch_too():
    """What draws or resets beyond the last batch does so although the limit was reached at that batch."""
    for make in (lambda: loader("dropping the last"), Protocol, lambda: loader("with a state")):
        model, optimizer = job()
        start()
        data, losses, state = make(), [], None
        for limit in (len(data), 2 * len(data), 3 * len(data)):
            for result in fs.train(model, data, nn.MSELoss(), optimizer, max_iters=limit, state=state):
                losses.append(float(result.loss))
            state = result.state
        assert losses == trained(make())[0]


class Longer(Shards):
    """Says that it is shorter than it is."""

    def __len__(self):
        return 2 * BATCH


class LongerOrder(Lazy):
    """A sampler that says so."""

    def __len__(self):
        return 2 * BATCH


class LongerSaving(Saving):
    def __len__(self):
        return 2 * BATCH


class LongerAnything(IterableDataset):
    """Draws as it goes, and says so."""

    def __len__(self):
        return 2 * BATCH

    def __iter__(self):
        for _ in range(ROWS):
            yield torch.randn(3), torch.randn(1)


class Shorter(LongerAnything):
    def __len__(self):
        return 2 * ROWS


UNTRUE = {
    "with a state": lambda: DataLoader(Longer(), batch_size=BATCH),
    "sampler": lambda: DataLoader(Rows(), batch_size=BATCH, sampler=LongerOrder(by_torch)),
    "sampler with a state": lambda: DataLoader(Rows("torch"), batch_size=BATCH, sampler=LongerSaving()),
    "drawn": lambda: DataLoader(LongerAnything(), batch_size=BATCH),
    "shorter": lambda: DataLoader(Shorter(), batch_size=BATCH),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", UNTRUE)
@pytest.mark.parametrize("anew", [True, False])
def test_an_epoch_ends_where_its_data_ends(name, anew):
    """Stopped at every step, where len(data) says that the epoch ends too, and gone on with: as never stopped."""
    losses, _, _, model, states = trained(UNTRUE[name]())
    per_epoch = len(losses) // EPOCHS
    assert per_epoch == PER_EPOCH != len(UNTRUE[name]())
    for stop in (1, 2, 3, PER_EPOCH, PER_EPOCH + 2):
        first, optimizer = job()
        data = UNTRUE[name]()
        start()
        *_, result = fs.train(first, data, nn.MSELoss(), optimizer, max_iters=stop)
        if anew:
            rest, *_, first, ends = trained(UNTRUE[name](), result.state.state_dict())
            assert rest == losses[stop:]
        else:
            for _ in fs.train(first, data, nn.MSELoss(), optimizer, epochs=EPOCHS, state=result.state):
                pass
            ends = str(random_state())
        assert_same_bits(first, model)
        assert ends == states


@pytest.mark.multiprocess
def test_a_sampler_that_gives_less_than_it_says_is_not_begun_anew():
    """Workers have asked it beyond its end, where it has reset itself."""

    class Fewer(Saving):
        def __len__(self):
            return 3 * ROWS

    def make():
        return DataLoader(Rows(), batch_size=BATCH, sampler=Fewer(), num_workers=2)

    assert_goes_on(make, at=(3, 5))


# --- anything else ---


class Anything:
    """Draws as it goes, and has a generator of its own."""

    def __init__(self):
        self.generator = torch.Generator().manual_seed(3)

    def __len__(self):
        return PER_EPOCH

    def __iter__(self):
        for _ in range(PER_EPOCH):
            yield torch.randn(BATCH, 3, generator=self.generator), torch.randn(BATCH, 1)


def test_anything_is_drawn_again_and_says_so_once():
    losses, steps, edges, model, states = trained(Anything())
    for saved, done in ((steps[2], 3), (steps[5], 6), (edges[0], 6), (steps[8], 9)):
        with pytest.warns(UserWarning, match="Anything.*batches again") if saved["position"] else nullcontext():
            rest, *_, resumed, ends = trained(Anything(), saved)
        assert rest == losses[done:]
        assert_same_bits(resumed, model)
        assert ends == states


# --- what is refused ---


def test_other_data_is_refused_within_an_epoch():
    saved = trained(loader("own generator"))[1][2]
    with pytest.raises(fs.UsageError, match="generator at generator, which this data lacks"):
        trained(loader(), saved)
    with pytest.raises(fs.UsageError, match="cannot go on within an epoch"):
        trained(Protocol(), saved)
    small = DataLoader(Subset(Rows(), range(4)), batch_size=4, shuffle=True)
    with pytest.raises(fs.UsageError, match="after batch 3 of the epoch.*only 1"):
        trained(small, trained(DataLoader(Subset(Rows(), range(ROWS)), batch_size=4, shuffle=True))[1][2])


def test_other_data_may_follow_between_epochs():
    """A loader's own generator is not handed on to the next loader; within an epoch, equal data goes on."""
    model, optimizer = job()
    start()
    *_, result = fs.train(model, loader("own generator"), nn.MSELoss(), optimizer, epochs=1)
    data = loader("own generator")
    state = result.state
    *_, result = fs.train(model, data, nn.MSELoss(), optimizer, max_iters=PER_EPOCH + 2, state=state)
    assert data.dataset.asked == build_order()[: 2 * BATCH]
    again = loader("own generator")
    *_, result = fs.train(model, again, nn.MSELoss(), optimizer, epochs=2, state=state)
    assert again.dataset.asked == build_order()[2 * BATCH :]


def build_order():
    data = loader("own generator")
    list(data)
    return data.dataset.asked


def test_leaves_are_plain():
    for make in (lambda: loader("lazy, own generator", "owned"), lambda: loader("with a state"), Anything):
        saved = trained(make(), epochs=1)[1][2]["data"]
        stack = [saved]
        while stack:
            leaf = stack.pop()
            if isinstance(leaf, dict):
                assert all(isinstance(key, str) for key in leaf)
                stack += leaf.values()
            elif isinstance(leaf, list):
                stack += leaf
            else:
                assert isinstance(leaf, torch.Tensor | int | float | str | bytes | None), type(leaf)


def test_a_large_epoch_goes_on_quickly():
    """A million samples at 90 %: the lists are drawn again, not the items."""
    data = DataLoader(TensorDataset(torch.arange(1_000_000)), batch_size=32, shuffle=True)
    reader = build_reader(data)
    first = time.process_time()
    next(reader.epoch(0))
    first = time.process_time() - first
    new = build_reader(data)
    new.load_state_dict(reader.state_dict())
    again = time.process_time()
    next(new.epoch(0, 28_000))
    assert time.process_time() - again < first + 1.0
