"""One process of several fails: all end within seconds, the culprit is named, no orphan is left, nothing is lost."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from contextlib import suppress

import pytest

from tests.processes import fails
from tests.processes.launched import Launched, alive, free_port, launching, started

pytestmark = [pytest.mark.multiprocess, pytest.mark.slow]
STEPS = 400
PATIENCE = 90  # seconds for all to end, on a machine that may be busy; tests/torture has the ten that are promised


def await_listener(port, process):
    """Wait until the store listens: rank 0 then waits for the others. process: must be alive meanwhile."""
    deadline = time.monotonic() + 300
    while True:
        with suppress(ConnectionRefusedError), socket.create_connection(("localhost", port)):
            return
        assert process.poll() is None and time.monotonic() < deadline, "it never began to wait"
        time.sleep(0.1)


@pytest.fixture
def launched(tmp_path):
    made = []

    def launch(mode, steps=STEPS, **options):
        made.append(Launched(tmp_path, 2, fails.__file__, tmp_path, mode, steps, **options))
        return made[-1].under_way()

    yield launch
    for one in made:
        one.close()


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The losses of the training that nothing befalls."""
    folder = tmp_path_factory.mktemp("whole")
    fails.main(folder, "swift", 60)
    return {step: loss for step, loss, _ in json.loads((folder / "made.json").read_text())}


def assert_goes_on(folder, whole):
    """A second start, alone, ends with the losses of the training that nothing befell."""
    fails.main(folder, "swift", 60)
    for step, loss, _ in json.loads((folder / "made.json").read_text()):
        assert loss == pytest.approx(whole[step], rel=1e-12), step


def test_an_exception_in_one(launched, tmp_path, whole):
    training = launched("raises")
    assert training.ended(PATIENCE), training.said()
    said = training.said()
    assert training.process.returncode == 1
    assert "rank 1 on " in said and "failed first: 'a row that nobody foresaw'" in said
    assert "ProcessError: rank 1 on " in said, "the other names it too"
    assert_goes_on(tmp_path, whole)


def test_an_exception_that_one_catches(launched):
    """It goes on for a while, so no connection breaks: the other would wait in its sum."""
    training = launched("caught")
    assert training.ended(PATIENCE), training.said()
    assert "rank 0 on " in training.said()
    assert (
        "stopped: rank 1 on " in training.said()
        and "failed: KeyError: 'a row that nobody foresaw'" in training.said()
    )


def test_nan_in_one(launched, tmp_path):
    training = launched("nan")
    assert training.ended(PATIENCE), training.said()
    said = training.said()
    assert f"stopped: step {fails.AT} " in said and "the loss of these was not: rank 1 on " in said
    assert f"the weights are those of step {fails.AT - 1}" in said
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert rows[-1]["event"] == "nonfinite" and rows[-1]["details"]["ranks"][0].startswith("rank 1 on ")


@pytest.mark.torture
@pytest.mark.parametrize("rank", [0, 1])
def test_sigterm_to_one(launched, tmp_path, rank, whole):
    training = launched("sound")
    os.kill(training.pids[rank], signal.SIGTERM)
    assert training.ended(PATIENCE), training.said()
    assert "saved" in training.said() or list((tmp_path / "run" / "checkpoints").glob("step-*"))
    assert_goes_on(tmp_path, whole)


@pytest.mark.parametrize("rank", [0, pytest.param(1, marks=pytest.mark.torture)])
def test_one_is_killed(launched, tmp_path, rank):
    training = launched("sound")
    os.kill(training.pids[rank], signal.SIGKILL)
    assert training.ended(PATIENCE), training.said()
    assert f"rank      : {rank} " in training.said() or f"rank {rank} on " in training.said()


def test_the_launcher_is_killed(launched):
    training = launched("sound")
    os.kill(training.process.pid, signal.SIGKILL)
    assert training.ended(PATIENCE), training.said()
    assert "the launcher is gone" in training.said()


@pytest.mark.torture
def test_torchrun_starts_them_again_after_a_kill(launched, tmp_path, whole):
    training = launched("sound", steps=60, options=["--max-restarts", "2"])
    os.kill(training.pids[1], signal.SIGKILL)
    assert training.process.wait(300) == 0, training.said()
    made = json.loads((tmp_path / "made.json").read_text())
    assert made[0][0] > 3, "it went on from a checkpoint"
    assert made[-1][0] == 60
    for step, loss, _ in made:
        assert loss == pytest.approx(whole[step], rel=1e-12), step


def test_five_against_seven_batches(tmp_path):
    done = started(2, fails.__file__, tmp_path, "uneven", 0, 5, 7)
    assert done.returncode == 0, done.stderr
    made = json.loads((tmp_path / "made.json").read_text())
    counts = {step: count for step, _, count in made}
    assert [counts[step] for step in sorted(counts)] == [2, 2, 2, 2, 2, 1, 1] * 2


def test_who_waits_for_others_that_never_come_can_be_ended(tmp_path):
    """The command has a handler of its own, which Python would call after the wait."""
    port = free_port()
    environment = launching(RANK="0", WORLD_SIZE="2", MASTER_ADDR="localhost", MASTER_PORT=str(port))
    words = [sys.executable, "-m", "fivestep", "train", "digits", "--run-dir", str(tmp_path / "run")]
    with subprocess.Popen(words, stderr=subprocess.DEVNULL, env=environment) as waiting:
        try:
            await_listener(port, waiting)
            waiting.terminate()
            assert waiting.wait(60) == -signal.SIGTERM
        finally:
            waiting.kill()


@pytest.mark.torture
def test_who_waits_for_others_that_never_come_ends_with_its_launcher(tmp_path):
    """A process that waits inside torch for the group takes no signal; its watch ends it."""
    code = (
        "import subprocess, sys, time; one = subprocess.Popen([sys.executable, *sys.argv[1:]]); "
        "print(one.pid, flush=True); time.sleep(600)"
    )
    port = free_port()
    environment = launching(RANK="0", WORLD_SIZE="2", MASTER_ADDR="localhost", MASTER_PORT=str(port))
    launcher = subprocess.Popen(
        [sys.executable, "-c", code, fails.__file__, str(tmp_path), "sound", "5"],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env=environment,
        text=True,
    )
    with launcher:
        pid = int(launcher.stdout.readline())
        await_listener(port, launcher)
        time.sleep(1)  # it has begun to wait
        assert alive(pid)
        launcher.kill()
    deadline = time.monotonic() + 60
    while alive(pid) and time.monotonic() < deadline:
        time.sleep(0.1)
    try:
        assert not alive(pid)
    finally:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
