"""Text in its splits: what the sources hold, joined and cut, and the digest that names the result.

    sources ──> texts (one, or one a split) ──> spans of characters: "train", "val", "test" ──> blocks of text

Owns the cut, the digest and the passes over the text. A corpus is a description: it reads the text anew for each
pass, block by block, and so may be larger than memory. Reading is `sources.py`'s. Does not tokenize, cache or
download.
"""

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import BinaryIO, NamedTuple

from fivestep.data.bpe import border, endless
from fivestep.data.files import expanded
from fivestep.data.sources import (
    BUILTINS,
    SPLIT_NAMES,
    STEMS,
    Read,
    Source,
    TextFile,
    build_source,
    keep_freed_memory,
    text_files,
)
from fivestep.errors import UsageError

BLOCK = 1 << 20  # characters of a block; what is made of a text does not depend on it
MAX_BLOCK = 64 * BLOCK  # of a text in which no token ends

Report = Callable[[str, int, int], None]  # stage, bytes done, bytes in total


def unreported(stage: str, done_bytes: int, total_bytes: int) -> None:
    """Nobody asks how far the preparation is."""


class Span(NamedTuple):
    """Characters [start, stop) of a text, the corpus's texts counted from 0."""

    text: int
    start: int
    stop: int


@dataclass(frozen=True)
class Text:
    """Sources that are one text. digest: SHA-256 of its UTF-8, hexadecimal; size: bytes of UTF-8."""

    sources: list[Source]
    digest: str
    size: int


@dataclass(frozen=True)
class Corpus:
    """A text in its splits.

    name: for people. spans: the characters of each split, "train" and "val", and "test" where there is one; none is
    empty. digest: SHA-256, hexadecimal, over the texts' own SHA-256 and the spans. Two corpora are equal where
    their name, spans and digest are.
    """

    name: str
    spans: dict[str, Span]
    digest: str
    texts: list[Text] = field(compare=False, repr=False)

    @property
    def size(self) -> int:
        """Bytes of the whole text in UTF-8."""
        return sum(text.size for text in self.texts)

    @property
    def splits(self) -> dict[str, str]:
        """Each split's text, read into memory: for corpora that fit there."""
        parts: dict[str, list[str]] = {split: [] for split in self.spans}
        for split, block in self.blocks():
            parts[split].append(block)
        return {split: "".join(part) for split, part in parts.items()}

    def blocks(
        self, report: Report = unreported, stage: str = "reading", whole: bool = False
    ) -> Iterator[tuple[str, str]]:
        """(split, block of text), in order; blocks of about `BLOCK` characters, or less.

        With `whole` no token of words or byte pairs is cut: every block but a split's last ends at a `border`. Raises
        UsageError where the text is not what it was when the corpus was loaded, or, with `whole`, where `MAX_BLOCK`
        characters hold no border.
        """
        done = 0
        for number, text in enumerate(self.texts):
            spans = sorted(
                (span.start, span.stop, split) for split, span in self.spans.items() if span.text == number
            )
            seen = _Seen()
            for split, block in _cut_blocks(_checked(text, self.name, seen), spans, whole):
                yield split, block
                report(stage, done + seen.size, self.size)
            done += seen.size


def load_corpus(
    sources: str | Sequence[str],
    val_fraction: float = 0.1,
    test_fraction: float = 0.0,
    stdin: BinaryIO | None = None,
    text_field: str = "text",
    report: Report = unreported,
) -> Corpus:
    """Read `sources`, in the order given, as one corpus: checked and measured, not kept.

    A source is a file, a folder, `-` (standard input, or `stdin`), `python-manual` or `python-stdlib`. Files are
    text, or JSON lines (.jsonl, .ndjson: the `text_field` of each record, and a newline after it), plain or as .gz or
    .zst; a folder's are those that end so. A folder with train and valid (or val, validation; perhaps test) of any of
    these endings is its splits, and then the only source. Any other text is joined and cut by characters, train
    first, then val, then test; the fractions are of the whole. `report(stage, done_bytes, total_bytes)` tells how far
    reading is.
    Raises UsageError for what cannot be read or cut.
    """
    sources = [sources] if isinstance(sources, str) else sources
    if not sources:
        raise UsageError(f"--data is missing: give files, a folder, '-' or one of {', '.join(BUILTINS)}")
    if "" in sources:
        raise UsageError("--data is an empty name: give a file, a folder, '-' or one of " + ", ".join(BUILTINS))
    _check_fractions(val_fraction, test_fraction)
    keep_freed_memory()
    files = {source: split_files(source) for source in sources}
    folder = next((source for source in sources if files[source]), None)
    name = "+".join(map(_name, sources))
    if folder is None:
        parts = {source: build_source(source, stdin, text_field) for source in dict.fromkeys(sources)}
        joined = [(source, parts[source]) for source in sources]
        ((text, length),) = _measured([joined], report)
        return _corpus(name, [text], _cut(length, val_fraction, test_fraction, sources))
    if len(sources) > 1:
        raise UsageError(f"--data {folder} has its own splits, so it must be given alone, not with others")
    split_texts: list[list[tuple[str, list[Source]]]] = [
        [(str(file), [TextFile(file, text_field)])] for file in files[folder].values()
    ]
    measured = _measured(split_texts, report)
    spans = {
        split: Span(n, 0, length) for n, (split, (_, length)) in enumerate(zip(files[folder], measured, strict=True))
    }
    return _corpus(name, [text for text, _ in measured], spans)


def split_files(source: str) -> dict[str, Path]:
    """The files of a folder that has splits of its own, by split; else none.

    Raises UsageError for a folder with only some of them, or with more text beside them: test text must not become
    training text, and no text is left out unsaid. A lone train.txt is a text like any other.
    """
    if source == "-" or source in BUILTINS or not expanded(source).is_dir():
        return {}
    folder = expanded(source)
    texts = text_files(folder)
    found: dict[str, list[Path]] = {split: [] for split in STEMS}
    for file in texts:
        if file.parent == folder and (split := SPLIT_NAMES.get(file.name.lower())) is not None:
            found[split].append(file)
    splits = [file for files in found.values() for file in files]
    if not splits or (found["train"] == texts and len(texts) == 1):
        return {}
    for files in found.values():
        if len(files) > 1:
            raise UsageError(f"--data {source} holds {' and '.join(file.name for file in files)}: keep one of them")
    for split, missing in (("train", "train.txt"), ("val", "valid.txt")):
        if not found[split]:
            raise UsageError(
                f"--data {source} holds {' and '.join(file.name for file in splits)} but no {missing}: "
                "add it, or name the files"
            )
    if others := [str(file.relative_to(folder)) for file in texts if file not in splits]:
        more = f" and {len(others) - 3} more" if len(others) > 3 else ""
        raise UsageError(
            f"--data {source} has its own splits, in {', '.join(file.name for file in splits)}, so "
            f"{', '.join(others[:3])}{more} would not be read: move such files elsewhere"
        )
    return {split: files[0] for split, files in found.items() if files}


def _check_fractions(val_fraction: float, test_fraction: float) -> None:
    if not (0 < val_fraction < 1 and 0 <= test_fraction < 1 and val_fraction + test_fraction < 1):
        raise UsageError(
            f"val_fraction must be above 0, test_fraction 0 or more, and their sum below 1; "
            f"got {val_fraction} and {test_fraction}"
        )


def _measured(texts: list[list[tuple[str, list[Source]]]], report: Report) -> list[tuple[Text, int]]:
    """Each text, given as its named sources, and its length in characters: the first pass."""
    total = sum(source.size for named in texts for _, sources in named for source in sources)
    done = 0

    def read(count: int) -> None:
        nonlocal done
        done += count
        report("reading", done, max(total, done))

    return [_measure(named, read) for named in texts]


def _measure(named: list[tuple[str, list[Source]]], read: Read) -> tuple[Text, int]:
    seen, length = _Seen(), 0
    for name, sources in named:
        before = length
        length += sum(len(piece) for source in sources for piece in source.pieces(read, seen))
        if length == before:
            raise UsageError(f"--data {name} is empty: give a text of at least a few hundred characters")
    return Text([source for _, sources in named for source in sources], seen.sha256.hexdigest(), seen.size), length


def _cut(length: int, val_fraction: float, test_fraction: float, sources: Sequence[str]) -> dict[str, Span]:
    # Rounded at the 12th digit, lest 1 - 0.3 - 0.1 = 0.6 - 1e-16 cost a character.
    train_end = int(length * round(1 - val_fraction - test_fraction, 12))
    val_end = int(length * round(1 - test_fraction, 12))
    spans = {"train": Span(0, 0, train_end), "val": Span(0, train_end, val_end)}
    if test_fraction > 0:
        spans["test"] = Span(0, val_end, length)
    empty = [split for split, span in spans.items() if span.start == span.stop]
    if empty:
        raise UsageError(
            f"--data {' '.join(sources)} has {length} characters, too few to cut: "
            f"{' and '.join(empty)} would be empty (--val-fraction, --test-fraction)"
        )
    return spans


def _corpus(name: str, texts: list[Text], spans: Mapping[str, Span]) -> Corpus:
    named = json.dumps([[text.digest for text in texts], sorted(spans.items())])
    return Corpus(name, dict(spans), hashlib.sha256(named.encode()).hexdigest(), texts)


def _name(source: str) -> str:
    return "stdin" if source == "-" else source if source in BUILTINS else expanded(source).resolve().name


class _Seen:
    """What was read of a text: its bytes of UTF-8, and their digest."""

    def __init__(self) -> None:
        self.size, self.sha256 = 0, hashlib.sha256()

    def __call__(self, data: bytes) -> None:
        self.size += len(data)
        self.sha256.update(data)


def _checked(text: Text, name: str, seen: _Seen) -> Iterator[str]:
    """The pieces of a text; raises UsageError at its end where it is not the text that was measured."""
    yield from _ahead(chain.from_iterable(source.pieces(seen=seen) for source in text.sources))
    if seen.sha256.hexdigest() != text.digest:
        raise UsageError(f"--data {name} changed while it was read; run the command again")


def _ahead(pieces: Iterator[str]) -> Iterator[str]:
    """`pieces`, each read, decoded and hashed in a thread while the caller works on the one before."""
    with ThreadPoolExecutor(1) as thread:
        coming = thread.submit(next, pieces, None)
        while (piece := coming.result()) is not None:
            coming = thread.submit(next, pieces, None)
            yield piece


def _cut_blocks(
    pieces: Iterator[str], spans: Sequence[tuple[int, int, str]], whole: bool
) -> Iterator[tuple[str, str]]:
    """A text's blocks by split. spans: (start, stop, split), side by side; the last ends with the text."""
    text = ""
    for start, stop, split in spans:
        left = stop - start
        while left:
            text, end = _block(text, pieces, left, whole)
            yield split, text[:end]
            text, left = text[end:], left - end
    for _ in pieces:  # to the end, where it shows whether the text is still the same
        pass


def _block(text: str, pieces: Iterator[str], left: int, whole: bool) -> tuple[str, int]:
    """`text` with as many pieces after it as a block needs, and where that block ends."""
    if not whole:  # nothing is joined, and a piece that is a block is not copied
        while not text:
            text = next(pieces)
        return text, min(left, BLOCK, len(text))
    size = BLOCK
    while size <= MAX_BLOCK:
        wanted, parts, length = min(left, size), [text], len(text)
        while length < wanted:
            parts.append(next(pieces))
            length += len(parts[-1])
        text = "".join(parts)
        end = border(text, wanted) if wanted < left else wanted
        if end:
            return text, end
        size *= 2
    raise UsageError(endless(MAX_BLOCK))
