"""What a NonFiniteError says, that it is so, and that looking into it leaves no trace."""

import copy
import json
import random

import pytest
import torch
from torch import nn

import fivestep as fs
from fivestep.loop.state import random_state
from tests.same import assert_same_bits, twins


class Sqrt(nn.Module):
    """0 everywhere, with a gradient of 0 * inf."""

    def forward(self, x):
        return (x * 0).sqrt()


class Log(nn.Module):
    """NaN everywhere."""

    def forward(self, x):
        return (-1 - x.abs()).log()


class Unlucky(nn.Module):
    """NaN for about half of what a generator draws; `draws` is called once a pass."""

    def __init__(self, draws):
        super().__init__()
        self.draws = draws

    def forward(self, x):
        return x * torch.nan if self.draws() else x


def network(*middle):
    return nn.Sequential(nn.Linear(3, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), *middle, nn.Linear(8, 1))


def pair(seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(4, 3, generator=generator), torch.randn(4, 1, generator=generator)


def failed(model, *window, criterion=None, state=None, **options):
    """The error of a step."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    five = fs.TrainStep(model, criterion or nn.MSELoss(), optimizer, **options)
    with pytest.raises(fs.NonFiniteError) as raised:
        five(*window)
    error = raised.value
    assert json.loads(json.dumps(error.details)).keys() == error.details.keys()
    assert error.exit_code == 3
    return error


def nan_in(batch):
    features, labels = batch
    features[1, 2] = torch.nan
    return features, labels


def test_the_first_module_forward():
    error = failed(network(nn.Sequential(nn.Tanh(), Log()), nn.ReLU(inplace=True)), pair())
    assert error.details["origin"] == {"batch": 0, "pass": "forward", "in": "module", "name": "3.1", "class": "Log"}
    assert "it began in '3.1' (Log): its output is not finite, its inputs are" in str(error)
    assert error.details["inputs"] == [] and error.details["carry"]


def test_the_first_module_backward():
    error = failed(network(nn.Sequential(nn.Tanh(), Sqrt()), nn.Linear(8, 8)), pair())
    assert error.details["origin"] == {"batch": 0, "pass": "backward", "in": "module", "name": "3.1", "class": "Sqrt"}
    assert error.details["gradients"] == {
        "count": 4,
        "of": 8,
        "names": ["0.weight", "0.bias", "1.weight", "1.bias"],
    }
    assert "gradients not finite: 4 of 8 parameters (0.weight, 0.bias, 1.weight, 1.bias)" in str(error)


def test_a_gradient_is_not_put_down_to_a_module_that_shares_a_weight():
    model = nn.Sequential(nn.Linear(3, 3), Sqrt(), nn.Linear(3, 3), nn.Linear(3, 1))
    model[2].weight = model[0].weight
    assert failed(model, pair()).details["origin"]["name"] == "1"


def test_a_first_layer_whose_gradient_breaks():
    model = nn.Sequential(nn.Linear(3, 8), nn.Linear(8, 1))
    with torch.no_grad():
        model[0].weight[:, 0] = 0
    features, labels = pair()
    features[:, 0] = 3e38
    error = failed(model, (features, labels), criterion=lambda a, b: (a - b).square().mean() * 1e3)
    assert error.details["origin"] == {"batch": 0, "pass": "backward", "in": "module", "name": "0", "class": "Linear"}


def test_a_norm_that_overflows():
    features, labels = pair()
    error = failed(nn.Linear(3, 1), (features, labels), criterion=lambda a, b: (a - b).mean() * 1e37)
    assert error.details["origin"] == {"batch": None, "pass": "backward", "in": "norm"}
    assert error.details["gradients"]["count"] == 0
    assert "loss and gradients are finite, but too large for their norm" in str(error)


def test_a_module_that_is_the_whole_model():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.ones(1))

        def forward(self, x):
            return x[:, :1] * self.weight / 0

    assert "it began in the model (Model)" in str(failed(Model(), pair()))


@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_the_loss_itself(direction):
    def criterion(outputs, labels):
        error = (outputs - labels).mean()
        return error * torch.inf if direction == "forward" else (error * 0).sqrt()

    error = failed(network(), pair(), criterion=criterion)
    assert error.details["origin"] == {"batch": 0, "pass": direction, "in": "loss"}
    assert "it began in the loss" in str(error)


def test_the_micro_batch_and_what_it_holds():
    """Numbered as drawn, the batch without targets among them; the inputs' NaN is not put down to a module."""
    model = nn.Linear(3, 4)
    labels = torch.tensor([0, 1, 2, 3])
    window = [(pair(n)[0], labels) for n in range(4)]
    window[1] = (window[1][0], torch.full((4,), -100))
    nan_in(window[2])
    error = failed(model, *window, criterion=nn.CrossEntropyLoss())
    assert error.details["origin"] == {"batch": 2, "pass": "forward", "in": "data"}
    assert error.details["inputs"] == [{"batch": 2, "values": 1}]
    assert error.details["batches"] == [0, 3]
    assert "batch 2 itself holds NaN or infinite values: 1; on_nonfinite = 'skip' (--on-nonfinite)" in str(error)
    assert "it began in" not in str(error)


def test_labels_that_are_not_finite():
    features, labels = pair()
    labels[0] = torch.inf
    error = failed(network(), (features, labels), criterion=lambda a, b: (a - b).square().mean())
    assert error.details["origin"]["in"] == "data"


@pytest.mark.parametrize("mode", ["stop", "skip"])
def test_buffers_and_parameters_that_are_not_finite(mode):
    model = network()
    model.register_buffer("mask", torch.full((3,), -torch.inf))  # on purpose
    model.register_buffer("table", torch.tensor([torch.nan]))
    with torch.no_grad():
        model[-1].weight[0, 0] = torch.nan
    error = failed(model, nan_in(pair()), on_nonfinite=mode)
    assert error.details["parameters"] == {"count": 1, "of": 6, "names": ["3.weight"]}
    assert "not finite before this step already: 1 of 6 parameters (3.weight)" in str(error)
    names = ["table", "1.running_mean", "1.running_var"] if mode == "stop" else ["table"]
    assert error.details["buffers"] == {"count": len(names), "of": 5, "names": names}
    when = "after this batch" if mode == "stop" else "before this step already"
    assert f"not finite {when}: {len(names)} of 5 buffers ({', '.join(names)})" in str(error)


def test_an_update_that_overflows_is_told_by_the_next_step():
    model = nn.Linear(3, 1)
    features, labels = pair()
    batches = [(features, labels + 1e4)] * 3
    steps = fs.train(model, batches, nn.MSELoss(), torch.optim.SGD(model.parameters(), lr=3e38), epochs=1)
    assert next(steps).step == 1
    with pytest.raises(fs.NonFiniteError, match=r"already: 2 of 2 parameters \(weight, bias\)") as raised:
        next(steps)
    assert raised.value.details["step"] == 2


def test_more_names_than_fit():
    model = nn.Sequential(*(nn.Linear(3, 3) for _ in range(5)), nn.Linear(3, 1))
    error = failed(model, nan_in(pair()))
    assert error.details["gradients"]["count"] == 12 and len(error.details["gradients"]["names"]) == 5
    assert "12 of 12 parameters (0.weight, 0.bias, 1.weight, 1.bias, 2.weight, ...)" in str(error)


def test_the_second_pass_draws_what_the_first_drew():
    for seed in range(8):  # NaN in half of them
        torch.manual_seed(seed)
        model = network(Unlucky(lambda: bool(torch.rand(()) < 0.5)))
        five = fs.TrainStep(model, nn.MSELoss(), torch.optim.SGD(model.parameters(), lr=0.1))
        torch.manual_seed(seed)
        try:
            five(pair())
        except fs.NonFiniteError as error:
            assert error.details["origin"]["class"] == "Unlucky"


def test_what_does_not_come_back_is_not_made_up():
    calls = iter([True, False])
    error = failed(network(Unlucky(lambda: next(calls))), pair())
    assert error.details["origin"] is None and error.details["error"] is None
    assert "not found again in a second pass" in str(error)


def test_a_count_of_0_whose_gradient_is_not_finite():
    """Label smoothing gives targets of weight 0 a loss: divided by their weights, which are 0, it is infinite."""
    criterion = nn.CrossEntropyLoss(weight=torch.tensor([1.0, 0.0]), label_smoothing=0.1)
    window = [(torch.randn(4, 3), torch.zeros(4).long()), (torch.randn(4, 3), torch.ones(4).long())]
    error = failed(nn.Linear(3, 2), *window, criterion=criterion)
    assert error.details["origin"] == {"batch": 1, "pass": "backward", "in": "count"}
    assert "it began in the loss of batch 1. The batch has a count of 0" in str(error)


def test_a_second_pass_that_fails_hides_nothing():
    calls = iter([True])
    error = failed(network(Unlucky(lambda: next(calls))), pair())
    assert "the loss is nan" in str(error)
    assert "a second pass failed (StopIteration" in str(error)


@pytest.mark.parametrize("middle", [Log, Sqrt])
def test_no_trace(middle):
    """Gradients, buffers, random states, modes, hooks and carry are those that the failed pass left."""
    model, twin = twins(network(nn.Tanh(), middle()))
    model[3].eval(), twin[3].eval()
    model[3].register_forward_hook(lambda *_: random.seed(random.random()))
    twin[3].register_forward_hook(lambda *_: random.seed(random.random()))
    batch = pair()
    torch.manual_seed(1)
    random.seed(1)
    nn.MSELoss()(twin(batch[0]), batch[1]).backward()
    after = random_state()

    torch.manual_seed(1)
    random.seed(1)
    five = fs.TrainStep(model, nn.MSELoss(), torch.optim.SGD(model.parameters(), lr=0.1))
    five.state.carry = carry = torch.zeros(2)
    hooks = copy.copy(model[3]._forward_hooks)
    with pytest.raises(fs.NonFiniteError):
        five(batch)
    assert_same_bits(model, twin)
    for ours, theirs in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(ours.grad.isnan(), theirs.grad.isnan())
        assert torch.equal(ours.grad.nan_to_num(), theirs.grad.nan_to_num())
    now = random_state()
    assert torch.equal(now["torch"], after["torch"]) and now["python"] == after["python"]
    assert [m.training for m in model.modules()] == [m.training for m in twin.modules()]
    assert five.state.carry is carry
    assert model[3]._forward_hooks == hooks
    assert not any(module._forward_pre_hooks for module in model.modules())
    assert five.state.clock.step == 0


def test_a_buffer_that_the_forward_pass_replaces():
    class Counting(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("seen", torch.zeros(()))

        def forward(self, x):
            self.seen = self.seen + 1
            return x

    model = nn.Sequential(Counting(), nn.Linear(3, 1))
    failed(model, nan_in(pair()))
    assert float(model[0].seen) == 1  # of the failed pass alone
    five = fs.TrainStep(model, nn.MSELoss(), torch.optim.SGD(model.parameters(), lr=0.1), on_nonfinite="skip")
    buffer = model[0].seen
    assert five(nan_in(pair())) is None
    assert model[0].seen is buffer and float(buffer) == 1


def test_what_the_reader_calls_the_batch():
    class Reader:
        def where(self, epoch, position, n):
            return {
                "indices": [
                    [torch.tensor(100 * epoch + 10 * p + row) for row in range(8)]
                    for p in range(position, position + n)
                ]
            }

    class Read(fs.State):
        pass

    model = nn.Linear(3, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    state = Read(model, [optimizer])
    state.clock.epoch, state.position, state.reader = 2, 3, Reader()
    five = fs.TrainStep(model, nn.MSELoss(), optimizer, state=state)
    with pytest.raises(
        fs.NonFiniteError, match=r"indices in the data: 240, 241, 242, 243, 244, \.\.\. \(8\)"
    ) as raised:
        five(pair(), nan_in(pair(1)))  # the second of the window alone
    assert raised.value.details["where"] == {"indices": [[*range(240, 248)]]}


def test_inside_compiled_code():
    model = torch.compile(network(Log()), backend="eager")
    model(pair()[0])
    error = failed(model, pair())
    assert error.details["origin"]["class"] == "Log"


class Expanded(nn.Module):
    """A model with a buffer of which one element of memory is seen as many, changed by each forward."""

    def __init__(self, persistent):
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(3, 1)
        self.register_buffer("calls", torch.zeros(2, 1).expand(2, 50), persistent=persistent)

    def forward(self, x):
        self.calls[:, :1] += 1
        return self.layer(x) * (1 + 0 * self.calls[0, 7])


@pytest.mark.parametrize("persistent", [True, False])
def test_a_skipped_step_puts_an_expanded_buffer_back(persistent):
    bad = (torch.full((4, 3), torch.nan), torch.zeros(4, 1))
    model, plain = Expanded(persistent), Expanded(persistent)
    fs.fit(model, [pair(), bad, pair(1)], nn.MSELoss(), torch.optim.SGD(model.parameters(), lr=0.1), epochs=1,
           on_nonfinite="skip", progress=False)  # fmt: skip
    fs.fit(plain, [pair(), pair(1)], nn.MSELoss(), torch.optim.SGD(plain.parameters(), lr=0.1), epochs=1,
           progress=False)  # fmt: skip
    assert_same_bits(model.layer, plain.layer)
    assert model.calls.tolist() == [[2.0] * 50] * 2
    assert model.calls.stride() == (1, 0)


def test_the_second_pass_puts_an_expanded_buffer_back():
    model = Expanded(True)
    error = failed(model, (torch.full((4, 3), torch.nan), torch.zeros(4, 1)))
    assert error.details["error"] is None
    assert model.calls.tolist() == [[1.0] * 50] * 2  # of the step itself; the second pass leaves no trace


def test_best_weights_and_a_saved_state_load_into_an_expanded_buffer():
    model = Expanded(True)
    five = fs.TrainStep(model, nn.MSELoss(), torch.optim.SGD(model.parameters(), lr=0.1))
    five(pair())
    five.state.keep_best()
    saved = copy.deepcopy(five.state.state_dict())
    five(pair(1))
    for put_back in (five.state.return_to_best, lambda: five.state.load_state_dict(saved)):
        model.calls[:, :1] = 9
        put_back()
        assert model.calls.tolist() == [[1.0] * 50] * 2
        assert torch.equal(model.layer.weight, saved["model"]["layer.weight"])
