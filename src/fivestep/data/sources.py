"""Where text comes from: files of several formats, folders, standard input, the text that comes with Python.

    bytes of a file -> decompressed (.gz, .zst) -> decoded as UTF-8 -> the records' text (.jsonl) -> pieces of text

Owns reading: every source gives its text in pieces, as often as it is asked, and never holds more than a few of
them. Text is kept as it is: no newline is translated; only a byte order mark at a file's start is dropped. Knows
no splits (`corpus.py`).
"""

import codecs
import gzip
import json
import os
import sys
import sysconfig
import tempfile
import tokenize
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO, ClassVar, Protocol

from fivestep.data.files import expanded
from fivestep.errors import UsageError, suggestion
from fivestep.extras import installing

BUILTINS = ("python-manual", "python-stdlib")
RECORDS, PLAIN, ENDINGS = (  # JSON lines; what no folder with splits may hold beside them; all that a folder reads
    tuple(f"{kind}{packed}" for kind in kinds.split() for packed in ("", ".gz", ".zst"))
    for kinds in (
        ".jsonl .ndjson",
        ".txt .jsonl .ndjson",
        ".txt .jsonl .ndjson .text .md .markdown .rst .log",
    )
)
STEMS = {"train": ("train",), "val": ("val", "valid", "validation"), "test": ("test",)}
SPLIT_NAMES = {f"{stem}{end}": split for split, stems in STEMS.items() for stem in stems for end in ENDINGS}
MAGIC = {  # what a file begins with (a tar archive: its 258th byte): what it is, and what to do
    b"PK\x03\x04": ("a zip archive", "unpack it, and give its text files"),
    b"PAR1": ("a Parquet file", "write its text column as JSON lines (.jsonl)"),
    b"\x1f\x8b": ("compressed by gzip", "rename it so that its name ends in .gz"),
    b"\x28\xb5\x2f\xfd": ("compressed by Zstandard", "rename it so that its name ends in .zst"),
    b"BZh": ("compressed by bzip2", "unpack it"),
    b"\xfd7zXZ": ("compressed by xz", "unpack it"),
    b"%PDF-": ("a PDF", "extract its text"),
    b"SQLite format 3\0": ("an SQLite database", "export its text"),
    b"\x93NUMPY": ("a NumPy array", "give the text itself"),
    b"ustar": ("a tar archive", "unpack it, and give its text files"),
}
UNPACKING = {b"\x1f\x8b": "gzip -dc", b"\x28\xb5\x2f\xfd": "zstd -dc"}
MARKS = {  # byte order marks; of two that begin alike the longer comes first
    codecs.BOM_UTF32_LE: "utf-32", codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16", codecs.BOM_UTF16_BE: "utf-16",
}  # fmt: skip
ADVICE = "to train on one field of it, give a file of JSON lines whose name ends in .jsonl"
STDIN = "standard input"
PIECE_BYTES = 1 << 20  # read at a time, after decompression
_SPOOL_BYTES = 32 << 20  # of standard input kept in memory; more goes to a temporary file
_NOT_STDLIB = {"site-packages", "dist-packages", "test", "tests", "idlelib", "lib2to3", "__pycache__"}

Read = Callable[[int], None]  # told how many bytes were read from the disk
Seen = Callable[[bytes], None]  # told the UTF-8 of each piece of text, which is at hand where it is decoded


def _unnoticed(_: Any) -> None:
    """Nobody asks how far reading is, or for the UTF-8."""


class Source(Protocol):
    """A text that can be read again and again. size: bytes as they lie on the disk, for progress."""

    @property
    def size(self) -> int: ...

    def pieces(self, read: Read = _unnoticed, seen: Seen = _unnoticed) -> Iterator[str]: ...


@dataclass(frozen=True)
class TextFile:
    """A file of text or of JSON lines, plain or compressed; its name's ending says which."""

    path: Path
    text_field: str = "text"

    @property
    def size(self) -> int:
        return _size(self.path)

    def pieces(self, read: Read = _unnoticed, seen: Seen = _unnoticed) -> Iterator[str]:
        """The text; a record of JSON lines gives its `text_field` and a newline. Raises UsageError."""
        data, name = self._bytes(read), str(self.path)
        if self.path.name.lower().endswith(RECORDS):
            yield from _encoded(records(decoded(data, name), name, self.text_field), seen)
        else:
            yield from decoded(data, name, seen)

    def _bytes(self, read: Read) -> Iterator[bytes]:
        try:
            with self.path.open("rb") as raw, _unpacked(raw, self.path) as file:
                at = 0
                while data := file.read(PIECE_BYTES):
                    yield data
                    read(raw.tell() - at)
                    at = raw.tell()
        except FileNotFoundError:
            raise UsageError(f"--data {self.path} does not exist{_near(self.path)}") from None
        except EOFError:
            raise UsageError(f"--data {self.path} is cut short: its compressed data end too early") from None
        except _damage() as error:
            raise UsageError(
                f"--data {self.path} is damaged, or not compressed as its name says ({error})"
            ) from error
        except OSError as error:
            raise UsageError(f"--data {self.path} cannot be read ({error.strerror or error})") from error


class StandardInput:
    """What stands on standard input (or `stream`), read once and kept, in a temporary file where it is long."""

    head: ClassVar[bytes] = b""  # the beginning of what was read last, for a warning about it

    def __init__(self, stream: BinaryIO | None = None) -> None:
        self._stream = stream

    @cached_property
    def _spooled(self) -> Any:
        spool = tempfile.SpooledTemporaryFile(max_size=_SPOOL_BYTES)  # noqa: SIM115  (it lives as long as the corpus)
        try:
            stream = self._stream
            if stream is None:
                if sys.stdin is None or sys.stdin.closed:  # `<&-`
                    raise UsageError("--data -: standard input is closed: pipe a text in, or give a file")
                stream = sys.stdin.buffer
            StandardInput.head = data = stream.read(PIECE_BYTES)
            while data:
                spool.write(data)
                data = stream.read(PIECE_BYTES)
        except OSError as error:
            raise UsageError(f"--data -: standard input cannot be read or kept ({error})") from error
        return spool

    @property
    def size(self) -> int:
        return int(self._spooled.seek(0, 2))

    def pieces(self, read: Read = _unnoticed, seen: Seen = _unnoticed) -> Iterator[str]:
        """The text. Raises UsageError."""
        return decoded(self._bytes(read), STDIN, seen)

    def _bytes(self, read: Read) -> Iterator[bytes]:
        self._spooled.seek(0)
        while data := self._spooled.read(PIECE_BYTES):
            yield data
            read(len(data))


class PythonManual:
    """The text of Python's own manual."""

    @cached_property
    def _text(self) -> str:
        try:
            from pydoc_data.topics import topics
        except ImportError:
            raise UsageError(
                "--data python-manual needs pydoc_data.topics, which this Python lacks: give a file, or python-stdlib"
            ) from None
        return "\n".join(topics[key] for key in sorted(topics))

    @property
    def size(self) -> int:
        return len(self._text)

    def pieces(self, read: Read = _unnoticed, seen: Seen = _unnoticed) -> Iterator[str]:
        yield from _encoded([self._text], seen)
        read(self.size)


class PythonLibrary:
    """The sources of Python's standard library, tests left out."""

    @cached_property
    def _files(self) -> list[Path]:
        folder = Path(sysconfig.get_path("stdlib"))
        files = [file for file in folder.rglob("*.py") if not _NOT_STDLIB & set(file.relative_to(folder).parts)]
        if not files:
            raise UsageError(f"--data python-stdlib found no sources in {folder}; give a file, or python-manual")
        return sorted(files, key=lambda file: file.relative_to(folder).as_posix())

    @property
    def size(self) -> int:
        return sum(map(_size, self._files))

    def pieces(self, read: Read = _unnoticed, seen: Seen = _unnoticed) -> Iterator[str]:
        for path in self._files:
            try:
                with tokenize.open(path) as file:
                    yield from _encoded([file.read()], seen)
            except (OSError, SyntaxError, UnicodeDecodeError):
                continue  # a few sources are undecodable on purpose
            read(_size(path))


def keep_freed_memory() -> None:
    """Have the C library keep what is freed after each piece of text, for the next.

    glibc gives back what exceeds twice the largest piece that was ever freed (of pieces up to 32 MB), and the system
    clears it anew when it is taken again: a sixth of the time that words take. This piece is never written to, and so
    takes no memory itself.
    """
    bytes(31 << 20)


def build_source(source: str, stdin: BinaryIO | None = None, text_field: str = "text") -> list[Source]:
    """What `source` names: `-`, a built-in text, a file, or the files of a folder in the order of their names."""
    if source == "-":
        return [StandardInput(stdin)]
    if source in BUILTINS:
        return [PythonManual() if source == "python-manual" else PythonLibrary()]
    path = expanded(source)
    if not path.is_dir():
        if path.exists() and not path.is_file():
            raise UsageError(
                f"--data {path} is a pipe or a device, which cannot be read twice: give - and pipe it in"
            )
        return [TextFile(path, text_field)]
    files = text_files(path)
    if not files:
        raise UsageError(
            f"--data {path} holds no text: files that end in .txt, .jsonl, .ndjson, .md, .rst or .log are read, "
            "also as .gz or .zst; give a folder of them, or the files themselves"
        )
    return [TextFile(file, text_field) for file in files]


def text_files(folder: Path) -> list[Path]:
    """The files in and below `folder` whose names end as a text's do, whatever their case, in the order of names.

    In a folder with splits of its own (valid.txt, ...) a README.md beside them is not read. In any other folder a
    file that has several names (links) is read once. Raises UsageError for a folder that cannot be read, and for a
    name that ends so but is no file: nothing is left out unsaid.
    """
    found = sorted(path for path in all_files(folder) if path.name.lower().endswith(ENDINGS))
    splits = {path: SPLIT_NAMES.get(path.name.lower()) for path in found if path.parent == folder}
    if "val" in splits.values():
        found = [path for path in found if splits.get(path) or path.name.lower().endswith(PLAIN)]
    if strange := [path for path in found if not path.is_file()]:
        reason = "a link to nothing" if strange[0].is_symlink() else "no file"
        raise UsageError(f"--data {folder} holds {strange[0].relative_to(folder)}, which is {reason}: remove it")
    if any(splits.values()):
        return found
    return sorted({_identity(path): path for path in reversed(found)}.values())


def _identity(path: Path) -> tuple[int, int] | None:
    """Return what all names of a file (links) have in common; None where there is no such file."""
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_dev, status.st_ino


def source_notes(source: str) -> list[str]:
    """Return what a person should know of a source: how many files of a folder are read, and what looks amiss."""
    if source == "-":
        return [] if (warning := _amiss_in(StandardInput.head, STDIN)) is None else [warning]
    if source in BUILTINS:
        return []
    path = expanded(source)
    note = folder_note(source)
    files = [path] if note is None else text_files(path)
    return ([] if note is None else [note]) + [warning for file in files if (warning := _amiss(file)) is not None]


def _amiss(path: Path) -> str | None:
    """Return a warning where a file is read as plain text, and is likely meant as something else."""
    ending = Path(path.name.lower().removesuffix(".gz").removesuffix(".zst")).suffix
    if ending in (".csv", ".tsv", ".json"):
        return f"warning: {path.name} is read as plain text, with its commas, quotes and names of fields; {ADVICE}"
    try:
        with path.open("rb") as raw, _unpacked(raw, path) as file:
            head = file.read(PIECE_BYTES)
    except (OSError, EOFError, UsageError, zlib.error):
        return None  # that it cannot be read is said by reading it
    return _amiss_in(head, path.name)


def _amiss_in(head: bytes, name: str) -> str | None:
    if b"\0" in head:
        return f"warning: {name} contains NUL characters, so it may be binary. The model will train on them too"
    if not name.lower().endswith(RECORDS) and (kind := _table_kind(head)) is not None:
        return f"warning: {name} is read as plain text, and looks like {kind}; {ADVICE}"
    return None


def _table_kind(head: bytes) -> str | None:
    """Return what a text's beginning looks like, where that is JSON or CSV."""
    start = head.lstrip()
    if start[:1] == b"[" and start[1:].lstrip()[:2] in (b'{"', b"{\n", b"{ "):
        return "a JSON array"
    lines = start.splitlines()[:10]
    if lines and all(line[:2] == b'{"' and line.rstrip()[-1:] == b"}" for line in lines[:-1] or lines):
        return "JSON"
    for separator in (b",", b"\t"):
        if len(lines) == 10 and len({line.count(separator) for line in lines[:9]}) == 1 and separator in lines[0]:
            return "CSV" if separator == b"," else "TSV"
    return None


def folder_note(source: str) -> str | None:
    """How many files of a folder are read, and how many are not; None for any other source. Raises UsageError."""
    if source == "-" or source in BUILTINS or not expanded(source).is_dir():
        return None
    folder = expanded(source)
    read = text_files(folder)
    unread = set(all_files(folder)).difference(read)
    known = set(map(_identity, read))
    again = sum(_identity(path) in known for path in unread)
    counts = ((len(unread) - again, "of another kind"), (again, "linked to a file that is read"))
    others = " and ".join(f"{count:,} {what}" for count, what in counts if count)
    left_out = f" ({others} left out)" if others else ""
    return f"{folder.resolve().name}: {len(read):,} file{'s' if len(read) > 1 else ''}{left_out}"


def all_files(folder: Path) -> list[Path]:
    """Everything in and below `folder` that is neither a folder nor hidden (`.git`). Raises UsageError.

    Linked folders are gone into, and each folder once.
    """

    def refuse(error: OSError) -> None:
        raise error

    found: list[Path] = []
    seen: set[tuple[int, int]] = set()
    try:
        for at, folders, names in os.walk(folder, onerror=refuse, followlinks=True):
            status = Path(at).stat()
            if (status.st_dev, status.st_ino) in seen:
                folders.clear()
                continue
            seen.add((status.st_dev, status.st_ino))
            folders[:] = sorted(name for name in folders if not name.startswith("."))
            found += [Path(at, name) for name in names if not name.startswith(".")]
    except OSError as error:
        raise UsageError(f"--data {error.filename or folder} cannot be read ({error.strerror or error})") from error
    return found


def decoded(chunks: Iterator[bytes], name: str, seen: Seen = _unnoticed) -> Iterator[str]:
    """UTF-8 as text, whatever the chunks' borders; a byte order mark at the start is dropped. Raises UsageError."""
    rest, offset, first = b"", 0, True  # offset: of `rest`, in bytes
    for chunk in chunks:
        data = rest + chunk
        if first and not offset:
            check_is_text(data, name)
        text, used = _utf8(data, False, offset, name)
        rest, offset, data = data[used:], offset + used, data[:used]
        if text:
            seen(data.removeprefix(codecs.BOM_UTF8) if first else data)
            yield text.removeprefix("\ufeff") if first else text
            first = False
    _utf8(rest, True, offset, name)


def check_is_text(head: bytes, name: str) -> None:
    """Raise UsageError where a file's first bytes say that it is no UTF-8, and what it is instead."""
    encoding = next((encoding for mark, encoding in MARKS.items() if head.startswith(mark)), None) or _wide(head)
    if encoding is not None:
        raise UsageError(
            f"--data {name} is {encoding}, and a text must be UTF-8: re-save it, e.g. `iconv -f {encoding} -t utf-8`"
        )
    for magic, (what, remedy) in MAGIC.items():
        begins = head.startswith(magic, 257 if magic == b"ustar" else 0)
        if begins and not _is_plain(head[:4096]):  # a text may hold these letters
            if magic in UNPACKING and (name == STDIN or name.lower().endswith((".gz", ".zst"))):
                remedy = f"decompress it first, e.g. `{UNPACKING[magic]}`"
            raise UsageError(f"--data {name} is {what}, not plain text: {remedy}")


def _is_plain(head: bytes) -> bool:
    try:
        codecs.utf_8_decode(head, "strict", False)
    except UnicodeDecodeError:
        return False
    return min(head) > 8


def _wide(head: bytes) -> str | None:
    """Return the encoding of a text without a byte order mark whose characters take two or four bytes each.

    It must decode without an error to printable characters, some of them ASCII or Chinese punctuation. Few of them
    may be two ASCII characters in UTF-8: words with NULs between them would decode too. (0x30, a "0", is in every
    Japanese syllable.)
    """
    head = head[: min(len(head), 4096) // 4 * 4]
    if len(head) < 8 or _is_plain(head):
        return None
    letters = {*range(32, 127)} - {0x30}
    pairs = sum(first in letters and second in letters for first, second in zip(head[::2], head[1::2], strict=True))
    if pairs > 0.4 * len(head) / 2:
        return None
    for encoding in WIDE:
        try:
            text = codecs.getincrementaldecoder(encoding)().decode(head)
        except UnicodeDecodeError:
            continue
        printable = sum(character.isprintable() or character in "\t\n\r\u200c\u3000" for character in text)
        usual = sum(character.isascii() or character in "、。，" for character in text)
        if printable > 0.97 * len(text) and usual > 0.01 * len(text):
            return encoding
    return None


WIDE = ("utf-32-le", "utf-32-be", "utf-16-le", "utf-16-be")


def _encoded(pieces: Iterable[str], seen: Seen) -> Iterator[str]:
    for piece in pieces:
        seen(piece.encode())
        yield piece


def _utf8(data: bytes, final: bool, offset: int, name: str) -> tuple[str, int]:
    """The text and how many bytes it took: of a character that is not yet whole, none."""
    try:
        return codecs.utf_8_decode(data, "strict", final)
    except UnicodeDecodeError as error:
        raise UsageError(
            f"--data {name} is not UTF-8: byte {data[error.start]:#04x} at offset {offset + error.start}; "
            + (
                "the file is binary, not text"
                if b"\0" in data
                else "re-save it as UTF-8, e.g. `iconv -f latin1 -t utf-8`"
            )
        ) from None


def records(pieces: Iterator[str], name: str, text_field: str) -> Iterator[str]:
    """The text of JSON lines: each record's `text_field`, and a newline after it. Raises UsageError.

    A blank line is no record. A record lies in memory whole.
    """
    number = 0
    parts: list[str] = []  # of a record that is not yet whole
    for piece in pieces:
        first, *lines = piece.split("\n")
        parts.append(first)
        if lines:
            whole, parts = ["".join(parts), *lines[:-1]], lines[-1:]
            yield "".join([_record(line, number + at, name, text_field) for at, line in enumerate(whole, 1)])
            number += len(whole)
    if (waiting := "".join(parts)).strip():
        yield _record(waiting, number + 1, name, text_field)


def _record(line: str, number: int, name: str, text_field: str) -> str:
    if not line.strip():
        return ""
    where = f"--data {name}, line {number:,}"
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{where}: it is no JSON ({error})") from None
    text = record.get(text_field) if isinstance(record, dict) else None
    if isinstance(record, dict) and text_field in record and not isinstance(text, str):
        kind = {type(None): "null", bool: "true or false", list: "a list", dict: "an object"}.get(
            type(text), "a number"
        )
        raise UsageError(
            f"{where}: its field '{text_field}' is {kind}, not a string; leave such records out, or "
            "name the field of text with --text-field"
        )
    if not isinstance(text, str):
        has = f"its fields are {', '.join(list(record)[:8]) or 'none'}" if isinstance(record, dict) else "no object"
        raise UsageError(f"{where}: it has no text field '{text_field}' ({has}); name the field with --text-field")
    try:
        text.encode()
    except UnicodeEncodeError:
        raise UsageError(f"{where}: it holds half of a surrogate pair, which is no text") from None
    return text + "\n"


def _unpacked(raw: BinaryIO, path: Path) -> Any:
    """`raw` to read from, decompressed where the name ends in .gz or .zst."""
    if path.name.lower().endswith(".gz"):
        return gzip.GzipFile(fileobj=raw)
    if not path.name.lower().endswith(".zst"):
        return raw
    zstd = _zstd()
    if zstd is None:
        raise UsageError(f"--data {path} needs Zstandard, which this Python lacks: {installing('zst')}")
    return zstd.ZstdFile(raw)


def _zstd() -> Any:
    """The standard library's module (Python 3.14), or its backport; None where neither is installed."""
    try:
        if sys.version_info >= (3, 14):
            from compression import zstd
        else:
            from backports import zstd
    except ImportError:
        return None
    return zstd


def _damage() -> tuple[type[Exception], ...]:
    """What the decompressors raise on data that are not theirs."""
    zstd = _zstd()
    return (gzip.BadGzipFile, zlib.error, *([] if zstd is None else [zstd.ZstdError]))


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return 0  # that it cannot be read is said by reading it


def _near(path: Path) -> str:
    try:
        neighbours = sorted(entry.name for entry in path.parent.iterdir())
    except OSError:
        neighbours = []
    return suggestion(path.name, [*neighbours, *BUILTINS])
