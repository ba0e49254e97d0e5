"""A resume whose script says something else takes it up by an explicit wish, or is refused with a sentence."""

import json
from functools import partial

import pytest
import torch
from torch import nn
from torch.optim import SGD, Adam, RMSprop
from torch.optim.lr_scheduler import (
    ChainedScheduler,
    CosineAnnealingLR,
    LambdaLR,
    MultiStepLR,
    OneCycleLR,
    SequentialLR,
    StepLR,
)
from torch.utils.data import DataLoader, Dataset, TensorDataset

import fivestep as fs
from fivestep.data.examples import Examples
from fivestep.data.segments import Segments
from fivestep.models.rnn import RNN
from fivestep.run.checkpoint import load_state, newest_first, read_manifest, save_checkpoint

DRAW = torch.Generator().manual_seed(1)
X, Y = torch.randn(40, 3, generator=DRAW), torch.randn(40, 1, generator=DRAW)
DATA = [(X[i : i + 4], Y[i : i + 4]) for i in range(0, 40, 4)]


def layers():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 1))


def job(folder, max_iters, make, data=DATA, body=None, adopt=False, **options):
    """Train on; return the model and what was said."""
    said = []
    model, optimizer, scheduler = make()
    with fs.Run(folder, say=said.append, adopt_changes=adopt, checkpoint_every=None) as run:
        steps = fs.train(
            model, data, nn.MSELoss(), optimizer, max_iters=max_iters, scheduler=scheduler, run=run, **options
        )
        for info in steps:
            if body is not None:
                body(info.step, model, optimizer)
    return model, said


PLAIN = partial(SGD, lr=0.1)


def made(rule=PLAIN, schedule=None, freeze=()):
    model = layers()
    for number in freeze:
        model[number].requires_grad_(False)
    optimizer = rule([p for p in model.parameters() if p.requires_grad])
    scheduler = schedule if schedule is None or isinstance(schedule, partial) else schedule(optimizer)
    return model, optimizer, scheduler


def same(one, other):
    return all(torch.equal(a, b) for a, b in zip(one.state_dict().values(), other.state_dict().values(), strict=True))


def events(folder):
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [row for row in rows if row.get("event") == "changed"]


CHANGES = {
    "lr": (made, partial(made, partial(SGD, lr=0.01)), "lr"),
    "momentum": (made, partial(made, partial(SGD, lr=0.1, momentum=0.5)), "momentum"),
    "class": (made, partial(made, partial(Adam, lr=0.1)), "optimizer"),
    "horizon": (
        partial(made, schedule=lambda one: CosineAnnealingLR(one, 10)),
        partial(made, schedule=lambda one: CosineAnnealingLR(one, 40)),
        "scheduler.T_max",
    ),
    "horizon of a function": (
        partial(made, schedule=partial(fs.warmup_cosine, max_iters=10)),
        partial(made, schedule=partial(fs.warmup_cosine, max_iters=30)),
        "scheduler.max_iters",
    ),
    "a function of LambdaLR": (
        partial(made, schedule=lambda one: LambdaLR(one, lambda step: 0.9**step)),
        partial(made, schedule=lambda one: LambdaLR(one, lambda step: 0.8**step)),
        "scheduler.factors.0",
    ),
    "scheduler": (partial(made, schedule=lambda one: StepLR(one, 3)), made, "scheduler"),
    "frozen": (made, partial(made, freeze=[0]), "frozen"),
}


@pytest.mark.parametrize("kind", CHANGES)
def test_a_change_is_refused_and_adopted_by_a_wish(tmp_path, kind):
    first, second, name = CHANGES[kind]
    job(tmp_path, 5, first)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    with pytest.raises(fs.UsageError, match="adopt_changes") as refused:
        job(tmp_path, 10, second)
    assert f"{name} (" in str(refused.value)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
    _, said = job(tmp_path, 10, second, adopt=True)
    assert any(f"{name} (" in text for text in said)
    (event,) = events(tmp_path)
    assert event["step"] == 5
    assert name in event["changes"]
    assert all("changed" not in text for text in job(tmp_path, 12, second)[1])  # it is the run's own from here on


@pytest.mark.parametrize("old", [None, "StepLR", "SequentialLR", "function"])
def test_a_new_rate_is_that_of_a_loop_that_changes_it(tmp_path, old):
    def with_rate(lr):
        schedules = {
            None: None,
            "StepLR": lambda one: StepLR(one, 3, gamma=0.5),
            "SequentialLR": lambda one: SequentialLR(one, [StepLR(one, 2, gamma=0.5), StepLR(one, 3)], [4]),
            "function": partial(fs.warmup_cosine, max_iters=20, warmup_iters=4),
        }
        return made(partial(SGD, lr=lr, momentum=0.9), schedules[old])

    def tenth(step, model, optimizer):
        if step == 5:
            for group in optimizer.param_groups:
                group["lr"] *= 0.1
                if old is not None:
                    group["initial_lr"] *= 0.1

    whole, _ = job(tmp_path / "whole", 12, partial(with_rate, 0.1), body=tenth)
    job(tmp_path / "cut", 5, partial(with_rate, 0.1))
    again, _ = job(tmp_path / "cut", 12, partial(with_rate, 0.01), adopt=True)
    for a, b in zip(whole.parameters(), again.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)


def test_a_new_horizon_stands_where_it_would_from_the_beginning(tmp_path):
    job(tmp_path, 5, partial(made, schedule=lambda one: CosineAnnealingLR(one, 10)))
    rates = []
    body = lambda step, model, optimizer: rates.append(optimizer.param_groups[0]["lr"])  # noqa: E731
    job(tmp_path, 8, partial(made, schedule=lambda one: CosineAnnealingLR(one, 40)), body=body, adopt=True)
    optimizer = SGD([torch.zeros(1, requires_grad=True)], lr=0.1)
    scheduler = CosineAnnealingLR(optimizer, 40)
    for _ in range(6):
        optimizer.step()
        scheduler.step()
    assert rates[0] == pytest.approx(scheduler.get_last_lr()[0])


@pytest.mark.parametrize("schedule", [None, lambda one: OneCycleLR(one, 0.5, total_steps=20)])
def test_what_training_itself_changes_is_no_changed_setting(tmp_path, schedule):
    """Rates and momenta that a scheduler or the body moves; layers, groups and modes that the body changes."""

    def body(step, model, optimizer):
        if step == 3:
            model[3].requires_grad_(True)
            optimizer.add_param_group({"params": model[3].parameters(), "lr": 0.05})
            model[1].eval()
            if schedule is None:
                optimizer.param_groups[0]["lr"] = 0.03

    make = partial(made, partial(SGD, lr=0.1, momentum=0.9), schedule, freeze=[3])
    if schedule is not None:  # torch's schedulers know no group that was added later
        body = None
    whole, _ = job(tmp_path / "whole", 25 if schedule is None else 15, make, body=body)
    for stop in (3, 6, 13):
        job(tmp_path / f"cut{stop}", stop, make, body=body)
        again, _ = job(tmp_path / f"cut{stop}", 25 if schedule is None else 15, make, body=body)
        assert same(whole, again), stop


class Rows(Dataset):
    def __init__(self, n=62):
        self.n = n

    def __len__(self):
        return self.n

    def __getitem__(self, i):
        return torch.tensor([float(i)]), torch.zeros(1)


def loader(batch_size, workers=0):
    return DataLoader(
        Rows(), batch_size, shuffle=True, generator=torch.Generator().manual_seed(3), num_workers=workers
    )


def stream(batch_size):
    return Examples(torch.arange(62.0)[:, None], torch.zeros(62, 1), batch_size, seed=3)


class Seen(nn.Linear):
    def forward(self, x):
        self.rows.extend(x.flatten().int().tolist())
        return super().forward(x)


@pytest.mark.parametrize("data", [loader, stream])
@pytest.mark.parametrize("sizes", [(8, 4), (8, 10), (4, 12), (10, 8)])
def test_another_batch_size_trains_each_row_once(tmp_path, data, sizes):
    seen = []

    def make():
        torch.manual_seed(0)
        model = Seen(1, 1)
        model.rows = seen
        return model, SGD(model.parameters(), lr=1e-6), None

    old, new = sizes
    job(tmp_path, 3, make, data(old))
    job(tmp_path, 3, make, data(new), adopt=True)  # saves the place, and trains nothing
    job(tmp_path, 4, make, data(new), adopt=True)
    job(tmp_path, 5, make, data(new), accumulate=2, adopt=True)
    job(tmp_path, 6, make, data(new), accumulate=2)
    model, optimizer, _ = make()
    with fs.Run(tmp_path, say=seen_nothing) as run:
        fs.fit(model, data(new), nn.MSELoss(), optimizer, epochs=1, accumulate=2, run=run, progress=False)
        assert sorted(seen) == list(range(62))
        assert run.state.clock.samples == 62
        list(fs.train(model, data(new), nn.MSELoss(), optimizer, epochs=2, accumulate=2, run=run, state=run.state))
    assert sorted(seen) == sorted([*range(62), *range(62)])


def seen_nothing(text):
    pass


def test_a_batch_size_that_moves_the_columns_waits_for_the_epochs_end(tmp_path):
    text = torch.randint(0, 7, (200,), generator=torch.Generator().manual_seed(0)).numpy().astype("uint16")

    def goes_on(columns, limit, **options):
        torch.manual_seed(0)
        model = RNN(7, 4, 4, 1)
        with fs.Run(tmp_path, say=seen_nothing, **options) as run:
            optimizer = SGD(model.parameters(), lr=0.1)
            list(fs.train(model, Segments(text, columns, 5), fs.TruncatedBPTT(), optimizer, max_iters=limit, run=run))
            return run.state.clock.epoch

    goes_on(4, 3)
    with pytest.raises(fs.UsageError, match="finish the epoch"):
        goes_on(5, 6, adopt_changes=True)
    assert goes_on(4, 10) == 1
    goes_on(5, 12, adopt_changes=True)


@pytest.mark.parametrize(
    ("first", "second", "name"),
    [
        (DATA, DATA[:8], "batches"),
        (DATA, [(x + 1, y) for x, y in DATA], "content"),
        (DataLoader(TensorDataset(X, Y), 4), DataLoader(TensorDataset(X + 1, Y), 4), "content"),
        (DataLoader(TensorDataset(X, Y), 4), DataLoader(TensorDataset(X[:36], Y[:36]), 4), "rows"),
        (DataLoader(TensorDataset(X, Y), 4), DataLoader(TensorDataset(X, Y), 4, shuffle=True), "sampler"),
        (Examples(X, Y, 4), Examples(X, Y, 4, seed=1), "seed"),
    ],
)
def test_other_data_is_refused(tmp_path, first, second, name):
    job(tmp_path, 5, made, first)
    with pytest.raises(fs.UsageError, match=rf"\b{name} \("):
        job(tmp_path, 8, made, second)


def test_workers_and_a_compiled_step_are_no_changed_settings(tmp_path):
    job(tmp_path, 3, lambda: (*plain(), None), loader(8))
    _, said = job(tmp_path, 5, lambda: (*plain(), None), loader(8, workers=1))
    assert not any("changed" in text for text in said)


def plain():
    torch.manual_seed(0)
    model = nn.Linear(1, 1)
    return model, SGD(model.parameters(), lr=1e-3)


def test_a_group_that_is_added_keeps_the_moments_of_the_others(tmp_path):
    def make(groups):
        model = layers()
        return model, Adam([{"params": model[i].parameters()} for i in groups], lr=0.01), None

    job(tmp_path, 5, partial(make, [3]))
    (folder,) = newest_first(tmp_path / "checkpoints")
    before = load_state(read_manifest(folder))["optimizers"][0]["state"]
    with pytest.raises(fs.UsageError, match=r"groups \(1 -> 2\)"):
        job(tmp_path, 6, partial(make, [0, 3]))
    kept = {}

    def body(step, model, optimizer):
        held = {name: optimizer.state.get(p) for name, p in model.named_parameters()}
        kept.update({name: state["step"].item() for name, state in held.items() if state})

    job(tmp_path, 6, partial(make, [0, 3]), body=body, adopt=True)
    assert before[0]["step"].item() == 5
    assert kept == {"0.weight": 1, "0.bias": 1, "3.weight": 6, "3.bias": 6}


def test_averaged_weights_begin_and_end_by_a_wish(tmp_path):
    job(tmp_path, 3, made)
    with pytest.raises(fs.UsageError, match=r"ema \(None -> 0.9\)"):
        job(tmp_path, 6, made, ema=0.9)
    job(tmp_path, 6, made, ema=0.9, adopt=True)
    job(tmp_path, 9, made, adopt=True)


@pytest.mark.parametrize("way", [fs.fit, fs.train])
def test_a_run_that_has_ended_says_so(tmp_path, way):
    said = []
    for times in range(2):
        model, optimizer, _ = made()
        options = {"progress": False} if way is fs.fit else {}
        with fs.Run(tmp_path, say=said.append) as run:
            list(way(model, DATA, nn.MSELoss(), optimizer, epochs=1, run=run, **options))
        assert sum("nothing was trained" in text for text in said) == times


@pytest.mark.parametrize("adopt", [False, True])
def test_a_state_of_an_earlier_version_is_read_and_what_is_kept_is_said(tmp_path, adopt):
    job(tmp_path, 3, made)
    (folder,) = newest_first(tmp_path / "checkpoints")
    state = load_state(read_manifest(folder))
    old = {name: value for name, value in state.items() if name not in ("settings", "held", "cut")}
    save_checkpoint(tmp_path / "checkpoints", old["model"], old, 4, None)
    rates = []
    body = lambda step, model, optimizer: rates.append(optimizer.param_groups[0]["lr"])  # noqa: E731
    _, said = job(tmp_path, 4, partial(made, partial(SGD, lr=0.01)), body=body, adopt=adopt)
    assert rates == [0.01 if adopt else 0.1]
    assert any("lr (0.1 -> 0.01)" in text for text in said)


class Centre(nn.Module):
    """A criterion with a buffer that its forward moves, as DINO's centre."""

    def __init__(self):
        super().__init__()
        self.register_buffer("centre", torch.zeros(1))
        self.scale = nn.Parameter(torch.ones(1))
        self.fails = False

    def forward(self, output, target):
        with torch.no_grad():
            self.centre.mul_(0.9).add_(0.1 * output.mean())
        if self.fails:
            self.fails = False
            raise OSError("once")
        return ((output * self.scale - self.centre - target) ** 2).mean()


def own_loss(folder, max_iters=9, fails=None, freezes=None, stop=None):
    """Train with `Centre`, whose forward fails after step `fails`, and whose scale is frozen after step `freezes`."""
    model, criterion = layers(), Centre()
    optimizer = Adam([*model.parameters(), *criterion.parameters()], lr=0.01)
    with fs.Run(folder, say=str, checkpoint_every=2) as run:
        for info in fs.train(model, DATA, criterion, optimizer, max_iters=max_iters, run=run):
            criterion.fails = info.step == fails
            if info.step == freezes:
                criterion.scale.requires_grad_(False)
            if info.step == stop:
                raise OSError("stop")
    return model


def test_a_criterions_buffer_that_a_broken_step_moved_is_not_saved(tmp_path):
    uncut = own_loss(tmp_path / "uncut")
    with pytest.raises(OSError, match="once"):
        own_loss(tmp_path / "cut", fails=5)
    assert same(uncut, own_loss(tmp_path / "cut"))


def test_a_criterions_parameter_that_the_loop_froze_stays_frozen(tmp_path):
    uncut = own_loss(tmp_path / "uncut", freezes=3)
    with pytest.raises(OSError, match="stop"):
        own_loss(tmp_path / "cut", freezes=3, stop=5)
    assert same(uncut, own_loss(tmp_path / "cut", freezes=3))


def test_a_group_that_the_loop_took_away_leaves_its_state_behind(tmp_path):
    def made_in_two_groups():
        model = layers()
        return model, Adam([{"params": model[0].parameters()}, {"params": model[3].parameters()}], lr=0.01), None

    def body(step, model, optimizer):
        if step == 4:
            del optimizer.param_groups[0]

    uncut, _ = job(tmp_path / "uncut", 9, made_in_two_groups, body=body)
    job(tmp_path / "cut", 6, made_in_two_groups, body=body)
    assert same(uncut, job(tmp_path / "cut", 9, made_in_two_groups, body=body)[0])


def test_a_head_that_the_loop_replaced_is_resumed_with_the_new_one(tmp_path):
    make = partial(made, partial(Adam, lr=0.01))

    def body(step, model, optimizer):
        if step == 3:
            torch.manual_seed(5)
            model[3] = nn.Linear(4, 1)
            optimizer.add_param_group({"params": model[3].parameters()})

    with pytest.warns(UserWarning, match="no longer in the model"):
        uncut, _ = job(tmp_path / "uncut", 9, make, body=body)
    with pytest.warns(UserWarning, match="no longer in the model"):
        job(tmp_path / "cut", 6, make, body=body)
    assert same(uncut, job(tmp_path / "cut", 9, make, body=body)[0])


class Noting(SGD):
    """Keeps a number of its own among the parameters' states."""

    def step(self, closure=None):
        self.state["steps"] = {"made": self.state.get("steps", {"made": 0})["made"] + 1}
        return super().step(closure)


def test_what_an_optimizer_notes_of_no_parameter_is_resumed(tmp_path):
    job(tmp_path, 4, partial(made, partial(Noting, lr=0.1)))
    model, optimizer, _ = made(partial(Noting, lr=0.1))
    job(tmp_path, 7, lambda: (model, optimizer, None))
    assert optimizer.state["steps"] == {"made": 7}


NEEDING_MORE = {
    "amsgrad": (partial(Adam, lr=0.1), {"amsgrad": True}),
    "centered": (partial(RMSprop, lr=0.1), {"centered": True}),
    "momentum": (partial(RMSprop, lr=0.1), {"momentum": 0.5}),
}


@pytest.mark.parametrize("option", NEEDING_MORE)
def test_an_option_whose_optimizer_keeps_more_begins_at_zero(tmp_path, option):
    rule, more = NEEDING_MORE[option]
    job(tmp_path, 4, partial(made, rule))
    model, optimizer, _ = made(partial(rule, **more))
    job(tmp_path, 7, lambda: (model, optimizer, None), adopt=True)
    assert {int(one["step"]) for one in optimizer.state.values()} == {7}


@pytest.mark.parametrize("numbers", [(1, 2), (2, 1)])
def test_another_number_of_optimizers_keeps_the_moments(tmp_path, numbers):
    def parted(number):
        model = layers()
        parts = [model] if number == 1 else [model[:2], model[2:]]
        return model, [Adam(part.parameters(), lr=0.1) for part in parts], None

    job(tmp_path, 4, partial(parted, numbers[0]))
    model, optimizers, _ = parted(numbers[1])
    job(tmp_path, 7, lambda: (model, optimizers, None), adopt=True)
    assert {int(one["step"]) for optimizer in optimizers for one in optimizer.state.values()} == {7}


def one_cycle(optimizer, **options):
    return OneCycleLR(optimizer, 1.0, total_steps=20, cycle_momentum=False, **options)


def after_two(factor, optimizer):
    return SequentialLR(optimizer, [StepLR(optimizer, 9), LambdaLR(optimizer, lambda step: factor**step)], [2])


RESCHEDULED = {
    "milestone": (lambda one: MultiStepLR(one, [7]), lambda one: MultiStepLR(one, [6])),
    "chained": (
        lambda one: ChainedScheduler([StepLR(one, 2, 0.5), StepLR(one, 3, 0.5)]),
        lambda one: ChainedScheduler([StepLR(one, 2, 0.5)]),
    ),
    "one cycle": (one_cycle, lambda one: one_cycle(one, div_factor=10)),
    "a function within": (lambda one: after_two(0.9, one), lambda one: after_two(0.5, one)),
}


@pytest.mark.parametrize("name", RESCHEDULED)
def test_a_change_within_a_scheduler_needs_a_wish_and_stands_where_it_would(tmp_path, name):
    before, after = (partial(made, schedule=one) for one in RESCHEDULED[name])
    job(tmp_path / "run", 5, before)
    with pytest.raises(fs.UsageError, match="started with other settings"):
        job(tmp_path / "run", 8, after)
    rates = {}

    def body(rates, step, model, optimizer):
        rates[step] = optimizer.param_groups[0]["lr"]

    wanted = {}
    job(tmp_path / "whole", 8, after, body=partial(body, wanted))
    job(tmp_path / "run", 8, after, adopt=True, body=partial(body, rates))
    assert {step: wanted[step] for step in (6, 7, 8)} == pytest.approx(rates)


def weighted(folder, max_iters, weight, adopt=False):
    torch.manual_seed(0)
    model, criterion = nn.Linear(3, 3), nn.CrossEntropyLoss(weight=weight)
    data = [(x, torch.arange(4) % 3) for x, _ in DATA]
    with fs.Run(folder, say=str, adopt_changes=adopt) as run:
        for _ in fs.train(model, data, criterion, SGD(model.parameters(), lr=0.1), max_iters=max_iters, run=run):
            pass
    return criterion.weight


@pytest.mark.parametrize(
    ("old", "new"), [([1.0, 1.0, 1.0], [1.0, 1.0, 50.0]), ([1.0, 1.0, 9.0], None), (None, [2.0] * 3)]
)
def test_other_class_weights_need_a_wish(tmp_path, old, new):
    old, new = (None if one is None else torch.tensor(one) for one in (old, new))
    weighted(tmp_path, 4, old)
    with pytest.raises(fs.UsageError, match=r"criterion\.weight"):
        weighted(tmp_path, 7, new)
    found = weighted(tmp_path, 7, new, adopt=True)
    assert found is None if new is None else torch.equal(found, new)


class Numbers(Dataset):
    """Rows that are their own number."""

    def __len__(self):
        return 64

    def __getitem__(self, index):
        return torch.tensor([float(index), 0.0, 0.0]), torch.tensor([float("nan") if index == 9 else 0.5])


def of_size(folder, batch_size, stop=None, adopt=False, shuffle=False, seen=None):
    """Train an epoch over `Numbers`, whose row 9 is skipped where it is not finite; return the last step."""
    torch.manual_seed(0)
    model = nn.Linear(3, 1)
    numbers = [] if seen is None else seen
    model.register_forward_pre_hook(lambda _, inputs: numbers.extend(inputs[0][:, 0].int().tolist()))
    loader = DataLoader(Numbers(), batch_size=batch_size, shuffle=shuffle)
    optimizer = SGD(model.parameters(), lr=1e-5)
    with fs.Run(folder, say=str, adopt_changes=adopt) as run:
        for info in fs.train(model, loader, nn.MSELoss(), optimizer, epochs=1, run=run, on_nonfinite="skip"):
            if info.step == stop:
                raise InterruptedError
    return info.step


def test_a_skipped_batch_of_another_size_is_not_skipped_again(tmp_path):
    with pytest.raises(InterruptedError):
        of_size(tmp_path, 4, stop=7)  # 8 batches of 4 rows; that of row 9 made no step
    assert of_size(tmp_path, 16, adopt=True) == 9  # rows 32 to 63 make two more


def test_a_larger_batch_than_what_was_trained_goes_on_in_the_same_order(tmp_path):
    seen = []
    with pytest.raises(InterruptedError):
        of_size(tmp_path, 4, stop=2, shuffle=True, seen=seen)
    of_size(tmp_path, 16, adopt=True, shuffle=True, seen=seen)
    assert sorted(set(seen)) == list(range(64)) and len(seen) == 64
