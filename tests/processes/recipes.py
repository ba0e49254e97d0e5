"""Recipes trained by their own command, and what each step read. Run by torchrun, or alone: `recipes.py OUT JOBS`.

JOBS are JSON, by name: {"recipe": ..., "flags": [...], "double": model, rows and Muon in float64, "nudged": the
largest weight of each parameter moved by its last place, which shows what a rounding grows to}. A window, a column or
a row is known by the first place in the data that holds it, inputs and targets as the loss was given them; each
process notes its own.
"""

import json
import sys
from contextlib import nullcontext
from pathlib import Path
from unittest.mock import patch

import numpy as np
import torch

from fivestep import processes
from fivestep.cli import cli
from fivestep.run import build
from fivestep.run.config import load_config
from fivestep.run.names import CONFIG, METRICS

ALWAYS = ("--dropout", "0", "--log-every", "1", "--threads", "1", "--sample-tokens", "8")
FIGURES = ("step", "split", "loss", "perplexity", "bits_per_char", "accuracy", "count")
EVALUATED = ("val", "test")


class Places:
    """Where in the data a window, a column or a row stands."""

    def __init__(self, stream):
        self.columns = hasattr(stream, "bptt")
        if hasattr(stream, "features"):
            found = zip(stream.features, stream.labels, strict=True)
            self.rows = {(x.numpy().tobytes(), y.item()): place for place, (x, y) in reversed([*enumerate(found)])}
            return
        self.rows, self.size = None, 4  # bytes of an id
        self.text = np.asarray(stream.tokens).astype(np.uint32).tobytes()

    def of(self, batch):
        """The places of a batch's rows."""
        x, y = batch
        if self.rows is not None:
            return [self.rows[one.numpy().tobytes(), label.item()] for one, label in zip(x, y, strict=True)]
        x, y = (x.T, y.view_as(x).T) if self.columns else (x, y)
        assert torch.equal(x[:, 1:], y[:, :-1])
        return [self.of_run(torch.cat([one, last[-1:]])) for one, last in zip(x, y, strict=True)]

    def of_run(self, ids):
        wanted, at = ids.numpy().astype(np.uint32).tobytes(), -1
        while at < 0 or at % self.size:  # between two ids is no place
            at = self.text.index(wanted, at + 1)
        return at // self.size


def noting(seen):
    """`build_objective`, of an objective that notes each batch it is given to learn from."""
    build_objective = build.build_objective

    def noted(*arguments):
        objective = build_objective(*arguments)
        loss = objective.loss

        def note(model, batch, carry):
            if model.training:
                seen.append(batch)
            return loss(model, batch, carry)

        objective.loss = note
        return objective

    return noted


def changed(double, nudged):
    """`build_model`, of a model in float64, or a nudged one."""
    build_model = build.build_model

    def built(*arguments):
        model = build_model(*arguments)
        if double:
            model.double()
        if nudged:
            for one in model.parameters():
                weights = one.data.view(-1)
                largest = weights.abs().argmax()
                weights[largest] = torch.nextafter(weights[largest], weights.new_tensor(torch.inf))
        return model

    return built


def rows_of(splits):
    """The same rows in float64."""
    return lambda: {split: (x.double(), y) for split, (x, y) in splits().items()}


def trained(run, recipe, flags=(), double=False, nudged=False):
    """Train into the folder `run` by the command; the rows' places and the figures of each step, and evaluations."""
    seen = []
    with (
        patch.object(build, "build_objective", noting(seen)),
        patch.object(build, "build_model", changed(double, nudged)),
        patch.object(torch.Tensor, "bfloat16", torch.Tensor.clone) if double else nullcontext(),  # inside of Muon
        patch.dict(build.ROWS, {name: rows_of(one) for name, one in build.ROWS.items()} if double else {}),
    ):
        cli.main(["train", recipe, "--run-dir", str(run), *ALWAYS, *flags], standalone_mode=False)
        places = Places(build.build_data(load_config(str(run / CONFIG), {})).train)
    each = processes.from_all([places.of(batch) for batch in seen])
    rows = [json.loads(line) for line in (run / METRICS).read_text().splitlines()]
    return {
        "places": [[place for own in step for place in own] for step in zip(*each, strict=True)],
        "steps": [[row["loss"], row["grad_norm"]] for row in rows if row["split"] == "train" and row["steps"] == 1],
        "evaluations": [
            {key: row[key] for key in FIGURES if key in row} for row in rows if row["split"] in EVALUATED
        ],
    }


def main(out, jobs):
    made = {name: trained(Path(out) / name, **job) for name, job in json.loads(jobs).items()}
    if processes.is_first():
        (Path(out) / "made.json").write_text(json.dumps(made))


if __name__ == "__main__":
    main(*sys.argv[1:])
