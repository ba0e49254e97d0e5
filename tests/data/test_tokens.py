import json
import os
import subprocess
import sys

import numpy as np
import pytest
from safetensors.numpy import load_file

from fivestep.data import tokens as module
from fivestep.data.corpus import load_corpus
from fivestep.data.files import cache_folder
from fivestep.data.preparation import tokenized
from fivestep.data.tokenizer import build_tokenizer
from fivestep.data.tokens import is_token_file, open_tokens, token_writer, verify_tokens, write_tokens
from fivestep.errors import UsageError

SPLITS = {"train": np.arange(101), "val": np.arange(7), "test": np.arange(0)}


def splits_of(dtype):
    return {split: ids.astype(dtype) for split, ids in SPLITS.items()}


@pytest.fixture
def corpus(tmp_path):
    (tmp_path / "text.txt").write_text("a bc d " * 40 + "z")
    return load_corpus([str(tmp_path / "text.txt")])


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.int32])
def test_what_is_written_is_read_by_us_and_by_safetensors(tmp_path, dtype):
    path = tmp_path / "t.safetensors"
    write_tokens(path, splits_of(dtype), {"source": "abc"})
    ours, theirs = open_tokens(path), load_file(path)
    assert set(ours.splits) == set(theirs) == set(SPLITS)
    for split, ids in splits_of(dtype).items():
        assert ours.splits[split].dtype == theirs[split].dtype == dtype
        assert np.array_equal(ours.splits[split], ids) and np.array_equal(theirs[split], ids)
    assert ours.dtype == dtype and ours.metadata["source"] == "abc"
    assert isinstance(ours.splits["train"], np.memmap) and not ours.splits["train"].flags.writeable
    assert (8 + int.from_bytes(path.read_bytes()[:8], "little")) % 64 == 0


def test_only_whole_token_splits_are_written(tmp_path):
    for splits in [
        {},
        {"train": np.arange(3)},
        {"other": np.zeros(3, np.uint8)},
        {"train": np.zeros((2, 2), np.uint8)},
    ]:
        with pytest.raises(UsageError, match="1-D"):
            write_tokens(tmp_path / "t", splits, {})
    with pytest.raises(UsageError, match="1-D"):
        write_tokens(tmp_path / "t", {"train": np.zeros(3, np.uint8), "val": np.zeros(3, np.uint16)}, {})
    assert not list(tmp_path.iterdir())


def test_truncation_is_noticed_and_a_changed_header_gives_no_other_error(tmp_path):
    path, other = tmp_path / "t.safetensors", tmp_path / "other"
    write_tokens(path, splits_of(np.uint16), {})
    content = path.read_bytes()
    for length in range(len(content)):
        other.write_bytes(content[:length])
        with pytest.raises(UsageError, match="other"):
            open_tokens(other)
    other.write_bytes(content + b"x")
    with pytest.raises(UsageError, match="damaged"):
        open_tokens(other)
    for at in range(8 + int.from_bytes(content[:8], "little")):
        other.write_bytes(content[:at] + bytes([content[at] ^ 0x15]) + content[at + 1 :])
        try:
            open_tokens(other)
        except UsageError:
            continue


@pytest.mark.parametrize(
    "change",
    [
        {"train": {"dtype": "U16", "shape": [3], "data_offsets": [0, 8]}},
        {"train": {"dtype": "U16", "shape": [4], "data_offsets": [2, 10]}},
        {"train": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}},
        {"train": {"dtype": "U16", "shape": [-4], "data_offsets": [0, -8]}},
        {"train": [1]},
        {"extra": {"dtype": "U16", "shape": [0], "data_offsets": [8, 8]}},
        {"__metadata__": {"format": "pt"}},
        {"__metadata__": None},
    ],
)
def test_a_header_that_does_not_fit_is_refused(tmp_path, change):
    good = {
        "__metadata__": {"format": "fivestep-tokens", "version": "1"},
        "train": {"dtype": "U16", "shape": [4], "data_offsets": [0, 8]},
    }
    path = tmp_path / "t"
    for header, sound in [(good, True), ({**good, **change}, False)]:
        text = json.dumps(header).encode()
        path.write_bytes(len(text).to_bytes(8, "little") + text + bytes(8))
        if sound:
            assert open_tokens(path).splits["train"].tolist() == [0, 0, 0, 0]
        else:
            with pytest.raises(UsageError, match="damaged"):
                open_tokens(path)


def test_ids_are_made_once_and_reused(tmp_path, corpus, monkeypatch):
    chars = build_tokenizer("chars", corpus.splits["train"], other_texts=[corpus.splits["val"]])
    first = tokenized(corpus, chars, tmp_path / "cache")
    assert {split: chars.decode(ids) for split, ids in first.splits.items()}["train"] == corpus.splits["train"]
    assert first.unknown == {"train": 0, "val": 1}
    assert first.path.name == f"{corpus.digest[:16]}-{chars.fingerprint[:16]}.safetensors"
    monkeypatch.setattr(type(chars), "encode", lambda self, text: pytest.fail("made again"))
    again = tokenized(corpus, chars, tmp_path / "cache")
    assert all(np.array_equal(again.splits[split], first.splits[split]) for split in first.splits)


def test_another_tokenizer_is_another_file_and_a_damaged_one_is_made_again(tmp_path, corpus):
    chars, bytes_ = (
        build_tokenizer("chars", corpus.splits["train"], other_texts=[corpus.splits["val"]]),
        build_tokenizer("bytes", ""),
    )
    path = tokenized(corpus, chars, tmp_path / "cache").path
    assert tokenized(corpus, bytes_, tmp_path / "cache").path != path
    sound = path.read_bytes()
    for damaged in (sound[:-1], b"", sound.replace(chars.fingerprint.encode(), b"0" * 64)):
        path.write_bytes(damaged)
        tokenized(corpus, chars, tmp_path / "cache")
        assert path.read_bytes() == sound
    assert len(list((tmp_path / "cache").iterdir())) == 2


def test_the_cache_moves_with_the_environment(tmp_path, corpus, monkeypatch):
    monkeypatch.setenv("FIVESTEP_CACHE", str(tmp_path / "here"))
    assert cache_folder("tokens") == tmp_path / "here" / "tokens"
    assert tokenized(corpus, build_tokenizer("bytes", "")).path.parent == cache_folder("tokens")
    monkeypatch.delenv("FIVESTEP_CACHE")
    assert "fivestep" in str(cache_folder("tokens"))


def test_a_cache_that_cannot_be_written_says_so_and_leaves_nothing(tmp_path, corpus, monkeypatch):
    def refuse(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", refuse)
    with pytest.raises(UsageError, match=r"No space left on device.*FIVESTEP_CACHE"):
        tokenized(corpus, build_tokenizer("bytes", ""), tmp_path / "cache")
    assert not list((tmp_path / "cache").iterdir())


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(UsageError, match="nothing"):
        open_tokens(tmp_path / "nothing")
    with pytest.raises(UsageError):
        open_tokens(tmp_path)


def test_the_text_side_does_not_import_torch():
    files = ", ".join(
        f"'{name}'" for name in ("corpus", "bpe", "tokenizer", "tokens", "worker", "preparation", "order", "files")
    )
    program = f"""
import importlib.util, sys, types
package = types.ModuleType("fivestep"); package.__path__ = [{str(module.__file__.rsplit("/", 2)[0])!r}]
sys.modules["fivestep"] = package
[__import__("fivestep.data." + name) for name in ({files})]
sys.exit("torch" in sys.modules)
"""
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0


def test_a_token_file_stands_alone(tmp_path, corpus):
    words = build_tokenizer("words", corpus.splits["train"])
    tokens = tokenized(corpus, words, tmp_path / "cache")
    read = open_tokens(tokens.path)
    assert read.tokenizer.fingerprint == words.fingerprint and read.metadata["name"] == corpus.name
    assert is_token_file(tokens.path) and not is_token_file(tmp_path) and not is_token_file(tmp_path / "text.txt")
    write_tokens(tmp_path / "bare", splits_of(np.uint16), {})
    with pytest.raises(UsageError, match="holds no tokenizer"):
        _ = open_tokens(tmp_path / "bare").tokenizer


def test_splits_of_unknown_length_are_written_one_after_another(tmp_path):
    with token_writer(tmp_path / "t", ("train", "val"), np.dtype(np.uint16), {"a": "b"}) as writer:
        for part in range(5):
            writer.add("train", np.arange(part, dtype=np.uint16), unknown=part)
        writer.add("val", np.arange(3, dtype=np.uint16))
    read = open_tokens(tmp_path / "t")
    assert read.splits["train"].tolist() == [i for part in range(5) for i in range(part)]
    assert read.splits["val"].tolist() == [0, 1, 2] and read.unknown == {"train": 10, "val": 0}
    assert load_file(tmp_path / "t")["val"].tolist() == [0, 1, 2]
    verify_tokens(tmp_path / "t")


def test_any_flipped_bit_is_noticed(tmp_path, corpus, monkeypatch):
    monkeypatch.setattr(module, "CHUNK", 50)
    chars = build_tokenizer("chars", corpus.splits["train"], other_texts=["z"])
    path = tokenized(corpus, chars, tmp_path / "cache").path
    verify_tokens(path)
    sound, other = path.read_bytes(), tmp_path / "other.safetensors"
    for at in range(len(sound)):
        other.write_bytes(sound[:at] + bytes([sound[at] ^ 1 << at % 8]) + sound[at + 1 :])
        with pytest.raises(UsageError, match="other"):
            verify_tokens(other)


def test_the_first_fault_is_named(tmp_path, corpus):
    path = tokenized(corpus, build_tokenizer("bytes", ""), tmp_path / "cache").path
    tokens = open_tokens(path)
    metadata = {**tokens.metadata, "tokenizer_json": json.dumps(build_tokenizer("chars", "ab").to_json())}
    write_tokens(tmp_path / "t", dict(tokens.splits), metadata)
    with pytest.raises(UsageError, match="its tokenizer is not the one that it names"):
        verify_tokens(tmp_path / "t")
    metadata["tokenizer"] = build_tokenizer("chars", "ab").fingerprint
    write_tokens(tmp_path / "t", dict(tokens.splits), metadata)
    with pytest.raises(UsageError, match="token 0 of train is 97, but the vocabulary has 2"):
        verify_tokens(tmp_path / "t")
    told = []
    verify_tokens(path, lambda *progress: told.append(progress))
    assert told[-1] == ("verifying", 281, 281)
