"""PAINS row 4: the last, partial accumulation window is stepped, and divided by what it holds."""

import pytest
import torch
from torch import nn

import fivestep as fs
from fivestep.models.mlp import MLP
from tests.same import twins


def test_seven_batches_accumulate_four():
    model, twin = twins(MLP([3, 1]).double())
    sizes = [5, 5, 5, 5, 5, 5, 2]  # the last batch is short as well
    batches = [(torch.randn(n, 3).double(), torch.randn(n, 1).double()) for n in sizes]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    steps = list(fs.train(model, batches, nn.MSELoss(), optimizer, epochs=2, accumulate=4))
    assert [result.step for result in steps] == [1, 2, 3, 4]
    assert [int(result.count) for result in steps] == [20, 12, 20, 12]

    for _ in range(2):
        for window in (batches[:4], batches[4:]):
            features = torch.cat([x for x, _ in window])
            labels = torch.cat([y for _, y in window])
            gradients = torch.autograd.grad(((twin(features) - labels) ** 2).mean(), list(twin.parameters()))
            with torch.no_grad():
                for parameter, gradient in zip(twin.parameters(), gradients, strict=True):
                    parameter -= 0.1 * gradient
    for ours, by_hand in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.allclose(ours, by_hand, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("batches, accumulate, steps", [(7, 4, 2), (8, 4, 2), (3, 4, 1), (1, 1, 1), (9, 2, 5)])
def test_no_batch_is_dropped(batches, accumulate, steps):
    seen = []

    class Watching(nn.Linear):
        def forward(self, features):
            seen.extend(features[:, 0].tolist())
            return super().forward(features)

    model = Watching(1, 1)
    data = [(torch.full((2, 1), float(i)), torch.zeros(2, 1)) for i in range(batches)]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    history = fs.fit(model, data, nn.MSELoss(), optimizer, epochs=1, accumulate=accumulate, progress=False)
    assert seen == [float(i) for i in range(batches) for _ in range(2)]
    assert history[-1]["step"] == steps
