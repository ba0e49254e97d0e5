"""All runs of a directory in a table: what each is, how far it came, how it ended, and what is next.

Owns the reading of run directories from outside, damaged and foreign ones among them: nothing in one may stop the
report of the others. Imports no torch and changes nothing.
"""

import json
import math
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from fivestep.data.files import expanded, read_bounded
from fivestep.errors import UsageError, suggestion
from fivestep.run.config import parsed
from fivestep.run.metrics import readable_rows
from fivestep.run.names import CONFIG, ENVIRONMENT, METRICS, SAVED, TOKENIZER, printable, shell_word
from fivestep.run.running import running

MOST = 1 << 18  # bytes of a table: more is none of ours

SCRIPT = "run its script again"  # a fs.Run goes on by itself


@dataclass(frozen=True)
class Summary:
    """A run, as far as its directory tells; None for what it does not."""

    path: str
    recipe: str | None
    model: str | None
    parameters: int | None
    step: int | None
    epoch: int | None
    best_val_loss: float | None
    best_step: int | None
    state: str  # running, finished, interrupted, non-finite, killed, unknown, damaged, empty
    when: str  # of its last row, local time: 2026-01-31 12:34
    next: str  # the command for it: to go on where it was stopped, else to use it; or SCRIPT

    def as_json(self) -> dict[str, Any]:
        """For `--json`."""
        return asdict(self)


def find_runs(folder: str | Path) -> list[Summary]:
    """Every run in `folder`, or `folder` itself where it is one; the latest is the last. Raises UsageError."""
    folder = expanded(folder)
    if is_run(folder):
        return [summary(folder)]
    try:
        entries = sorted(folder.iterdir())
    except FileNotFoundError:
        hint = suggestion(folder.name, [entry.name for entry in _entries(folder.parent)])
        raise UsageError(f"{folder} does not exist{hint}") from None
    except OSError as error:
        raise UsageError(f"cannot read {folder}: {error.strerror or error}") from error
    return sorted((summary(entry) for entry in entries if is_run(entry)), key=lambda run: (run.when, run.path))


def is_run(path: Path) -> bool:
    """Whether `path` looks like a run's directory."""
    try:
        return (path / METRICS).is_file()
    except OSError:
        return False


def made_from_python(path: Path) -> bool:
    """Whether `path` holds a run of a script: rows or checkpoints, and no configuration.

    A killed `fivestep train` may leave an empty metrics file and no configuration.
    """
    if (path / CONFIG).exists():
        return False
    return (is_run(path) and (path / METRICS).stat().st_size > 0) or bool(saved_steps(path))


def summary(path: Path) -> Summary:
    """What the files of a run say."""
    config, environment = _read(path / CONFIG, parsed), _read(path / ENVIRONMENT, json.loads)
    try:
        rows = list(readable_rows(path / METRICS))
        when = datetime.fromtimestamp((path / METRICS).stat().st_mtime).strftime("%Y-%m-%d %H:%M")
    except (OSError, ValueError, OverflowError):
        rows, when, config = [], "", None
    made = [row for row in rows if row.get("split") != "test" and row.get("event") != "skipped"]  # no update: no step
    steps = [_number(row.get("step")) for row in made] + saved_steps(path)
    epochs = [epoch for row in made if (epoch := _number(row.get("epoch"))) is not None]
    losses = [(row.get("loss"), _number(row.get("step"))) for row in rows if row.get("split") == "val"]
    numbers = [(loss if isinstance(loss, float) else _number(loss), step) for loss, step in losses]
    finite = [(loss, step) for loss, step in numbers if loss is not None and not math.isnan(loss)]
    best = min(finite, key=lambda pair: pair[0], default=(None, None))
    half = (path / CONFIG).exists() and not (config and environment)  # `fivestep train` writes both
    state = _state(path, rows, half or None in (config, environment))
    described = config or {}
    return Summary(
        path=str(path).encode("utf-8", "replace").decode(),
        recipe=_text(described.get("recipe")),
        model=_text(described.get("model")),
        parameters=_number((environment or {}).get("parameters")),
        step=max((step for step in steps if step is not None), default=None),
        epoch=max(epochs, default=None),
        best_val_loss=best[0],
        best_step=best[1],
        state=state,
        when=when,
        next=_next(path, state),
    )


def saved_steps(path: Path) -> list[int]:
    """Return the steps of the checkpoints that are there, by their names."""
    names = [entry.name.split("-") for entry in _entries(path / "checkpoints") if entry.name.startswith("step-")]
    return [int(name[1]) for name in names if name[1].isdecimal() and len(name[1]) <= 18]


def _state(path: Path, rows: list[dict[str, Any]], damaged: bool) -> str:
    now = running(path)
    if now in ("running", "unknown"):
        return now
    if damaged:
        return "damaged"
    if now is not None:
        return now
    if not rows and not any((path / "checkpoints").glob("step-*")):
        return "empty"  # it ended before its first step
    events = [row["event"] for row in rows if isinstance(row.get("event"), str)]
    return {"interrupted": "interrupted", "nonfinite": "non-finite"}.get(events[-1] if events else "", "finished")


def _next(path: Path, state: str) -> str:
    name = shell_word(path)
    if state in ("running", "unknown", "damaged"):
        return ""
    stopped = state in ("interrupted", "killed")
    if not (path / CONFIG).is_file():  # a fs.Run of someone's own: only their script knows the model
        return SCRIPT if stopped else ""
    if stopped:
        return f"fivestep resume {name}"
    if not any(path.glob(SAVED)):
        return f"fivestep train {name}/{CONFIG}"
    verb = "sample" if (path / TOKENIZER).is_file() else "eval"
    return f"fivestep {verb} {name}"


def _entries(folder: Path) -> list[Path]:
    try:
        return list(folder.iterdir())
    except OSError:
        return []


def _read(path: Path, parse: Any) -> dict[str, Any] | None:
    """The table that a file holds: {} where there is no file, None where it is damaged."""
    if path.exists() and not path.is_file():  # reading a pipe would wait for ever
        return None
    try:
        value = parse(read_bounded(path, MOST).decode("utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def _number(value: Any) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) and abs(value) < 1 << 63 else None


def _text(value: Any) -> str | None:
    return value if isinstance(value, str) and value.isprintable() else None


# --- as a table ---

RIGHT = {"params", "step", "epoch", "best val", "at step"}
DISPENSABLE = ("next", "recipe", "model", "epoch", "at step", "params", "when", "step")  # in a narrow terminal


def report(runs: list[Summary], folder: Path, width: int | None) -> str:
    """The table of `runs`, and the command for the latest where the table has no room for commands."""
    if not runs:
        return f"no runs in {printable(str(folder))} yet; fivestep train makes one"
    shown = table(runs, width)
    latest = next((run for run in reversed(runs) if run.next), None)
    return shown if latest is None or latest.next in shown else f"{shown}\n\nnext, with the latest: {latest.next}"


def table(runs: list[Summary], width: int | None) -> str:
    """A line a run under titles, the columns that fit `width` (None: all)."""
    columns = _columns(runs)
    for title in DISPENSABLE:
        if width is None or sum(map(_width, columns.items())) + 2 * (len(columns) - 1) <= width:
            break
        del columns[title]
    lines = []
    for index in range(-1, len(runs)):
        cells = []
        for title, texts in columns.items():
            text, room = title if index < 0 else texts[index], _width((title, texts))
            cells.append(text.rjust(room) if title in RIGHT else text.ljust(room))
        lines.append("  ".join(cells).rstrip())
    return "\n".join(line if width is None else line[:width] for line in lines)


def _columns(runs: list[Summary]) -> dict[str, list[str]]:
    return {
        "run": [printable(run.path) for run in runs],
        "recipe": [run.recipe or "-" for run in runs],
        "model": [run.model or "-" for run in runs],
        "params": [_shown(run.parameters) for run in runs],
        "step": [_shown(run.step) for run in runs],
        "epoch": [_shown(run.epoch) for run in runs],
        "best val": ["-" if run.best_val_loss is None else f"{run.best_val_loss:.4f}" for run in runs],
        "at step": [_shown(run.best_step) for run in runs],
        "state": [run.state for run in runs],
        "when": [run.when for run in runs],
        "next": [run.next for run in runs],
    }


def _shown(value: int | None) -> str:
    return "-" if value is None else f"{value:,}" if abs(value) < 10**15 else f"{value:.3g}"


def _width(column: tuple[str, list[str]]) -> int:
    return max(len(column[0]), *map(len, column[1]))
