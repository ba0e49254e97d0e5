"""`fivestep doctor --resume`: a job, rehearsed uninterrupted and killed at random instants, compared bit for bit.

    whole     trained once, uninterrupted             \\  must agree: else resuming cannot be judged
    again     the same once more                      /
    killed    SIGKILL, a fresh process that goes on, SIGKILL, ... and at last to the end: must agree with `whole`

Each training is a process of `rehearsal.py`, with a trace of what every step read. Owns when to kill, the comparison
and its words. The instants are drawn from the seconds of `whole` after its first step; every second kill waits for
the next save to begin.
"""

import os
import random
import subprocess
import sys
import tempfile
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from time import monotonic, sleep
from typing import Any

import msgspec

from fivestep.data.files import expanded
from fivestep.errors import UsageError
from fivestep.run import strict_json
from fivestep.run.checkpoint import find
from fivestep.run.config import Config, load_config, to_toml
from fivestep.run.difference import KINDS, differences, rows, unseeded
from fivestep.run.names import CONFIG
from fivestep.run.rehearsal import KEPT, is_function, named_function
from fivestep.run.running import RUNNING
from fivestep.run.trace import TRACE, read_trace

STEPS = 60
SAVE_EVERY = "7"
LOOK = 0.0005  # seconds between two looks at a run that is to be killed
Say = Callable[[str], None]


@dataclass(frozen=True)
class Job:
    """What is rehearsed: `argument` is what a rehearsal is started with."""

    name: str
    argument: str
    steps: int
    every: str


@dataclass(frozen=True)
class Kill:
    """One kill: the last step whose line was there, whether a save was under way, the step that was gone on from."""

    step: int
    saving: bool
    resumed: int

    def __str__(self) -> str:
        return f"after step {self.step}{' in a save' if self.saving else ''} (went on from {self.resumed})"


def examine(
    source: str | None,
    flags: Mapping[str, Any],
    *,
    kills: int = 5,
    every: str = SAVE_EVERY,
    seed: int = 0,
    keep: Path | None = None,
    say: Say = print,
) -> bool:
    """Rehearse the job that `source` names and tell what came of it; whether nothing differs.

    source: a recipe, a TOML file, a run's directory, or FILE.py:function. flags: options of a recipe. seed: of the
    instants. keep: a new directory for the three runs; else they are removed. Raises UsageError for a job that
    cannot be rehearsed, or that fails uninterrupted.
    """
    if keep is not None and expanded(keep).exists():
        raise UsageError(f"{keep} exists; give a new directory (--keep)")
    place = nullcontext(str(expanded(keep))) if keep is not None else tempfile.TemporaryDirectory("-fivestep-doctor")
    with place as name:
        folder = Path(name)
        folder.mkdir(parents=True, exist_ok=True)
        job = build_rehearsal(source, flags, every, folder)
        say(f"{job.name}: {job.steps} steps at most, the state saved every {every} (--max-iters, --checkpoint-every)")
        moments = uninterrupted(job, folder / "whole")
        steps = len(moments) - 1
        say(f"uninterrupted: {steps} steps, {moments[-1] - moments[0]:.1f} s after the first")
        uninterrupted(job, folder / "again")
        besides = unseeded(folder / "whole", folder / "again")
        found = compared(folder / "whole", folder / "again", besides)
        if found:
            say("uninterrupted once more: not the same, so that resuming cannot be judged")
            tell(found, folder / "whole", folder / "again", [], say)
            return False
        left_out = [name for name in ("python", "numpy") if any(part.endswith(name) for part in besides)]
        say("uninterrupted once more: the same, bit for bit")
        if left_out:
            say(f"  (the job never seeds the global generators of {' and '.join(left_out)}: they are not compared)")
        suffered, error = killed(job, folder / "killed", moments, kills, random.Random(seed))
        late = f"; {kills - len(suffered)} more came after its end" if len(suffered) < kills and not error else ""
        say(
            f"killed {len(suffered)} {'time' if len(suffered) == 1 else 'times'}{late}"
            + "".join(f"\n  {kill}" for kill in suffered)
        )
        if error:
            say(f"\ngoing on fails: {error}")
            return False
        found = compared(folder / "whole", folder / "killed", besides)
        tell(found, folder / "whole", folder / "killed", suffered, say)
        return not found


# --- the job ---


def build_rehearsal(source: str | None, flags: Mapping[str, Any], every: str, folder: Path) -> Job:
    """The job that `source` names, short enough to be rehearsed."""
    if is_function(source):
        argument = named_function(str(source))
        if other := [name for name in flags if name != "max_iters"]:
            raise UsageError(f"--{other[0].replace('_', '-')} is of recipes; {source} says itself what it trains")
        return Job(str(source), argument, flags.get("max_iters") or STEPS, every)
    config = rehearsed(load_config(configuration(source), flags), flags, every)
    path = folder / "job.toml"
    path.write_text(to_toml(config), "utf-8")
    return Job(source or config.recipe, str(path), config.max_iters or STEPS, every)


def configuration(
    source: str | None, instead: str = "the doctor takes that script as FILE.py:function"
) -> str | None:
    """Return the configuration of a run's directory; a recipe and a file as they are.

    instead: what the refusal of a run made from Python says to do.
    """
    if source is None or not expanded(source).is_dir():
        return source
    if not (expanded(source) / CONFIG).is_file():
        raise UsageError(f"{source} has no {CONFIG}: a run made from Python is known to its script alone; {instead}")
    return str(expanded(source) / CONFIG)


def rehearsed(config: Config, flags: Mapping[str, Any], every: str) -> Config:
    """`config` for a rehearsal: some steps, validated and saved often, no sample of text."""
    if "-" in config.data:
        raise UsageError("the data is standard input, which is there only once; give a file (--data)")
    steps = config.max_iters if "max_iters" in flags else min(config.max_iters or STEPS, STEPS)
    quarter = max(1, (steps or STEPS) // 4)
    changes: dict[str, Any] = {"eval_every": str(quarter)} if "eval_every" not in flags else {}
    return msgspec.structs.replace(
        config,
        max_iters=steps,
        until=None,
        checkpoint_every=every,
        warmup_iters=min(config.warmup_iters, quarter),
        decay_iters=None if config.decay_iters is None else min(config.decay_iters, quarter),
        sample_every=None,
        sample_tokens=0,
        run_dir=None,
        **changes,
    )


# --- its processes ---


@contextmanager
def started(job: Job, folder: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A process that trains `job` in `folder`, from where it was left; it ends with the block."""
    command = [sys.executable, "-m", "fivestep.run.rehearsal", job.argument, str(folder), str(job.steps), job.every]
    here = str(Path(__file__).parents[2])  # the very package that compares
    paths = os.pathsep.join([here, *filter(None, [os.environ.get("PYTHONPATH")])])
    with log_of(folder).open("wb") as log:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            env={**os.environ, "PYTHONPATH": paths},
        )
        try:
            yield process
        finally:
            process.kill()
            process.wait()


def log_of(folder: Path) -> Path:
    """Where the newest process of the run in `folder` writes."""
    return folder.with_suffix(".log")


def failure(folder: Path, code: int) -> str:
    """The last words of a process that failed."""
    lines = log_of(folder).read_text("utf-8", "replace").split("\n")
    told = [line for line in lines if line.strip()] or ["it said nothing"]
    last = next((line for line in reversed(told) if line.startswith("fivestep: ")), told[-1])  # of several lines
    return f"{last.removeprefix('fivestep: ').strip()} (exit code {code}; --keep DIR keeps all it said)"


def uninterrupted(job: Job, folder: Path) -> list[float]:
    """Train to the end; when each step's line was there, and when all was done, in seconds."""
    moments: list[float] = []
    ended: float | None = None
    with started(job, folder) as process:
        while process.poll() is None:
            now = monotonic()
            moments += [now] * (steps_of(folder) - len(moments))
            if moments and ended is None and not (folder / RUNNING).exists():
                ended = now
            sleep(2 * LOOK)
    if process.returncode != 0:
        raise UsageError(f"the job fails without being killed: {failure(folder, process.returncode)}")
    now = monotonic()
    return [*moments, *[now] * (steps_of(folder) - len(moments)), ended or now]


def killed(
    job: Job, folder: Path, moments: list[float], kills: int, instants: random.Random
) -> tuple[list[Kill], str]:
    """Train to the end through so many kills; those that came in time, and what going on failed with."""
    planned = sorted(instants.uniform(moments[0], moments[-1]) for _ in range(kills))
    suffered: list[Kill] = []
    for number, instant in enumerate(planned):
        lines = sum(moment <= instant for moment in moments[:-1])
        delay = instant - moments[lines - 1]
        before = steps_of(folder)  # what the process before left there is no sign of this one
        with started(job, folder) as process:
            struck = reached(process, folder, max(lines, before + 1))
            if struck and number % 2:
                struck = saving_begun(process, folder)
                delay = instants.uniform(0, 0.004)
            if struck:
                sleep(delay)
        if process.returncode == 0:
            return suffered, ""
        if not struck:
            return suffered, failure(folder, process.returncode)
        last = find(folder / "checkpoints", "last")
        suffered.append(Kill(steps_of(folder), is_saving(folder), last.step if last else 0))
    with started(job, folder) as process:
        process.wait()
    return suffered, failure(folder, process.returncode) if process.returncode else ""


def reached(process: subprocess.Popen[bytes], folder: Path, lines: int) -> bool:
    """Wait until the trace has so many lines; False where the process ended before."""
    while steps_of(folder) < lines:
        if process.poll() is not None:
            return False
        sleep(LOOK)
    return process.poll() is None


def saving_begun(process: subprocess.Popen[bytes], folder: Path) -> bool:
    """Wait for the next save; False where the process ended before."""
    while not is_saving(folder):
        if process.poll() is not None:
            return False
        sleep(LOOK)
    return process.poll() is None


def steps_of(folder: Path) -> int:
    """How many lines the trace has."""
    try:
        return (folder / TRACE).read_bytes().count(b"\n")
    except FileNotFoundError:
        return 0


def is_saving(folder: Path) -> bool:
    """Whether a checkpoint is being written, or was when the process was killed."""
    try:
        return any(path.name.endswith(".part") for path in (folder / "checkpoints").iterdir())
    except FileNotFoundError:
        return False


# --- the comparison ---


@dataclass(frozen=True)
class Difference:
    """The first difference of one kind, and the step that shows it, where one does."""

    text: str
    step: int | None = None
    same_items: bool = False  # the items are the same, their contents are not
    known: bool = False  # the items are known


def compared(one: Path, other: Path, besides: Collection[str]) -> dict[str, Difference]:
    """What differs between two runs by kind: batches, losses, and those of `difference.py`, some parts besides."""
    found: dict[str, Difference] = {}
    for left, right in zip_longest(read_trace(one), read_trace(other)):
        if left is None or right is None:
            found.setdefault("batches", Difference(f"step {(left or right)['step']} is in one only"))
            break
        if (left["items"], left["batches"]) != (right["items"], right["batches"]):
            found.setdefault("batches", of_batches(left, right))
        if left["loss"] != right["loss"]:
            values = [repr(float.fromhex(line["loss"])) for line in (left, right)]
            found.setdefault("losses", Difference(f"step {left['step']}: {' and '.join(values)}", left["step"]))
    return found | {kind: Difference(text) for kind, text in differences(one, other, besides).items()}


def of_batches(left: dict[str, Any], right: dict[str, Any]) -> Difference:
    """What differs between two windows."""
    step, known = left["step"], left["items"] is not None
    if left["items"] != right["items"]:
        text = f"other items, {shown(left['items'])} and {shown(right['items'])}"
        return Difference(f"step {step}: {text}", step, known=True)
    text = f"the same items, {shown(left['items'])}, with other contents" if known else "other contents"
    return Difference(f"step {step}: {text}", step, same_items=known, known=known)


def shown(items: Any) -> str:
    """The first few of a window's items, and how many there are."""
    flat = [item for batch in items or [] for item in (batch if isinstance(batch, list) else [batch])]
    return ", ".join(map(str, flat[:4])) + (f", ... ({len(flat):,})" if len(flat) > 4 else "")


def tell(found: dict[str, Difference], one: Path, other: Path, kills: list[Kill], say: Say) -> None:
    """A line a kind; then the first difference, what it comes from most likely, and what to do."""
    steps = f"{steps_of(one)} steps, bit for bit"
    counts = {"batches": steps, "losses": steps, "rows": f"{len(rows(one))} rows of metrics.jsonl"}
    say("")
    for kind in ("batches", "losses", *KINDS):
        text = found[kind].text if kind in found else counts.get(kind, "bit for bit")
        say(f"  {kind:<14}  {'differ  ' if kind in found else 'the same'}  {text}")
    if not found:
        say("\nhealthy: killed at any of these instants it ends where the uninterrupted training ends")
        return
    kind, first = min(found.items(), key=lambda item: item[1].step or sys.maxsize)  # of equals the first
    say(f"\nfirst difference, in {kind}: {first.text}")
    behind = [kill for kill in kills if first.step is not None and kill.resumed < first.step]
    if behind:
        say(f"  it was made again by the process that went on from step {behind[-1].resumed}")
    if changed := unlike(one, other):
        say("held beside the saved state, and not the same at the end: " + ", ".join(changed[:5]))
    cause, remedy = (of_resume if kills else of_two)(kind, first)
    say(f"likely: {cause}\nremedy: {remedy}")


def unlike(one: Path, other: Path) -> list[str]:
    """The names of what is held beside the saved state and differs."""
    left, right = (strict_json.loads((path / KEPT).read_text("utf-8")) for path in (one, other))
    return [name for name in left if left[name] != right.get(name)]


def of_two(kind: str, first: Difference) -> tuple[str, str]:
    """Cause and remedy where two uninterrupted trainings differ."""
    if kind == "batches":
        return (
            "the data, their order or their augmentation are drawn from something that is not seeded",
            "seed it before the data are made: torch.manual_seed, random.seed, numpy.random.seed, "
            "default_rng(SEED); let nothing depend on the time or the order of a set",
        )
    if kind == "losses" and first.step == 1:
        return (
            "the weights begin as something else each time, or the forward pass draws from what is not seeded",
            "torch.manual_seed(SEED) before the model is built",
        )
    if kind == "rows":
        return (
            "the validation or a metric draws random numbers, or depends on the time",
            "evaluate the same items each time, without drawing",
        )
    return (
        "the model depends on the time or on random numbers that are not seeded, or a kernel is not deterministic",
        "torch.use_deterministic_algorithms(True) (on CUDA also CUBLAS_WORKSPACE_CONFIG=:4096:8), and seeds",
    )


def of_resume(kind: str, first: Difference) -> tuple[str, str]:
    """Cause and remedy where a killed training differs from two that agree."""
    if kind == "batches" and first.same_items:
        return (
            "the dataset draws from a generator of its own, which is not saved, or keeps count of what it gave",
            "draw from torch, random or numpy.random themselves (they are seeded by item), or from a generator made "
            "anew from the item's index; one that is an attribute of the dataset is saved where there are no workers",
        )
    if kind == "batches" and first.known:
        return (
            "the sampler draws its order from something that is not saved",
            "give it a generator as an attribute, or state_dict() and load_state_dict()",
        )
    if kind == "batches":
        return (
            "the iterable does not give the same batches when it is drawn again in a fresh process",
            "give it state_dict() and load_state_dict(), let it begin each epoch from a fixed seed, or use a dataset "
            "with indices",
        )
    if kind == "losses":
        return (
            "the model, the criterion or the loop's body keeps something that changes with the steps, unsaved",
            "make it a buffer (register_buffer), a parameter, or a function of info.step",
        )
    if kind == "rows":
        return (
            "a metric, or the validation data, keeps something from one validation to the next",
            "make it anew at each validation",
        )
    return (
        f"{kind} depend on something outside of what is saved",
        "keep it in the model's buffers, the optimizer's state or a scheduler's",
    )
