"""The bigram of seed 002, whole processes: `fivestep train bigram` beside the script written by hand.

    python -m benchmarks.bigram

Both read tinyshakespeare and make 10,000 iterations of 32 windows of 8 characters with AdamW at 3e-4. fivestep also
validates four times, keeps checkpoints and metrics, and writes a sample; the script prints its loss at the end.

cold: every cache is an empty folder, as in a first run. The default takes eager steps; beside it stand a cold
`--graph off` and a cold `--graph on`, which compiles. warm: with `--graph on`, the step compiled by an earlier run.
The steady step is that of warm runs, and leaves out the first quarter.
"""

import json
import shutil
import sys
import tempfile
from functools import partial
from pathlib import Path

from benchmarks.measure import (
    ROOT,
    Figure,
    add_options,
    add_text,
    alternate,
    figure,
    fivestep,
    parsed,
    process_seconds,
    report,
    rows_of,
    shakespeare_for,
)

SCRIPT = ROOT / "benchmarks" / "plain" / "bigram.py"


def measure(text: Path, iterations: int, repeats: int, compiled: bool = True) -> list[Figure]:
    """Return the figures of this file. Not `compiled`: without the runs that compile, for a quick look."""
    steady: dict[str, list[float]] = {"ours": [], "plain": []}
    losses: dict[str, list[float]] = {"ours": [], "plain": []}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        caches = caches_in(folder / "warm")
        run = folder / "run"
        train = fivestep("train", "bigram", "--data", text, "--run-dir", run, "--max-iters", iterations)
        train += ["--eval-every", str(max(1, iterations // 4))]
        graph = ["--graph", "on"] if compiled else []

        def ours() -> float:
            shutil.rmtree(run, ignore_errors=True)
            seconds = process_seconds([*train, *graph], caches)
            rows = [row for row in rows_of(run) if row["split"] == "train"]
            first, last = rows[0], rows[-1]
            steady["ours"].append(
                (last["elapsed_seconds"] - first["elapsed_seconds"]) / (last["step"] - first["step"])
            )
            losses["ours"].append([row for row in rows_of(run) if row["split"] == "val"][-1]["loss"])
            return seconds

        def plain() -> float:
            told = folder / "told"
            command = [sys.executable, str(SCRIPT), str(text), str(iterations)]
            seconds = process_seconds(command, caches, written=told)
            facts = json.loads(told.read_text())
            steady["plain"].append(facts["seconds_per_step"])
            losses["plain"].append(facts["val_loss"])
            return seconds

        def cold(*flags: str) -> float:
            shutil.rmtree(run, ignore_errors=True)
            shutil.rmtree(folder / "cold", ignore_errors=True)
            return process_seconds([*train, *flags], caches_in(folder / "cold"))

        ways = {"plain": plain, "ours": ours, "cold": cold, "cold off": partial(cold, "--graph", "off")}
        if compiled:
            ways["cold on"] = partial(cold, "--graph", "on")
            process_seconds([*train, "--graph", "on"], caches)
            shutil.rmtree(run)
        found = alternate(ways, repeats)
    first = "`fivestep train bigram`, whole process, cold"
    return [
        figure(first, found["cold"], "s", against=found["plain"], target=0.75),
        figure(f"{first}, beside a cold `--graph off`", found["cold"], "s", against=found["cold off"], target=1.05),
        *(
            [figure("the same with `--graph on`, cold", found["cold on"], "s", against=found["plain"])]
            if compiled
            else []
        ),
        figure("the same with `--graph on`, warm", found["ours"], "s", against=found["plain"], target=0.5),
        figure("its steady step", steady["ours"], "µs", against=steady["plain"], target=0.3, scale=1e6),
        figure("validation loss after it", losses["ours"], "nats"),
        figure("validation loss after the script", losses["plain"], "nats"),
    ]


def caches_in(folder: Path) -> dict[str, str]:
    """Every cache that a run has, in `folder`."""
    return {"FIVESTEP_CACHE": str(folder / "fivestep"), "TORCHINDUCTOR_CACHE_DIR": str(folder / "inductor")}


def main() -> None:
    """Measure, and print."""
    parser = add_options(__doc__, repeats=4, quick=1)
    add_text(parser)
    options = parsed(parser)
    text = shakespeare_for(options, "`fivestep train bigram`")
    if text is None:
        return
    if options.quick:
        report(options, measure(text, 40, options.repeats, compiled=False))
    else:
        report(options, measure(text, 10_000, options.repeats))


if __name__ == "__main__":
    main()
