"""Bitwise comparison of weights, with the first difference by name."""

import copy

import torch


def twins(model):
    """Two models with equal weights and nothing shared."""
    return model, copy.deepcopy(model)


def assert_same_bits(left, right):
    """Every parameter and buffer of two models is equal, bit for bit."""
    ours, theirs = left.state_dict(), right.state_dict()
    assert ours.keys() == theirs.keys()
    for name in ours:
        difference = (ours[name].double() - theirs[name].double()).abs().max().item()
        assert torch.equal(ours[name], theirs[name]), f"{name} differs by up to {difference}"
