"""What an attack on resuming found, each as a test."""

import errno
import os
import signal
import subprocess
import sys
from collections import namedtuple
from pathlib import Path

import pytest
import torch
from torch import nn

import fivestep as fs
from fivestep.errors import FivestepError, UsageError
from fivestep.loop.copies import Copies
from fivestep.run.difference import difference
from fivestep.run.metrics import cut_rows, read_rows
from fivestep.run.report import summary
from fivestep.run.tree import flattened, restored

DATA = [(torch.randn(4, 3), torch.randn(4, 1)) for _ in range(6)]


def quiet(text):
    pass


def trained(path, epochs=2, model=None, **options):
    torch.manual_seed(0)
    model = model or nn.Linear(3, 1)
    with fs.Run(path, say=quiet) as run:
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
        return fs.fit(model, DATA, nn.MSELoss(), optimizer, epochs=epochs, progress=False, run=run, **options)


def test_views_of_one_memory_with_other_values_stay_apart():
    weight = torch.tensor([1 + 2j])
    same, conjugate = Copies().of([weight, weight.conj()])
    assert (same.item(), conjugate.resolve_conj().item()) == (1 + 2j, 1 - 2j)
    imaginary, negative = Copies().of([torch.view_as_real(weight)[..., 1], weight.conj().imag])
    assert (imaginary.item(), negative.item()) == (2, -2)


@pytest.mark.parametrize(
    "tree",
    [
        {"a.b": torch.zeros(1), "a": {"b": torch.ones(1)}},
        {1: torch.zeros(1), "1": torch.ones(1)},
        {"__metadata__": torch.ones(1)},
    ],
)
def test_names_that_meet_are_kept_apart(tree):
    encoded, tensors = flattened(tree)
    assert "__metadata__" not in tensors
    assert repr(restored(encoded, tensors)) == repr(tree)


def test_a_weight_with_the_files_own_name(tmp_path):
    class Odd(nn.Linear):
        def __init__(self):
            super().__init__(3, 1)
            self.register_buffer("__metadata__", torch.arange(3.0))

    trained(tmp_path / "mine", model=Odd())
    assert fs.load_weights(tmp_path / "mine", Odd(), "last") == 12


def test_a_named_tuple_is_refused():
    with pytest.raises(fs.UsageError, match="is a Pair: the names of its fields would be lost"):
        flattened({"carry": namedtuple("Pair", "h c")(torch.zeros(1), torch.zeros(1))})


@pytest.mark.parametrize("name", ["loss", "step", "perplexity"])
def test_a_metric_does_not_take_the_name_of_a_field(tmp_path, name):
    with pytest.raises(fs.UsageError, match=f"a metric is named '{name}'"):
        trained(tmp_path / "mine", val=DATA, metrics={name: lambda outputs, targets: outputs.mean()})


def test_a_change_of_folder_moves_nothing(tmp_path, monkeypatch):
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
    monkeypatch.chdir(tmp_path / "a")
    model = nn.Linear(3, 1)
    with fs.Run("mine", checkpoint_every=2, say=quiet) as run:
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        for info in fs.train(model, DATA, nn.MSELoss(), optimizer, epochs=1, run=run):
            if info.step == 3:
                os.chdir(tmp_path / "b")
    assert list((tmp_path / "b").iterdir()) == []
    assert fs.load_weights(tmp_path / "a" / "mine", model, "last") == 6


def test_a_forked_child_touches_nothing(tmp_path):
    model, code = nn.Linear(3, 1), None
    with fs.Run(tmp_path / "mine", say=quiet) as run:
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        for info in fs.train(model, DATA, nn.MSELoss(), optimizer, epochs=1, run=run):
            if info.step == 3:
                before = {path: path.stat().st_mtime_ns for path in run.path.rglob("*")}
                child = os.fork()
                if child == 0:
                    try:
                        run.__exit__(None, None, None)
                        run.finish(info.state)
                        os.kill(os.getpid(), signal.SIGTERM)
                    finally:
                        os._exit(1)
                code = os.waitpid(child, 0)[1]
                assert {path: path.stat().st_mtime_ns for path in run.path.rglob("*")} == before
                with pytest.raises(fs.UsageError, match="is being trained"), fs.Run(run.path):
                    pass
    assert os.WTERMSIG(code) == signal.SIGTERM, "a signal is to the child what it was before"
    assert info.step == 6


def test_a_generator_that_outlives_its_run_trains_no_more(tmp_path):
    model = nn.Linear(3, 1)
    with fs.Run(tmp_path / "mine", say=quiet) as run:
        steps = fs.train(model, DATA, nn.MSELoss(), torch.optim.SGD(model.parameters(), lr=0.1), epochs=1, run=run)
        next(steps)
    with pytest.raises(fs.UsageError, match="was left: its with block has ended"):
        next(steps)


def test_a_row_is_not_welded_onto_half_a_line(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"a": 1}\n{"b": 2}\n')
    assert cut_rows(path, 13) == 9
    assert read_rows(path) == [{"a": 1}]


def test_a_run_without_its_metrics_goes_on(tmp_path):
    trained(tmp_path / "mine", epochs=1)
    (tmp_path / "mine" / "metrics.jsonl").unlink()
    assert trained(tmp_path / "mine", epochs=2)[-1]["step"] == 12


def test_a_lazy_model_goes_on_with_adam(tmp_path):
    trained(tmp_path / "whole", model=nn.LazyLinear(1))
    trained(tmp_path / "cut", epochs=1, model=nn.LazyLinear(1))
    trained(tmp_path / "cut", model=nn.LazyLinear(1))
    assert difference(tmp_path / "whole", tmp_path / "cut") is None


@pytest.mark.multiprocess
def test_an_error_is_not_hidden_by_a_signal(tmp_path):
    code = (
        "import signal, torch, fivestep as fs; from torch import nn\n"
        "model = nn.Linear(3, 1); data = [(torch.ones(2, 3), torch.ones(2, 1))] * 5\n"
        "with fs.Run('mine') as run:\n"
        "    for info in fs.train(model, data, nn.MSELoss(), torch.optim.SGD(model.parameters(), lr=0.1), run=run):\n"
        "        signal.raise_signal(signal.SIGTERM)\n"
        "        raise ValueError('a bug in my loop')\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "a bug in my loop" in done.stderr


def test_a_folder_of_checkpoints_that_cannot_be_listed_is_not_an_empty_one(tmp_path, monkeypatch):
    trained(tmp_path / "run")
    before = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    iterdir = Path.iterdir

    def failing(self):
        if self.name == "checkpoints":
            raise OSError(errno.EMFILE, os.strerror(errno.EMFILE), str(self))
        return iterdir(self)

    monkeypatch.setattr(Path, "iterdir", failing)
    with pytest.raises(FivestepError, match="Too many open files"):
        trained(tmp_path / "run", epochs=3)
    monkeypatch.undo()
    assert before == {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}


def test_a_killed_run_that_refuses_to_go_on_is_still_killed(tmp_path):
    trained(tmp_path / "run")
    (tmp_path / "run" / ".running").write_text("process 1 on another\n")
    with pytest.raises(UsageError, match="does not fit"):
        trained(tmp_path / "run", model=nn.Linear(3, 1, bias=False))
    assert summary(tmp_path / "run").state == "killed"
    trained(tmp_path / "run", epochs=3)
    assert summary(tmp_path / "run").state == "finished"


def test_a_run_that_never_began_is_not_finished(tmp_path):
    with pytest.raises(ZeroDivisionError), fs.Run(tmp_path / "run"):
        raise ZeroDivisionError
    assert summary(tmp_path / "run").state == "empty"
