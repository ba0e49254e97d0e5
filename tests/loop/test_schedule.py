"""Warm-up, stable, decay: the formula, and weights bitwise equal to a loop that sets the rate by hand."""

from functools import partial

import pytest
import torch
from torch import nn

import fivestep as fs
from fivestep.loop.schedule import set_rate
from fivestep.models.mlp import MLP
from tests.same import assert_same_bits, twins

wsd = partial(fs.warmup_stable_decay, max_iters=20, decay_iters=8, warmup_iters=4, floor=0.1)


def test_the_formula():
    assert [wsd(k) for k in (0, 3, 4, 11, 12)] == [0.25, 1.0, 1.0, 1.0, 1.0]
    assert wsd(16) == pytest.approx(0.1 + 0.9 / 2)
    assert wsd(20) == wsd(400) == 0.1
    assert fs.warmup_stable_decay(90, max_iters=100, decay_iters=20) == 0.5
    assert fs.warmup_stable_decay(0, max_iters=100, decay_iters=100) == 1.0


def test_equal_to_a_loop_by_hand():
    generator = torch.Generator().manual_seed(0)
    data = [(torch.randn(4, 3, generator=generator), torch.randn(4, 1, generator=generator)) for _ in range(5)]
    ours, theirs = twins(MLP([3, 8, 1]))
    optimizer = torch.optim.AdamW(ours.parameters(), lr=0.05)
    steps = fs.train(ours, data, nn.MSELoss(), optimizer, scheduler=wsd, max_iters=20)
    rates = [result.learning_rate for result in steps]
    optimizer = torch.optim.AdamW(theirs.parameters(), lr=0.05)
    for step in range(20):
        rate = (step + 1) / 4 if step < 4 else 1.0 if step < 12 else 0.1 + 0.9 * (20 - step) / 8
        optimizer.param_groups[0]["lr"] = 0.05 * rate
        optimizer.zero_grad()
        x, y = data[step % 5]
        nn.functional.mse_loss(theirs(x), y).backward()
        optimizer.step()
        assert rates[step] == pytest.approx(0.05 * rate)
    assert rates[12] > rates[13] > rates[19]
    assert_same_bits(ours, theirs)


# --- several trainings with one optimizer ---


def falling(step):
    return 0.5**step


def pairs(n=3):
    generator = torch.Generator().manual_seed(0)
    return [(torch.randn(4, 3, generator=generator), torch.randn(4, 1, generator=generator)) for _ in range(n)]


def one_group(model):
    return [torch.optim.SGD(model.parameters(), lr=0.1)]


def a_tensor(model):
    return [torch.optim.Adam(model.parameters(), lr=torch.tensor(0.1))]


def two_groups_and_two_optimizers(model):
    first, *rest = model.parameters()
    groups = [{"params": rest[:1]}, {"params": rest[1:2], "lr": 0.04}]
    return [torch.optim.SGD([first], lr=0.1), torch.optim.AdamW([*groups, {"params": rest[2:]}], lr=0.01)]


def rates(optimizers):
    return [float(group["lr"]) for optimizer in optimizers for group in optimizer.param_groups]


def used_rates(model, optimizers, **options):
    """Return the rates of each update, of all groups."""
    found = []
    hooks = [optimizers[0].register_step_pre_hook(lambda *_: found.append(rates(optimizers)))]
    fs.fit(model, pairs(), nn.MSELoss(), optimizers, progress=False, **{"epochs": 1, **options})
    for hook in hooks:
        hook.remove()
    return found


@pytest.mark.parametrize("build", [one_group, a_tensor, two_groups_and_two_optimizers])
def test_each_fit_starts_at_the_base_rate_as_lambda_lr_does(build):
    model, twin = twins(MLP([3, 4, 1]))
    optimizers, theirs = build(model), build(twin)
    for _ in range(3):
        schedulers = [torch.optim.lr_scheduler.LambdaLR(one, falling) for one in theirs]
        right = []
        for _ in range(3):
            right.append(rates(theirs))
            for optimizer, scheduler in zip(theirs, schedulers, strict=True):
                optimizer.step()
                scheduler.step()
        for ours, one in zip(used_rates(model, optimizers, scheduler=falling), right, strict=True):
            assert ours == pytest.approx(one, rel=1e-6)


@pytest.mark.parametrize("build", [one_group, a_tensor, two_groups_and_two_optimizers])
def test_a_rate_set_by_hand_between_two_fits_is_the_new_base(build):
    model = MLP([3, 4, 1])
    optimizers = build(model)
    first = used_rates(model, optimizers, scheduler=falling)
    left = rates(optimizers)
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            set_rate(group, 0.3)
    assert used_rates(model, optimizers, scheduler=falling)[0] == pytest.approx([0.3] * len(left))
    assert used_rates(model, optimizers, scheduler=falling)[1] == pytest.approx([0.15] * len(left))
    assert first[0] != left


def test_a_rate_set_by_hand_counts_after_a_return_to_the_best_weights():
    model = MLP([3, 4, 1])
    (optimizer,) = one_group(model)
    five = fs.TrainStep(model, nn.MSELoss(), optimizer, scheduler=falling)
    five(pairs()[0])
    five.state.keep_best()
    five(pairs()[1])
    five.state.return_to_best()
    optimizer.param_groups[0]["lr"] = 0.3
    assert used_rates(model, [optimizer], scheduler=falling)[0] == [0.3]


def test_a_rate_set_by_hand_counts_where_the_training_goes_on():
    model = MLP([3, 4, 1])
    (optimizer,) = one_group(model)
    five = fs.TrainStep(model, nn.MSELoss(), optimizer, scheduler=falling)
    for batch in pairs():
        five(batch)
    going_on = fs.TrainStep(model, nn.MSELoss(), optimizer, scheduler=falling, state=five.state)
    assert going_on(pairs()[0]).learning_rate == pytest.approx(0.1 / 8)
    optimizer.param_groups[0]["lr"] = 0.8
    going_on = fs.TrainStep(model, nn.MSELoss(), optimizer, scheduler=falling, state=five.state)
    assert going_on(pairs()[0]).learning_rate == pytest.approx(0.8 / 16)


@pytest.mark.parametrize("scheduler", [None, falling])
def test_annealing_does_not_compound_where_an_update_fails(scheduler):
    model = MLP([3, 4, 1])

    class Fails(torch.optim.SGD):
        fails = False

        def step(self, closure=None):
            if self.fails:
                raise OSError("planted")
            return super().step(closure)

    optimizer = Fails(model.parameters(), lr=0.1)
    five = fs.TrainStep(model, nn.MSELoss(), optimizer, scheduler=scheduler)
    five.state.plateau.annealing = 0.5
    Fails.fails = True
    for _ in range(2):
        with pytest.raises(OSError, match="planted"):
            five(pairs()[0])
    assert rates([optimizer]) == pytest.approx([0.05])
    again = fs.TrainStep(model, nn.MSELoss(), optimizer, scheduler=scheduler)
    Fails.fails = False
    assert again(pairs()[0]).learning_rate == pytest.approx(0.1)


def test_a_scheduler_of_another_optimizer_is_refused():
    model = MLP([3, 4, 1])
    ours, other = one_group(model)[0], one_group(MLP([3, 4, 1]))[0]
    fits = torch.optim.lr_scheduler.StepLR(ours, 2)
    parts = [torch.optim.lr_scheduler.ConstantLR(other), torch.optim.lr_scheduler.StepLR(other, 2)]
    chained = torch.optim.lr_scheduler.SequentialLR(other, parts, [2])
    for wrong in (parts[1], chained, [fits, parts[0]]):
        with pytest.raises(fs.UsageError, match="belongs to another optimizer"):
            fs.TrainStep(model, nn.MSELoss(), ours, scheduler=wrong)
    fs.TrainStep(model, nn.MSELoss(), [ours], scheduler=[fits])
