"""Trainings of one small GPT that torch compiles, whole or in part: `compiled.py FOLDER KIND`, KIND a layout's.

Alone, the model is not compiled: what the others are compared with.
"""

import json
import sys
from pathlib import Path

import torch

import fivestep as fs
from fivestep import processes
from fivestep.data.windows import Windows
from fivestep.models.gpt import GPT
from tests.processes import jobs


def as_it_is(model):
    return model


def in_place(model):
    model.compile()
    return model


def by_blocks(model):
    for block in model.blocks:
        block.compile()
    return model


COMPILED = {"whole": torch.compile, "in place": in_place, "by blocks": by_blocks}


def losses(how, kind):
    torch.manual_seed(7)
    model = how(GPT(29, block_size=16, n_layer=2, n_head=2, n_embd=32))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    windows = Windows(jobs.text(), 16, 12, seed=2)
    steps = fs.train(
        model,
        windows,
        fs.NextToken(),
        optimizer,
        max_iters=12,
        clip_norm=0.5,
        parallel="auto" if kind == "alone" else kind,
    )
    return [[float(one.loss), float(one.grad_norm)] for one in steps]


def compiled_frames():
    """How many parts torch has compiled so far: 0 would mean that nothing of this was."""
    return torch._dynamo.utils.counters["frames"]["ok"]


def main(folder, kind):
    if kind != "alone":
        processes.join_here()
    found = {"as it is": losses(as_it_is, kind)}
    made = {}
    if kind != "alone":
        for name, how in COMPILED.items():
            torch._dynamo.reset()
            before = compiled_frames()
            found[name] = losses(how, kind)
            made[name] = compiled_frames() - before
    (Path(folder) / f"{kind}-{processes.rank()}.json").write_text(json.dumps([found, made]))


if __name__ == "__main__":
    main(*sys.argv[1:])
