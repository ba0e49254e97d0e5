import re
import sys

import pytest
import torch

from fivestep.data.examples import Examples, digits, line
from fivestep.errors import UsageError
from fivestep.extras import installing

FEATURES, LABELS = torch.arange(46.0).view(23, 2), torch.arange(23)


@pytest.mark.parametrize("batch_size", [1, 5, 23, 100])
def test_an_epoch_holds_every_row_once_with_its_label(batch_size):
    stream = Examples(FEATURES, LABELS, batch_size, seed=4)
    batches = list(stream.epoch(3))
    assert len(batches) == len(stream)
    assert [len(y) for _, y in batches[:-1]] == [batch_size] * (len(batches) - 1)
    assert sorted(torch.cat([y for _, y in batches]).tolist()) == list(range(23))
    for position, (x, y) in enumerate(batches):
        assert torch.equal(x, FEATURES[y])
        assert stream.offsets(3, position).tolist() == y.tolist()
    for start in range(len(batches) + 2):
        assert [y.tolist() for _, y in stream.epoch(3, start)] == [y.tolist() for _, y in batches[start:]]


def test_order():
    orders = {
        tuple(torch.cat([y for _, y in Examples(FEATURES, LABELS, 4, seed).epoch(epoch)]).tolist())
        for seed in range(4)
        for epoch in range(4)
    }
    assert len(orders) == 16
    plain = Examples(FEATURES, LABELS, 4, shuffle=False)
    assert torch.cat([y for _, y in plain.epoch(9)]).tolist() == list(range(23))
    assert plain.offsets(0, 5).tolist() == [20, 21, 22]
    assert [y.tolist() for _, y in plain.epoch(1, 5)] == [[20, 21, 22]]
    assert [y.tolist() for _, y in plain] == [y.tolist() for _, y in plain.epoch(0)]


@pytest.mark.parametrize("shuffle", [False, True])
def test_batches_are_copies(shuffle):
    features = FEATURES.clone()
    for x, _ in Examples(features, LABELS, 5, shuffle=shuffle):
        x.fill_(-1)
    assert torch.equal(features, FEATURES)


def test_the_line_is_a_line():
    splits = line(examples=1003, noise=0.1, seed=1)
    assert {split: len(x) for split, (x, _) in splits.items()} == {"train": 802, "val": 100, "test": 101}
    x, y = splits["train"]
    assert x.dtype == y.dtype == torch.float32 and x.shape == y.shape == (802, 1) and x.abs().max() <= 1
    slope, intercept = torch.linalg.lstsq(torch.cat([x, torch.ones_like(x)], 1), y).solution.flatten().tolist()
    assert abs(slope - 2) < 0.03 and abs(intercept - 1) < 0.03
    assert abs((y - 2 * x - 1).std().item() - 0.1) < 0.01
    assert torch.equal(line(seed=1)["val"][0], line(seed=1)["val"][0])
    assert not torch.equal(line(seed=1)["val"][0], line(seed=2)["val"][0])


def test_the_line_leaves_torchs_generator_alone():
    before = torch.get_rng_state()
    line()
    assert torch.equal(before, torch.get_rng_state())


def test_digits():
    pytest.importorskip("sklearn", reason="scikit-learn is not installed")
    splits = digits()
    assert {split: x.shape for split, (x, _) in splits.items()} == {
        "train": (1437, 64),
        "val": (179, 64),
        "test": (181, 64),
    }
    x, y = (torch.cat(parts) for parts in zip(*splits.values(), strict=True))
    assert x.dtype == torch.float32 and y.dtype == torch.int64 and x.min() == 0 and x.max() == 1
    assert set(splits["val"][1].tolist()) == set(range(10))
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    rows = {(tuple(image), int(label)) for image, label in zip((images / 16).tolist(), labels, strict=True)}
    assert {(tuple(image), label) for image, label in zip(x.tolist(), y.tolist(), strict=True)} == rows
    assert not torch.equal(digits(seed=1)["val"][1], splits["val"][1])


def test_missing_scikit_learn_says_how_to_get_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(UsageError, match=re.escape(installing("digits"))):
        digits()


def test_bad_input_is_refused():
    with pytest.raises(UsageError, match="--batch-size"):
        Examples(FEATURES, LABELS, 0)
    for features, labels in [
        (FEATURES, LABELS[:-1]),
        (FEATURES[:0], LABELS[:0]),
        (torch.tensor(1.0), LABELS),
    ]:
        with pytest.raises(UsageError, match="rows"):
            Examples(features, labels, 4)
    with pytest.raises(UsageError, match="10 examples"):
        line(examples=9)
