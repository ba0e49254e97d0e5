"""Annealing on a validation plateau, early stopping, the way back to the best weights: against a loop by hand."""

import copy

import pytest
import torch
from torch import nn

import fivestep as fs
from fivestep.data.segments import CoveringSegments, Segments
from fivestep.loop.plateau import Plateau, PlateauRule
from fivestep.models.mlp import MLP
from fivestep.models.rnn import RNN
from tests.same import assert_same_bits, twins


def rows(n, seed, noise):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, 3, generator=generator)
    return x, x.sum(1, keepdim=True) + noise * torch.randn(n, 1, generator=generator)


def batches(n, seed, noise=1.0):
    x, y = rows(n, seed, noise)
    return list(zip(x.split(8), y.split(8), strict=True))


TRAIN, VAL = batches(40, 0), batches(24, 1)
OPTIMIZERS = {
    "sgd": lambda model: torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9),
    "adamw": lambda model: torch.optim.AdamW(model.parameters(), lr=0.1),
}


def by_hand(model, optimizer, epochs, *, divide=None, patience=0, stop_after=None, to_best=False):
    """Plain epochs with torch alone; the losses, and the rate of each epoch."""
    criterion, best, losses, rates = nn.MSELoss(), None, [], []
    since_best = since_annealed = 0
    kept = None
    for _ in range(epochs):
        rates.append(optimizer.param_groups[0]["lr"])
        model.train()
        for x, y in TRAIN:
            optimizer.zero_grad()
            criterion(model(x), y).backward()
            optimizer.step()
        model.eval()
        with torch.no_grad():
            total = sum(criterion(model(x), y).item() * len(x) for x, y in VAL)
        losses.append(total / sum(len(x) for x, _ in VAL))
        if best is None or losses[-1] < best:
            best, since_best, since_annealed = losses[-1], 0, 0
            kept = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
            continue
        since_best, since_annealed = since_best + 1, since_annealed + 1
        stop = stop_after is not None and since_best >= stop_after
        anneal = not stop and divide is not None and since_annealed > patience
        rate = optimizer.param_groups[0]["lr"] / divide if anneal else optimizer.param_groups[0]["lr"]
        since_annealed = 0 if anneal else since_annealed
        if to_best and (stop or anneal):
            model.load_state_dict(kept[0])
            optimizer.load_state_dict(copy.deepcopy(kept[1]))
        for group in optimizer.param_groups:
            group["lr"] = rate
        if stop:
            break
    return losses, rates


@pytest.mark.parametrize("kind", OPTIMIZERS)
@pytest.mark.parametrize(
    "options",
    [
        {"anneal": 4},
        {"anneal": 4, "anneal_patience": 2},
        {"early_stop": 3},
        {"anneal": 2, "early_stop": 5},
        {"anneal": 4, "to_best": True},
        {"anneal": 4, "anneal_patience": 1, "early_stop": 4, "to_best": True},
    ],
    ids=str,
)
def test_equal_to_a_loop_by_hand(kind, options):
    torch.manual_seed(3)
    ours, theirs = twins(MLP([3, 32, 1]))
    optimizer = OPTIMIZERS[kind](ours)
    history = fs.fit(ours, TRAIN, nn.MSELoss(), optimizer, epochs=14, val=VAL, progress=False, **options)
    names = {"anneal": "divide", "anneal_patience": "patience", "early_stop": "stop_after", "to_best": "to_best"}
    by = {names[name]: value for name, value in options.items()}
    losses, rates = by_hand(theirs, OPTIMIZERS[kind](theirs), 14, **by)
    assert [row["loss"] for row in history if row["split"] == "val"] == losses
    assert [row["lr"] for row in history if row["split"] == "train"] == pytest.approx(rates, rel=1e-12)
    assert_same_bits(ours, theirs)
    events = [row["event"] for row in history if "event" in row]
    assert events.count("annealed") > 0 or "anneal" not in options
    assert (events[-1:] == ["stopped early"]) == (len(losses) < 14)
    assert len(losses) < 14 or "early_stop" not in options


def test_as_word_language_model_does_it(tokens):
    """LSTM, SGD at 20, clip 0.25, the rate divided by 4 where validation is no better: the same rates and weights."""
    torch.manual_seed(5)
    ours, theirs = twins(RNN(29, 8, 8, 1, dropout=0.0))
    train, val = Segments(tokens[:900], 10, 9), CoveringSegments(tokens[900:1300], 10, 9)
    optimizer = torch.optim.SGD(ours.parameters(), lr=20.0)
    history = fs.fit(
        ours, train, fs.TruncatedBPTT(), optimizer, epochs=7, val=val, clip_norm=0.25, anneal=4, progress=False
    )
    rate, best, rates, criterion = 20.0, None, [], nn.CrossEntropyLoss()
    for _ in range(7):
        rates.append(rate)
        theirs.train()
        hidden = theirs.init_hidden(10)
        for data, target in train:
            theirs.zero_grad()
            output, hidden = theirs(data, tuple(part.detach() for part in hidden))
            criterion(output.flatten(0, 1), target).backward()
            nn.utils.clip_grad_norm_(theirs.parameters(), 0.25)
            for parameter in theirs.parameters():
                parameter.data.add_(parameter.grad, alpha=-rate)
        loss = fs.evaluate(theirs, val, fs.TruncatedBPTT())["loss"]
        if best is None or loss < best:
            best = loss
        else:
            rate /= 4.0
    assert [row["lr"] for row in history if row["split"] == "train"] == rates
    assert rates[-1] < 20.0
    assert_same_bits(ours, theirs)


@pytest.mark.parametrize("scheduler", ["function", "torch"])
def test_annealing_multiplies_a_schedule(scheduler):
    """The factor comes on top; a chainable torch scheduler does not see it."""
    model = MLP([3, 1])
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-9)
    every = {}
    halving = lambda step: 0.5 ** (step // 5)  # noqa: E731
    if scheduler == "torch":
        halving, every = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5), {"scheduler_every": "1ep"}
    still = [(torch.zeros(8, 3), torch.full((8, 1), 1e6))]  # so far off that no step shows in float32
    options = {"val": still, "scheduler": halving, "anneal": 4, "progress": False, **every}
    history = fs.fit(model, TRAIN, nn.MSELoss(), optimizer, epochs=4, **options)
    rates = [row["lr"] / 1e-9 for row in history if row["split"] == "train"]
    events = [row.get("event") for row in history if row["split"] == "val"]
    factors, factor = [], 1.0
    for epoch, event in enumerate(events):
        factors.append(factor * 0.5**epoch)
        factor /= 4 if event == "annealed" else 1
    assert rates == pytest.approx(factors)
    assert "annealed" in events[:-1]


def test_resumed_at_a_plateau():
    """The counts, the factor and the best weights are part of the state."""
    options = {"val": VAL, "anneal": 4, "anneal_patience": 1, "to_best": True, "early_stop": 6, "progress": False}

    def start():
        torch.manual_seed(3)
        model = MLP([3, 32, 1])
        return model, OPTIMIZERS["adamw"](model)

    model, optimizer = start()
    whole = fs.fit(model, TRAIN, nn.MSELoss(), optimizer, epochs=12, **options)
    for cut in (2, 5, 8):
        first, first_optimizer = start()
        state = fs.TrainStep(first, nn.MSELoss(), first_optimizer).state
        fs.fit(first, TRAIN, nn.MSELoss(), first_optimizer, epochs=cut, state=state, **options)
        saved = state.state_dict()
        again, again_optimizer = start()
        other = fs.TrainStep(again, nn.MSELoss(), again_optimizer).state
        other.load_state_dict(saved)
        rest = fs.fit(again, TRAIN, nn.MSELoss(), again_optimizer, epochs=12, state=other, **options)
        tail = [row["loss"] for row in whole][-len(rest) :]
        assert [row["loss"] for row in rest] == tail
        assert_same_bits(model, again)


def test_nan_is_no_improvement():
    plateau, rule = Plateau(), PlateauRule(anneal=4.0, stop_after=3)
    assert [plateau.judge(loss, rule) for loss in (float("nan"), 1.0, float("nan"), 1.0, 2.0)] == [
        "annealed",
        "",
        "annealed",
        "annealed",
        "stopped early",
    ]


@pytest.mark.parametrize(
    "options, match",
    [
        ({"anneal": 1}, r"anneal = 1 must be above 1.*--anneal"),
        ({"anneal": 4, "anneal_patience": -1}, r"anneal_patience \(--anneal-patience\) = -1"),
        ({"early_stop": 0}, r"early_stop \(--early-stop\) = 0"),
        ({"to_best": True}, r"to_best \(--to-best\) needs"),
        ({"anneal": 4, "val": None}, "give val="),
    ],
)
def test_refused(options, match):
    model = MLP([3, 1])
    with pytest.raises(fs.UsageError, match=match):
        fs.fit(model, TRAIN, nn.MSELoss(), OPTIMIZERS["sgd"](model), epochs=1, **{"val": VAL, **options})


WORSE = [[(x, y + 1e4 * epoch) for x, y in VAL] for epoch in range(9)]


class Worsening:
    """Validation data whose targets move away: no validation but the first is the best."""

    def __init__(self):
        self.looks = 0

    def __iter__(self):
        self.looks += 1
        return iter(WORSE[self.looks - 1])


def test_a_return_to_the_best_leaves_a_torch_scheduler_its_rates():
    model = MLP([3, 1])
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)
    options = {"scheduler": scheduler, "scheduler_every": "1ep", "anneal": 4, "to_best": True, "progress": False}
    history = fs.fit(model, TRAIN, nn.MSELoss(), optimizer, epochs=5, val=Worsening(), **options)
    rates = [row["lr"] for row in history if row["split"] == "train"]
    assert rates == pytest.approx([1e-3 * 0.5**epoch / 4 ** max(0, epoch - 1) for epoch in range(5)])


class Scaled(nn.Module):
    """A criterion that learns, too."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, outputs, targets):
        return ((outputs - targets) ** 2).mean() * self.scale.exp() - self.scale


def test_a_return_to_the_best_takes_the_criterion_along():
    model, criterion = MLP([3, 1]), Scaled()
    optimizer = torch.optim.SGD([*model.parameters(), *criterion.parameters()], lr=1e-3)
    scales = []
    options = {"early_stop": 2, "to_best": True, "progress": False}
    options["watchers"] = [lambda result, rows: scales.append((len(rows), criterion.scale.item()))]
    fs.fit(model, TRAIN, criterion, optimizer, epochs=9, val=Worsening(), **options)
    validated = [at for at, (rows, _) in enumerate(scales) if rows > 1]
    assert len(validated) == 3
    best, before = scales[validated[0]][1], scales[validated[2] - 1][1]
    assert criterion.scale.item() == best != before


def test_an_end_that_was_not_planned_is_not_judged():
    """A validation at the end, off the trigger, anneals nothing: going on is as if there had been no end."""

    def trained(*ends):
        torch.manual_seed(0)
        model, val = MLP([3, 8, 1]), Worsening()
        optimizer = OPTIMIZERS["adamw"](model)
        state = fs.TrainStep(model, nn.MSELoss(), optimizer).state
        for end in ends:
            fs.fit(
                model, TRAIN, nn.MSELoss(), optimizer, max_iters=end, val=val, eval_every=4, anneal=4, progress=False,
                state=state,
            )  # fmt: skip
        return state.plateau.annealing, model

    assert trained(6, 16)[0] == trained(16)[0] == 1 / 4**3
    assert_same_bits(trained(6, 16)[1], trained(16)[1])


def test_the_best_weights_of_another_training_are_not_known():
    model = MLP([3, 1])
    optimizer = OPTIMIZERS["sgd"](model)
    state = fs.TrainStep(model, nn.MSELoss(), optimizer).state
    options = {"val": Worsening(), "state": state, "progress": False}
    fs.fit(model, TRAIN, nn.MSELoss(), optimizer, epochs=2, early_stop=9, **options)
    with pytest.raises(fs.UsageError, match="best weights are not known"):
        fs.fit(model, TRAIN, nn.MSELoss(), optimizer, epochs=4, early_stop=9, to_best=True, **options)


@pytest.mark.parametrize("more", [{}, {"to_best": True}])
def test_a_run_that_stopped_early_says_how_to_train_on(tmp_path, more):
    def trained(**options):
        said, model = [], MLP([3, 1])
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
        with fs.Run(tmp_path, say=said.append) as run:
            options |= {"epochs": 6, "val": Worsening(), "run": run, "progress": False}
            return fs.fit(model, TRAIN, nn.MSELoss(), optimizer, **options)[-1]["step"], " ".join(said)

    stopped, _ = trained(early_stop=1, **more)
    again, said = trained(early_stop=1, **more)
    assert again == stopped < 6 * len(TRAIN)
    assert f"stopped early at step {stopped}, so nothing was trained" in said
    assert "raise early_stop (--early-stop)" in said and "max_iters" not in said
    further, said = trained(early_stop=3, **more)
    assert further > stopped and "nothing was trained" not in said
    if not more:
        assert trained()[0] == 6 * len(TRAIN)
