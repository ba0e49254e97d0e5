"""PAINS row 16: averages are sums over counts, for uneven batches too."""

import pytest
import torch
import torchmetrics
from torch import nn

import fivestep as fs
from fivestep.data.segments import CoveringSegments
from fivestep.data.windows import CoveringWindows
from fivestep.models.bigram import Bigram
from fivestep.models.mlp import MLP

SIZES = [256, 256, 10]


def rows():
    features, labels = torch.randn(sum(SIZES), 4), torch.randint(0, 3, (sum(SIZES),))
    features[512:] *= 30.0  # the short batch is unlike the others
    return features, labels


def batches(features, labels):
    return list(zip(features.split(SIZES), labels.split(SIZES), strict=True))


def test_evaluation_equals_the_full_set():
    features, labels = rows()
    model = MLP([4, 3])
    figures = fs.evaluate(
        model,
        batches(features, labels),
        nn.CrossEntropyLoss(),
        metrics={
            "per_item": fs.accuracy,
            "batch_mean": lambda outputs, labels: (outputs.argmax(1) == labels).float().mean(),
            "torchmetrics": torchmetrics.classification.MulticlassAccuracy(num_classes=3, average="micro"),
        },
    )
    outputs = model(features)
    correct = (outputs.argmax(1) == labels).double().mean().item()
    assert figures["loss"] == pytest.approx(nn.CrossEntropyLoss()(outputs, labels).item(), rel=1e-5)
    assert figures["count"] == 522
    for name in ("per_item", "batch_mean", "torchmetrics"):
        assert figures[name] == pytest.approx(correct, rel=1e-6), name
    mean_of_means = sum(nn.CrossEntropyLoss()(model(x), y).item() for x, y in batches(features, labels)) / 3
    assert abs(mean_of_means - figures["loss"]) > 0.1, "the planted unevenness is too weak to tell"


@pytest.mark.parametrize("log_every", [None, 2])
def test_training_rows(log_every):
    features, labels = rows()
    model = MLP([4, 3])
    still = torch.optim.SGD(model.parameters(), lr=0.0)
    history = fs.fit(
        model,
        batches(features, labels),
        nn.CrossEntropyLoss(),
        still,
        epochs=2,
        log_every=log_every,
        progress=False,
    )
    expected = nn.CrossEntropyLoss()(model(features), labels).item()
    for row in history:
        if row["steps"] == 3:
            assert row["loss"] == pytest.approx(expected, rel=1e-5)
    assert sum(row["steps"] == 3 for row in history) == 2


@pytest.mark.parametrize("batch_size", [1, 3, 7])
def test_every_target_of_a_split_is_scored_once(tokens, batch_size):
    model = Bigram(29)
    ids = torch.from_numpy(tokens).long()
    with torch.no_grad():
        exact = nn.functional.cross_entropy(model(ids[:-1]).double(), ids[1:]).item()
    windows = fs.evaluate(model, CoveringWindows(tokens, 8, batch_size), fs.NextToken(), metrics={"a": fs.accuracy})
    segments = fs.evaluate(model, CoveringSegments(tokens, batch_size, 35), fs.TruncatedBPTT())
    assert windows["count"] == segments["count"] == len(tokens) - 1
    assert windows["loss"] == pytest.approx(exact, rel=1e-6)
    assert segments["loss"] == pytest.approx(exact, rel=1e-6)
    correct = (model(ids[:-1]).argmax(1) == ids[1:]).double().mean().item()
    assert windows["a"] == pytest.approx(correct, rel=1e-6), "padding must not count against a metric"


def test_nan_is_reported_as_nan():
    model = MLP([4, 3])
    with torch.no_grad():
        next(model.parameters()).fill_(torch.nan)
    figures = fs.evaluate(model, batches(*rows()), nn.CrossEntropyLoss())
    assert figures["loss"] != figures["loss"]
