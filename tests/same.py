"""Bitwise comparison of weights, with the first difference by name."""

import copy
import struct

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


def assert_same_tree(left, right, place=""):
    """Equal bit for bit, and of the same kinds."""
    assert type(left) is type(right), place
    if isinstance(left, torch.Tensor):
        assert (left.dtype, left.shape) == (right.dtype, right.shape), place
        bits = [one.contiguous().reshape(-1).view(torch.uint8) for one in (left, right)]
        assert torch.equal(*bits), place
    elif isinstance(left, dict):
        assert list(left) == list(right), place
        for key in left:
            assert_same_tree(left[key], right[key], f"{place}.{key}")
    elif isinstance(left, list | tuple):
        assert len(left) == len(right), place
        for i, (one, other) in enumerate(zip(left, right, strict=True)):
            assert_same_tree(one, other, f"{place}.{i}")
    elif isinstance(left, float):
        assert struct.pack("d", left) == struct.pack("d", right), place
    else:
        assert left == right, place
