"""What users do and several processes must bear, or refuse with a sentence in all: `misuse.py FOLDER [body]`."""

import json
import os
import signal
import sys
import time
from collections import UserDict
from contextlib import suppress
from pathlib import Path

import torch
from torch import nn
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

import fivestep as fs
from fivestep import processes
from fivestep.cli import main as main_of_the_command
from fivestep.data.examples import Examples
from fivestep.loop.batch import cut
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


class Unable(nn.Linear):
    def forward(self, rows):
        time.sleep(0.3 * processes.rank())
        raise ValueError("no row will do")


def all_fail_alike():
    """As in a sweep, whose body catches what a training fails with: how often it was told, and who has failed now."""
    watch = processes._group.watchdog
    before = watch.failures
    for _ in range(3):
        model = Unable(4, 1)
        optimizer = torch.optim.SGD(model.parameters())
        with suppress(ValueError):
            fs.fit(model, Examples(x, y, 8), nn.MSELoss(), optimizer, epochs=1, progress=False)
    processes.totals(0)  # all have
    return [watch.failures - before, watch._failed()]


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


def targets_without_weight():
    """The second process's rows weigh 0 in the first micro-batch, and everybody's in the second."""
    torch.manual_seed(1)
    targets = torch.tensor([0, 1, 0, 1, 2, 2, 2, 2, 2, 2, 2, 2, 2, 2, 2, 2])
    model, criterion = nn.Linear(4, 3), nn.CrossEntropyLoss(weight=torch.tensor([1.0, 2.0, 0.0]))
    alone = nn.Linear(4, 3)
    alone.load_state_dict(model.state_dict())
    optimizer = torch.optim.SGD(alone.parameters(), lr=0.05)
    criterion(alone(x), targets).backward()
    optimizer.step()
    trained(model, Examples(x, targets, 8, shuffle=False), criterion, epochs=1, accumulate=2)
    loss = fs.evaluate(model, Examples(x, targets, 8, shuffle=False), criterion)["loss"]
    return [float((model.weight - alone.weight).abs().max()), loss - float(criterion(alone(x), targets))]


def empty_batches():
    """Weights after batches of which some are empty: the same for all; for one process or the other; for both."""
    common = [(x[:8], y[:8]), None, (x[8:], y[8:]), []]
    own = [[(x[:8], y[:8]), None, None, (x[8:], y[8:])], [(x[8:], y[8:]), (x[:8], y[:8]), None, None]]
    found = []
    for data, options in ((common, {}), (common, {"accumulate": 2}), (own[processes.rank()], {"own": True})):
        if options.pop("own", False):
            data = Own(data)
        model = linear()
        apart = trained(model, data, **options)
        loss = fs.evaluate(model, data, nn.MSELoss())
        found.append([apart, model[1].weight.flatten().tolist(), loss["loss"], loss["count"]])
    return found


class Own:
    """Batches of this process alone, as a loader with a DistributedSampler gives them."""

    def __init__(self, data):
        self.data, self.sampler = data, DistributedSampler(range(16), num_replicas=2, rank=processes.rank())

    def __iter__(self):
        return iter(self.data)

    def __len__(self):
        return len(self.data)


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


class Normal(nn.Module):
    """Keeps a running mean of what it sees, as a normaliser does that is not torch's."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(1)
        self.out = nn.Linear(4, 1)
        self.register_buffer("mean", torch.zeros(4))
        self.register_buffer("mask", torch.ones(4, dtype=torch.bool))

    def forward(self, data):
        if self.training:
            self.mean.mul_(0.9).add_(0.1 * data.mean(0))
        return self.out((data - self.mean) * self.mask)


def running_buffers():
    """The loss that is evaluated, that of the model that this process holds, and what each held before."""
    model = Normal()
    trained(model, Examples(x, y, 8))
    held = [one.tolist() for one in processes.tensors_of_all(model.mean)]
    loss = fs.evaluate(model, Examples(x, y, 8, shuffle=False), nn.MSELoss())["loss"]
    return [loss, float(((model.eval()(x) - y) ** 2).mean()), *held]


def other_order():
    """Dict batches whose last tensor is the same in all rows."""
    rows = [{"x": a, "y": b, "mask": torch.ones(4)} for a, b in zip(x, y, strict=True)]
    data = DataLoader(rows, 16, shuffle=True, generator=torch.Generator().manual_seed(processes.rank()))

    class Masked:
        def count(self, batch):
            return len(batch["y"])

        def loss(self, model, batch, carry):
            return nn.functional.mse_loss(model(batch["x"] * batch["mask"]), batch["y"]), None

    return trained(linear(), data, Masked())


def evaluated_shuffled():
    """After one process has drawn alone."""
    data, model = DataLoader(TensorDataset(x, y), 4, shuffle=True), linear()
    if processes.is_first():
        torch.randn(3)
    return [fs.evaluate(model, data, nn.MSELoss())["loss"], float(((model(x) - y) ** 2).mean())]


def evaluated_on_others():
    try:
        return fs.evaluate(linear(), Examples(x, y + processes.rank(), 8), nn.MSELoss())["loss"]
    except fs.UsageError as error:
        return str(error)


def rows_that_a_process_has():
    return trained(nn.Sequential(nn.Embedding(9, 4, max_norm=1.0), nn.Flatten(), nn.Linear(4, 1)), Examples(x, y, 8))


def other_rate():
    model = linear()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1 * (1 + processes.rank()))
    try:
        list(fs.train(model, Examples(x, y, 8), nn.MSELoss(), optimizer, epochs=1))
    except fs.UsageError as error:
        return str(error)


class Annealed(fs.Supervised):
    """Changes a number of the model's, and asks for its parameters by name."""

    def loss(self, model, batch, carry):
        model.scale *= 0.9
        assert model.tau == "mine" and isinstance(model.features[0], nn.Linear)
        mean, carry = super().loss(model, batch, carry)
        penalty = sum((p**2).sum() for name, p in model.named_parameters() if name.startswith("features."))
        return mean + (0.1 * penalty).detach(), carry

    def forward(self, model, batch, carry):
        return model(features=batch[0]), batch[1], None


class Named(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(1)
        self.features, self.scale, self.tau = nn.Sequential(nn.Linear(4, 1)), 1.0, "mine"
        self.dim, self.logger = 7, None  # as torch's DDP has them too

    def forward(self, features):
        return self.features(features)


def asked_of_the_model():
    """The number that the objective has changed, and the first loss less that without the penalty."""
    model, losses = Named(), []
    trained(model, Examples(x, y, 8), Annealed(nn.MSELoss()), body=lambda one: losses.append(float(one.loss)))
    plain = []
    trained(Named(), Examples(x, y, 8), body=lambda one: plain.append(float(one.loss)))
    start = Named().features[0]
    assert (model.dim, model.logger) == (7, None)
    return [model.scale, losses[0] - plain[0], 0.1 * float(sum((p**2).sum() for p in start.parameters()))]


def batches_of_other_kinds():
    """Rows of a UserDict, as tokenizers give them, and texts beside tensors."""

    class Encoded(UserDict):
        def __getattr__(self, name):
            try:
                return self.data[name]
            except KeyError:
                raise AttributeError(name) from None

    whole = Encoded(x=x[:5], texts=["a", "b", "c", "d", "e"])
    part = cut(whole, 5, 1, 3)
    return [type(part).__name__, len(part.x), part.texts]


def not_finite(folder):
    """The weights themselves: what is newest afterwards."""
    model = linear()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    try:
        with fs.Run(Path(folder) / "spoilt", checkpoint_every=2) as run:
            for result in fs.train(model, Examples(x, y, 8), nn.MSELoss(), optimizer, max_iters=20, run=run):
                if result.step == 5:
                    with torch.no_grad():
                        model[0].weight[0, 0] = float("inf")
    except fs.NonFiniteError as error:
        newest = max(path.name for path in (Path(folder) / "spoilt" / "checkpoints").glob("step-*"))
        return [str(error), newest]


def sampled(folder, steps=3):
    """In the middle of an epoch of a DistributedSampler's: `goes_on_with_others` begins there."""
    rows = TensorDataset(x, y)
    data = DataLoader(rows, 2, sampler=DistributedSampler(rows, processes.size(), processes.rank(), shuffle=False))
    model = linear()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    with fs.Run(Path(folder) / "sampled") as run:
        return [one.step for one in fs.train(model, data, nn.MSELoss(), optimizer, max_iters=steps, run=run)]


def apart(folder):
    """Directories that each process has for itself."""
    model = linear()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    try:
        with fs.Run(Path(folder) / f"own-{processes.rank()}") as run:
            list(fs.train(model, Examples(x, y, 8), nn.MSELoss(), optimizer, max_iters=2, run=run))
    except fs.UsageError as error:
        return str(error)


CASES = [
    running_buffers, other_order, evaluated_shuffled, evaluated_on_others, rows_that_a_process_has, other_rate,
    asked_of_the_model, batches_of_other_kinds, all_fail_alike,
    parts_of_a_model, unfrozen_meanwhile, used_in_one, other_data, longer_in_one, draws_in_the_body, rate_of_a_batch,
    nothing_to_stand_in, targets_without_weight, empty_batches, statistics, masks, carried,
]  # fmt: skip


def main(folder):
    processes.join_here()
    made = {case.__name__: case() for case in CASES}
    made |= {case.__name__: case(folder) for case in (not_finite, sampled, apart)}
    (Path(folder) / f"made-{processes.rank()}.json").write_text(json.dumps(made))


def goes_wrong(error, run=None):
    """In one process the loop's body raises `error`."""
    model = linear()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    for result in fs.train(model, Examples(x, y, 8), nn.MSELoss(), optimizer, max_iters=2000, run=run):
        if result.step == 7 and processes.rank():
            raise error


def body(folder):
    """The caller's own code fails in one process, while a run is open."""
    with fs.Run(Path(folder) / "run", checkpoint_every=5) as run:
        goes_wrong(KeyError("a body that nobody foresaw"), run)


def leaves(folder):
    """One process ends in the body, with a run open."""
    with fs.Run(Path(folder) / "run", checkpoint_every=5) as run:
        goes_wrong(SystemExit(0), run)


def plain(folder):
    """The caller's own code fails in one process, and nothing of ours is open."""
    goes_wrong(KeyError("a body that nobody foresaw"))


def metric(folder):
    """A metric fails in one process."""

    def fails(outputs, targets):
        if processes.rank():
            raise KeyError("a metric that nobody foresaw")
        return (outputs - targets).mean()

    model, data = linear(), Examples(x, y, 8)
    fs.fit(model, data, nn.MSELoss(), torch.optim.SGD(model.parameters(), lr=0.05), max_iters=8, val=data,
           eval_every=4, metrics={"m": fails}, progress=False)  # fmt: skip


class Shorter(torch.utils.data.IterableDataset):
    """In process 1 it has a batch less."""

    def __iter__(self):
        return iter(zip(x[: len(x) - 8 * processes.rank()], y, strict=False))


def at_step_7(data=None, kind="ddp", **options):
    """A training up to its step 7: the model, and its data."""
    model, data = linear(), Examples(x, y, 8) if data is None else data
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    steps = fs.train(model, data, nn.MSELoss(), optimizer, max_iters=2000, parallel=kind, **options)
    for result in steps:
        if result.step == 7:
            yield model, data


def alone(folder, kind="ddp"):
    """One process evaluates, and the other goes on."""
    for model, data in at_step_7(kind=kind):
        if not processes.rank():
            fs.evaluate(model, data, nn.MSELoss())


def alone_in_shards(folder):
    """The same, where the other waits for parameters."""
    alone(folder, "fsdp")


def sampler_in_one(folder):
    """One process has a loader of its own, and the other that of all."""
    rows = torch.utils.data.TensorDataset(x, y)
    sampler = torch.utils.data.DistributedSampler(rows, 2, 1) if processes.rank() else None
    for _ in at_step_7(torch.utils.data.DataLoader(rows, 8, sampler=sampler)):
        pass


def waits_elsewhere(folder):
    """One process evaluates, and the other waits for it in a talk of its own."""
    for model, data in at_step_7():
        if processes.rank():
            torch.distributed.barrier()
        fs.evaluate(model, data, nn.MSELoss())


def killed_before(folder):
    """One process is killed before an evaluation to which the other has come."""
    for model, data in at_step_7():
        if processes.rank():
            time.sleep(2)
            os.kill(os.getpid(), signal.SIGKILL)
        fs.evaluate(model, data, nn.MSELoss())


def stray(folder):
    """One process talks of its own, past everything of ours."""
    for _ in at_step_7():
        if not processes.rank():
            torch.distributed.all_reduce(torch.ones(1, dtype=torch.uint8))


def ends(folder):
    """One process leaves the loop, and its program comes to its end."""
    for _ in at_step_7():
        if processes.rank():
            break


def evaluates_last(folder):
    """The first process goes on when the other has ended."""
    for _ in at_step_7():
        break
    if not processes.rank():
        fs.evaluate(linear(), Examples(x, y, 8), nn.MSELoss())


def begins_anew(folder):
    """In one process an error is caught outside of the loop, and another training begins."""
    with suppress(KeyError):
        for _ in at_step_7():
            if processes.rank():
                raise KeyError("a body that nobody foresaw")
    for _ in at_step_7():
        pass


def saves_alone(folder):
    """One process saves, and the other goes on."""
    with fs.Run(Path(folder) / "run") as run:
        for _ in at_step_7(run=run):
            if processes.rank():
                run.save(run.state)


def shorter(folder):
    """An epoch ends sooner in one process."""
    for _ in at_step_7(torch.utils.data.DataLoader(Shorter(), 8)):
        pass


def options(folder):
    """The command line, with another rate in each process."""
    rate = str(0.1 * (1 + int(os.environ["RANK"])))
    main_of_the_command(
        ["train", "digits", "--max-iters", "2", "--run-dir", f"{folder}/run", "--learning-rate", rate]
    )


MODES = {
    one.__name__: one
    for one in (
        body, metric, leaves, plain, options,
        alone, alone_in_shards, stray, ends, evaluates_last, begins_anew, saves_alone, shorter,
        sampler_in_one, waits_elsewhere, killed_before,
    )
}  # fmt: skip

if __name__ == "__main__":
    MODES.get(sys.argv[2] if len(sys.argv) > 2 else "", main)(sys.argv[1])
