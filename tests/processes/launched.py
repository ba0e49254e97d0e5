"""Starts programs under torchrun."""

import subprocess
import sys
from pathlib import Path

from benchmarks.measure import child


def torchrun(n, *arguments, timeout=120, options=(), cwd=None, **environment):
    """`torchrun --nproc-per-node n ARGUMENTS`, on a free port; its result."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(n), *options]
    return subprocess.run(
        [*command, *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=timeout,
        env=child({"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore", **environment}),
        cwd=cwd or Path.cwd(),
    )
