"""One of several processes under torchrun goes wrong at a random time: all end, none is left, nothing is lost.

Each kind twenty times; the short forms are in tests/processes. What is left goes on, alone or with as many processes,
to the losses of the training that nothing befell, within 1e-12 in float64.
"""

import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from tests.processes import fails, hosts
from tests.processes.launched import Launched, gone, killed, launching, torchrun, tree
from tests.torture import harness

pytestmark = [pytest.mark.multiprocess, pytest.mark.torture]
REPEATS = int(os.environ.get("FIVESTEP_REPEATS", "20"))  # with another FIVESTEP_SEED others are drawn
PROMPT, SILENT = 10.0, 60.0  # seconds for all to end; where one has to be found silent
BUSY = max(1.0, os.getloadavg()[0] / (os.cpu_count() or 1))  # other work makes these seconds longer
LONG, END = 4000, 250  # steps that no trial reaches, and where those that go on end


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The losses of the training that nothing befalls."""
    folder = tmp_path_factory.mktemp("whole")
    fails.main(folder, "swift", END)
    return losses(folder)


def losses(folder):
    return {step: loss for step, loss, _ in json.loads((folder / "made.json").read_text())}


class Trial:
    """A launch in a folder of its own, and what is drawn for it."""

    def __init__(self, folder, kind, number):
        self.seed = f"{kind} {number} {os.environ.get('FIVESTEP_SEED', '')}"
        self.drawn, self.folder, self.kind = random.Random(self.seed), folder / f"{kind}-{number}", kind
        self.folder.mkdir()
        self.size = 4 if kind in ("killed", "frozen") else self.drawn.choice((2, 3))
        self.rank = self.drawn.randrange(self.size)
        self.at = self.drawn.randint(5, 60)  # all are under way by then
        self.launched = None

    def launch(self, mode, *arguments):
        self.launched = Launched(self.folder, self.size, fails.__file__, self.folder, mode, *arguments)
        return self.launched

    def strike(self, send):
        """Send a signal at a random time to process `rank`; also before it trains. Returns all that are to end."""
        launched = self.launch("sound", LONG)
        if self.drawn.random() < 0.2 and self.kind != "frozen":  # who has not joined yet is waited for
            time.sleep(self.drawn.uniform(0.0, 4.0))
            while len(below := tree(launched.process.pid)) <= self.size:
                time.sleep(0.01)
            launched.pids = dict(enumerate(sorted(below[1:])))
        else:
            launched.under_way()
            time.sleep(self.drawn.uniform(0.0, 2.0))
            below = tree(launched.process.pid)
        os.kill(launched.pids[self.rank] if send != "launcher" else launched.process.pid, SENT[self.kind])
        return below

    def made(self):
        """Steps that all had made."""
        return min((path.stat().st_size for path in self.folder.glob("steps-*")), default=0)

    def goes_on(self, whole):
        """Nothing is lost: what is left ends as if nothing had been, from no earlier than the last save but one."""
        made = self.made()
        (self.folder / "made.json").unlink(missing_ok=True)
        size = self.drawn.choice((1, 1, 1, self.size))
        arguments = (fails.__file__, self.folder, "swift", END)
        if size == 1:
            done = subprocess.run(
                [sys.executable, *map(str, arguments)], capture_output=True, text=True, timeout=240, env=launching()
            )
        else:
            done = torchrun(size, *arguments, timeout=240)
        assert done.returncode == 0, done.stderr
        found = losses(self.folder)
        assert min(found) > made - 15, f"{made} steps were made, and it began after step {min(found) - 1}"
        assert max(found) == END
        for step, loss in found.items():
            assert loss == pytest.approx(whole[step], rel=1e-12), step

    def close(self):
        if self.launched is not None:
            self.launched.close()


SENT = {"killed": signal.SIGKILL, "frozen": signal.SIGSTOP, "launcher": signal.SIGKILL, "sigterm": signal.SIGTERM}


def assert_ended(trial, below, most):
    began = time.monotonic()
    assert trial.launched.ended(most * BUSY, below), f"not all have ended after {most * BUSY:.0f} s"
    trial.took = time.monotonic() - began


def one_killed(trial, whole):
    below = trial.strike("worker")
    assert_ended(trial, below, PROMPT)
    said = trial.launched.said()
    assert f"exitcode  : -9 (pid: {trial.launched.pids[trial.rank]})" in said, "the launcher names it"
    trial.goes_on(whole)


def one_frozen(trial, whole):
    below = trial.strike("worker")
    assert_ended(trial, below, SILENT)
    assert f"stopped: rank {trial.rank} on " in trial.launched.said()
    trial.goes_on(whole)


def launcher_killed(trial, whole):
    below = trial.strike("launcher")
    assert_ended(trial, below, PROMPT)
    if trial.made() > 3:
        assert "the launcher is gone" in trial.launched.said()
    trial.goes_on(whole)


def one_terminated(trial, whole):
    below = trial.strike("worker")
    assert_ended(trial, below, PROMPT)
    made = trial.made()
    if made > 3:
        rows = [json.loads(line) for line in (trial.folder / "run" / "metrics.jsonl").read_text().splitlines()]
        assert rows[-1]["event"] == "interrupted" and rows[-1]["step"] == made
        assert (trial.folder / "run" / "checkpoints" / f"step-{made:08}").is_dir(), "the last step is saved"
    trial.goes_on(whole)


def ended_by(trial, mode):
    """What was said where one process goes wrong by itself, and all end promptly."""
    trial.launch(mode, LONG, trial.at, trial.rank)
    below = until_wrong(trial)
    assert_ended(trial, below, PROMPT)
    return trial.launched.said()


def nan_in_one(trial, whole):
    said = ended_by(trial, "nan")
    assert f"stopped: step {trial.at} " in said and f"the loss of these was not: rank {trial.rank} on " in said
    assert f"the weights are those of step {trial.at - 1}" in said
    trial.goes_on(whole)


def exception_in_one(trial, whole):
    said = ended_by(trial, "raises")
    assert f"rank {trial.rank} on " in said and "failed first: 'a row that nobody foresaw'" in said
    assert f"ProcessError: rank {trial.rank} on " in said, "the others name it too"
    trial.goes_on(whole)


def until_wrong(trial):
    """All processes that the launcher has, shortly before the step that goes wrong."""
    trial.launched.under_way()
    deadline = time.monotonic() + 60
    below = tree(trial.launched.process.pid)
    while trial.made() < trial.at - 1 and time.monotonic() < deadline:
        time.sleep(0.01)
    return below


def uneven(trial, whole):
    """The contract here: it goes on, with those that have something left."""
    first, others = (5, 7) if trial.drawn.random() < 0.5 else (trial.drawn.randint(2, 9), trial.drawn.randint(2, 9))
    done = torchrun(trial.size, fails.__file__, trial.folder, "uneven", 0, first, others)
    assert done.returncode == 0, done.stderr
    told = json.loads((trial.folder / "made.json").read_text())
    counts = list({step: count for step, _, count in told}.values())  # an epoch's end is told twice
    each = [(step < first) + (trial.size - 1) * (step < others) for step in range(max(first, others))]
    assert counts == each * 2, (first, others)


def link_cut(trial, whole):
    with hosts.wired() as two:
        both = [hosts.launch(host, rank, trial.folder, LONG) for rank, host in enumerate(two)]
        try:
            deadline = time.monotonic() + 90
            while len(list(trial.folder.glob("pid-*"))) < 2:
                assert time.monotonic() < deadline, hosts.said(trial.folder)
                time.sleep(0.05)
            time.sleep(trial.drawn.uniform(0.0, 2.0))
            below = [pid for one in both for pid in tree(one.pid)]
            hosts.cut(two[trial.drawn.randrange(2)])
            began = time.monotonic()
            for one in both:
                assert one.wait(PROMPT * BUSY) != 0
            assert gone(below, max(0.0, PROMPT * BUSY - (time.monotonic() - began))), "not all have ended"
            trial.took = time.monotonic() - began
        finally:
            for one in both:
                killed(one)
        assert "or the link to it cut" in hosts.said(trial.folder)
    trial.goes_on(whole)


KINDS = {
    "killed": one_killed,
    "frozen": one_frozen,
    "launcher": launcher_killed,
    "cut": link_cut,
    "nan": nan_in_one,
    "raises": exception_in_one,
    "uneven": uneven,
    "sigterm": one_terminated,
}


@pytest.mark.parametrize("kind", KINDS)
def test_one_goes_wrong(tmp_path, whole, kind):
    """All trials are made, and every failure is told with the seed that it was drawn from."""
    failures, took, lock = [], [], threading.Lock()

    def tried(number):
        trial = Trial(tmp_path, kind, number)
        try:
            KINDS[kind](trial, whole)
        except pytest.skip.Exception:
            raise
        except BaseException as failure:
            said = trial.launched.said()[-3000:] if trial.launched else ""
            failures.append(f"{trial.seed}, {trial.size} processes, rank {trial.rank}: {failure}\n{said}")
            print(failures[-1], flush=True)
        finally:
            trial.close()
        with lock:
            took.append(getattr(trial, "took", 0.0))
            harness.COUNTS[f"processes: {kind}"] += 1

    # Who waits for a silence leaves the cores free.
    with ThreadPoolExecutor(4 if kind == "frozen" else 1) as pool:
        list(pool.map(tried, range(REPEATS)))
    print(
        f"{kind}: to end took {sorted(took)[len(took) // 2]:.1f} s in the median, {max(took):.1f} s at most; "
        f"{PROMPT:.0f} s are {PROMPT * BUSY:.0f} s here"
    )
    assert not failures, f"{len(failures)} of {REPEATS} failed ({kind}):\n" + "\n\n".join(failures[:4])
