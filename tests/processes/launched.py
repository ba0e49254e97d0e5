"""Starts programs in several processes, and sees to it that they end."""

import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path

from benchmarks.measure import ROOT, child


def launching(**environment):
    """The environment of a launch: a thread each, and this package's tests in sight."""
    here = child()
    path = os.pathsep.join([here["PYTHONPATH"], str(ROOT)])
    return {**here, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore", **environment}


def free_port():
    """Return a port that nobody listens on now."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        return free.getsockname()[1]


def torchrun(n, *arguments, timeout=300, options=(), cwd=None, **environment):
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


def started(n, *arguments, timeout=300, **environment):
    """n processes of `python ARGUMENTS` with ranks, as srun starts them: without a launcher, and sooner there."""
    address = {"MASTER_ADDR": "localhost", "MASTER_PORT": str(free_port()), "WORLD_SIZE": str(n)}
    command = [sys.executable, *map(str, arguments)]
    with tempfile.TemporaryFile("w+") as log:
        every = [
            subprocess.Popen(command, stdout=log, stderr=log, env=launching(RANK=str(rank), **address, **environment))
            for rank in range(n)
        ]
        deadline = time.monotonic() + timeout
        try:
            codes = [one.wait(max(0.0, deadline - time.monotonic())) for one in every]
        finally:
            for one in every:
                killed(one)
        log.seek(0)
        return subprocess.CompletedProcess(command, max(map(abs, codes)), "", log.read())


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


class Launched:
    """A program under torchrun, whose processes each leave their number in FOLDER/pid-RANK once under way."""

    def __init__(self, folder, size, *arguments, options=()):
        self.folder, self.size, self.pids = folder, size, {}
        self.log = (folder / "log").open("w+")
        launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(size)]
        self.process = subprocess.Popen(
            [*launch, *options, *map(str, arguments)], stdout=self.log, stderr=self.log, env=launching()
        )

    def under_way(self):
        """Wait until all are."""
        deadline = time.monotonic() + 300
        while len(list(self.folder.glob("pid-*"))) < self.size:
            assert time.monotonic() < deadline and self.process.poll() is None, self.said()
            time.sleep(0.05)
        time.sleep(0.1)
        self.pids = {int(path.name[4:]): int(path.read_text()) for path in self.folder.glob("pid-*")}
        return self

    def ended(self, most, known=()):
        """Whether all processes, the launcher's too, are gone after so many seconds."""
        deadline = time.monotonic() + most
        while time.monotonic() < deadline:
            if self.process.poll() is not None and not any(map(alive, [*self.pids.values(), *known])):
                return True
            time.sleep(0.05)
        return False

    def said(self):
        self.log.flush()
        return Path(self.log.name).read_text()

    def close(self):
        for pid in (
            {*tree(self.process.pid), *self.pids.values()} if self.process.poll() is None else self.pids.values()
        ):
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.process.wait()
        self.log.close()
