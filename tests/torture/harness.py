"""Drives lives: starts them in a server, ends them, starts them again, and compares what is left.

A *job* is a training of a kind. A *home* is the folder of one trial: home/run is its run, home/log what it said.
Every random choice is drawn from a seed that is in the failure's message.
"""

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import fivestep
from fivestep.run.difference import difference

COUNTS = Counter()  # trials by kind: what the full forms print at their end
ROOT = Path(__file__).parents[2]
LONGEST = 600.0  # seconds of any life
TEXT = Path(__file__).with_name("words.txt")
EARLIER = "metrics.earlier.jsonl"  # rows of a life that ended before its first checkpoint
SAVED = "--threads 1 --run-dir run --resume --keep-last 1"
COMMON = f"--data {shlex.quote(str(TEXT))} --test-fraction 0.1 --sample-tokens 6 {SAVED}"
SMALL_WORDS = "--n-embd 8 --n-hidden 8 --n-layer 1 --bptt 6 --batch-size 4 --dropout 0.2 --checkpoint-every 9"


def _train(recipe, options, common=COMMON):
    return {"target": "command", "arguments": {"argv": ["train", recipe, *options.split(), *shlex.split(common)]}}


def jobs(size):
    """The trainings by name. size: 1 for the short forms, more for longer lives."""
    every = "--eval-every {} --log-every 7 --sample-every 25 --checkpoint-every 9"
    return {
        "bigram": _train(
            "bigram", f"--max-iters {120 * size} --batch-size 8 " + every.format(40) + " --learning-rate 0.01"
        ),
        "gpt-chars": _train(
            "gpt-chars",
            f"--max-iters {60 * size} --block-size 8 --batch-size 4 --n-layer 1 --n-head 2 --n-embd 8 --dropout 0.2 "
            + every.format(30),
        ),
        "lstm": _train("rnn-words", f"{SMALL_WORDS} --epochs {2 * size} --eval-every 1ep --cell lstm"),
        "gru": _train("rnn-words", f"{SMALL_WORDS} --epochs {2 * size} --eval-every 1ep --cell gru --ema 0.9"),
        "transformer": _train("transformer-words", f"{SMALL_WORDS} --n-head 2 --epochs {2 * size} --log-every 5"),
        "regression": _train(
            "regression",
            f"--epochs {3 * size} --checkpoint-every 11 --log-every 8",
            SAVED,
        ),
        "script": {"target": "script", "arguments": {"epochs": 3 * size}},
    }


class Server:
    """A fork server, for one thread at a time."""

    def __init__(self):
        paths = [str(Path(fivestep.__file__).parents[1]), str(ROOT), os.environ.get("PYTHONPATH", "")]
        self.env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(paths)}
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.torture.server"],
            cwd=ROOT,
            env=self.env,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.fresh, self.ended = {}, {}  # by process id: new interpreters; statuses of lives that were waited for
        assert json.loads(self.process.stdout.readline())["ready"]

    def ask(self, request):
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        answer = self.process.stdout.readline()
        assert answer, "the fork server has ended"
        return json.loads(answer)

    def start(self, job, home, fault=None, fresh=False):
        """Begin a life in `home`; its process id. fresh: in a new interpreter instead of a fork."""
        request = {**job, "home": str(home), "log": str(home / "log"), "fault": fault}
        if not fresh:
            pid = self.ask(request)["pid"]
            self.ended.pop(pid, None)  # of a life that had this id before
            self.fresh.pop(pid, None)
            return pid
        process = subprocess.Popen(
            [sys.executable, "-m", "tests.torture.server", json.dumps(request)], cwd=ROOT, env=self.env
        )
        self.fresh[process.pid] = process
        return process.pid

    def wait(self, pid, seconds=LONGEST):
        """The exit status of a life; None where it goes on after so many seconds."""
        if pid in self.fresh:
            try:
                return self.fresh[pid].wait(seconds)
            except subprocess.TimeoutExpired:
                return None
        if self.ended.get(pid) is None:
            self.ended[pid] = self.ask({"wait": pid, "seconds": seconds})["status"]
        return self.ended[pid]

    def run(self, job, home, **options):
        """A whole life; its exit status."""
        pid = self.start(job, home, **options)
        status = self.wait(pid)
        if status is None:
            os.kill(pid, signal.SIGKILL)
            self.wait(pid)
        return status

    def close(self):
        self.process.stdin.close()
        self.process.wait(30)


def new_home(path):
    """A folder for one trial."""
    path.mkdir(parents=True)
    return path


class Whole:
    """The uninterrupted life of a job, and what others are compared with."""

    def __init__(self, server, job, home):
        self.job, self.home = job, new_home(home)
        begun = time.monotonic()
        status = server.run(job, self.home)
        self.seconds = time.monotonic() - begun
        assert status == 0, said(self.home)

    def differs(self, home, sampled=True):
        """What differs first between a run and this; None where nothing does. Also leftovers.

        sampled: every sample must be there; else those that are there must be equal.
        """
        found = difference(self.home / "run", home / "run")
        if found:
            return found
        names = [
            sorted(
                str(path.relative_to(one)) for path in one.rglob("*") if not {"checkpoints", EARLIER} & {*path.parts}
            )
            for one in (self.home / "run", home / "run")
        ]
        missing = [name for name in {*names[0]} ^ {*names[1]} if sampled or not name.startswith("samples")]
        if missing:
            return f"files: {missing}"
        for path in [*(self.home / "run").glob("samples/*"), *(self.home / "run").glob("*.toml")]:
            other = home / "run" / path.relative_to(self.home / "run")
            if other.exists() and path.read_bytes() != other.read_bytes():
                return f"{path.name} differs"
        parts = [path.name for path in (home / "run" / "checkpoints").iterdir() if path.name.startswith(".")]
        return f"left over: {parts}" if parts else None


def said(home, last=2500):
    """The end of what a trial's lives have said."""
    return (home / "log").read_text(errors="replace")[-last:] if (home / "log").exists() else ""


def finish(server, whole, home, note="", sampled=True):
    """Start again until it ends, without a hand; then all must be equal. The home is removed where it is."""
    status = server.run(whole.job, home)
    assert status == 0, f"{note}: a restart ended with {status} in {home}: {said(home)}"
    found = whole.differs(home, sampled)
    assert found is None, f"{note}: {found} in {home}\n{said(home)}"
    shutil.rmtree(home)


class Pool:
    """Threads that each drive lives from a server of their own: as many as there are cores."""

    def __init__(self):
        self.local, self.servers = threading.local(), []
        self.executor = ThreadPoolExecutor(os.cpu_count() or 1)

    def one(self):
        """The server of this thread."""
        if not hasattr(self.local, "server"):
            self.local.server = Server()
            self.servers.append(self.local.server)
        return self.local.server

    def each(self, kind, trial, items):
        """Call `trial(server, item)` for all; every failure is told, not only the first."""
        failures = []

        def tried(item):
            try:
                trial(self.one(), item)
            except Exception as failure:
                failures.append(f"{item!r}: {failure or type(failure).__name__}")
            COUNTS[kind] += 1

        items = list(items)
        list(self.executor.map(tried, items))
        assert not failures, f"{len(failures)} of {len(items)} failed ({kind}):\n" + "\n\n".join(failures[:6])

    def close(self):
        self.executor.shutdown()
        for server in self.servers:
            server.close()
