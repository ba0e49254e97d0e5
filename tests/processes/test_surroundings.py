"""What is no fault of the processes does not end them; and where one is lost, nobody need be there to read of it."""

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.processes import surroundings
from tests.processes.launched import launching, started

pytestmark = [pytest.mark.multiprocess, pytest.mark.torture]

# Starts what it is given, which takes no word that the terminal is gone, and ends: as `nohup ... &` in a shell.
LEFT = "import signal, subprocess, sys; signal.signal(signal.SIGHUP, signal.SIG_IGN); subprocess.Popen(sys.argv[1:])"


@pytest.mark.parametrize("mode", ["timeout", "file", "half", "early"])
def test_it_goes_on(tmp_path, mode):
    done = started(2, surroundings.__file__, tmp_path, mode)
    assert done.returncode == 0, done.stderr
    assert [(tmp_path / f"done-{rank}").read_text() for rank in (0, 1)] == [str(surroundings.STEPS)] * 2
    assert "fivestep:" not in done.stderr


def test_one_that_is_late_is_told_with_its_stack(tmp_path):
    done = started(2, surroundings.__file__, tmp_path, "late")
    assert done.returncode == 0, done.stderr
    [told] = [line for line in done.stderr.splitlines() if line.startswith("fivestep:")]
    assert "waiting for 30 s; rank 1 on " in told and "stands at: step 5: forward and backward" in told
    assert "in sleeps_long" in done.stderr and "in main" in done.stderr


def test_a_watch_that_cannot_speak_ends_its_process_all_the_same(tmp_path):
    done = started(2, surroundings.__file__, tmp_path, "silent")
    assert done.returncode and not list(tmp_path.glob("done-*"))
    assert not list(tmp_path.glob("raised-*")), "it was the watch, and not the end of the frozen one"


@pytest.mark.skipif(not hasattr(signal, "SIGHUP"), reason="the system has no SIGHUP")
def test_it_outlives_the_shell_that_started_it(tmp_path):
    words = [sys.executable, "-c", f"import tests.processes.test_surroundings as one; one.ranks({str(tmp_path)!r})"]
    subprocess.run(
        [sys.executable, "-c", LEFT, *words], check=True, env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    )
    deadline = time.monotonic() + 60
    while len(list(tmp_path.glob("done-*"))) < 2 and time.monotonic() < deadline:
        time.sleep(0.2)
    time.sleep(0.2)
    assert [path.read_text() for path in tmp_path.glob("done-*")] == [str(surroundings.STEPS)] * 2


def ranks(folder):
    """Two of them, whose parent this is; it leaves them while they train."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = {"MASTER_ADDR": "localhost", "MASTER_PORT": str(free.getsockname()[1]), "WORLD_SIZE": "2"}
    for rank in range(2):
        subprocess.Popen(
            [sys.executable, surroundings.__file__, folder, "plain"], env=launching(RANK=str(rank), **address)
        )
    while len(list(Path(folder).glob("begun-*"))) < 2:
        time.sleep(0.1)
    os._exit(0)
