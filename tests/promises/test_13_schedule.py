"""PAINS row 13: the learning rate is a function of completed updates."""

from functools import partial

import pytest
import torch
from torch import nn

import fivestep as fs
from fivestep.models.mlp import MLP


def data(batches=12):
    generator = torch.Generator().manual_seed(0)
    return [(torch.randn(4, 3, generator=generator), torch.randn(4, 1, generator=generator)) for _ in range(batches)]


def rates(scheduler, accumulate=1, pieces=1, **limits):
    model = MLP([3, 1])
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.5)
    made = scheduler(optimizer) if getattr(scheduler, "takes_optimizer", False) else scheduler
    batches = [(x[i::pieces], y[i::pieces]) for x, y in data() for i in range(pieces)]
    steps = fs.train(model, batches, nn.MSELoss(), optimizer, scheduler=made, accumulate=accumulate, **limits)
    return [result.learning_rate for result in steps]


cosine = partial(fs.warmup_cosine, max_iters=24, warmup_iters=5)


def test_invariant_to_accumulation():
    plain = rates(cosine, epochs=2)
    assert plain == [0.5 * cosine(k) for k in range(24)]
    assert rates(cosine, accumulate=4, pieces=4, epochs=2) == plain


def test_a_torch_scheduler_moves_once_an_update():
    def build(optimizer):
        return torch.optim.lr_scheduler.StepLR(optimizer, step_size=3, gamma=0.5)

    build.takes_optimizer = True
    assert rates(build, max_iters=9) == [0.5] * 3 + [0.25] * 3 + [0.125] * 3
    assert rates(build, accumulate=2, pieces=2, max_iters=9) == [0.5] * 3 + [0.25] * 3 + [0.125] * 3


def test_a_torch_scheduler_by_epoch():
    model = MLP([3, 1])
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, gamma=0.5)
    steps = fs.train(model, data(3), nn.MSELoss(), optimizer, epochs=3, scheduler=scheduler, scheduler_every="1ep")
    assert [result.learning_rate for result in steps] == [1.0] * 3 + [0.5] * 3 + [0.25] * 3


def test_a_stopped_update_moves_nothing():
    """A non-finite batch raises before the update: neither the clock nor the schedule has moved."""
    model = MLP([3, 1])
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, gamma=0.5)
    five = fs.TrainStep(model, nn.MSELoss(), optimizer, scheduler=scheduler)
    good, bad = data(1)[0], (torch.full((4, 3), torch.inf), torch.zeros(4, 1))
    five(good)
    before = [p.detach().clone() for p in model.parameters()]
    with pytest.raises(fs.NonFiniteError, match="step 2"):
        five(bad)
    assert five.state.clock.step == 1
    assert optimizer.param_groups[0]["lr"] == 0.5
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), before, strict=True))
    assert five(good).step == 2


@pytest.mark.parametrize("kind", ["function", "torch"])
def test_the_trace_continues_after_a_resume(kind):
    def start(saved=None):
        model = MLP([3, 1])
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.5)
        lambdas = torch.optim.lr_scheduler.LambdaLR
        scheduler = cosine if kind == "function" else lambdas(optimizer, cosine)
        state = fs.TrainStep(model, nn.MSELoss(), optimizer, scheduler=scheduler).state
        if saved:
            state.load_state_dict(saved)
        return fs.train(model, data(), nn.MSELoss(), optimizer, scheduler=scheduler, epochs=2, state=state)

    whole = [result.learning_rate for result in start()]
    steps = start()
    first = [next(steps) for _ in range(7)]
    rest = start(first[-1].state.state_dict())
    assert [r.learning_rate for r in first] + [r.learning_rate for r in rest] == whole


def test_formulas():
    assert fs.warmup_cosine(0, max_iters=100, warmup_iters=10) == 0.1
    assert fs.warmup_cosine(9, max_iters=100, warmup_iters=10) == 1.0
    assert fs.warmup_cosine(10, max_iters=100, warmup_iters=10) == 1.0
    assert fs.warmup_cosine(55, max_iters=100, warmup_iters=10) == pytest.approx(0.5)
    assert fs.warmup_cosine(100, max_iters=100, floor=0.1) == pytest.approx(0.1)
    assert fs.warmup_cosine(500, max_iters=100, floor=0.1) == pytest.approx(0.1)
    assert fs.warmup_linear(60, max_iters=110, warmup_iters=10) == pytest.approx(0.5)
    assert fs.warmup_linear(110, max_iters=110, warmup_iters=10) == 0.0
