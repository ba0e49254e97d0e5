"""Label smoothing: in training as torch has it, and off wherever a loss judges."""

from functools import partial

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import fivestep as fs
from fivestep.models.bigram import Bigram
from fivestep.models.mlp import MLP
from tests.same import assert_same_bits, twins


def batches(n=6):
    generator = torch.Generator().manual_seed(0)
    return [
        (torch.randn(7, 3, generator=generator), torch.randint(0, 5, (7,), generator=generator)) for _ in range(n)
    ]


@pytest.mark.parametrize(
    "criterion",
    [
        nn.CrossEntropyLoss(label_smoothing=0.2),
        partial(F.cross_entropy, label_smoothing=0.2),
        fs.Supervised(nn.CrossEntropyLoss(label_smoothing=0.2)),
    ],
)
def test_in_training_and_not_in_evaluation(criterion):
    ours, theirs = twins(MLP([3, 8, 5]))
    optimizer = torch.optim.SGD(ours.parameters(), lr=0.1)
    history = fs.fit(ours, batches(), criterion, optimizer, epochs=1, val=batches(), progress=False)
    optimizer = torch.optim.SGD(theirs.parameters(), lr=0.1)
    losses = []
    for x, y in batches():
        optimizer.zero_grad()
        loss = F.cross_entropy(theirs(x), y, label_smoothing=0.2)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert_same_bits(ours, theirs)
    train, val = history
    assert train["loss"] == pytest.approx(sum(losses) / 6)
    assert val["loss"] == fs.evaluate(theirs, batches(), nn.CrossEntropyLoss())["loss"]
    assert fs.evaluate(theirs, batches(), criterion)["loss"] == val["loss"]


def test_a_smoothed_loss_has_no_perplexity():
    model = Bigram(5)
    ids = torch.randint(0, 5, (3, 9))
    data = [(ids[:, :-1], ids[:, 1:])]
    objective = fs.NextToken(nn.CrossEntropyLoss(label_smoothing=0.1), chars_per_token=1.0)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    train, val = fs.fit(model, data, objective, optimizer, epochs=1, val=data, progress=False)
    assert "perplexity" not in train
    assert {"perplexity", "bits_per_char"} <= val.keys()
    assert objective.criterion.label_smoothing == 0.1  # the user's own object is as it was
