"""A training that goes well, in surroundings that are not as usual: `surroundings.py FOLDER MODE`."""

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn

import fivestep as fs
from fivestep import processes
from fivestep.data.examples import Examples

STEPS = 30  # of 0.2 s
KEPT = []


def sleeps_long():
    """For longer than the others wait without a word."""
    time.sleep(34)


def main(folder, mode):
    rank, folder = int(os.environ["RANK"]), Path(folder)
    if mode == "timeout":
        socket.setdefaulttimeout(1)
    if mode == "file":  # a group that met without an address
        dist.init_process_group("gloo", init_method=f"file://{folder}/met", rank=rank, world_size=2)
        os.environ["MASTER_PORT"] = "9"
    if mode == "half":  # the same, and one of them has a store for itself
        dist.init_process_group("gloo", init_method=f"file://{folder}/met", rank=rank, world_size=2)
        if rank:
            del os.environ["MASTER_ADDR"]
        else:
            KEPT.append(
                dist.TCPStore("localhost", int(os.environ["MASTER_PORT"]), is_master=True, wait_for_workers=False)
            )
    if mode == "silent":
        os.close(2)
        sys.stderr.close()
    model = nn.Linear(4, 1)
    x = torch.randn(40, 4, generator=torch.Generator().manual_seed(0))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    data = Examples(x, x.sum(1, keepdim=True), 8)
    try:
        for result in fs.train(model, data, nn.MSELoss(), optimizer, max_iters=STEPS):
            time.sleep(0.7 if mode == "timeout" else 0.2)  # for longer than a silence may last
            (folder / f"begun-{rank}").touch()
            if mode == "late" and result.step == 5 and rank:
                sleeps_long()
            if mode == "silent" and result.step == 5 and rank:
                subprocess.Popen(["sh", "-c", f"sleep 30; kill -KILL {os.getpid()}"])
                os.kill(os.getpid(), signal.SIGSTOP)
    except BaseException:
        (folder / f"raised-{rank}").touch()
        raise
    if mode == "early" and rank == 0:
        time.sleep(18)  # the other has ended for longer than a silence may last
    (folder / f"done-{processes.rank()}").write_text(str(result.step))


if __name__ == "__main__":
    main(*sys.argv[1:])
