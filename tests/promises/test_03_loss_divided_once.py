"""PAINS row 3: a step divides once, by the count of its whole window: gradients do not depend on the cut."""

import pytest
import torch
from torch import nn

import fivestep as fs
from fivestep.models.mlp import MLP
from tests.same import twins


def gradients(model, criterion, window):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    result = fs.TrainStep(model, criterion, optimizer)(*window)
    return torch.cat([p.grad.flatten() for p in model.parameters()]), result


def cut(features, labels, pieces):
    return list(zip(features.chunk(pieces), labels.chunk(pieces), strict=True))


def masked_labels(*shape, classes, masked):
    """Ragged: every row keeps another number of targets; with 8 rows in 8 pieces one piece keeps none at all."""
    labels = torch.randint(0, classes, shape)
    keep = torch.rand(shape) > masked
    keep[3] = False
    keep[0] = True
    return torch.where(keep, labels, -100)


CRITERIA = {
    "mse": (nn.MSELoss(), lambda: torch.randn(8, 5)),
    "cross-entropy": (nn.CrossEntropyLoss(), lambda: masked_labels(8, classes=5, masked=0.4)),
    "class weights": (
        nn.CrossEntropyLoss(weight=torch.tensor([0.1, 1.0, 2.0, 5.0, 0.5])),
        lambda: masked_labels(8, classes=5, masked=0.4),
    ),
    "a class of weight 0": (
        nn.CrossEntropyLoss(weight=torch.tensor([0.1, 1.0, 0.0, 5.0, 0.5])),
        lambda: torch.tensor([0, 1, 2, 2, 4, 2, 2, -100]),
    ),
    "label smoothing": (nn.CrossEntropyLoss(label_smoothing=0.2), lambda: masked_labels(8, classes=5, masked=0.4)),
    "probabilities": (nn.CrossEntropyLoss(), lambda: torch.rand(8, 5).softmax(1)),
    "function": (lambda outputs, labels: (outputs - labels).abs().sum(1).mean(), lambda: torch.randn(8, 5)),
}


@pytest.mark.parametrize("name", CRITERIA)
@pytest.mark.parametrize("pieces", [2, 4, 8])
def test_rows_in_any_cut(name, pieces):
    criterion, make = CRITERIA[name]
    model, twin = twins(MLP([6, 16, 5]).double())
    features, labels = torch.randn(8, 6, dtype=torch.float64), make()
    labels = labels.double() if labels.is_floating_point() else labels
    if getattr(criterion, "weight", None) is not None:
        criterion = criterion.double()
    whole, one = gradients(model, criterion, [(features, labels)])
    parts, many = gradients(twin, criterion, cut(features, labels, pieces))
    assert torch.allclose(whole, parts, rtol=1e-12, atol=1e-14)
    assert float(one.loss) == pytest.approx(float(many.loss), rel=1e-6)
    assert float(one.count) == pytest.approx(float(many.count))
    assert float(one.grad_norm) == pytest.approx(float(many.grad_norm), rel=1e-12)


@pytest.mark.parametrize("pieces", [2, 4, 8])
def test_tokens_with_ragged_masks(pieces):
    """8 sequences of 12 tokens whose masks differ: 1x8, 2x4, 4x2 and 8x1 micro-batches."""
    model, twin = twins(nn.Sequential(nn.Embedding(11, 8), nn.Linear(8, 11)).double())
    xb, yb = torch.randint(0, 11, (8, 12)), masked_labels(8, 12, classes=11, masked=0.5)
    whole, one = gradients(model, fs.NextToken(), [(xb, yb)])
    parts, many = gradients(twin, fs.NextToken(), cut(xb, yb, pieces))
    assert torch.allclose(whole, parts, rtol=1e-12, atol=1e-14)
    assert int(one.count) == int(many.count) == int((yb != -100).sum())


class Masked:
    """An objective of somebody's own, whose count is a tensor, and whose loss divides by it."""

    def count(self, batch):
        return batch[2].sum()

    def loss(self, model, batch, carry):
        features, labels, mask = batch
        losses = nn.functional.cross_entropy(model(features), labels, reduction="none")
        return (losses * mask).sum() / mask.sum(), None


def test_a_count_of_0_in_a_tensor():
    """The gradient of a mean over nothing is 0/0, of which no share of 0 makes 0."""
    model, twin = twins(MLP([6, 16, 5]).double())
    features, labels, mask = torch.randn(8, 6).double(), torch.arange(8) % 5, torch.tensor([1, 1, 0, 0, 1, 0, 1, 1.0])
    whole, one = gradients(model, Masked(), [(features, labels, mask)])
    parts, many = gradients(
        twin, Masked(), [(features[i : i + 2], labels[i : i + 2], mask[i : i + 2]) for i in range(0, 8, 2)]
    )
    assert torch.allclose(whole, parts, rtol=1e-12, atol=1e-14)
    assert float(one.loss) == pytest.approx(float(many.loss), rel=1e-6)
    assert float(one.grad_norm) == pytest.approx(float(many.grad_norm), rel=1e-12)


@pytest.mark.parametrize("ignored", [-100, 1], ids=["ignored", "of weight 0"])
@pytest.mark.parametrize("pieces", [1, 2])
def test_a_window_without_a_target_is_named(ignored, pieces):
    model, criterion = MLP([6, 16, 2]), nn.CrossEntropyLoss(weight=torch.tensor([1.0, 0.0]))
    before = [p.clone() for p in model.parameters()]
    with pytest.raises(fs.NonFiniteError, match="without a single target to learn from"):
        gradients(model, criterion, cut(torch.randn(8, 6), torch.full((8,), ignored), pieces))
    assert all(map(torch.equal, before, model.parameters()))


def test_the_mean_of_means_would_fail():
    """The planted fault: dividing by the number of micro-batches gives other gradients on these masks."""
    model, twin = twins(nn.Sequential(nn.Embedding(11, 8), nn.Linear(8, 11)).double())
    xb, yb = torch.randint(0, 11, (8, 12)), masked_labels(8, 12, classes=11, masked=0.5)
    whole, _ = gradients(model, fs.NextToken(), [(xb, yb)])
    rows = [4, 5, 6, 7]  # the masked row 3 is left out: its mean is 0/0
    for i in rows:
        logits = twin(xb[i : i + 1]).flatten(0, 1)
        (nn.functional.cross_entropy(logits, yb[i : i + 1].flatten()) / len(rows)).backward()
    naive = torch.cat([p.grad.flatten() for p in twin.parameters()])
    assert not torch.allclose(whole, naive, rtol=1e-3)


@pytest.mark.parametrize("rows", [41, 55, 64])
def test_a_single_batch_is_not_scaled(rows):
    """Bitwise the plain loop's gradient, where multiplying by n and dividing by n again would lose bits."""
    model, twin = twins(MLP([6, 16, 1]))
    features, labels = torch.randn(rows, 6), torch.randn(rows, 1)
    ours, _ = gradients(model, nn.MSELoss(), [(features, labels)])
    nn.MSELoss()(twin(features), labels).backward()
    assert torch.equal(ours, torch.cat([p.grad.flatten() for p in twin.parameters()]))
