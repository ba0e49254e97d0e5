"""PAINS row 11: a step of the full-featured path costs the bare step and a few calls, and an epoch's edge no more.

Nothing is timed: what is counted is calls (Python's and C's, through `sys.setprofile`), reads of the device, and
redraws of the bar.
"""

import io
import sys

import pytest
import torch
from rich.console import Console
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import fivestep as fs
from fivestep.models.mlp import MLP
from fivestep.watch.progress import Progress


class Reads(TorchDispatchMode):
    """Counts the reads of a scalar from the device: `.item()`, `float(tensor)`, `if tensor`."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


class Noting:
    """A last watcher: what has been counted when it is called, once a step."""

    def __init__(self, counter, tick):
        self.counter, self.tick, self.noted = counter, tick, []

    def __call__(self, result, rows):
        self.tick()
        self.noted.append((result.step, len(rows), self.counter.count))

    def between(self):
        """What each step without rows has cost since the one before, which had none either."""
        pairs = zip(self.noted, self.noted[1:], strict=False)
        return [after[2] - before[2] for before, after in pairs if not after[1] and not before[1]]


class Calls:
    """Counts every call of a function, until told to stop."""

    def __init__(self):
        self.count = 0

    def __call__(self, frame, event, argument):
        self.count += event in ("call", "c_call")

    def __enter__(self):
        sys.setprofile(self)
        return self

    def __exit__(self, *_):
        sys.setprofile(None)


@pytest.fixture
def still(monkeypatch):
    """A terminal's bar for which no time passes, unless told."""
    import fivestep.watch.progress as module

    now = [100.0]
    monkeypatch.setattr(module, "perf_counter", lambda: now[0])
    return now


def job(batches):
    model = MLP([4, 8, 1])
    data = [(torch.randn(8, 4), torch.randn(8, 1)) for _ in range(batches)]
    # Not AdamW: torch's own keeps its count of steps in a host tensor, and reads it for each parameter.
    return model, data, torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)


def terminal():
    return Progress(400, Console(file=io.StringIO(), force_terminal=True, width=80))


def fitted(tmp_path, counter, batches, tick=lambda: None, **limits):
    """The path with everything on: bar, clipping, metrics, a run's directory."""
    model, data, optimizer = job(batches)
    noting = Noting(counter, tick)
    with fs.Run(tmp_path / "run") as run, counter:
        fs.fit(
            model,
            data,
            nn.MSELoss(),
            optimizer,
            val=data,
            metrics={"error": lambda outputs, targets: (outputs - targets).abs()},
            clip_norm=1.0,
            progress=terminal(),
            run=run,
            watchers=[noting],
            **limits,
        )
    return noting


def test_one_read_a_step(tmp_path, still):
    noting = fitted(tmp_path, Reads(), 50, max_iters=50, eval_every=20)
    assert len(noting.between()) > 40
    assert set(noting.between()) == {1}, "the norm, at the one marked line"


def test_a_redraw_reads_once_more(tmp_path, still):
    def tick():
        still[0] += 0.05  # seconds a step: a redraw is due at every fifth

    noting = fitted(tmp_path, Reads(), 60, tick, max_iters=60, eval_every=None)
    assert set(noting.between()) == {1, 2}
    assert noting.between().count(2) in (9, 10, 11, 12)


@pytest.mark.parametrize("limits", [{"max_iters": 40, "eval_every": None}, {"max_iters": 40, "eval_every": 20}])
def test_an_epochs_edge_reads_nothing(tmp_path, still, limits):
    """Epochs of two batches; where no row is due at their end, there is nothing to read."""
    noting = fitted(tmp_path, Reads(), 2, **limits)
    assert len(noting.between()) > 30
    assert set(noting.between()) == {1}


def test_a_row_an_epoch_reads_its_figures_only(tmp_path, still):
    """With `epochs` each end of an epoch has a training row: its mean loss and norm are read, once."""
    noting = fitted(tmp_path, Reads(), 2, epochs=20, eval_every=None)
    edges = [after[2] - before[2] for before, after in zip(noting.noted, noting.noted[1:], strict=False) if after[1]]
    assert len(edges) >= 20
    assert max(edges[:-1]) <= 3, "the sum, its weight, the norm"


def test_calls_beyond_the_bare_step(tmp_path, still):
    """What fit, bar, run and metrics add to a step is a few dozen calls; the step itself is several hundred."""
    model, data, optimizer = job(60)
    five = fs.TrainStep(model, nn.MSELoss(), optimizer, clip_norm=1.0)
    model.train()
    bare = []
    for batch in data:
        with Calls() as calls:
            five(batch)
        bare.append(calls.count)
    full = fitted(tmp_path, Calls(), 60, max_iters=60, eval_every=None).between()
    usual, most = sorted(bare)[30], sorted(full)[30]
    assert usual > 100
    assert most - usual <= 60, f"{most - usual} calls a step beyond the bare step's {usual}"


def test_calls_at_an_epochs_edge(tmp_path, still):
    """A two-batch epoch: its edge costs fewer calls than a step does, and no time passes there on purpose."""
    noting = fitted(tmp_path, Calls(), 2, max_iters=60, eval_every=None)
    steps = noting.between()[6:-1]
    inside, across = steps[0::2], steps[1::2]
    least, most = sorted([min(inside), min(across)])
    assert most - least < least, f"an epoch's edge costs {most - least} calls, a step {least}"


def test_the_bar_is_drawn_by_time(still):
    """A thousand steps within a quarter of a second draw once; the text between is not even made."""
    shown = io.StringIO()
    progress = Progress(2000, Console(file=shown, force_terminal=True, width=80))
    model, data, optimizer = job(50)
    drawn = []
    for result in fs.train(model, data, nn.MSELoss(), optimizer, max_iters=1000):
        still[0] += 0.0002
        progress(result, [])
        drawn.append(shown.tell())
    progress.close()
    assert len(set(drawn)) == 1
    assert "1/2,000" in shown.getvalue()
