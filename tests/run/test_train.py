"""`fivestep train` and `fivestep sample`: each recipe, small, and the directory that a run leaves."""

import json
import math
import signal
import tomllib
from pathlib import Path

import pytest
import torch
from torch import nn

import fivestep as fs
from fivestep.data.tokenizer import build_tokenizer
from fivestep.data.windows import CoveringWindows
from fivestep.run.metrics import read_rows
from tests.run.cli import fivestep  # noqa: F401  (a fixture)
from tests.same import assert_same_bits

TEXT = "".join(
    f"{i} and {i * 7 % 13} make {i + i * 7 % 13}, said the {('cat', 'fox', 'owl')[i % 3]}.\n" for i in range(400)
)
SMALL = {
    "bigram": ["--max-iters", "40", "--eval-every", "20"],
    "gpt-chars": ["--max-iters", "6", "--n-layer", "1", "--n-embd", "16", "--n-head", "2", "--eval-every", "3"],
    "rnn-words": ["--epochs", "1", "--n-embd", "8", "--n-hidden", "8", "--n-layer", "1", "--learning-rate", "1"],
    "transformer-words": ["--epochs", "1", "--n-embd", "8", "--n-hidden", "8", "--n-layer", "1"],
}


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text(TEXT)
    return path


@pytest.mark.parametrize("recipe", SMALL)
def test_language_recipes(fivestep, text, recipe):  # noqa: F811
    done = fivestep("train", recipe, "--data", text, *SMALL[recipe], "--sample-tokens", 20, "--test-fraction", 0.1)
    assert done.code == 0, done.err
    run = Path(f"runs/{recipe}-1")
    assert f"run: {run}" in done.out
    assert f"more text: fivestep sample {run}" in done.out
    config = tomllib.loads((run / "config.toml").read_text())
    assert config["data"] == [str(text)]
    environment = json.loads((run / "environment.json").read_text())
    assert environment["versions"]["torch"] == torch.__version__
    rows = read_rows(run / "metrics.jsonl")
    assert [row["split"] for row in rows[-3:]] == ["train", "val", "test"]
    assert all({"step", "epoch", "split", "loss"} <= row.keys() for row in rows)
    assert rows[-1]["perplexity"] == pytest.approx(math.exp(rows[-1]["loss"]))
    assert all(math.isfinite(row["loss"]) for row in rows)
    best = min((row for row in rows if row["split"] == "val"), key=lambda row: row["loss"])
    assert fs.load(run).step == best["step"] == rows[-1]["step"]
    assert len(list((run / "samples").iterdir())) == 1

    again = fivestep("sample", run, "--max-new-tokens", 30, "--seed", 3, "--prompt", "the ")
    assert again.code == 0, again.err
    assert again.out.startswith("the")
    assert again.out == fivestep("sample", run, "--max-new-tokens", 30, "--seed", 3, "--prompt", "the ").out


def test_the_best_weights_reproduce_their_figure(fivestep, text):  # noqa: F811
    assert fivestep("train", "bigram", "--data", text, *SMALL["bigram"]).code == 0
    rows = [row for row in read_rows(Path("runs/bigram-1/metrics.jsonl")) if row["split"] == "val"]
    loaded = fs.load("runs/bigram-1", "best")
    val = loaded.tokenizer.encode(TEXT[int(0.9 * len(TEXT)) :])
    figures = fs.evaluate(loaded.model, CoveringWindows(val, 8, 32), fs.NextToken())
    assert figures["loss"] == min(row["loss"] for row in rows)
    assert figures["count"] == len(val) - 1


def test_the_same_configuration_gives_the_same_weights(fivestep, text):  # noqa: F811
    arguments = ["train", "gpt-chars", "--data", text, *SMALL["gpt-chars"], "--dropout", "0.2"]
    assert fivestep(*arguments).code == 0
    assert fivestep("train", "runs/gpt-chars-1/config.toml").code == 0
    assert fivestep(*arguments, "--seed", "5").code == 0
    first, again, other = (fs.load(f"runs/gpt-chars-{n}", "last").model for n in (1, 2, 3))
    assert_same_bits(first, again)
    assert not torch.equal(first.lm_head.weight, other.lm_head.weight)


def test_accumulation_keeps_the_configured_batch(fivestep, text):  # noqa: F811
    arguments = ["train", "bigram", "--data", text, "--max-iters", "20", "--optimizer", "sgd", "--learning-rate", "1"]
    assert fivestep(*arguments).code == 0
    assert fivestep(*arguments, "--accumulate", "4").code == 0
    one, four = (fs.load(f"runs/bigram-{n}", "last").model for n in (1, 2))
    # Micro-batches of 8 rows are the same rows in the same order: equal up to rounding.
    assert torch.allclose(one.token_embedding_table.weight, four.token_embedding_table.weight, atol=1e-5)


@pytest.mark.parametrize("recipe, figure", [("regression", "loss"), ("digits", "accuracy")])
def test_rows(fivestep, recipe, figure):  # noqa: F811
    if recipe == "digits":
        pytest.importorskip("sklearn", reason="the digits come with scikit-learn")
    done = fivestep("train", recipe)
    assert done.code == 0, done.err
    test = read_rows(Path(f"runs/{recipe}-1/metrics.jsonl"))[-1]
    assert test["split"] == "test"
    if figure == "accuracy":
        assert test["accuracy"] >= 0.97
    else:
        assert test["loss"] < 0.0144, "the noise's variance is 0.01"
    loaded = fs.load(f"runs/{recipe}-1")
    for features, says in (("text", "learned rows, not text"), ([0.0], "torch.as_tensor makes one"),
                           (torch.zeros(2, 9), r"cannot take \[2, 9\] of float32")):  # fmt: skip
        with pytest.raises(fs.UsageError, match=says):
            loaded.predict(features)
    predicted = loaded.predict(torch.zeros(2, 64 if recipe == "digits" else 1))
    assert predicted.shape == (2, 10 if recipe == "digits" else 1)
    assert fivestep("sample", f"runs/{recipe}-1").code == 2


def test_unseen_characters_are_counted(fivestep, tmp_path):  # noqa: F811
    (tmp_path / "odd.txt").write_text(TEXT + "ΩΩΩ")
    done = fivestep("train", "bigram", "--data", "odd.txt", "--max-iters", "2")
    assert done.code == 0, done.err
    assert "3 of them <unk>" in done.out


def test_a_text_without_lines(fivestep, tmp_path):  # noqa: F811
    (tmp_path / "line.txt").write_text(TEXT.replace("\n", " "))
    done = fivestep("train", "bigram", "--data", "line.txt", "--max-iters", "2")
    assert done.code == 0, done.err
    loaded = fs.load("runs/bigram-1")
    with pytest.raises(fs.UsageError, match=r"got 'text': generate\(text\) continues a text"):
        loaded.predict("text")
    ids = torch.tensor(loaded.tokenizer.encode("text"), dtype=torch.long)[None]  # as the sentence says
    assert loaded.predict(ids).shape == (1, 4, loaded.tokenizer.vocab_size)
    assert fivestep("sample", "runs/bigram-1").code == 0


def test_a_prompt_goes_on_in_its_line():
    words = build_tokenizer("words", "the cat sat\n")
    assert words.decode(words.encode_prompt("the cat")) == "the cat"
    assert words.decode(words.encode_prompt("the cat\n")) == "the cat\n"
    assert len(words.encode_prompt("")) == 0


def test_several_files_and_stdin(fivestep, text, monkeypatch):  # noqa: F811
    done = fivestep("train", "bigram", "--data", text, "--data", text, "--max-iters", "2")
    assert done.code == 0, done.err
    assert f"train: {int(0.9 * 2 * len(TEXT)):,} tokens" in done.out


def test_a_run_of_ones_own(tmp_path):
    """fs.Run keeps rows and weights for a user's own model."""
    model = nn.Linear(3, 1)
    batches = [(torch.randn(4, 3), torch.randn(4, 1)) for _ in range(5)]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    with fs.Run(tmp_path / "mine") as run:
        history = fs.fit(model, batches, nn.MSELoss(), optimizer, epochs=3, val=batches, progress=False, run=run)
    assert read_rows(run.metrics) == history
    other = nn.Linear(3, 1)
    assert fs.load_weights(tmp_path / "mine", other, "last") == 15
    assert_same_bits(model, other)
    with pytest.raises(
        fs.UsageError, match=r"was made from Python \(fs.Run\): load its weights with fs.load_weights"
    ):
        fs.load(run.path)
    with fs.Run(run.path) as again:
        assert (
            fs.fit(model, batches, nn.MSELoss(), optimizer, epochs=3, val=batches, progress=False, run=again)
            == history
        )
    assert read_rows(run.metrics) == history, "nothing was left to do"


@pytest.mark.parametrize("presses", [1, 2])
def test_a_run_of_ones_own_is_interrupted(tmp_path, presses):
    """A first Ctrl-C lets the step end; a second stops at once, here before the update. Nothing done is lost."""

    class Pressing(nn.Linear):
        calls = 0

        def forward(self, features):
            self.calls += self.training
            if self.training and self.calls == 7:
                for _ in range(presses):
                    signal.raise_signal(signal.SIGINT)
            return super().forward(features)

    model = Pressing(3, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    data = [(torch.randn(4, 3), torch.randn(4, 1)) for _ in range(9)]
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt), fs.Run(tmp_path / "mine") as run:
        fs.fit(model, data, nn.MSELoss(), optimizer, epochs=1, val=data, eval_every=4, progress=False, run=run)
    assert signal.getsignal(signal.SIGINT) is before
    saved = nn.Linear(3, 1)
    assert fs.load_weights(run.path, saved, "last") == 8 - presses
    assert_same_bits(saved, model)
    rows = read_rows(run.metrics)
    assert rows[-1]["event"] == "interrupted"
    assert sum(row.get("steps", 0) for row in rows) == 8 - presses, "every step is in a training row"


class Halved(torch.optim.SGD):
    """An optimizer that is struck in the middle of an update."""

    def step(self, closure=None):
        with torch.no_grad():
            next(iter(self.param_groups[0]["params"])).zero_()
        raise KeyboardInterrupt


def test_half_updated_weights_are_not_saved(tmp_path):
    model = nn.Linear(3, 1)
    good = torch.optim.SGD(model.parameters(), lr=0.01)
    data = [(torch.randn(4, 3), torch.randn(4, 1)) for _ in range(4)]
    with pytest.raises(KeyboardInterrupt), fs.Run(tmp_path / "mine") as run:
        for result in fs.train(model, data, nn.MSELoss(), good, epochs=1, run=run):
            if result.step == 2:
                good.step = Halved(model.parameters(), lr=0.01).step
    assert result.state.updating
    assert not list(run.checkpoints.glob("step-*"))
    assert read_rows(run.metrics)[-1]["event"] == "interrupted"


@pytest.mark.parametrize("where", ["evaluation", "forward", "another watcher"])
def test_weights_are_saved_under_their_own_step(tmp_path, where):
    """An error after an update and before the run's turn must not label the weights with the step before."""

    class Striking(nn.Linear):
        looks = 0

        def forward(self, features):
            self.looks += 1
            if (where, self.training, self.looks) in (("evaluation", False, 9), ("forward", True, 8)):
                raise RuntimeError("planted")
            return super().forward(features)

    def striking(result, rows):
        if where == "another watcher" and result.step == 7:
            raise RuntimeError("planted")

    model = Striking(3, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    data = [(torch.randn(4, 3), torch.randn(4, 1)) for _ in range(9)]
    with pytest.raises(RuntimeError, match="planted"), fs.Run(tmp_path / "mine") as run:
        fs.fit(
            model,
            data,
            nn.MSELoss(),
            optimizer,
            epochs=1,
            val=data[:1],
            eval_every=8 if where == "evaluation" else 4,
            progress=False,
            watchers=[striking],
            run=run,
        )
    saved = nn.Linear(3, 1)
    step = {"evaluation": 8, "forward": 6, "another watcher": 7}[where]
    assert fs.load_weights(run.path, saved, "last") == step
    assert_same_bits(saved, model)
    assert sum(row.get("steps", 0) for row in read_rows(run.metrics)) == step


def test_a_run_holds_one_training(tmp_path):
    model = nn.Linear(3, 1)
    data = [(torch.randn(4, 3), torch.randn(4, 1)) for _ in range(4)]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    with fs.Run(tmp_path / "mine") as run:
        fs.fit(model, data, nn.MSELoss(), optimizer, epochs=1, progress=False, run=run)
        with pytest.raises(fs.UsageError, match="already holds a training"):
            fs.fit(model, data, nn.MSELoss(), optimizer, epochs=1, progress=False, run=run)


def test_an_error_between_steps_loses_nothing(tmp_path):
    model = nn.Linear(3, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)

    def failing():
        for _ in range(5):
            yield torch.randn(4, 3), torch.randn(4, 1)
        raise OSError("the disk with the data is gone")

    with pytest.raises(OSError, match="gone"), fs.Run(tmp_path / "mine") as run:
        fs.fit(model, failing(), nn.MSELoss(), optimizer, epochs=1, progress=False, run=run)
    assert fs.load_weights(run.path, nn.Linear(3, 1), "last") == 5
    assert "gone" in read_rows(run.metrics)[-1]["message"]


def test_state_that_cannot_be_saved_is_refused_at_the_first_step(tmp_path):
    class Noted(nn.Linear):
        def get_extra_state(self):
            return {"note": "not a tensor"}

        def set_extra_state(self, state):
            pass

    model = Noted(3, 1)
    data = [(torch.randn(4, 3), torch.randn(4, 1))]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    with pytest.raises(fs.UsageError, match="only dense tensors can be saved"), fs.Run(tmp_path / "mine") as run:
        fs.fit(model, data, nn.MSELoss(), optimizer, epochs=1, progress=False, run=run)


def test_two_numbered_runs_never_share_a_directory(tmp_path):
    taken = [fs.Run.numbered("a[b]", tmp_path).path.name for _ in range(3)]
    assert taken == ["a[b]-1", "a[b]-2", "a[b]-3"]


def test_interrupted(fivestep, text, monkeypatch):  # noqa: F811
    """Ctrl-C: the step in hand is finished, its weights are saved, exit 130."""
    from fivestep.run.run import Run

    keep = Run.keep

    def pressing(self, state):
        if state.clock.step == 7:
            signal.raise_signal(signal.SIGINT)
        keep(self, state)

    monkeypatch.setattr(Run, "keep", pressing)
    before = signal.getsignal(signal.SIGINT)
    done = fivestep("train", "bigram", "--data", text, "--max-iters", "1000")
    assert done.code == 130
    assert "step 7 is saved" in done.out
    assert fs.load("runs/bigram-1", "last").step == 7
    assert signal.getsignal(signal.SIGINT) is before


def test_non_finite_stops_with_three(fivestep, text):  # noqa: F811
    wild = ["--cell", "rnn_relu", "--learning-rate", "1e6", "--clip-norm", "0", "--n-embd", "8", "--n-hidden", "8"]
    done = fivestep("train", "rnn-words", "--data", text, *wild, "--bptt", "20", "--batch-size", "4")
    assert done.code == 3
    assert "the update was not applied" in done.err
    rows = read_rows(Path("runs/rnn-words-1/metrics.jsonl"))
    assert rows[-1]["event"] == "nonfinite"
    assert rows[-1]["message"] in done.err
    assert rows[-1]["details"]["step"] == rows[-1]["step"] + 1
    assert rows[-1]["details"]["gradients"]["count"] > 0
    model = fs.load("runs/rnn-words-1", "last").model
    assert all(torch.isfinite(weight).all() for weight in model.parameters())


def test_a_run_that_skips_stops_where_nothing_else_is_left(fivestep, text):  # noqa: F811
    wild = ["--cell", "rnn_relu", "--learning-rate", "1e6", "--clip-norm", "0", "--n-embd", "8", "--n-hidden", "8"]
    skip = ["--bptt", "20", "--batch-size", "4", "--on-nonfinite", "skip"]
    done = fivestep("train", "rnn-words", "--data", text, *wild, *skip)
    assert done.code == 3
    assert read_rows(Path("runs/rnn-words-1/metrics.jsonl"))[-1]["details"]["skipped"]
    assert "ended without a single update" in done.err


def test_an_ignored_ctrl_c_stays_ignored(tmp_path):
    """A job in a shell's background, or under nohup, was told not to hear it."""
    handler = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with fs.Run(tmp_path / "mine"):
            signal.raise_signal(signal.SIGINT)
            assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, handler)
