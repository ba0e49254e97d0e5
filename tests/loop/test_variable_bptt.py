"""Segments of varying length, the learning rate with them: against a plain loop over the same cuts."""

from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import nn

import fivestep as fs
from fivestep.data.segments import MIN_LENGTH, Segments, longest, variable_lengths
from fivestep.models.rnn import RNN
from fivestep.run.build import build_model
from fivestep.run.config import load_config
from tests.same import assert_same_bits, twins


def segments(tokens):
    return Segments(tokens, 4, 12, variable=True, seed=3)


def test_equal_to_a_loop_by_hand(tokens):
    """Merity et al. 2018: SGD whose rate is scaled by seq_len / bptt in each step."""
    ours, theirs = twins(RNN(29, 8, 12, 2, dropout=0.2))
    torch.manual_seed(1)
    optimizer = torch.optim.SGD(ours.parameters(), lr=2.0)
    objective = fs.TruncatedBPTT(bptt=12)
    steps = fs.train(ours, segments(tokens), objective, optimizer, epochs=3, clip_norm=0.25)
    rates = [result.learning_rate for result in steps]
    assert optimizer.param_groups[0]["lr"] == 2.0  # the scale is each step's own

    torch.manual_seed(1)
    source = torch.from_numpy(tokens.astype(np.int64))[: 500 * 4].view(4, 500).t().contiguous()
    optimizer, criterion, by_hand = torch.optim.SGD(theirs.parameters(), lr=2.0), nn.CrossEntropyLoss(), []
    for epoch in range(3):
        hidden = theirs.init_hidden(4)
        cuts = segments(tokens).cuts(epoch).tolist()
        for begin, end in pairwise(cuts):
            optimizer.param_groups[0]["lr"] = 2.0 * ((end - begin) / 12)
            by_hand.append(optimizer.param_groups[0]["lr"])
            optimizer.zero_grad()
            output, hidden = theirs(source[begin:end], tuple(h.detach() for h in hidden))
            criterion(output.view(-1, 29), source[begin + 1 : end + 1].reshape(-1)).backward()
            nn.utils.clip_grad_norm_(theirs.parameters(), 0.25)
            optimizer.step()
    assert rates == by_hand
    assert len(set(rates)) > 5
    assert_same_bits(ours, theirs)


def test_an_epoch_holds_every_target_once_and_each_is_cut_elsewhere(tokens):
    stream = segments(tokens)
    assert not np.array_equal(stream.cuts(0), stream.cuts(1))
    for epoch in (0, 1, 7):
        batches = list(stream.epoch(epoch))
        assert len(batches) == stream.batches_in(epoch)
        data = torch.cat([data for data, _ in batches])
        targets = torch.cat([target.view(-1, 4) for _, target in batches])
        assert data.shape == targets.shape == (499, 4)
        columns = torch.from_numpy(tokens.astype(np.int64))[:2000].view(4, 500).t()
        assert torch.equal(data, columns[:-1])
        assert torch.equal(targets, columns[1:])
        for start in (0, 1, 9, len(batches)):
            rest = list(segments(tokens).epoch(epoch, start))
            assert all(torch.equal(a[0], b[0]) for a, b in zip(batches[start:], rest, strict=True))


def test_lengths():
    lengths = variable_lengths(70, 20_000, seed=0, epoch=0)
    assert lengths.min() >= MIN_LENGTH
    short = lengths < 52
    assert 0.045 < short.mean() < 0.055
    assert abs(lengths[~short].mean() - 69.5) < 0.3  # a fraction of a token is cut off
    assert abs(lengths[~short].std() - 5) < 0.2
    assert variable_lengths(10, 1000, 0, 0).min() == MIN_LENGTH
    assert np.array_equal(lengths[:50], variable_lengths(70, 20_000, 0, 0)[:50])


def test_resumed_at_every_step(tokens):
    def start(saved=None):
        torch.manual_seed(0)
        model = RNN(29, 8, 12, 1)
        optimizer, objective = torch.optim.AdamW(model.parameters(), lr=0.01), fs.TruncatedBPTT(bptt=12)
        state = fs.TrainStep(model, objective, optimizer).state
        if saved:
            state.load_state_dict(saved)
        data = Segments(tokens[:400], 4, 12, variable=True, seed=3)
        return fs.train(model, data, objective, optimizer, epochs=2, state=state)

    whole = [float(result.loss) for result in start()]
    for cut in range(1, len(whole)):
        steps = start()
        for _ in range(cut):
            saved = next(steps)
        rest = [float(result.loss) for result in start(saved.state.state_dict())]
        assert rest == whole[cut:]


def test_fit_counts_its_epochs(tokens):
    stream = segments(tokens)
    model = RNN(29, 8, 12, 1)
    history = fs.fit(
        model,
        stream,
        fs.TruncatedBPTT(bptt=12),
        torch.optim.SGD(model.parameters(), lr=0.1),
        epochs=3,
        accumulate=2,
        progress=False,
    )
    assert [row["steps"] for row in history] == [-(-stream.batches_in(epoch) // 2) for epoch in range(3)]
    assert [row["epoch"] for row in history] == [1, 2, 3]


@pytest.mark.parametrize("rows", [2, 3, 5, 6, 7])
def test_short_texts(tokens, rows):
    stream = Segments(tokens[: rows * 4], 4, 12, variable=True)
    assert sum(len(data) for data, _ in stream) == rows - 1


def test_no_segment_is_longer_than_promised():
    """The draws have a largest number, and so has a length; a transformer's positions reach that far."""
    assert longest(35) == 35 + 34
    assert max(variable_lengths(35, 200_000, seed, 0).max() for seed in range(5)) <= longest(35)
    config = load_config("transformer-words", {"variable_bptt": True, "bptt": 12})
    assert build_model(config, 29, 29).position_table.shape[0] == longest(12)


def test_a_short_base_is_refused(tokens):
    with pytest.raises(fs.UsageError, match="--bptt 10 or more"):
        Segments(tokens, 4, 9, variable=True)
