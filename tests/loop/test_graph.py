"""The five steps as one program: equal to the eager steps, and honest where it cannot be.

A program takes seconds to compile, so a few are compiled once, and looked at from many sides.
"""

import copy
import gc
import random
import shutil
import subprocess
import sys
import warnings
import weakref

import numpy as np
import pytest
import torch
from torch import nn

import fivestep as fs
from benchmarks.measure import child
from fivestep.data.files import cache_folder
from fivestep.data.segments import Segments
from fivestep.errors import NonFiniteError
from fivestep.loop.graph import filled, form, refusal
from fivestep.loop.program import NoProgramError, compiler, recorded
from tests.promises.test_11_overhead import Reads
from tests.same import assert_same_bits, assert_same_tree

needs_compiler = pytest.mark.skipif(not compiler(), reason="programs need a C++ compiler")


@pytest.fixture(autouse=True)
def one_cache(tmp_path_factory, monkeypatch):
    """Programs are compiled once for all tests of a session."""
    monkeypatch.setenv("FIVESTEP_CACHE", str(tmp_path_factory.getbasetemp() / "programs-of-tests"))


def mlp():
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(16, 64), nn.Tanh(), nn.Dropout(0.1), nn.Linear(64, 1))


def batches(n, rows=32, last=None):
    generator = torch.Generator().manual_seed(2)
    data = [torch.randn(rows, 16, generator=generator) for _ in range(n)]
    if last:
        data[-1] = data[-1][:last]
    return [(x, x[:, :1].sin() + 0.1 * torch.randn(len(x), 1, generator=generator)) for x in data]


def halving(step):
    return 0.5 ** (step / 200)


OPTIONS = {"scheduler": halving, "clip_norm": 0.5}


def steps(graph, data, run=None, model=None, optimizer=None, **options):
    """The generator of the job that most tests share: AdamW with decay, clipping, dropout, a schedule."""
    model = model or mlp()
    optimizer = optimizer or torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.1)
    torch.manual_seed(3)
    options = {"max_iters": 1000, **OPTIONS, **options}
    return model, optimizer, fs.train(model, data, nn.MSELoss(), optimizer, graph=graph, run=run, **options)


def losses(results):
    return torch.stack([result.loss for result in results])


def relative(ours, theirs):
    return ((ours - theirs).abs() / theirs.abs()).max().item()


@needs_compiler
def test_a_thousand_steps_agree_with_the_eager_ones_and_the_tail_is_an_eager_step():
    data = batches(20, last=7)
    eager, graph = (list(steps(graph, data)[2]) for graph in (False, True))
    assert graph[-1].step == 1000
    assert relative(losses(graph), losses(eager)) < 1e-5
    assert relative(torch.stack([r.grad_norm for r in graph]), torch.stack([r.grad_norm for r in eager])) < 1e-4
    assert [r.learning_rate for r in graph] == [r.learning_rate for r in eager]
    assert [r.count for r in graph] == [r.count for r in eager]
    assert (graph[-1].state.clock.samples, graph[-1].state.clock.epoch) == (50 * (19 * 32 + 7), 50)


@needs_compiler
def test_the_last_reference_frees_model_and_optimizer_but_not_what_is_still_to_be_confirmed():
    list(steps(True, batches(3), max_iters=2)[2])  # compiles, with the garbage that makes
    gc.collect()
    gc.disable()
    try:
        model, optimizer, results = steps(True, batches(3), max_iters=5)
        for result in results:
            state, freed = result.state, [weakref.ref(one) for one in (optimizer, result.state.latch.step)]
        assert state.latch.program is not None and state.clock.step == 5
        del results, optimizer, result
        freed.append(weakref.ref(model))
        assert freed[1]() is None
        state.confirm()  # the state outlives its step
        del model, state
        assert [ref() for ref in freed] == [None, None, None]
    finally:
        gc.enable()


@needs_compiler
@pytest.mark.slow
@pytest.mark.multiprocess
def test_another_process_takes_the_program_up_and_imports_no_compiler():
    list(steps(True, batches(3), max_iters=2)[2])
    done = subprocess.run([sys.executable, "-c", ANOTHER_PROCESS], capture_output=True, text=True, env=child())
    assert done.returncode == 0, done.stderr
    assert "compiling" not in done.stdout + done.stderr


ANOTHER_PROCESS = """
import os, sys
from fivestep.run.start import postpone_compiler
postpone_compiler()
from tests.loop.test_graph import batches, steps
model, optimizer, results = steps(True, batches(3), max_iters=5)
state = list(results)[-1].state
assert state.latch.program is not None and state.latch.refused is None
print([name for name in sys.modules if name in ("torch._dynamo", "torch._inductor", "sympy")])
assert "torch._dynamo" not in sys.modules
"""


@needs_compiler
def test_one_step_gives_the_same_weights_gradients_and_optimizer_state_to_rounding():
    data = batches(3)
    ours, our_optimizer, results = steps(True, data, max_iters=2)
    list(results)
    theirs, their_optimizer, results = steps(False, data, max_iters=2)
    list(results)
    for mine, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert torch.allclose(mine, other, rtol=1e-6, atol=1e-7)
        assert torch.allclose(mine.grad, other.grad, rtol=1e-5, atol=1e-7)
    mine, other = our_optimizer.state_dict(), their_optimizer.state_dict()
    assert mine["param_groups"] == other["param_groups"]  # nothing of a graph is left in the user's object
    for number, state in other["state"].items():
        assert mine["state"][number].keys() == state.keys()
        for name, value in state.items():
            assert mine["state"][number][name].dtype == value.dtype
            assert torch.allclose(mine["state"][number][name], value, rtol=1e-5, atol=1e-9), name


@needs_compiler
def test_nothing_is_read_on_the_host_between_two_looks():
    data = batches(4)
    _, _, graph = steps(True, data, epochs=5, max_iters=None)
    for _ in range(3):
        next(graph)
    counted = []
    for result in graph:
        if counted:
            counted[-1].__exit__(None, None, None)
        if result.step == 20:
            break
        counted.append(Reads())
        counted[-1].__enter__()
    within = [one.count for number, one in enumerate(counted) if (number + 3) % 4]  # others end an epoch
    assert len(within) >= 9 and not any(within)


@needs_compiler
def test_a_resumed_graph_ends_where_the_uninterrupted_one_does_bit_for_bit(tmp_path):
    data = batches(6, last=5)
    whole = tmp_path / "whole"
    with fs.Run(whole) as run:
        model, optimizer, results = steps(True, data, run, max_iters=40)
        expected = losses(results)
    for stops in ([1], [2], [3, 17], [23]):
        name = tmp_path / "-".join(map(str, stops))
        seen = []
        for stop in [*stops, None]:
            with fs.Run(name) as run:
                again, again_optimizer, results = steps(True, data, run, max_iters=40)
                for result in results:
                    seen.append(result.loss)
                    if result.step == stop:
                        break
                results.close()
        assert torch.equal(torch.stack(seen), expected), stops
        assert_same_bits(again, model)
        assert_same_tree(again_optimizer.state_dict(), optimizer.state_dict())


@needs_compiler
@pytest.mark.parametrize("first", [True, False])
def test_checkpoints_cross_load(tmp_path, first):
    data = batches(6)
    with fs.Run(tmp_path / "run") as run:
        for result in steps(first, data, run, max_iters=15)[2]:
            loss = result.loss
    _, _, results = steps(first, data, max_iters=30)
    expected = losses(results)
    with fs.Run(tmp_path / "run") as run:
        crossed = losses(steps(not first, data, run, max_iters=30)[2])
    assert torch.equal(loss, expected[14])
    assert relative(crossed, expected[15:]) < 1e-5


@needs_compiler
@pytest.mark.parametrize("bad", ["inputs", "targets"])
def test_a_step_that_is_not_finite_leaves_everything_as_it_was_and_is_named(bad):
    data = batches(12)
    x, y = data[7]
    data[7] = (x * torch.nan, y) if bad == "inputs" else (x, y + torch.inf)
    model, optimizer, results = steps(True, data, epochs=3, max_iters=None)
    for result in results:
        if result.step == 7:
            weights, state = copy.deepcopy(model), copy.deepcopy(optimizer.state_dict())
        if result.step == 11:
            break
    with pytest.raises(NonFiniteError, match="step 8 .*batch 7.*none? of the 3 after|step 8 .*batch 7") as error:
        result.state.state_dict()
    assert error.value.details["batches"] == [7, 7] and error.value.details["step"] == 8
    assert_same_bits(model, weights)
    assert_same_tree(optimizer.state_dict()["state"], state["state"])


@needs_compiler
def test_a_run_keeps_the_last_checkpoint_of_a_graph_that_was_not_finite(tmp_path):
    data = batches(12)
    data[7] = (data[7][0] * torch.nan, data[7][1])
    with pytest.raises(NonFiniteError), fs.Run(tmp_path / "run", checkpoint_every=5) as run:
        for _ in steps(True, data, run, epochs=1, max_iters=None)[2]:
            pass
    with fs.Run(tmp_path / "run") as run:
        _, _, results = steps(False, data, run, epochs=1, max_iters=None)
        assert next(results).step == 6


@needs_compiler
def test_skip_leaves_out_what_is_not_finite_and_journals_it():
    data = batches(12)
    data[7] = (data[7][0] * torch.nan, data[7][1])
    options = {"epochs": 2, "max_iters": None, "on_nonfinite": "skip"}
    graph, eager = (list(steps(graph, data, **options)[2]) for graph in (True, False))
    assert len(graph) == len(eager) == 22
    assert relative(losses(graph), losses(eager)) < 1e-5
    assert [s["position"] for s in graph[-1].state.skipped] == [7, 7]


@needs_compiler
def test_a_loaded_state_and_a_changed_setting_are_taken_up():
    data = batches(6)
    found = []
    for graph in (True, False):
        model, optimizer, results = steps(graph, data, max_iters=30)
        found.append([])
        for result in results:
            found[-1].append(result.loss)
            match result.step:
                case 8:
                    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
                case 10:
                    held = result.state.latch.held if graph else None
                    assert not graph or held[-4] is optimizer.state[list(model.parameters())[-1]]["exp_avg"]
                case 12:
                    optimizer.param_groups[0]["betas"] = (0.5, 0.9)
                case 16:
                    optimizer.param_groups[0]["betas"] = (0.9, 0.999)
                    model[2].eval()
                case 20:
                    model[2].train()
                case 24:
                    extra = nn.Parameter(torch.zeros(1))
                    model.register_parameter("extra", extra)
                    optimizer.add_param_group({"params": [extra]})
        if graph:
            assert result.state.latch.program is not None and result.state.latch.held is held
    assert relative(*map(torch.stack, found)) < 1e-5


def a_layer_replaced(model, optimizer):
    torch.manual_seed(5)
    model[3] = nn.Linear(64, 1)
    optimizer.param_groups[0]["params"][:] = model.parameters()


def a_state_laid_out_otherwise(model, optimizer):
    state = optimizer.state[model[0].weight]
    state["exp_avg"] = state["exp_avg"].t().contiguous().t()


@needs_compiler
@pytest.mark.filterwarnings("ignore:parameters of the optimizer that are no longer in the model")
@pytest.mark.parametrize("change", [a_layer_replaced, a_state_laid_out_otherwise])
def test_a_program_never_works_on_tensors_that_were_replaced(change):
    """What it would change is of the same shapes as before, and steps that follow must not take it for its own."""
    found, models = [], []
    for graph in (True, False):
        model, optimizer, results = steps(graph, batches(6), max_iters=20)
        found.append([])
        models.append(model)
        for result in results:
            found[-1].append(result.loss)
            if result.step == 8:
                change(model, optimizer)
        assert not graph or result.state.latch.program is not None
    assert relative(*map(torch.stack, found)) < 1e-5
    assert torch.allclose(models[0][3].weight, models[1][3].weight, rtol=1e-3)
    assert torch.allclose(models[0][0].weight, models[1][0].weight, rtol=1e-3, atol=1e-6)


OPTIMIZERS = {
    "SGD": {"lr": 0.05, "momentum": 0.9, "nesterov": True, "weight_decay": 1e-3},
    "Adam": {"lr": 1e-3, "amsgrad": True},
    "AdamW": {"lr": 1e-3, "fused": True},
    "NAdam": {"lr": 1e-3},
    "RAdam": {"lr": 1e-3},
    "Adamax": {"lr": 1e-3},
    "Adadelta": {"lr": 0.1},
    "Adagrad": {"lr": 1e-2},
    "ASGD": {"lr": 1e-2},
    "RMSprop": {"lr": 1e-3, "momentum": 0.9, "centered": True},
    "Rprop": {"lr": 1e-4},
    "Muon": {"lr": 1e-3},
}


class Branches(nn.Module):
    """One branch for each optimizer; a batch norm's statistics are buffers."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(4)
        self.norm = nn.BatchNorm1d(16)
        self.branches = nn.ModuleDict({name: nn.Linear(16, 4, bias=False) for name in OPTIMIZERS})

    def forward(self, x):
        x = self.norm(x)
        return torch.stack([branch(x).square().mean(1) for branch in self.branches.values()], 1)


def all_optimizers(model):
    kinds = [getattr(torch.optim, name) for name in OPTIMIZERS if hasattr(torch.optim, name)]
    of = [kind(model.branches[kind.__name__].parameters(), **OPTIMIZERS[kind.__name__]) for kind in kinds]
    return [*of, torch.optim.SGD(model.norm.parameters(), lr=0.01)]


@needs_compiler
def test_every_optimizer_of_torch_steps_as_it_does_eagerly():
    data = [(x, x[:, :1].expand(-1, len(OPTIMIZERS)).contiguous()) for x, _ in batches(10)]
    models = []
    for graph in (True, False):
        models.append(Branches())
        step = fs.TrainStep(models[-1], nn.MSELoss(), all_optimizers(models[-1]), graph=graph)
        for _ in range(3):
            for batch in data:
                step(batch)
        step.state.confirm()
        if graph:
            assert step.graph.program is not None, step.graph.refused
    ours, theirs = (model.state_dict() for model in models)
    start = Branches().state_dict()
    for name, value in theirs.items():
        moved = (value - start[name]).abs().max()
        tolerance = 2e-2 if "Muon" in name else 1e-3  # Muon's products are in bfloat16
        assert (ours[name] - value).abs().max() <= tolerance * moved + 1e-9, name
    assert ours["norm.num_batches_tracked"] == 30


class Tagger(nn.Module):
    """An LSTM that drops, with a tied decoder, as a user would write it."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(5)
        self.encoder, self.dropout = nn.Embedding(29, 12), nn.Dropout(0.2)
        self.rnn, self.decoder = nn.LSTM(12, 12), nn.Linear(12, 29)
        self.decoder.weight = self.encoder.weight
        self.mask = torch.ones(12)  # neither parameter nor buffer

    def forward(self, data, hidden=None):
        output, hidden = self.rnn(self.dropout(self.encoder(data)) * self.mask, hidden)
        return self.decoder(output), hidden


@needs_compiler
def test_a_carried_state_dropout_tied_weights_and_accumulation(tokens):
    found = []
    for graph in (True, False):
        model = Tagger()
        torch.manual_seed(6)
        segments = Segments(tokens, batch_size=4, bptt=5)
        optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
        step_losses, results = [], None
        for results in fs.train(
            model,
            segments,
            fs.TruncatedBPTT(),
            optimizer,
            epochs=2,
            accumulate=2,
            clip_norm=0.25,
            ema=0.9,
            graph=graph,
        ):
            step_losses.append(results.loss)
        found.append((torch.stack(step_losses), model, results.state))
    (ours, model, state), (theirs, _, other) = found
    assert len(ours) == len(theirs) > 90
    assert relative(ours, theirs) < 1e-5
    assert state.latch.program is not None and state.full["carried"]
    assert torch.allclose(state.carry[0], other.carry[0], rtol=1e-3, atol=1e-5)
    assert state.average.updates == other.average.updates


def frozen(model, optimizer, step):
    model[0].requires_grad_(False)


def no_dropout(model, optimizer, step):
    model[2].p = 0.0


def another_module(model, optimizer, step):
    model[1] = nn.ReLU()


def another_loss(model, optimizer, step):
    step.criterion.reduction = "sum"


def another_clip(model, optimizer, step):
    step.clip_norm = 0.01


def another_state(model, optimizer, step):
    for p in model.parameters():
        optimizer.state[p]["exp_avg"] = torch.zeros_like(p)


def another_parameter(model, optimizer, step):
    optimizer.param_groups[0]["params"][0] = nn.Parameter(torch.ones(2))


def another_layout(model, optimizer, step):
    model[0].weight.data = model[0].weight.data.t().contiguous().t()


def another_step(model, optimizer, step):
    optimizer.step = lambda: None


def a_hook(model, optimizer, step):
    model[0].register_forward_hook(lambda module, inputs, output: output * 0.5)


def a_hook_of_a_parameter(model, optimizer, step):
    model[0].weight.register_hook(lambda grad: grad * 0)


def a_hook_of_the_optimizer(model, optimizer, step):
    def hook(*_):
        model[0].weight.grad.zero_()

    optimizer.register_step_pre_hook(hook)


CHANGES = [
    frozen, no_dropout, another_module, another_loss, another_clip, another_state, another_parameter, another_layout,
    another_step, a_hook, a_hook_of_a_parameter, a_hook_of_the_optimizer,
]  # fmt: skip


@needs_compiler
@pytest.mark.parametrize("change", CHANGES)
def test_what_is_changed_between_steps_is_obeyed(change):
    found = []
    for graph in (True, False):
        model = mlp()
        optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.1)
        step = fs.TrainStep(model, nn.MSELoss(), optimizer, clip_norm=0.5, graph=graph)
        torch.manual_seed(3)
        data = batches(10)
        results = [step(batch).loss for batch in data[:5]]
        change(model, optimizer, step)
        results += [step(batch).loss for batch in data[5:]]
        step.state.confirm()
        assert not graph or step.graph.program is not None, step.graph.refused
        found.append((torch.stack(results), [p.detach() for p in model.parameters()]))
    (ours, weights), (theirs, others) = found
    assert relative(ours, theirs) < 1e-5
    assert all(torch.allclose(mine, other, rtol=1e-4, atol=1e-6) for mine, other in zip(weights, others, strict=True))


@needs_compiler
def test_a_hook_that_is_taken_away_leaves_the_program_in_use():
    model, _, results = steps(True, batches(3), max_iters=9)
    for result in results:
        if result.step == 4:
            handle = model[0].weight.register_hook(lambda grad: grad)
        latch = result.state.latch
        step = latch.step  # which ends with the loop otherwise
        if result.step == 5:
            assert latch.program is not None and not latch.unread, "the eager step, which calls it"
            handle.remove()
    assert len(latch.unread) == 0 and latch.refused is None
    assert step.graph is latch and latch._as_recorded()


class Inheriting(torch.optim.AdamW):
    """Its step is its parent's."""


@needs_compiler
def test_an_optimizer_may_inherit_its_step():
    model = mlp()
    torch.optim.AdamW(model.parameters())  # torch wraps the step of the first class that is made
    _, _, results = steps(True, batches(3), model=model, optimizer=Inheriting(model.parameters(), lr=3e-3))
    state = next(result.state for result in results if result.step == 5)
    assert state.latch.program is not None and state.latch.refused is None


@needs_compiler
def test_windows_with_gaps_between_their_rows():
    """Slices of a wide table, as a program sees them: it is compiled for their strides."""
    table = torch.randn(10, 32, 24, generator=torch.Generator().manual_seed(2))
    data = [(rows[:, :16], rows[:, 20:21]) for rows in table]
    ours, theirs = (losses(steps(graph, data, max_iters=30)[2]) for graph in (True, False))
    assert relative(ours, theirs) < 1e-5


@needs_compiler
def test_a_layer_that_is_frozen_from_the_start():
    found = []
    for graph in (True, False):
        model = mlp()
        model[0].requires_grad_(False)
        _, _, results = steps(graph, batches(5), model=model, max_iters=10)
        results = list(results)
        found.append(losses(results))
        assert not graph or results[-1].state.latch.program is not None
        assert torch.equal(model[0].weight, mlp()[0].weight)
    assert relative(*found) < 1e-5


@needs_compiler
def test_a_word_out_of_range_is_told_as_the_eager_step_tells_it():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(10, 8), nn.Flatten(), nn.Linear(32, 10))
    step = fs.TrainStep(model, nn.CrossEntropyLoss(), torch.optim.SGD(model.parameters(), lr=0.1), graph=True)
    x, y = torch.randint(0, 10, (8, 4)), torch.randint(0, 10, (8,))
    for _ in range(4):
        step((x, y))
    assert step.graph.program is not None
    with pytest.raises(fs.UsageError, match="Target 17 is out of bounds"):
        step((x, y.where(torch.arange(8) != 3, 17)))
    step.state.state_dict()  # may be saved: nothing was begun


@needs_compiler
def test_what_was_latched_is_read_where_nobody_asks(monkeypatch):
    monkeypatch.setattr("fivestep.loop.graph.UNREAD", 5)
    data = batches(12)
    data[7] = (data[7][0] * torch.nan, data[7][1])
    model = mlp()
    step = fs.TrainStep(model, nn.MSELoss(), torch.optim.AdamW(model.parameters(), lr=3e-3), graph=True)
    with pytest.raises(NonFiniteError, match="step 8"):
        for batch in data + batches(12):
            step(batch)
    assert step.state.clock.step <= 13


# --- what is no program ---


class Counting(nn.Linear):
    calls = 0

    def forward(self, x):
        self.calls += 1
        return super().forward(x)


class Replacing(nn.Linear):
    def __init__(self):
        super().__init__(16, 1)
        self.register_buffer("mean", torch.zeros(16))

    def forward(self, x):
        self.mean = 0.9 * self.mean + 0.1 * x.mean(0)
        return super().forward(x - self.mean)


class Writing(nn.Linear):
    def __init__(self):
        super().__init__(16, 1)
        self.total = torch.zeros(())

    def forward(self, x):
        self.total.add_(1)
        return super().forward(x)


class Branching(nn.Linear):
    def forward(self, x):
        return super().forward(x if x.sum() > 0 else -x)


class Drawing(nn.Linear):
    def forward(self, x):
        return super().forward(x) * random.random()


class Listing(nn.Linear):
    def __init__(self):
        super().__init__(16, 1)
        self.seen = []

    def forward(self, x):
        self.seen.append(x.detach())
        return super().forward(x)


class Warming(nn.Linear):
    def forward(self, x):
        self.calls = getattr(self, "calls", 0) + 1
        return super().forward(x) * min(1.0, self.calls / 10)


class Owning(nn.Linear):
    """Noise from a generator of NumPy's that is its own."""

    def __init__(self):
        super().__init__(16, 1)
        self.noise = np.random.default_rng(0)

    def forward(self, x):
        noise = self.noise.standard_normal(16).astype("float32") * 1e-6
        return super().forward(x) + torch.from_numpy(noise).sum() * 0


class Numbered(torch.optim.SGD):
    def step(self, closure=None):
        for group in self.param_groups:
            group["steps"] = group.get("steps", 0) + 1
        return super().step(closure)


def hooked(module):
    module.register_forward_hook(lambda *_: None)
    return module


REFUSED = {
    "calls": (Counting(16, 1), torch.optim.SGD),
    "buffer 'mean' is replaced": (Replacing(), torch.optim.SGD),
    "neither parameter nor buffer": (Writing(), torch.optim.SGD),
    "reads a value": (Branching(16, 1), torch.optim.SGD),
    "Listing keeps 'seen'": (Listing(), torch.optim.SGD),
    "changes from step to step": (Warming(16, 1), torch.optim.SGD),
    "with something that changes": (Owning(), torch.optim.SGD),
    "random numbers": (Drawing(16, 1), torch.optim.SGD),
    "counts in Python numbers": (nn.Linear(16, 1), Numbered),
    "has hooks": (hooked(nn.Linear(16, 1)), torch.optim.SGD),
    "Adafactor|reads a value": (nn.Linear(16, 1), torch.optim.Adafactor),
}


@pytest.mark.parametrize("reason", REFUSED)
def test_what_cannot_be_a_program_is_named_and_trains_as_ever(reason):
    model, kind = copy.deepcopy(REFUSED[reason][0]), REFUSED[reason][1]
    twin = copy.deepcopy(model)
    found = []
    for one, graph in ((model, True), (twin, False)):
        random.seed(0)
        step = fs.TrainStep(one, nn.MSELoss(), kind(one.parameters(), lr=0.01), graph=graph)
        if graph:
            with pytest.warns(UserWarning, match=reason):
                found.append([step(batch).loss for batch in batches(4)])
        else:
            found.append([step(batch).loss for batch in batches(4)])
    assert found[0] == found[1]
    assert_same_bits(model, twin)


def test_without_a_compiler_it_says_so_and_runs_eagerly(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("FIVESTEP_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("CXX", raising=False)
    model = mlp()
    step = fs.TrainStep(model, nn.MSELoss(), torch.optim.SGD(model.parameters(), lr=0.1), graph=True)
    with pytest.warns(UserWarning, match=r"C\+\+ compiler"):
        for batch in batches(3):
            step(batch)
    assert step.state.clock.step == 3


@needs_compiler
def test_a_program_that_was_cut_short_is_compiled_anew(tmp_path, monkeypatch):
    """Loaded as it is, it would end the process by a signal."""
    list(steps(True, batches(3), max_iters=3)[2])
    shutil.copytree(cache_folder("programs"), tmp_path / "programs")
    for library in (tmp_path / "programs").glob("*.so"):
        library.write_bytes(library.read_bytes()[:4096])

    def compile_anew(*_):
        raise NoProgramError("asked to compile it anew")

    monkeypatch.setattr("fivestep.loop.graph.compile", compile_anew)
    monkeypatch.setenv("FIVESTEP_CACHE", str(tmp_path))
    with pytest.warns(UserWarning, match="asked to compile it anew"):
        list(steps(True, batches(3), max_iters=3)[2])


@needs_compiler
def test_a_program_that_others_could_have_written_is_not_loaded(tmp_path, monkeypatch):
    list(steps(True, batches(3), max_iters=3)[2])
    shutil.copytree(cache_folder("programs"), tmp_path / "programs")
    for library in (tmp_path / "programs").glob("*.so"):
        library.chmod(0o666)
    monkeypatch.setenv("FIVESTEP_CACHE", str(tmp_path))
    with pytest.warns(UserWarning, match="another user"):
        list(steps(True, batches(3), max_iters=3)[2])


@needs_compiler
def test_a_folder_that_cannot_be_written_leaves_the_steps_eager(monkeypatch, tmp_path):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("fivestep.loop.program.keep", full)
    monkeypatch.setattr("torch._inductor.aot_compile", lambda *_, **__: "library.so")
    monkeypatch.setenv("FIVESTEP_CACHE", str(tmp_path))
    with pytest.warns(UserWarning, match="No space left.*FIVESTEP_CACHE"):
        assert list(steps(True, batches(3), max_iters=3)[2])[-1].step == 3


def test_a_scripted_module_is_refused():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # deprecated, and still around
        model = torch.jit.script(nn.Linear(16, 1))
    step = fs.TrainStep(model, nn.MSELoss(), torch.optim.SGD(model.parameters(), lr=1))
    assert "is scripted" in refusal(step, "fp32")


def test_fp16_is_refused():
    model = mlp()
    step = fs.TrainStep(model, nn.MSELoss(), torch.optim.SGD(model.parameters(), lr=1))
    assert "fp16" in refusal(step, "fp16") and refusal(step, "bf16") is None


# --- recordings ---


def digest(function, *inputs):
    return recorded(function, [one.clone() for one in inputs]).digest


def test_a_recording_tells_functions_apart_by_all_that_they_compute():
    x, y = torch.ones(3), torch.ones(3)
    same = digest(lambda a, b: [a * 2 + b], x, y)
    assert same == digest(lambda a, b: [a * 2 + b], y * 5, x)  # values of inputs do not matter
    others = [
        digest(lambda a, b: [a * 3 + b], x, y),
        digest(lambda a, b: [b * 2 + a], x, y),
        digest(lambda a, b: [a * 2 + b], x.double(), y),
        digest(lambda a, b: [a * 2 + b], torch.ones(4), torch.ones(4)),
        digest(lambda a, b: [a * 2 + torch.tensor([1.0, 2.0, 3.0])], x, y),
        digest(lambda a, b: [a * 2 + torch.tensor([1.0, 2.0, 4.0])], x, y),
        digest(lambda a, b: [a.mul_(2) + b], x, y),
    ]
    assert len({same, *others}) == 8


def test_a_recording_knows_what_it_reads_from_outside():
    outside = torch.ones(3)
    recording = recorded(lambda a: [a + outside], [torch.ones(3)])
    assert [one.data_ptr() for one in recording.outside] == [outside.data_ptr()]
    with pytest.raises(NoProgramError, match="neither parameter nor buffer"):
        recorded(lambda a: [outside.add_(a)], [torch.ones(3)])
    with pytest.raises(NoProgramError, match="host"):
        recorded(lambda a: [a * a.sum().item()], [torch.ones(3)])


def test_every_part_of_a_batch_is_part_of_its_form():
    leaves = []
    batch = {"x": torch.ones(2, 3), "more": [torch.zeros(4), 5, None, "text"]}
    shape = form(batch, leaves)
    assert [one.shape for one in leaves] == [(2, 3), (4,)]
    assert shape == form(batch, []) != form({**batch, "more": [torch.zeros(4), 6, None, "text"]}, [])
    assert shape != form({**batch, "x": torch.ones(3, 2).t()}, [])
    again = filled(batch, iter([one + 1 for one in leaves]))
    assert torch.equal(again["x"], batch["x"] + 1) and again["more"][1:] == [5, None, "text"]
    assert form({"x": object()}, []) != form({"x": object()}, [])
