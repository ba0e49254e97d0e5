"""What several processes do with a model in shards: `shards.py OUT RUN`; at last process 1 is killed.

With a third argument they go on with the run to twice the steps, in shards of their number.
"""

import json
import os
import signal
import sys
from pathlib import Path

import torch

import fivestep as fs
from fivestep import processes
from fivestep.data.windows import Windows
from fivestep.loop.batch import tensors
from fivestep.models.gpt import GPT
from fivestep.run import checkpoint
from fivestep.run.saving import Saver
from tests.processes import jobs

STEPS = 10


def job(dropout=0.0, meta=False):
    """In float64, with averaged weights; `meta`: without values."""
    torch.manual_seed(7)
    with torch.device("meta" if meta else "cpu"):
        model = GPT(29, block_size=16, n_layer=2, n_head=2, n_embd=32, dropout=dropout).double()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    return model, Windows(jobs.text(), 16, 12, seed=2), fs.NextToken(), optimizer


def steps(parts, n, run=None, **options):
    """The states and losses of the steps up to n."""
    found = []
    for info in fs.train(*parts, max_iters=n, ema=0.9, run=run, **options):
        found.append((info.state, float(info.loss)))
    return found


def refused(parts, kind):
    try:
        next(iter(fs.train(*parts, max_iters=1, parallel=kind)))
    except fs.UsageError as error:
        return str(error)


def failing(state, folder):
    """What is told where process 1 cannot write, of its second file."""
    saver, write = Saver(folder, 2, None), checkpoint.write_through

    def full(path, pieces):
        if path.name.startswith("state-00002"):
            raise OSError(28, "No space left on device")
        return write(path, pieces)

    checkpoint.write_through = full
    saver.save(state, {"metrics": 0, "best": 1.0}, None, lambda: None)
    told = str(saver.failed())
    checkpoint.write_through = write
    return processes.from_all(told)


def dies(state, folder):
    """Process 1 is killed between its two files."""
    saver, write = Saver(folder, 2, None), checkpoint.write_through

    def killed(path, pieces):
        if path.name.startswith("state-00002"):
            os.kill(os.getpid(), signal.SIGKILL)
        return write(path, pieces)

    checkpoint.write_through = killed
    saver.save(state, {"metrics": 0, "best": 1.0}, None, lambda: None)
    saver.wait()


def halved():
    """The types of what is saved where gathered copies are bfloat16."""
    model, *others, _ = job()
    optimizer = torch.optim.AdamW(model.float().parameters())
    live = steps((model, *others, optimizer), 2, parallel="fsdp", precision="bf16")[-1][0].live()
    return sorted({str(one.dtype) for one in tensors([live["model"], live["optimizers"], live["average"]])})


def goes_on(out, path):
    with fs.Run(path, checkpoint_every=5, say=lambda text: None) as run:
        made = steps(job(meta=not processes.is_first()), 2 * STEPS, run, parallel="fsdp")
    if processes.is_first():
        Path(out).write_text(json.dumps([loss for _, loss in made]))


def main(out, path):
    others = not processes.is_first()
    with fs.Run(path, checkpoint_every=5, say=lambda text: None) as run:
        made = steps(job(meta=others), STEPS, run, parallel="fsdp")
    state, folder = made[-1][0], Path(path) / "checkpoints"
    dtypes = {str(value.dtype) for value in state.model.state_dict().values()}
    told = {
        "losses": [loss for _, loss in made],
        "dtypes": sorted(dtypes),
        "bf16": halved(),
        "failing": failing(state, folder),
        "left": sorted(one.name for one in folder.iterdir()),
        "nobody": refused(job(meta=True), "fsdp"),
        "ddp": refused(job(meta=others), "ddp"),
        "twice": [
            [loss for _, loss in steps(job(0.2), 3, parallel=kind, activation_checkpointing=again)]
            for kind in ("fsdp", "ddp")
            for again in (False, True)
        ],
    }
    if processes.is_first():
        Path(out).write_text(json.dumps(told))
    processes.highest(0.0)
    dies(state, folder)


if __name__ == "__main__":
    processes.join_here()
    (goes_on if len(sys.argv) > 3 else main)(*sys.argv[1:3])
