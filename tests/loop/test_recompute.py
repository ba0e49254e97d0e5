"""Activation checkpointing: less is kept, the same bits, and nothing is left in the model."""

import numpy as np
import pytest
import torch
from torch import nn

import fivestep as fs
from fivestep.data.windows import Windows
from fivestep.loop.recompute import Recomputed
from fivestep.models.gpt2 import GPT2
from tests.same import assert_same_bits


def made():
    torch.manual_seed(3)
    model = GPT2(31, block_size=16, n_layer=3, n_head=2, n_embd=16, dropout=0.2)
    return model, Windows(np.arange(900) % 31, 16, 6, seed=1), fs.NextToken(), torch.optim.AdamW(model.parameters())


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_same_bits_with_dropout(precision):
    models, losses = [], []
    for twice in (False, True):
        models.append((parts := made())[0])
        how = {"accumulate": 2, "clip_norm": 0.5, "precision": precision, "activation_checkpointing": twice}
        losses.append([float(info.loss) for info in fs.train(*parts, max_iters=4, **how)])
    assert losses[0] == losses[1]
    assert_same_bits(*models)


def test_less_is_kept():
    def kept(twice):
        model, data, criterion, optimizer = made()
        five, sizes = fs.TrainStep(model, criterion, optimizer, activation_checkpointing=twice), []
        batch = next(iter(data.epoch(0)))
        with torch.autograd.graph.saved_tensors_hooks(lambda x: sizes.append(x.nbytes) or x, lambda x: x):
            five(batch)
        return sum(sizes)

    assert kept(True) < kept(False) / 3


def test_nothing_is_left_in_the_model():
    model, data, criterion, optimizer = made()
    names, own = list(model.state_dict()), lambda *given: nn.Module.__call__
    model.blocks[1].__dict__["forward"] = own
    with pytest.raises(ValueError, match="inside"), Recomputed(model):
        assert model.blocks[0].forward.forward.__func__ is type(model.blocks[0]).forward
        raise ValueError("inside")
    assert model.blocks[1].__dict__.pop("forward") is own
    assert all("forward" not in block.__dict__ for block in model.blocks)
    for info in fs.train(model, data, criterion, optimizer, max_iters=1, activation_checkpointing=True):
        assert all("forward" not in block.__dict__ for block in info.state.model.blocks)
        assert list(model.state_dict()) == names


def test_a_block_inside_a_block_is_computed_twice_not_thrice():
    class Outer(nn.Module):
        def __init__(self):
            super().__init__()
            self.blocks = nn.ModuleList([nn.ModuleDict({"experts": nn.ModuleList([nn.Linear(2, 2)])})])

    assert len(Recomputed(Outer()).blocks) == 1


def test_what_cannot_be_is_refused():
    model = nn.Linear(3, 1)
    parts = model, nn.MSELoss(), torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(fs.UsageError, match=r"no nn\.ModuleList of them \(--activation-checkpointing false\)"):
        fs.TrainStep(*parts, activation_checkpointing=True)
    model, _, criterion, optimizer = made()
    with pytest.raises(fs.UsageError, match="leave activation_checkpointing, or graph, out"):
        fs.TrainStep(model, criterion, optimizer, activation_checkpointing=True, graph=True)
