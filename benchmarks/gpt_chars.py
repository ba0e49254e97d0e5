"""`fivestep train gpt-chars` beside nanoGPT's CPU settings in a loop written by hand, on tinyshakespeare.

    python -m benchmarks.gpt_chars [--others]

How soon a validation loss of 1.88 nats is reached, about where the hand-written loop ends after its 2,000 iterations;
and what is reached in the time of these. Ours counts from the start of the process, validations included, until the
figure stands in metrics.jsonl; theirs is the time of the iterations alone, without start-up and validation. Every
loss is over the whole validation split, in windows of 64 that do not overlap, and training sees none of it. "Cold" is
the first run, with empty caches. `--others` trains on three texts that no setting was chosen on, with the same flags:
the losses of both, and the seconds of both trainings, without start-up and validation.
"""

import json
import signal
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean
from time import perf_counter, sleep
from typing import Any

from benchmarks.measure import (
    ROOT,
    Figure,
    add_options,
    add_text,
    alternate,
    child,
    figure,
    fivestep,
    parsed,
    process_seconds,
    report,
    rows_of,
    shakespeare_for,
    skipped,
)
from fivestep.data.corpus import load_corpus
from fivestep.data.sources import BUILTINS

SCRIPT = ROOT / "benchmarks" / "plain" / "gpt.py"
TARGET = 1.88  # nats
# Flags beside the recipe's own, chosen on this text: on the way to the target, where the rate ends at 0 and one
# validation is enough, and for the loss in the hand-written loop's time.
TO_TARGET = ("--precision", "bf16", "--max-iters", "45", "--eval-every", "45", "--warmup-iters", "5")
IN_TIME = (
    *("--precision", "bf16", "--max-iters", "950", "--eval-every", "475", "--n-layer", "4", "--ngrams", "4"),
    *("--learning-rate", "0.004", "--muon-learning-rate", "0.01"),
)
OTHERS = ("python-manual", "python-stdlib", "wikitext2-small")
TINY = ["--max-iters=4", "--eval-every=2", "--n-embd=8", "--n-layer=1", "--n-head=2", "--batch-size=2"]


@dataclass
class Life:
    """What was seen of a process that trains: its validations, and when each stood in the file."""

    validations: list[tuple[float, dict[str, Any]]] = field(default_factory=list)  # (seconds since the start, row)

    def reached(self, nats: float) -> tuple[float, dict[str, Any]] | None:
        """The first validation at or below `nats`."""
        return next(((at, row) for at, row in self.validations if row["loss"] <= nats), None)

    def best_within(self, seconds: float) -> float:
        """The least validation loss that stood there in time; infinity where there was none."""
        return min((row["loss"] for at, row in self.validations if at <= seconds), default=float("inf"))

    def evaluation(self) -> float | None:
        """Seconds of one validation: what passes between two rows and is not training. None below two rows."""
        pairs = zip(self.validations, self.validations[1:], strict=False)
        apart = [after - before - (b["elapsed_seconds"] - a["elapsed_seconds"]) for (before, a), (after, b) in pairs]
        return mean(apart) if apart else None


def watched(run: Path, flags: list[str], caches: dict[str, str], nats: float | None, seconds: float | None) -> Life:
    """A training from its process's start to its end, or until `nats` are reached or `seconds` have passed."""
    life, begun = Life(), perf_counter()
    process = subprocess.Popen(
        fivestep("train", "gpt-chars", "--run-dir", run, "--sample-tokens", 0, *flags),
        env=child(caches),
        stdout=subprocess.DEVNULL,
    )
    try:
        running = True
        while running:
            running = process.poll() is None
            now = perf_counter() - begun
            found = [row for row in rows_of(run) if row["split"] == "val"]
            life.validations += [(now, row) for row in found[len(life.validations) :]]
            if (nats is not None and life.reached(nats)) or (seconds is not None and now > seconds):
                break
            sleep(0.01)
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
        code = process.wait()
    if code not in (0, 143):
        raise RuntimeError(f"fivestep train ended with code {code}")
    return life


def recomputed(run: Path, text: Path) -> float:
    """The loss of a run's best weights on the text's last tenth, by the hand-written script's own evaluation."""
    import torch

    import fivestep as fs
    from benchmarks.plain.gpt import whole_loss

    loaded = fs.load(run)
    whole = text.read_text("utf-8")
    assert loaded.tokenizer is not None
    tokens = torch.from_numpy(loaded.tokenizer.encode(whole[int(0.9 * len(whole)) :]).astype("int64"))
    return float(whole_loss(loaded.model, tokens, loaded.config.block_size))


def measure(text: Path, iterations: int, repeats: int, tiny: bool) -> list[Figure]:
    """The figures of this file."""
    lives: list[Life] = []
    ends: list[float] = []  # losses of the hand-written loop
    nats, extra = (float("inf"), TINY) if tiny else (TARGET, [])
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        caches = {"FIVESTEP_CACHE": str(folder / "cache"), "TORCHINDUCTOR_CACHE_DIR": str(folder / "inductor")}

        def ours() -> float:
            flags = ["--data", str(text), *TO_TARGET, *extra]
            lives.append(watched(folder / f"to-{len(lives)}", flags, caches, nats, None))
            reached = lives[-1].reached(nats)
            return reached[0] if reached else float("inf")

        def plain() -> float:
            process_seconds([sys.executable, str(SCRIPT), str(text), str(iterations)], written=folder / "told")
            facts = json.loads((folder / "told").read_text())
            ends.append(facts["val_loss"])
            return float(facts["seconds"])

        cold = None if tiny else ours()
        found = alternate({"ours": ours, "plain": plain}, repeats)
        total = sorted(found["plain"])[len(found["plain"]) // 2]
        allowed = None if tiny else total
        life = watched(folder / "in", ["--data", str(text), *IN_TIME, *extra], caches, None, allowed)
        checked = recomputed(folder / "in", text)
    warm = [life for life in lives[cold is not None :] if life.reached(nats)]
    looked = [(one.evaluation() or 0.0) * len(one.validations) for one in warm]
    trained = [one.reached(nats)[1]["elapsed_seconds"] for one in warm]  # type: ignore[index]
    told = f"{TARGET} nats"
    apart = [
        figure(f"to {told}: of these, about, validations", looked, "s"),
        figure(f"to {told}: of these, steps", trained, "s"),
    ]
    return [
        figure(f"seconds to {told} (aim: 0.125×)", found["ours"], "s", against=found["plain"], target=0.2),
        *(apart if warm else []),
        *([] if cold is None else [figure(f"seconds to {told}, cold", [cold], "s", against=[total])]),
        figure(f"validation loss by hand, after {iterations:,} iterations", ends, "nats"),
        figure(
            f"validation loss in that time ({total:.0f} s; aim: 1.52)",
            [life.best_within(float("inf") if tiny else total)],
            "nats",
            target=1.58,
        ),
        figure("the same of the best weights, by the hand-written evaluation", [checked], "nats"),
    ]


def others(texts: Path, iterations: int, tiny: bool) -> list[Figure]:
    """The figures on other texts: Python's manual, its standard library, and WikiText-2's validation file."""
    found: list[Figure] = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        caches = {"FIVESTEP_CACHE": str(folder / "cache"), "TORCHINDUCTOR_CACHE_DIR": str(folder / "inductor")}
        for text in OTHERS:
            path = written(text, Path(texts), folder)
            if path is None:
                found.append(skipped(text, f"it is not in {texts}"))
                continue
            process_seconds([sys.executable, str(SCRIPT), str(path), str(iterations)], written=folder / "told")
            facts = json.loads((folder / "told").read_text())
            run = folder / "run" / text
            watched(run, ["--data", str(path), *IN_TIME, *(TINY if tiny else [])], caches, None, None)
            last = [row for row in rows_of(run) if row["split"] == "val"][-1]
            found.append(figure(f"{text}: validation loss", [last["loss"]], "nats", against=[facts["val_loss"]]))
            found.append(
                figure(f"{text}: seconds of training", [last["elapsed_seconds"]], "s", against=[facts["seconds"]])
            )
    return found


def written(text: str, texts: Path, folder: Path) -> Path | None:
    """A file with one of `OTHERS`, as both read it; None where it is not there."""
    if text in BUILTINS:
        path = folder / f"{text}.txt"
        path.write_text("".join(load_corpus(text).splits.values()), "utf-8")
        return path
    path = (texts / text / "train.txt").resolve()
    return path if path.is_file() else None


def main() -> None:
    """Measure, and print."""
    parser = add_options(__doc__, repeats=1, quick=1)
    add_text(parser)
    parser.add_argument("--others", action="store_true", help="on three other texts instead")
    options = parsed(parser)
    if options.others:
        report(options, others(options.texts, 2 if options.quick else 2000, options.quick))
        return
    text = shakespeare_for(options, "`fivestep train gpt-chars`")
    if text is None:
        return
    report(options, measure(text, 2 if options.quick else 2000, options.repeats, options.quick))


if __name__ == "__main__":
    main()
