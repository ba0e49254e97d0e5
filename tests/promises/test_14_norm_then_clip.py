"""PAINS row 14 (one process): the global norm, then clipping, then the step, with torch's own arithmetic."""

import pytest
import torch
from torch import nn

import fivestep as fs
from fivestep.models.mlp import MLP
from tests.same import assert_same_bits, twins


def batch():
    return torch.randn(32, 6) * 10, torch.randn(32, 2) * 10


@pytest.mark.parametrize("clip_norm, clip_value", [(None, None), (0.25, None), (None, 0.01), (0.5, 0.01)])
def test_equal_to_torch(clip_norm, clip_value):
    model, twin = twins(MLP([6, 32, 2]))
    groups = [{"params": [p for p in model.parameters() if p.ndim == dims]} for dims in (1, 2)]
    # The groups are in another order than the model; the norm is taken in the model's.
    ours = torch.optim.SGD(groups, lr=1e-4)
    theirs = torch.optim.SGD(twin.parameters(), lr=1e-4)
    five = fs.TrainStep(model, nn.MSELoss(), ours, clip_norm=clip_norm, clip_value=clip_value)
    for _ in range(5):
        features, labels = batch()
        result = five((features, labels))
        theirs.zero_grad()
        nn.MSELoss()(twin(features), labels).backward()
        norm = nn.utils.clip_grad_norm_(twin.parameters(), clip_norm or float("inf"))
        if clip_value:
            nn.utils.clip_grad_value_(twin.parameters(), clip_value)
        theirs.step()
        assert torch.equal(result.grad_norm, norm), "the logged norm is the one before clipping"
        if clip_norm:
            assert norm > clip_norm, "the test must clip"
    assert_same_bits(model, twin)


def test_the_norm_is_that_of_the_whole_window():
    model, twin = twins(MLP([6, 32, 2]).double())
    features, labels = (tensor.double() for tensor in batch())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    window = list(zip(features.split(5), labels.split(5), strict=True))
    result = fs.TrainStep(model, nn.MSELoss(), optimizer, clip_norm=0.25)(*window)
    nn.MSELoss()(twin(features), labels).backward()
    norm = nn.utils.clip_grad_norm_(twin.parameters(), 0.25)
    assert float(result.grad_norm) == pytest.approx(float(norm), rel=1e-12)
    clipped = torch.cat([p.grad.flatten() for p in model.parameters()])
    assert float(clipped.norm()) == pytest.approx(0.25, rel=1e-4)


def test_bf16_norm_is_near_float32():
    model, twin = twins(MLP([6, 32, 2]))
    features, labels = batch()
    norms = [
        fs.TrainStep(one, nn.MSELoss(), torch.optim.SGD(one.parameters(), lr=0.1), precision=precision)(
            (features, labels)
        ).grad_norm
        for one, precision in ((model, "fp32"), (twin, "bf16"))
    ]
    assert float(norms[0]) == pytest.approx(float(norms[1]), rel=0.02)
    assert not torch.equal(norms[0], norms[1]), "bf16 was not used"


def test_a_group_added_while_training_is_clipped():
    model = MLP([6, 32, 2])
    first, *rest = model.parameters()
    optimizer = torch.optim.SGD([first], lr=0.1)
    five = fs.TrainStep(model, nn.MSELoss(), optimizer, clip_norm=1e-3)
    five(batch())
    optimizer.add_param_group({"params": rest})
    five(batch())
    total = torch.cat([p.grad.flatten() for p in model.parameters()]).norm()
    assert float(total) == pytest.approx(1e-3, rel=1e-2)
