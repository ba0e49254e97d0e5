"""The loss over a large vocabulary is torch's cross-entropy over whole logits, to rounding; so are its gradients."""

from functools import partial

import numpy as np
import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import fivestep as fs
from fivestep.data.segments import CoveringSegments, Segments
from fivestep.errors import UsageError
from fivestep.loop import vocabulary
from fivestep.loop.vocabulary import is_fused, linear_cross_entropy
from fivestep.models.rnn import RNN
from fivestep.models.transformer import Transformer
from tests.same import assert_same_bits, twins

ROWS, WIDTH, WORDS = 23, 6, 37


@pytest.fixture
def small_chunks(monkeypatch):
    """Chunks of 5 rows: 23 rows end on a shorter one."""
    monkeypatch.setattr(vocabulary, "CHUNK", 5 * WORDS * 4)


def inputs(dtype=torch.float64, ignored=False):
    features = torch.randn(ROWS, WIDTH, dtype=dtype, requires_grad=True)
    weight = torch.randn(WORDS, WIDTH, dtype=dtype, requires_grad=True)
    bias = torch.randn(WORDS, dtype=dtype, requires_grad=True)
    targets = torch.randint(0, WORDS, (ROWS,))
    if ignored:
        targets[[0, 7, 8, 22]] = -100
    return features, weight, bias, targets


def whole(features, weight, targets, bias=None, **options):
    return F.cross_entropy(F.linear(features, weight, bias), targets, **options)


def results(loss, parameters, share=None):
    """The loss, and the gradients of `parameters`."""
    for parameter in parameters:
        parameter.grad = None
    loss.backward(gradient=share)
    return [loss.detach(), *(parameter.grad for parameter in parameters)]


def double(tensor):
    return tensor.detach().double().requires_grad_(tensor.requires_grad)


def check(ours, theirs, **tolerance):
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, **tolerance)


@pytest.mark.parametrize("onednn", [True, False])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("ignored", [False, True])
def test_loss_and_gradients(small_chunks, monkeypatch, ignored, smoothing, biased, dtype, onednn):
    monkeypatch.setattr(torch.backends.mkldnn, "enabled", onednn) if not onednn else None
    features, weight, bias, targets = inputs(dtype, ignored)
    held = [features, weight, bias] if biased else [features, weight]
    options = {"bias": bias if biased else None, "label_smoothing": smoothing}
    ours = results(linear_cross_entropy(features, weight, targets, **options), held)
    exact = [double(one) for one in held]
    options["bias"] = exact[2] if biased else None
    theirs = results(whole(exact[0], exact[1], targets, **options), exact)
    rounding = 1e-13 if dtype is torch.float64 else 2e-6
    assert all(one.dtype is dtype and one.is_contiguous() for one in ours)
    check([one.double() for one in ours], theirs, rtol=rounding, atol=rounding)


def test_gradients_are_the_slopes_of_the_loss(small_chunks):
    features, weight, bias, targets = inputs(ignored=True)
    of = [features, weight, bias]
    _, *gradients = results(linear_cross_entropy(features, weight, targets, bias), of)
    for one, gradient in zip(of, gradients, strict=True):
        direction, values = torch.randn_like(one), []
        for step in (1e-6, -1e-6):
            moved = [other.detach() + (step * direction if other is one else 0) for other in of]
            values.append(linear_cross_entropy(moved[0], moved[1], targets, moved[2]))
        slope = (values[0] - values[1]) / 2e-6
        torch.testing.assert_close((gradient * direction).sum(), slope, rtol=1e-7, atol=1e-8)


@pytest.mark.parametrize("ignore_index", [0, 5, WORDS - 1, WORDS + 1000])
def test_any_id_may_be_the_ignored_one(small_chunks, ignore_index):
    features, weight, bias, targets = inputs()
    targets[::3] = ignore_index
    of, options = [features, weight, bias], {"ignore_index": ignore_index}
    ours = results(linear_cross_entropy(features, weight, targets, bias, **options), of)
    check(ours, results(whole(features, weight, targets, bias, **options), of))


@pytest.mark.parametrize("n", [1, 2, 4, 5, 6, 10, 11])
def test_every_number_of_rows(small_chunks, n):
    features, weight, bias, targets = inputs()
    features = features.detach()[:n].requires_grad_()
    ours = results(linear_cross_entropy(features, weight, targets[:n], bias), [features, weight])
    check(ours, results(whole(features, weight, targets[:n], bias), [features, weight]))


def test_features_that_are_not_contiguous(small_chunks):
    _, weight, bias, targets = inputs(torch.float32)
    features = torch.randn(WIDTH, ROWS).t().requires_grad_()
    ours = results(linear_cross_entropy(features, weight, targets, bias), [features, weight])
    check(ours, results(whole(features, weight, targets, bias), [features, weight]), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("trained", [[0], [1], [2], [0, 2], [1, 2]])
def test_only_what_trains_gets_a_gradient(small_chunks, trained):
    of = inputs()
    targets = of[3]
    for place, one in enumerate(of[:3]):
        one.requires_grad_(place in trained)
    held = [of[place] for place in trained]
    ours = results(linear_cross_entropy(of[0], of[1], targets, of[2]), held)
    assert all(of[place].grad is None for place in range(3) if place not in trained)
    check(ours, results(whole(of[0], of[1], targets, of[2]), held))


def test_without_grad_there_is_a_loss_alone(small_chunks):
    features, weight, bias, targets = inputs()
    with torch.no_grad(), Largest() as largest:
        loss = linear_cross_entropy(features, weight, targets, bias)
    assert not loss.requires_grad
    assert largest.numbers < (WIDTH + 1) * WORDS  # the size of the sums that the gradients are made from
    torch.testing.assert_close(loss, whole(features, weight, targets, bias).detach())


def test_used_twice_in_one_graph(small_chunks):
    features, weight, bias, targets = inputs()
    for loss in (linear_cross_entropy, whole):
        total = loss(features, weight, targets, bias) + loss(features * 2, weight, targets.flip(0), bias)
        found = results(total, [features, weight, bias])
        if loss is linear_cross_entropy:
            ours = found
    check(ours, found)


def test_a_share_given_to_backward():
    features, weight, bias, targets = inputs()
    share = torch.tensor(0.375, dtype=torch.float64)
    ours = results(linear_cross_entropy(features, weight, targets, bias), [features, weight, bias], share)
    check(ours, results(whole(features, weight, targets, bias), [features, weight, bias], share))


def test_a_second_backward_is_refused():
    features, weight, _, targets = inputs()
    loss = linear_cross_entropy(features, weight, targets)
    loss.backward(retain_graph=True)
    with pytest.raises(UsageError, match="--loss plain"):
        loss.backward()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("place", [0, 1, 2])
def test_what_is_not_finite_stays_so(small_chunks, value, place):
    of = inputs(torch.float32)
    with torch.no_grad():
        of[place].view(-1)[3] = value
    loss, *gradients = results(linear_cross_entropy(of[0], of[1], of[3], of[2]), of[:3])
    assert not loss.isfinite()
    assert not all(gradient.isfinite().all() for gradient in gradients)


def test_a_loss_of_hundreds_of_nats(small_chunks):
    """The target's share is 0 in float32 here; its loss is not infinite."""
    features, weight, bias, targets = inputs(torch.float32)
    features = (features.detach() * 300).requires_grad_()
    ours = results(linear_cross_entropy(features, weight, targets, bias), [features, weight])
    assert ours[0] > 300
    check(ours, results(whole(features, weight, targets, bias), [features, weight]), rtol=1e-5, atol=1e-5)


def test_where_everything_is_ignored(small_chunks):
    features, weight, bias, targets = inputs()
    ours = results(linear_cross_entropy(features, weight, targets.fill_(-100), bias), [features, weight, bias])
    theirs = results(whole(features, weight, targets, bias), [features, weight, bias])
    check(ours, theirs, equal_nan=True, rtol=0, atol=0)


def test_bfloat16_is_no_further_off_than_autocast(small_chunks):
    """By the root mean square over many draws; both are bfloat16's rounding away from the truth."""
    errors = {linear_cross_entropy: torch.zeros(4), whole: torch.zeros(4)}
    for _ in range(20):
        features, weight, bias, targets = inputs(torch.float32, ignored=True)
        of = [features, weight, bias]
        exact = [double(one) for one in of]
        truth = results(whole(exact[0], exact[1], targets, exact[2]), exact)
        for loss in errors:
            with torch.autocast("cpu", torch.bfloat16):
                value = loss(features, weight, targets, bias)
            found = results(value, of)
            assert all(one.dtype is torch.float32 for one in found)
            errors[loss] += torch.stack(
                [((a - b).norm() / b.norm()).float() ** 2 for a, b in zip(found, truth, strict=True)]
            )
    assert (errors[linear_cross_entropy] > 0).all()
    assert (errors[linear_cross_entropy] <= 1.2 * errors[whole]).all(), errors


def test_weights_in_bfloat16(small_chunks):
    features, weight, bias, targets = inputs(torch.bfloat16)
    ours = results(linear_cross_entropy(features, weight, targets, bias), [features, weight, bias])
    assert [one.dtype for one in ours] == [torch.float32] + [torch.bfloat16] * 3
    theirs = results(whole(features, weight, targets, bias), [features, weight, bias])
    check([one.float() for one in ours], [one.float() for one in theirs], rtol=0.03, atol=0.01)


class Largest(TorchDispatchMode):
    """Notes the largest tensor that an operation makes."""

    numbers = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        if isinstance(made, torch.Tensor):
            self.numbers = max(self.numbers, made.numel())
        return made


def test_the_logits_are_never_whole(small_chunks):
    features, weight, bias, targets = inputs(torch.float32)
    sizes = []
    for loss in (linear_cross_entropy, whole):
        with Largest() as largest:
            loss(features, weight, targets, bias).backward()
        sizes.append(largest.numbers)
    assert sizes == [(WIDTH + 1) * WORDS, ROWS * WORDS]  # the decoder's gradient; the logits


def test_tensors_without_storage(small_chunks):
    """What a dry run forecasts memory with."""
    with FakeTensorMode():
        features, weight, bias, targets = inputs(torch.float32)
        gradients = results(linear_cross_entropy(features, weight, targets, bias), [features, weight, bias])
    assert [list(one.shape) for one in gradients] == [[], [ROWS, WIDTH], [WORDS, WIDTH], [WORDS]]


# --- objectives ---


def words(length=900, size=50):
    return np.random.default_rng(0).integers(0, size, length).astype(np.uint16)


def models():
    return {
        "lstm": RNN(50, n_embd=8, n_hidden=8, n_layer=2, dropout=0.2),
        "tied": RNN(50, n_embd=8, n_hidden=12, n_layer=1, dropout=0.2, tied=True),
        "transformer": Transformer(50, n_embd=8, n_head=2, n_hidden=12, n_layer=1, dropout=0.2),
    }


@pytest.mark.parametrize("name", models())
@pytest.mark.parametrize("accumulate", [1, 3])
def test_training_is_the_plain_one_to_rounding(monkeypatch, name, accumulate):
    monkeypatch.setattr(vocabulary, "CHUNK", 11 * 50 * 4)
    ours, theirs = twins(models()[name].double())
    losses = []
    for model, fused in ((ours, True), (theirs, False)):
        torch.manual_seed(7)
        optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
        steps = fs.train(
            model,
            Segments(words(), 4, 35),
            fs.TruncatedBPTT(fused=fused),
            optimizer,
            epochs=2,
            clip_norm=0.25,
            accumulate=accumulate,
        )
        losses.append([info.loss.item() for info in steps])
    assert losses[0] == pytest.approx(losses[1], rel=1e-11)
    check(list(ours.parameters()), list(theirs.parameters()), rtol=1e-10, atol=1e-11)


def test_evaluation_is_the_plain_one_to_rounding():
    model, data = models()["lstm"], CoveringSegments(words(), 4, 35)  # padded at its end
    smoothed = nn.CrossEntropyLoss(label_smoothing=0.3)
    fused, plain = (fs.evaluate(model, data, fs.TruncatedBPTT(smoothed, fused=fused)) for fused in (True, False))
    assert fused == pytest.approx(plain, rel=1e-6)
    assert fused["count"] == 899
    seen = fs.evaluate(model, data, fs.TruncatedBPTT(fused=True), metrics={"size": lambda logits, y: logits.sum(1)})
    assert "size" in seen  # metrics look at whole logits


class Windowed(nn.Module):
    """A user's own model that takes part: features(), and an nn.Linear as decoder."""

    def __init__(self, words=50):
        super().__init__()
        self.embedding = nn.Embedding(words, 8)
        self.hidden = nn.Linear(8, 8)
        self.decoder = nn.Linear(8, words)

    def features(self, xb):
        return self.hidden(self.embedding(xb)).tanh()

    def forward(self, xb):
        return self.decoder(self.features(xb))


def test_a_model_of_the_users_own():
    model, batch = Windowed(), (torch.randint(0, 50, (3, 9)), torch.randint(0, 50, (3, 9)))
    fused, plain = (fs.NextToken(fused=fused).loss(model, batch, None)[0] for fused in (True, False))
    assert "LinearCrossEntropy" in type(fused.grad_fn).__name__
    assert "LinearCrossEntropy" not in type(plain.grad_fn).__name__
    torch.testing.assert_close(fused, plain)


def test_auto_is_plain_where_that_is_as_good(monkeypatch):
    criterion, few, many = nn.CrossEntropyLoss(), 4, vocabulary.LARGE // 4 // vocabulary.LEAST_WORDS
    big = Windowed(vocabulary.LEAST_WORDS)
    assert is_fused("auto", big, criterion, few) is vocabulary.HAS_ONEDNN
    assert is_fused("auto", big, criterion, many)
    assert not is_fused("auto", Windowed(vocabulary.LEAST_WORDS - 1), criterion, many)
    assert not is_fused(False, big, criterion, many)
    monkeypatch.setattr(vocabulary, "HAS_ONEDNN", False)
    assert is_fused("auto", big, criterion, many) and not is_fused("auto", big, criterion, many - 1)
    monkeypatch.undo()
    with torch.autocast("cpu", torch.bfloat16):
        assert is_fused("auto", big, criterion, many) and not is_fused("auto", big, criterion, many - 1)
    assert not is_fused("auto", Windowed(vocabulary.LEAST_WORDS).double(), criterion, many)
    assert not is_fused("auto", Windowed(vocabulary.LEAST_WORDS).to("meta"), criterion, many)


def test_small_vocabularies_keep_the_plain_loops_bits():
    ours, theirs = twins(models()["lstm"])
    for model, fused in ((ours, "auto"), (theirs, False)):
        torch.manual_seed(7)
        optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
        for _ in fs.train(model, Segments(words(), 4, 35), fs.TruncatedBPTT(fused=fused), optimizer, epochs=1):
            pass
    assert_same_bits(ours, theirs)


@pytest.mark.filterwarnings("ignore:Full backward hook")  # ids have no gradient
@pytest.mark.parametrize("watched", ["model", "decoder"])
@pytest.mark.parametrize(
    "kind", ["register_forward_hook", "register_forward_pre_hook", "register_full_backward_hook"]
)
def test_hooks_are_called(watched, kind):
    model, called = Windowed(), []
    module = model if watched == "model" else model.decoder
    handle = getattr(module, kind)(lambda *arguments: called.append(1))
    xb = torch.randint(0, 50, (2, 4))
    fs.NextToken(fused=True).loss(model, (xb, xb), None)[0].backward()
    assert called
    handle.remove()
    assert is_fused(True, model, nn.CrossEntropyLoss(), 1 << 20)


def test_a_decoder_that_is_not_finite_is_named():
    model = models()["lstm"]
    with torch.no_grad():
        model.decoder.weight[3, 0] = float("inf")
    five = fs.TrainStep(model, fs.TruncatedBPTT(fused=True), torch.optim.SGD(model.parameters(), lr=1.0))
    with pytest.raises(fs.NonFiniteError, match="decoder"):
        five((torch.randint(0, 50, (5, 2)), torch.randint(0, 50, (10,))))


class Other(nn.CrossEntropyLoss):
    """A criterion of the user's own."""


@pytest.mark.parametrize(
    "criterion",
    [
        nn.CrossEntropyLoss(weight=torch.ones(50)),
        nn.CrossEntropyLoss(reduction="sum"),
        Other(),
        partial(F.cross_entropy, ignore_index=3),
    ],
)
def test_other_criteria_are_plain_or_refused(criterion):
    assert not is_fused("auto", Windowed(vocabulary.LEAST_WORDS), criterion, 1 << 20)
    with pytest.raises(UsageError, match="CrossEntropyLoss"):
        is_fused(True, Windowed(), criterion, 1 << 20)


def test_other_models_are_plain_or_refused():
    model = nn.Sequential(nn.Embedding(50, 8), nn.Linear(8, 50))
    assert not is_fused("auto", model, nn.CrossEntropyLoss(), 1 << 20)
    with pytest.raises(UsageError, match="features"):
        is_fused(True, model, nn.CrossEntropyLoss(), 1 << 20)


@pytest.mark.parametrize("fused", ["yes", None, 1])
def test_fused_is_checked(fused):
    with pytest.raises(UsageError, match="fused"):
        fs.NextToken(fused=fused)


def test_what_does_not_fit_is_refused():
    features, weight, bias, targets = inputs()
    with pytest.raises(UsageError, match="out of range for 37 words"):
        linear_cross_entropy(features, weight, targets.clone().fill_(WORDS), bias)
    with pytest.raises(UsageError, match=r"features \[23, 5\]"):
        linear_cross_entropy(features[:, :5], weight, targets)
    with pytest.raises(UsageError, match=r"targets \[22\]"):
        linear_cross_entropy(features, weight, targets[1:])
    with pytest.raises(UsageError, match="int64"):
        linear_cross_entropy(features, weight, targets.int())
