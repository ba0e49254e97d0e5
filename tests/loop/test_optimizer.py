"""Optimizers by name, groups by name."""

from itertools import islice

import pytest
import torch
from torch import nn

import fivestep as fs
from fivestep.data.windows import Windows
from fivestep.loop.optimizer import build_muon, build_optimizer, freeze, hidden_matrices
from fivestep.models.bigram import Bigram
from fivestep.models.gpt import GPT
from fivestep.models.mlp import MLP
from fivestep.models.rnn import RNN
from tests.same import assert_same_bits, twins


def model():
    return nn.ModuleDict({"linear": nn.Linear(3, 2), "norm": nn.LayerNorm(2)})


def test_no_decay_by_name():
    optimizer = build_optimizer(model(), "adamw", 0.1, no_decay=["*.bias", "norm.*"], weight_decay=0.3)
    decayed, spared = optimizer.param_groups
    assert [tuple(p.shape) for p in decayed["params"]] == [(2, 3)]
    assert len(spared["params"]) == 3
    assert (decayed["weight_decay"], spared["weight_decay"]) == (0.3, 0.0)


@pytest.mark.parametrize(
    "name, kind", [("sgd", torch.optim.SGD), ("adam", torch.optim.Adam), ("adamw", torch.optim.AdamW)]
)
def test_by_name(name, kind):
    optimizer = build_optimizer(model(), name, 0.1)
    assert type(optimizer) is kind
    assert len(optimizer.param_groups) == 1
    assert optimizer.param_groups[0]["lr"] == 0.1


def test_frozen_parameters_are_left_out():
    network = model()
    network["norm"].requires_grad_(False)
    assert len(build_optimizer(network, "sgd", 0.1).param_groups[0]["params"]) == 2


def test_unknown():
    with pytest.raises(fs.UsageError, match=r"'adanw'.*sgd, adam, adamw.*did you mean 'adamw'"):
        build_optimizer(model(), "adanw", 0.1)


def test_muon_on_the_hidden_matrices_equals_a_loop_by_hand(tokens):
    ours, theirs = twins(GPT(29, block_size=8, n_layer=2, n_head=2, n_embd=16))
    options = {"weight_decay": 0.1, "no_decay": ["token*"], "betas": (0.9, 0.99)}
    optimizers = build_muon(ours, 0.02, 0.9, 0.003, **options)
    data = Windows(tokens, 8, 4, seed=1)
    assert sum(1 for _ in fs.train(ours, data, fs.NextToken(), optimizers, max_iters=6)) == 6
    muon = torch.optim.Muon(theirs.blocks.parameters(), 0.02, 0.1, 0.9, adjust_lr_fn="match_rms_adamw")
    groups = [
        {"params": [theirs.lm_head.weight]},
        {"params": [theirs.token_embedding_table.weight], "weight_decay": 0.0},
    ]
    adamw = torch.optim.AdamW(groups, lr=0.003, betas=(0.9, 0.99), weight_decay=0.1)
    for xb, yb in islice(data.epoch(0), 6):
        muon.zero_grad()
        adamw.zero_grad()
        nn.functional.cross_entropy(theirs(xb).flatten(0, 1), yb.flatten()).backward()
        muon.step()
        adamw.step()
    assert_same_bits(ours, theirs)


@pytest.mark.parametrize(
    "model, matrices",
    [
        (lambda: GPT(29, 8, 1, 2, 16), {"blocks"}),
        (lambda: GPT(29, 8, 1, 2, 16, tied=True), {"blocks"}),
        (lambda: RNN(29, 8, 12, 1, tied=True), {"rnn", "projection"}),
        (lambda: MLP([3, 8, 8, 1]), {"0", "3", "2", "layers", "net"}),
    ],
)
def test_hidden_matrices(model, matrices):
    made = model()
    names = hidden_matrices(made)
    assert names
    assert {name.split(".")[0] for name in names} <= matrices
    assert all(made.get_parameter(name).ndim == 2 for name in names)


def test_muon_refuses_a_model_without_hidden_matrices():
    with pytest.raises(fs.UsageError, match="--optimizer adamw"):
        build_muon(Bigram(7), 0.02, 0.9, 0.003, weight_decay=0.0)


def test_freeze():
    model = GPT(29, block_size=8, n_layer=2, n_head=2, n_embd=16)
    assert freeze(model, ["blocks.0.*", "lm_head*"]) == 12 * 16**2 + 29 * 16
    optimizer = build_optimizer(model, "adamw", 0.1)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    xb = torch.zeros(1, 4, dtype=torch.long)
    fs.TrainStep(model, fs.NextToken(), optimizer)((xb, xb))
    same = {name for name, p in model.named_parameters() if torch.equal(p, before[name])}
    assert {name for name in before if name.startswith(("blocks.0", "lm_head"))} <= same
    assert "token_embedding_table.weight" not in same
    with pytest.raises(fs.UsageError, match=r"freeze = 'block.0.\*' matches no parameter.*--freeze"):
        freeze(model, ["block.0.*"])
    freeze(model, ["*"])
    with pytest.raises(fs.UsageError, match="left to train"):
        build_optimizer(model, "adamw", 0.1)
