"""Windows of several corpora: exact proportions, each corpus in its own order, and any position at once."""

import math
import time
from fractions import Fraction

import numpy as np
import pytest
import torch

from fivestep.data.mixture import BLOCK, InTurn, Mixture
from fivestep.data.order import interleaved
from fivestep.data.weights import as_sources, shares, weighted
from fivestep.data.windows import CoveringWindows
from fivestep.errors import UsageError

SIZES = {"wiki": 5000, "code": 900, "talk": 333}
WEIGHTS = [Fraction("0.7"), Fraction("0.25"), Fraction("0.05")]


def corpora(dtype=np.uint16):
    """Ids that say which corpus they are of: 1000s, 2000s, ..."""
    return {
        name: (np.arange(size) % 1000 + 1000 * n).astype(dtype) for n, (name, size) in enumerate(SIZES.items(), 1)
    }


def mixture(batch_size=8, **options):
    return Mixture(corpora(), WEIGHTS, 10, batch_size, **{"seed": 5, **options})


def drawn(stream, batches):
    """The corpus and the begin of each of the first windows."""
    epochs = -(-batches // len(stream))
    positions = [(epoch, position) for epoch in range(epochs) for position in range(len(stream))][:batches]
    owners, begins = zip(*(stream.chosen(*one) for one in positions), strict=True)
    return np.concatenate(owners), np.concatenate(begins)


@pytest.mark.parametrize("batch_size", [1, 7, 64, 3000])
def test_every_block_has_the_exact_proportions(batch_size):
    stream = mixture(batch_size)
    size = sum(stream.shares)
    assert stream.shares == [728, 260, 52] and size == 1040
    owners, _ = drawn(stream, -(-3 * size // batch_size))
    for block in range(3):
        part = owners[block * size : (block + 1) * size]
        assert np.bincount(part, minlength=3).tolist() == stream.shares
    assert len(set(owners[:40].tolist())) > 1  # not one corpus after the other
    assert not np.array_equal(owners[:size], owners[size : 2 * size])


@pytest.mark.parametrize("replacement", [False, True])
def test_the_windows_of_a_corpus_are_its_own_stream_epoch_after_epoch(replacement):
    stream = mixture(replacement=replacement)
    owners, begins = drawn(stream, 500)
    for number, own in enumerate(stream.streams):
        found = begins[owners == number]
        assert np.array_equal(found, own.draws(0, len(found)))
        if not replacement:
            assert len(found) > own.windows  # it went round
            in_order = np.concatenate([own.offsets(epoch, p) for epoch in range(99) for p in range(len(own))])
            assert np.array_equal(found, in_order[: len(found)])


def test_every_row_is_a_window_of_the_corpus_that_it_is_said_to_be_of():
    texts = list(corpora().values())
    stream = mixture()
    for position, (xb, yb) in enumerate(stream.epoch(1)):
        owners, begins = stream.chosen(1, position)
        whole = np.stack([texts[o][b : b + 11] for o, b in zip(owners, begins, strict=True)]).astype(np.int64)
        assert np.array_equal(xb, whole[:, :-1]) and np.array_equal(yb, whole[:, 1:])
        assert xb.dtype == yb.dtype == torch.int64 and xb.is_contiguous() and yb.is_contiguous()
        assert xb.shape == (8, 10)
        before = np.cumsum([0, *SIZES.values()])[owners]
        assert np.array_equal(stream.offsets(1, position), before + begins)
    assert position == len(stream) - 1 == -(-(498 + 88 + 32) // 8) - 1


@pytest.mark.parametrize("replacement", [False, True])
def test_any_position_is_reached_at_once_with_the_same_batches(replacement):
    stream = mixture(replacement=replacement)
    for epoch in (0, 3):
        whole = list(mixture(replacement=replacement).epoch(epoch))
        for start in range(len(stream) + 2):
            sought = list(mixture(replacement=replacement).epoch(epoch, start))
            assert len(sought) == len(whole[start:])
            assert all(
                torch.equal(a, b)
                for s, w in zip(sought, whole[start:], strict=True)
                for a, b in zip(s, w, strict=True)
            )


def test_a_seek_costs_the_same_anywhere():
    stream = mixture()
    next(stream.epoch(0))
    begin = time.process_time()
    next(stream.epoch(10**12, 3))
    assert time.process_time() - begin < 0.5  # it takes about 1 ms


def test_seeds_part_and_corpora_of_one_length_are_not_read_in_one_order():
    assert not np.array_equal(drawn(mixture(seed=1), 5)[1], drawn(mixture(seed=2), 5)[1])
    twins = Mixture({"a": np.arange(900), "b": np.arange(900)}, [1, 1], 10, 8)
    owners, begins = drawn(twins, 20)
    assert not np.array_equal(begins[owners == 0][:50], begins[owners == 1][:50])


def test_passes_are_counted_by_corpus():
    stream = mixture()
    windows = len(stream) * 8
    assert stream.passes() == pytest.approx(
        {"wiki": 0.7 * windows / 498, "code": 0.25 * windows / 88, "talk": 0.05 * windows / 32}
    )
    owners, _ = drawn(stream, 10 * len(stream))
    counted = np.bincount(owners) / [one.windows for one in stream.streams]
    assert list(stream.passes(10).values()) == pytest.approx(counted.tolist(), rel=0.02)


def test_interleaving_permutes_each_block_anew():
    owners = [interleaved([3, 1], block, seed=0).tolist() for block in range(200)]
    assert all(sorted(one) == [0, 0, 0, 1] for one in owners)
    counts = np.bincount([one.index(1) for one in owners], minlength=4)
    assert counts.min() > 25  # every place takes the rare one


def test_a_tiny_weight_is_drawn_too():
    """Rounding proportions to a block's size would lose it: its share is exact."""
    stream = Mixture({"a": np.arange(900), "b": np.arange(900)}, [0.9999, 0.0001], 10, 8)
    assert stream.shares == [9999, 1]
    assert np.bincount(drawn(stream, 1250)[0]).tolist() == [9999, 1]
    assert sum(Mixture({"a": np.arange(99), "b": np.arange(99)}, [1, 2], 10, 8).shares) >= BLOCK


def test_streams_in_turn_cover_each_once():
    texts = list(corpora().values())
    each = [CoveringWindows(text, 10, 4) for text in texts]
    stream = InTurn(each)
    whole = [batch for one in each for batch in one]
    assert len(stream) == len(whole) == len(list(stream))
    for start in range(len(stream) + 2):
        sought = list(stream.epoch(0, start))
        assert len(sought) == len(whole[start:])
        assert all(torch.equal(a[1], b[1]) for a, b in zip(sought, whole[start:], strict=True))
    assert sum(int((yb != -100).sum()) for _, yb in stream) == sum(len(text) - 1 for text in texts)


# --- weights ---


def test_weights_stand_behind_the_last_colon():
    assert weighted(["a.txt", "b"]) is None
    assert weighted(["wiki/:0.7", "s3://bucket/code:3e-1"]) == {
        "wiki/": Fraction(7, 10),
        "s3://bucket/code": Fraction(3, 10),
    }
    assert weighted(["a=b:c:1"]) == {"a=b:c": 1}
    assert as_sources({"wiki/": 0.7, "code": 2}) == ["wiki/:0.7", "code:2"]
    assert weighted(as_sources({"a": 1e-05, "b": 1e-05})) == {"a": Fraction(1, 10**5), "b": Fraction(1, 10**5)}


@pytest.mark.parametrize(
    ("sources", "message"),
    [
        (["a:0.5", "b"], "--data b has no weight, but others have: give each corpus a weight"),
        (["a:0", "b:1"], "above 0"),
        (["a:1", "a:2"], "--data a comes twice"),
        (["-:1", "a:2"], "standard input, which cannot be one of several"),
        (["a:0.12345", "b:0.87655"], "ratio 2469:17531, too fine to keep: round them"),
    ],
)
def test_bad_weights_are_told(sources, message):
    with pytest.raises(UsageError, match=message):
        weighted(sources)


def test_bad_tables_of_weights_are_told():
    for weight in (True, "0.5", -1, math.inf, math.nan, [1]):
        with pytest.raises(UsageError, match="is no weight: give each corpus"):
            as_sources({"a": weight})


def test_shares_are_the_smallest_whole_numbers():
    assert shares([0.7, 0.3]) == [7, 3] and shares([0.1, 0.2]) == [1, 2]  # 0.1 + 0.2 is not 0.3
    assert shares([6, 4, 2]) == [3, 2, 1] and shares([Fraction(1, 3), Fraction(2, 3)]) == [1, 2]
    assert shares([5]) == [1]
    for bad in ([], [0.0, 1.0], [-1, 2], [math.nan, 1], [math.inf]):
        with pytest.raises(UsageError, match="give each corpus a weight above 0"):
            shares(bad)


def test_bad_mixtures_are_told():
    with pytest.raises(UsageError, match="of the corpus b, the training split has 5 tokens"):
        Mixture({"a": np.arange(99), "b": np.arange(5)}, [1, 1], 10, 8)
    with pytest.raises(UsageError, match="2 corpora need as many weights; got 1"):
        Mixture({"a": np.arange(99), "b": np.arange(99)}, [1], 10, 8)
    with pytest.raises(UsageError, match="--seed"):
        Mixture({"a": np.arange(99)}, [1], 10, 8, seed=-1)
    with pytest.raises(UsageError, match="a mixture has no one text"):
        _ = mixture().tokens
    assert not hasattr(mixture(), "tokens")  # explain and doctor only look
