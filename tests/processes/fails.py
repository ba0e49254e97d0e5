"""A training in which something goes wrong: `fails.py FOLDER MODE STEPS`. Each process leaves its pid in FOLDER."""

import json
import os
import sys
import time
from pathlib import Path

import torch
from torch import nn
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

import fivestep as fs
from fivestep import processes
from fivestep.data.examples import Examples
from tests.processes import jobs

AT = 8  # the step at which it goes wrong


class Uneven(DistributedSampler):
    """Five batches of one row for the first process, seven for the others."""

    def __iter__(self):
        return iter(range(5 if self.rank == 0 else 7))

    def __len__(self):
        return 5 if self.rank == 0 else 7


class Spoilt(nn.Module):
    """An MLP whose first process's rows turn out right, and another's not, once."""

    def __init__(self, mode):
        super().__init__()
        self.mode, self.passes, self.inner = mode, 0, jobs.MLP([8, 16, 3]).double()

    def forward(self, x):
        self.passes += self.training
        time.sleep(0.02)
        out = self.inner(x)
        if self.training and self.passes == AT and processes.rank() == 1:
            if self.mode == "raises":
                raise KeyError("a row that nobody foresaw")
            if self.mode == "nan":
                out = out * torch.nan
        return out


def main(folder, mode, steps):
    folder = Path(folder)
    torch.manual_seed(7)
    model = Spoilt(mode)
    x, y = jobs.rows()
    data = Examples(x, y, 20, seed=3)
    with fs.Run(folder / "run", checkpoint_every=5) as run:
        if mode == "uneven":
            rows = TensorDataset(x[:7], y[:7])
            data = DataLoader(rows, 1, sampler=Uneven(rows, processes.size(), processes.rank()))
        found = []

        def see(result, _):
            found.append([result.step, float(result.loss), float(result.count)])
            if result.step == 3:
                (folder / f"pid-{processes.rank()}").write_text(str(os.getpid()))

        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        options = {"epochs": 2} if mode == "uneven" else {"max_iters": int(steps)}
        fs.fit(model, data, nn.CrossEntropyLoss(), optimizer, watchers=[see], progress=False, run=run, **options)
    if processes.is_first():
        (folder / "made.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
