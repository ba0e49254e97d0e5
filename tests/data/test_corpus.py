import builtins
import gzip
import io
import json
from pathlib import Path

import pytest

from fivestep.data import corpus as module
from fivestep.data.corpus import load_corpus
from fivestep.errors import UsageError

TEXT = "".join(chr(97 + i % 26) for i in range(100))


def write(path: Path, content: str | bytes = TEXT) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return str(path)


def test_one_file_is_cut_by_characters(tmp_path):
    corpus = load_corpus([write(tmp_path / "a.txt", "é" * 100)])
    assert {split: len(text) for split, text in corpus.splits.items()} == {"train": 90, "val": 10}
    assert corpus.name == "a.txt"
    assert corpus == load_corpus(str(tmp_path / "a.txt"))


@pytest.mark.parametrize(
    ("val", "test", "sizes"), [(0.1, 0.1, [80, 10, 10]), (0.02, 0.07, [91, 2, 7]), (0.05, 0.15, [80, 5, 15])]
)
def test_fractions_are_of_the_whole(tmp_path, val, test, sizes):
    splits = load_corpus([write(tmp_path / "a.txt")], val, test).splits
    assert [len(splits[name]) for name in ("train", "val", "test")] == sizes
    assert splits["train"] + splits["val"] + splits["test"] == TEXT


def test_shakespeare_is_cut_as_nanogpt_cuts_it(shakespeare):
    text = shakespeare.read_text(encoding="utf-8")
    splits = load_corpus([str(shakespeare)]).splits
    assert len(text) == 1_115_394 and len(splits["train"]) == 1_003_854
    assert splits["train"] == text[: int(len(text) * 0.9)] and splits["val"] == text[int(len(text) * 0.9) :]


def test_a_folder_with_splits_keeps_them(wikitext):
    splits = load_corpus([str(wikitext)]).splits
    names = {"train": "train.txt", "val": "valid.txt", "test": "test.txt"}
    assert splits == {split: (wikitext / name).read_bytes().decode() for split, name in names.items()}


@pytest.mark.parametrize("name", ["valid.txt", "val.txt", "validation.txt"])
def test_names_of_the_validation_file(tmp_path, name):
    write(tmp_path / "train.txt", "tt"), write(tmp_path / name, "vv"), write(tmp_path / "README.md", "no")
    assert load_corpus([str(tmp_path)]).splits == {"train": "tt", "val": "vv"}


def test_files_join_in_the_order_given_and_folders_sorted(tmp_path):
    b, a = write(tmp_path / "b.txt", "b" * 50), write(tmp_path / "sub" / "a.txt", "a" * 50)
    write(tmp_path / "c.png", "no")
    joined = load_corpus([a, b])
    assert "".join(joined.splits.values()) == "a" * 50 + "b" * 50
    assert joined.name == "a.txt+b.txt"
    assert "".join(load_corpus([str(tmp_path)]).splits.values()) == "b" * 50 + "a" * 50


def test_newlines_stay_and_a_byte_order_mark_goes(tmp_path):
    path = write(tmp_path / "a.txt", b"\xef\xbb\xbfa\r\nb\rc\n" * 2)
    assert "".join(load_corpus([path]).splits.values()) == "a\r\nb\rc\n\ufeffa\r\nb\rc\n"


def test_standard_input():
    corpus = load_corpus(["-"], stdin=io.BytesIO(TEXT.encode()))
    assert corpus.name == "stdin" and corpus.splits["train"] == TEXT[:90]


def test_the_digest_names_the_splits(tmp_path):
    path = write(tmp_path / "a.txt")
    digests = {load_corpus([path], val).digest for val in (0.1, 0.2)}
    digests.add(load_corpus([write(tmp_path / "b.txt", TEXT[::-1])]).digest)
    assert len(digests) == 3 and all(len(digest) == 64 for digest in digests)
    assert load_corpus([path]).digest == load_corpus([write(tmp_path / "copy.txt")]).digest


def test_the_digest_tells_a_split_name_from_text_that_spells_it(tmp_path):
    for folder, train, val in [("one", "a", "bvalc"), ("two", "avalb", "c")]:
        write(tmp_path / folder / "train.txt", train), write(tmp_path / folder / "val.txt", val)
    assert load_corpus(str(tmp_path / "one")).digest != load_corpus(str(tmp_path / "two")).digest


def test_text_that_comes_with_python(tmp_path, monkeypatch):
    manual = load_corpus("python-manual")
    assert len(manual.splits["train"]) > 300_000 and manual.name == "python-manual"
    stdlib = tmp_path / "lib"
    write(stdlib / "b.py", "b = 1\n" * 9), write(stdlib / "a" / "x.py", "x = 1\n" * 9)
    write(stdlib / "latin.py", b"# -*- coding: latin-1 -*-\n# \xe9\n")
    write(stdlib / "broken.py", b"# \xff\xfe\n")
    write(stdlib / "test" / "t.py", "no"), write(stdlib / "site-packages" / "s.py", "no")
    monkeypatch.setattr("sysconfig.get_path", lambda name: str(stdlib))
    text = "".join(load_corpus("python-stdlib").splits.values())
    assert text == "x = 1\n" * 9 + "b = 1\n" * 9 + "# -*- coding: latin-1 -*-\n# é\n"


def test_a_python_without_its_manual_says_so(monkeypatch):
    real = builtins.__import__

    def without(name, *rest):
        if name.startswith("pydoc_data"):
            raise ImportError(name)
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(UsageError, match="python-stdlib"):
        load_corpus("python-manual")


@pytest.mark.parametrize("given", ["inptu.txt", "python-manul"])
def test_a_missing_path_gets_a_suggestion(tmp_path, given):
    write(tmp_path / "input.txt")
    wanted = "input.txt" if given.startswith("i") else "python-manual"
    with pytest.raises(UsageError, match=f"does not exist; did you mean '{wanted}'"):
        load_corpus([str(tmp_path / given)])
    with pytest.raises(UsageError, match="does not exist"):
        load_corpus([str(tmp_path / "nowhere" / given)])


def test_text_that_is_not_utf8_is_named_with_its_offset(tmp_path):
    path = write(tmp_path / "a.txt", b"abc\xe9def")
    with pytest.raises(UsageError, match=r"a\.txt is not UTF-8: byte 0xe9 at offset 3; .*iconv"):
        load_corpus([path])
    with pytest.raises(UsageError, match="standard input is not UTF-8"):
        load_corpus(["-"], stdin=io.BytesIO(b"\xe9\xfe"))


def test_an_unreadable_file_is_named(tmp_path, monkeypatch):
    def refuse(self, mode):
        raise PermissionError(13, "Permission denied", str(self))

    path = write(tmp_path / "a.txt")
    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(UsageError, match=r"a\.txt cannot be read \(Permission denied\)"):
        load_corpus([path])


def test_empty_text_is_refused(tmp_path):
    with pytest.raises(UsageError, match="is empty"):
        load_corpus([write(tmp_path / "a.txt", "")])
    with pytest.raises(UsageError, match="is empty"):
        load_corpus(["-"], stdin=io.BytesIO(b""))
    with pytest.raises(UsageError, match=r"3 characters, too few to cut: train would be empty"):
        load_corpus([write(tmp_path / "b.txt", "abc")], val_fraction=0.9)
    with pytest.raises(UsageError, match=r"holds no text"):
        (tmp_path / "none").mkdir()
        load_corpus([str(tmp_path / "none")])
    with pytest.raises(UsageError, match="--data is missing"):
        load_corpus([])
    write(tmp_path / "s" / "train.txt"), write(tmp_path / "s" / "val.txt", "")
    with pytest.raises(UsageError, match=r"val\.txt is empty"):
        load_corpus([str(tmp_path / "s")])


def test_splits_that_are_unclear_are_refused(tmp_path):
    write(tmp_path / "train.txt"), write(tmp_path / "test.txt")
    with pytest.raises(UsageError, match=r"no valid\.txt"):
        load_corpus([str(tmp_path)])
    write(tmp_path / "VAL.Txt")
    with pytest.raises(UsageError, match="given alone"):
        load_corpus([str(tmp_path), write(tmp_path / "more.md")])
    write(tmp_path / "valid.txt")
    with pytest.raises(UsageError, match="keep one"):
        load_corpus([str(tmp_path)])


@pytest.mark.parametrize("fractions", [(0, 0), (1, 0), (-0.1, 0), (0.5, 0.5), (0.1, -0.1), (float("nan"), 0)])
def test_fractions_out_of_range_are_refused(tmp_path, fractions):
    with pytest.raises(UsageError, match="val_fraction"):
        load_corpus([write(tmp_path / "a.txt")], *fractions)


@pytest.mark.parametrize("ending", [".txt.gz", ".jsonl", ".jsonl.gz", ".ndjson", ".md", ".rst", ".log", ".text.gz"])
def test_a_folder_keeps_its_splits_whatever_their_endings(tmp_path, ending):
    for name, text in (("train", "tt"), ("val", "vv"), ("test", "ss")):
        data = json.dumps({"text": text}).encode() if "json" in ending else text.encode()
        write(tmp_path / f"{name}{ending}", gzip.compress(data) if ending.endswith("gz") else data)
    end = "\n" if "json" in ending else ""
    splits = load_corpus(str(tmp_path)).splits
    assert splits == {"train": "tt" + end, "val": "vv" + end, "test": "ss" + end}
    write(tmp_path / "train.txt")
    with pytest.raises(UsageError, match=r"holds train\.\S+ and train\.\S+: keep one"):
        load_corpus(str(tmp_path))


TRICKY = "The é cat's  mat.\n\n 12 \t_x\u00a0y\r\n\u3000中文。\nend — of 'it\x1cz\n  " * 60


@pytest.mark.parametrize("size", [1, 2, 7, 50, 10**6])
@pytest.mark.parametrize("whole", [False, True])
def test_blocks_are_the_text_whatever_their_size(tmp_path, monkeypatch, size, whole):
    monkeypatch.setattr(module, "BLOCK", size)
    monkeypatch.setattr(module, "MAX_BLOCK", 64 * max(size, 10))
    monkeypatch.setattr("fivestep.data.sources.PIECE_BYTES", 5)
    loaded = load_corpus(write(tmp_path / "a.txt", TRICKY), 0.3, 0.1)
    done = []
    blocks = list(loaded.blocks(lambda *progress: done.append(progress), "counting", whole))
    joined = {split: "".join(b for s, b in blocks if s == split) for split in ("train", "val", "test")}
    ends = [int(len(TRICKY) * share) for share in (0.6, 0.9)]
    assert joined == {"train": TRICKY[: ends[0]], "val": TRICKY[ends[0] : ends[1]], "test": TRICKY[ends[1] :]}
    assert done[-1] == ("counting", len(TRICKY.encode()), len(TRICKY.encode()))
    if whole:
        words = {split: [w for s, b in blocks if s == split for w in b.split()] for split in joined}
        assert words == {split: text.split() for split, text in joined.items()}
    elif size > 1:
        assert max(len(block) for _, block in blocks) <= size


def test_a_text_without_a_border_is_refused_where_tokens_must_not_be_cut(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "BLOCK", 10)
    monkeypatch.setattr(module, "MAX_BLOCK", 40)
    loaded = load_corpus(write(tmp_path / "a.txt", "x" * 100))
    assert len(list(loaded.blocks())) == 10
    with pytest.raises(UsageError, match="40 characters in which no word ends"):
        list(loaded.blocks(whole=True))


@pytest.mark.parametrize("after", [TEXT[:-1] + "!", TEXT[:-9], TEXT + "more"])
def test_a_text_that_changes_between_two_passes_is_noticed(tmp_path, after):
    loaded = load_corpus(write(tmp_path / "a.txt"))
    assert loaded.splits["train"] == TEXT[:90]
    write(tmp_path / "a.txt", after)
    with pytest.raises(UsageError, match="changed while it was read"):
        list(loaded.blocks())


@pytest.mark.parametrize(
    ("names", "missing"),
    [
        (("valid.txt", "test.txt"), "train.txt"),
        (("test.txt", "a.txt"), "train.txt"),
        (("train.txt", "a.txt"), "valid.txt"),
    ],
)
def test_splits_without_their_partners_are_not_cut_anew(tmp_path, names, missing):
    for name in names:
        write(tmp_path / name)
    with pytest.raises(UsageError, match=f"but no {missing}: add it"):
        load_corpus(str(tmp_path))


def test_a_lone_train_file_is_cut_like_any_text(tmp_path):
    write(tmp_path / "train.txt")
    assert load_corpus(str(tmp_path)).splits["train"] == TEXT[:90]


def test_more_text_beside_the_splits_is_named(tmp_path):
    write(tmp_path / "train.txt"), write(tmp_path / "valid.txt"), write(tmp_path / "raw" / "more.txt")
    with pytest.raises(UsageError, match=r"in train\.txt, valid\.txt, so raw/more\.txt would not be read"):
        load_corpus(str(tmp_path))
