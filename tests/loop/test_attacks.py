"""Found by attack: each of these was once wrong in silence, or failed without a sentence."""

import subprocess
import sys
from collections import namedtuple
from functools import partial

import pytest
import torch
import torchmetrics
from torch import nn
from torch.nn import functional as F
from torch.nn.utils.rnn import PackedSequence, pack_sequence
from torch.utils.data import DataLoader, TensorDataset

import fivestep as fs
from fivestep.loop.batch import to_device
from tests.same import assert_same_bits, twins


def data(batches, rows=4):
    generator = torch.Generator().manual_seed(0)
    return [
        (torch.randn(rows, 3, generator=generator), torch.randn(rows, 1, generator=generator)) for _ in range(batches)
    ]


def job(lr=0.01):
    model = nn.Linear(3, 1)
    return model, torch.optim.SGD(model.parameters(), lr=lr)


# --- the learning rate ---


@pytest.mark.parametrize("tensor", [False, True])
def test_a_schedule_survives_a_loaded_state(tensor):
    model = nn.Linear(3, 1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=torch.tensor(1.0) if tensor else 1.0)
    five = fs.TrainStep(model, nn.MSELoss(), optimizer, scheduler=lambda step: 0.01 * (step + 1))
    for batch in data(3):
        five(batch)
    five.state.load_state_dict(five.state.state_dict())
    rates = []
    for batch in data(3):
        five(batch)
        rates.append(float(optimizer.param_groups[0]["lr"]))
    assert rates == pytest.approx([0.04, 0.05, 0.06])


def test_a_group_added_later_is_scheduled():
    model = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 1))
    optimizer = torch.optim.SGD(model[0].parameters(), lr=1.0)
    five = fs.TrainStep(model, nn.MSELoss(), optimizer, scheduler=lambda step: 1 / (step + 1))
    five(data(1)[0])
    optimizer.add_param_group({"params": list(model[1].parameters()), "lr": 0.5})
    five(data(1)[0])
    assert [group["lr"] for group in optimizer.param_groups] == [0.5, 0.25]


def test_every_so_many_updates_after_a_resume():
    def rates(resumed):
        model, optimizer = job(1.0)
        scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)
        five = fs.TrainStep(model, nn.MSELoss(), optimizer, scheduler=scheduler, scheduler_every=10)
        if resumed is None:
            for batch in data(15):
                five(batch)
        else:
            five.state.load_state_dict(resumed)
        saved = five.state.state_dict()
        return saved, [five(batch).learning_rate for batch in data(10)]

    saved, whole = rates(None)
    assert whole == [0.5] * 5 + [0.25] * 5
    assert rates(saved)[1] == whole


def test_a_new_rate_is_the_base_of_a_new_training():
    model, optimizer = job(0.1)
    for _ in fs.train(model, data(2), nn.MSELoss(), optimizer, epochs=1, scheduler=lambda step: 1.0):
        pass
    optimizer.param_groups[0]["lr"] = 1e-5
    steps = fs.train(model, data(2), nn.MSELoss(), optimizer, epochs=1, scheduler=lambda step: 1.0)
    assert [result.learning_rate for result in steps] == [1e-5, 1e-5]


def test_a_rate_that_is_not_finite_is_refused():
    model, optimizer = job()
    five = fs.TrainStep(model, nn.MSELoss(), optimizer, scheduler=lambda step: float("nan") if step == 1 else 1.0)
    five(data(1)[0])
    with pytest.raises(fs.UsageError, match="learning rate of nan after step 1"):
        five(data(1)[0])
    assert torch.isfinite(model.weight).all()


# --- going on from a state ---


WORKERS = pytest.param(2, False, marks=[pytest.mark.slow, pytest.mark.multiprocess])


@pytest.mark.parametrize("workers, own", [(0, False), (0, True), WORKERS])
def test_a_shuffled_loader_goes_on_within_the_epoch(workers, own):
    class Noisy(TensorDataset):
        def __getitem__(self, index):
            features, labels = super().__getitem__(index)
            return features + torch.randn(3), labels

    def start(saved=None):
        torch.manual_seed(3)
        model = nn.Sequential(nn.Linear(3, 16), nn.Dropout(0.5), nn.Linear(16, 1))
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
        generator = torch.Generator().manual_seed(0)
        rows = Noisy(torch.randn(40, 3, generator=generator), torch.randn(40, 1, generator=generator))
        order = torch.Generator().manual_seed(5) if own else None
        loader = DataLoader(rows, batch_size=4, shuffle=True, num_workers=workers, generator=order)
        state = fs.TrainStep(model, nn.MSELoss(), optimizer).state
        if saved:
            torch.manual_seed(99)
            state.load_state_dict(saved)
        return fs.train(model, loader, nn.MSELoss(), optimizer, epochs=2, state=state)

    whole, snapshots = [], []
    for result in start():
        whole.append(float(result.loss))
        snapshots.append(result.state.state_dict())
        final = result.state.model
    for at in (0, 6, 9, 13):
        rest = []
        for result in start(snapshots[at]):
            rest.append(float(result.loss))
        assert rest == whole[at + 1 :]
        assert_same_bits(result.state.model, final)


def test_a_limit_ends_no_unfinished_epoch():
    """Epochs of 3 and 4 batches: after 6 steps the second one is not over."""

    class Growing:
        rows = 2

        def set_epoch(self, epoch):
            self.rows = 3 + epoch

        def __len__(self):
            return self.rows

        def __iter__(self):
            return iter(data(self.rows))

    model, optimizer = job()
    *_, last = fs.train(model, Growing(), nn.MSELoss(), optimizer, max_iters=6)
    assert (last.state.clock.epoch, last.state.position) == (1, 3)
    *_, last = fs.train(model, Growing(), nn.MSELoss(), optimizer, max_iters=7)
    assert (last.state.clock.epoch, last.state.position) == (2, 0)


def test_a_tensor_rate_is_that_of_its_own_update():
    model = nn.Linear(3, 1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=torch.tensor(0.01))
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)
    results = list(fs.train(model, data(3), nn.MSELoss(), optimizer, epochs=1, scheduler=scheduler))
    assert [float(result.learning_rate) for result in results] == pytest.approx([0.01, 0.005, 0.0025])


@pytest.mark.parametrize("wrong", [torch.optim.lr_scheduler.StepLR, lambda step: None])
def test_what_is_no_scheduler(wrong):
    model, optimizer = job()
    with pytest.raises(fs.UsageError, match="the scheduler"):
        fs.TrainStep(model, nn.MSELoss(), optimizer, scheduler=wrong)(data(1)[0])


def test_a_one_shot_iterator_is_not_skipped_twice():
    model, optimizer = job()
    stream = iter(data(20))
    *_, result = fs.train(model, stream, nn.MSELoss(), optimizer, max_iters=5)
    with pytest.raises(fs.UsageError, match="cannot go on within an epoch"):
        next(fs.train(model, stream, nn.MSELoss(), optimizer, state=result.state))


def test_a_state_of_other_objects_is_refused():
    model, optimizer = job()
    foreign_model, foreign_optimizer = job()
    foreign = fs.TrainStep(foreign_model, nn.MSELoss(), foreign_optimizer).state
    own = fs.TrainStep(model, nn.MSELoss(), optimizer).state
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1)
    for state, options in ((foreign, {}), (own, {"scheduler": scheduler}), ("x", {})):
        with pytest.raises(fs.UsageError, match="state"):
            fs.TrainStep(model, nn.MSELoss(), optimizer, state=state, **options)


def test_a_criterions_own_parameters_are_in_the_state():
    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.ones(()))

        def forward(self, outputs, labels):
            return ((outputs * self.scale - labels) ** 2).mean()

    model, criterion = nn.Linear(3, 1), Scaled()
    optimizer = torch.optim.SGD([*model.parameters(), *criterion.parameters()], lr=0.1)
    five = fs.TrainStep(model, criterion, optimizer)
    saved, before = five.state.state_dict(), criterion.scale.item()
    five(data(1)[0])
    assert criterion.scale.item() != before
    five.state.load_state_dict(saved)
    assert criterion.scale.item() == before


# --- counts and windows ---


def test_half_precision_counts():
    """65,504 is the largest half: the share of a window of 80,000 rows must not become 1 / infinity."""
    model = nn.Linear(3, 2).half()
    batch = torch.randn(40_000, 3).half(), torch.randint(0, 2, (40_000,))
    result = fs.TrainStep(model, nn.CrossEntropyLoss(), torch.optim.SGD(model.parameters(), lr=0.01))(batch, batch)
    assert float(result.loss) > 0.1
    assert float(result.grad_norm) > 0


def test_subclasses_that_divide_otherwise_count_rows():
    class Masked(nn.MSELoss):
        def forward(self, outputs, labels):
            return F.mse_loss(outputs, labels)

    class Renamed(nn.MSELoss):
        pass

    assert fs.Supervised(Masked()).over == "rows"
    assert fs.Supervised(Renamed()).over == "elements"


@pytest.mark.parametrize("legacy", [{"size_average": False}, {"reduce": False}])
def test_legacy_reductions_are_refused(legacy):
    with pytest.raises(fs.UsageError, match="a mean is needed"):
        fs.Supervised(partial(F.mse_loss, **legacy))


def test_an_empty_micro_batch_adds_nothing():
    model, twin = twins(nn.Linear(3, 1))
    (x, y), steps = data(1)[0], []
    for one, window in ((model, [(x, y), (x[:0], y[:0])]), (twin, [(x, y)])):
        steps.append(fs.TrainStep(one, nn.MSELoss(), torch.optim.SGD(one.parameters(), lr=0.1))(*window))
    assert_same_bits(model, twin)
    assert float(steps[0].loss) == float(steps[1].loss)
    before = [p.detach().clone() for p in model.parameters()]
    five = fs.TrainStep(model, nn.MSELoss(), torch.optim.SGD(model.parameters(), lr=0.1))
    assert five((x[:0], y[:0])) is None, "the step is left out"
    assert all(map(torch.equal, model.parameters(), before)) and five.state.clock.step == 0


def test_sparse_gradients():
    model, twin = twins(nn.EmbeddingBag(11, 2, sparse=True, mode="sum"))
    ids, labels = torch.randint(0, 11, (6, 4)), torch.randn(6, 2)
    ours, theirs = (torch.optim.SparseAdam(list(one.parameters()), lr=0.1) for one in (model, twin))
    result = fs.TrainStep(model, nn.MSELoss(), ours)((ids, labels))
    theirs.zero_grad()
    nn.MSELoss()(twin(ids), labels).backward()
    theirs.step()
    assert_same_bits(model, twin)
    assert float(result.grad_norm) == pytest.approx(float(twin.weight.grad.to_dense().norm()), rel=1e-6)


def test_a_criterion_may_hold_the_model():
    class Penalised(nn.Module):
        def __init__(self, model):
            super().__init__()
            self.model = model

        def forward(self, outputs, labels):
            return ((outputs - labels) ** 2).mean() + sum(p.pow(2).sum() for p in self.model.parameters())

    model, optimizer = job()
    fs.TrainStep(model, Penalised(model), optimizer)(data(1)[0])


# --- containers ---


Pair = namedtuple("Pair", ["h", "c"])


def test_named_tuples_are_carried():
    class Cell(nn.Module):
        def __init__(self):
            super().__init__()
            self.cell, self.decoder = nn.LSTM(4, 4), nn.Linear(4, 4)

        def forward(self, data, hidden=None):
            states, (h, c) = self.cell(F.one_hot(data, 4).float(), hidden and (hidden.h, hidden.c))
            return self.decoder(states), Pair(h, c)

    model = Cell()
    five = fs.TrainStep(model, fs.TruncatedBPTT(), torch.optim.SGD(model.parameters(), lr=0.1))
    for _ in range(3):
        five((torch.randint(0, 4, (5, 2)), torch.randint(0, 4, (10,))))
    assert isinstance(five.state.carry, Pair)
    assert five.state.carry.h.grad_fn is None
    assert isinstance(five.state.state_dict()["carry"], Pair)


def test_a_carry_of_an_unknown_kind_is_refused():
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.table = nn.Embedding(4, 4)

        def forward(self, data, hidden=None):
            return self.table(data), object()

    model = Odd()
    five = fs.TrainStep(model, fs.TruncatedBPTT(), torch.optim.SGD(model.parameters(), lr=0.1))
    with pytest.raises(fs.UsageError, match="hidden state must be tensors .* got a object"):
        five((torch.randint(0, 4, (5, 2)), torch.randint(0, 4, (10,))))


def test_packed_sequences_move_themselves():
    packed = pack_sequence([torch.randn(3), torch.randn(2)])
    moved = to_device({"x": packed}, torch.device("meta"))["x"]
    assert isinstance(moved, PackedSequence)
    assert moved.batch_sizes.device.type == "cpu"
    assert moved.data.device.type == "meta"


# --- figures and rows ---


def test_accuracy_refuses_what_it_would_broadcast():
    with pytest.raises(fs.UsageError, match="accuracy needs outputs"):
        fs.accuracy(torch.randn(8, 1), torch.zeros(8, 1))
    with pytest.raises(fs.UsageError, match="accuracy needs outputs"):
        fs.accuracy(torch.randn(8), torch.zeros(8))
    maps, labels = torch.randn(2, 5, 4, 3), torch.randint(0, 5, (2, 4, 3))
    assert torch.equal(fs.accuracy(maps, labels), maps.argmax(1) == labels)


def test_metrics_do_not_see_ignored_pixels():
    model = nn.Conv2d(1, 5, 1)
    images, labels = torch.randn(2, 1, 4, 3), torch.randint(0, 5, (2, 4, 3))
    labels[0, :2] = -100
    figures = fs.evaluate(
        model,
        [(images, labels)],
        nn.CrossEntropyLoss(),
        metrics={
            "ours": fs.accuracy,
            "theirs": torchmetrics.classification.MulticlassAccuracy(num_classes=5, average="micro"),
        },
    )
    kept = labels != -100
    exact = (model(images).argmax(1) == labels)[kept].float().mean().item()
    assert figures["ours"] == pytest.approx(exact)
    assert figures["theirs"] == pytest.approx(exact)


def test_rates_are_those_of_the_training(monkeypatch):
    """A step that takes 10 ms trains 4 rows in 10 ms, however long the evaluation takes."""
    import fivestep.loop.train as module

    now = [0.0]
    monkeypatch.setattr(module, "perf_counter", lambda: now[0])

    class Slow(nn.Linear):
        def forward(self, features):
            now[0] += 0.01 if self.training else 5.0
            return super().forward(features)

    model = Slow(3, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    history = fs.fit(
        model,
        data(10),
        nn.MSELoss(),
        optimizer,
        epochs=2,
        val=data(3),
        log_every=5,
        eval_every="1ep",
        progress=False,
    )
    rates = [row["samples_per_second"] for row in history if row["split"] == "train"]
    assert len(rates) == 6
    assert rates == pytest.approx([400.0] * 6)
    assert history[-1]["elapsed_seconds"] == pytest.approx(0.2)


def steps_of(history, split="train"):
    return [row["step"] for row in history if row["split"] == split]


def test_log_rows_beside_evaluations():
    model, optimizer = job()

    def run(**options):
        return fs.fit(model, data(10), nn.MSELoss(), optimizer, progress=False, **options)

    assert steps_of(run(max_iters=30, eval_every=10, log_every=5)) == [5, 10, 15, 20, 25, 30]
    assert steps_of(run(max_iters=30, eval_every=None, log_every="1ep")) == [10, 20, 30]
    assert steps_of(run(max_iters=5)) == [5]
    assert steps_of(run(max_iters=25, eval_every=10)) == [10, 20, 25]
    assert steps_of(run(epochs=2, max_iters=20)) == [10, 20]
    ended = run(epochs=1, max_iters=10)
    assert steps_of(ended) == [10]
    assert ended[0]["steps"] == 10


def test_a_limit_at_an_epochs_end_completes_the_epoch():
    model, optimizer = job()
    *_, last = fs.train(model, data(5), nn.MSELoss(), optimizer, max_iters=10)
    assert (last.state.clock.epoch, last.state.position) == (2, 0)


def test_amounts_are_exact():
    from fivestep.loop.clock import parse_amount, parse_steps

    assert parse_amount("2.01k", "x") == ("step", 2010.0)
    for text in ("1_0", "+4"):  # --max-iters and --until read the same numbers
        for parse in (parse_steps, parse_amount):
            with pytest.raises(fs.UsageError):
                parse(text, "x")
    assert parse_amount("1.001Mtok", "x") == ("tokens", 1_001_000.0)
    assert parse_amount("1.005ksmp", "x") == ("samples", 1005.0)


@pytest.mark.parametrize("name", ["max_iters", "warmup_iters", "decay_iters", "lens", "keep_every"])
def test_only_max_iters_may_be_replaced_by_until(name):
    from fivestep.run.config import load_config

    flag = name.replace("_", "-")
    with pytest.raises(fs.UsageError, match=rf"\(--{flag}\) = '1ep' is not a number of steps") as caught:
        load_config("gpt-chars", {name: "1ep"})
    assert ("--until" in str(caught.value)) == (name == "max_iters")


# --- the rest ---


@pytest.mark.multiprocess
def test_importing_fit_draws_no_random_number():
    code = "import random; random.seed(0); s = random.getstate(); import fivestep as fs; fs.fit, fs.Run\n"
    code += "assert random.getstate() == s"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_more_sentences():
    x, y = data(1)[0]
    model, optimizer = job()

    def refused(match, *arguments, batch=(x, y), **options):
        with pytest.raises(fs.UsageError, match=match):
            fs.TrainStep(model, *arguments, **options)(batch)

    refused("targets must be a tensor .* got a ndarray", nn.MSELoss(), optimizer, batch=(x, y.numpy()))
    refused("loss must be a scalar tensor; got 1.0", lambda outputs, labels: 1.0, optimizer)
    refused("precision = None", nn.MSELoss(), optimizer, precision=None)
    refused("clip_norm = 'a'", nn.MSELoss(), optimizer, clip_norm="a")
    weighted = nn.CrossEntropyLoss(weight=torch.ones(2))
    refused("out of range for 2 class weights", weighted, optimizer, batch=(x, torch.tensor([0, 1, 7, 0])))
    with pytest.raises(fs.UsageError, match="metrics is a list"):
        fs.evaluate(model, [(x, y)], nn.MSELoss(), metrics=["a"])
    with pytest.raises(fs.UsageError, match="val is a list_iterator, which can be iterated only once"):
        fs.fit(model, [(x, y)], nn.MSELoss(), optimizer, epochs=1, val=iter([(x, y)]), progress=False)
    with pytest.raises(fs.UsageError, match="computes 3 numbers"):
        each = torchmetrics.classification.MulticlassAccuracy(num_classes=3, average="none")
        classifier = nn.Linear(3, 3)
        fs.evaluate(classifier, [(x, torch.tensor([0, 1, 2, 0]))], nn.CrossEntropyLoss(), metrics={"a": each})
