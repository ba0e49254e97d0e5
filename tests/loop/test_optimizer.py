"""Optimizers by name, groups by name."""

from itertools import islice

import pytest
import torch
from torch import nn

import fivestep as fs
from fivestep.data.windows import Windows
from fivestep.loop.optimizer import build_muon, build_optimizer, freeze, hidden_matrices
from fivestep.models.bigram import Bigram
from fivestep.models.gpt import GPT
from fivestep.models.mlp import MLP
from fivestep.models.rnn import RNN
from tests.same import assert_same_bits, twins


def model():
    return nn.ModuleDict({"linear": nn.Linear(3, 2), "norm": nn.LayerNorm(2)})


def test_no_decay_by_name():
    optimizer = build_optimizer(model(), "adamw", 0.1, no_decay=["*.bias", "norm.*"], weight_decay=0.3)
    decayed, spared = optimizer.param_groups
    assert [tuple(p.shape) for p in decayed["params"]] == [(2, 3)]
    assert len(spared["params"]) == 3
    assert (decayed["weight_decay"], spared["weight_decay"]) == (0.3, 0.0)


@pytest.mark.parametrize(
    "name, kind", [("sgd", torch.optim.SGD), ("adam", torch.optim.Adam), ("adamw", torch.optim.AdamW)]
)
def test_by_name(name, kind):
    optimizer = build_optimizer(model(), name, 0.1)
    assert type(optimizer) is kind
    assert len(optimizer.param_groups) == 1
    assert optimizer.param_groups[0]["lr"] == 0.1


def test_frozen_parameters_are_left_out():
    network = model()
    network["norm"].requires_grad_(False)
    assert len(build_optimizer(network, "sgd", 0.1).param_groups[0]["params"]) == 2


def test_unknown():
    with pytest.raises(fs.UsageError, match=r"'adanw'.*sgd, adam, adamw.*did you mean 'adamw'"):
        build_optimizer(model(), "adanw", 0.1)


def test_muon_on_the_hidden_matrices_equals_a_loop_by_hand(tokens):
    ours, theirs = twins(GPT(29, block_size=8, n_layer=2, n_head=2, n_embd=16))
    options = {"weight_decay": 0.1, "no_decay": ["token*"], "betas": (0.9, 0.99)}
    optimizers = build_muon(ours, 0.02, 0.9, 0.003, **options)
    data = Windows(tokens, 8, 4, seed=1)
    assert sum(1 for _ in fs.train(ours, data, fs.NextToken(), optimizers, max_iters=6)) == 6
    muon = torch.optim.Muon(theirs.blocks.parameters(), 0.02, 0.1, 0.9, adjust_lr_fn="match_rms_adamw")
    groups = [
        {"params": [theirs.lm_head.weight]},
        {"params": [theirs.token_embedding_table.weight], "weight_decay": 0.0},
    ]
    adamw = torch.optim.AdamW(groups, lr=0.003, betas=(0.9, 0.99), weight_decay=0.1)
    for xb, yb in islice(data.epoch(0), 6):
        muon.zero_grad()
        adamw.zero_grad()
        nn.functional.cross_entropy(theirs(xb).flatten(0, 1), yb.flatten()).backward()
        muon.step()
        adamw.step()
    assert_same_bits(ours, theirs)


@pytest.mark.parametrize(
    "model, matrices",
    [
        (lambda: GPT(29, 8, 1, 2, 16), {"blocks"}),
        (lambda: GPT(29, 8, 1, 2, 16, tied=True), {"blocks"}),
        (lambda: RNN(29, 8, 12, 1, tied=True), {"rnn", "projection"}),
        (lambda: MLP([3, 8, 8, 1]), {"0", "3", "2", "layers", "net"}),
    ],
)
def test_hidden_matrices(model, matrices):
    made = model()
    names = hidden_matrices(made)
    assert names
    assert {name.split(".")[0] for name in names} <= matrices
    assert all(made.get_parameter(name).ndim == 2 for name in names)


def test_muon_refuses_a_model_without_hidden_matrices():
    with pytest.raises(fs.UsageError, match="--optimizer adamw"):
        build_muon(Bigram(7), 0.02, 0.9, 0.003, weight_decay=0.0)


def test_freeze():
    model = GPT(29, block_size=8, n_layer=2, n_head=2, n_embd=16)
    assert freeze(model, ["blocks.0.*", "lm_head*"]) == 12 * 16**2 + 29 * 16
    optimizer = build_optimizer(model, "adamw", 0.1)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    xb = torch.zeros(1, 4, dtype=torch.long)
    fs.TrainStep(model, fs.NextToken(), optimizer)((xb, xb))
    same = {name for name, p in model.named_parameters() if torch.equal(p, before[name])}
    assert {name for name in before if name.startswith(("blocks.0", "lm_head"))} <= same
    assert "token_embedding_table.weight" not in same
    with pytest.raises(fs.UsageError, match=r"freeze = 'block.0.\*' matches no parameter.*--freeze"):
        freeze(model, ["block.0.*"])
    freeze(model, ["*"])
    with pytest.raises(fs.UsageError, match="left to train"):
        build_optimizer(model, "adamw", 0.1)


# --- the parameters that the optimizers hold now ---


def halves():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 1))
    return model, torch.optim.SGD(model[2].parameters(), lr=0.5, momentum=0.9)


def pairs(n=8):
    draw = torch.Generator().manual_seed(1)
    return [(torch.randn(4, 3, generator=draw), torch.randn(4, 1, generator=draw)) for _ in range(n)]


def edited_in_place(model, optimizer):
    optimizer.param_groups[0]["params"][:] = model[0].parameters()


def replaced_by_another_of_its_size(model, optimizer):
    optimizer.param_groups[0] = {**optimizer.param_groups[0], "params": [model[4].weight, model[4].bias]}


def replaced_in_the_model(model, optimizer):
    torch.manual_seed(5)
    model[2] = nn.Linear(4, 4)
    optimizer.param_groups[0]["params"][:] = model[2].parameters()


def made_shorter(model, optimizer):
    del optimizer.param_groups[0]["params"][0]


EDITS = [edited_in_place, replaced_by_another_of_its_size, replaced_in_the_model, made_shorter]


@pytest.mark.parametrize("edit", EDITS)
@pytest.mark.parametrize("limits", [{"clip_norm": 0.01}, {"clip_value": 0.003}])
@pytest.mark.filterwarnings("ignore:no optimizer holds")
def test_groups_edited_between_two_steps_are_clipped_as_they_are_now(edit, limits):
    theirs, optimizer = halves()
    norms = []
    for number, (x, y) in enumerate(pairs()):
        if number == 3:
            edit(theirs, optimizer)
        optimizer.zero_grad()
        nn.functional.mse_loss(theirs(x), y).backward()
        held = [p for p in theirs.parameters() if any(p is one for one in optimizer.param_groups[0]["params"])]
        norms.append(nn.utils.get_total_norm([p.grad for p in held]))
        if "clip_norm" in limits:
            nn.utils.clip_grad_norm_(held, limits["clip_norm"])
        else:
            nn.utils.clip_grad_value_(held, limits["clip_value"])
        optimizer.step()
    ours, optimizer = halves()
    found = []
    for info in fs.train(ours, pairs(), nn.MSELoss(), optimizer, epochs=1, **limits):
        found.append(info.grad_norm)
        if info.step == 3:
            edit(ours, optimizer)
    assert torch.equal(torch.stack(found), torch.stack(norms))
    assert_same_bits(ours, theirs)


@pytest.mark.filterwarnings("ignore:no optimizer holds")
def test_the_average_takes_up_a_new_parameter():
    model, _ = halves()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    five = fs.TrainStep(model, nn.MSELoss(), optimizer, ema=0.5)
    for number, batch in enumerate(pairs()):
        if number == 4:
            old = model[2].weight
            model[2] = nn.Linear(4, 4)
            optimizer.param_groups[0]["params"][:] = model.parameters()
            average = model[2].weight.detach().clone()
        five(batch)
        if number >= 4:
            average.lerp_(model[2].weight.detach(), 0.5)
    live = model[2].weight.detach().clone()
    with five.state.averaged():
        assert torch.equal(model[2].weight, average)
    assert torch.equal(model[2].weight, live)
    assert not any(p is old for p in five.state.average.live)


def test_parameters_that_no_optimizer_holds_are_reported_once(recwarn):
    model, optimizer = halves()
    model[4].requires_grad_(False)  # on purpose: nothing is said of it
    with pytest.warns(UserWarning, match=r"no optimizer holds 2 trainable parameters \(0.weight, 0.bias\)") as told:
        for info in fs.train(model, pairs(), nn.MSELoss(), optimizer, epochs=1):
            if info.step == 2:
                replaced_by_another_of_its_size(model, optimizer)
                model[4].requires_grad_(True)
            if info.step == 4:
                optimizer.param_groups[0]["params"][:] = model[2].parameters()
    assert len(told) == 1 and told[0].filename == __file__


def test_unfrozen_parameters_that_no_optimizer_holds_are_reported():
    model, _ = halves()
    model[0].requires_grad_(False)
    five = fs.TrainStep(model, nn.MSELoss(), build_optimizer(model, "sgd", 0.1))
    five(pairs()[0])
    model[0].requires_grad_(True)
    with pytest.warns(UserWarning, match=r"no optimizer holds 2 trainable parameters \(0.weight, 0.bias\)"):
        five(pairs()[0])


def test_a_parameter_replaced_in_the_model_alone_is_reported():
    model, _ = halves()
    five = fs.TrainStep(model, nn.MSELoss(), torch.optim.SGD(model.parameters(), lr=0.1))
    five(pairs()[0])
    model[2] = nn.Linear(4, 4)
    with pytest.warns(UserWarning, match="no longer in the model: 2"):
        five(pairs()[0])


def test_what_another_steps_optimizer_holds_is_not_reported(recwarn):
    model, first = halves()
    second = torch.optim.SGD([*model[0].parameters(), *model[4].parameters()], lr=0.1)
    five, other = (fs.TrainStep(model, nn.MSELoss(), one) for one in (first, second))
    five(pairs()[0])
    other(pairs()[0])
    assert not recwarn.list


def test_optimizers_without_parameters_or_with_one_twice_are_refused():
    model, optimizer = halves()
    five = fs.TrainStep(model, nn.MSELoss(), optimizer)
    optimizer.param_groups[0]["params"].append(model[2].bias)
    with pytest.raises(fs.UsageError, match="the same parameter is in two optimizers"):
        five(pairs()[0])
    optimizer.param_groups.clear()
    with pytest.raises(fs.UsageError, match="holds no parameters"):
        five(pairs()[0])
    assert five.state.clock.step == 0
