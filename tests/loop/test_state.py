"""The one state object: put back at any step, the next steps are those of the uninterrupted run, bit for bit."""

import copy
import gc
import weakref

import pytest
import torch
from torch import nn

import fivestep as fs
from fivestep.data.examples import Examples
from fivestep.data.segments import Segments
from fivestep.data.windows import Windows
from fivestep.models.gpt import GPT
from fivestep.models.mlp import MLP
from fivestep.models.rnn import RNN
from tests.same import assert_same_bits

STEPS = 14


def job(kind, tokens):
    """Model, data, criterion: dropout on, epochs crossed, windows of three micro-batches with a short last one."""
    torch.manual_seed(1)
    if kind == "windows":
        return (
            GPT(29, block_size=8, n_layer=1, n_head=2, n_embd=16, dropout=0.3),
            Windows(tokens[:600], 8, 8, seed=2),
            fs.NextToken(),
        )
    if kind == "rows":
        generator = torch.Generator().manual_seed(0)
        features, labels = torch.randn(83, 5, generator=generator), torch.randn(83, 2, generator=generator)
        return MLP([5, 16, 2], dropout=0.3), Examples(features, labels, 7, seed=2), nn.MSELoss()
    return RNN(29, 8, 12, 2, cell=kind, dropout=0.3), Segments(tokens[:800], 4, 9), fs.TruncatedBPTT()


def start(kind, tokens, saved=None):
    model, data, criterion = job(kind, tokens)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
    options = {"scheduler": scheduler, "clip_norm": 0.5}
    state = fs.TrainStep(model, criterion, optimizer, **options).state
    if saved is not None:
        torch.manual_seed(999)
        state.load_state_dict(saved)
    else:
        torch.manual_seed(7)
    return fs.train(model, data, criterion, optimizer, max_iters=STEPS, accumulate=3, state=state, **options)


def leaves(value):
    if isinstance(value, dict):
        return [leaf for key, item in value.items() for leaf in [key, *leaves(item)]]
    if isinstance(value, list | tuple):
        return [leaf for item in value for leaf in leaves(item)]
    return [value]


@pytest.mark.parametrize("kind", ["windows", "rows", "lstm", "gru"])
def test_resumed_at_every_step(kind, tokens):
    whole, snapshots = [], []
    for result in start(kind, tokens):
        whole.append(float(result.loss))
        snapshots.append(result.state.state_dict())
        final = result.state.model
    assert snapshots[-1]["clock"]["epoch"] >= 1, "the run must cross an epoch's edge"
    for at in range(STEPS - 1):
        rest = []
        for result in start(kind, tokens, copy.deepcopy(snapshots[at])):
            rest.append(float(result.loss))
        assert whole[at + 1 :] == rest, f"resumed after step {at + 1}"
        assert_same_bits(result.state.model, final)
        ours, theirs = result.state.state_dict(), snapshots[-1]
        for name in ("position", "carry", "epoch_loss", "logged_loss", "optimizers", "schedulers"):
            assert str(ours[name]) == str(theirs[name]), name


@pytest.mark.parametrize("missing", ["carry", "random", "position", "optimizers"])
def test_each_part_is_needed(missing, tokens):
    """The planted faults: a resume without one part of the state parts from the uninterrupted run."""
    steps = start("lstm", tokens)
    first = [next(steps) for _ in range(4)]
    saved = copy.deepcopy(first[-1].state.state_dict())
    expected = [float(result.loss) for result in steps]
    assert [float(result.loss) for result in start("lstm", tokens, copy.deepcopy(saved))] == expected
    fresh = next(start("lstm", tokens)).state.state_dict()
    saved[missing] = fresh[missing] if missing != "carry" else None
    assert [float(result.loss) for result in start("lstm", tokens, saved)] != expected


def test_leaves_are_plain(tokens):
    result = next(start("lstm", tokens))
    for leaf in leaves(result.state.state_dict()):
        assert isinstance(leaf, torch.Tensor | int | float | str | bytes | None), type(leaf)


def test_a_snapshot_is_not_moved_by_later_steps(tokens):
    steps = start("lstm", tokens)
    saved = next(steps).state.state_dict()
    before = copy.deepcopy(saved)
    next(steps)
    assert str(saved) == str(before)


def test_the_hidden_state_is_detached_and_memory_flat(tokens):
    """The carry holds no graph: else the second backward would reach into the first segment."""
    for result in start("lstm", tokens):
        assert all(not part.requires_grad and part.grad_fn is None for part in result.state.carry)


def test_a_training_that_is_over_is_freed_at_once():
    """No cycle holds the model: who trains many must not wait for the garbage collector."""
    model = nn.Linear(2, 1)
    step = fs.TrainStep(model, nn.MSELoss(), torch.optim.SGD(model.parameters(), lr=0.1))
    step((torch.ones(3, 2), torch.ones(3, 1)))
    gc.disable()
    try:
        alive = weakref.ref(model)
        del model, step
        assert alive() is None
    finally:
        gc.enable()
