"""metrics.jsonl: one JSON object a line, appended as it is known.

Owns the file; what is in a row is `fitting.py`'s. NaN and Infinity are written as Python's json writes them.
"""

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any


def append_rows(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    """Append `rows` and hand them to the system, so that another process sees whole lines."""
    text = "".join(json.dumps(row) + "\n" for row in rows)
    if text:
        with path.open("a", encoding="utf-8") as file:
            file.write(text)


def readable_rows(path: Path) -> Iterator[dict[str, Any]]:
    """The rows of a metrics file that may be damaged, or whose last line is just being written."""
    with path.open(encoding="utf-8", errors="replace") as file:
        for line in file:
            try:
                row = json.loads(line)
            except (ValueError, RecursionError):
                continue
            if isinstance(row, dict):
                yield row


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Every row of a metrics file."""
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]
