"""Optimizers by name, groups by name."""

import pytest
import torch
from torch import nn

import fivestep as fs
from fivestep.loop.optimizer import build_optimizer


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
