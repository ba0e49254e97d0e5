"""PAINS row 22: one clock, any unit: a trigger does not depend on how long an epoch is."""

from itertools import count, islice

import pytest
import torch
from torch import nn

import fivestep as fs
from fivestep.loop.clock import Clock
from fivestep.models.mlp import MLP
from fivestep.run.config import load_config


def batch(rows=4):
    return torch.randn(rows, 3), torch.randn(rows, 1)


def endless():
    while True:
        yield batch()


def fitted(data, **options):
    model = MLP([3, 1])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    return fs.fit(model, data, nn.MSELoss(), optimizer, progress=False, val=[batch()], **options)


def validated(history):
    return [row["step"] for row in history if row["split"] == "val"]


@pytest.mark.parametrize("batches", [7, 70, None])
def test_every_ten_steps(batches):
    data = endless() if batches is None else [batch() for _ in range(batches)]
    assert validated(fitted(data, max_iters=45, eval_every=10)) == [10, 20, 30, 40, 45]
    # The same in samples: 4 a batch.
    data = endless() if batches is None else [batch() for _ in range(batches)]
    assert validated(fitted(data, max_iters=45, eval_every="40smp")) == [10, 20, 30, 40, 45]


def test_epochs():
    data = [batch() for _ in range(7)]
    assert validated(fitted(data, epochs=4, eval_every="1ep")) == [7, 14, 21, 28]
    assert validated(fitted(data, epochs=4, eval_every="2ep")) == [14, 28]
    assert validated(fitted(data, epochs=2, eval_every=None)) == [14], "at the end in any case"


def test_evaluation_at_an_epochs_end_sees_that_epochs_weights():
    """Not those of the next epoch's first step."""
    model = MLP([3, 1])
    seen, weights = [], []

    def look(result, rows):
        weights.append([p.detach().clone() for p in model.parameters()])
        seen.extend((row["step"], len(weights) - 1) for row in rows if row["split"] == "val")

    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    unsized = (batch() for _ in count())  # no len(): the end of an epoch cannot be foreseen
    data = type("Unsized", (), {"__iter__": lambda self: islice(unsized, 5)})()
    fs.fit(model, data, nn.MSELoss(), optimizer, epochs=2, val=[batch()], progress=False, watchers=[look])
    assert [step for step, _ in seen] == [5, 10]
    for _, at in seen:
        assert all(torch.equal(a, b) for a, b in zip(weights[at], weights[at - 1], strict=True))


def test_tokens_and_limits(tokens):
    from fivestep.data.windows import Windows
    from fivestep.models.bigram import Bigram

    def run(**limits):
        model = Bigram(29)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        return list(fs.train(model, Windows(tokens, 8, 4), fs.NextToken(), optimizer, **limits))

    assert run(until="320tok")[-1].step == 10
    assert run(until="0.32ktok")[-1].step == 10
    assert run(until="40smp")[-1].step == 10
    assert run(until=10)[-1].step == 10
    assert run(until=10, max_iters=6)[-1].step == 6
    per_epoch = len(Windows(tokens, 8, 4))
    assert run(epochs=2, max_iters=10**6)[-1].step == 2 * per_epoch
    assert run(max_iters=0) == []
    assert 0 < run(until="0.05s")[-1].state.clock.seconds < 5


def test_a_generator_without_limit_is_endless():
    model = MLP([3, 1])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    steps = fs.train(model, [batch(), batch()], nn.MSELoss(), optimizer)
    assert [(r.step, r.epoch) for r in islice(steps, 5)] == [(1, 1), (2, 1), (3, 2), (4, 2), (5, 3)]


@pytest.mark.parametrize("text", ["", "0", "-5", "ten", "5 parsecs", "1.5ep", "2.5", "1e3", "5mins"])
def test_what_is_no_interval(text):
    with pytest.raises(fs.UsageError, match="eval_every"):
        fitted([batch()], epochs=1, eval_every=text)


def test_a_number_of_steps_may_be_written_short():
    data = [batch() for _ in range(7)]
    assert validated(fitted(data, max_iters="0.02k", eval_every=10)) == [10, 20]
    assert load_config("bigram", {"max_iters": "10k", "lens": "1k"}).max_iters == 10_000
    assert load_config("bigram", {"max_iters": "2k"}) == load_config("bigram", {"max_iters": 2000})
    for wrong in ("1ep", "10 Mtok", "many", "9" * 400, "1.5"):
        with pytest.raises(fs.UsageError, match="max_iters"):
            load_config("bigram", {"max_iters": wrong})
        with pytest.raises(fs.UsageError, match="max_iters"):
            fitted(data, max_iters=wrong)


@pytest.mark.parametrize("size", [(2**43, 0), (0, 2**70), (-1, 0)])
def test_a_size_that_no_checkpoint_holds_is_refused(size):
    class Sized(fs.Supervised):
        def size(self, batch):
            return size

    model = MLP([3, 1])
    with pytest.raises(fs.UsageError, match="samples"):
        fs.fit(
            model, [batch()], Sized(nn.MSELoss()), torch.optim.SGD(model.parameters(), 0.1), epochs=1, progress=False
        )


def test_a_clock_that_is_full_says_so():
    clock = Clock(tokens=2**63 - 3)
    clock.count(1, 2)
    with pytest.raises(fs.UsageError, match="must stay below"):
        clock.count(1, 1)
    assert (clock.samples, clock.tokens) == (1, 2**63 - 1)
