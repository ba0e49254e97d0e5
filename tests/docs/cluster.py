"""A cluster of stand-ins: its programs as shell scripts, and a batch script on it that is queued again."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import fivestep as fs
from tests.docs.pages import ROOT

TINY = "--threads 1 --n-embd 8 --n-layer 1 --n-head 2 --batch-size 2 --block-size 8 --sample-tokens 0 --log-every 5"


def programs(folder, **texts):
    """The environment in which these shell scripts are found first, by their names, in place of a cluster's."""
    (folder / "bin").mkdir()
    for name, text in texts.items():
        (folder / "bin" / name).write_text(f"#!/bin/bash\n{text}\n")
        (folder / "bin" / name).chmod(0o755)
    path = f"{folder / 'bin'}{os.pathsep}{os.environ['PATH']}"
    return {**os.environ, "PATH": path, "PYTHONPATH": str(Path(fs.__file__).parents[1])}


def command(more=""):
    """A stand-in for the installed command."""
    return f'exec "{sys.executable}" -m fivestep "$@" {more}'


def requeued_until_finished(folder, script, environment, steps):
    """Start the batch script, SIGTERM its tasks (as SLURM does) in the middle, start it again; it trains `steps`.

    `srun` writes the process ids of the tasks into the file `running`, `scontrol` its arguments into `requeued`.
    """
    (folder / "my.txt").write_text((ROOT / "LICENSE").read_text()[:4000])
    environment = {
        **environment,
        "SLURM_JOB_ID": str(os.getpid()),
    }  # a port is made of it: one that no other test has
    run = folder / "runs" / "mine"

    def started():
        return subprocess.Popen(["bash", script], cwd=folder, env=environment, stdout=subprocess.DEVNULL)

    rows = run / "metrics.jsonl"
    with started() as first:
        while first.poll() is None and not (rows.exists() and rows.stat().st_size):
            time.sleep(0.005)
        assert first.poll() is None, "it ended by itself"
        for task in (folder / "running").read_text().split():
            os.kill(int(task), signal.SIGTERM)
    assert first.returncode == 143
    asked = (folder / "requeued").read_text()
    stopped = max((run / "checkpoints").glob("step-*"))
    assert int(stopped.name[5:]) < steps
    with started() as second:
        assert second.wait() == 0
    assert (folder / "requeued").read_text() == asked == f"requeue {os.getpid()}\n", "finished: not once more"
    assert fs.load(run, "last").step == steps
