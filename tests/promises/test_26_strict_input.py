"""PAINS row 26 and the issue of bad input: one sentence, exit code 2, and nothing half-made."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.run.cli import fivestep  # noqa: F401  (a fixture)

TEXT = "the quick brown fox jumps over the lazy dog. " * 40


def bad(outcome, *words):
    assert outcome.code == 2, outcome.out + outcome.err
    assert outcome.err.startswith("fivestep: ")
    assert outcome.err.count("\n") == 1, f"more than one line: {outcome.err}"
    assert "Traceback" not in outcome.err
    for word in words:
        assert word in outcome.err, outcome.err
    assert not Path("runs").exists() or not any(Path("runs").iterdir()), "a half-made run is left"


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["trian"], ["trian", "did you mean 'train'"]),
        (["train", "bigran"], ["bigran", "did you mean 'bigram'"]),
        (["train", "bigram", "--max-iter", "5"], ["--max-iter", "--max-iters"]),
        (["train", "--learning-rte", "5"], ["--learning-rte", "--learning-rate"]),
        (["train", "--model", "gtp"], ["gtp", "did you mean 'gpt'", "--model"]),
        (["train", "--cell", "lsmt", "--model", "rnn"], ["did you mean 'lstm'"]),
        (["train", "--optimizer", "adamx"], ["adam", "--optimizer"]),
        (["train", "--n-layer", "0"], ["--n-layer"]),
        (["train", "--n-layer", "two"], ["--n-layer", "two"]),
        (["train", "--eval-every", "5parsecs"], ["5parsecs", "1ep", "--eval-every"]),
        (["train", "--epochs", "0"], ["--epochs"]),
        (["train", "--max-iters", "0"], ["--max-iters"]),
        (["train", "--data", ""], ["--data is an empty name"]),
        (["train", "--data", "~nosuchuser/x"], ["~nosuchuser/x"]),
        (["train", "--data", "x" * 300], ["not a usable path"]),
        (["train", "x" * 300], ["not a usable path"]),
        (["train", "--run-dir", "x" * 300], ["not a usable path"]),
        (["train", "--seed", "99999999999999999999"], ["--seed"]),
        (["train", "--threads", "100000000"], ["--threads"]),
        (["train", "--batch-size", "1000000000000"], ["--batch-size"]),
        (["train", "--learning-rate", "inf"], ["--learning-rate"]),
        (["train", "--learning-rate", "nan"], ["--learning-rate"]),
        (["train", "--device", "meta"], ["--device"]),
        (["train", "--n-embd", "100000000"], ["--n-embd"]),
        (["train", "bigram", "a.txt"], ["a.txt", "--data once for each file"]),
        (["train", "--until", "soon", "--schedule", "constant"], ["--until", "soon"]),
        (["train", "--n-embd", "30", "--n-head", "4"], ["30", "4", "--n-head"]),
        (["train", "--device", "cuba"], ["cuba", "--device"]),
        (["train", "--accumulate", "5"], ["batch_size = 32", "--accumulate"]),
        (["train", "--val-fraction", "0.7", "--test-fraction", "0.4"], ["0.7", "0.4"]),
        (["train", "regression", "--criterion", "cross-entropy"], ["--criterion", "mse"]),
        (["train", "regression", "--data", "digits2"], ["digits2", "line, digits"]),
        (["train", "bigram", "--data", "line"], ["--model mlp"]),
        (["train", "nowhere.toml"], ["nowhere.toml"]),
        (["sample", "runs/none"], ["runs/none"]),
        (["sample"], ["RUN"]),
    ],
)
def test_arguments(fivestep, arguments, words):  # noqa: F811
    bad(fivestep(*arguments), *words)


@pytest.mark.parametrize(
    "content, words",
    [
        (b"", ["empty", "text.txt"]),
        (b"short", ["text", "--"]),
        (TEXT.encode()[:60], ["--block-size"]),
        (TEXT.encode() + b"\xe9t\xe9", ["offset 1800", "UTF-8", "text.txt"]),
    ],
)
def test_files(fivestep, tmp_path, content, words):  # noqa: F811
    (tmp_path / "text.txt").write_bytes(content)
    bad(fivestep("train", "gpt-chars", "--data", "text.txt", "--max-iters", "2"), *words)


def test_shorter_than_one_segment(fivestep, tmp_path):  # noqa: F811
    (tmp_path / "text.txt").write_text("only a few words here, less than two a column\n" * 2)
    bad(fivestep("train", "rnn-words", "--data", "text.txt", "--epochs", "1"), "--batch-size")


def test_wrong_paths(fivestep, tmp_path, monkeypatch):  # noqa: F811
    (tmp_path / "text.txt").write_text(TEXT)
    bad(fivestep("train", "bigram", "--data", "txet.txt"), "txet.txt", "text.txt")
    bad(fivestep("train", "bigram", "--data", "pyton-manual"), "python-manual")
    (tmp_path / "empty").mkdir()
    bad(fivestep("train", "bigram", "--data", "empty"), "empty")
    # chmod does not stop root: the refusal is injected.
    opening = Path.open

    def denied(self, *arguments, **options):
        if self.name == "text.txt":
            raise PermissionError(13, "Permission denied")
        return opening(self, *arguments, **options)

    monkeypatch.setattr(Path, "open", denied)
    bad(fivestep("train", "bigram", "--data", "text.txt"), "text.txt", "ermission")


def test_a_directory_that_holds_a_run(fivestep, tmp_path):  # noqa: F811
    (tmp_path / "text.txt").write_text(TEXT)
    arguments = ["train", "bigram", "--data", "text.txt", "--max-iters", "2", "--run-dir", "mine"]
    assert fivestep(*arguments).code == 0
    before = {path: path.read_bytes() for path in Path("mine").rglob("*") if path.is_file()}
    bad(fivestep(*arguments), "mine already holds a run", "--run-dir")
    assert before == {path: path.read_bytes() for path in Path("mine").rglob("*") if path.is_file()}
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.tex").write_text("mine")
    bad(fivestep(*arguments[:-1], "other"), "other", "--run-dir")
    assert (tmp_path / "other" / "thesis.tex").read_text() == "mine"
    bad(fivestep(*arguments[:-1], "text.txt"), "text.txt", "--run-dir")


def test_a_first_step_that_is_refused_takes_its_directory_along(fivestep, tmp_path, monkeypatch):  # noqa: F811
    import fivestep.run.build as build
    from fivestep.models.mlp import MLP

    (tmp_path / "text.txt").write_text(TEXT)
    monkeypatch.setattr(build, "MLP", lambda sizes, **_: MLP([*sizes[:-1], 3]))
    outcome = fivestep("train", "regression")
    bad(outcome, "[32, 3] with targets [32, 1]")
    assert "Traceback" not in outcome.out


@pytest.mark.parametrize(
    "text, words",
    [
        ("recipe = 5", ["recipe = '5'", "bigram, digits"]),
        ('recipe = "bigran"', ["did you mean 'bigram'"]),
        ('data = ["a\\u0000b"]\nmax_iters = 2', ["not a usable path"]),
        ("data = " + "[" * 5000, ["not valid TOML"]),
        ("[model]\nname = 1", ["model"]),
        ("max_iters = 1979-05-27", ["--max-iters"]),
        ("learnin_rate = 1", ["did you mean 'learning_rate'"]),
    ],
)
def test_files_of_options(fivestep, tmp_path, text, words):  # noqa: F811
    (tmp_path / "mine.toml").write_text(text)
    bad(fivestep("train", "mine.toml"), *words)


def test_no_arguments_say_what_to_do(fivestep):  # noqa: F811
    outcome = fivestep()
    assert outcome.code == 2
    assert "fivestep train" in outcome.out


def test_debug_shows_the_traceback(fivestep):  # noqa: F811
    from fivestep import UsageError

    with pytest.raises(UsageError):
        fivestep("train", "bigran", "--debug")


@pytest.mark.multiprocess
def test_help_does_not_import_torch():
    code = "import sys, fivestep.cli as c\ntry: c.main(['train', '--help'])\nexcept SystemExit: pass\n"
    code += "assert 'torch' not in sys.modules and 'numpy' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ})
    assert done.returncode == 0, done.stderr
    assert "--learning-rate" in done.stdout
