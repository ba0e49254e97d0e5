"""Starts programs under torchrun, and sees to it that they end."""

import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

from benchmarks.measure import ROOT, child


def launching(**environment):
    """The environment of a launch: a thread each, and this package's tests in sight."""
    here = child()
    path = os.pathsep.join([here["PYTHONPATH"], str(ROOT)])
    return {**here, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore", **environment}


def torchrun(n, *arguments, timeout=120, options=(), cwd=None, **environment):
    """`torchrun --nproc-per-node n ARGUMENTS`, on a free port; its result."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(n), *options]
    return subprocess.run(
        [*command, *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=timeout,
        env=launching(**environment),
        cwd=cwd or Path.cwd(),
    )


def tree(pid):
    """A process and all below it, as /proc has them now."""
    found = [pid]
    with suppress(OSError):
        for thread in Path(f"/proc/{pid}/task").iterdir():
            for child in (thread / "children").read_text().split():
                found += tree(int(child))
    return found


def alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


def gone(pids, most):
    """Whether none of the processes is alive after so many seconds; returns as soon as that is so."""
    deadline = time.monotonic() + most
    while any(map(alive, pids)):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.05)
    return True


def killed(process):
    """Kill a launcher that a test has started, and what it has started."""
    for pid in tree(process.pid):
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    process.wait()
