"""Text in: files, folders, standard input or the text that comes with Python, cut into splits.

Owns reading, decoding, the cut and the digest that names the result. Does not tokenize, cache or download.
Text is kept as it is: no newline is translated; only a byte order mark at a file's start is dropped.
"""

import hashlib
import sys
import sysconfig
import tokenize
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from fivestep.data.files import expanded
from fivestep.errors import UsageError, suggestion

BUILTINS = ("python-manual", "python-stdlib")
VALIDATION_NAMES = ("valid.txt", "val.txt", "validation.txt")
_NOT_STDLIB = {"site-packages", "dist-packages", "test", "tests", "idlelib", "lib2to3", "__pycache__"}


@dataclass(frozen=True)
class Corpus:
    """A text in its splits.

    name: for people. splits: text by split, "train" and "val", and "test" where there is one; none is empty.
    digest: SHA-256, in hexadecimal, over the splits' names and UTF-8 bytes.
    """

    name: str
    splits: dict[str, str]
    digest: str


def load_corpus(
    sources: str | Sequence[str],
    val_fraction: float = 0.1,
    test_fraction: float = 0.0,
    stdin: BinaryIO | None = None,
) -> Corpus:
    """Read `sources`, in the order given, as one corpus.

    A source is a file, a folder, `-` (standard input, or `stdin`), `python-manual` or `python-stdlib`. A
    folder with train.txt and valid.txt (or val.txt, validation.txt; perhaps test.txt) is its splits, and then
    the only source. Any other text is joined and cut by characters, train first, then val, then test; the
    fractions are of the whole. Raises UsageError for what cannot be read or cut.
    """
    sources = [sources] if isinstance(sources, str) else sources
    if not sources:
        raise UsageError(f"--data is missing: give files, a folder, '-' or one of {', '.join(BUILTINS)}")
    if "" in sources:
        raise UsageError("--data is an empty name: give a file, a folder, '-' or one of " + ", ".join(BUILTINS))
    _check_fractions(val_fraction, test_fraction)
    folder = next((s for s in sources if _holds_splits(s)), None)
    if folder is None:
        text = "".join([_source_text(source, stdin) for source in sources])
        splits = _cut(text, val_fraction, test_fraction, sources)
    elif len(sources) == 1:
        splits = _folder_splits(expanded(folder))
    else:
        raise UsageError(f"--data {folder} has its own splits, so it must be given alone, not with others")
    return Corpus("+".join(map(_name, sources)), splits, _digest(splits))


def _check_fractions(val_fraction: float, test_fraction: float) -> None:
    if not (0 < val_fraction < 1 and 0 <= test_fraction < 1 and val_fraction + test_fraction < 1):
        raise UsageError(
            f"val_fraction must be above 0, test_fraction 0 or more, and their sum below 1; "
            f"got {val_fraction} and {test_fraction}"
        )


def _cut(text: str, val_fraction: float, test_fraction: float, sources: Sequence[str]) -> dict[str, str]:
    # Rounded at the 12th digit, lest 1 - 0.3 - 0.1 = 0.6 - 1e-16 cost a character.
    train_end = int(len(text) * round(1 - val_fraction - test_fraction, 12))
    val_end = int(len(text) * round(1 - test_fraction, 12))
    splits = {"train": text[:train_end], "val": text[train_end:val_end]}
    if test_fraction > 0:
        splits["test"] = text[val_end:]
    empty = [split for split, part in splits.items() if not part]
    if empty:
        raise UsageError(
            f"--data {' '.join(sources)} has {len(text)} characters, too few to cut: "
            f"{' and '.join(empty)} would be empty"
        )
    return splits


def _digest(splits: dict[str, str]) -> str:
    digest = hashlib.sha256()
    for split, text in sorted(splits.items()):
        for part in (split.encode(), text.encode("utf-8")):
            digest.update(len(part).to_bytes(8, "little"))  # so that no two cuts of one text look alike
            digest.update(part)
    return digest.hexdigest()


def _name(source: str) -> str:
    return "stdin" if source == "-" else source if source in BUILTINS else expanded(source).resolve().name


def _source_text(source: str, stdin: BinaryIO | None) -> str:
    if source == "-":
        text = _decoded(_from_stdin(stdin), "standard input")
    elif source == "python-manual":
        text = _python_manual()
    elif source == "python-stdlib":
        text = _python_stdlib()
    else:
        text = _path_text(expanded(source))
    if not text:
        raise UsageError(f"--data {source} is empty: give a text of at least a few hundred characters")
    return text


def _from_stdin(stdin: BinaryIO | None) -> bytes:
    try:
        return (sys.stdin.buffer if stdin is None else stdin).read()
    except OSError as error:
        raise UsageError(f"--data -: standard input cannot be read ({error})") from error


def _path_text(path: Path) -> str:
    if not path.is_dir():
        return _file_text(path)
    files = _text_files(path)
    if not files:
        raise UsageError(f"--data {path} holds no .txt file: give a folder of .txt files, or the files themselves")
    return "".join(_file_text(file) for file in files)


def _text_files(folder: Path) -> list[Path]:
    try:
        return sorted(file for file in folder.rglob("*.txt") if file.is_file())
    except OSError as error:
        raise UsageError(f"--data {folder} cannot be read ({error.strerror})") from error


def _file_text(path: Path) -> str:
    try:
        return _decoded(path.read_bytes(), str(path))
    except FileNotFoundError:
        raise UsageError(f"--data {path} does not exist{_near(path)}") from None
    except OSError as error:
        raise UsageError(f"--data {path} cannot be read ({error.strerror or error})") from error


def _near(path: Path) -> str:
    try:
        neighbours = sorted(entry.name for entry in path.parent.iterdir())
    except OSError:
        neighbours = []
    return suggestion(path.name, [*neighbours, *BUILTINS])


def _decoded(data: bytes, name: str) -> str:
    try:
        return data.decode("utf-8").removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        raise UsageError(
            f"--data {name} is not UTF-8: byte {data[error.start]:#04x} at offset {error.start}; "
            f"re-save it as UTF-8, e.g. `iconv -f latin1 -t utf-8`"
        ) from None


def _holds_splits(source: str) -> bool:
    """Whether a source is a folder with its own splits; one with only some of them is refused."""
    folder = expanded(source)
    if source == "-" or source in BUILTINS or not (folder / "train.txt").is_file():
        return False
    validation = [name for name in VALIDATION_NAMES if (folder / name).is_file()]
    if len(validation) > 1:
        raise UsageError(f"--data {source} holds {' and '.join(validation)}: keep one of them")
    if not validation and (folder / "test.txt").is_file():
        raise UsageError(f"--data {source} holds train.txt and test.txt but no valid.txt: add it, or name the files")
    return bool(validation)


def _folder_splits(folder: Path) -> dict[str, str]:
    names = {"train": ("train.txt",), "val": VALIDATION_NAMES, "test": ("test.txt",)}
    files = {split: folder / n for split, allowed in names.items() for n in allowed if (folder / n).is_file()}
    splits = {split: _file_text(file) for split, file in files.items()}
    empty = [str(files[split]) for split, text in splits.items() if not text]
    if empty:
        raise UsageError(f"--data {folder}: {' and '.join(empty)} is empty; give it text, or remove it")
    return splits


def _python_manual() -> str:
    try:
        from pydoc_data.topics import topics
    except ImportError:
        raise UsageError(
            "--data python-manual needs pydoc_data.topics, which this Python lacks: give a file, or python-stdlib"
        ) from None
    return "\n".join(topics[key] for key in sorted(topics))


def _python_stdlib() -> str:
    folder = Path(sysconfig.get_path("stdlib"))
    files = [file for file in folder.rglob("*.py") if not _NOT_STDLIB & set(file.relative_to(folder).parts)]
    texts = []
    for file in sorted(files, key=lambda file: file.relative_to(folder).as_posix()):
        try:
            with tokenize.open(file) as source:
                texts.append(source.read())
        except (OSError, SyntaxError, UnicodeDecodeError):
            continue  # a few sources are undecodable on purpose
    if not texts:
        raise UsageError(f"--data python-stdlib found no sources in {folder}; give a file, or python-manual")
    return "".join(texts)
