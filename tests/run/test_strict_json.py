"""Strict JSON in every file of a run, and the same floats when it is read."""

import json
import math

import pytest
import torch
from torch import nn

import fivestep as fs
from fivestep.run.metrics import append_rows, known_rows, read_rows, readable_rows
from fivestep.run.strict_json import dumps, loads

NAN, INF = math.nan, math.inf


def strictly(text):
    def refuse(name):
        raise AssertionError(f"{name} is no JSON")

    return json.loads(text, parse_constant=refuse)


@pytest.mark.parametrize(
    "value",
    [
        NAN,
        {"loss": NAN, "step": 3},
        {"a": INF, "b": -INF, "c": 0.5, "text": "nan"},
        {"details": {"loss": NAN, "batches": [1, [INF, 2.0], None]}, "layers": {"x.y": {"norm": [NAN]}}},
        [{"loss": INF}],
        {"nonfinite": 3, "none": None},
    ],
)
def test_what_is_written_is_read_back(value):
    text = dumps(value)
    strictly(text)
    if not isinstance(value, float):
        assert repr(loads(text)) == repr(value)


def test_a_reader_of_json_finds_the_name_beside():
    assert strictly(dumps({"loss": NAN, "best": [1.0, -INF]})) == {
        "loss": None,
        "best": [1.0, None],
        "nonfinite": {"loss": "nan", "best": [None, "-inf"]},
    }


def test_rows_of_earlier_versions_are_read(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "epoch": 1, "split": "val", "loss": NaN}\n')
    append_rows(path, [{"step": 2, "epoch": 1, "split": "val", "loss": INF}])
    for rows in (read_rows(path), list(readable_rows(path)), known_rows(path)[0]):
        assert math.isnan(rows[0]["loss"])
        assert rows[1] == {"step": 2, "epoch": 1, "split": "val", "loss": INF}


def test_every_file_of_a_run_is_strict(tmp_path):
    """A validation that overflows, a metric of 0/0, batches that are left out, and a trace."""

    def job(epochs):
        torch.manual_seed(0)
        model = nn.Linear(2, 1)
        data = [(torch.ones(2, 2) * value, torch.ones(2, 1)) for value in (1.0, NAN, 2.0)]
        val = [(torch.full((2, 2), 1e38), torch.full((2, 1), -1e38))]
        with fs.Run(tmp_path, checkpoint_every=1, say=lambda text: None, trace=True) as run:
            history = fs.fit(
                model,
                data,
                nn.MSELoss(),
                torch.optim.SGD(model.parameters(), lr=0.01),
                epochs=epochs,
                val=val,
                metrics={"none": lambda outputs, targets: NAN},
                on_nonfinite="skip",
                run=run,
                progress=False,
            )
        return history, run.state.skipped

    first = job(1)
    files = [path for path in tmp_path.rglob("*") if path.suffix in (".json", ".jsonl")]
    assert {path.name for path in files} >= {
        "metrics.jsonl", "skipped.jsonl", "trace.jsonl", "state.json", "manifest.json",
    }  # fmt: skip
    for path in files:
        for text in path.read_text().splitlines() if path.suffix == ".jsonl" else [path.read_text()]:
            strictly(text)
    again = job(1)
    assert repr(again) == repr(first), "the history that a resume returns has the floats"
    assert math.isinf(next(row["loss"] for row in again[0] if row["split"] == "val"))
    assert math.isnan(again[1][0]["loss"])
