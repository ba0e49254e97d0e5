"""Trainings that one process and several must make alike. Run by torchrun, or alone: `jobs.py OUT KIND NAME...`."""

import importlib.util
import json
import sys
from pathlib import Path

import numpy as np
import torch
from torch import nn

import fivestep as fs
from fivestep import processes
from fivestep.data.examples import Examples
from fivestep.data.segments import CoveringSegments, Segments
from fivestep.data.windows import CoveringWindows, Windows
from fivestep.loop.evaluate import accuracy
from fivestep.models.gpt import GPT
from fivestep.models.mlp import MLP
from fivestep.models.rnn import RNN

STEPS = 40  # of a job


def text(n=4000, words=29):
    random = np.random.default_rng(0)
    ids = [0]
    for step in random.integers(0, 4, n):
        ids.append((ids[-1] * 5 + int(step)) % words)
    return np.array(ids, dtype=np.uint8)


def rows(n=203):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(n, 8, generator=generator, dtype=torch.float64)
    return x, (x[:, :1].sin() + x[:, 1:2]).round().long().clamp(-1, 1)[:, 0] + 1


def digits():
    """Short last batches: 203 rows in batches of 20 leave 3, fewer than four processes."""
    model = MLP([8, 16, 3]).double()
    x, y = rows()
    val = Examples(x[:21], y[:21], 5, shuffle=False)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    return model, Examples(x, y, 20, seed=3), nn.CrossEntropyLoss(), optimizer, val, {"metrics": {"acc": accuracy}}


def loader():
    """A user's DataLoader, shuffled by torch's own generator, whose drop_last is False."""
    model = MLP([8, 16, 3]).double()
    x, y = rows()
    data = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, y), batch_size=20, shuffle=True)
    val = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x[:21], y[:21]), batch_size=5)
    return model, data, nn.CrossEntropyLoss(), torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9), val, {}


def masked():
    """Targets of which more are ignored in some rows than in others: the mean is over what is left of all."""
    model = GPT(29, block_size=8, n_layer=1, n_head=2, n_embd=16).double()
    x = torch.from_numpy(text()[:800].astype(np.int64)).view(-1, 8)
    y = x.roll(-1, 1).clone()
    for row in range(len(y)):
        y[row, row % 8 :] = -100 if row % 5 else 1
    y[::7] = -100
    data = Examples(x, y, 12, seed=1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    return model, data, fs.NextToken(), optimizer, Examples(x[:21], y[:21], 5, shuffle=False), {"accumulate": 2}


def windows():
    model = GPT(29, block_size=16, n_layer=2, n_head=2, n_embd=32)
    ids = text()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.1)
    val = CoveringWindows(ids[:300], 16, 4)
    return model, Windows(ids, 16, 12, seed=2), fs.NextToken(), optimizer, val, {"clip_norm": 0.5, "ema": 0.9}


def muon():
    model, data, criterion, _, val, options = windows()
    matrices = [p for name, p in model.named_parameters() if p.ndim == 2 and "emb" not in name and "head" not in name]
    others = [p for p in model.parameters() if all(p is not one for one in matrices)]
    optimizers = [torch.optim.Muon(matrices, lr=1e-3), torch.optim.AdamW(others, lr=1e-3)]
    return model, data, criterion, optimizers, val, options


def segments():
    model = RNN(29, n_embd=16, n_hidden=16, n_layer=2, dropout=0.0)
    ids = text()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    data, val = Segments(ids, 10, 12), CoveringSegments(ids[:401], 5, 12)
    return model, data, fs.TruncatedBPTT(), optimizer, val, {"clip_norm": 0.25}


def fused():
    """A loss that never calls the model's forward, only its features."""
    model, data, _, _, val, options = segments()
    optimizer = torch.optim.SGD(model.double().parameters(), lr=1.0)
    return model, data, fs.TruncatedBPTT(fused=True), optimizer, val, options


def tables():
    """A large embedding, of whose rows a batch uses a few: its gradient travels row by row."""
    generator = torch.Generator().manual_seed(3)
    model = nn.Sequential(nn.Embedding(40_000, 8), nn.Flatten(), nn.Linear(32, 3)).double()
    x = torch.randint(0, 40_000, (203, 4), generator=generator)
    y = x.sum(1) % 3
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5, momentum=0.9, weight_decay=0.01)
    val = Examples(x[:21], y[:21], 5, shuffle=False)
    options = {"accumulate": 2, "clip_norm": 1.0}
    return model, Examples(x, y, 20, seed=4), nn.CrossEntropyLoss(), optimizer, val, options


JOBS = {one.__name__: one for one in (digits, loader, masked, tables, windows, muon, segments, fused)}


def trained(name, kind, steps=None, run=None):
    """Losses, counts, norms and the last validation of a job."""
    steps = steps or STEPS
    torch.manual_seed(7)
    model, data, criterion, optimizer, val, options = JOBS[name]()
    found = []

    def see(result, _):
        found.append([float(result.loss), float(result.count), float(result.grad_norm), result.state.clock.samples])

    history = fs.fit(
        model, data, criterion, optimizer, max_iters=steps, val=val, eval_every="1ep", watchers=[see],
        progress=False, parallel=kind, run=run, **options,
    )  # fmt: skip
    figures = [row for row in history if row["split"] == "val"][-1]
    for row in (figures,):
        row.pop("elapsed_seconds", None)
    return {"steps": found, "val": figures}


def right(outputs, labels):
    """A batch mean, which over nothing is NaN."""
    return (outputs.argmax(1) == labels).double().mean()


def distance(outputs, labels):
    """A float64 an item."""
    return (outputs.argmax(1) - labels).double().exp()


def metrics():
    found = {"accuracy": accuracy, "right": right, "distance": distance}
    if importlib.util.find_spec("torchmetrics"):
        from torchmetrics import SpearmanCorrCoef, classification

        class Order(SpearmanCorrCoef):
            """A metric that keeps all it has seen."""

            def update(self, outputs, labels):
                super().update(outputs.argmax(1).double(), labels.double())

        found |= {"of_torch": classification.MulticlassAccuracy(3, average="micro"), "order": Order()}
    return found


def evaluated(kind):
    """Figures of 21 items, in batches of which some are too small for every process to have a part."""
    torch.manual_seed(7)
    found = {}
    model = MLP([8, 16, 3]).double()
    fs.TrainStep(model, nn.CrossEntropyLoss(), torch.optim.SGD(model.parameters()), parallel=kind)
    x, y = rows(21)
    y[3] = -100
    for size in (1, 2, 5, 21):
        data = Examples(x, y, size, shuffle=False)
        found[f"by {size}"] = fs.evaluate(model, data, nn.CrossEntropyLoss(), metrics=metrics())
    for n in (21, 9, 2):
        whole = torch.utils.data.TensorDataset(x[:n], y[:n])
        sampler = torch.utils.data.DistributedSampler(whole, shuffle=False) if processes.joined() else None
        own = torch.utils.data.DataLoader(whole, 2, sampler=sampler)
        found[f"own {n}"] = fs.evaluate(model, own, nn.CrossEntropyLoss(), metrics=metrics())
    model = RNN(29, n_embd=16, n_hidden=16, n_layer=1, dropout=0.0).double()
    fs.TrainStep(model, nn.CrossEntropyLoss(), torch.optim.SGD(model.parameters()), parallel=kind)
    for columns in (1, 5):
        found[f"columns {columns}"] = fs.evaluate(
            model, CoveringSegments(text(22)[:22], columns, 2), fs.TruncatedBPTT()
        )
    model = GPT(29, block_size=8, n_layer=1, n_head=2, n_embd=16).double()
    fs.TrainStep(model, nn.CrossEntropyLoss(), torch.optim.SGD(model.parameters()), parallel=kind)
    found["windows"] = fs.evaluate(
        model, CoveringWindows(text()[: 8 * 20 + 4], 8, 5), fs.NextToken(chars_per_token=1.0)
    )
    return found


def main(out, kind, *names):
    made = {name: trained(name, kind) for name in names}
    figures = evaluated(kind)
    if processes.is_first():
        Path(out).write_text(json.dumps({"size": processes.size(), "jobs": made, "evaluated": figures}))


if __name__ == "__main__":
    main(*sys.argv[1:])
