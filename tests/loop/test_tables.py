"""Which embeddings' gradients travel row by row, and which rows."""

import pytest
import torch
from torch import nn

from fivestep import processes
from fivestep.loop.tables import packed, tables_of, unpacked, used_rows


def test_large_embeddings_that_nothing_else_uses():
    large, small = nn.Embedding(1 << 15, 8), nn.Embedding(100, 8)
    model = nn.ModuleDict({"large": large, "small": small, "head": nn.Linear(8, 3)})
    assert list(tables_of(model)) == ["large.weight"]
    tied = nn.ModuleDict({"large": large, "head": nn.Linear(8, 1 << 15, bias=False)})
    tied["head"].weight = large.weight
    assert not tables_of(tied)
    assert not tables_of(large), "nothing would be left for torch"
    large.weight.requires_grad_(False)
    assert not tables_of(model)
    assert not tables_of(nn.ModuleDict({"a": nn.Embedding(1 << 15, 8, sparse=True), "head": nn.Linear(8, 3)}))


@pytest.mark.parametrize("size", [1, 2, 3, 4, 7, 8, 1000])
@pytest.mark.parametrize("n", [1, 52, 53, 54, 1001])
def test_booleans_of_all_processes_add_up(size, n, monkeypatch):
    monkeypatch.setattr(processes, "size", lambda: size)
    generator = torch.Generator().manual_seed(n)
    every = torch.rand(size, n, generator=generator) < 1 / (1 + size)
    every[:, n // 2] = True  # the most that a place must hold
    sums = sum(packed(one) for one in every)
    assert torch.equal(unpacked(sums, n), every.any(0))
    assert len(sums) <= 1 + n // (53 // size.bit_length())


@pytest.mark.parametrize("kind", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_rows_that_hold_anything(kind):
    grad = torch.zeros(8, 5, dtype=kind)
    grad[1, 2], grad[2, 0], grad[4] = torch.finfo(kind).smallest_normal, float("nan"), -1.0
    grad[6, 4], grad[7, 1] = float("-inf"), -torch.finfo(kind).smallest_normal
    assert used_rows(grad).tolist() == [False, True, True, False, True, False, True, True]
