"""A training in which something goes wrong: `fails.py FOLDER MODE STEPS [AT WHO]`.

In FOLDER each process leaves its pid after its third step, and a byte a step. MODE `raises` and `nan`: what the
process WHO does in step AT. `sound`: nothing; `swift`: nothing, sooner; `wide`: nothing, with 5 MB of gradients.
`caught`: it raises, and the program catches the error and stays. `uneven`: the first process has AT batches, each
other one WHO.
"""

import json
import os
import sys
import time
from contextlib import nullcontext, suppress
from pathlib import Path

import torch
from torch import nn
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

import fivestep as fs
from fivestep import processes
from fivestep.data.examples import Examples
from tests.processes import jobs

AT, WHO = 8, 1  # the step at which it goes wrong, and the process


class Uneven(DistributedSampler):
    """As many batches of one row for the first process, as many for each of the others."""

    def __init__(self, rows, first, others):
        super().__init__(rows, processes.size(), processes.rank())
        self.own = others if processes.rank() else first

    def __iter__(self):
        return iter(range(self.own))

    def __len__(self):
        return self.own


class Spoilt(nn.Module):
    """An MLP that goes wrong in one process, in one step."""

    def __init__(self, mode, at, who):
        super().__init__()
        self.mode, self.at, self.who = mode, at, who
        self.passes, self.inner = 0, jobs.MLP([8, 55_000 if mode == "wide" else 16, 3]).double()

    def forward(self, x):
        self.passes += self.training
        time.sleep(0 if self.mode == "swift" else 0.02)
        out = self.inner(x)
        if self.training and self.passes == self.at and processes.rank() == self.who:
            if self.mode in ("raises", "caught"):
                raise KeyError("a row that nobody foresaw")
            if self.mode == "nan":
                out = out * torch.nan
        return out


def main(folder, mode, steps, at=AT, who=WHO):
    folder, at, who = Path(folder), int(at), int(who)
    torch.manual_seed(7)
    model = Spoilt(mode, at, who)
    x, y = jobs.rows()
    data = Examples(x, y, 20, seed=3)
    with fs.Run(folder / "run", checkpoint_every=5) as run:
        if mode == "uneven":
            rows = TensorDataset(x, y)
            data = DataLoader(rows, 1, sampler=Uneven(rows, at, who))
        found, made = [], folder / f"steps-{processes.rank()}"

        def see(result, _):
            found.append([result.step, float(result.loss), float(result.count)])
            if found[-1][0] > max((one[0] for one in found[:-1]), default=0):  # an epoch's end is told again
                with made.open("a") as file:
                    file.write(".")
            if result.step == 3:
                (folder / f"pid-{processes.rank()}").write_text(str(os.getpid()))

        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        options = {"epochs": 2} if mode == "uneven" else {"max_iters": int(steps)}
        with suppress(KeyError) if mode == "caught" else nullcontext():
            fs.fit(model, data, nn.CrossEntropyLoss(), optimizer, watchers=[see], progress=False, run=run, **options)
    if mode == "caught":
        time.sleep(60)
    if processes.is_first():
        (folder / "made.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
