"""Muon of several processes beside torch's own on whole matrices: `matrices.py FOLDER KIND`."""

import json
import sys
from pathlib import Path

import torch
from torch import nn

import fivestep as fs
from fivestep import processes
from fivestep.data.examples import Examples
from fivestep.loop.batch import in_shards, whole
from fivestep.loop.muon import Exchange, SharedMuon
from fivestep.loop.parallel import like

OPTIONS = ({"lr": 0.02}, {"nesterov": False, "momentum": 0.8, "weight_decay": 0.0, "adjust_lr_fn": "match_rms_adamw"})


def build(kind):
    """Tall, wide and square ones, one of a single row, one that does not train; a matrix more than two processes."""
    torch.manual_seed(1)
    sizes = ((6, 9), (9, 9), (9, 12), (12, 5), (5, 1))
    model = nn.Sequential(*[nn.Linear(*size, bias=False, dtype=kind) for size in sizes])
    model[2].weight.requires_grad_(False)
    return model


def hooked_in_one(kind):
    """Somebody looks at the optimizer of one process, from the third step on: torch's own step, in all."""
    model = build(torch.float32)
    if kind == "fsdp":
        model = model[:2]  # torch's own cannot step a matrix in shards that has fewer rows than there are processes
    optimizer = torch.optim.Muon([one.weight for one in model], lr=0.02)
    inputs = torch.randn(24, 6, generator=torch.Generator().manual_seed(3))
    data = Examples(inputs, torch.ones(24, model[-1].out_features), 8)
    seen = []
    for result in fs.train(model, data, nn.MSELoss(), optimizer, max_iters=6, parallel=kind):
        if result.step == 3 and processes.is_first():
            optimizer.register_step_post_hook(lambda *_: seen.append(1))
    every = processes.tensors_of_all(torch.cat([whole(one.detach()).flatten() for one in model.parameters()]))
    return all(torch.equal(one, every[0]) for one in every) and len(seen) == (3 if processes.is_first() else 0)


def shared_out():
    """Of so many alike each process has as many, or one less."""
    owned = Exchange([torch.Size((8, 4))] * (2 * processes.size() + 1), False, torch.device("cpu")).owned
    every = sorted(n for ones in owned for n in ones)
    return sorted(map(len, owned)) == [2] * (processes.size() - 1) + [3] and every == [*range(len(every))]


def main(folder, kind):
    processes.join_here()
    found = [shared_out()]
    for dtype in (torch.float32, torch.float64):
        model, alone = build(dtype), build(dtype)
        ours, theirs = (
            torch.optim.Muon(
                [
                    {"params": [one[0].weight, one[1].weight, one[2].weight], **OPTIONS[0]},
                    {"params": [one[3].weight, one[4].weight], **OPTIONS[1]},
                ]
            )
            for one in (model, alone)
        )
        followed = [torch.optim.lr_scheduler.LambdaLR(one, lambda n: 1 / (1 + n)) for one in (ours, theirs)]
        step = fs.TrainStep(model, nn.MSELoss(), ours, parallel=kind)
        generator = torch.Generator().manual_seed(2)
        for _ in range(3):
            for one, other in zip(model.parameters(), alone.parameters(), strict=True):
                grad = torch.randn(other.shape, generator=generator, dtype=dtype)
                if one.requires_grad:
                    one.grad, other.grad = like(grad.clone(), one) if in_shards(one) else grad.clone(), grad
            step.updates[0]()
            theirs.step()
            for one in followed:
                one.step()
        state = whole(ours.state_dict()["state"])
        found += [
            all(isinstance(one, SharedMuon) for one in step.updates),
            *[torch.equal(whole(a.detach()), b) for a, b in zip(model.parameters(), alone.parameters(), strict=True)],
            state.keys() == theirs.state_dict()["state"].keys(),
            *[
                torch.equal(state[n]["momentum_buffer"], one["momentum_buffer"])
                for n, one in theirs.state_dict()["state"].items()
            ],
        ]
    if processes.size() < 5 or kind == "ddp":
        found.append(hooked_in_one(kind))
    Path(folder, f"found-{processes.rank()}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
