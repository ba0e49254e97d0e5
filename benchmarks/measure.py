"""What the benchmarks share: options, timing with alternating repeats, the table, the environment.

A figure is a dict, and `--json` prints a list of them:

    name, unit    what was measured
    value         the median over the repeats, in `unit`
    baseline      the median of what it is compared with, in the same unit; None where there is nothing
    ratio         the median of value / baseline, each pair from the same repeat; None without a baseline
    repeats       how often it was measured
    spread        [least, most] of the ratios, or of the values where there is no ratio
    target        the bound that the project holds itself to: of the ratio, at most; without a ratio of the value: at
                  least where the unit is a rate ("MB/s"), at most otherwise. None where there is none
    skipped       only where it could not be measured: a sentence that says why

`add_options` gives every script the same flags, `report` prints what it found.
"""

import argparse
import gc
import json
import os
import platform
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import wraps
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from statistics import median
from time import perf_counter, process_time
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("torch", "numpy", "lightning", "accelerate", "transformers", "pytorch-ignite")
Figure = dict[str, Any]


def add_options(description: str | None, *, repeats: int, quick: int = 2) -> argparse.ArgumentParser:
    """A parser with the flags of every benchmark; `repeats` is the default, `quick` what a smoke test takes."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print the figures as JSON, and nothing else")
    parser.add_argument("--quick", action="store_true", help="a smoke test: tiny sizes, figures that mean nothing")
    parser.add_argument("--repeats", type=int, default=None, help=f"alternating repeats  [{repeats}]")
    parser.set_defaults(usual_repeats=repeats, quick_repeats=quick)
    return parser


def parsed(parser: argparse.ArgumentParser, arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The options; `repeats` is filled in."""
    options = parser.parse_args(arguments)
    options.repeats = options.repeats or (options.quick_repeats if options.quick else options.usual_repeats)
    return options


def add_text(parser: argparse.ArgumentParser) -> None:
    """The flag `--texts`: the folder of the texts to measure on."""
    usual = os.environ.get("FIVESTEP_TEXTS", ROOT.parent / "shared" / "data")
    parser.add_argument("--texts", type=Path, default=usual, help="a folder with tinyshakespeare/input.txt")


def shakespeare(texts: Path) -> Path | None:
    """tinyshakespeare in the folder of texts; None where it is not there."""
    path = Path(texts) / "tinyshakespeare" / "input.txt"
    return path.resolve() if path.is_file() else None


def shakespeare_for(options: argparse.Namespace, what: str) -> Path | None:
    """The same, for a benchmark of `what` alone; where it is missing, that is reported."""
    text = shakespeare(options.texts)
    if text is None:
        report(options, [skipped(what, f"there is no tinyshakespeare in {options.texts}")])
    return text


def alternate(contestants: Mapping[str, Callable[[], float]], repeats: int) -> dict[str, list[float]]:
    """What each contestant returns (seconds), `repeats` times, in turns, each repeat beginning with the next one.

    A machine whose speed drifts slows them all alike, so that ratios within a repeat hold.
    """
    names, found = list(contestants), {name: [] for name in contestants}
    for repeat in range(repeats):
        turn = repeat % len(names)
        for name in names[turn:] + names[:turn]:
            gc.collect()
            found[name].append(contestants[name]())
    return found


def figure(
    name: str,
    values: Sequence[float],
    unit: str,
    *,
    against: Sequence[float] | None = None,
    target: float | None = None,
    scale: float = 1.0,
) -> Figure:
    """A figure of `values` (times `scale`, to make `unit`), each against the one of `against` in the same repeat."""
    ratios = None if against is None else [a / b for a, b in zip(values, against, strict=True)]
    spread = ratios or [value * scale for value in values]
    return {
        "name": name,
        "value": median(values) * scale,
        "unit": unit,
        "baseline": None if against is None else median(against) * scale,
        "ratio": None if ratios is None else median(ratios),
        "repeats": len(values),
        "spread": [min(spread), max(spread)],
        "target": target,
    }


def skipped(name: str, why: str) -> Figure:
    """A figure that could not be measured, and why."""
    return {"name": name, "skipped": why}


def met(one: Figure) -> bool | None:
    """Whether a figure keeps its target; None where it has none."""
    if one.get("target") is None or "skipped" in one:
        return None
    if one.get("ratio") is not None:
        return bool(one["ratio"] <= one["target"])
    if one["unit"].endswith("/s"):
        return bool(one["value"] >= one["target"])
    return bool(one["value"] <= one["target"])


# --- timing ---
def now() -> float:
    """Seconds by the wall; by this process's own use of the cores, after `use_cpu_time`."""
    return _clock()


_clock = perf_counter


def add_cpu_time(parser: argparse.ArgumentParser) -> None:
    """The flag `--cpu-time`, for a machine that others use too."""
    parser.add_argument(
        "--cpu-time", action="store_true", help="count this process's CPU seconds: for a busy machine, not for pages"
    )


def use_cpu_time() -> None:
    """From here on, time that other processes take does not count."""
    global _clock
    _clock = process_time


def stamped(model: Any) -> list[float]:
    """The times at which `model` is called from now on, as a list that grows: the same small cost for everybody."""
    stamps: list[float] = []
    forward, clock = model.forward, _clock

    @wraps(forward)
    def noting(*arguments: Any, **named: Any) -> Any:
        stamps.append(clock())
        return forward(*arguments, **named)

    model.forward = noting
    return stamps


def per_step(stamps: Sequence[float], warm: int, steps: int) -> float:
    """Seconds a step, from the start of step `warm` to that of the last of `steps`."""
    return (stamps[steps - 1] - stamps[warm]) / (steps - 1 - warm)


def process_seconds(
    command: Sequence[str], environment: Mapping[str, str] | None = None, written: Path | str = os.devnull
) -> float:
    """Seconds from a process's start to its end; what it prints goes to `written`. Raises CalledProcessError."""
    with Path(written).open("w") as out:
        begun = perf_counter()
        subprocess.run(list(command), stdout=out, env=child(environment), check=True)
        return perf_counter() - begun


def rows_of(run: Path) -> list[dict[str, Any]]:
    """The whole lines of a run's metrics so far; events, which are no rows of a split, left out."""
    try:
        text = (run / "metrics.jsonl").read_text("utf-8")
    except OSError:
        return []
    rows = [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]
    return [row for row in rows if "loss" in row]


def child(environment: Mapping[str, str] | None = None) -> dict[str, str]:
    """The environment of a child process, which imports the same fivestep."""
    source = [str(ROOT / "src"), os.environ.get("PYTHONPATH", "")]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, source)), **(environment or {})}


def fivestep(*arguments: object) -> list[str]:
    """The command `fivestep ARGUMENTS`, as installed beside this Python where it is, with the same start-up."""
    return [sys.executable, "-m", "fivestep", *map(str, arguments)]


# --- what is told ---
def environment(threads: int | None = None) -> dict[str, Any]:
    """Hardware and versions, without importing anything heavy."""
    commit = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True)
    return {
        "processor": processor(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": threads or os.environ.get("OMP_NUM_THREADS") or "torch's choice",
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "python": platform.python_version(),
        "packages": {name: found for name in PACKAGES if (found := installed(name))},
        "fivestep": f"{installed('fivestep') or ''} {commit.stdout.strip()}".strip(),
    }


def processor() -> str:
    """The processor's name, as Linux tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.split(": ", 1)[1] for line in lines if line.startswith("model name")), platform.machine())


def installed(package: str) -> str | None:
    """The version of a package; None where it is not installed."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def report(options: argparse.Namespace, figures: Sequence[Figure]) -> None:
    """Print the figures: as JSON, or as a table below a line on the machine."""
    if options.json:
        print(json.dumps(list(figures), indent=1))
        return
    machine = environment()
    print(f"{machine['processor']}, {machine['cores']} cores, Python {machine['python']}, torch {installed('torch')}")
    print("\n".join(table(figures)))


def table(figures: Sequence[Figure]) -> list[str]:
    """The lines of a Markdown table, which reads well in a terminal too."""
    rows = [("what", "measured", "baseline", "ratio", "least to most", "runs", "target", ""), *map(cells, figures)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = ["| " + " | ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)) + " |" for row in rows]
    return [lines[0], "|" + "|".join("-" * (width + 2) for width in widths) + "|", *lines[1:]]


def cells(one: Figure) -> tuple[str, ...]:
    """A figure as the cells of a row."""
    if "skipped" in one:
        return (one["name"], f"not measured: {one['skipped']}", "", "", "", "", "", "")
    ratio, unit, target = one.get("ratio"), one["unit"], one.get("target")
    least, most = (short(bound) for bound in one["spread"])
    bound = ""
    if target is not None:
        rate = ratio is None and unit.endswith("/s")
        bound = f"at {'least' if rate else 'most'} {short(target)}{'×' if ratio is not None else ' ' + unit}"
    return (
        one["name"],
        f"{short(one['value'])} {unit}",
        "" if one.get("baseline") is None else f"{short(one['baseline'])} {unit}",
        "" if ratio is None else f"{short(ratio)}×",
        f"{least} to {most}",
        str(one["repeats"]),
        bound,
        {None: "", True: "met", False: "**missed**"}[met(one)],
    )


def short(number: float) -> str:
    """Three digits that count, more before the point."""
    if number == 0 or abs(number) >= 100:
        return f"{number:,.0f}"
    decimals = 2 if abs(number) >= 1 else 3
    return f"{number:.{decimals}f}"
