"""A training whose processes come and go: `members.py FOLDER STEPS`. Each notes which windows it computed."""

import json
import sys
import time
from pathlib import Path

import torch
from torch import nn

import fivestep as fs
from fivestep import processes
from fivestep.data.windows import Windows
from fivestep.models.gpt import GPT
from tests.processes import jobs

BLOCK, BATCH = 16, 12


class Noted(nn.Module):
    """A small GPT that remembers what it was shown, and takes its time while `folder/slow` is there."""

    def __init__(self, folder):
        super().__init__()
        self.gpt, self.shown = GPT(29, block_size=BLOCK, n_layer=1, n_head=2, n_embd=16), []
        self.slow = folder / "slow"

    def forward(self, xb):
        self.shown += xb.tolist()
        time.sleep(0.3 if self.slow.exists() else 0.0)
        return self.gpt(xb)


def data():
    return Windows(jobs.text(), BLOCK, BATCH, seed=5)


def main(folder, steps):
    folder = Path(folder)
    torch.manual_seed(7)
    model = Noted(folder).double()
    with fs.Run(folder / "run", checkpoint_every=4) as run:
        told = folder / f"round-{time.time():.3f}-{processes.size()}-{processes.rank()}"

        def see(result, _):
            if not model.shown:  # what an earlier round did not come to tell of its last step
                return
            with told.open("a") as file:
                line = {"round": processes.this_round(), "step": result.step, "windows": model.shown}
                file.write(json.dumps(line) + "\n")
            model.shown = []

        optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
        fs.fit(
            model, data(), fs.NextToken(), optimizer, max_iters=int(steps), log_every=1, watchers=[see],
            progress=False, run=run,
        )  # fmt: skip


if __name__ == "__main__":
    main(*sys.argv[1:])
