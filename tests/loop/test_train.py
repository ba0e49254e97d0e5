"""The generator and fit: any data, one-shot iterators, empty loaders, arguments refused at once."""

from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

import fivestep as fs
from fivestep.models.mlp import MLP


def job():
    model = MLP([3, 1])
    return model, torch.optim.SGD(model.parameters(), lr=0.1)


def batches(n=3):
    return [(torch.randn(4, 3), torch.randn(4, 1)) for _ in range(n)]


class Endless(IterableDataset):
    def __iter__(self):
        while True:
            yield torch.randn(3), torch.randn(1)


@pytest.mark.parametrize(
    "data, steps",
    [
        (batches(3), 6),
        (tuple(batches(2)), 4),
        (DataLoader(TensorDataset(torch.randn(10, 3), torch.randn(10, 1)), batch_size=4), 6),
        (DataLoader(TensorDataset(torch.randn(10, 3), torch.randn(10, 1)), batch_size=4, drop_last=True), 4),
    ],
)
def test_any_data(data, steps):
    model, optimizer = job()
    assert [r.step for r in fs.train(model, data, nn.MSELoss(), optimizer, epochs=2)] == list(range(1, steps + 1))


def test_an_endless_loader():
    model, optimizer = job()
    history = fs.fit(
        model, DataLoader(Endless(), batch_size=4), nn.MSELoss(), optimizer, max_iters=7, progress=False, eval_every=3
    )
    assert [row["step"] for row in history] == [3, 6, 7]


def test_nothing_is_drawn_ahead():
    drawn = []

    def watched():
        for i, item in enumerate(batches(5)):
            drawn.append(i)
            yield item

    model, optimizer = job()
    for result in fs.train(model, watched(), nn.MSELoss(), optimizer, max_iters=4, accumulate=1):
        assert len(drawn) == result.step
    assert len(drawn) == 4


@pytest.mark.parametrize("empty", [[], DataLoader([], batch_size=4), iter(())])
def test_empty_data(empty):
    model, optimizer = job()
    with pytest.raises(fs.UsageError, match="gave no batch"):
        fs.fit(model, empty, nn.MSELoss(), optimizer, epochs=1, progress=False)
    with pytest.raises(fs.UsageError, match="gave no batch"):
        fs.evaluate(model, empty, nn.MSELoss())


def test_a_loader_shorter_than_one_batch():
    model, optimizer = job()
    loader = DataLoader(TensorDataset(torch.randn(3, 3), torch.randn(3, 1)), batch_size=4, drop_last=True)
    with pytest.raises(fs.UsageError, match="drop_last"):
        fs.fit(model, loader, nn.MSELoss(), optimizer, epochs=1, progress=False)


def test_a_used_up_iterator_is_named():
    model, optimizer = job()
    with pytest.raises(fs.UsageError, match="epoch 2.*only once"):
        fs.fit(model, iter(batches(2)), nn.MSELoss(), optimizer, epochs=2, progress=False)


def test_arguments_are_refused_at_the_call():
    """Not at the first next(): the caller sees the line that was wrong."""
    model, optimizer = job()
    for wrong, match in (
        ({"accumulate": 0}, "accumulate = 0.*--accumulate"),
        ({"accumulate": 1.5}, "accumulate = 1.5"),
        ({"max_iters": -1}, "max_iters = -1"),
        ({"epochs": 2.5}, "epochs = 2.5"),
        ({"until": "soon"}, "until"),
        ({"scheduler_every": "x"}, "scheduler_every"),
    ):
        with pytest.raises(fs.UsageError, match=match):
            fs.train(model, batches(), nn.MSELoss(), optimizer, **wrong)
    with pytest.raises(fs.UsageError, match="say how long"):
        fs.fit(model, batches(), nn.MSELoss(), optimizer, progress=False)


def test_data_that_cannot_be_iterated():
    model, optimizer = job()
    with pytest.raises(fs.UsageError, match="iterable of batches.*got int"):
        fs.fit(model, 7, nn.MSELoss(), optimizer, epochs=1, progress=False)


def test_a_distributed_sampler_is_told_the_epoch():
    dataset = TensorDataset(torch.arange(12.0).view(12, 1).repeat(1, 3), torch.zeros(12, 1))
    sampler = torch.utils.data.DistributedSampler(dataset, num_replicas=1, rank=0, shuffle=True)
    orders = []

    class Seeing(nn.Linear):
        def forward(self, features):
            orders.append(features[:, 0].tolist())
            return super().forward(features)

    model = Seeing(3, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    loader = DataLoader(dataset, batch_size=12, sampler=sampler)
    fs.fit(model, loader, nn.MSELoss(), optimizer, epochs=3, progress=False)
    assert orders[0] != orders[1] != orders[2]
    assert all(sorted(order) == sorted(orders[0]) for order in orders)


def test_rows_of_fit():
    model, optimizer = job()
    history = fs.fit(model, batches(3), nn.MSELoss(), optimizer, epochs=2, val=batches(2), progress=False)
    assert [(row["split"], row["step"], row["epoch"]) for row in history] == [
        ("train", 3, 1),
        ("val", 3, 1),
        ("train", 6, 2),
        ("val", 6, 2),
    ]
    train, val = history[:2]
    assert train.keys() == {
        *("step", "epoch", "split", "loss", "steps", "lr", "grad_norm"),
        *("samples", "samples_per_second", "waiting_share", "elapsed_seconds"),
    }
    assert val.keys() == {"step", "epoch", "split", "loss", "count", "elapsed_seconds"}


def test_log_rows_cover_every_step_once():
    model, optimizer = job()
    history = fs.fit(
        model, batches(10), nn.MSELoss(), optimizer, max_iters=25, log_every=4, eval_every=None, progress=False
    )
    assert [(row["step"], row["steps"]) for row in history] == [
        (4, 4),
        (8, 4),
        (12, 4),
        (16, 4),
        (20, 4),
        (24, 4),
        (25, 1),
    ]


def test_carry_starts_anew_each_epoch():
    seen = []

    class Carrying:
        def count(self, batch):
            return 1

        def loss(self, model, batch, carry):
            seen.append(carry)
            return model(batch[0]).pow(2).mean(), (carry or 0) + 1

    model, optimizer = job()
    for _ in fs.train(model, batches(3), Carrying(), optimizer, epochs=2):
        pass
    assert seen == [None, 1, 2, None, 1, 2]


@pytest.mark.parametrize(
    ("watchers", "sentence"),
    [
        (["a text"], "a watcher is 'a text'"),
        ("a text", "watchers is 'a text'"),
        (3, "watchers is 3"),
        ([print, None], "a watcher is None"),
        ([dict], "a watcher is the class dict"),
        ([lambda row: None], "cannot be called"),
    ],
)
def test_watchers_that_cannot_be_called_are_refused_before_the_first_step(watchers, sentence):
    model = nn.Linear(3, 1)
    made = []
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    optimizer.register_step_post_hook(lambda *_: made.append(1))
    data = [(torch.ones(2, 3), torch.ones(2, 1))]
    with pytest.raises(fs.UsageError, match=sentence):
        fs.fit(model, data, nn.MSELoss(), optimizer, epochs=1, progress=False, watchers=watchers)
    assert not made


def test_one_watcher_needs_no_list():
    model, seen = nn.Linear(3, 1), []
    data = [(torch.ones(2, 3), torch.ones(2, 1))]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    watcher = lambda result, rows: seen.append(result.step)  # noqa: E731
    fs.fit(model, data, nn.MSELoss(), optimizer, epochs=2, progress=False, watchers=watcher)
    assert 1 in seen and 2 in seen


EMPTY = [None, [], (), {}, (torch.empty(0, 3), torch.empty(0, 1))]


def with_empty(n=6, seed=0):
    """Batches, and the same with an empty one of some kind at the places 0, 3, 4 and 7, and at the end."""
    generator = torch.Generator().manual_seed(seed)
    filled = [(torch.randn(4, 3, generator=generator), torch.randn(4, 1, generator=generator)) for _ in range(n)]
    mixed = list(filled)
    for place, empty in zip((0, 3, 4, 7, len(filled) + 4), EMPTY, strict=True):
        mixed.insert(place, empty)
    return filled, mixed


class Dropping(nn.Module):
    """A model whose steps draw."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(3)
        self.layers = nn.Sequential(nn.Linear(3, 8), nn.Dropout(0.5), nn.Linear(8, 1))

    def forward(self, x):
        return self.layers(x)


def kept(items):
    """A collate_fn that leaves out bad items, and may be left with nothing."""
    good = [item for item in items if item is not None]
    return (torch.stack([x for x, _ in good]), torch.stack([y for _, y in good])) if good else None


class Seeking(IterableDataset):
    """A dataset that saves its place."""

    def __init__(self, items):
        self.items, self.place = items, 0

    def __iter__(self):
        while self.place < len(self.items):
            self.place += 1
            yield self.items[self.place - 1]
        self.place = 0

    def state_dict(self):
        return {"place": self.place}

    def load_state_dict(self, saved):
        self.place = saved["place"]


ITEMS = [None if 4 <= i < 9 or i in (1, 14, 15) else (torch.full((3,), i / 8), torch.ones(1)) for i in range(16)]
SOURCES = {
    "list": lambda: with_empty()[1],
    "loader": lambda: DataLoader(ITEMS, 2, shuffle=True, collate_fn=kept),
    "workers": lambda: DataLoader(ITEMS, 2, collate_fn=kept, num_workers=1),
    "seeking": lambda: DataLoader(Seeking(ITEMS), 2, collate_fn=kept),
    "drawn again": lambda: DataLoader(Plain(ITEMS), 2, collate_fn=kept),
}


class Plain(IterableDataset):
    """A dataset that cannot save its place."""

    def __init__(self, items):
        self.items = items

    def __iter__(self):
        return iter(self.items)


def test_empty_batches_are_left_out():
    filled, mixed = with_empty()
    weights = []
    for data in (filled, mixed):
        model = MLP([3, 1])
        torch.manual_seed(0)
        model.apply(lambda m: m.reset_parameters() if isinstance(m, nn.Linear) else None)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        rows = fs.fit(model, data, nn.MSELoss(), optimizer, epochs=2, progress=False, val=data)
        weights.append((model, [(r["step"], r["loss"], r.get("count")) for r in rows]))
    (one, its), (other, others) = weights
    assert all(map(torch.equal, one.parameters(), other.parameters()))
    assert its == others and its[-1][0] == 12


def test_an_empty_batch_is_no_part_of_its_window():
    """Windows of the positions 0 to 2, 3 to 5, ...: an empty batch does not move the others into other windows."""
    _, mixed = with_empty()
    model, optimizer = job()
    counts = [int(result.count) for result in fs.train(model, mixed, nn.MSELoss(), optimizer, epochs=1, accumulate=3)]
    assert counts == [8, 4, 8, 4]


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.filterwarnings("ignore:.*cannot seek")
def test_a_resume_counts_the_empty_batches(source, accumulate):
    def training(steps, saved=None):
        model = Dropping()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        step = fs.TrainStep(model, nn.MSELoss(), optimizer)
        torch.manual_seed(7)
        if saved is not None:
            step.state.load_state_dict(saved)
        options = {"accumulate": accumulate, "state": step.state, "max_iters": steps}
        for _ in fs.train(model, SOURCES[source](), nn.MSELoss(), optimizer, **options):
            pass
        return model, step.state

    whole, last = training(7)
    for steps in range(1, 7):
        saved = training(steps)[1].state_dict()
        again, state = training(7, saved)
        assert (state.clock, state.position) == (replace(last.clock, **seconds(state)), last.position)
        assert all(map(torch.equal, whole.parameters(), again.parameters())), f"resumed after step {steps}"


def seconds(state):
    return {"seconds": state.clock.seconds, "waiting": state.clock.waiting}


def test_an_epoch_of_empty_batches_is_named():
    model, optimizer = job()
    with pytest.raises(fs.UsageError, match="all batches of epoch 1 are empty \\(5 in all"):
        fs.fit(model, EMPTY, nn.MSELoss(), optimizer, max_iters=3, progress=False)
    with pytest.raises(fs.UsageError, match="gave no batch"):
        fs.evaluate(model, EMPTY, nn.MSELoss())


def test_what_is_not_finite_is_named_by_its_place_among_empty_batches():
    model, optimizer = job()
    data = [*batches(2), None, (torch.full((4, 3), torch.nan), torch.zeros(4, 1)), None]
    with pytest.raises(fs.NonFiniteError, match="batch 3 itself holds NaN"):
        fs.fit(model, data, nn.MSELoss(), optimizer, epochs=1, accumulate=5, progress=False)
    rows = fs.fit(model, data, nn.MSELoss(), optimizer, epochs=1, progress=False, on_nonfinite="skip")
    assert rows[-1]["step"] == 2


class Normed(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Conv1d(1, 2, 3), nn.BatchNorm1d(2), nn.Flatten(), nn.Linear(2, 1))

    def forward(self, x):
        return self.layers(x[:, None])


@pytest.mark.parametrize(
    "model", [Normed, lambda: nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2), nn.Linear(2, 1))]
)
def test_a_batch_norm_over_one_row_is_named_with_its_batch(model):
    data = [*batches(2), (torch.randn(1, 3), torch.randn(1, 1))]
    for accumulate, place in ((1, "^batch 2 of epoch 1"), (2, "^batch 2 of epoch 1")):
        five = model()
        optimizer = torch.optim.SGD(five.parameters(), lr=0.1)
        with pytest.raises(fs.UsageError, match=f"{place} has 1 row and batch norm.*drop_last=True"):
            fs.fit(five, data, nn.MSELoss(), optimizer, epochs=1, accumulate=accumulate, progress=False)
    assert fs.evaluate(five, data, nn.MSELoss())["count"] == 9


def test_a_batch_norm_without_running_statistics_is_named_in_evaluation():
    model = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2, track_running_stats=False), nn.Linear(2, 1))
    with pytest.raises(fs.UsageError, match="^an evaluation batch has 1 row"):
        fs.evaluate(model, [*batches(1), (torch.randn(1, 3), torch.randn(1, 1))], nn.MSELoss())


def test_a_batch_of_more_rows_is_not_said_to_have_one():
    class Pooled(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = nn.BatchNorm1d(3, track_running_stats=False)

        def forward(self, x):
            return self.norm(x.mean(0, keepdim=True))[:, :1].expand(len(x), 1)

    model = Pooled()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(ValueError, match="^Expected more than 1 value per channel"):
        fs.fit(model, batches(2), nn.MSELoss(), optimizer, epochs=1, progress=False)
    with pytest.raises(ValueError, match="^Expected more than 1 value per channel"):
        fs.evaluate(model, batches(2), nn.MSELoss())


@pytest.mark.parametrize("options", [{}, {"accumulate": 3, "on_nonfinite": "skip"}, {"graph": True}])
def test_one_row_of_an_objectives_own_batches_is_named_by_its_place_among_empty_ones(options):
    class Own:
        def count(self, batch):
            return len(batch["x"])

        def loss(self, model, batch, carry):
            return model(batch["x"]).square().mean(), carry

    model = nn.Sequential(nn.Linear(3, 2), nn.GroupNorm(2, 2))
    data = [{"x": torch.ones(2, 3)}, None, {"x": torch.ones(1, 3)}, {"x": torch.ones(2, 3)}]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(fs.UsageError, match="^batch 2 of epoch 1 has 1 row"):
        fs.fit(model, data, Own(), optimizer, epochs=1, progress=False, **options)


def test_another_value_error_stays_the_models_own():
    model, optimizer = job()
    model.forward = lambda x: (_ for _ in ()).throw(ValueError("planted"))
    with pytest.raises(ValueError, match="^planted$"):
        fs.fit(model, batches(), nn.MSELoss(), optimizer, epochs=1, progress=False)


class Rows(torch.utils.data.Dataset):
    """Items without an end, as many a Dataset has them: __len__ says how many there are."""

    def __len__(self):
        return 8

    def __getitem__(self, i):
        return torch.randn(3), torch.randn(1)


TENSORS = TensorDataset(torch.randn(8, 3), torch.randn(8, 1))


@pytest.mark.parametrize("data", [TENSORS, torch.utils.data.Subset(TENSORS, [0, 1]), Rows()])
def test_a_bare_dataset_is_refused_before_the_first_step(data):
    model, optimizer = job()
    before = [p.clone() for p in model.parameters()]
    for train, val in ((data, None), (batches(), data)):
        with pytest.raises(fs.UsageError, match="each item would be a batch.*DataLoader"):
            fs.fit(model, train, nn.MSELoss(), optimizer, epochs=1, val=val, progress=False)
    with pytest.raises(fs.UsageError, match="each item would be a batch"):
        fs.evaluate(model, data, nn.MSELoss())
    with pytest.raises(fs.UsageError, match="each item would be a batch"):
        fs.train(model, data, nn.MSELoss(), optimizer, epochs=1)  # at the call
    assert all(map(torch.equal, before, model.parameters()))


def test_a_bare_dataset_that_saves_its_place_is_refused_too():
    class Saving(Rows):
        def state_dict(self):
            return {}

        def load_state_dict(self, state):
            pass

    model, optimizer = job()
    with pytest.raises(fs.UsageError, match="each item would be a batch"):
        fs.fit(model, Saving(), nn.MSELoss(), optimizer, max_iters=2, progress=False)


def test_a_loader_may_hand_out_items_that_are_batches():
    model, optimizer = job()
    loader = DataLoader(batches(3), batch_size=None)
    assert len(list(fs.train(model, loader, nn.MSELoss(), optimizer, epochs=1))) == 3


class Energy(nn.Module):
    """A model whose outputs are gradients, taken in one of the ways that torch has."""

    def __init__(self, way):
        super().__init__()
        self.energy, self.way = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Dropout(0.5), nn.Linear(4, 1)), way

    def forward(self, x):
        if self.way == "grad":
            x = x.detach().requires_grad_()
            return torch.autograd.grad(self.energy(x).sum(), x, create_graph=self.training)[0]
        if self.way == "leaf":
            x.requires_grad_()
            return torch.autograd.grad(self.energy(x).sum(), x, create_graph=True)[0]
        return torch.func.vmap(torch.func.grad(lambda row: self.energy(row).sum()), randomness="different")(x)


@pytest.mark.parametrize("way", ["grad", "leaf", "func"])
@pytest.mark.parametrize("watched", [False, True])
def test_a_model_may_differentiate_in_evaluation(way, watched):
    model = Energy(way)
    data = [(torch.randn(4, 3), torch.randn(4, 3)) for _ in range(3)]
    seen = []

    def error(outputs, targets):
        seen.append(outputs.requires_grad)
        return (outputs - targets).abs().mean(1)

    figures = fs.evaluate(model, data, nn.MSELoss(), metrics={"error": error} if watched else None)
    assert model.training and torch.is_grad_enabled() and not any(seen)
    assert all(p.grad is None for p in model.parameters())
    model.eval()
    by_hand = sum(float(nn.functional.mse_loss(model(x), y).detach()) for x, y in data) / 3
    assert figures["loss"] == pytest.approx(by_hand, rel=1e-5)


def test_another_runtime_error_in_evaluation_stays_the_models_own():
    model, _ = job()
    calls = []

    def forward(x):
        calls.append(1)
        raise RuntimeError("planted")

    model.forward = forward
    with pytest.raises(RuntimeError, match="^planted$"):
        fs.evaluate(model, batches(), nn.MSELoss())
    assert len(calls) == 1


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"run": "runs/x"}, "run is 'runs/x'; it must be an fs.Run inside its with block"),
        ({"accumulate": 10**30}, "accumulate = 1000"),
        ({"to_best": "false", "anneal": 4}, "to_best = 'false' must be True or False"),
        ({"progress": "off"}, "progress = 'off' must be True, False or a Progress"),
        ({"watchers": torch.tensor(2)}, "watchers is a Tensor"),
    ],
)
def test_arguments_of_a_wrong_kind_are_named(options, said):
    model = torch.nn.Linear(4, 3)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    data, loss = [(torch.randn(2, 4), torch.randn(2, 3))], torch.nn.MSELoss()
    with pytest.raises(fs.UsageError, match=said):
        fs.fit(model, data, loss, optimizer, epochs=1, val=data, **{"progress": False, **options})
    if {"run", "accumulate"} & {*options}:
        with pytest.raises(fs.UsageError, match=said):
            fs.train(model, data, loss, optimizer, epochs=1, **options)
