"""`fivestep export`: weights to give away, whole or not there at all."""

import json
import shutil

import pytest
import torch
from safetensors import safe_open
from torch import nn

import fivestep as fs
from fivestep.models.rnn import RNN
from fivestep.run.checkpoint import save_checkpoint
from fivestep.run.export import export
from tests.run.cli import fivestep  # noqa: F401  (a fixture)
from tests.same import assert_same_bits, twins


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained")
    (folder / "my.txt").write_text("".join(f"{i} is {i * 7 % 13}.\n" for i in range(600)))
    from fivestep.run.config import load_config
    from fivestep.run.training import train_run

    flags = {"data": [str(folder / "my.txt")], "max_iters": 20, "eval_every": "10", "run_dir": str(folder / "run")}
    train_run(load_config("bigram", flags))
    return folder / "run"


def refused(outcome, *words):
    assert outcome.code == 2, outcome.out + outcome.err
    assert outcome.err.count("\n") == 1
    assert all(word in outcome.err for word in words), outcome.err


def test_it_is_used_without_the_run(trained, fivestep, tmp_path):  # noqa: F811
    shutil.copytree(trained, "run")
    wanted = fivestep("sample", "run", "--weights", "last", "--max-new-tokens", 40).out
    done = fivestep("export", "run", "--weights", "last", "--out", "deep/given")
    assert done.code == 0, done.err
    assert "deep/given: the last weights, of step 20" in done.out
    shutil.rmtree("run")
    given = tmp_path / "deep/given"
    names = {"model.safetensors", "config.toml", "environment.json", "tokenizer.json", "manifest.json"}
    assert {path.name for path in given.iterdir()} == names
    assert fivestep("sample", given, "--max-new-tokens", 40).out == wanted
    loaded = fs.load(given)
    assert loaded.step == 20
    with safe_open(given / "model.safetensors", "pt") as file:
        assert file.metadata()["step"] == "20" and file.metadata()["weights"] == "last"
        assert all(torch.equal(file.get_tensor(name), loaded.model.state_dict()[name]) for name in file.keys())  # noqa: SIM118


def test_nothing_is_overwritten_and_bad_input_makes_nothing(trained, fivestep, tmp_path):  # noqa: F811
    (tmp_path / "there").mkdir()
    (tmp_path / "there/mine.txt").write_text("mine")
    refused(fivestep("export", trained, "--out", "there"), "is there already", "--out")
    refused(fivestep("export", trained, "--out", "there/mine.txt"), "is there already")
    refused(fivestep("export", trained, "--out", "new", "--weights", "bst"), "'bst' is not one of best, last")
    refused(fivestep("export", "nowhere", "--out", "new"), "nowhere does not exist")
    refused(fivestep("export", tmp_path, "--out", "new"), "holds no checkpoint")
    refused(fivestep("export", trained, "--out", "there/mine.txt/new"), "is no folder")
    assert [path.name for path in tmp_path.iterdir() if path.name != "cache"] == ["there"]
    assert [path.name for path in (tmp_path / "there").iterdir()] == ["mine.txt"]


def test_damage_is_named(trained, fivestep, tmp_path):  # noqa: F811
    shutil.copytree(trained, "run")
    newest = tmp_path / "run/checkpoints/step-00000020/model.safetensors"
    newest.write_bytes(newest.read_bytes()[:-1])
    done = fivestep("export", "run", "--weights", "last", "--out", "given")
    assert "step-00000020/model.safetensors is damaged" in done.err
    assert done.code == 0 and "of step 10" in done.out
    model = tmp_path / "given/model.safetensors"
    model.write_bytes(bytes([*model.read_bytes()[:-1], 1]))
    refused(fivestep("sample", "given"), "model.safetensors is damaged")
    manifest = tmp_path / "given/manifest.json"
    manifest.write_text(manifest.read_text().replace('"step": 10', '"step": 11'))
    refused(fivestep("sample", "given"), "manifest.json is damaged")
    manifest.write_text(json.dumps([1]))
    refused(fivestep("sample", "given"), "manifest.json is damaged")


def test_tied_weights_of_a_run_from_python(tmp_path):
    model, other = twins(RNN(11, 6, 6, 1, dropout=0.0, tied=True))
    nn.init.ones_(model.decoder.bias)
    weights = dict(model.state_dict(keep_vars=True))
    save_checkpoint(tmp_path / "run/checkpoints", weights, {"model": weights}, 7, 0.5)
    export(tmp_path / "run", tmp_path / "given")
    assert fs.load_weights(tmp_path / "given", other) == 7
    assert_same_bits(model, other)
    assert {path.name for path in (tmp_path / "given").iterdir()} == {"model.safetensors", "manifest.json"}
