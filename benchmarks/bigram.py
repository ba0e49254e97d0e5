"""The bigram of seed 002, whole processes: `fivestep train bigram` beside the script written by hand.

    python -m benchmarks.bigram

Both read tinyshakespeare and make 10,000 iterations of 32 windows of 8 characters with AdamW at 3e-4. fivestep also
validates four times, keeps checkpoints and metrics, and writes a sample; the script prints its loss at the end. One
run of fivestep comes before, so that caches are warm, and is not measured. The steady step leaves out the first
quarter.
"""

import json
import shutil
import sys
import tempfile
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


def measure(text: Path, iterations: int, repeats: int, warming: int = 1) -> list[Figure]:
    """The figures of this file."""
    steady: dict[str, list[float]] = {"ours": [], "plain": []}
    losses: dict[str, list[float]] = {"ours": [], "plain": []}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        caches = {"FIVESTEP_CACHE": str(folder / "cache")}
        run = folder / "run"
        train = fivestep("train", "bigram", "--data", text, "--run-dir", run, "--max-iters", iterations)
        train += ["--eval-every", str(max(1, iterations // 4))]

        def ours() -> float:
            shutil.rmtree(run, ignore_errors=True)
            seconds = process_seconds(train, caches)
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

        for _ in range(warming):
            process_seconds(train, caches)
        found = alternate({"plain": plain, "ours": ours}, repeats)
    return [
        figure("`fivestep train bigram`, whole process", found["ours"], "s", against=found["plain"], target=0.5),
        figure("its steady step", steady["ours"], "µs", against=steady["plain"], target=0.3, scale=1e6),
        figure("validation loss after it", losses["ours"], "nats"),
        figure("validation loss after the script", losses["plain"], "nats"),
    ]


def main() -> None:
    """Measure, and print."""
    parser = add_options(__doc__, repeats=4, quick=1)
    add_text(parser)
    options = parsed(parser)
    text = shakespeare_for(options, "`fivestep train bigram`")
    if text is None:
        return
    if options.quick:
        report(options, measure(text, 40, options.repeats, warming=0))
    else:
        report(options, measure(text, 10_000, options.repeats))


if __name__ == "__main__":
    main()
