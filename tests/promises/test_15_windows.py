"""PAINS row 15: random windows without replacement, seekable: a pure function of (seed, epoch, position)."""

from itertools import islice

import numpy as np
import pytest
import torch

from fivestep.data.windows import Windows


def stream(tokens, **options):
    return Windows(tokens, block_size=8, batch_size=16, seed=3, **options)


@pytest.mark.parametrize("replacement", [False, True])
def test_jumping_equals_walking(tokens, replacement):
    windows = stream(tokens, replacement=replacement)
    for epoch in (0, 3):
        walked = list(windows.epoch(epoch))
        assert len(walked) == len(windows)
        for position in (0, 1, len(windows) - 1):
            xb, yb = next(windows.epoch(epoch, position))
            assert torch.equal(xb, walked[position][0])
            assert torch.equal(yb, walked[position][1])
            starts = windows.offsets(epoch, position)
            assert torch.equal(
                xb, torch.stack([torch.from_numpy(tokens[i : i + 8].astype(np.int64)) for i in starts])
            )


def test_an_epoch_covers_each_window_once(tokens):
    windows = stream(tokens)
    for epoch in range(3):
        starts = np.concatenate([windows.offsets(epoch, p) for p in range(len(windows))])
        assert len(starts) == windows.windows == len(np.unique(starts))
        covered = np.concatenate([np.arange(s, s + 8) for s in np.sort(starts)])
        assert len(np.unique(covered)) == len(covered), "no token is seen twice in an epoch"
        assert len(tokens) - len(covered) <= 16, "at most two windows' worth stay out"


def test_epochs_and_seeds_differ(tokens):
    first = [next(stream(tokens).epoch(epoch))[0] for epoch in range(4)]
    assert all(not torch.equal(first[0], other) for other in first[1:])
    other_seed = Windows(tokens, block_size=8, batch_size=16, seed=4)
    assert not torch.equal(next(other_seed.epoch(0))[0], first[0])


def test_reading_moves_no_generator(tokens):
    before = torch.get_rng_state()
    numpy_before = np.random.get_state()[1].copy()
    list(islice(stream(tokens).epoch(0), 5))
    assert torch.equal(torch.get_rng_state(), before)
    assert np.array_equal(np.random.get_state()[1], numpy_before)
