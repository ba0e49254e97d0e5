"""Starts programs under torchrun."""

import os
import subprocess
import sys
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
