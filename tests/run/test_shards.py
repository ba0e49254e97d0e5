"""A run whose checkpoints are in shards is read by every command as any other."""

import json
import shutil

import pytest
import torch

from fivestep import processes
from fivestep.run import checkpoint
from fivestep.run.checkpoint import checkpoints, load_state, save_shards
from fivestep.run.shards import Piece, Snapshot
from fivestep.run.tree import flattened
from tests.run.cli import fivestep  # noqa: F401  (a fixture)
from tests.same import assert_same_tree

SMALL = ["--n-layer", 2, "--n-embd", 16, "--n-head", 2, "--block-size", 16, "--batch-size", 8, "--data", "my.txt"]


def cut(tree, part, of):
    """What the process `part` of `of` would have of a tree: rows of each matrix, as FSDP2 cuts them."""
    encoded, tensors = flattened(tree)
    pieces = {}
    for name, tensor in tensors.items():
        if tensor.ndim < 2 or tensor.dtype != torch.float32:
            if part == 0:
                pieces[name] = Piece(tensor, [0] * tensor.ndim)
            continue
        each = -(-len(tensor) // of)
        begin = min(part * each, len(tensor))
        pieces[name] = Piece(tensor[begin : begin + each], [begin] + [0] * (tensor.ndim - 1))
    return Snapshot(encoded, pieces)


def in_shards(folder, of, monkeypatch):
    """Write the newest checkpoint in `folder` anew, as `of` processes do, and remove the others."""
    newest = checkpoints(folder)[-1]
    state = load_state(newest)
    weights, rest = state["model"], {**state, "model": None}
    for path in folder.iterdir():
        shutil.rmtree(path)
    monkeypatch.setattr(processes, "size", lambda: of)
    told = []
    for rank in range(1, of):  # what they write is there before the first one has its turn
        monkeypatch.setattr(processes, "rank", lambda rank=rank: rank)
        (folder / "others").mkdir(exist_ok=True)
        told.append((checkpoint._written_parts(folder / "others", cut(weights, rank, of), cut(rest, rank, of)), None))
    monkeypatch.setattr(processes, "rank", lambda: 0)
    begun = checkpoint._begun

    def filled(*given):
        name = begun(*given)
        for path in (folder / "others").iterdir():
            path.rename(folder / f".{name}.part" / path.name)
        (folder / "others").rmdir()
        return name

    monkeypatch.setattr(checkpoint, "_begun", filled)
    first = [cut(weights, 0, of), cut(rest, 0, of)]

    def tell(value):
        written = isinstance(value, tuple) and isinstance(value[0], dict)
        return json.loads(json.dumps([value, *told] if written else [value]))

    save_shards(folder, *first, newest.step, newest.val_loss, lambda: None, tell)
    monkeypatch.undo()
    return state


def test_every_command_reads_them(fivestep, tmp_path, monkeypatch):  # noqa: F811
    cache = tmp_path / "cache"
    monkeypatch.setenv("FIVESTEP_CACHE", str(cache))
    (tmp_path / "my.txt").write_text("".join(f"{i} is {i * 7 % 13}, said the {i % 5}. " for i in range(900)))
    options = ["--max-iters", 20, "--eval-every", 10, "--sample-tokens", 20, "--run-dir", "run"]
    assert fivestep("train", "gpt-chars", *SMALL, *options).code == 0
    shutil.copytree("run", "plain")
    scored, written = fivestep("eval", "run", "--json").out, fivestep("sample", "run", "--max-new-tokens", 30).out
    whole = in_shards(tmp_path / "run/checkpoints", 3, monkeypatch)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("FIVESTEP_CACHE", str(cache))
    newest = checkpoints(tmp_path / "run/checkpoints")[-1]
    assert newest.of("model.safetensors") == [f"model-0000{n}-of-00003.safetensors" for n in (1, 2, 3)]
    assert_same_tree(load_state(newest), whole)

    assert fivestep("eval", "run", "--json").out == scored
    assert fivestep("sample", "run", "--max-new-tokens", 30).out == written
    assert "gradients" in fivestep("explain", "run").out
    assert "they do not part" in fivestep("compare", "--exact", "run", "plain").out
    assert fivestep("export", "run", "--out", "given").code == 0
    assert fivestep("sample", "given", "--max-new-tokens", 30).out == written
    for name in ("run", "plain"):
        assert fivestep("resume", name, "--max-iters", 30).code == 0
    ours, theirs = (load_state(checkpoints(tmp_path / name / "checkpoints")[-1]) for name in ("run", "plain"))
    assert_same_tree(ours["model"], theirs["model"])


@pytest.mark.parametrize("lost", ["model-00002-of-00003.safetensors", "state-00003-of-00003.safetensors"])
def test_a_part_that_is_damaged_or_lost_is_named(fivestep, tmp_path, monkeypatch, lost):  # noqa: F811
    (tmp_path / "my.txt").write_text("one two three. " * 300)
    assert fivestep("train", "bigram", "--data", "my.txt", "--max-iters", 4, "--run-dir", "run").code == 0
    in_shards(tmp_path / "run/checkpoints", 3, monkeypatch)
    monkeypatch.chdir(tmp_path)
    file = next((tmp_path / "run/checkpoints").glob(f"*/{lost}"))
    content = file.read_bytes()
    file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    done = fivestep("resume", "run", "--max-iters", 6)
    assert done.code == 2 and f"{lost} is damaged" in done.err + done.out
    file.unlink()
    done = fivestep("resume", "run", "--max-iters", 6)
    assert done.code == 2 and f"{lost} cannot be read" in done.err + done.out
