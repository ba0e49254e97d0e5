import time
from collections import Counter
from itertools import permutations

import numpy as np
import pytest

from fivestep.data.order import BLOCK, drawn, permuted, read
from fivestep.errors import UsageError

PERMUTED = [0, 2, 7, 5, 4, 6, 1, 3]
DRAWN = [737, 325, 596, 909, 542, 263, 837, 91]
SIZES = [1, 2, 3, 5, 16, 17, 63, 64, 65, 1000, 1025, 65537]


@pytest.mark.parametrize("n", SIZES)
def test_every_index_comes_once(n):
    for seed, epoch in [(0, 0), (0, 1), (7, 3)]:
        assert np.array_equal(np.sort(permuted(np.arange(n), n, seed, epoch)), np.arange(n))


def test_a_position_alone_goes_where_it_goes_among_others():
    whole = permuted(np.arange(1000), 1000, 5, 2)
    assert [int(permuted(np.array([p]), 1000, 5, 2)[0]) for p in (0, 1, 499, 999)] == [
        int(whole[p]) for p in (0, 1, 499, 999)
    ]
    assert np.array_equal(permuted(np.arange(1000).reshape(10, 100), 1000, 5, 2), whole.reshape(10, 100))


def test_seeds_and_epochs_part():
    orders = {permuted(np.arange(50), 50, seed, epoch).tobytes() for seed in range(20) for epoch in range(20)}
    assert len(orders) == 400


def test_the_order_is_the_same_on_every_machine_and_numpy():
    assert permuted(np.arange(8), 8, 0, 0).tolist() == PERMUTED
    assert drawn(0, 8, 1000, 0, 0).tolist() == DRAWN


@pytest.mark.parametrize("n", [3, 4])
def test_all_permutations_are_about_equally_likely(n):
    trials = 1500
    seen = Counter(tuple(permuted(np.arange(n), n, seed, 0).tolist()) for seed in range(trials))
    orders = list(permutations(range(n)))
    expected = trials / len(orders)
    chi_square = sum((seen[order] - expected) ** 2 / expected for order in orders)
    assert chi_square / (len(orders) - 1) < 3


@pytest.mark.parametrize("n", [10, 100])
def test_the_first_two_positions_are_uniform_over_seeds(n):
    trials = 3000
    pairs = np.array([permuted(np.arange(2), n, seed, epoch=1) for seed in range(trials)])
    steps = (pairs[:, 1] - pairs[:, 0]) % n - 1  # never equal: n - 1 steps are possible
    for values, bins in ((pairs[:, 0], n), (pairs[:, 1], n), (steps, n - 1)):
        counts = np.bincount(values, minlength=bins)
        assert len(counts) == bins
        assert ((counts - trials / bins) ** 2 / (trials / bins)).sum() / (bins - 1) < 2


@pytest.mark.parametrize("n", [10**9, 2**40])
def test_a_slice_of_a_huge_range_is_fast_and_has_no_repeats(n):
    begin = time.process_time()
    middle = permuted(np.arange(n // 2, n // 2 + 4096), n, 3, 4)
    assert time.process_time() - begin < 0.5  # it takes about 0.2 ms
    assert len(set(middle.tolist())) == 4096
    assert middle.min() >= 0 and middle.max() < n
    assert abs(middle.mean() / n - 0.5) < 0.03


def test_draws_depend_on_their_position_alone():
    whole = drawn(0, 3 * BLOCK, 777, 1, 2)
    for start, stop in [
        (0, 1),
        (5, 9),
        (BLOCK - 1, BLOCK + 1),
        (BLOCK, 2 * BLOCK),
        (2 * BLOCK + 7, 3 * BLOCK),
    ]:
        assert np.array_equal(drawn(start, stop, 777, 1, 2), whole[start:stop])
    assert drawn(4, 4, 777, 1, 2).size == 0
    assert not np.array_equal(whole, drawn(0, 3 * BLOCK, 777, 1, 3))
    assert not np.array_equal(whole[:BLOCK], whole[BLOCK : 2 * BLOCK])


def test_draws_are_uniform_with_repeats():
    counts = np.bincount(drawn(0, 50_000, 50, 9, 0), minlength=50)
    assert len(counts) == 50
    assert ((counts - 1000) ** 2 / 1000).sum() / 49 < 2


@pytest.mark.parametrize("replacement", [False, True])
@pytest.mark.parametrize("batch_size", [1, 7, 32, 5000])
def test_read_hands_out_the_same_order_from_any_start(batch_size, replacement):
    n = 9001
    direct = drawn(0, n, n, 1, 1) if replacement else permuted(np.arange(n), n, 1, 1)
    for start in (0, batch_size, 3 * batch_size):
        parts = list(read(n, batch_size, 1, 1, start=start, replacement=replacement))
        joined = np.concatenate(parts) if parts else np.empty(0, np.int64)
        assert np.array_equal(joined, direct[start:])
        assert all(len(part) == batch_size for part in parts[:-1])


def test_bad_input_is_refused():
    with pytest.raises(UsageError, match="--seed"):
        permuted(np.arange(3), 3, -1, 0)
    with pytest.raises(UsageError, match="--data"):
        next(read(0, 4, 0, 0, stop=4))
    with pytest.raises(IndexError, match="4"):
        permuted(np.array([4]), 4, 0, 0)
    with pytest.raises(IndexError):
        permuted(np.array([-1]), 4, 0, 0)
