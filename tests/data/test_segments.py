import numpy as np
import pytest
import torch

from fivestep.data.segments import CoveringSegments, Segments
from fivestep.errors import UsageError


def batchify(data, batch_size):
    """word_language_model's main.py, as written there."""
    nbatch = data.size(0) // batch_size
    data = data.narrow(0, 0, nbatch * batch_size)
    return data.view(batch_size, -1).t().contiguous()


def get_batch(source, i, bptt):
    seq_len = min(bptt, len(source) - 1 - i)
    return source[i : i + seq_len], source[i + 1 : i + 1 + seq_len].view(-1)


@pytest.mark.parametrize(
    ("length", "batch_size", "bptt"), [(1000, 20, 35), (101, 4, 5), (8, 4, 9), (36, 1, 35), (37, 1, 35)]
)
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.int64])
def test_batches_are_those_of_word_language_model(length, batch_size, bptt, dtype):
    tokens = np.random.default_rng(0).integers(0, 200, length).astype(dtype)
    source = batchify(torch.tensor(tokens.tolist()), batch_size)
    plain = [get_batch(source, i, bptt) for i in range(0, source.size(0) - 1, bptt)]
    stream = Segments(tokens, batch_size, bptt)
    for epoch in (0, 4):
        ours = list(stream.epoch(epoch))
        assert len(ours) == len(plain) == len(stream)
        for (data, target), (plain_data, plain_target) in zip(ours, plain, strict=True):
            assert torch.equal(data, plain_data) and torch.equal(target, plain_target)
            assert data.dtype == target.dtype == torch.int64 and data.is_contiguous() and target.is_contiguous()
    for start in range(len(plain) + 2):
        sought = list(stream.epoch(1, start))
        assert [data.tolist() for data, _ in sought] == [data.tolist() for data, _ in plain[start:]]


@pytest.mark.parametrize("cls", [Segments, CoveringSegments])
@pytest.mark.parametrize("batch_size", [1, 3])
def test_batches_never_alias_the_tokens_or_each_other(cls, batch_size):
    tokens = np.arange(50)
    for data, target in cls(tokens, batch_size, 4):
        before = target.clone()
        data.fill_(-1)
        assert torch.equal(target, before)
        target.fill_(-1)
    assert np.array_equal(tokens, np.arange(50))


@pytest.mark.parametrize("cls", [Segments, CoveringSegments])
def test_a_column_goes_on_where_it_ended(cls):
    stream = cls(np.arange(200), 4, 7)
    previous = None
    for position, (data, _) in enumerate(stream):
        assert data[0].tolist() == [o if o < 199 else 0 for o in stream.offsets(0, position).tolist()]
        assert previous is None or data[0, 0] == previous[-1, 0] + 1
        previous = data


@pytest.mark.parametrize("length", [2, 3, 5, 6, 20, 21, 22, 100, 397])
@pytest.mark.parametrize("batch_size", [1, 4, 20])
@pytest.mark.parametrize("bptt", [1, 5, 35])
def test_covering_segments_score_every_target_once(length, batch_size, bptt):
    stream = CoveringSegments(np.arange(length, dtype=np.uint16), batch_size, bptt)
    batches = list(stream.epoch(1))
    assert len(batches) == len(stream)
    scored = []
    for data, target in batches:
        assert data.shape[1] == min(batch_size, length - 1) and target.shape == (data.numel(),)
        assert data.is_contiguous() and data.dtype == target.dtype == torch.int64
        real = target != -100
        assert real.any()  # a mean over the batch is never 0 / 0
        assert torch.equal(data.flatten()[real], target[real] - 1) and (data.flatten()[~real] == 0).all()
        scored += target[real].tolist()
    assert sorted(scored) == list(range(1, length))
    assert [d.shape[0] for d, _ in batches[:-1]] == [bptt] * (len(batches) - 1)
    for start in range(len(batches) + 1):
        sought = [target.tolist() for _, target in stream.epoch(0, start)]
        assert sought == [target.tolist() for _, target in batches[start:]]


def test_bad_sizes_are_refused():
    with pytest.raises(UsageError, match="7 tokens, but --batch-size 4 columns need at least 8"):
        Segments(np.arange(7), 4, 5)
    with pytest.raises(UsageError, match="2 tokens"):
        CoveringSegments(np.arange(1), 4, 5)
    for cls in (Segments, CoveringSegments):
        with pytest.raises(UsageError, match="--batch-size 0"):
            cls(np.arange(99), 0, 5)
        with pytest.raises(UsageError, match="--bptt 0"):
            cls(np.arange(99), 5, 0)
