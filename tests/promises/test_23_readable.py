"""PAINS row 23: the loop can be read and debugged: few frames between the caller and `backward`, few lines."""

import ast
import sys
from collections import Counter
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from torch import nn

import fivestep as fs
from fivestep.models.mlp import MLP

SOURCE = Path(fs.__file__).parent


class Spying(nn.Module):
    """A criterion whose mean notes, when the backward pass runs, which frames stand above it."""

    def __init__(self):
        super().__init__()
        self.ours = None

    def forward(self, outputs, labels):
        return _Note.apply(((outputs - labels) ** 2).mean())


class _Note(torch.autograd.Function):
    frames: ClassVar[list[tuple[str, str]]] = []

    @staticmethod
    def forward(ctx, loss):
        return loss.clone()

    @staticmethod
    def backward(ctx, gradient):
        names, frame = [], sys._getframe()
        while frame is not None and frame.f_code.co_name != "backward_frames":
            names.append((frame.f_code.co_filename, frame.f_code.co_name))
            frame = frame.f_back
        _Note.frames = names
        return gradient


def backward_frames(action):
    """Our frames between the caller and `backward`, innermost first; `backward` itself enters torch's engine."""
    action()
    _, _, itself, *frames = [f"{Path(file).name}:{name}" for file, name in _Note.frames]  # two of the criterion's
    assert itself == "lean.py:backward"
    ours = {path.name for path in SOURCE.rglob("*.py")}
    assert all(frame.split(":")[0] in {*ours, Path(__file__).name} for frame in frames), "none of anybody else's"
    return [frame for frame in frames if frame.split(":")[0] in ours]


def job():
    model = MLP([3, 1])
    return model, torch.optim.SGD(model.parameters(), lr=0.1), (torch.randn(4, 3), torch.randn(4, 1))


def test_one_frame_from_a_step():
    model, optimizer, batch = job()
    five = fs.TrainStep(model, Spying(), optimizer, clip_norm=1.0)
    assert backward_frames(lambda: five(batch)) == ["step.py:__call__"]


def test_two_frames_from_train():
    model, optimizer, batch = job()
    steps = fs.train(model, [batch], Spying(), optimizer, epochs=1)
    assert len(backward_frames(lambda: next(steps))) == 2


def test_three_frames_from_fit():
    model, optimizer, batch = job()
    frames = backward_frames(
        lambda: fs.fit(model, [batch], Spying(), optimizer, epochs=1, val=[batch], progress=False)
    )
    assert len(frames) == 3


def test_the_loop_fits_three_short_files():
    lines = sum(
        len((SOURCE / "loop" / name).read_text().splitlines()) for name in ("train.py", "step.py", "objective.py")
    )
    assert lines < 520


def test_the_five_steps_stand_once():
    """Each of the calls that make a step is written exactly once in the package."""
    calls = Counter(
        called.attr if called.attr != "step" else f"{ast.unparse(called.value).split('.')[-1]}.step"
        for path in SOURCE.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call) and isinstance(called := node.func, ast.Attribute)
    )
    assert [calls[name] for name in ("zero_grad", "backward", "optimizer.step")] == [1, 1, 1]


def test_the_users_own_loop_is_the_loop():
    """A caller may stop, look at gradients, change the rate, and go on."""
    model, optimizer, batch = job()
    for result in fs.train(model, [batch] * 3, nn.MSELoss(), optimizer, epochs=10):
        assert all(p.grad is not None for p in model.parameters())
        optimizer.param_groups[0]["lr"] = 0.01
        if result.step == 4:
            break
    assert result.state.clock.step == 4
    assert result.learning_rate == pytest.approx(0.01)
