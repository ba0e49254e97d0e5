"""The engine ends with bitwise the weights of the plain loops (same machine, versions and thread count)."""

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import fivestep as fs
from fivestep.data.segments import Segments
from fivestep.data.windows import Windows
from fivestep.models.bigram import Bigram
from fivestep.models.mlp import MLP
from fivestep.models.rnn import RNN
from fivestep.models.transformer import Transformer
from tests.same import assert_same_bits, twins
from tests.seeds import plain


def drained(steps):
    for _ in steps:
        pass


def trained(model, before):
    """Whether training changed the weights at all: an equality of untouched twins proves nothing."""
    return any(not torch.equal(a, b) for a, b in zip(model.parameters(), before, strict=True))


@pytest.mark.parametrize("cell", ["rnn_tanh", "rnn_relu", "lstm", "gru"])
def test_seed_000_recurrent(tokens, cell):
    ours, theirs = twins(RNN(29, n_embd=12, n_hidden=16, n_layer=2, cell=cell, dropout=0.2))
    before = [p.detach().clone() for p in ours.parameters()]
    torch.manual_seed(7)
    optimizer = torch.optim.SGD(theirs.parameters(), lr=1.0)
    plain.truncated_bptt(
        theirs, torch.from_numpy(tokens).long(), batch_size=4, bptt=35, epochs=2, optimizer=optimizer, clip=0.25
    )
    torch.manual_seed(7)
    optimizer = torch.optim.SGD(ours.parameters(), lr=1.0)
    drained(fs.train(ours, Segments(tokens, 4, 35), fs.TruncatedBPTT(), optimizer, epochs=2, clip_norm=0.25))
    assert trained(ours, before)
    assert_same_bits(ours, theirs)


def test_seed_000_transformer(tokens):
    ours, theirs = twins(Transformer(29, n_embd=16, n_head=2, n_hidden=24, n_layer=2, dropout=0.2))
    torch.manual_seed(7)
    optimizer = torch.optim.SGD(theirs.parameters(), lr=1.0)
    plain.truncated_bptt(
        theirs, torch.from_numpy(tokens).long(), batch_size=4, bptt=35, epochs=2, optimizer=optimizer, clip=0.25
    )
    torch.manual_seed(7)
    optimizer = torch.optim.SGD(ours.parameters(), lr=1.0)
    drained(fs.train(ours, Segments(tokens, 4, 35), fs.TruncatedBPTT(), optimizer, epochs=2, clip_norm=0.25))
    assert_same_bits(ours, theirs)


@pytest.mark.parametrize("entry", ["train", "fit", "TrainStep"])
@pytest.mark.parametrize(
    "batch_size, rows", [(32, 32 * 4 + 5), (64, 64 * 3 + 41), (64, 64 * 3 + 55), (41, 41 * 4), (55, 123)]
)
@pytest.mark.parametrize("loss", ["mse", "cross-entropy"])
def test_seed_001(entry, batch_size, rows, loss):
    features = torch.randn(rows, 16)
    labels = torch.randn(rows, 3) if loss == "mse" else torch.randint(0, 3, (rows,))
    criterion = nn.MSELoss() if loss == "mse" else nn.CrossEntropyLoss()
    ours, theirs = twins(MLP([16, 32, 3], dropout=0.1))
    before = [p.detach().clone() for p in ours.parameters()]

    def loader():
        return DataLoader(TensorDataset(features, labels), batch_size=batch_size, shuffle=True)

    torch.manual_seed(3)
    optimizer = torch.optim.SGD(theirs.parameters(), lr=0.1, momentum=0.9)
    plain.supervised(theirs, loader(), criterion=criterion, optimizer=optimizer, epochs=3)
    torch.manual_seed(3)
    optimizer = torch.optim.SGD(ours.parameters(), lr=0.1, momentum=0.9)
    if entry == "train":
        drained(fs.train(ours, loader(), criterion, optimizer, epochs=3))
    elif entry == "fit":
        fs.fit(ours, loader(), criterion, optimizer, epochs=3, progress=False)
    else:
        five, batches = fs.TrainStep(ours, criterion, optimizer), loader()
        for _ in range(3):
            ours.train()
            for batch in batches:
                five(batch)
    assert trained(ours, before)
    assert_same_bits(ours, theirs)


@pytest.mark.parametrize("replacement", [False, True])
def test_seed_002(tokens, replacement):
    ours, theirs = twins(Bigram(29))
    stream = Windows(tokens, block_size=8, batch_size=32, seed=5, replacement=replacement)
    per_epoch, max_iters = len(stream), 60
    offsets = [stream.offsets(i // per_epoch, i % per_epoch) for i in range(max_iters)]
    optimizer = torch.optim.AdamW(theirs.parameters(), lr=3e-4)
    plain.characters(theirs, torch.from_numpy(tokens).long(), offsets, block_size=8, optimizer=optimizer)
    optimizer = torch.optim.AdamW(ours.parameters(), lr=3e-4)
    drained(fs.train(ours, stream, fs.NextToken(), optimizer, max_iters=max_iters))
    assert max_iters > per_epoch, "the iterations must cross an epoch's edge"
    assert_same_bits(ours, theirs)


def test_seed_002_gradients_stay_readable(tokens):
    model = Bigram(29)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4)
    stream = Windows(tokens, block_size=8, batch_size=32)
    drained(fs.train(model, stream, fs.NextToken(), optimizer, max_iters=3))
    gradient = model.token_embedding_table.weight.grad
    xb, _ = next(stream.epoch(0, 2))
    assert sorted(gradient.abs().sum(1).nonzero().flatten().tolist()) == np.unique(xb).tolist()


def test_seed_001_epoch_average_is_weighted(tokens):
    """The seed's mean of batch means is not the epoch's mean when the last batch is short; ours is."""
    features, labels = torch.randn(10, 4), torch.randn(10, 1)
    labels[8:] += 100.0  # the short batch is the expensive one
    loader = DataLoader(TensorDataset(features, labels), batch_size=4)
    model = MLP([4, 1])
    expected = nn.MSELoss()(model(features), labels).item()
    frozen = torch.optim.SGD(model.parameters(), lr=0.0)
    (row,) = fs.fit(model, loader, nn.MSELoss(), frozen, epochs=1, progress=False)
    (plain_mean,) = plain.supervised(model, loader, criterion=nn.MSELoss(), optimizer=frozen, epochs=1)
    assert row["loss"] == pytest.approx(expected, rel=1e-6)
    assert abs(plain_mean - expected) > 100.0
    assert row["steps"] == 3


@pytest.mark.parametrize("forked", [True, False])
def test_seed_001_validation_draws_nothing(forked):
    """A plain loop that validates with a DataLoader draws a seed from torch's generator each time; ours does not."""
    rows = TensorDataset(torch.randn(24, 4), torch.randn(24, 1))
    ours, theirs = twins(nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.5), nn.Linear(8, 1)))
    loader, val = DataLoader(rows, batch_size=8, shuffle=True), DataLoader(rows, batch_size=8)
    torch.manual_seed(7)
    optimizer = torch.optim.SGD(theirs.parameters(), lr=0.1)
    for _ in range(3):
        plain.supervised(theirs, loader, criterion=nn.MSELoss(), optimizer=optimizer, epochs=1)
        with torch.random.fork_rng(enabled=forked):
            list(val)
    torch.manual_seed(7)
    optimizer = torch.optim.SGD(ours.parameters(), lr=0.1)
    fs.fit(ours, loader, nn.MSELoss(), optimizer, epochs=3, val=val, progress=False)
    assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), theirs.parameters(), strict=True)) == forked
