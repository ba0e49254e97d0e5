"""The batch script on the page about resuming: terminated it asks for another start, and that one finishes."""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import fivestep as fs
from tests.docs.pages import ROOT, blocks

TINY = "--threads 1 --n-embd 8 --n-layer 1 --n-head 2 --batch-size 2 --block-size 8 --sample-tokens 0 --log-every 5"


@pytest.mark.multiprocess
@pytest.mark.skipif(not shutil.which("bash"), reason="it is a script for bash")
def test_requeued_until_it_is_finished(tmp_path):
    script = next(one for one in blocks(ROOT / "docs" / "resuming.md") if one.direction("file") == "train.sbatch")
    assert "#SBATCH --signal=TERM@90\n" in script.text
    (tmp_path / "train.sbatch").write_text(script.text)
    (tmp_path / "my.txt").write_text((ROOT / "LICENSE").read_text()[:4000])
    commands = {
        "fivestep": f'exec "{sys.executable}" -m fivestep "$@" {TINY} --max-iters 600',
        "srun": 'echo $$ > running; exec "$@"',
        "scontrol": 'echo "$@" >> requeued',
    }
    for name, text in commands.items():
        (tmp_path / "bin" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "bin" / name).write_text(f"#!/bin/sh\n{text}\n")
        (tmp_path / "bin" / name).chmod(0o755)
    path = {"PATH": f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}", "SLURM_JOB_ID": "17"}
    environment = {**os.environ, **path, "PYTHONPATH": str(Path(fs.__file__).parents[1])}

    def started():
        return subprocess.Popen(["bash", "train.sbatch"], cwd=tmp_path, env=environment, stdout=subprocess.DEVNULL)

    rows = tmp_path / "runs" / "mine" / "metrics.jsonl"
    with started() as first:
        while first.poll() is None and not (rows.exists() and rows.stat().st_size):
            time.sleep(0.005)
        assert first.poll() is None, "it ended by itself"
        os.kill(int((tmp_path / "running").read_text()), signal.SIGTERM)  # as SLURM does, to the step
    assert first.returncode == 143
    assert (tmp_path / "requeued").read_text() == "requeue 17\n"
    stopped = max((tmp_path / "runs" / "mine" / "checkpoints").glob("step-*"))
    assert int(stopped.name[5:]) < 600
    with started() as second:
        assert second.wait() == 0
    assert (tmp_path / "requeued").read_text() == "requeue 17\n", "finished: not once more"
    assert fs.load(tmp_path / "runs" / "mine", "last").step == 600
