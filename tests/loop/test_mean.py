"""Sums over counts: order, chunks, tensor counts, nothing, NaN."""

import math

import pytest
import torch

from fivestep.loop.mean import CHUNK, Mean


def test_weighted():
    mean = Mean()
    for value, count in ((1.0, 3), (2.0, 1)):
        mean.add(torch.tensor(value), count)
    assert mean.result() == 1.25
    assert mean.entries == 2


@pytest.mark.parametrize("tensors", [False, True])
def test_asking_early_changes_no_bit(tensors):
    values = torch.rand(3 * CHUNK + 17)
    counts = torch.randint(1, 50, values.shape)
    quiet, asked = Mean(), Mean()
    for i, (value, count) in enumerate(zip(values, counts, strict=True)):
        for mean in (quiet, asked):
            mean.add(value, count if tensors else int(count))
        if i % 7 == 0:
            asked.result()
    exact = math.fsum(v * c for v, c in zip(values.tolist(), counts.tolist(), strict=True)) / int(counts.sum())
    assert quiet.result() == asked.result() == pytest.approx(exact, rel=1e-12)


def test_nothing_and_nan():
    mean = Mean()
    assert math.isnan(mean.result())
    mean.add(torch.tensor(torch.nan), torch.tensor(0))  # the mean over no target at all is left out
    mean.add(torch.tensor(2.0), torch.tensor(4))
    assert mean.result() == 2.0
    mean.add(torch.tensor(torch.nan), torch.tensor(4))
    assert math.isnan(mean.result())


def test_saved_and_loaded():
    mean, other = Mean(), Mean()
    mean.add(torch.tensor(3.0), 2)
    other.load_state_dict(mean.state_dict())
    for one in (mean, other):
        one.add(torch.tensor(1.0), 1)
    assert mean.result() == other.result()
    mean.reset()
    assert mean.entries == 0
