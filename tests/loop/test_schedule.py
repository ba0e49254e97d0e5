"""Warm-up, stable, decay: the formula, and weights bitwise equal to a loop that sets the rate by hand."""

from functools import partial

import pytest
import torch
from torch import nn

import fivestep as fs
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
