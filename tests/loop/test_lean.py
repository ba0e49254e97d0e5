"""Three of the five steps without what surrounds them in torch: the same bits, and whoever hooked a call gets it."""

import copy
import functools

import pytest
import torch
from torch import nn
from torch.optim import Adam, AdamW, Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook

import fivestep as fs
from fivestep.loop import lean
from fivestep.loop.lean import Update, backward, zero_grad
from tests.same import assert_same_bits, assert_same_tree, twins


def network():
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 1))


def batches(n):
    generator = torch.Generator().manual_seed(4)
    return [(torch.randn(6, 5, generator=generator), torch.randn(6, 1, generator=generator)) for _ in range(n)]


def by_hand(model, optimizer, data, criterion=None):
    for features, labels in data:
        optimizer.zero_grad()
        (criterion or nn.MSELoss())(model(features), labels).backward()
        optimizer.step()


def two_groups(model):
    return [
        {"params": [p for p in model.parameters() if p.ndim == 2]},
        {"params": [p for p in model.parameters() if p.ndim == 1], "weight_decay": 0.0, "lr": 0.02},
    ]


BUILT = {
    "AdamW": lambda model: AdamW(model.parameters(), lr=0.01),
    "AdamW, no decay": lambda model: AdamW(model.parameters(), lr=0.01, weight_decay=0.0),
    "AdamW, two groups": lambda model: AdamW(two_groups(model), lr=0.01, betas=(0.8, 0.95), eps=1e-6),
    "Adam": lambda model: Adam(model.parameters(), lr=0.01),
    "Adam, decay": lambda model: Adam(model.parameters(), lr=0.01, weight_decay=0.1),
    "Adam, decoupled": lambda model: Adam(model.parameters(), 0.01, weight_decay=0.1, decoupled_weight_decay=True),
}
ELSE = {
    "amsgrad": lambda model: AdamW(model.parameters(), lr=0.01, amsgrad=True),
    "maximize": lambda model: Adam(model.parameters(), lr=1e-4, maximize=True),
    "foreach": lambda model: AdamW(model.parameters(), lr=0.01, foreach=True),
    "fused": lambda model: AdamW(model.parameters(), lr=0.01, fused=True),
    "tensor rate": lambda model: AdamW(model.parameters(), lr=torch.tensor(0.01)),
    "whole rate": lambda model: AdamW(model.parameters(), lr=1),
    "SGD": lambda model: torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9),
}


@pytest.mark.parametrize("name", [*BUILT, *ELSE])
def test_equals_the_loop_by_hand(name):
    build = {**BUILT, **ELSE}[name]
    ours, theirs = twins(network())
    data, mine, other = batches(60), build(ours), build(theirs)
    step = fs.TrainStep(ours, nn.MSELoss(), mine)
    for batch in data:
        step(batch)
    by_hand(theirs, other, data)
    assert_same_bits(ours, theirs)
    assert_same_tree(mine.state_dict(), other.state_dict())
    assert bool(step.updates[0].over_lists) is (name in BUILT)


def test_in_double_precision():
    ours, theirs = twins(network().double())
    data = [(x.double(), y.double()) for x, y in batches(10)]
    for _ in fs.train(ours, data, nn.MSELoss(), AdamW(ours.parameters()), epochs=1):
        pass
    by_hand(theirs, AdamW(theirs.parameters()), data)
    assert_same_bits(ours, theirs)


def test_parameters_of_different_age_and_without_a_gradient():
    """A layer is frozen for a while: the others go on counting, and it stays where it was."""
    ours, theirs = twins(network())
    data, mine, other = batches(30), AdamW(ours.parameters()), AdamW(theirs.parameters())
    step = fs.TrainStep(ours, nn.MSELoss(), mine)
    for part, freeze in ((data[:10], False), (data[10:20], True), (data[20:], False)):
        for model in (ours, theirs):
            model[0].requires_grad_(not freeze)
        for batch in part:
            step(batch)
        by_hand(theirs, other, part)
    assert_same_bits(ours, theirs)
    assert_same_tree(mine.state_dict(), other.state_dict())


def test_a_loaded_state_and_changed_options_are_taken_up():
    ours, theirs = twins(network())
    data, mine, other = batches(30), AdamW(ours.parameters()), AdamW(theirs.parameters())
    step = fs.TrainStep(ours, nn.MSELoss(), mine)
    for batch in data[:10]:
        step(batch)
    by_hand(theirs, other, data[:10])
    for one in (mine, other):
        one.load_state_dict(copy.deepcopy(one.state_dict()))
        one.param_groups[0] |= {"betas": (0.5, 0.9), "weight_decay": 0.3, "eps": 1e-3}
    for batch in data[10:20]:
        step(batch)
    by_hand(theirs, other, data[10:20])
    for one in (mine, other):
        one.param_groups[0]["maximize"] = True
    for batch in data[20:]:
        step(batch)
    by_hand(theirs, other, data[20:])
    assert_same_bits(ours, theirs)


def test_where_torchs_arithmetic_is_another_torchs_own_is_taken(monkeypatch):
    """What is tried once: bits that differ send every later step to torch."""
    monkeypatch.setattr(torch, "_foreach_lerp_", lambda first, grads, weight: None)
    ours, theirs = twins(network())
    step = fs.TrainStep(ours, nn.MSELoss(), AdamW(ours.parameters()))
    for batch in batches(5):
        step(batch)
    by_hand(theirs, AdamW(theirs.parameters()), batches(5))
    assert_same_bits(ours, theirs)
    assert step.updates[0].over_lists is False


def test_a_large_model_is_left_to_torch(monkeypatch):
    monkeypatch.setattr(lean, "SMALL", 10)
    model = network()
    step = fs.TrainStep(model, nn.MSELoss(), AdamW(model.parameters()))
    for batch in batches(3):
        step(batch)
    assert step.updates[0].over_lists is False


def counting(calls):
    def count(*arguments, **named):
        calls.append(1)

    return count


def test_hooks_and_replaced_steps_are_called(monkeypatch):
    calls = []
    model = network()
    optimizer = AdamW(model.parameters())
    step = fs.TrainStep(model, nn.MSELoss(), optimizer)
    data = batches(3)
    for batch in data:
        step(batch)
    assert step.updates[0].over_lists
    for register in (optimizer.register_step_pre_hook, optimizer.register_step_post_hook):
        handle = register(counting(calls))
        step(data[0])
        handle.remove()
        assert calls.pop() and not calls
    handle = register_optimizer_step_post_hook(counting(calls))
    step(data[0])
    handle.remove()
    assert calls.pop() and not calls
    monkeypatch.setattr(optimizer, "step", counting(calls))
    step(data[0])
    assert calls.pop() and not calls
    monkeypatch.undo()
    monkeypatch.setattr(AdamW, "step", counting(calls))
    step(data[0])
    assert calls.pop() and not calls


def test_a_profiler_sees_its_labels():
    model = network()
    step = fs.TrainStep(model, nn.MSELoss(), AdamW(model.parameters()))
    with torch.profiler.profile() as profile:
        for batch in batches(4):
            step(batch)
    names = {event.name for event in profile.events()}
    assert {"Optimizer.step#AdamW.step", "Optimizer.zero_grad#AdamW.zero_grad"} <= names


def test_backward_is_torchs(monkeypatch):
    """The same gradients, with a share or without; a tensor of another class, or a replaced call, decides."""
    weight = torch.tensor([2.0, 3.0], requires_grad=True)
    for share in (None, torch.tensor(0.25)):
        weight.grad = None
        backward((weight**2).sum(), share)
        assert weight.grad.tolist() == ([4.0, 6.0] if share is None else [1.0, 1.5])
    weight.grad = None
    backward((weight.double() ** 2).sum(), None)
    assert weight.grad.tolist() == [4.0, 6.0]

    class Own(torch.Tensor):
        seen = 0

        @classmethod
        def __torch_function__(cls, func, types, args=(), kwargs=None):
            cls.seen += func is torch.Tensor.backward
            return super().__torch_function__(func, types, args, kwargs or {})

    backward((weight**2).sum().as_subclass(Own), None)
    assert Own.seen == 1
    calls = []
    monkeypatch.setattr(torch.Tensor, "backward", counting(calls))
    backward((weight**2).sum(), None)
    assert calls == [1]


def test_a_graph_is_gone_after_its_pass():
    """As after `loss.backward()`: a second pass over it is an error, and what it held is freed."""
    weight = torch.tensor([2.0, 3.0], requires_grad=True)
    loss = (weight**2).sum()
    backward(loss, None)
    with pytest.raises(RuntimeError, match="second time"):
        backward(loss, None)


def test_gradients_are_none():
    model = network()
    optimizer = AdamW(model.parameters())
    by_hand(model, optimizer, batches(1))
    zero_grad([optimizer])
    assert all(p.grad is None for p in model.parameters())
    assert Update(optimizer).over_lists is None


class Halving(AdamW):
    @functools.wraps(AdamW.step)
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                p.grad.mul_(0.5)
        return super().step(closure)


def test_a_step_that_wraps_torchs_is_called():
    """`functools.wraps` makes a wrapper look like what it wraps: it is not taken off for that."""
    ours, theirs = twins(network())
    step = fs.TrainStep(ours, nn.MSELoss(), Halving(ours.parameters(), lr=0.01))
    for batch in batches(5):
        step(batch)
    by_hand(theirs, Halving(theirs.parameters(), lr=0.01), batches(5))
    assert_same_bits(ours, theirs)


def test_a_replaced_zero_grad_is_called(monkeypatch):
    calls = []
    optimizer = AdamW(network().parameters())
    monkeypatch.setattr(optimizer, "zero_grad", counting(calls))
    zero_grad([optimizer])
    assert calls.pop() and not calls
    monkeypatch.undo()
    monkeypatch.setattr(Optimizer, "zero_grad", counting(calls))
    zero_grad([optimizer])
    assert calls == [1]


def half(model):
    return model.to(torch.float16)


def with_complex(model):
    model.turn = nn.Parameter(torch.ones(3, dtype=torch.complex64))
    model.register_forward_hook(lambda module, _, out: out + (module.turn * (1 + 2j)).abs().sum())
    return model


@pytest.mark.parametrize("change", [half, with_complex])
def test_numbers_of_which_a_try_says_nothing_are_left_to_torch(change):
    ours, theirs = (change(one) for one in twins(network()))
    data = [(x.to(ours[0].weight.dtype), y.to(ours[0].weight.dtype)) for x, y in batches(20)]
    mine, other = (AdamW(one.parameters(), lr=0.01) for one in (ours, theirs))
    step = fs.TrainStep(ours, nn.MSELoss(), mine)
    for batch in data:
        step(batch)
    by_hand(theirs, other, data)
    assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), theirs.parameters(), strict=True))
    assert not step.updates[0].over_lists


def test_what_a_user_did_to_the_state_and_the_options_between_steps():
    """One count for all parameters, which torch counts up once each; a beta that has become a tensor."""
    ours, theirs = twins(network())
    data, mine, other = batches(20), AdamW(ours.parameters()), AdamW(theirs.parameters())
    step = fs.TrainStep(ours, nn.MSELoss(), mine)
    for batch in data[:5]:
        step(batch)
    by_hand(theirs, other, data[:5])
    for one in (mine, other):
        count = torch.tensor(5.0)
        for state in one.state.values():
            state["step"] = count
    for batch in data[5:10]:
        step(batch)
    by_hand(theirs, other, data[5:10])
    for one in (mine, other):
        one.param_groups[0]["betas"] = (0.9, torch.tensor(0.99))
    for batch in data[10:]:
        step(batch)
    by_hand(theirs, other, data[10:])
    assert_same_bits(ours, theirs)
