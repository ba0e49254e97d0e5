"""`fivestep doctor --resume` finds nothing where a job goes on exactly, and names each planted fault.

One test starts fresh processes, as the command does; the others fork this one, which has torch loaded already.
"""

import os
import signal
import sys
import traceback
from contextlib import contextmanager
from textwrap import dedent

import pytest
import torch

from fivestep.errors import FivestepError
from fivestep.run import doctor
from fivestep.run.rehearsal import rehearse
from tests.run.cli import fivestep  # noqa: F401

FILE = """
import random, time
import numpy as np
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset
import fivestep as fs


class Noisy(Dataset):
    def __len__(self):
        return 50

    def __getitem__(self, index):
        x = torch.full((3,), index / 50) + NOISE
        return x, x.sum(0, keepdim=True)


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear, self.drop, self.calls = nn.Linear(3, 1), nn.Dropout(0.1), 0

    def forward(self, x):
        self.calls += self.training
        return self.drop(self.linear(x)) FACTOR


def job(run):
    OWN
    torch.manual_seed(0)
    model = Model()
    data = DataLoader(DATA, batch_size=8, shuffle=SHUFFLE)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    fs.fit(model, data, nn.MSELoss(), optimizer, epochs=5, run=run, progress=False, val=[next(iter(data))])
"""
HEALTHY = {"NOISE": "torch.rand(3)", "FACTOR": "", "OWN": "", "DATA": "Noisy()", "SHUFFLE": "True"}


def written(folder, **changes):
    text = FILE
    for name, value in (HEALTHY | changes).items():
        text = text.replace(name, value)
    (folder / "mine.py").write_text(text)
    return f"{folder}/mine.py:job"


class Forked:
    """What the doctor asks of a process, of a child of this one."""

    def __init__(self, job, folder):
        self.returncode, self.pid = None, os.fork()
        if self.pid == 0:
            code = 1
            try:
                output = os.open(doctor.log_of(folder), os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
                os.dup2(output, 1)
                os.dup2(output, 2)
                sys.stdout = sys.stderr = open(output, "w", buffering=1)  # noqa: PTH123, SIM115
                torch.manual_seed(torch.default_generator.initial_seed())
                rehearse(job.argument, folder, job.steps, job.every)
                code = 0
            except FivestepError as error:
                print(f"fivestep: {error}")
                code = error.exit_code
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(code)

    def poll(self):
        if self.returncode is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            self.returncode = os.waitstatus_to_exitcode(status) if pid else None
        return self.returncode

    def wait(self):
        while self.poll() is None:
            signal.sigtimedwait([], 0.002)

    def kill(self):
        if self.poll() is None:
            os.kill(self.pid, signal.SIGKILL)


@pytest.fixture
def forking(monkeypatch):
    if not hasattr(os, "fork"):
        pytest.skip("no fork here")
    torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))])  # what torch imports then, children need not

    @contextmanager
    def started(job, folder):
        process = Forked(job, folder)
        try:
            yield process
        finally:
            process.kill()
            process.wait()

    monkeypatch.setattr(doctor, "started", started)


def examined(source, folder, **options):
    said = []
    flags = options.pop("flags", {})
    healthy = doctor.examine(source, flags, say=said.append, keep=folder / "kept", **options)
    return healthy, "\n".join(said)


def test_a_healthy_recipe_in_fresh_processes(fivestep, tmp_path):  # noqa: F811
    run = fivestep("doctor", "--resume", "regression", "--max-iters", "12", "--kills", "1", "--checkpoint-every", "2",
                   "--kill-seed", "3", "--threads", "1", "--keep", "kept")  # fmt: skip
    assert run.code == 0, run.out + run.err
    assert "healthy" in run.out
    assert "killed 1 time\n" in run.out
    assert {path.name for path in (tmp_path / "kept").iterdir()} >= {"whole", "again", "killed"}


def test_a_healthy_function(forking, tmp_path):
    healthy, said = examined(written(tmp_path), tmp_path, kills=6, flags={"max_iters": 31})
    assert healthy, said
    assert said.count("the same  ") == 7
    assert "uninterrupted: 31 steps" in said
    assert "(went on from" in said


FAULTS = {
    "generator in a closure": (
        {"OWN": "own = np.random.default_rng(0)\n"
         "    class Data(Noisy):\n"
         "        def __getitem__(self, index):\n"
         "            return torch.from_numpy(own.random(3)).float(), torch.ones(1)",
         "DATA": "Data()"},
        ["batches         differ    step ", "the same items",
         "own (in job.<locals>.Data.__getitem__ of data.dataset)",
         "the dataset draws from a generator of its own"],
    ),
    "attribute of the model": (
        {"FACTOR": "* (1 + 0.01 * self.calls)"},
        ["batches         the same", "losses          differ    step ", "model.calls", "register_buffer"],
    ),
    "order of a sampler": (
        {"OWN": "order = random.Random(0)\n"
         "    def shuffled():\n"
         "        while True:\n"
         "            yield from order.sample(range(50), 50)\n"
         "    source = shuffled()\n"
         "    class Sampler:\n"
         "        def __len__(self): return 50\n"
         "        def __iter__(self): return (next(source) for _ in range(50))",
         "SHUFFLE": "False, sampler=Sampler()"},
        ["batches         differ    step ", "other items", "the sampler draws its order"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_named(forking, tmp_path, fault):
    changes, expected = FAULTS[fault]
    healthy, said = examined(written(tmp_path, **changes), tmp_path, kills=3)
    assert not healthy
    assert "uninterrupted once more: the same, bit for bit" in said
    for words in expected:
        assert words in said, said


NOT_REPEATED = {
    "data": ({"NOISE": "np.random.default_rng().random()"}, "first difference, in batches: step 1: the same items"),
    "weights": (
        {"OWN": "torch.seed()\n    torch.manual_seed = lambda seed: None", "NOISE": "0", "SHUFFLE": "False"},
        "in losses: step 1: ",
    ),
    "forward": ({"FACTOR": "* (1 + (time.time_ns() % 1000) * 1e-6)"}, "in losses: step 1: "),
}


@pytest.mark.parametrize("fault", NOT_REPEATED)
def test_a_job_that_is_not_repeatable_is_not_blamed_on_resuming(forking, tmp_path, fault):
    changes, expected = NOT_REPEATED[fault]
    healthy, said = examined(written(tmp_path, **changes), tmp_path)
    assert not healthy
    assert "so that resuming cannot be judged" in said
    assert expected in said, said
    assert not (tmp_path / "kept" / "killed").exists()


def test_going_on_that_fails_is_told(forking, tmp_path):
    source = written(tmp_path)
    growing = "model = Model(); model.extra = nn.Parameter(torch.zeros(7 + len(list(run.checkpoints.glob('*')))))"
    (tmp_path / "mine.py").write_text((tmp_path / "mine.py").read_text().replace("model = Model()", growing))
    healthy, said = examined(source, tmp_path, kills=2)
    assert not healthy
    assert "going on fails: the checkpoint in" in said, said


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["doctor", "--resume", "mine.py"], "name the function too: mine.py:job"),
        (["doctor", "--resume", "no.py:job"], "there is no file no.py"),
        (["doctor", "--resume", "mine.py:job", "--n-layer", "2"], "--n-layer is of recipes"),
        (["doctor", "--resume", "bigram", "--data", "-"], "which is there only once"),
        (["doctor", "--resume", "own"], "has no config.toml: a run made from Python"),
        (["doctor", "--resume", "regresion"], "did you mean"),
        (["doctor", "--resume", "regression", "--keep", "own"], "own exists"),
    ],
)
def test_what_cannot_be_rehearsed(fivestep, tmp_path, arguments, expected):  # noqa: F811
    (tmp_path / "own").mkdir()
    written(tmp_path)
    run = fivestep(*arguments)
    assert run.code == 2
    assert expected in run.err


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("def job(run): raise ValueError('planted')", "the job fails without being killed: ValueError: planted"),
        ("def jobs(run): pass", "has no function 'job'"),
        ("def job(run): pass", "trained nothing in the run"),
    ],
)
def test_a_job_that_fails_by_itself(forking, tmp_path, text, expected):
    (tmp_path / "mine.py").write_text(dedent(text))
    with pytest.raises(FivestepError, match=expected):
        examined(f"{tmp_path}/mine.py:job", tmp_path)
