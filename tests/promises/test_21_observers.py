"""PAINS row 21: observers leave no trace: any cadence of evaluation and logging gives identical weights."""

import random

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

import fivestep as fs
from fivestep.data.windows import CoveringWindows, Windows
from fivestep.models.gpt import GPT
from fivestep.models.mlp import MLP
from tests.same import assert_same_bits, twins


class Noisy(Dataset):
    """A validation set that draws from every global generator."""

    def __len__(self):
        return 40

    def __getitem__(self, index):
        return torch.randn(6) + random.random() + np.random.rand(), torch.randint(0, 3, ()).long()


def train(model, eval_every, log_every, metrics=None):
    torch.manual_seed(11)
    loader = DataLoader(TensorDataset(torch.randn(90, 6), torch.randint(0, 3, (90,))), batch_size=8, shuffle=True)
    val = DataLoader(Noisy(), batch_size=7, shuffle=True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    fs.fit(
        model,
        loader,
        nn.CrossEntropyLoss(),
        optimizer,
        epochs=3,
        val=val if eval_every else None,
        eval_every=eval_every,
        log_every=log_every,
        metrics=metrics,
        progress=False,
    )


@pytest.mark.parametrize("eval_every, log_every", [(1, None), (5, 3), ("1ep", 1), ("64smp", 2), (None, 1)])
def test_any_cadence_same_weights(eval_every, log_every):
    network = nn.Sequential(nn.Linear(6, 32), nn.BatchNorm1d(32), nn.Dropout(0.5), nn.Linear(32, 3))
    quiet, watched = twins(network)
    train(quiet, None, None)
    train(watched, eval_every, log_every, metrics={"accuracy": fs.accuracy})
    assert_same_bits(quiet, watched)


def test_evaluation_restores_modes_and_generators():
    model = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 3))
    model[1].eval()  # frozen by the user
    modes = [module.training for module in model.modules()]
    buffers = {name: value.clone() for name, value in model.named_buffers()}
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()
    fs.evaluate(model, DataLoader(Noisy(), batch_size=7, shuffle=True), nn.CrossEntropyLoss())
    assert [module.training for module in model.modules()] == modes
    assert all(torch.equal(value, buffers[name]) for name, value in model.named_buffers())
    assert torch.equal(torch.get_rng_state(), states[0])
    assert random.getstate() == states[1]
    assert np.array_equal(np.random.get_state()[1], states[2])
    assert torch.is_grad_enabled()


def test_restored_when_evaluation_fails():
    model = nn.Sequential(nn.Linear(6, 3))
    before = torch.get_rng_state()
    with pytest.raises(RuntimeError, match="planted"):

        def failing(outputs, labels):
            torch.rand(3)
            raise RuntimeError("planted")

        fs.evaluate(model, DataLoader(Noisy(), batch_size=7, shuffle=True), failing)
    assert model.training
    assert torch.equal(torch.get_rng_state(), before)


def test_the_callers_body_may_look_and_sample(tokens):
    """Evaluation and sampling in the body of the caller's own loop, with dropout on."""
    from fivestep.models.generate import generate

    quiet, watched = twins(GPT(29, block_size=8, n_layer=1, n_head=2, n_embd=16, dropout=0.3))
    for model, looks in ((quiet, False), (watched, True)):
        torch.manual_seed(5)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        for _ in fs.train(model, Windows(tokens, 8, 4), fs.NextToken(), optimizer, max_iters=12):
            if looks:
                fs.evaluate(model, CoveringWindows(tokens[:100], 8, 4), fs.NextToken())
                generate(model, torch.tensor([1, 2]), 5)
    assert_same_bits(quiet, watched)


def test_frozen_modules_stay_in_eval():
    model = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 3))
    model[1].eval()
    loader = DataLoader(TensorDataset(torch.randn(20, 6), torch.randint(0, 3, (20,))), batch_size=10)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for result in fs.train(model, loader, nn.CrossEntropyLoss(), optimizer, epochs=3):
        assert [m.training for m in model] == [True, False, True, True]
        if result.step == 2:
            model.eval()  # the caller forgets to switch back at an epoch's end
    assert int(model[1].num_batches_tracked) == 0
    untouched = MLP([6, 3], dropout=0.5)
    untouched.eval()  # a whole model in eval() is put in training mode, as seed 001 has it
    next(iter(fs.train(untouched, loader, nn.CrossEntropyLoss(), torch.optim.SGD(untouched.parameters(), lr=0.1))))
    assert all(module.training for module in untouched.modules())
