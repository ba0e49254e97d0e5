"""TrainStep alone: what it returns, and what it refuses, each in one sentence."""

import copy

import numpy as np
import pytest
import torch
from torch import nn

import fivestep as fs
from fivestep.models.mlp import MLP
from tests.same import assert_same_bits, twins


def job(outputs=1):
    model = MLP([3, outputs])
    return model, torch.optim.SGD(model.parameters(), lr=0.1)


def batch(rows=4, outputs=1):
    return torch.randn(rows, 3), torch.randn(rows, outputs)


def test_result():
    model, optimizer = job()
    features, labels = batch()
    expected = nn.MSELoss()(model(features), labels).item()
    result = fs.TrainStep(model, nn.MSELoss(), optimizer)((features, labels))
    assert float(result.loss) == expected
    assert not result.loss.requires_grad
    assert (result.step, result.epoch, result.count, result.learning_rate) == (1, 1, 4, 0.1)
    assert result.state.clock.samples == 4


def test_a_list_of_optimizers_steps_in_order():
    model, twin = twins(MLP([3, 8, 1]))
    halves = [list(model.parameters())[:2], list(model.parameters())[2:]]
    ours = [torch.optim.SGD(halves[0], lr=0.1), torch.optim.AdamW(halves[1], lr=0.01)]
    theirs = [
        torch.optim.SGD(list(twin.parameters())[:2], lr=0.1),
        torch.optim.AdamW(list(twin.parameters())[2:], lr=0.01),
    ]
    five = fs.TrainStep(model, nn.MSELoss(), ours)
    for _ in range(3):
        features, labels = batch()
        five((features, labels))
        for optimizer in theirs:
            optimizer.zero_grad()
        nn.MSELoss()(twin(features), labels).backward()
        for optimizer in theirs:
            optimizer.step()
    assert_same_bits(model, twin)


@pytest.mark.parametrize("make", [torch.optim.Muon, torch.optim.Adagrad, torch.optim.RMSprop, torch.optim.NAdam])
def test_any_optimizer_and_it_stays_as_it_was(make):
    model = nn.Linear(3, 2, bias=False)
    optimizer = make(model.parameters(), lr=0.01)
    before = {key: value for key, value in optimizer.param_groups[0].items() if key != "params"}
    five = fs.TrainStep(model, nn.MSELoss(), optimizer, clip_norm=1.0)
    for _ in range(2):
        five((torch.randn(4, 3), torch.randn(4, 2)))
    assert before == {key: value for key, value in optimizer.param_groups[0].items() if key != "params"}


def test_parameters_of_a_criterion_train_too():
    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.ones(()))

        def forward(self, outputs, labels):
            return ((outputs * self.scale - labels) ** 2).mean()

    model, criterion = MLP([3, 1]), Scaled()
    optimizer = torch.optim.SGD([*model.parameters(), *criterion.parameters()], lr=0.1)
    fs.TrainStep(model, criterion, optimizer)(batch())
    assert criterion.scale.item() != 1.0


def test_parameters_left_out_stay():
    model = MLP([3, 8, 1])
    frozen = [p.detach().clone() for p in list(model.parameters())[:2]]
    optimizer = torch.optim.AdamW(list(model.parameters())[2:], lr=0.1)
    fs.TrainStep(model, nn.MSELoss(), optimizer, clip_norm=1.0)(batch())
    assert all(torch.equal(a, b) for a, b in zip(list(model.parameters())[:2], frozen, strict=True))


def test_nested_batches_and_two_steps_of_a_gan():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.two = nn.Linear(3, 2), nn.Linear(5, 2)

        def forward(self, inputs):
            return self.one(inputs["a"]) + self.two(inputs["b"][0])

    model = Two()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    inputs = {"a": torch.randn(4, 3), "b": [torch.randn(4, 5)]}
    result = fs.TrainStep(model, nn.MSELoss(), optimizer)((inputs, torch.randn(4, 2)))
    assert result.count == 8


def test_bf16():
    model, twin = twins(MLP([3, 64, 1]))
    features, labels = batch(64)
    results = [
        fs.TrainStep(one, nn.MSELoss(), torch.optim.SGD(one.parameters(), lr=0.1), precision=precision)(
            (features, labels)
        )
        for one, precision in ((model, "bf16"), (twin, "fp32"))
    ]
    assert float(results[0].loss) == pytest.approx(float(results[1].loss), rel=0.05)
    assert float(results[0].loss) != float(results[1].loss)
    assert all(p.dtype == torch.float32 and p.grad.dtype == torch.float32 for p in model.parameters())


@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_nothing_non_finite_is_applied(where):
    model, optimizer = job()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)

    def criterion(outputs, labels):
        if where == "loss":
            return (outputs - labels).mean() * 0 + torch.inf
        return (outputs * 0).sqrt().mean()  # finite loss 0, gradient inf * 0

    five = fs.TrainStep(model, criterion, optimizer)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(fs.NonFiniteError, match=r"before step 1 \(epoch 1, batch 0\)"):
        five(batch())
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert not optimizer.state
    assert five.state.clock.step == 0


def test_a_batch_without_targets_says_so():
    model = nn.Linear(3, 2)
    five = fs.TrainStep(model, nn.CrossEntropyLoss(), torch.optim.SGD(model.parameters(), lr=0.1))
    with pytest.raises(fs.NonFiniteError, match="without a single target"):
        five((torch.randn(4, 3), torch.full((4,), -100)))


def refused(match, criterion, data, outputs=1, **options):
    model, optimizer = job(outputs)
    with pytest.raises(fs.UsageError, match=match):
        fs.TrainStep(model, criterion, optimizer, **options)(*data)


def test_refused():
    x, y = batch()
    mse = nn.MSELoss()
    refused(r"\[4, 1\] with targets \[4\]", mse, [(x, y[:, 0])])  # torch would broadcast to 4 x 4
    refused(r"\[4, 2\] with targets \[3\]", nn.CrossEntropyLoss(), [(x, torch.tensor([0, 1, 1]))], outputs=2)
    refused("out of bounds", nn.CrossEntropyLoss(), [(x, torch.full((4,), 7))], outputs=2)
    refused("pair .*got Tensor with", mse, [x])
    refused("pair .*got tuple with 3 parts", mse, [(x, y, y)])
    refused("pair .*got dict with 2 parts", mse, [{"x": x, "y": y}])
    refused("something to learn from; got 0 batches", mse, [])
    refused("reduction is 'sum'", nn.MSELoss(reduction="sum"), [(x, y)])
    refused("reduction is 'none'", nn.CrossEntropyLoss(reduction="none"), [(x, y)])
    refused(r"the criterion is MSELoss; it must be a loss such as nn\.MSELoss\(\)", nn.MSELoss, [(x, y)])
    refused("one number", lambda outputs, labels: outputs - labels, [(x, y)])
    refused("depends on no parameter", lambda outputs, labels: labels.mean(), [(x, y)])
    refused("clip_norm = 0 must be above 0.*--clip-norm", mse, [(x, y)], clip_norm=0)
    refused("clip_value = -1", mse, [(x, y)], clip_value=-1)
    refused("precision = 'bf17'.*did you mean 'bf16'", mse, [(x, y)], precision="bf17")
    refused("the criterion is a SGD", torch.optim.SGD([torch.zeros(1, requires_grad=True)]), [(x, y)])
    refused(r"e\.g\. labels\.unsqueeze\(1\)", mse, [(x, y[:, 0])])
    refused("scheduler", mse, [(x, y)], scheduler="cosine")


def test_logits_of_sequences_point_to_next_token():
    model = nn.Sequential(nn.Embedding(7, 7))
    five = fs.TrainStep(model, nn.CrossEntropyLoss(), torch.optim.SGD(model.parameters(), lr=0.1))
    ids = torch.randint(0, 7, (4, 5))
    with pytest.raises(fs.UsageError, match=r"fivestep\.NextToken\(\)"):
        five((ids, ids))


def test_models_that_carry_are_named():
    class Carrying(nn.Module):
        def __init__(self, takes):
            super().__init__()
            self.table, self.takes = nn.Embedding(7, 7), takes

        def forward(self, data, *hidden):
            if hidden and not self.takes:
                raise TypeError("planted")
            return self.table(data), torch.zeros(1)

    class Forgetful(Carrying):
        def forward(self, data):
            return super().forward(data)

    ids = torch.randint(0, 7, (4, 5))

    def step_of(model, objective):
        return fs.TrainStep(model, objective, torch.optim.SGD(model.parameters(), lr=0.1))

    with pytest.raises(fs.UsageError, match=r"NextToken needs logits.*got a tuple.*TruncatedBPTT"):
        step_of(Carrying(True), fs.NextToken())((ids, ids))
    five = step_of(Forgetful(True), fs.TruncatedBPTT())
    five((ids, ids.flatten()))
    with pytest.raises(fs.UsageError, match="Forgetful returns a hidden state but its forward takes none"):
        five((ids, ids.flatten()))
    five = step_of(Carrying(False), fs.TruncatedBPTT())
    five((ids, ids.flatten()))
    with pytest.raises(TypeError, match="planted"):  # the model's own error stays its own
        five((ids, ids.flatten()))


def test_refused_optimizers():
    model, other = MLP([3, 1]), MLP([3, 1])
    mse = nn.MSELoss()
    with pytest.raises(fs.UsageError, match="2 of the optimizer's 2 parameter tensors do not belong to the model"):
        fs.TrainStep(model, mse, torch.optim.SGD(other.parameters(), lr=0.1))
    with pytest.raises(fs.UsageError, match="2 of the optimizer's 4 parameter"):
        both = [*model.parameters(), *other.parameters()]
        fs.TrainStep(model, mse, torch.optim.SGD(both, lr=0.1))
    with pytest.raises(fs.UsageError, match="same parameter"):
        fs.TrainStep(model, mse, [torch.optim.SGD(model.parameters(), lr=0.1) for _ in range(2)])
    with pytest.raises(fs.UsageError, match="closure"):
        fs.TrainStep(model, mse, torch.optim.LBFGS(model.parameters()))
    for wrong in (model.parameters(), None, []):
        with pytest.raises(fs.UsageError, match="the optimizer is .* must be a torch optimizer"):
            fs.TrainStep(model, mse, wrong)


def test_an_objective_of_ones_own():
    """count() and loss() are all that a step asks for."""

    class Contrast:
        def count(self, batch):
            return len(batch["left"])

        def loss(self, model, batch, carry):
            return (model(batch["left"]) - model(batch["right"])).pow(2).mean(), None

    model, optimizer = job()
    batches = [{"left": torch.randn(n, 3), "right": torch.randn(n, 3)} for n in (4, 2)]
    five = fs.TrainStep(model, Contrast(), optimizer)
    assert five(*batches).count == 6
    figures = fs.evaluate(model, batches, Contrast())
    assert figures["count"] == 6
    assert np.isfinite(figures["loss"])
    with pytest.raises(fs.UsageError, match="metrics= needs an objective with forward"):
        fs.evaluate(model, batches, Contrast(), metrics={"a": fs.accuracy})


# --- what does not fit ---


class AsksAtOnce(torch.optim.SGD):
    def step(self, closure):
        closure()


class AsksInWords(torch.optim.SGD):
    def step(self, closure=None):
        assert closure is not None, "Sharpness Aware Minimization requires closure, but it was not provided"


class CallsIt(torch.optim.SGD):
    def step(self, closure=None):
        closure()


@pytest.mark.parametrize("kind", [AsksAtOnce, AsksInWords, CallsIt, torch.optim.LBFGS])
def test_optimizers_that_need_a_closure_are_refused(kind):
    model = MLP([3, 1])
    before = copy.deepcopy(model)
    with pytest.raises(fs.UsageError, match=f"{kind.__name__}.step\\(\\) needs a closure"):
        fs.TrainStep(model, nn.MSELoss(), [kind(model.parameters(), lr=0.1)])(batch())
    assert_same_bits(model, before)


def test_an_optimizers_own_error_stays_its_own():
    class Breaks(torch.optim.SGD):
        def step(self, closure=None):
            raise TypeError("planted")

    model = MLP([3, 1])
    with pytest.raises(TypeError, match="planted"):
        fs.TrainStep(model, nn.MSELoss(), Breaks(model.parameters(), lr=0.1))(batch())


class Two(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(6, 1)

    def forward(self, left, right):
        return self.layer(torch.cat([left, right], 1))


@pytest.mark.parametrize("wrap", [lambda model: model, lambda model: torch.compile(model, backend="eager")])
@pytest.mark.parametrize("features", [lambda x: (x, x), lambda x: {"left": x, "right": x}, lambda x: x])
def test_a_model_of_two_inputs_is_named(wrap, features):
    model, (x, y) = wrap(Two()), batch()
    five = fs.TrainStep(model, nn.MSELoss(), torch.optim.SGD(model.parameters(), lr=0.1))
    with pytest.raises(fs.UsageError, match=r"Two with forward\(left, right\)"):
        five((features(x), y))
    with pytest.raises(fs.UsageError, match=r"Two with forward\(left, right\)"):
        fs.evaluate(model, [(features(x), y)], nn.MSELoss())


class TrainsItself(nn.Linear):
    def train(self, x, y):
        return self(x) - y


class TrainsForEpochs(nn.Linear):
    def train(self, epochs=10):
        raise AssertionError("called")


class EvaluatesItself(nn.Linear):
    def eval(self, data):
        return data


class HasASwitch(nn.Linear):
    def __init__(self, *sizes):
        super().__init__(*sizes)
        self.train = True


@pytest.mark.parametrize("kind", [TrainsItself, TrainsForEpochs, EvaluatesItself, HasASwitch])
@pytest.mark.parametrize("wrap", [lambda layer: layer, nn.Sequential])
def test_methods_in_the_place_of_train_and_eval_are_named(kind, wrap):
    model, (x, y) = wrap(kind(3, 1)), batch()
    name = "eval" if kind is EvaluatesItself else "train"
    with pytest.raises(
        fs.UsageError, match=rf"a {kind.__name__}, a module of the model, replaces torch's {name}\(.* to {name}_model"
    ):
        fs.fit(model, [(x, y)], nn.MSELoss(), torch.optim.SGD(model.parameters(), lr=0.1), epochs=1, progress=False)
    with pytest.raises(fs.UsageError, match=f"a {kind.__name__}, a module of the model, replaces torch's {name}"):
        fs.evaluate(model, [(x, y)], nn.MSELoss())


def test_a_train_that_switches_the_mode_in_its_own_way_is_called():
    class Frozen(nn.Sequential):
        def train(self, mode=True):
            super().train(mode)
            self[1].eval()
            return self

    model, (x, y) = Frozen(nn.Linear(3, 3), nn.Dropout(), nn.Linear(3, 1)), batch()
    fs.fit(model, [(x, y)], nn.MSELoss(), torch.optim.SGD(model.parameters(), lr=0.1), epochs=1, progress=False)
    assert model.training and not model[1].training


def test_optimizers_with_modes_are_refused_where_weights_are_judged_or_kept(tmp_path):
    class Modes(torch.optim.SGD):
        def train(self):
            pass

        def eval(self):
            pass

    model = MLP([3, 1])
    optimizer = Modes(model.parameters(), lr=0.1)
    with pytest.raises(fs.UsageError, match=r"train\(\) and eval\(\) modes"):
        fs.fit(model, [batch()], nn.MSELoss(), optimizer, epochs=1, progress=False)
    with (
        fs.Run(tmp_path / "run", say=lambda text: None) as run,
        pytest.raises(fs.UsageError, match=r"train\(\) and eval\(\) modes"),
    ):
        fs.train(model, [batch()], nn.MSELoss(), optimizer, epochs=1, run=run)
    assert len(list(fs.train(model, [batch()], nn.MSELoss(), optimizer, epochs=1))) == 1  # a loop that switches them


class Own:
    """An objective of the user's, of which one method is replaced."""

    def __init__(self, **methods):
        for name, method in methods.items():
            setattr(self, name, method)

    def count(self, batch):
        return len(batch[0])

    def loss(self, model, batch, carry):
        return model(batch[0]).mean(), None


@pytest.mark.parametrize(
    ("method", "said"),
    [
        ({"size": lambda b: (3.0, 1.5)}, r"size\(batch\) returned 3.0, 1.5; it must return two whole numbers"),
        ({"size": lambda b: len(b[0])}, r"size\(batch\) returned 4; it must return two whole numbers"),
        ({"size": lambda b: (-5, 0)}, "each must be from 0"),
        ({"count": lambda b: -1}, r"count\(batch\) returned -1"),
        ({"count": lambda b: "4"}, r"count\(batch\) returned '4'"),
        ({"count": lambda b: float("nan")}, r"count\(batch\) returned nan"),
        ({"count": lambda b: torch.ones(4)}, r"count\(batch\) returned a tensor \[4\]"),
        ({"loss": lambda m, b, c: m(b[0]).mean()}, "must return 2: the mean loss, the carry"),
        ({"loss": lambda m, b, c: (m(b[0]).mean() * 1j, None)}, "the loss must be real"),
        ({"rate_scale": lambda b: None}, "must return a number"),
    ],
)
@pytest.mark.parametrize("graph", [False, True])
def test_what_an_objective_returns_wrongly_is_named_before_an_update(method, said, graph):
    model = nn.Linear(4, 3)
    before = model.weight.detach().clone()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(fs.UsageError, match=said):
        fs.TrainStep(model, Own(**method), optimizer, graph=graph)((torch.randn(4, 4),))
    assert torch.equal(model.weight, before)


def test_sizes_and_counts_of_one_element_become_numbers(tmp_path):
    model = nn.Linear(4, 3)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    own = Own(size=lambda b: (torch.tensor(4), np.int64(8)), count=lambda b: torch.tensor([4]))
    data = [(torch.randn(4, 4),)] * 3
    with fs.Run(tmp_path / "run") as run:
        rows = fs.fit(model, data, own, optimizer, epochs=1, run=run, progress=False)
    assert rows[-1]["tokens"] == 24
    with fs.Run(tmp_path / "run") as run:
        assert fs.fit(model, data, own, optimizer, epochs=2, run=run, progress=False)


def test_a_count_of_zero_is_named_with_its_place():
    model = nn.Linear(4, 3)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    own, data = Own(count=lambda b: b[1]), [(torch.randn(4, 4), 4), (torch.randn(4, 4), 0)]
    with pytest.raises(fs.UsageError, match="1 batches with a count of 0 at batch 1 of epoch 1"):
        list(fs.train(model, data, own, optimizer, epochs=1))


@pytest.mark.parametrize("name", ["graph", "activation_checkpointing"])
@pytest.mark.parametrize("value", ["off", "false", 0, None])
def test_a_switch_is_true_or_false(name, value):
    model = nn.Linear(4, 3)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(fs.UsageError, match=f"{name} = .* must be True or False"):
        fs.TrainStep(model, nn.MSELoss(), optimizer, **{name: value})


@pytest.mark.parametrize("model", [nn.Linear, lambda x: x, [1]], ids=["class", "function", "list"])
def test_a_model_is_a_module(model):
    optimizer = torch.optim.SGD(nn.Linear(4, 3).parameters(), lr=0.1)
    with pytest.raises(fs.UsageError, match="must be an nn.Module"):
        fs.TrainStep(model, nn.MSELoss(), optimizer)
    with pytest.raises(fs.UsageError, match="must be an nn.Module"):
        fs.evaluate(model, [], nn.MSELoss())
