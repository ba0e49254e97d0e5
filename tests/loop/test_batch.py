"""What a batch is made of: it keeps its kind where nothing of it moves."""

import pytest
import torch
from torch import nn

import fivestep as fs
from fivestep.loop.batch import to_device


class Attributes(dict):
    """A dict whose entries are attributes too."""

    def __getattr__(self, name):
        try:
            return self[name]
        except KeyError:
            raise AttributeError(name) from None


class Pair(tuple):
    """A tuple with a constructor of its own."""

    def __new__(cls, one, other):
        return super().__new__(cls, (one, other))


class Triple(list):
    """A list with a constructor of its own."""

    def __init__(self, one, two, three):
        super().__init__([one, two, three])


X, Y = torch.randn(4, 3), torch.randn(4, 1)


@pytest.mark.parametrize("batch", [Attributes(x=X, y=Y), Pair(X, Y), Triple(X, Y, [X]), {"x": Pair(X, "name")}])
def test_a_batch_that_is_there_already_is_itself(batch):
    assert to_device(batch, torch.device("cpu")) is batch


def test_what_is_elsewhere_moves():
    moved = to_device({"x": [X], "n": 3}, torch.device("meta"))
    assert moved["x"][0].is_meta and moved["n"] == 3


class OwnLoss:
    """Reads a batch by attributes."""

    def count(self, batch):
        return len(batch.y)

    def loss(self, model, batch, carry):
        return nn.functional.mse_loss(model(batch.x), batch.y), None


def test_an_objective_reads_a_batch_of_its_own_kind():
    model = nn.Linear(3, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    assert [one.step for one in fs.train(model, [Attributes(x=X, y=Y)], OwnLoss(), optimizer, max_iters=2)] == [1, 2]
