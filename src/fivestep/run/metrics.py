"""metrics.jsonl: one JSON object a line, appended as it is known.

Owns the file; what is in a row is `fitting.py`'s. Each line is strict JSON (`strict_json.py`).
"""

import os
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from fivestep.run.strict_json import dumps, loads

MOST_ROW = 1 << 20  # bytes of a line: more is none of ours
TIMES = {"elapsed_seconds", "samples_per_second", "tokens_per_second", "waiting_share"}  # of a row: what time decides


def append_rows(path: Path, rows: Iterable[dict[str, Any]]) -> int:
    """Append `rows`, all or none, in whole lines; returns the size of the file. Raises OSError."""
    text = "".join(dumps(row) + "\n" for row in rows).encode()
    file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | getattr(os, "O_BINARY", 0), 0o666)
    try:
        size = os.fstat(file).st_size
        try:
            left = memoryview(text)
            while left:
                left = left[os.write(file, left) :]
        except OSError:
            with suppress(OSError):
                os.ftruncate(file, size)
            raise
        return size + len(text)
    finally:
        os.close(file)


def sync_rows(path: Path) -> None:
    """Make what was appended durable. Raises OSError."""
    file = os.open(path, os.O_RDONLY)
    try:
        os.fsync(file)
    finally:
        os.close(file)


def cut_rows(path: Path, size: int) -> int:
    """Cut the file to `size` bytes; returns how many it has then: fewer where it was shorter. Raises OSError."""
    if not path.exists():
        return 0
    now = path.stat().st_size
    with path.open("rb") as file:
        kept = min(now, size)
        if kept:
            file.seek(max(0, kept - MOST_ROW))
            tail = file.read(kept - file.tell())
            kept -= len(tail) - (tail.rfind(b"\n") + 1)  # of a line that is cut nothing can be read
    if now > kept:
        os.truncate(path, kept)
    return kept


def readable_rows(path: Path) -> Iterator[dict[str, Any]]:
    """The rows of a metrics file that may be damaged, or whose last line is just being written."""
    with path.open("rb") as file:
        while line := file.readline(MOST_ROW):
            try:
                row = loads(line)
            except (ValueError, RecursionError):
                continue
            if isinstance(row, dict):
                yield row


def known_rows(path: Path) -> tuple[list[dict[str, Any]], int]:
    """The rows with step, epoch and split, or of events; and how many lines are neither. Raises OSError."""
    rows = list(readable_rows(path))
    sound = [row for row in rows if _is_row(row)]
    with path.open("rb") as file:
        lines = sum(1 for line in file if line.strip())
    return sound, lines - len(sound)


def _is_row(row: dict[str, Any]) -> bool:
    figures = isinstance(row.get("split"), str) and type(row.get("epoch")) is int
    return type(row.get("step")) is int and (figures or isinstance(row.get("event"), str))


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Every row of a metrics file."""
    return [loads(line) for line in path.read_text("utf-8").splitlines()]
