"""The same command under torchrun: one speaks and writes, all train; what one began, others go on with."""

import json

import pytest

from fivestep.cli import main
from tests.processes.launched import torchrun

pytestmark = [pytest.mark.multiprocess, pytest.mark.slow]
FLAGS = (
    "--data my.txt --n-embd 16 --n-hidden 16 --n-layer 1 --batch-size 6 --bptt 8 --tokenizer chars --dropout 0 "
    "--eval-every 20 --sample-tokens 20"
)
OPTIONS = FLAGS.split()


def train(size, folder, *options, **environment):
    done = torchrun(
        size, "fivestep", "train", "rnn-words", *OPTIONS, *options, options=["-m"], cwd=folder, **environment
    )
    return done.stdout, done.stderr, done.returncode


def losses(folder):
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [(row["step"], row["split"], row["loss"]) for row in rows if "loss" in row]


def test_one_speaks_and_others_go_on(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my.txt").write_text("the loop, done right once. " * 300)
    said, error, code = train(2, tmp_path, "--max-iters", "40")
    assert code == 0, error
    assert said.count("model: RNN") == 1 and said.count("best weights") == 1
    assert "fivestep sample" in said
    runs = list((tmp_path / "runs").iterdir())
    assert [path.name for path in runs] == ["rnn-words-1"], "all take one number"
    assert main(["train", "rnn-words", *OPTIONS, "--max-iters", "40", "--run-dir", "one"]) is None
    capsys.readouterr()
    assert [row[:2] for row in losses(runs[0])] == [row[:2] for row in losses(tmp_path / "one")]
    for two, one in zip(losses(runs[0]), losses(tmp_path / "one"), strict=True):
        assert two[2] == pytest.approx(one[2], rel=1e-5)

    _, error, code = train(2, tmp_path, "--max-iters", "60", "--run-dir", "one", "--resume", "--parallel", "fsdp")
    assert code == 0, error
    assert losses(tmp_path / "one")[-1][0] == 60


@pytest.mark.parametrize(
    ("option", "sentence"),
    [
        (["--graph", "on", "--parallel", "fsdp"], "gathered while a step is made, which no program does"),
        pytest.param(["--batch-size", "100000"], "--batch-size 100000 columns need", marks=pytest.mark.torture),
    ],
)
def test_what_is_refused_is_told_once_and_by_all(tmp_path, option, sentence):
    (tmp_path / "my.txt").write_text("the loop, done right once. " * 300)
    _, error, code = train(2, tmp_path, "--max-iters", "4", *option)
    assert code == 1, error  # torchrun's own
    assert sentence in error and "exitcode  : 2" in error
    assert "Traceback" not in error.split("torch/distributed/elastic")[0]
    assert not list(tmp_path.glob("runs/*"))
