"""Weights on disk: whole or not there, last and best kept, damage named."""

import json

import pytest
import torch
from torch import nn

import fivestep as fs
from fivestep.models.rnn import RNN
from fivestep.run.checkpoint import check_saveable, checkpoints, find, load_checkpoint, prune
from fivestep.run.checkpoint import save_checkpoint as save_state
from fivestep.run.saving import Saver
from tests.same import assert_same_bits, twins


def save_checkpoint(folder, model, step, val_loss):
    """The weights, as a training without averages saves them."""
    weights = dict(model.state_dict(keep_vars=True))  # tied weights are one tensor
    return save_state(folder, weights, {"model": weights}, step, val_loss)


def steps(folder):
    return [one.step for one in checkpoints(folder)]


def test_last_and_best_are_kept(tmp_path):
    model = nn.Linear(2, 2)
    for step, loss in ((1, 3.0), (2, 1.0), (3, 2.0), (4, float("nan")), (5, None)):
        save_checkpoint(tmp_path, model, step, loss)
        prune(tmp_path, Saver(tmp_path, 1, None).kept)
    assert steps(tmp_path) == [2, 5]
    assert find(tmp_path, "best").step == 2
    assert find(tmp_path, "last").step == 5
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


@pytest.mark.parametrize("tied", [False, True])
def test_round_trip(tmp_path, tied):
    model, other = twins(RNN(11, 6, 6, 1, dropout=0.0, tied=tied))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1.0)
    save_checkpoint(tmp_path, model, 7, 0.5)
    load_checkpoint(find(tmp_path, "last"), other)
    assert_same_bits(model, other)
    assert (other.encoder.weight is other.decoder.weight) == tied
    size = (tmp_path / "step-00000007" / "model.safetensors").stat().st_size
    assert size < 4 * sum(p.numel() for p in model.parameters()) + 2000, "tied weights are stored once"


def test_damage_is_named(tmp_path):
    model = nn.Linear(2, 2)
    path = save_checkpoint(tmp_path, model, 1, 1.0) / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(fs.UsageError, match=r"model\.safetensors is damaged"):
        load_checkpoint(find(tmp_path, "last"), model)


def test_another_models_weights(tmp_path):
    save_checkpoint(tmp_path, nn.Linear(2, 2), 1, 1.0)
    with pytest.raises(fs.UsageError, match="does not fit the model"):
        load_checkpoint(find(tmp_path, "last"), nn.Linear(3, 2))


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", '{"format": "fivestep-checkpoint", "version": 99}'])
def test_a_directory_without_a_sound_manifest_is_no_checkpoint(tmp_path, content):
    save_checkpoint(tmp_path, nn.Linear(2, 2), 1, 1.0)
    (tmp_path / "step-00000009").mkdir()
    (tmp_path / "step-00000009" / "manifest.json").write_text(content)
    assert steps(tmp_path) == [1]


def test_a_failed_save_leaves_the_old_one(tmp_path, monkeypatch):
    import fivestep.run.checkpoint as module

    save_checkpoint(tmp_path, nn.Linear(2, 2), 1, 1.0)

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(module, "_safetensors", full)
    with pytest.raises(fs.FivestepError, match=r"cannot save .*No space left.*earlier checkpoints are as they were"):
        save_checkpoint(tmp_path, nn.Linear(2, 2), 2, 0.5)
    assert steps(tmp_path) == [1]
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000001"]
    load_checkpoint(find(tmp_path, "best"), nn.Linear(2, 2))


def test_what_a_killed_save_left_is_removed(tmp_path):
    left = tmp_path / "checkpoints" / ".step-00000009.part"
    left.mkdir(parents=True)
    (left / "model.safetensors").write_bytes(b"half")
    (tmp_path / "metrics.jsonl").touch()
    with fs.Run(tmp_path) as run:
        assert list(run.checkpoints.iterdir()) == []


def test_the_manifest_names_every_file(tmp_path):
    path = save_checkpoint(tmp_path, nn.Linear(2, 2), 3, 0.25)
    manifest = json.loads((path / "manifest.json").read_text())
    assert manifest["step"] == 3
    assert manifest["val_loss"] == 0.25
    assert set(manifest["files"]) == {p.name for p in path.iterdir()} - {"manifest.json"}


def test_views_and_shared_buffers(tmp_path):
    class Odd(nn.Linear):
        def __init__(self):
            super().__init__(2, 2)
            table = torch.arange(6.0)
            self.register_buffer("left", table[:3])
            self.register_buffer("right", table[3:])
            self.register_buffer("turned", torch.arange(6.0).view(2, 3).t())

    model = Odd()
    check_saveable(model)
    save_checkpoint(tmp_path, model, 1, None)
    other = Odd()
    other.left.zero_()
    other.turned.zero_()
    load_checkpoint(find(tmp_path, "last"), other)
    assert_same_bits(model, other)


def test_sparse_state_is_refused_before_the_first_save():
    model = nn.Linear(2, 2)
    model.register_buffer("table", torch.eye(3).to_sparse())
    with pytest.raises(fs.UsageError, match="'table' is torch.sparse_coo; only dense tensors"):
        check_saveable(model)


def test_an_expanded_buffer_is_refused_before_the_first_save():
    model = nn.Linear(2, 2)
    model.register_buffer("wide", torch.ones(1).expand(5))
    with pytest.raises(fs.UsageError, match=r"'wide' is expanded.*\.clone\(\)"):
        check_saveable(model)
