"""Shards, URLs and mixtures as a user meets them: made, trained on, gone on with, refused in a sentence."""

import json
import tomllib
from pathlib import Path

import msgspec
import pytest
import torch

from fivestep.data.mixture import Mixture
from fivestep.data.shards import LIST, open_token_source
from fivestep.data.tokens import open_tokens
from fivestep.errors import UsageError
from fivestep.run.build import build_data, resolved
from fivestep.run.config import load_config
from tests.run.cli import fivestep  # noqa: F401

TINY = ("--max-iters", 4, "--sample-tokens", 0, "--device", "cpu", "--eval-every", 2, "--n-embd", 8, "--n-head", 2)
TINY = (*TINY, "--n-layer", 1, "--block-size", 8, "--batch-size", 2, "--threads", 1, "--graph", "off")
TEXTS = {"wiki": "the first text, of words\n", "code": "def f(x):\n    return 2 * x\n"}


@pytest.fixture
def texts(tmp_path):
    for name, line in TEXTS.items():
        (tmp_path / f"{name}.txt").write_text("".join(f"{n} {line}" for n in range(90)), encoding="utf-8")


@pytest.fixture
def made(fivestep, texts):  # noqa: F811
    """wiki.safetensors, and the same in shards; code.safetensors: all of bytes."""
    for name in TEXTS:
        assert (
            fivestep("data", "make", f"{name}.txt", "--tokenizer", "bytes", "--out", f"{name}.safetensors").code == 0
        )
    shown = fivestep("data", "make", "wiki.txt", "--tokenizer", "bytes", "--shard-size", "1kB", "--out", "wiki")
    assert shown.code == 0, shown.err
    return shown


def losses(run):
    rows = [json.loads(line) for line in Path(run, "metrics.jsonl").read_text("utf-8").splitlines()]
    return [(row["step"], row["split"], row["loss"]) for row in rows if "split" in row]


def weights(run):
    return max(Path(run, "checkpoints").glob("step-*")).joinpath("model.safetensors").read_bytes()


def test_make_writes_shards_and_says_so(made):
    lines = made.out.splitlines()
    assert "shards: 3, and their list shards.json" in lines and lines[-2:] == ["train with it: --data wiki", "wiki"]
    assert sorted(path.name for path in Path("wiki").iterdir()) == [
        "shard-00000.safetensors",
        "shard-00001.safetensors",
        "shard-00002.safetensors",
        LIST,
    ]
    one, many = open_tokens(Path("wiki.safetensors")), open_token_source("wiki")
    assert all((many.splits[split][:] == ids).all() for split, ids in one.splits.items())


def test_inspect_and_verify_take_shards(fivestep, made):  # noqa: F811
    one, many = fivestep("data", "inspect", "wiki.safetensors"), fivestep("data", "inspect", "wiki")
    assert many.out == one.out and many.code == 0
    assert fivestep("data", "verify", "wiki").out.startswith(
        "wiki is sound: header, sizes, tokenizer, digest, and all"
    )
    assert fivestep("data", "verify", "wiki/shard-00001.safetensors").code == 0
    path = Path("wiki/shard-00002.safetensors")
    path.write_bytes(path.read_bytes()[:-1] + b"\xff")
    shown = fivestep("data", "verify", "wiki")
    assert shown.code == 2 and "shard-00002.safetensors is damaged" in shown.err


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("--shard-size", "1kB"), "--shard-size needs the name of a new folder: --out FOLDER"),
        (("--shard-size", "many", "--out", "x"), "--shard-size many is no size: give bytes or tokens, as in 256MB"),
        (("--shard-size", "0tok", "--out", "x"), "--shard-size 0tok is no size"),
        (("--shard-size", "0.1B", "--out", "x"), "--shard-size 0.1B is no size"),
        (("--shard-size", "1kB", "--out", "x.safetensors"), "names a file, but shards are a folder"),
        (("--shard-size", "1kB", "--out", "."), "--out . is there already: give the name of a new folder"),
        (("--shard-size", "1kB", "--out", "wiki.txt"), "--out wiki.txt is there already"),
    ],
)
def test_make_refuses(fivestep, texts, arguments, sentence):  # noqa: F811
    before = sorted(Path().iterdir())
    shown = fivestep("data", "make", "wiki.txt", *arguments)
    assert shown.code == 2 and sentence in shown.err and sorted(Path().iterdir()) == before


@pytest.mark.parametrize("recipe", ["gpt-chars", "rnn-words"])
def test_training_on_shards_is_training_on_the_file(fivestep, made, recipe):  # noqa: F811
    options = [one for pair in zip(TINY[::2], TINY[1::2], strict=True) for one in pair]
    if recipe == "rnn-words":
        options = [*(str(one) for one in options), "--n-hidden", "8", "--bptt", "10"]
    sources = {
        "one": "wiki.safetensors",
        "many": "wiki",
        "pattern": "wiki/*.safetensors",
        "url": Path("wiki").absolute().as_uri(),
    }
    for run, source in sources.items():
        shown = fivestep("train", recipe, "--data", source, "--run-dir", run, *options)
        assert shown.code == 0, shown.err
        assert losses(run) == losses("one") and weights(run) == weights("one")
    assert " tokens in 3 shards\n" in shown.out


MIXED = ("--data", "wiki:0.7", "--data", "code.safetensors:0.3")


def test_a_mixture_trains_and_goes_on_where_it_stopped(fivestep, made, monkeypatch):  # noqa: F811
    shown = fivestep("train", "gpt-chars", *MIXED, *TINY, "--run-dir", "whole")
    assert shown.code == 0, shown.err
    assert "data: 0.7 wiki.txt + 0.3 code.txt, bytes, vocabulary 256\n" in shown.out
    count = len(open_token_source("code.safetensors").splits["train"])
    assert f"code.txt, train: {count:,} tokens, passed " in shown.out and "every target once" in shown.out
    cut = (*TINY[:1], 3, *TINY[2:])
    assert fivestep("train", "gpt-chars", *MIXED, *cut, "--run-dir", "cut", "--schedule", "constant").code == 0
    assert fivestep("train", "gpt-chars", *MIXED, *TINY, "--run-dir", "straight", "--schedule", "constant").code == 0
    monkeypatch.chdir("cut")  # the run knows where its data are
    assert fivestep("resume", ".", "--max-iters", "4").code == 0
    monkeypatch.chdir("..")
    assert weights("cut") == weights("straight")
    again = fivestep("train", "whole/config.toml", "--run-dir", "again")
    assert again.code == 0, again.err
    assert weights("again") == weights("whole") and losses("again") == losses("whole")
    shown = fivestep("eval", "whole")
    assert "(the same)" in shown.out, shown.out + shown.err
    targets = sum(len(open_token_source(name).splits["val"]) - 1 for name in ("wiki", "code.safetensors"))
    assert f"{targets:,}" in shown.out
    alone = fivestep("eval", "whole", "--data", "code.safetensors", "--split", "val")
    assert alone.code == 0 and f"{len(open_token_source('code.safetensors').splits['val']) - 1:,}" in alone.out


def test_a_table_of_weights_is_the_same_mixture(made):
    Path("my.toml").write_text('recipe = "gpt-chars"\n[data]\n"wiki" = 0.7\n"code.safetensors" = 0.3\n', "utf-8")
    by_table = load_config("my.toml", {})
    assert by_table.data == [MIXED[1], MIXED[3]]
    assert load_config("my.toml", {"data": ["wiki"]}).data == ["wiki"]  # a flag replaces it whole
    stream = build_data(by_table).train
    assert isinstance(stream, Mixture) and stream.names == ["wiki.txt", "code.txt"]
    written = msgspec.structs.replace(by_table, data=resolved(by_table.data))
    assert tomllib.loads(f"data = {json.dumps(written.data)}")["data"] == [
        f"{Path('wiki').resolve()}:0.7",
        f"{Path('code.safetensors').resolve()}:0.3",
    ]
    batch = next(iter(build_data(written).train))
    assert all(torch.equal(a, b) for a, b in zip(batch, next(iter(stream)), strict=True))


@pytest.mark.parametrize(
    ("sources", "sentence"),
    [
        (["wiki:0.5", "code.safetensors"], "--data code.safetensors has no weight, but others have"),
        (["wiki:0.5", "chars.safetensors:0.5"], "have different tokenizers, and a mixture needs one"),
        (["wiki.txt:1", "code.txt:1"], "have different tokenizers, and a mixture needs one"),
        (["wiki", "code.safetensors"], "must be given alone, or each with a weight (--data A:0.7 --data B:0.3)"),
        (["wiki:0.5", "nothing:0.5"], "--data nothing does not exist"),
        (["wiki/shard-00001.safetensors"], "is one shard of several: give the folder"),
        (["s3://bucket/wiki"], "pip install 'fivestep[remote]' s3fs"),
        (["nothing/*.safetensors"], "no file's name fits it"),
    ],
)
def test_what_cannot_be_read_is_told_and_leaves_no_run(fivestep, made, monkeypatch, sources, sentence):  # noqa: F811
    monkeypatch.setitem(__import__("sys").modules, "s3fs", None)
    assert fivestep("data", "make", "code.txt", "--out", "chars.safetensors").code == 0
    shown = fivestep("train", "gpt-chars", *(word for one in sources for word in ("--data", one)), *TINY)
    assert shown.code == 2 and sentence in shown.err and shown.err.count("\n") == 1, shown.err
    assert not Path("runs").exists()


def test_segments_take_no_mixture_and_a_plain_file_neither(fivestep, made):  # noqa: F811
    shown = fivestep("train", "rnn-words", *MIXED, *TINY[:2])
    assert shown.code == 2 and "reads one text from its beginning to its end, so --data takes no weights" in shown.err
    shown = fivestep("eject", "gpt-chars", *MIXED, "--out", "plain.py")
    assert shown.code == 2 and "a mixture has no one text" in shown.err, shown.err


def test_texts_with_one_tokenizer_are_a_mixture_too(made):
    config = load_config("gpt-chars", {"data": ["wiki.txt:1", "code.txt:2"], "tokenizer": "bytes"})
    data = build_data(config)
    assert isinstance(data.train, Mixture) and data.train.shares[1] == 2 * data.train.shares[0]
    other = build_data(msgspec.structs.replace(config, data=["wiki.txt:1", "code.txt:3"]))
    assert other.digest != data.digest and len(data.digest) == 64


def test_an_id_outside_of_the_vocabulary_stops_the_run_with_the_shard_named(made):
    tokens = open_token_source("wiki")
    ids = tokens.splits["train"]
    ids._limit = 100  # as if the vocabulary were smaller
    with pytest.raises(UsageError, match=r"of --data wiki is damaged: token \d+ of train"):
        ids[:]
