"""The finders try values in a process of their own, return one that was tried, and leave nothing."""

import itertools
import json
import os
import signal
import time
from contextlib import suppress

import pytest

from fivestep.errors import FivestepError
from fivestep.learn import preflight_search
from fivestep.learn.preflight_search import best_batch, best_rate, find, judged
from tests.run.cli import fivestep  # noqa: F401

JOB = """
import os, signal
import torch
from torch import nn

class Model(nn.Linear):
    def forward(self, x):
        if len(x) > MOST: BREAK
        return super().forward(x) + 0 * (x[:, :, None] * torch.ones(SIZE)).sum(-1).sum(1, keepdim=True)

def job():
    torch.manual_seed(0)
    x = torch.randn(4, 3)
    model = Model(3, 1)
    return model, [(x, x.sum(1, keepdim=True))], nn.MSELoss(), torch.optim.SGD(model.parameters(), lr=0.01)
"""


def written(folder, size=1, most=1 << 30, breaks="pass"):
    text = JOB.replace("SIZE", str(size)).replace("MOST", str(most)).replace("BREAK", breaks)
    (folder / "mine.py").write_text(text)
    return f"{folder}/mine.py:job"


class Forked:
    """A child of this process, which has torch loaded already, in place of a fresh one."""

    def __init__(self, request, output):
        self.returncode, self.pid = None, os.fork()
        if self.pid == 0:
            with suppress(BaseException):
                preflight_search.trying(request)
                os._exit(0)
            os._exit(1)

    def __enter__(self):
        return self

    def __exit__(self, *error):
        pass

    def poll(self):
        if self.returncode is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            self.returncode = os.waitstatus_to_exitcode(status) if pid else None
        return self.returncode

    def kill(self):
        if self.poll() is None:
            os.kill(self.pid, signal.SIGKILL)

    def wait(self):
        while self.poll() is None:
            time.sleep(0.002)


@pytest.fixture
def forking(monkeypatch):
    if not hasattr(os, "fork"):
        pytest.skip("no fork here")
    monkeypatch.setattr(preflight_search, "started", Forked)


def rates(*losses):
    return [{"value": 10.0**power, "before": 1.0, "after": loss} for power, loss in enumerate(losses)]


@pytest.mark.parametrize(
    ("tried", "expected"),
    [
        (rates(0.9, 0.5, 0.7, 2.0), 10.0),
        (rates(0.9, 0.8, 0.1, None), 10.0**2),  # a decade below the first that is lost
        (rates(0.99, None, None), 1.0),
        (rates(1.1, None), None),
    ],
)
def test_the_rate_is_the_best_that_is_not_at_the_edge(tried, expected):
    assert best_rate(tried) == expected


def test_the_batch_is_the_smallest_that_is_nearly_the_fastest():
    tried = [{"value": 2**n, "rows_per_second": rate} for n, rate in enumerate([10, 20, 39, 40, 38])]
    assert best_batch(tried) == 4
    assert best_batch([]) is None


def test_a_rate_is_found_that_was_tried(fivestep, tmp_path):  # noqa: F811
    written(tmp_path)
    run = fivestep("doctor", "mine.py:job", "--find-lr", "--json", "--threads", "1")
    assert run.code == 0, run.err
    told = json.loads(run.out)
    assert told["value"] in [one["value"] for one in told["tried"]]
    assert 0.01 < told["value"] < 1.0  # the loss is a quadratic of curvature about 2: above 1 it grows
    assert told["tried"][0]["value"] == pytest.approx(1e-5)
    assert len({one["before"] for one in told["tried"]}) == 1  # each from the same weights
    assert [path.name for path in tmp_path.iterdir()] == ["mine.py"]


@pytest.fixture
def even_clock(monkeypatch):
    """Every step takes one second by this clock: larger batches are always faster, so speed never ends the search."""
    monkeypatch.setattr(preflight_search, "perf_counter", itertools.count().__next__)


def test_memory_that_ends_is_survived(forking, even_clock, tmp_path):
    said = []
    found = find("batch", written(tmp_path, size=3_000_000), {"threads": 1}, said.append, limit=10**8)
    assert "does not fit into memory" in found.why or "out of memory" in found.why
    assert found.value in [one["value"] for one in found.tried]
    assert len(said) == len(found.tried) < 8


def test_a_process_that_dies_is_survived(forking, even_clock, tmp_path):
    source = written(tmp_path, most=8, breaks="os.kill(os.getpid(), signal.SIGKILL)")
    found = find("batch", source, {"threads": 1}, lambda line: None)
    assert [one["value"] for one in found.tried] == [1, 2, 4, 8]
    assert "the process ended at 16 (signal 9)" in found.why
    assert found.value in (1, 2, 4, 8)


def test_a_job_that_cannot_be_tried_is_a_sentence():
    with pytest.raises(FivestepError, match="^mine.py:job raised KeyError: 'planted'$") as caught:
        judged("lr", [], 2, "told by itself\nfivestep: mine.py:job raised KeyError: 'planted'\n")
    assert caught.value.exit_code == 2
