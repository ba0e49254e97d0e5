"""Shards read as the single file does, and say in a sentence what is wrong with them."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from fivestep.data import shards as module
from fivestep.data.corpus import load_corpus
from fivestep.data.preparation import fitted, write_corpus
from fivestep.data.segments import CoveringSegments, Segments
from fivestep.data.shards import (
    LIST,
    NAME,
    ShardedIds,
    is_token_source,
    open_token_source,
    read_list,
    shard_writer,
    verify_token_source,
)
from fivestep.data.tokens import open_tokens, verify_tokens, write_tokens
from fivestep.data.windows import CoveringWindows, Windows
from fivestep.errors import UsageError

LENGTHS = {"train": 1003, "val": 97, "test": 5}


def ids_of(dtype=np.uint16, lengths=LENGTHS):
    random = np.random.default_rng(0)
    return {split: random.integers(0, 200, length).astype(dtype) for split, length in lengths.items()}


def write(folder, splits, most=100, metadata=None, piece=37):
    """Shards of `splits`, given in pieces as a preparation gives them."""
    dtype = next(iter(splits.values())).dtype
    with shard_writer(folder, tuple(splits), dtype, metadata or {"source": "abc", "name": "text"}, most) as writer:
        for split, ids in splits.items():
            for at in range(0, len(ids), piece):
                for part in writer.parts(ids[at : at + piece]):
                    writer.add(split, part, unknown=int((part == 7).sum()))
    return folder


@pytest.fixture
def folder(tmp_path):
    return write(tmp_path / "wiki", ids_of())


def equal(one, other):
    assert len(one) == len(other)
    for a, b in zip(one, other, strict=True):
        assert all(
            x.dtype == y.dtype == torch.int64 and x.is_contiguous() and y.is_contiguous() and torch.equal(x, y)
            for x, y in zip(a, b, strict=True)
        )


STREAMS = {
    "windows": lambda ids: Windows(ids, 16, 5, seed=3),
    "replacement": lambda ids: Windows(ids, 16, 5, seed=3, replacement=True),
    "covering windows": lambda ids: CoveringWindows(ids, 16, 5),
    "segments": lambda ids: Segments(ids, 4, 10),
    "variable": lambda ids: Segments(ids, 4, 10, variable=True, seed=3),
    "covering segments": lambda ids: CoveringSegments(ids, 7, 10),
}


@pytest.mark.parametrize(("most", "length"), [(1, 131), (7, 303), (100, 1003), (10_000, 1003)])
@pytest.mark.parametrize("name", STREAMS)
def test_batches_are_those_of_the_single_file_from_every_position(tmp_path, name, most, length):
    splits = ids_of(lengths={"train": length, "val": 20})
    write_tokens(tmp_path / "one.safetensors", splits, {})
    single = STREAMS[name](open_tokens(tmp_path / "one.safetensors").splits["train"])
    sharded = STREAMS[name](open_token_source(str(write(tmp_path / "many", splits, most))).splits["train"])
    for epoch in (0, 2):
        whole = list(single.epoch(epoch))
        equal(list(sharded.epoch(epoch)), whole)
        for start in range(len(whole) + 1):
            equal(list(sharded.epoch(epoch, start))[:2], whole[start : start + 2])
            equal(list(single.epoch(epoch, start))[:2], whole[start : start + 2])


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.int32])
@pytest.mark.parametrize("most", [13, 64, 100, 1105])
def test_slices_items_and_indices_are_those_of_one_array(tmp_path, dtype, most):
    plain, tokens = ids_of(dtype), open_token_source(str(write(tmp_path / "wiki", ids_of(dtype), most)))
    assert tokens.dtype == dtype and list(tokens.splits) == list(LENGTHS)
    for split, ids in plain.items():
        found = tokens.splits[split]
        assert (len(found), found.nbytes, found.dtype) == (len(ids), ids.nbytes, dtype)
        assert np.array_equal(np.asarray(found), ids) and np.asarray(found).dtype == dtype
        for i, j in [(0, 0), (0, 5), (3, 101), (95, 105), (len(ids) - 3, None), (-7, -2), (50, 10), (0, 10**9)]:
            assert np.array_equal(found[i:j], ids[i:j])
        assert np.array_equal(found[1:90:7], ids[1:90:7])
        assert [found[i] for i in (0, 4, -1)] == [ids[i] for i in (0, 4, -1)]
        at = np.array([[0, len(ids) - 1, 3], [4, 4, 0]])
        assert np.array_equal(found.take(at), ids.take(at))
        for bad in (len(ids), -1):
            with pytest.raises(IndexError, match=str(len(ids))):
                found.take(np.array([0, bad]))
        with pytest.raises(IndexError):
            found[len(ids)]


def test_a_split_may_be_empty(tmp_path):
    found = open_token_source(str(write(tmp_path / "w", ids_of(lengths={"train": 9, "test": 0}), 4))).splits["test"]
    assert len(found) == 0 and found[:].size == 0


def test_each_shard_is_a_sound_token_file_that_says_its_place(folder):
    files = sorted(folder.glob("*.safetensors"))
    assert [file.name for file in files] == [NAME.format(n) for n in range(12)]
    assert sorted(file.name for file in folder.iterdir()) == [*(file.name for file in files), LIST]
    reached = dict.fromkeys(LENGTHS, 0)
    for number, file in enumerate(files):
        tokens = verify_tokens(file)
        place = json.loads(tokens.metadata["shard"])
        assert (place["number"], place["begins"], place["last"]) == (number, reached, number == 11)
        for split, ids in tokens.splits.items():
            assert np.array_equal(ids, ids_of()[split][reached[split] : reached[split] + len(ids)])
            reached[split] += len(ids)
    assert reached == LENGTHS


def test_a_preparation_gives_the_ids_of_the_single_file(tmp_path):
    (tmp_path / "text.txt").write_text("one word and another\n" * 300 + "the end")
    corpus = load_corpus(str(tmp_path / "text.txt"))
    tokenizer = fitted(corpus, "words", min_count=2)
    one = write_corpus(tmp_path / "one.safetensors", corpus, tokenizer)
    many = write_corpus(tmp_path / "many", corpus, tokenizer, shard_tokens=101)
    assert many.tokenizer.fingerprint == one.tokenizer.fingerprint and many.unknown == one.unknown != {}
    for split, ids in one.splits.items():
        assert isinstance(many.splits[split], ShardedIds) and np.array_equal(many.splits[split][:], ids)
    again = write_corpus(tmp_path / "again", corpus, tokenizer, shard_tokens=101)
    for file in sorted((tmp_path / "many").iterdir()):
        assert file.read_bytes() == (tmp_path / "again" / file.name).read_bytes()
    assert len(again.splits["train"]) == len(one.splits["train"])


def test_a_shard_is_opened_when_it_is_first_touched_and_few_are_mapped(folder, monkeypatch):
    opened = []
    monkeypatch.setattr(module, "open_tokens", lambda path: opened.append(path.name) or open_tokens(path))
    ids = open_token_source(str(folder)).splits["train"]
    assert opened == []
    assert ids[250:350].size == 100 and opened == [NAME.format(2), NAME.format(3)]
    ids.maps.most_open = 3
    before = len(list(Path("/proc/self/fd").iterdir())) if Path("/proc/self/fd").exists() else None
    for _ in range(3):
        ids[:]
    assert len(ids.maps._open) == 3 and len(opened) == 11  # each looked at once, though mapped again
    assert before is None or len(list(Path("/proc/self/fd").iterdir())) <= before + 1


def test_what_is_read_is_a_copy(folder):
    ids = open_token_source(str(folder)).splits["train"]
    ids[:5][:] = 0
    assert np.array_equal(ids[:5], ids_of()["train"][:5])


# --- what --data may name ---


def test_a_folder_its_list_a_pattern_and_a_file_url_are_the_same(folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (folder / "notes.txt").write_text("of no concern")
    named = ["wiki", f"wiki/{LIST}", "wiki/*.safetensors", f"{folder}/shard-*.safetensors", folder.as_uri()]
    for source in named:
        assert is_token_source(source)
        tokens = open_token_source(source)
        assert np.array_equal(tokens.splits["val"][:], ids_of()["val"])
        assert tokens.metadata["source"] == "abc" and tokens.unknown == open_token_source("wiki").unknown
    (folder / LIST).unlink()
    assert is_token_source("wiki") and np.array_equal(open_token_source("wiki").splits["train"][:], ids_of()["train"])
    for other in ("text.txt", "folder", "*.txt", "python-manual"):
        assert not is_token_source(other)


def test_a_shard_alone_and_files_that_are_no_shards_are_told(folder, tmp_path):
    with pytest.raises(UsageError, match="is one shard of several: give the folder"):
        open_token_source(str(folder / NAME.format(3)))
    write_tokens(tmp_path / "a.safetensors", ids_of(), {})
    with pytest.raises(UsageError, match="is a whole token file, no shard: give it alone, or several with weights"):
        open_token_source(str(tmp_path / "*.safetensors"))
    with pytest.raises(UsageError, match=r"no file's name fits"):
        open_token_source(str(tmp_path / "b*.safetensors"))


def rename(folder, old, new):
    (folder / NAME.format(old)).rename(folder / new)


def test_missing_shards_are_named_before_anything_is_read(folder):
    (folder / NAME.format(3)).unlink()
    with pytest.raises(UsageError, match=r"lacks shard-00003.safetensors, of 12 shards"):
        open_token_source(str(folder))
    with pytest.raises(UsageError, match=r"is not whole: shard-00003.safetensors missing"):
        open_token_source(str(folder / "*.safetensors"))
    (folder / NAME.format(11)).unlink()
    (folder / LIST).unlink()
    with pytest.raises(UsageError, match=r"shard-00003.safetensors, shard-00011.safetensors missing"):
        open_token_source(str(folder))


def test_a_shard_of_another_size_is_named(folder):
    path = folder / NAME.format(4)
    path.write_bytes(path.read_bytes()[:-2])
    with pytest.raises(UsageError, match=r"shard-00004.safetensors of --data .* bytes instead of"):
        open_token_source(str(folder))


def test_shards_that_changed_places_are_told_when_they_are_touched(folder):
    rename(folder, 3, "aside")
    rename(folder, 4, NAME.format(3))
    (folder / "aside").rename(folder / NAME.format(4))
    ids = open_token_source(str(folder)).splits["train"]
    assert ids[:100].size == 100
    with pytest.raises(UsageError, match=r"shard-00003.safetensors is not shard 3 of --data"):
        ids[350]
    # Their places stand in the shards themselves: a pattern finds the order again.
    assert np.array_equal(open_token_source(str(folder / "*.safetensors")).splits["train"][:], ids_of()["train"])


def test_foreign_shards_are_told(folder, tmp_path):
    other = write(tmp_path / "other", ids_of(), metadata={"source": "def", "name": "other"})
    (folder / NAME.format(5)).write_bytes((other / NAME.format(5)).read_bytes())
    ids = open_token_source(str(folder)).splits["train"]
    with pytest.raises(UsageError, match="is not shard 5"):
        ids[520]
    with pytest.raises(UsageError, match="is not shard 5"):
        verify_token_source(str(folder))
    with pytest.raises(UsageError, match="shards of different wholes"):
        open_token_source(str(folder / "*.safetensors"))
    (folder / NAME.format(5)).write_bytes((folder / NAME.format(6)).read_bytes())
    with pytest.raises(UsageError, match="are the same shard"):
        open_token_source(str(folder / "*.safetensors"))


def test_a_shard_that_does_not_go_on_where_the_one_before_ended_is_told(folder):
    path = folder / NAME.format(3)
    tokens = open_tokens(path)
    shorter = {split: np.array(ids[:90]) for split, ids in tokens.splits.items()}
    kept = {key: tokens.metadata[key] for key in ("source", "name", "shard")}
    write_tokens(path, shorter, kept)
    with pytest.raises(UsageError, match="bytes instead of"):
        open_token_source(str(folder))
    with pytest.raises(UsageError, match=r"shard-00004.safetensors does not go on where the shard before it ends"):
        open_token_source(str(folder / "*.safetensors"))


def test_verify_reads_every_id(folder):
    assert verify_token_source(str(folder)).metadata["source"] == "abc"
    path = folder / NAME.format(7)
    content = bytearray(path.read_bytes())
    content[-9] ^= 1
    path.write_bytes(content)
    with pytest.raises(UsageError, match=r"shard-00007.safetensors is damaged"):
        verify_token_source(str(folder))


def test_an_id_outside_of_the_vocabulary_is_refused_where_it_is_read(tmp_path):
    for dtype, bad in ((np.uint16, 60_000), (np.int32, -1), (np.int32, 300)):
        splits = ids_of(dtype)
        splits["train"][345] = bad
        maps = open_token_source(str(write(tmp_path / f"{np.dtype(dtype)}{bad}", splits))).splits["train"].maps
        ids = ShardedIds(maps, "train", 300)
        assert ids[:345].size == 345
        with pytest.raises(UsageError, match=rf"shard-00003.safetensors .*: token 345 of train is {bad}, but .* 300"):
            ids.runs(np.array([10, 340]), 20)


def test_a_damaged_list_gives_no_other_error(folder):
    content = (folder / LIST).read_bytes()
    sound = read_list(content, LIST)
    for at in range(0, len(content), 5):
        for changed in (content[:at], content[:at] + bytes([content[at] ^ 0x15]) + content[at + 1 :]):
            try:
                assert read_list(changed, LIST) == sound
            except UsageError as error:
                assert LIST in str(error)
    found = json.loads(content)
    for change in (
        {"file": "../../etc/passwd.safetensors"},
        {"file": "x.txt"},
        {"digest": "0"},
        {"bytes": -1},
        {"splits": {"other": 3}},
        {"splits": {"train": True}},
    ):
        shards = [{**found["shards"][0], **change}, *found["shards"][1:]]
        rest = {**found, "shards": shards}
        rest["digest"] = module._list_digest(rest)
        with pytest.raises(UsageError, match="no list of shards"):
            read_list(json.dumps(rest).encode(), LIST)


# --- written whole or not at all ---

KILLED = """
import os, sys
import numpy as np
from pathlib import Path
from fivestep.data.shards import shard_writer
with shard_writer(Path(sys.argv[1]), ("train",), np.dtype("<u2"), {}, 10) as writer:
    for part in writer.parts(np.arange(100, dtype=np.uint16)):
        writer.add("train", part)
        if part[0] >= 50:
            os.kill(os.getpid(), 9)
"""


@pytest.mark.multiprocess
def test_a_killed_preparation_leaves_nothing_that_looks_whole(tmp_path):
    command = [sys.executable, "-c", KILLED, str(tmp_path / "wiki")]
    assert subprocess.run(command, env=os.environ).returncode == -9
    (left,) = [path for path in tmp_path.iterdir() if path.is_dir()]
    assert left.name.startswith(".wiki.") and len(list(left.iterdir())) == 6
    assert not is_token_source(str(tmp_path / "wiki"))
    with pytest.raises(UsageError, match="damaged|missing"):  # not even who goes and looks inside
        open_token_source(str(left))
    write(tmp_path / "wiki", ids_of())
    assert [path.name for path in tmp_path.iterdir()] == ["wiki"]  # what was left is gone


def test_a_preparation_that_fails_leaves_nothing_and_a_folder_is_never_written_over(tmp_path):
    with pytest.raises(RuntimeError), shard_writer(tmp_path / "a", ("train",), np.dtype("<u2"), {}, 10) as writer:
        writer.add("train", np.arange(5, dtype=np.uint16))
        raise RuntimeError
    assert not list(tmp_path.iterdir())
    write(tmp_path / "a", ids_of())
    content = (tmp_path / "a" / LIST).read_bytes()
    with pytest.raises(OSError):
        write(tmp_path / "a", ids_of())
    assert [path.name for path in tmp_path.iterdir()] == ["a"] and (tmp_path / "a" / LIST).read_bytes() == content


def test_there_is_an_end_to_the_number_of_shards(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "MOST_SHARDS", 5)
    with pytest.raises(UsageError, match="more than 5 shards: give a larger --shard-size"):
        write(tmp_path / "a", ids_of())
    assert not list(tmp_path.iterdir())
