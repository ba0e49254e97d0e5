"""What a program's compiler is shown computes what torch computes."""

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx

from fivestep.loop.program import decompositions, settle

aten = torch.ops.aten


def made(shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


@pytest.mark.parametrize("sizes", [(32, 64, 1), (1, 32, 64), (32, 1, 64), (1, 1, 1), (1, 7, 1)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_products_with_a_vector(sizes, dtype):
    m, k, n = sizes
    a, b = made((m, k), 1, dtype), made((k, n), 2, dtype)
    ours = decompositions()[aten.mm.default](a, b)
    assert ours.shape == (m, n) and ours.dtype == dtype
    torch.testing.assert_close(ours, a @ b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("sizes", [(2, 3, 4), (1, 1 << 10, 1 << 10), (0, 1, 3), (1, 0, 3)])
def test_other_products_stay(sizes):
    m, k, n = sizes
    assert decompositions()[aten.mm.default](made((m, k)), made((k, n))) is NotImplemented


def test_sums_in_half_precision_stay():
    a, b = made((4, 8)).bfloat16(), made((8, 1)).bfloat16()
    assert decompositions()[aten.mm.default](a, b) is NotImplemented
    assert decompositions()[aten.addmm.default](made((1,)).bfloat16(), a, b) is NotImplemented


def test_a_bias_is_added_after():
    bias, a, b = made((5,), 3), made((7, 6), 4), made((6, 5), 5)
    torch.testing.assert_close(decompositions()[aten.addmm.default](bias, a, b), torch.addmm(bias, a, b))
    assert decompositions()[aten.addmm.default](bias, a, b, beta=0.5) is NotImplemented
    assert decompositions()[aten.addmm.default](bias, a, b, alpha=2) is NotImplemented


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("ignored", [-100, 3])
def test_the_gradient_of_a_cross_entropy(reduction, ignored):
    logits, targets = made((12, 9)).requires_grad_(), torch.arange(12) % 9
    targets[4] = ignored
    factors = made((12,), 7).abs()

    def gradient(logits):
        losses = torch.nn.functional.cross_entropy(logits, targets, ignore_index=ignored, reduction=reduction)
        return torch.autograd.grad((losses * factors).sum() if reduction == "none" else 3 * losses, logits)[0]

    plain, ours = make_fx(gradient)(logits), make_fx(gradient, decompositions())(logits)
    names = {str(node.target) for node in ours.graph.nodes}
    assert not any("backward" in name for name in names), names
    assert any("_log_softmax_backward_data" in str(node.target) for node in plain.graph.nodes)
    torch.testing.assert_close(ours(logits), gradient(logits), rtol=1e-6, atol=1e-7)


def test_class_weights_are_left_to_torch():
    logits, targets, weight = made((6, 4)).requires_grad_(), torch.arange(6) % 4, torch.rand(4)

    def gradient(logits):
        return torch.autograd.grad(torch.nn.functional.cross_entropy(logits, targets, weight=weight), logits)[0]

    ours = make_fx(gradient, decompositions())(logits)
    assert any("nll_loss_backward" in str(node.target) for node in ours.graph.nodes)
    assert torch.equal(ours(logits), gradient(logits))


def test_single_numbers_are_computed_once():
    def function(weights, step):
        factor = 1 - torch.pow(0.9, step)
        return [weights / factor.sqrt(), weights.sum() / factor, *torch._foreach_div([weights], [factor])]

    inputs = made((10, 10)), torch.tensor(3.0)
    graph = make_fx(function, tracing_mode="fake")(*inputs)
    settle(graph)
    for one, other in zip(graph(*inputs), function(*inputs), strict=True):
        assert torch.equal(one, other)
    for node in graph.graph.nodes:
        value = node.meta.get("val")
        if node.op == "call_function" and isinstance(value, torch.Tensor) and value.numel() > 64:
            for given in node.all_input_nodes:
                held = given.meta["val"]
                single = isinstance(held, torch.Tensor) and not held.ndim
                assert given.op == "placeholder" or not single or given.target is aten.amax.default, node
    powers = [node for node in graph.graph.nodes if node.target is aten.pow.Scalar]
    assert len(powers) == 1
