"""fp16's loss scale, tested in float32, where every scale is exact: only autocast needs a GPU."""

import pytest
import torch
from torch import nn

import fivestep as fs
from fivestep.loop.precision import GROW_AFTER, UNSCALED, LossScale
from fivestep.models.mlp import MLP
from tests.same import assert_same_bits, twins


def batches(n=6):
    generator = torch.Generator().manual_seed(0)
    return [(torch.randn(4, 3, generator=generator), torch.randn(4, 1, generator=generator)) for _ in range(n)]


class Half(torch.autograd.Function):
    """Passes values on, and gradients through float16, where they may overflow."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        return grad.half().float()


class HalfGradients(nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, x):
        return Half.apply(self.model(x))


def step_of(model, **options):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    return fs.TrainStep(model, nn.MSELoss(), optimizer, clip_norm=0.5, **options)


@pytest.mark.parametrize("accumulate", [1, 3])
def test_the_scale_changes_no_bit(accumulate):
    """A power of two goes in and comes out again before the norm: norms, clipping and weights are float32's."""
    ours, theirs = twins(MLP([3, 8, 1]))
    scaled, plain = step_of(ours), step_of(theirs)
    scaled.state.loss_scale = LossScale()
    for i in range(0, 6, accumulate):
        window = batches()[i : i + accumulate]
        a, b = scaled(*window), plain(*window)
        assert torch.equal(a.grad_norm, b.grad_norm)
        assert torch.equal(a.loss, b.loss)
    assert scaled.state.loss_scale.good_steps == 6 // accumulate
    if accumulate == 1:
        assert_same_bits(ours, theirs)


def test_an_overflow_skips_nothing():
    """The batch is done again at half the scale: no update is lost, and neither clock nor schedule has noticed."""
    ours, theirs = twins(HalfGradients(MLP([3, 8, 1])))
    scaled, plain = step_of(ours), step_of(theirs)
    scaled.state.loss_scale = LossScale(scale=2.0**20)
    steps = [scaled(batch).step for batch in batches()]
    assert steps == [1, 2, 3, 4, 5, 6]
    assert 1 < scaled.state.loss_scale.scale < 2.0**20
    for batch in batches():
        plain(batch)
    for ours_p, theirs_p in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert torch.allclose(ours_p, theirs_p, atol=2e-3)


def test_without_a_scale_small_gradients_vanish():
    """What the scale is for: below 6e-8 a float16 is 0."""
    tiny = [(x, y * 1e-9) for x, y in batches(1)]
    norms = []
    for scale in (UNSCALED, LossScale()):
        model = HalfGradients(nn.Linear(3, 1, bias=False))
        with torch.no_grad():
            model.model.weight.fill_(1e-9)
        step = step_of(model)
        step.state.loss_scale = scale
        norms.append(float(step(tiny[0]).grad_norm))
    assert norms[0] == 0 < norms[1]


def test_what_no_scale_mends_stops_the_run():
    model = MLP([3, 8, 1])
    step = step_of(model)
    step.state.loss_scale = LossScale()
    before = [p.detach().clone() for p in model.parameters()]
    x, y = batches(1)[0]
    with pytest.raises(fs.NonFiniteError, match="step 1"):
        step((x * torch.nan, y))
    assert all(torch.equal(a, p) for a, p in zip(before, model.parameters(), strict=True))
    assert step.state.loss_scale.scale == 2.0**16  # the loss itself was NaN: not the scale's doing

    class Broken(torch.autograd.Function):
        forward = staticmethod(lambda ctx, x: x.clone())
        backward = staticmethod(lambda ctx, grad: grad * torch.inf)

    class Model(MLP):
        def forward(self, x):
            return Broken.apply(super().forward(x))

    step = step_of(Model([3, 1]))
    step.state.loss_scale = LossScale()
    with pytest.raises(fs.NonFiniteError):
        step((x, y))


def test_the_scale_grows_and_is_saved():
    scale = LossScale(scale=8.0, good_steps=GROW_AFTER - 1)
    scale.passed()
    assert (scale.scale, scale.good_steps) == (16.0, 0)
    step = step_of(MLP([3, 1]))
    step.state.loss_scale = LossScale(scale=4.0, good_steps=7)
    saved = step.state.state_dict()
    step.state.loss_scale = LossScale()
    step.state.load_state_dict(saved)
    assert step.state.loss_scale == LossScale(scale=4.0, good_steps=7)


def test_fp16_on_the_cpu_is_refused():
    with pytest.raises(fs.UsageError, match=r"'fp16' needs a GPU.*--precision bf16"):
        step_of(MLP([3, 1]), precision="fp16")
    with pytest.raises(fs.UsageError, match="fp16"):
        fs.evaluate(MLP([3, 1]), batches(), nn.MSELoss(), precision="fp16")
