"""Steps of several processes as programs, and the same steps one operation at a time: `programs.py FOLDER [CASE...]`.

One model, of which the programs are compiled once for all cases: with ids, statistics, dropout.
"""

import json
import sys
import warnings
from pathlib import Path

import torch
from torch import nn
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

import fivestep as fs
from fivestep import processes
from fivestep.data.examples import Examples
from fivestep.loop import train as loop
from fivestep.loop.clock import Limit

x = torch.randint(0, 10, (44, 2), generator=torch.Generator().manual_seed(0))
y = x.sum(1, keepdim=True).float()


def build():
    torch.manual_seed(1)
    return nn.Sequential(
        nn.Embedding(10, 4), nn.Flatten(), nn.Linear(8, 6), nn.BatchNorm1d(6), nn.Dropout(0.2), nn.Linear(6, 1)
    )


def data(inputs=x, targets=y):
    return Examples(inputs, targets, 8, seed=3)


class Training:
    """One model's, whose steps may be programs; `figures` of each step, and `told`: what was warned of."""

    def __init__(self, graph, **options):
        self.model = build()
        optimizer = torch.optim.SGD(self.model.parameters(), lr=0.05, momentum=0.9)
        torch.manual_seed(4)
        self.step = fs.TrainStep(self.model, nn.MSELoss(), optimizer, clip_norm=1.0, graph=graph, **options)
        self.figures, self.told = [], []

    def run(self, batches, steps, body=None):
        """Up to so many steps; the error that ended them, if one did."""
        error = None
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            try:
                for result in loop.steps(self.step, batches, Limit(None, steps), 1):
                    self.figures.append([float(result.loss), float(result.grad_norm), int(result.count)])
                    if body is not None:
                        body(self, result)
            except Exception as one:  # of any kind: it is what is looked at
                error = f"{type(one).__name__}: {one}"
        self.told += [str(one.message) for one in told]
        return error

    def found(self, **more):
        """All that is compared."""
        held = [*self.model.parameters(), *self.model.buffers()]
        flat = torch.cat([one.detach().double().flatten() for one in held])
        every = processes.tensors_of_all(flat)
        graph = self.step.graph
        return {
            "figures": self.figures,
            "apart": max(float((one - every[0]).abs().max()) for one in every),
            "weights": flat.tolist(),
            "told": [one for one in self.told if one.startswith("graph:")],
            "steps": None if graph is None else [graph.made, graph.wasted],
            **more,
        }


def plain(graph):
    made = Training(graph)
    return made.found(error=made.run(data(), 30))


def accumulated(graph):
    made = Training(graph, ema=0.9)
    batches = DataLoader(TensorDataset(x, y), 8, shuffle=True)
    return made.found(error=made.run(batches, 12))


def own_batches(graph):
    """Of the last one each process has another size."""
    rows = 19 + 3 * processes.rank()
    whole = TensorDataset(x[:rows], y[:rows])
    sampler = DistributedSampler(whole, num_replicas=1, rank=0)
    made = Training(graph)
    return made.found(error=made.run(DataLoader(whole, 4, sampler=sampler), 20))


def watched_in_one(graph):
    """From the tenth step on somebody looks at the model in one process."""

    def body(made, result):
        if result.step == 9 and processes.rank() == 1:
            made.model[2].register_forward_hook(lambda *_: None)

    made = Training(graph)
    return made.found(error=made.run(data(), 60, body))


def hooked_in_one(graph):
    """In one process it can be no program from the start."""
    made = Training(graph)
    if processes.rank() == 1:
        made.model[2].register_forward_hook(lambda *_: None)
    return made.found(error=made.run(data(), 12))


def not_finite(graph):
    targets = y.clone()
    targets[17] = torch.nan
    made = Training(graph)
    return made.found(error=made.run(data(targets=targets), 12))


def skipped(graph):
    targets = y.clone()
    targets[17] = torch.nan
    made = Training(graph, on_nonfinite="skip")
    error = made.run(data(targets=targets), 12)
    return made.found(error=error, skipped=[one["position"] for one in made.step.state.skipped])


def out_of_range():
    """An id that there is no row for, in the part of one process."""
    inputs = x.clone()
    inputs[20] = 11
    for _ in loop.steps(Training(True).step, data(inputs), Limit(None, 12), 1):
        pass


def other_threads(graph):
    """Which a program is compiled for."""
    torch.set_num_threads(1 + processes.rank())
    made = Training(graph)
    return made.found(error=made.run(data(), 12))


def gone_on_with(graph):
    """A state of the middle of an epoch, in another training."""
    first = Training(graph)
    first.run(data(), 10)
    second = Training(graph)
    second.step.state.load_state_dict(first.step.state.state_dict())
    error = second.run(data(), 20)
    return second.found(error=error, before=first.figures)


CASES = {
    one.__name__: one
    for one in (
        plain,
        accumulated,
        own_batches,
        watched_in_one,
        hooked_in_one,
        not_finite,
        skipped,
        gone_on_with,
    )
}


def main(folder, *names):
    processes.join_here()
    made = {}
    if names == ("out_of_range",):
        out_of_range()
    for name in names or CASES:
        case = CASES.get(name, other_threads)
        made[name] = {kind: case(kind == "program") for kind in ("eager", "program")}
        Path(folder, f"made-{processes.rank()}.json").write_text(json.dumps(made))


if __name__ == "__main__":
    main(*sys.argv[1:])
