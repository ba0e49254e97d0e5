"""Counts are what torch divides by: mean * count is the same loss with reduction="sum"."""

from functools import partial

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import fivestep as fs
from fivestep.loop.counting import compared, count_targets, divisor

N, C = 7, 5
WEIGHT = torch.tensor([0.5, 1.0, 2.0, 0.1, 3.0])


def classes(*shape, ignored=None):
    labels = torch.randint(0, C, shape)
    if ignored is not None:
        labels.view(-1)[::3] = ignored
    return labels


CASES = {
    "mse": (nn.MSELoss, {}, lambda: (torch.randn(N, 3), torch.randn(N, 3))),
    "l1": (nn.L1Loss, {}, lambda: (torch.randn(N, 3), torch.randn(N, 3))),
    "huber": (nn.HuberLoss, {"delta": 0.3}, lambda: (torch.randn(N), torch.randn(N))),
    "smooth l1": (nn.SmoothL1Loss, {}, lambda: (torch.randn(N, 2, 2), torch.randn(N, 2, 2))),
    "bce": (nn.BCELoss, {}, lambda: (torch.rand(N), torch.rand(N))),
    "bce logits": (
        nn.BCEWithLogitsLoss,
        {"pos_weight": torch.tensor(2.0)},
        lambda: (torch.randn(N, 2), torch.rand(N, 2)),
    ),
    "kl": (nn.KLDivLoss, {}, lambda: (torch.randn(N, C).log_softmax(1), torch.rand(N, C).softmax(1))),
    "poisson": (nn.PoissonNLLLoss, {}, lambda: (torch.randn(N), torch.rand(N))),
    "cross-entropy": (nn.CrossEntropyLoss, {}, lambda: (torch.randn(N, C), classes(N))),
    "ignored": (nn.CrossEntropyLoss, {}, lambda: (torch.randn(N, C), classes(N, ignored=-100))),
    "ignored 0": (nn.CrossEntropyLoss, {"ignore_index": 0}, lambda: (torch.randn(N, C), classes(N, ignored=0))),
    "weights": (nn.CrossEntropyLoss, {"weight": WEIGHT}, lambda: (torch.randn(N, C), classes(N, ignored=-100))),
    "smoothing and weights": (
        nn.CrossEntropyLoss,
        {"weight": WEIGHT, "label_smoothing": 0.3},
        lambda: (torch.randn(N, C), classes(N, ignored=-100)),
    ),
    "pixels": (nn.CrossEntropyLoss, {}, lambda: (torch.randn(N, C, 4, 3), classes(N, 4, 3, ignored=-100))),
    "probabilities": (nn.CrossEntropyLoss, {}, lambda: (torch.randn(N, C), torch.rand(N, C).softmax(1))),
    "weighted probabilities": (
        nn.CrossEntropyLoss,
        {"weight": WEIGHT},
        lambda: (torch.randn(N, C, 3), torch.rand(N, C, 3).softmax(1)),
    ),
    "one probability": (nn.CrossEntropyLoss, {}, lambda: (torch.randn(C), torch.rand(C).softmax(0))),
    "nll": (nn.NLLLoss, {"weight": WEIGHT}, lambda: (torch.randn(N, C).log_softmax(1), classes(N))),
    "multi margin": (nn.MultiMarginLoss, {}, lambda: (torch.randn(N, C), classes(N))),
}


# torch recommends batchmean for kl_div each time its mean is asked for
pytestmark = pytest.mark.filterwarnings("ignore:reduction. 'mean' divides")


@pytest.mark.parametrize("name", CASES)
def test_modules(name):
    kind, options, make = CASES[name]
    outputs, targets = make()
    criterion = kind(**options)
    count = float(count_targets(criterion, divisor(criterion), targets))
    summed = kind(**options, reduction="sum")(outputs, targets)
    assert criterion(outputs, targets).item() * count == pytest.approx(summed.item(), rel=1e-5)


@pytest.mark.parametrize(
    "function, options, make",
    [
        (F.mse_loss, {}, CASES["mse"][2]),
        (F.binary_cross_entropy_with_logits, {}, CASES["bce logits"][2]),
        (F.cross_entropy, {}, CASES["ignored"][2]),
        (F.cross_entropy, {"ignore_index": 0, "weight": WEIGHT}, CASES["ignored 0"][2]),
        (F.kl_div, {}, CASES["kl"][2]),
        (F.nll_loss, {}, CASES["nll"][2]),
    ],
)
def test_functions(function, options, make):
    outputs, targets = make()
    criterion = partial(function, **options)
    count = float(count_targets(criterion, divisor(criterion), targets))
    summed = function(outputs, targets, **options, reduction="sum")
    assert criterion(outputs, targets).item() * count == pytest.approx(summed.item(), rel=1e-5)


def test_batchmean_counts_rows():
    criterion = nn.KLDivLoss(reduction="batchmean")
    _outputs, targets = CASES["kl"][2]()
    assert count_targets(criterion, divisor(criterion), targets) == N


def test_an_unknown_function_counts_rows():
    assert count_targets(abs, divisor(abs), torch.randn(N, 3)) == N
    assert count_targets(abs, divisor(abs), {"boxes": torch.randn(N, 4), "labels": torch.zeros(N)}) == N


ZERO = torch.tensor([0.5, 0.0, 2.0, 0.1, 3.0])
WEIGHTED = {
    "module": nn.CrossEntropyLoss(weight=ZERO),
    "nll": nn.NLLLoss(weight=ZERO),
    "partial": partial(F.cross_entropy, weight=ZERO, ignore_index=4),
}


@pytest.mark.parametrize("name", WEIGHTED)
@pytest.mark.parametrize("shape", [(), (4, 3)], ids=["rows", "pixels"])
def test_the_gradient_of_targets_without_weight_is_0(name, shape):
    outputs = torch.randn(N, C, *shape, requires_grad=True)
    mean = compared(WEIGHTED[name], "classes", outputs, torch.ones(N, *shape, dtype=torch.int64))
    mean.backward(torch.zeros(()))
    assert mean.isnan()
    assert outputs.grad.count_nonzero() == 0


@pytest.mark.parametrize("name", WEIGHTED)
def test_a_weighted_mean_is_bitwise_torchs(name):
    outputs, targets = torch.randn(N, C, requires_grad=True), classes(N)
    mean, same = compared(WEIGHTED[name], "classes", outputs, targets), WEIGHTED[name](outputs, targets)
    grads = [torch.autograd.grad(one, outputs)[0] for one in (mean, same)]
    assert torch.equal(mean, same)
    assert torch.equal(*grads)


@pytest.mark.parametrize("reduction", ["sum", "none"])
def test_other_reductions_are_refused(reduction):
    for criterion in (nn.L1Loss(reduction=reduction), partial(F.cross_entropy, reduction=reduction)):
        with pytest.raises(fs.UsageError, match="reduction='mean'"):
            divisor(criterion)


def refused(model, criterion, features, targets):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(fs.UsageError) as told:
        fs.TrainStep(model, criterion, optimizer)((features, targets))
    return str(told.value)


@pytest.mark.parametrize(
    "criterion",
    [nn.GaussianNLLLoss(), nn.TripletMarginLoss(), nn.CTCLoss(), nn.CosineEmbeddingLoss(), lambda outputs: 0],
    ids=lambda criterion: type(criterion).__name__,
)
def test_a_loss_that_takes_more_than_outputs_and_targets_needs_an_objective(criterion):
    said = refused(nn.Linear(4, 3), criterion, torch.randn(8, 4), torch.randn(8, 3))
    assert "cannot be called as criterion(outputs, targets)" in said and "docs/objectives.md" in said


def test_a_model_that_returns_more_than_one_tensor_is_named():
    said = refused(nn.LSTM(4, 3), nn.MSELoss(), torch.randn(8, 2, 4), torch.randn(8, 2, 3))
    assert "the model returned a tuple" in said


@pytest.mark.parametrize("model", [nn.Linear(4, 3), nn.GRU(4, 3), nn.Conv1d(4, 3, 1)], ids=lambda m: type(m).__name__)
def test_features_of_another_dtype_than_the_weights_are_named(model):
    said = refused(model, nn.MSELoss(), torch.randn(2, 4, 4).double(), torch.randn(2, 4, 3))
    assert said.startswith("the features are float64 and the model's weights float32") and "features.float()" in said


def test_integer_targets_of_kl_div_are_named():
    said = refused(nn.Linear(4, 3), nn.KLDivLoss(reduction="batchmean"), torch.randn(8, 4), torch.ones(8, 3).long())
    assert "KLDivLoss needs targets of floats" in said


def test_values_outside_0_and_1_name_the_sigmoid_and_not_the_shapes():
    said = refused(nn.Linear(4, 1), nn.BCELoss(), 9 * torch.randn(8, 4), torch.ones(8, 1))
    assert "sigmoid" in said and "the same shape" not in said
