"""What each process holds at most, in MiB beyond what it held before: `memory.py OUT RUN KIND STEPS [meta]`."""

import json
import sys
import threading
from pathlib import Path
from time import sleep

import numpy as np
import torch

import fivestep as fs
from fivestep import processes
from fivestep.data.windows import Windows
from fivestep.models.gpt import GPT


def held():
    """Anonymous memory: what is read through a mapped file is the system's."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith("RssAnon"))


class Peak:
    """The most since it was last asked."""

    def __init__(self):
        self.most = self.base = held()
        threading.Thread(target=self.watch, daemon=True).start()

    def watch(self):
        while True:
            self.most = max(self.most, held())
            sleep(0.005)

    def __call__(self):
        most, self.most = max(self.most, held()), 0.0
        return round(most - self.base)


def main(out, path, kind, steps, meta=""):
    processes.join_here()
    peak, found = Peak(), {}
    with torch.device("meta" if meta and not processes.is_first() else "cpu"):
        model = GPT(29, block_size=16, n_layer=9, n_head=8, n_embd=768)
    found["MiB of weights"] = sum(p.nbytes for p in model.parameters()) / 2**20
    data = Windows(np.arange(4000, dtype=np.uint8) % 29, 16, 2, seed=1)
    parts = model, data, fs.NextToken(), torch.optim.AdamW(model.parameters())
    with fs.Run(path, checkpoint_every=None, say=lambda text: None) as run:
        made = fs.train(*parts, max_iters=int(steps), parallel=kind, run=run)
        found["begins"] = peak()
        for _ in made:
            found["trains"] = max(peak(), found.get("trains", 0))
    found["saves"] = peak()
    every = processes.from_all(found)
    if processes.is_first():
        Path(out).write_text(json.dumps(every))


if __name__ == "__main__":
    main(*sys.argv[1:])
