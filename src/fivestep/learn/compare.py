"""`fivestep compare`: what differs between runs: their configurations, what they were made with, their losses.

    run directories -> Side (what the files say) -> Comparison (what differs; losses at equal steps, tokens, seconds)

Owns the reading, the pairing and the words. A loss is read off a curve by linear interpolation between two rows, and
never beyond a run's first or last. Draws nothing (`curves.py`), trains nothing (`parting.py`); imports no torch, and
changes no run.
"""

import json
import math
from bisect import bisect_left
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from string import ascii_uppercase
from textwrap import wrap
from typing import Any

from fivestep.data.files import expanded, read_bounded
from fivestep.errors import UsageError, suggestion
from fivestep.run.config import parsed
from fivestep.run.metrics import TIMES, readable_rows
from fivestep.run.names import CONFIG, ENVIRONMENT, METRICS, printable
from fivestep.run.report import MOST, find_runs, is_run, summary
from fivestep.watch.table import number

Row = dict[str, Any]
AXES = ("step", "tokens", "samples", "seconds")
SPLITS = ("val", "train")
# Of environment.json, what other facts or the configuration say already.
TOLD_ELSEWHERE = ("platform", "cores", "settings", "token_files")
SAME_BITS = ("versions", "processor", "threads", "device")  # what equal bits can be asked of


@dataclass(frozen=True)
class Point:
    """A loss, and how far training was: steps, tokens, samples, seconds; what a row does not tell is left out."""

    loss: float
    at: dict[str, float]


@dataclass(frozen=True)
class Side:
    """One run, as its files tell. `config` and `facts` are empty where there is no file, or a damaged one."""

    letter: str
    path: str
    state: str  # finished, interrupted, ... as `fivestep runs` has it
    config: dict[str, Any]
    facts: dict[str, Any]
    curves: dict[str, list[Point]]  # by split
    best: Point | None
    notes: list[str] = field(default_factory=list)
    figures: list[str] = field(default_factory=list)  # of each row, without those that time decides

    @property
    def step(self) -> int | None:
        """The last step that a row tells of."""
        steps = [int(points[-1].at["step"]) for points in self.curves.values() if points]
        return max(steps, default=None)

    @property
    def seconds(self) -> float:
        """Of training, as the rows tell; 0 where none does."""
        return max((point.at.get("seconds", 0.0) for points in self.curves.values() for point in points), default=0.0)


@dataclass(frozen=True)
class Pair:
    """The losses of all runs at one place; differences are to the first."""

    split: str
    axis: str
    at: float
    losses: list[float]

    @property
    def differences(self) -> list[float]:
        """Each loss less the first run's."""
        return [loss - self.losses[0] for loss in self.losses]


@dataclass(frozen=True)
class Comparison:
    """What `fivestep compare` has found."""

    sides: list[Side]
    config: dict[str, list[Any]]  # option -> each run's value; only options that differ
    facts: dict[str, list[Any]]  # the same of environment.json
    pairs: list[Pair]
    notes: list[str]

    @property
    def equal(self) -> bool:
        """Whether all rows of all runs hold the same figures, those of time apart."""
        first = self.sides[0].figures
        return bool(first) and all(side.figures == first for side in self.sides)

    def as_json(self) -> dict[str, Any]:
        """For `--json`, which has no infinity and no NaN: null stands there."""
        return {
            "runs": [
                {
                    "run": side.path,
                    "state": side.state,
                    "step": side.step,
                    "best_val_loss": _finite(side.best.loss) if side.best else None,
                    "best_step": int(side.best.at["step"]) if side.best else None,
                }
                for side in self.sides
            ],
            "config": self.config,
            "environment": self.facts,
            "paired": [
                {
                    "split": pair.split,
                    "axis": pair.axis,
                    "at": pair.at,
                    "losses": [_finite(loss) for loss in pair.losses],
                    "differences": [_finite(loss) for loss in pair.differences],
                }
                for pair in self.pairs
            ],
            "equal": self.equal,
            "notes": self.notes,
        }


def compare(paths: Sequence[str | Path]) -> Comparison:
    """Compare the runs at `paths`. Raises UsageError for fewer than two, for one twice, and for what is no run."""
    if len(paths) < 2:
        raise UsageError("give two runs or more: fivestep compare runs/a runs/b")
    if len(paths) > len(ascii_uppercase):
        raise UsageError(f"{len(paths)} runs are more than a page can show; give {len(ascii_uppercase)} at most")
    places = [checked_run(path) for path in paths]
    for place in places:
        if sum(place.resolve() == other.resolve() for other in places) > 1:
            raise UsageError(f"{place} is given twice; a run does not differ from itself")
    sides = [read_side(letter, place) for letter, place in zip(ascii_uppercase, places, strict=False)]
    notes = [f"{side.letter}: {note}" for side in sides for note in side.notes]
    facts = differing([flat(side.facts) for side in sides])
    facts = {name: values for name, values in facts.items() if name.split(".")[0] not in TOLD_ELSEWHERE}
    return Comparison(
        sides=sides,
        config=differing([side.config for side in sides]),
        facts=facts,
        pairs=paired(sides),
        notes=[*notes, *cautions(sides, facts)],
    )


def checked_run(path: str | Path) -> Path:
    """The directory of a run. Raises UsageError with what else it may have been meant to be."""
    place = expanded(path)
    if is_run(place):
        return place
    if place.is_dir():
        inside = [run.path for run in find_runs(place)]
        if len(inside) > 1:
            raise UsageError(f"{path} is no run but holds some; give them: fivestep compare {' '.join(inside[:3])}")
        raise UsageError(f"{path} is no run's directory: it has no {METRICS}")
    names = [run.path for run in find_runs(place.parent)] if place.parent.is_dir() else []
    what = "is a file, and no run's directory" if place.is_file() else "does not exist"
    raise UsageError(f"{path} {what}{suggestion(str(place), names)}")


# --- what the files say ---


def read_side(letter: str, path: Path) -> Side:
    """What the files of the run at `path` say; what is missing or damaged is noted."""
    notes: list[str] = []
    config, facts = _table(path / CONFIG, parsed, notes), _table(path / ENVIRONMENT, json.loads, notes)
    try:
        rows = list(readable_rows(path / METRICS))
    except OSError as error:
        raise UsageError(f"cannot read {path / METRICS}: {error.strerror or error}") from error
    curves = {"train": training_curve(rows), "val": validation_curve(rows)}
    if not any(curves.values()):
        notes.append("it has no loss yet")
    elif not curves["val"]:
        notes.append("it was never validated")
    told = [point for point in curves["val"] if not math.isnan(point.loss)]
    return Side(
        letter=letter,
        path=printable(str(path)),
        state=summary(path).state,
        config={name: value for name, value in config.items() if name != "run_dir"},
        facts=facts,
        curves=curves,
        best=min(told, key=lambda point: point.loss, default=None),
        notes=notes,
        figures=[
            repr({name: value for name, value in row.items() if name not in TIMES})
            for row in rows
            if row.get("split") in SPLITS
        ],
    )


def _table(path: Path, parse: Callable[[str], Any], notes: list[str]) -> dict[str, Any]:
    """The table that a file holds; {} and a note where there is none."""
    try:
        if path.exists() and not path.is_file():  # reading a pipe would wait for ever
            raise ValueError("it is no file")
        value = parse(read_bounded(path, MOST).decode("utf-8"))
        if isinstance(value, dict):
            return value
        notes.append(f"its {path.name} holds no table, and is left out")
    except FileNotFoundError:
        notes.append(f"it has no {path.name}: a script made it, or nothing yet")
    except (OSError, ValueError, RecursionError):
        notes.append(f"its {path.name} is damaged, and is left out")
    return {}


def training_curve(rows: Sequence[Row]) -> list[Point]:
    """The means between rows, in the order of steps, each at the last of its steps.

    An epoch's own mean, where rows within the epoch have told its steps before, is no point of the curve.
    """
    points: dict[int, Point] = {}
    told = 0  # the step up to which rows have told
    for row in _losses(rows, "train"):
        covers = row.get("steps")
        if row["step"] > told and (type(covers) is not int or row["step"] - covers >= told):
            told = row["step"]
            points[told] = _point(row, row)
    return list(points.values())


def validation_curve(rows: Sequence[Row]) -> list[Point]:
    """The validations in the order of steps; tokens and samples are those of the training row of the same step."""
    beside = {row["step"]: row for row in _losses(rows, "train")}
    found = {row["step"]: _point(row, beside.get(row["step"], {})) for row in _losses(rows, "val")}
    return [found[step] for step in sorted(found)]


def _losses(rows: Sequence[Row], split: str) -> list[Row]:
    """The rows of a split that tell a loss and a step."""
    return [
        row
        for row in rows
        if row.get("split") == split and type(row.get("step")) is int and type(row.get("loss")) in (int, float)
    ]


def _point(row: Row, amounts: Row) -> Point:
    told = {"step": row["step"], "seconds": row.get("elapsed_seconds")}
    told |= {name: amounts.get(name) for name in ("tokens", "samples")}
    at = {name: float(value) for name, value in told.items() if type(value) in (int, float) and math.isfinite(value)}
    return Point(float(row["loss"]), at)


# --- what differs ---


def differing(tables: Sequence[Mapping[str, Any]]) -> dict[str, list[Any]]:
    """name -> its value in each table (None where it is not in it), for the names whose values are not all equal.

    A table that is empty, because there is no file, takes no part.
    """
    there = [table for table in tables if table]
    names = dict.fromkeys(name for table in there for name in table)
    return {
        name: [table.get(name) for table in tables]
        for name in names
        if any(table.get(name) != there[0].get(name) for table in there)
    }


def flat(table: Mapping[str, Any], before: str = "") -> dict[str, Any]:
    """`{"versions": {"torch": "2.13"}}` -> `{"versions.torch": "2.13"}`."""
    found: dict[str, Any] = {}
    for name, value in table.items():
        found |= flat(value, f"{before}{name}.") if isinstance(value, dict) else {f"{before}{name}": value}
    return found


def cautions(sides: Sequence[Side], facts: Mapping[str, Any]) -> list[str]:
    """What the figures do not say by themselves."""
    found = []
    if "tokenizer_sha256" in facts:
        found.append("the tokenizers differ: losses are per token, and tokens are not the same")
    if "data_sha256" in facts or "data" in facts:
        found.append("the data differ: losses are of other targets")
    if any(name.split(".")[0] in SAME_BITS for name in facts):
        found.append("versions, processor, threads or device differ: equal bits are not to be expected")
    spacing = [_spacing(side.curves["train"]) for side in sides]
    if len({round(one) for one in spacing if one}) > 1:
        found.append(
            "training losses are means over the steps since the row before, and rows are not equally far apart"
        )
    return found


def _spacing(points: Sequence[Point]) -> float | None:
    """Steps between two rows, in the middle of the run."""
    gaps = sorted(after.at["step"] - before.at["step"] for before, after in pairwise(points))
    return gaps[len(gaps) // 2] if gaps else None


# --- losses at equal places ---


def paired(sides: Sequence[Side]) -> list[Pair]:
    """For each split and axis the losses at the last place that every run has reached, if there is one."""
    found = []
    for split in SPLITS:
        for axis in AXES:
            curves = [along(side.curves[split], axis) for side in sides]
            if (at := last_common(curves)) is not None:
                found.append(Pair(split, axis, at, [interpolated(curve, at) for curve in curves]))
    return found


def along(points: Sequence[Point], axis: str) -> list[tuple[float, float]]:
    """(place, loss) of the points that know their place; places only grow."""
    found: list[tuple[float, float]] = []
    for point in points:
        if axis in point.at and (not found or point.at[axis] > found[-1][0]):
            found.append((point.at[axis], point.loss))
    return found


def last_common(curves: Sequence[Sequence[tuple[float, float]]]) -> float | None:
    """The last place within all curves; None where they have none in common."""
    if not all(curves):
        return None
    at = min(curve[-1][0] for curve in curves)
    return at if at >= max(curve[0][0] for curve in curves) else None


def interpolated(curve: Sequence[tuple[float, float]], at: float) -> float:
    """The loss at a place within the curve: a row's own, or on the line between its neighbours."""
    index = bisect_left(curve, at, key=lambda place: place[0])
    (after, loss) = curve[index]
    if after == at:
        return loss
    (before, earlier) = curve[index - 1]
    return earlier + (loss - earlier) * (at - before) / (after - before)


# --- in words ---


def in_lines(found: Comparison, width: int | None) -> list[str]:
    """The comparison for a person; values are cut where a terminal of `width` columns has no room."""
    sides = found.sides
    lines = table([["", "run", "state", "steps", "best val"], *map(_headline, sides)], width)
    titles = [side.letter for side in sides]
    for title, part in (("configuration", found.config), ("made with", found.facts)):
        if part:
            rows = [[name, *(shown(value) for value in values)] for name, values in part.items()]
            lines += ["", *table([[title, *titles], *rows], width)]
        else:
            known = sum(bool(side.config if title == "configuration" else side.facts) for side in sides)
            lines += ["", f"{title}: {'the same' if known > 1 else 'not known of two runs'}"]
    if found.equal:
        took = ", ".join(f"{side.letter} {side.seconds:,.4g} s" for side in sides)
        equal = f"all figures of all rows are equal ({len(sides[0].figures):,})"
        lines += ["", *_wrapped(f"{equal}; only time differs: {took}", width)]
    pairs = [pair for pair in found.pairs if not (found.equal and pair.axis == "seconds")]
    if pairs:
        rows = [[_place(pair), number(pair.losses[0]), *_beside(pair)] for pair in pairs]
        header = ["loss", titles[0], *(cell for title in titles[1:] for cell in (title, f"{title} - {titles[0]}"))]
        lines += ["", *table([header, *rows], width)]
    else:
        lines += ["", "losses cannot be compared: no step lies within the rows of every run"]
    notes = [line for note in found.notes for line in _wrapped(note, width)]
    return [*lines, *([""] if notes else []), *notes]


def _wrapped(text: str, width: int | None) -> list[str]:
    return [text] if width is None else wrap(text, width)


def _headline(side: Side) -> list[str]:
    best = "-" if side.best is None else f"{number(side.best.loss)} at step {side.best.at['step']:,.0f}"
    return [side.letter, side.path, side.state, "-" if side.step is None else f"{side.step:,}", best]


def _place(pair: Pair) -> str:
    if pair.axis == "seconds":
        return f"{pair.split} after {pair.at:,.4g} s"
    return f"{pair.split} {'at step' if pair.axis == 'step' else 'after'} {pair.at:,.0f}" + (
        "" if pair.axis == "step" else f" {pair.axis}"
    )


def _beside(pair: Pair) -> list[str]:
    cells = []
    for loss, difference in zip(pair.losses[1:], pair.differences[1:], strict=True):
        cells += [number(loss), "0, equal" if loss == pair.losses[0] else f"{difference:+.4g}"]
    return cells


def shown(value: Any) -> str:
    """A value of a configuration or a fact; `-` where it is not set. A digest by its beginning."""
    if value is None:
        return "-"
    if isinstance(value, list):
        return " ".join(map(shown, value)) or "none"
    if isinstance(value, bool):
        return str(value).lower()
    text = printable(str(value))
    digest = len(text) in (40, 41, 64) and not set(text.rstrip("+")) - set("0123456789abcdef")
    return f"{text[:12]}..." if digest else text


def table(rows: Sequence[Sequence[str]], width: int | None) -> list[str]:
    """Rows in columns; where `width` has no room, the longest cells are cut in their middle."""
    longest = max(len(cell) for row in rows for cell in row)
    for most in range(longest, 7, -1):
        cut = [[_cut(cell, most) for cell in row] for row in rows]
        columns = [max(map(len, column)) for column in zip(*cut, strict=True)]
        if width is None or sum(columns) + 2 * (len(columns) - 1) <= width:
            break
    lines = ["  ".join(cell.ljust(room) for cell, room in zip(row, columns, strict=True)).rstrip() for row in cut]
    return lines if width is None else [line[:width] for line in lines]


def _cut(text: str, most: int) -> str:
    """A path says most at its end, so the end stays."""
    return text if len(text) <= most else f"{text[: most // 3 - 1]}...{text[-(most - most // 3 - 2) :]}"


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
