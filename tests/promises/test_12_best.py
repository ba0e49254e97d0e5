"""PAINS row 12: `best` is a step that was evaluated before it was saved: evaluating it gives the recorded figure."""

import json
from pathlib import Path

import pytest

from fivestep.run.checkpoint import checkpoints
from fivestep.run.metrics import read_rows
from tests.run.cli import fivestep  # noqa: F401  (a fixture)

TEXT = "".join(f"{i} and {i * 7 % 13} make {i + i * 7 % 13}, said the {('cat', 'fox')[i % 2]}.\n" for i in range(400))
TINY = ["--n-embd", "8", "--n-hidden", "8", "--n-layer", "1"]
JOBS = {
    "bigram": ["bigram", "--max-iters", "40", "--eval-every", "9", "--learning-rate", "0.5"],
    "gpt": ["gpt-chars", "--max-iters", "12", "--eval-every", "3", *TINY, "--n-head", "2", "--dropout", "0.3"],
    "lstm": ["rnn-words", "--epochs", "3", *TINY, "--eval-every", "4", "--learning-rate", "30"],
    "bf16": ["gpt-chars", "--max-iters", "6", "--eval-every", "2", *TINY, "--n-head", "2", "--precision", "bf16"],
    "averaged": ["bigram", "--max-iters", "40", "--eval-every", "9", "--learning-rate", "0.5", "--ema", "0.9"],
    "mlp": ["regression", "--epochs", "3", "--learning-rate", "0.1"],
}


@pytest.mark.parametrize("job", JOBS)
def test_best_reproduces_its_recorded_value(fivestep, tmp_path, job):  # noqa: F811
    (tmp_path / "text.txt").write_text(TEXT)
    data = [] if job == "mlp" else ["--data", "text.txt", "--test-fraction", "0.1"]
    done = fivestep("train", *JOBS[job], *data, "--run-dir", "mine")
    assert done.code == 0, done.err
    rows = read_rows(Path("mine/metrics.jsonl"))
    best = min((row for row in rows if row["split"] == "val"), key=lambda row: row["loss"])
    assert len({row["loss"] for row in rows if row["split"] == "val"}) > 2, "a figure that never moves proves nothing"

    told = json.loads(fivestep("eval", "mine", "--json").out)
    assert told["step"] == best["step"]
    assert {name: told[name] for name in best if name in told} == {name: best[name] for name in best if name in told}
    assert told["loss"] == told["recorded"] == best["loss"], "bit for bit"
    test = json.loads(fivestep("eval", "mine", "--split", "test", "--json").out)
    assert test["loss"] == rows[-1]["loss"], "and so does the test row, which is of the best weights"
    assert "(the same)" in fivestep("eval", "mine").out


def test_the_figure_is_stamped_with_its_step(fivestep, tmp_path):  # noqa: F811
    """Each checkpoint's figure is that of its own weights, not of the validation before."""
    (tmp_path / "text.txt").write_text(TEXT)
    wild = ["--learning-rate", "3", "--max-iters", "30", "--eval-every", "5"]  # gets worse after a while
    assert fivestep("train", "bigram", "--data", "text.txt", "--run-dir", "mine", *wild).code == 0
    losses = {row["step"]: row["loss"] for row in read_rows(Path("mine/metrics.jsonl")) if row["split"] == "val"}
    kept = checkpoints(Path("mine/checkpoints"))
    assert kept
    for checkpoint in kept:
        assert checkpoint.val_loss == losses[checkpoint.step]
    last = json.loads(fivestep("eval", "mine", "--weights", "last", "--json").out)
    assert last["step"] == 30
    assert last["loss"] == losses[30]
