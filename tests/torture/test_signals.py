"""SIGTERM, SIGINT and SIGUSR1 at random instants: a prompt end with the right code, no step lost, the same end after.

The lives hold slow data, validations, samples, saves, the final test and sample.
"""

import os
import random
import signal
import time

import pytest

from fivestep.run.metrics import read_rows
from tests.torture import harness

CODES = {signal.SIGTERM: 143, signal.SIGINT: 130}
PROMPT = 10.0  # seconds, or a step; other work makes them longer
SLOW = {"target": "script", "arguments": {"epochs": 2, "n": 38, "workers": 0, "wait": 0.01, "slow_look": 0.04}}
LONG_SAMPLES = harness._train(
    "gpt-chars",
    "--max-iters 40 --block-size 8 --batch-size 4 --n-layer 1 --n-head 2 --n-embd 8 --dropout 0.2 --eval-every 20 "
    "--sample-every 15 --checkpoint-every 7",
    harness.COMMON.replace("--sample-tokens 6", "--sample-tokens 150"),
)


@pytest.fixture(scope="module")
def lives(pool, tmp_path_factory):
    folder = tmp_path_factory.mktemp("signals")
    return [
        harness.Whole(pool.one(), job, folder / name) for name, job in (("script", SLOW), ("command", LONG_SAMPLES))
    ]


def signalled(lives, folder):
    def trial(server, item):
        number, sent = item
        drawn = random.Random(f"{number} {sent.name}")
        whole = lives[number % 2]
        home = harness.new_home(folder / f"{number}-{sent.name}")
        seconds = drawn.uniform(0.0, 1.1 * whole.seconds)
        note = f"{sent.name} after {seconds:.4f} s of {whole.home.name}"
        pid = server.start(whole.job, home)
        if server.wait(pid, seconds) is None:
            os.kill(pid, sent)
        began = time.monotonic()
        status = server.wait(pid)
        took = time.monotonic() - began
        said = f"{note}, ended with {status} in {took:.1f} s: {harness.said(home)}"
        # Outside of a run, a script ends as Python and the system have it: before there is one, or after its end.
        outside = status == -sent and whole.job is SLOW
        if sent == signal.SIGINT and not (home / "run").exists():  # a command that is still importing ends at once
            outside = status == -sent
        if sent == signal.SIGUSR1:
            assert status == 0 or outside, said
        else:
            assert took < PROMPT * max(1.0, os.getloadavg()[0] / (os.cpu_count() or 1)), said
            assert status in {0, CODES[sent]} or outside, said
            if status:
                stopped(home, said)
        if outside and sent != signal.SIGINT and (home / "run" / "checkpoints").exists():
            assert whole.differs(home) is None, said
        harness.COUNTS[f"{sent.name}: ended with {status}"] += 1
        if status == 0:
            assert whole.differs(home) is None, said
        # A sample that was broken off is not written again: it is no part of the training.
        harness.finish(server, whole, home, note, sampled=False)

    return trial


def stopped(home, said):
    """What a run that was told to end has left: its last step saved, and a row that says so."""
    run = home / "run"
    if not (run / "checkpoints").exists():
        return
    rows = read_rows(run / "metrics.jsonl")
    steps = sorted(path.name for path in (run / "checkpoints").iterdir())
    assert steps[-1].startswith("step-"), said
    ended = [row for row in rows if row.get("event") == "interrupted"]
    if not ended:  # it came after the last row of all
        assert rows[-1].get("split") in ("test", "val"), said
        return
    last = int(steps[-1].split("-")[1])
    assert last == ended[-1]["step"], f"step {ended[-1]['step']} was made, step {last} is saved: {said}"
    assert not (run / ".running").exists(), said


def test_signals(pool, lives, tmp_path):
    sent = [signal.SIGTERM] * 4 + [signal.SIGINT, signal.SIGUSR1]
    pool.each("signals", signalled(lives, tmp_path), enumerate(sent))


@pytest.mark.torture
def test_full_signals(pool, lives, tmp_path):
    sent = [signal.SIGTERM] * 100 + [signal.SIGINT] * 40 + [signal.SIGUSR1] * 40
    pool.each("signals", signalled(lives, tmp_path), enumerate(sent))
