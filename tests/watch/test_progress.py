"""What is shown: one line a set of rows, titles once, 80 columns, and no bar where there is no terminal."""

import io

import torch
from rich.console import Console
from torch import nn

import fivestep as fs
from fivestep.watch.progress import Progress, clock_time, table_line

TRAIN = {
    "step": 10_000,
    "epoch": 3,
    "split": "train",
    "loss": 2.5,
    "steps": 5,
    "lr": 0.1,
    "grad_norm": 1.0,
    "tokens_per_second": 1_234_567.8,
    "elapsed_seconds": 75.2,
}
VAL = {
    "step": 10_000,
    "epoch": 3,
    "split": "val",
    "loss": 2.25,
    "perplexity": 9.4877,
    "bits_per_char": 3.246,
    "accuracy": 0.9834,
    "elapsed_seconds": 75.2,
}


def test_table_line():
    assert table_line([TRAIN, VAL]) == {
        "step": "10,000",
        "epoch": "3",
        "train": "2.5000",
        "val": "2.2500",
        "perplexity": "9.49",
        "bits/char": "3.2460",
        "accuracy": "98.34%",
        "tokens/s": "1,234,568",
        "time": "1:15",
    }
    assert table_line([{**VAL, "loss": float("nan")}])["val"] == "nan"


def test_titles_once_and_80_columns():
    shown = io.StringIO()
    progress = Progress(10, Console(file=shown, width=80))
    for _ in range(2):
        progress(None, [TRAIN, {key: value for key, value in VAL.items() if key != "accuracy"}])
    progress(None, [])
    progress(None, [{key: value for key, value in TRAIN.items() if key != "tokens_per_second"}])
    progress.close()
    lines = shown.getvalue().splitlines()
    assert len(lines) == 4
    assert lines[3].split() == ["10,000", "3", "2.5000", "1:15"]
    assert len(lines[3]) == len(lines[0]), "what a row lacks stays blank under the same titles"
    assert all(len(line) <= 80 for line in lines)
    assert lines[0].split() == ["step", "epoch", "train", "val", "perplexity", "bits/char", "tokens/s", "time"]


def test_a_bar_on_a_terminal():
    shown = io.StringIO()
    model = nn.Linear(2, 1)
    batches = [(torch.randn(4, 2), torch.randn(4, 1))] * 3
    progress = Progress(6, Console(file=shown, force_terminal=True, width=80))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    fs.fit(model, batches, nn.MSELoss(), optimizer, epochs=2, progress=progress)
    assert "1/6" in shown.getvalue()
    assert "loss" in shown.getvalue()
    assert "\x1b[?25h" in shown.getvalue(), "the cursor is shown again"


def test_times():
    assert [clock_time(seconds) for seconds in (0.4, 59.6, 3600, 3725)] == ["0:00", "1:00", "1:00:00", "1:02:05"]
