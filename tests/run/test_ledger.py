"""The ledger against arithmetic by hand: bytes that live, the peak, FLOP of products."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from fivestep.run.ledger import Ledger, Shapes, count_flops, nbytes, uncounted

CPU = torch.device("cpu")


def test_the_peak_follows_allocations_and_frees():
    with Shapes(), Ledger(CPU) as ledger:
        first = torch.zeros(1000)  # 4,000 bytes
        second = first + 1  # 8,000
        assert (ledger.live, ledger.peak[0]) == (8000, 8000)
        del second
        assert (ledger.live, ledger.peak[0]) == (4000, 8000)
        ledger.rewind()
        third = first[:500] * 2  # a view takes nothing
        third += first[500:]  # nor does work in place
        assert ledger.peak == (6000, "mul")
        assert ledger.largest == (2000, "mul")


def test_memory_of_the_size_is_not_needed():
    with Shapes(), Ledger(CPU) as ledger:
        torch.empty(10**15)
    assert ledger.peak[0] == 4 * 10**15


def test_another_device_is_not_counted():
    with Shapes(), Ledger(CPU) as ledger:
        torch.empty(1000, device="meta")
    assert ledger.peak[0] == 0


def test_a_host_read_is_finite():
    with Shapes(), Ledger(CPU):
        assert torch.zeros(()).item() == 1.0
        assert torch.zeros((), dtype=torch.long).item() == 1
        assert bool(torch.zeros(()) > 5) is True


def test_shared_storages_count_once():
    tensor = torch.zeros(10)
    assert nbytes([tensor, {"view": tensor[2:]}, None, torch.zeros(1)]) == 44


@pytest.mark.parametrize("batch, time", [(3, 5), (1, 7)])
def test_flop_of_a_linear_layer(batch, time):
    layer = nn.Linear(4, 6)
    with count_flops() as counter:
        layer(torch.ones(batch, time, 4, requires_grad=True)).sum().backward()
    assert counter.get_total_flops() == 3 * 2 * batch * time * 4 * 6


def test_flop_of_fused_attention_are_those_of_its_products():
    q = torch.ones(2, 3, 8, 4, requires_grad=True)
    with Ledger(CPU) as ledger, count_flops() as counter:
        F.scaled_dot_product_attention(q, q, q, is_causal=True).sum().backward()
    product = 2 * 2 * 3 * 8 * 8 * 4
    assert counter.get_total_flops() == 2 * product + 5 * product
    assert uncounted(ledger.operations) == []


def test_flop_of_an_lstm_are_those_of_its_gates():
    layer = nn.LSTM(5, 7)
    with Ledger(CPU) as ledger, count_flops() as counter:
        layer(torch.ones(11, 2, 5, requires_grad=True))[0].sum().backward()
    assert counter.get_total_flops() == 3 * 2 * 11 * 2 * 4 * 7 * (5 + 7)
    assert uncounted(ledger.operations) == []


def test_what_no_formula_knows_is_named():
    assert uncounted({torch.ops.aten._cudnn_rnn, torch.ops.aten.mm, torch.ops.aten.relu}) == ["_cudnn_rnn"]
