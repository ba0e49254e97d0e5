"""Options of a run that change how it learns: each arrives where it should, from the command line."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import fivestep as fs
from fivestep.loop import step
from fivestep.run import build
from fivestep.run.build import build_job
from fivestep.run.config import load_config
from fivestep.run.metrics import read_rows
from tests.run.cli import fivestep  # noqa: F401  (a fixture)
from tests.run.test_train import SMALL, text  # noqa: F401  (a fixture)

GPT_SMALL = [flag for flag in SMALL["gpt-chars"] if flag not in ("--max-iters", "6", "--eval-every", "3")]


def test_everything_at_once_on_windows(fivestep, text):  # noqa: F811
    flags = [*GPT_SMALL, "--max-iters", 20, "--eval-every", 5, "--sample-tokens", 5, "--batch-size", 4]
    flags += ["--optimizer", "muon", "--muon-learning-rate", 0.01, "--ema", 0.5, "--label-smoothing", 0.1]
    flags += ["--schedule", "wsd", "--warmup-iters", 2, "--decay-iters", 5, "--freeze", "token_embedding_table*"]
    done = fivestep("train", "gpt-chars", "--data", text, *flags)
    assert done.code == 0, done.err
    assert "frozen: " in done.out
    rows = read_rows(Path("runs/gpt-chars-1/metrics.jsonl"))
    rates = {row["step"]: row["lr"] for row in rows if row["split"] == "train"}
    assert rates[10] == 0.01  # of the first group: Muon's
    assert rates[20] < 0.01
    assert all("perplexity" not in row for row in rows if row["split"] == "train")
    best = min((row for row in rows if row["split"] == "val"), key=lambda row: row["loss"])
    assert best["perplexity"] > 1
    assert fs.load("runs/gpt-chars-1").step == best["step"]


def test_everything_at_once_on_segments(fivestep, text):  # noqa: F811
    flags = ["--epochs", 40, "--n-embd", 8, "--n-hidden", 8, "--n-layer", 1, "--learning-rate", 500]
    flags += ["--variable-bptt", "--anneal", 4, "--early-stop", 2, "--to-best", "--sample-tokens", 5]
    done = fivestep("train", "rnn-words", "--data", text, *flags)
    assert done.code == 0, done.err
    rows = read_rows(Path("runs/rnn-words-1/metrics.jsonl"))
    events = [row["event"] for row in rows if "event" in row]
    assert "annealed" in events
    assert events[-1] == "stopped early"
    assert "annealed: the learning rate is multiplied by 0.25 from here on" in done.out
    assert "stopped early: validation has stopped improving" in done.out
    assert rows[-1]["epoch"] < 40


def test_overfitting_a_few_batches(fivestep, text):  # noqa: F811
    flags = [*GPT_SMALL, "--max-iters", 150, "--eval-every", 150, "--sample-tokens", 0, "--batch-size", 4]
    done = fivestep("train", "gpt-chars", "--data", text, *flags, "--overfit-batches", 1, "--n-embd", 64)
    assert done.code == 0, done.err
    assert "the first 1 batches are all there is" in done.out
    last = read_rows(Path("runs/gpt-chars-1/metrics.jsonl"))[-1]
    assert last["split"] == "val"
    assert last["count"] == 4 * 64
    assert last["loss"] < 0.5  # it learned that batch by heart


def test_the_same_batches_every_epoch():
    job = build_job(load_config("digits", {"overfit_batches": 2}))
    first, again = (list(job.data.train.epoch(epoch)) for epoch in (0, 5))
    assert len(first) == len(job.data.train) == 2
    assert all(torch.equal(a[0], b[0]) for a, b in zip(first, again, strict=True))
    assert torch.equal(next(job.data.train.epoch(3, 1))[0], first[1][0])


@pytest.mark.parametrize(
    "flags, match",
    [
        (["--precision", "fp16", "--device", "cpu"], "needs a GPU"),
        (["--anneal", "0.5"], "anneal = 0.5 must be above 1"),
        (["--early-stop", "0"], "--early-stop"),
        (["--to-best"], "to_best"),
        (["--variable-bptt"], "--variable-bptt"),
        (["--freeze", "nothing*"], "matches no parameter"),
        (["--freeze", "*"], "all of which are frozen"),
        (["--freeze", "*", "--optimizer", "adamw"], "left to train"),
        (["--overfit-batches", "100000"], "--overfit-batches"),
        (["--schedule", "wsd", "--decay-iters", "90000"], "--decay-iters"),
        (["--ema", "1"], "--ema"),
    ],
)
def test_refused(fivestep, text, flags, match):  # noqa: F811
    done = fivestep("train", "gpt-chars", "--data", text, *GPT_SMALL, "--max-iters", 200, *flags)
    assert done.code == 2, done.out + done.err
    assert match in done.err
    assert not Path("runs").exists() or not any(Path("runs").iterdir())


def test_muon_needs_matrices(fivestep, text):  # noqa: F811
    done = fivestep("train", "bigram", "--data", text, "--optimizer", "muon")
    assert (done.code, json.dumps(done.err).count("--optimizer adamw")) == (2, 1)


def test_a_model_that_cannot_fit_is_refused_at_once(fivestep, text):  # noqa: F811
    done = fivestep("train", "gpt-chars", "--data", text, "--n-embd", 100_000_000)
    assert done.code == 2
    assert "GB are free; lower --n-embd" in done.err
    assert not Path("runs").exists()


def test_graph_auto_says_what_it_decided_to_whoever_asks(fivestep):  # noqa: F811
    short = ("train", "bigram", "--max-iters", 1, "--sample-tokens", 0)
    asked, silent = fivestep(*short, "--graph", "auto"), fivestep(*short)
    assert asked.code == silent.code == 0, asked.err + silent.err
    assert (
        "graph: the step runs eagerly. auto compiles it only on the CPU, for at most 50,000 parameters" in asked.out
    )
    assert "graph:" not in silent.out


@pytest.mark.parametrize(
    ("options", "parameters", "device", "compiles"),
    [
        ({}, 10_609, "cpu", False),
        ({"max_iters": build.LONG}, 10_609, "cpu", True),
        ({"max_iters": build.LONG}, build.SMALL + 1, "cpu", False),
        ({"max_iters": build.LONG}, 10_609, "cuda", False),
        ({"max_iters": build.LONG, "parallel": "ddp"}, 10_609, "cpu", False),
        ({"graph": "on"}, 10_609, "cpu", True),
        ({"max_iters": build.LONG, "graph": "off"}, 10_609, "cpu", False),
    ],
)
def test_graph_auto_compiles_for_long_runs_of_small_models(options, parameters, device, compiles):
    assert build.takes_graph(load_config("bigram", options), parameters, device) is compiles


def test_later_runs_of_a_small_model_are_said_to_be_faster_where_they_are():
    def notes(**options):
        config = load_config("bigram", {"data": ["my.txt"], **options})
        job = SimpleNamespace(model=torch.nn.Embedding(65, 65), device=torch.device("cpu"))
        return build.graph_notes(config, job, asked=False)

    assert len(notes()) == 1 and notes()[0].startswith("graph: --graph on makes later runs of this job faster")
    assert notes(max_iters=100) == notes(graph="off") == notes(max_iters=build.LONG) == []


def test_a_resume_keeps_what_graph_auto_decided_at_first(fivestep, text, monkeypatch):  # noqa: F811
    """With more steps `auto` would compile, and end with other bits than the uninterrupted run."""
    short = ("train", "bigram", "--data", text, "--sample-tokens", 0, "--run-dir", "r")
    kept = Path("r/config.toml")
    assert fivestep(*short, "--max-iters", 3).code == 0
    assert 'graph = "off"' in kept.read_text()
    monkeypatch.setattr(build, "LONG", 4)
    monkeypatch.setattr(step, "graph_of", None)  # a compiled step would call it
    for more in (("resume", "r", "--max-iters", 5), (*short, "--max-iters", 6, "--resume")):
        done = fivestep(*more)
        assert done.code == 0, done.err
    assert 'graph = "off"' in kept.read_text()


def test_a_resume_compiles_where_the_first_start_did(fivestep, text, monkeypatch):  # noqa: F811
    graphs = []
    monkeypatch.setattr(step, "graph_of", lambda *_: graphs.append(1))
    monkeypatch.setattr(build, "LONG", 3)
    short = ("train", "bigram", "--data", text, "--sample-tokens", 0, "--run-dir", "r")
    assert fivestep(*short, "--max-iters", 3).code == 0
    assert graphs == [1] and 'graph = "on"' in Path("r/config.toml").read_text()
    monkeypatch.setattr(build, "LONG", 100)
    for more in (("resume", "r", "--max-iters", 5), (*short, "--max-iters", 6, "--resume")):
        done = fivestep(*more)
        assert done.code == 0, done.err
    assert graphs == [1, 1, 1]
    refused = fivestep(*short, "--max-iters", 7, "--resume", "--graph", "off")
    assert refused.code == 2 and "graph = 'off', but the run in r started with 'on'" in refused.err
