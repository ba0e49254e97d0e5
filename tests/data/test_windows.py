import time
import tracemalloc
from itertools import islice

import numpy as np
import pytest
import torch

from fivestep.data.mixture import Mixture
from fivestep.data.segments import Segments
from fivestep.data.tokens import open_tokens, write_tokens
from fivestep.data.windows import CoveringWindows, Windows
from fivestep.errors import UsageError

SHAPES = [(2, 1), (9, 8), (10, 8), (16, 8), (17, 8), (18, 8), (25, 8), (100, 8), (1000, 7), (5, 1)]


def tokens_of(length, dtype=np.uint16):
    return np.random.default_rng(length).integers(0, 200, length).astype(dtype)


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.int32, np.int64])
@pytest.mark.parametrize("replacement", [False, True])
def test_batches_are_the_stacked_slices_of_their_offsets(dtype, replacement):
    tokens, block = tokens_of(500, dtype), 8
    stream = Windows(tokens, block, batch_size=5, seed=3, replacement=replacement)
    for position, (xb, yb) in enumerate(stream.epoch(2)):
        offsets = stream.offsets(2, position)
        assert torch.equal(xb, torch.stack([torch.tensor(tokens[i : i + block].tolist()) for i in offsets]))
        assert torch.equal(yb, torch.stack([torch.tensor(tokens[i + 1 : i + 1 + block].tolist()) for i in offsets]))
        assert xb.dtype == yb.dtype == torch.int64 and xb.is_contiguous() and yb.is_contiguous()
    assert position == len(stream) - 1


@pytest.mark.parametrize(("length", "block"), SHAPES)
def test_an_epoch_passes_once_over_the_text(length, block):
    stream = Windows(np.zeros(length, np.uint8), block, batch_size=3)
    phases = set()
    for epoch in range(60):
        offsets = np.sort(np.concatenate([stream.offsets(epoch, p) for p in range(len(stream))]))
        assert len(offsets) == stream.windows == max(1, (length - 1) // block - 1)
        assert (np.diff(offsets) == block).all()  # side by side, without overlap
        assert 0 <= offsets[0] < block and offsets[-1] + block + 1 <= length
        assert length - 1 - len(offsets) * block <= 2 * block
        phases.add(int(offsets[0]))
    room = min(block, length - stream.windows * block)
    assert phases <= set(range(room)) and len(phases) >= min(room, 5)


@pytest.mark.parametrize("replacement", [False, True])
def test_seeking_gives_the_same_batches(replacement):
    stream = Windows(tokens_of(3000), 7, batch_size=4, seed=1, replacement=replacement)
    whole = list(stream.epoch(5))
    assert len(whole) == len(stream)
    for start in (0, 1, 50, len(stream) - 1, len(stream), len(stream) + 3):
        sought = list(stream.epoch(5, start))
        assert len(sought) == len(whole[start:])
        assert all(
            torch.equal(a, b) for s, w in zip(sought, whole[start:], strict=True) for a, b in zip(s, w, strict=True)
        )


def test_epochs_and_seeds_differ_and_iteration_is_epoch_0():
    tokens = tokens_of(3000)
    orders = {
        np.concatenate([Windows(tokens, 7, 4, seed).offsets(epoch, p) for p in range(20)]).tobytes()
        for seed in range(5)
        for epoch in range(5)
    }
    assert len(orders) == 25
    stream = Windows(tokens, 7, 4)
    assert all(torch.equal(a[0], b[0]) for a, b in zip(stream, stream.epoch(0), strict=True))


def test_the_last_batch_is_short_without_replacement_and_full_with():
    tokens = tokens_of(8 * 12 + 1)  # 12 windows fit, 11 are used
    sizes = {r: [len(xb) for xb, _ in Windows(tokens, 8, 4, replacement=r)] for r in (False, True)}
    assert sizes == {False: [4, 4, 3], True: [4, 4, 4]}


def test_replacement_reaches_every_start_about_equally():
    stream = Windows(np.zeros(21, np.uint8), 1, batch_size=100, replacement=True)
    starts = np.concatenate([stream.offsets(epoch, 0) for epoch in range(40)])
    counts = np.bincount(starts, minlength=20)
    assert len(counts) == 20 and ((counts - 200) ** 2 / 200).sum() / 19 < 2


@pytest.mark.parametrize("cls", [Windows, CoveringWindows])
@pytest.mark.parametrize("dtype", [np.uint16, np.int64])
def test_batches_never_alias_the_tokens_or_each_other(cls, dtype):
    tokens = tokens_of(50, dtype)
    before = tokens.copy()
    for xb, yb in cls(tokens, 4, 2):
        target = yb.clone()
        xb.fill_(-1)
        assert torch.equal(yb, target)
        yb.fill_(-1)
    assert np.array_equal(tokens, before)


def test_mapped_tokens_give_the_same_batches(tmp_path):
    tokens = tokens_of(300)
    write_tokens(tmp_path / "t", {"train": tokens}, {})
    mapped = open_tokens(tmp_path / "t").splits["train"]
    for a, b in zip(Windows(mapped, 8, 4), Windows(tokens, 8, 4), strict=True):
        assert torch.equal(a[0], b[0]) and torch.equal(a[1], b[1])


@pytest.mark.parametrize(("length", "block"), SHAPES)
@pytest.mark.parametrize("batch_size", [1, 3, 50])
def test_covering_windows_score_every_target_once(length, block, batch_size):
    tokens = np.arange(length, dtype=np.uint16)  # token i's only successor is i + 1
    stream = CoveringWindows(tokens, block, batch_size)
    xs, ys = zip(*stream.epoch(3), strict=True)
    assert len(xs) == len(stream) and all(x.shape[1] == block for x in xs)
    assert all(len(x) == batch_size for x in xs[:-1])
    x, y = torch.cat(xs).flatten(), torch.cat(ys).flatten()
    scored = y != -100
    assert y[scored].tolist() == list(range(1, length))
    assert torch.equal(x[scored], y[scored] - 1) and (x[~scored] == 0).all()
    assert len(x) - (length - 1) < block
    assert x.dtype == y.dtype == torch.int64 and xs[-1].is_contiguous()
    for start in range(len(stream) + 1):
        assert all(torch.equal(a[1], b) for a, b in zip(stream.epoch(0, start), ys[start:], strict=True))
    assert stream.offsets(0, len(stream) - 1)[-1] == (stream.windows - 1) * block


def test_bad_sizes_are_refused():
    with pytest.raises(UsageError, match=r"8 tokens.*--block-size 8 needs 9"):
        Windows(tokens_of(8), 8, 1)
    for cls in (Windows, CoveringWindows):
        with pytest.raises(UsageError, match="--batch-size 0"):
            cls(tokens_of(99), 8, 0)
        with pytest.raises(UsageError, match="--block-size 0"):
            cls(tokens_of(99), 0, 8)
    with pytest.raises(UsageError, match="2 tokens"):
        CoveringWindows(tokens_of(1), 8, 1)


class Counted:
    """Ids that take no memory: each is its position modulo 251. What a text of any length would be."""

    dtype = np.dtype(np.uint8)

    def __init__(self, length):
        self.length = length

    def __len__(self):
        return self.length

    def runs(self, begins, length):
        return ((begins[:, None] + np.arange(length)) % 251).astype(np.uint8)


def of(streams, length):
    return {
        "windows": lambda: Windows(Counted(length), 64, 32, seed=1),
        "mixture": lambda: Mixture({"a": Counted(length), "b": Counted(length // 3)}, [0.7, 0.3], 64, 32, seed=1),
        "segments": lambda: Segments(Counted(length), 32, 35),
    }[streams]()


@pytest.mark.parametrize("name", ["windows", "mixture", "segments"])
def test_a_billion_windows_take_the_memory_and_the_time_of_few(name):
    """Order, seek and batches of a text of 64 thousand million tokens: no array grows with it."""
    peaks, seconds = {}, {}
    for length in (10**6, 64_000_000_100):
        tracemalloc.start()
        begin = time.process_time()
        stream = of(name, length)
        assert length < 10**9 or name == "segments" or stream.windows >= 999_999_999
        for start in (0, len(stream) // 2, len(stream) - 40):
            batches = list(islice(stream.epoch(3, start), 40))
            assert len(batches) == 40 and len({batch[0].numpy().tobytes() for batch in batches}) == 40
        seconds[length], (_, peaks[length]) = time.process_time() - begin, tracemalloc.get_traced_memory()
        tracemalloc.stop()
    assert peaks[64_000_000_100] < 1.1 * peaks[10**6] + 100_000 < 5_000_000  # bytes; the order alone would be 8 GB
    assert seconds[64_000_000_100] < 3 * seconds[10**6] + 0.1
