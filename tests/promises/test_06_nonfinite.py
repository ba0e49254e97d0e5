"""PAINS row 6: NaN is not hidden: training stops before the update, or leaves that step out and nothing else."""

import copy
import json
import math

import pytest
import torch
from torch import nn

import fivestep as fs
from fivestep.loop.precision import LossScale
from tests.same import assert_same_bits, twins

BAD = 2  # the batch that holds a NaN


def data(batches=6, bad=BAD):
    generator = torch.Generator().manual_seed(0)
    pairs = [(torch.randn(4, 3, generator=generator), torch.randn(4, 1, generator=generator)) for _ in range(batches)]
    if bad is not None:
        pairs[bad][0][1, 2] = torch.nan
    return pairs


def network(*middle):
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(3, 8), nn.BatchNorm1d(8), nn.Tanh(), *middle, nn.Linear(8, 1))


def trained(model, pairs, epochs=2, **options):
    """The last result of a training that skips."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    if options.get("scheduler") == "torch":
        options["scheduler"] = torch.optim.lr_scheduler.StepLR(optimizer, step_size=3)
    steps = fs.train(model, pairs, nn.MSELoss(), optimizer, epochs=epochs, on_nonfinite="skip", ema=0.9, **options)
    return list(steps)[-1]


def assert_same(left, right):
    """Two states agree in all that a step changes."""
    ours, theirs = left.state_dict(), right.state_dict()
    assert_same_bits(left.model, right.model)
    momenta = [state["optimizers"][0]["state"].values() for state in (ours, theirs)]
    for one, other in zip(*momenta, strict=True):
        assert all(torch.equal(one[name], other[name]) for name in one)
    assert all(map(torch.equal, ours["average"]["weights"], theirs["average"]["weights"]))
    for name in ("schedulers", "epoch_loss", "logged_loss", "loss_scale"):
        assert ours[name] == theirs[name], name
    assert ours["optimizers"][0]["param_groups"] == theirs["optimizers"][0]["param_groups"]
    clocks = [{k: v for k, v in one["clock"].items() if k not in ("seconds", "waiting")} for one in (ours, theirs)]
    assert clocks[0] == clocks[1]


@pytest.mark.parametrize("scheduler", [None, "torch", lambda step: 1 / (step + 1)])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_skipped_step_is_as_one_that_never_was(accumulate, scheduler):
    """Weights, batch-norm statistics, optimizer, schedule, average, clock: as if the window were not in the data."""
    model, twin = twins(network())
    pairs = data()
    window = range(BAD // accumulate * accumulate, BAD // accumulate * accumulate + accumulate)
    result = trained(model, pairs, accumulate=accumulate, scheduler=scheduler)
    rest = [pair for n, pair in enumerate(pairs) if n not in window]
    assert_same(result.state, trained(twin, rest, accumulate=accumulate, scheduler=scheduler).state)
    assert [(one["epoch"], one["position"], one["batches"]) for one in result.state.skipped] == [
        (0, window[0], accumulate),
        (1, window[0], accumulate),
    ]
    assert all(math.isnan(one["loss"]) and math.isnan(one["grad_norm"]) for one in result.state.skipped)
    assert result.state.skipped[0]["step"] == BAD // accumulate + 1
    json.dumps(result.state.skipped)


def test_segments_keep_the_hidden_state_from_before():
    class Recurrent(nn.Module):
        def __init__(self):
            super().__init__()
            self.rnn, self.out = nn.RNN(3, 5), nn.Linear(5, 4)

        def forward(self, x, hidden=None):
            output, hidden = self.rnn(x, hidden)
            return self.out(output), hidden

    generator = torch.Generator().manual_seed(0)
    segments = [
        (torch.randn(6, 2, 3, generator=generator), torch.randint(4, (12,), generator=generator)) for _ in range(5)
    ]
    segments[2][0][0] = torch.inf
    model, twin = twins(Recurrent())
    states = []
    for one, pairs in ((model, segments), (twin, segments[:2] + segments[3:])):
        optimizer = torch.optim.SGD(one.parameters(), lr=0.5)
        steps = fs.train(one, pairs, fs.TruncatedBPTT(), optimizer, epochs=1, on_nonfinite="skip")
        states.append(list(steps)[-1].state)
    assert_same_bits(model, twin)
    assert torch.equal(states[0].carry, states[1].carry)


class Flaky(nn.Module):
    """Mean squared error; NaN at its call number `at`."""

    def __init__(self, at):
        super().__init__()
        self.calls, self.at = 0, at

    def forward(self, outputs, labels):
        self.calls += 1
        loss = (outputs - labels).square().mean()
        return loss * torch.nan if self.calls - 1 == self.at else loss


def job(at=None):
    model = network(nn.Dropout(0.5))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    pairs = data(bad=None)
    five = fs.TrainStep(model, Flaky(at), optimizer, ema=0.9, on_nonfinite="skip")
    return five, lambda: fs.train(
        model, pairs, five.criterion, optimizer, epochs=2, ema=0.9, on_nonfinite="skip", state=five.state
    )


@pytest.mark.parametrize("cut", [1, 2, 4, 7])
def test_a_resumed_run_leaves_out_what_the_first_one_did(cut):
    """With dropout; the fault was of the moment, and does not come back: the step is left out all the same."""
    whole, run = job(at=BAD)
    torch.manual_seed(2)
    for result in run():
        if result.step == cut:
            saved = copy.deepcopy(whole.state.state_dict())
    entries = copy.deepcopy(whole.state.skipped)
    assert len(entries) == 1
    assert saved["skipped"] == (entries if cut > BAD else [])

    resumed, run = job()
    torch.manual_seed(3)
    resumed.state.load_state_dict(saved)
    assert resumed.state.skipped == saved["skipped"]
    resumed.state.skipped = copy.deepcopy(entries)
    list(run())
    assert_same(whole.state, resumed.state)
    assert resumed.state.skipped == whole.state.skipped  # not noted twice
    assert torch.equal(whole.state.state_dict()["random"]["torch"], resumed.state.state_dict()["random"]["torch"])

    applied, run = job()  # what is compared can differ: without the entry the step counts
    applied.state.load_state_dict({**saved, "skipped": []})
    list(run())
    assert applied.state.clock.step == whole.state.clock.step + (cut <= BAD)


def test_a_step_of_ones_own_loop_returns_none():
    model = network()
    five = fs.TrainStep(model, nn.MSELoss(), torch.optim.AdamW(model.parameters()), on_nonfinite="skip")
    before, kept = copy.deepcopy(model), five.state.clock.step
    pairs = data()
    assert five(pairs[BAD]) is None
    assert five.state.clock.step == kept == 0
    assert_same_bits(model, before)
    assert all(p.grad.isnan().any() for p in model.parameters())  # still there to look at
    assert five(pairs[0]).step == 1  # the same place in no stream: not taken for the one that was left out


def test_what_was_left_out_stays_out_of_a_run_that_stops():
    model, twin = twins(network())
    pairs = data()
    states = []
    for one, batches, skipped in (
        (model, pairs, [{"epoch": 0, "position": BAD, "batches": 1}]),
        (twin, pairs[:BAD] + pairs[BAD + 1 :], []),
    ):
        optimizer = torch.optim.AdamW(one.parameters(), lr=0.01)
        five = fs.TrainStep(one, nn.MSELoss(), optimizer, ema=0.9)
        five.state.skipped = skipped
        states.append(five.state)
        list(fs.train(one, batches, nn.MSELoss(), optimizer, epochs=1, ema=0.9, state=five.state))
    assert_same(*states)


@pytest.mark.parametrize("fault", ["loss", "gradient"])
def test_the_loss_scale_of_fp16_is_as_before(fault):
    class Broken(torch.autograd.Function):
        forward = staticmethod(lambda ctx, x: x.clone())
        backward = staticmethod(lambda ctx, grad: grad * torch.inf)

    model = network()
    criterion = nn.MSELoss() if fault == "loss" else lambda out, y: Broken.apply((out - y).square().mean())
    five = fs.TrainStep(model, criterion, torch.optim.AdamW(model.parameters()), on_nonfinite="skip")
    five.state.loss_scale = LossScale(2.0**10, 7)
    before = copy.deepcopy(model)
    assert five(data()[BAD if fault == "loss" else 0]) is None
    assert five.state.loss_scale == LossScale(2.0**10, 7)
    assert_same_bits(model, before)


@pytest.mark.parametrize("fit", [True, False])
def test_an_epoch_without_an_update_stops(fit):
    model = network()
    optimizer = torch.optim.AdamW(model.parameters())
    pairs = [(x * torch.nan, y) for x, y in data()]
    with pytest.raises(
        fs.NonFiniteError, match="epoch 1 ended without a single update, each of its 6 steps"
    ) as raised:
        if fit:
            fs.fit(model, pairs, nn.MSELoss(), optimizer, epochs=3, on_nonfinite="skip", progress=False)
        list(fs.train(model, pairs, nn.MSELoss(), optimizer, epochs=3, on_nonfinite="skip"))
    assert len(raised.value.details["skipped"]) == 6
    assert not optimizer.state


def test_weights_that_are_not_finite_stop_a_run_that_skips():
    """No other batch will do better."""
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    steps = fs.train(model, data(bad=None), nn.MSELoss(), optimizer, epochs=3, on_nonfinite="skip")
    with pytest.raises(fs.NonFiniteError, match="not finite before this step already") as raised:
        for _ in steps:
            with torch.no_grad():
                model[0].weight[0, 0] = torch.inf  # as an update may leave it
    assert raised.value.details["step"] == 2
    assert raised.value.details["parameters"] == {"count": 1, "of": 6, "names": ["0.weight"]}


def test_another_way_is_refused():
    model = network()
    with pytest.raises(fs.UsageError, match=r"on_nonfinite = 'skp' is not one of stop, skip .*did you mean 'skip'"):
        fs.TrainStep(model, nn.MSELoss(), torch.optim.AdamW(model.parameters()), on_nonfinite="skp")
