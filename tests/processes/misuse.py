"""What users do and several processes must bear, or refuse with a sentence in all: `misuse.py FOLDER [body]`."""

import json
import sys
from pathlib import Path

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import fivestep as fs
from fivestep import processes
from fivestep.data.examples import Examples
from fivestep.loop.shares import columns_of, joined_carry, own_carry

x = torch.randn(16, 4, generator=torch.Generator().manual_seed(0))
y = x.sum(1, keepdim=True)


def linear():
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 1))


def trained(model, data, criterion=None, body=None, **options):
    """The sentence that a training is refused with, or how far the processes' weights are apart after it."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    try:
        for result in fs.train(model, data, criterion or nn.MSELoss(), optimizer, **{"epochs": 2, **options}):
            if body is not None:
                body(result)
    except fs.UsageError as error:
        return str(error)
    every = processes.tensors_of_all(torch.cat([p.detach().flatten() for p in model.parameters()]))
    return max(float((one - every[0]).abs().max()) for one in every)


class Parts(fs.Supervised):
    """Calls parts of the model, never its forward."""

    def forward(self, model, batch, carry):
        return model.decode(model.encode(batch[0])), batch[1], None


class Coded(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(1)
        self.encode, self.decode = nn.Linear(4, 3), nn.Linear(3, 1)


class Scaled(fs.Supervised):
    """A rate that depends on the rows of a batch."""

    def rate_scale(self, batch):
        return float(batch[0].abs().sum())


def parts_of_a_model():
    return trained(Coded(), Examples(x, y, 8), Parts(nn.MSELoss()))


def unfrozen_meanwhile():
    model = linear()
    model[0].requires_grad_(False)
    return trained(model, Examples(x, y, 8), body=lambda _: model[0].requires_grad_(True))


def used_in_one():
    model = linear()
    model.forward = lambda data: model[1](model[0](data)) if processes.rank() else model[1](data[:, :3])
    return trained(model, Examples(x, y, 8))


def other_data():
    return trained(linear(), Examples(x, y + processes.rank(), 8))


def longer_in_one():
    n = 16 - 8 * processes.rank()
    return trained(linear(), DataLoader(TensorDataset(x[:n], y[:n]), 4))


def draws_in_the_body():
    data = DataLoader(TensorDataset(x, y), 4, shuffle=True)
    return trained(linear(), data, body=lambda _: torch.randn(3) if processes.is_first() else None)


def rate_of_a_batch():
    return trained(linear(), Examples(x, y, 8), Scaled(nn.MSELoss()))


def nothing_to_stand_in():
    """The last batch of a window is one row, which is padding: the second process has it to stand in."""
    torch.manual_seed(1)
    targets = torch.arange(9) % 3
    targets[8] = -100
    model, inputs = nn.Linear(4, 3), x[:9]
    losses = []
    trained(
        model, Examples(inputs, targets, 8, shuffle=False), nn.CrossEntropyLoss(),
        body=lambda result: losses.append(float(result.loss)), accumulate=2,
    )  # fmt: skip
    return losses


def statistics():
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.Linear(3, 1))
    trained(model, Examples(x, y, 8))
    loss = fs.evaluate(model, Examples(x, y, 8, shuffle=False), nn.MSELoss())["loss"]
    return [loss, float(((model.eval()(x) - y) ** 2).mean())]


def masks():
    """What dropout leaves of ones in the first step of three trainings."""
    seen = []

    class Seeing(nn.Module):
        def __init__(self):
            super().__init__()
            self.drop, self.out = nn.Dropout(0.5), nn.Linear(32, 1)

        def forward(self, data):
            left = self.drop(torch.ones(1, 32))
            seen.append(left.flatten().tolist())
            return self.out(left.expand(len(data), -1))

    model, state = Seeing(), None
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(3):
        limit = {} if state is None else {"state": state}
        for result in fs.train(model, Examples(x, y, 16), nn.MSELoss(), optimizer, max_iters=len(seen) + 1, **limit):
            state = result.state
    return seen


def carried():
    """Columns of a state are parted and joined again."""
    found = []
    for whole in (
        {"a": torch.arange(30.0).view(5, 6)},
        (torch.arange(24.0).view(2, 4, 3), torch.arange(12.0).view(2, 2, 3)[:, :2].repeat(1, 2, 1)),
        None,
    ):
        again = joined_carry(own_carry(whole), columns_of(whole))
        parts = zip(
            *(list(one.values() if isinstance(one, dict) else one or ()) for one in (whole, again)), strict=True
        )
        found.append(all(torch.equal(one, other) for one, other in parts))
    return found


CASES = [
    parts_of_a_model, unfrozen_meanwhile, used_in_one, other_data, longer_in_one, draws_in_the_body, rate_of_a_batch,
    nothing_to_stand_in, statistics, masks, carried,
]  # fmt: skip


def main(folder):
    processes.join_here()
    made = {case.__name__: case() for case in CASES}
    (Path(folder) / f"made-{processes.rank()}.json").write_text(json.dumps(made))


def body(folder):
    """The caller's own code fails in one process, while a run is open."""
    model = linear()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    with fs.Run(Path(folder) / "run", checkpoint_every=5) as run:
        for result in fs.train(model, Examples(x, y, 8), nn.MSELoss(), optimizer, max_iters=2000, run=run):
            if result.step == 7 and processes.rank():
                raise KeyError("a body that nobody foresaw")


def metric(folder):
    """A metric fails in one process."""

    def fails(outputs, targets):
        if processes.rank():
            raise KeyError("a metric that nobody foresaw")
        return (outputs - targets).mean()

    model, data = linear(), Examples(x, y, 8)
    fs.fit(model, data, nn.MSELoss(), torch.optim.SGD(model.parameters(), lr=0.05), max_iters=8, val=data,
           eval_every=4, metrics={"m": fails}, progress=False)  # fmt: skip


if __name__ == "__main__":
    {"body": body, "metric": metric}.get(sys.argv[2] if len(sys.argv) > 2 else "", main)(sys.argv[1])
