import codecs
import gzip
import io
import json
import os
import re
import sys
import tarfile
import time

import pytest

from fivestep.data.corpus import load_corpus
from fivestep.data.sources import StandardInput, TextFile, decoded, records, source_notes
from fivestep.errors import UsageError
from fivestep.extras import installing

TEXT = "a line é 🙂\r\nand another\n" * 3000
LATIN = b"x" * 70_000 + b"\xe9 and more"


def packed(data, ending):
    if ending == ".gz":
        return gzip.compress(data)
    if ending == ".zst":
        return pytest.importorskip("backports.zstd", reason="Zstandard is not installed").compress(data)
    return data


def text_of(path, **options):
    return "".join(TextFile(path, **options).pieces())


@pytest.mark.parametrize("ending", ["", ".gz", ".zst"])
def test_text_is_the_same_plain_and_compressed(tmp_path, monkeypatch, ending):
    monkeypatch.setattr("fivestep.data.sources.PIECE_BYTES", 1001)
    path, read = tmp_path / f"a.txt{ending}", []
    path.write_bytes(packed(b"\xef\xbb\xbf" + TEXT.encode(), ending))
    assert "".join(TextFile(path).pieces(read.append)) == TEXT
    assert sum(read) == path.stat().st_size
    joined = packed(b"one ", ending) + packed(b"two", ending)  # as `cat` joins them
    path.write_bytes(joined)
    assert text_of(path) == "one two"


@pytest.mark.parametrize("ending", ["", ".gz", ".zst"])
def test_what_is_not_utf8_is_named_with_its_offset_in_the_text(tmp_path, monkeypatch, ending):
    monkeypatch.setattr("fivestep.data.sources.PIECE_BYTES", 1001)
    path = tmp_path / f"a.txt{ending}"
    path.write_bytes(packed(LATIN, ending))
    with pytest.raises(UsageError, match=r"a\.txt\S* is not UTF-8: byte 0xe9 at offset 70000; .*iconv"):
        text_of(path)
    path.write_bytes(packed("é".encode() * 9 + b"\xc3", ending))  # half a character at the end
    with pytest.raises(UsageError, match="byte 0xc3 at offset 18;"):
        text_of(path)


@pytest.mark.parametrize("ending", [".gz", ".zst"])
def test_a_compressed_file_that_is_cut_or_another_is_named(tmp_path, ending):
    path = tmp_path / f"a.txt{ending}"
    whole = packed(json.dumps(list(range(9000))).encode(), ending)
    for length in (len(whole) - 1, len(whole) // 2, 9):
        path.write_bytes(whole[:length])
        with pytest.raises(UsageError, match=r"a\.txt\S* is cut short"):
            text_of(path)
    path.write_bytes(b"this is plain text, whatever its name says")
    with pytest.raises(UsageError, match=r"a\.txt\S* is damaged, or not compressed"):
        text_of(path)


def test_missing_zstandard_says_how_to_get_it(tmp_path, monkeypatch):
    (tmp_path / "a.txt.zst").write_bytes(b"x")
    monkeypatch.setattr("fivestep.data.sources._zstd", lambda: None)
    with pytest.raises(UsageError, match=re.escape(installing("zst"))):
        text_of(tmp_path / "a.txt.zst")


@pytest.mark.parametrize("piece", [1, 3, 1 << 20])
def test_records_end_in_a_newline(tmp_path, monkeypatch, piece):
    monkeypatch.setattr("fivestep.data.sources.PIECE_BYTES", piece)
    path = tmp_path / "a.jsonl"
    path.write_bytes('{"text": "one\\ntwo é"}\r\n\n{"id": 3, "text": ""}\n{"text": "\u2028 last\\n"}'.encode())
    assert text_of(path) == "one\ntwo é\n\n\u2028 last\n\n"
    path.write_text('{"body": "b"}\n')
    assert text_of(path, text_field="body") == "b\n"


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"text": "a"', "it is no JSON"),
        ("[" * 100_000, "it is no JSON"),
        (
            '{"body": "a", "id": 1}',
            "no text field 'text' .its fields are body, id.; name the field with --text-field",
        ),
        ('{"text": 3}', "its field 'text' is a number, not a string"),
        ('{"text": null}', "its field 'text' is null, not a string; .* --text-field"),
        ('["text"]', "no object"),
        ('{"text": "\\ud800"}', "surrogate"),
    ],
)
def test_a_record_that_is_none_is_named_with_its_line(tmp_path, monkeypatch, line, message):
    monkeypatch.setattr("fivestep.data.sources.PIECE_BYTES", 7)
    path = tmp_path / "a.jsonl"
    for end in ("", "\n", '\n{"text": "more"}\n'):
        path.write_text('{"text": "fine"}\n\n' + line + end)
        with pytest.raises(UsageError, match=rf"a\.jsonl, line 3: .*{message}"):
            text_of(path)


def test_standard_input_is_read_once_and_kept(monkeypatch):
    monkeypatch.setattr("fivestep.data.sources._SPOOL_BYTES", 100)  # the rest goes to a file
    source = StandardInput(io.BytesIO(TEXT.encode()))
    assert source.size == len(TEXT.encode())
    assert "".join(source.pieces()) == "".join(source.pieces()) == TEXT


def test_a_folder_takes_every_ending_in_the_order_of_names(tmp_path):
    (tmp_path / "b.jsonl").write_text(json.dumps({"text": "b" * 40}))
    (tmp_path / "a.txt.gz").write_bytes(gzip.compress(b"a" * 40))
    (tmp_path / "c.md").write_text("c" * 40)
    (tmp_path / "d.Log").write_text("d" * 40)
    (tmp_path / "e.csv").write_text("no")
    (tmp_path / "f.ndjson").write_text(json.dumps({"text": "f" * 40}))
    whole = "a" * 40 + "b" * 40 + "\n" + "c" * 40 + "d" * 40 + "f" * 40 + "\n"
    assert "".join(load_corpus(str(tmp_path)).splits.values()) == whole
    (tmp_path / "folder").mkdir()
    for name in ("train.txt", "valid.txt", "README.md"):
        (tmp_path / "folder" / name).write_text(name * 9)
    splits = load_corpus(str(tmp_path / "folder")).splits
    assert splits == {"train": "train.txt" * 9, "val": "valid.txt" * 9}, "its splits, and no README"


def tar_archive():
    with io.BytesIO() as archive, tarfile.open(fileobj=archive, mode="w") as tar:
        tar.addfile(tarfile.TarInfo("my.txt"))
        tar.close()
        return archive.getvalue()


GERMAN = "Die Straße führt über die Brücke.\n" * 20


@pytest.mark.parametrize(
    "content, says",
    [
        (GERMAN.encode("utf-16"), "utf-16,"),
        (GERMAN.encode("utf-32"), "utf-32,"),
        (codecs.BOM_UTF16_BE + GERMAN.encode("utf-16-be"), "utf-16,"),
        (GERMAN.encode("utf-16-le"), "utf-16-le,"),
        (GERMAN.encode("ascii", "ignore").decode().encode("utf-16-be"), "utf-16-be,"),
        (GERMAN.encode("utf-32-be"), "utf-32-be,"),
        (("Привет мир, это текст. " * 20).encode("utf-16-le"), "utf-16-le,"),
        (("日本語の文章です。\n" * 20).encode("utf-16-be"), "utf-16-be,"),
        (("日本語の文章です。\n" * 20).encode("shift_jis"), "iconv -f latin1"),
        (b"PK\x03\x04" + bytes(30), "a zip archive"),
        (tar_archive(), "a tar archive, not plain text: unpack it"),
        (b"PAR1\x15\x04" + bytes(30), "a Parquet file"),
        (
            gzip.compress(GERMAN.encode(), mtime=0),
            "compressed by gzip, not plain text: rename it so that its name ends in .gz",
        ),
        (b"%PDF-1.7\n%\xe2\xe3\xcf\xd3\n", "a PDF"),
        (b"\x89PNG\r\n\x1a\n" + bytes(30), "the file is binary"),
        (GERMAN.encode("latin1"), "iconv -f latin1"),
    ],
)
def test_the_hint_says_what_the_file_is(tmp_path, content, says):
    (tmp_path / "my.txt").write_bytes(content)
    with pytest.raises(UsageError) as told:
        load_corpus(str(tmp_path / "my.txt"))
    assert says in str(told.value)
    assert ("latin1" in str(told.value)) == ("latin1" in says), "nothing that damages the text"


def test_what_is_packed_twice_or_piped_in_is_not_to_be_renamed(tmp_path):
    (tmp_path / "my.tar.gz").write_bytes(gzip.compress(tar_archive()))
    with pytest.raises(UsageError, match="is a tar archive"):
        load_corpus(str(tmp_path / "my.tar.gz"))
    (tmp_path / "my.txt.gz").write_bytes(gzip.compress(gzip.compress(b"text" * 99)))
    for source in ("-", str(tmp_path / "my.txt.gz")):
        with pytest.raises(UsageError, match="compressed by gzip, not plain text: decompress it first, .*`gzip -dc`"):
            load_corpus(source, stdin=io.BytesIO(gzip.compress(b"text" * 99)))


@pytest.mark.parametrize(
    "text", ["PAR1 and BZh are letters too. " * 9, "x" * 257 + "ustar" + " and more" * 99, "a\0name\0of files\0" * 50]
)
def test_text_that_looks_like_a_binary_file_is_read(tmp_path, text):
    (tmp_path / "my.txt").write_text(text)
    assert load_corpus(str(tmp_path / "my.txt")).size == len(text)


@pytest.mark.parametrize(
    "name, content, says",
    [
        ("a.txt", "some\0text" * 9, "NUL characters"),
        ("a.csv", "x,y\n1,2\n" * 9, "a.csv is read as plain text"),
        ("a.json", '[{"text": "x"}]' * 9, "a.json is read as plain text"),
        ("a.txt", '[\n  {"text": "x"}]' * 9, "looks like a JSON array"),
        ("a.txt", '{"text": "x"}\n' * 20, "looks like JSON;"),
        ("a.log", "id,text\n" * 20, "looks like CSV;"),
        ("a.txt", "[an aside] as any text may begin" * 9, None),
        ("a.txt", "{braces}, as\nany text may hold, or lines,\n" * 9, None),
    ],
)
def test_what_is_likely_no_text_is_warned_of(tmp_path, name, content, says):
    (tmp_path / name).write_text(content)
    assert load_corpus(str(tmp_path / name)).size == len(content), "it is read"
    notes = source_notes(str(tmp_path / name))
    assert [says in note for note in notes] == ([] if says is None else [True])
    if name == "a.txt":
        load_corpus("-", stdin=io.BytesIO(content.encode()))
        assert source_notes("-") == [note.replace(name, "standard input") for note in notes]


def test_a_folder_reads_a_file_once_and_nothing_hidden(tmp_path):
    folder = tmp_path / ".hidden" / "folder"  # only names in it count
    (folder / ".git").mkdir(parents=True)
    for name in ("b.txt", ".git/a.txt", ".a.txt", "data.csv"):
        (folder / name).write_text(name * 9)
    (folder / "a.md").symlink_to("b.txt"), (folder / "c.txt").hardlink_to(folder / "b.txt")
    (folder / "d.txt").symlink_to("data.csv")  # is read under no other name
    assert "".join(load_corpus(str(folder)).splits.values()) == "b.txt" * 9 + "data.csv" * 9
    assert source_notes(str(folder)) == ["folder: 2 files (3 linked to a file that is read left out)"]


def test_characters_may_lie_across_chunks():
    data = "aé中🙂".encode()
    for size in range(1, len(data)):
        chunks = (data[at : at + size] for at in range(0, len(data), size))
        assert "".join(decoded(chunks, "x")) == "aé中🙂"


def test_a_folder_is_read_whole_or_refused(tmp_path, monkeypatch):
    folder = tmp_path / "folder"
    (folder / "sub").mkdir(parents=True), (tmp_path / "else").mkdir()
    (folder / "A.TXT").write_text("a" * 40)
    (folder / "B.Jsonl.GZ").write_bytes(gzip.compress(json.dumps({"text": "b" * 40}).encode()))
    (tmp_path / "else" / "x.txt").write_text("x" * 40)
    (folder / "linked").symlink_to(tmp_path / "else")
    (folder / "sub" / "round").symlink_to(folder)  # each folder once
    assert "".join(load_corpus(str(folder)).splits.values()) == "a" * 40 + "b" * 40 + "\n" + "x" * 40
    (folder / "sub" / "gone.txt").symlink_to(tmp_path / "nothing")
    with pytest.raises(UsageError, match=r"holds sub/gone\.txt, which is a link to nothing"):
        load_corpus(str(folder))
    (folder / "sub" / "gone.txt").unlink()
    scandir = os.scandir

    def locked(path):
        if str(path).endswith("sub"):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", locked)
    with pytest.raises(UsageError, match=r"folder/sub cannot be read \(Permission denied\)"):
        load_corpus(str(folder))


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no named pipes")
def test_a_pipe_and_a_closed_input_get_a_sentence(tmp_path, monkeypatch):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(UsageError, match="a pipe or a device, which cannot be read twice: give - and pipe it in"):
        load_corpus(str(tmp_path / "pipe"))
    monkeypatch.setattr(sys, "stdin", None)
    with pytest.raises(UsageError, match="standard input is closed"):
        load_corpus("-")


def test_one_long_record_takes_linear_time():
    pieces = [
        '{"text": "',
        *["x" * 2000] * 20_000,
        '"}\n{"text": "y"}',
    ]  # 40 MB; adding them up piece by piece: 400 GB
    start = time.process_time()
    assert sum(map(len, records(iter(pieces), "x", "text"))) == 40_000_003
    assert time.process_time() - start < 10
