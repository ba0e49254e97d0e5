"""`fivestep compare --exact`: the first step at which two runs part, and what differs there.

    rows and checkpoints of both -> the interval: equal up to one step, not equal at another
    traces of both (trace.jsonl), or both trained again within the interval, traced -> the step, and what parted there

What is trained again goes on from the last checkpoint that is equal, or from the start, in a temporary directory; it
counts only where it gives the run's own rows and weights again. A run that a script made can be trained again by its
script alone: without a trace the interval is all that is known of it. Changes no run.
"""

import io
import json
import shutil
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import msgspec

from fivestep.data.files import expanded, read_bounded
from fivestep.errors import FivestepError, UsageError, brief
from fivestep.run.build import use_threads
from fivestep.run.checkpoint import DamagedError, checkpoints, load_state
from fivestep.run.config import MAY_CHANGE, Config, load_config
from fivestep.run.difference import state_differences
from fivestep.run.doctor import of_batches
from fivestep.run.metrics import TIMES, readable_rows
from fivestep.run.names import CONFIG, ENVIRONMENT, METRICS, TOKENIZER
from fivestep.run.run import MOST_FACTS
from fivestep.run.trace import read_trace
from fivestep.run.training import train_run
from fivestep.watch.screen import Console

Row = dict[str, Any]
Line = dict[str, Any]
Say = Callable[[str], None]
# Of a state: what validating more or less often changes, and training does not.
OF_ROWS = ("told", "logged_loss", "epoch_loss", "plateau", "run", "last", "skipped", "full")
OF_DATA = ("recipe", "data", "tokenizer_file")  # options that are names: equal data may have two
ROUNDED = {  # options that change the rounding of a step, and nothing else of it
    "graph": "a step by program equals an eager one to rounding",
    "loss": "the fused loss equals the plain one to rounding",
    "fused": "an optimizer as one kernel equals torch's loop to rounding",
}


class AgainError(UsageError):
    """A run that cannot be trained again here; the message says why."""


@dataclass(frozen=True)
class Evidence:
    """What two runs' files show: equal up to `equal`, not equal at `unequal` (None: nowhere), and how it is known."""

    equal: int
    unequal: int | None
    compared: int  # how many rows and checkpoints both have
    texts: list[str]
    start: int = 0  # the last equal checkpoint


@dataclass(frozen=True)
class Parting:
    """Where two runs part: `after` is the last step known to be equal, `by` the first known not to be.

    step: the very step, where it is known; 0 where they begin from other weights. what: batch, random state, loss,
    gradients, update, start, or nothing (None) where the step is not known.
    """

    parted: bool
    after: int
    by: int | None
    step: int | None
    what: str | None
    texts: list[str] = field(default_factory=list)

    def as_json(self) -> dict[str, Any]:
        """For `--json`."""
        return asdict(self)


def parting(one: Path, other: Path, say: Say = print) -> Parting:
    """The first step at which the runs at `one` and `other` part; `say` is told before anything long begins.

    Raises UsageError for a directory that is no run.
    """
    one, other = expanded(one).absolute(), expanded(other).absolute()
    seen = evidence(one, other)
    traced = first_difference(read_trace(one), read_trace(other))
    if traced is not None:
        return Parting(True, max(traced.step - 1, 0), traced.step, traced.step, traced.what, [traced.told()])
    if seen.unequal is None and seen.compared:
        return Parting(False, seen.equal, None, None, None, seen.texts)
    until = seen.unequal or min(last_step(one), last_step(other))
    if not until:
        return Parting(False, 0, None, None, None, ["one of them has made no step: there is nothing to compare"])
    try:
        jobs = [configuration(path) for path in (one, other)]
        say(f"both are trained again from step {seen.start:,} to {until:,}, to name the step")
        with tempfile.TemporaryDirectory("-fivestep-compare") as name:
            folders = Path(name, "A"), Path(name, "B")
            for path, config, folder in zip((one, other), jobs, folders, strict=True):
                again(path, config, folder, seen.start, until)
            found = first_difference(*map(read_trace, folders)) or of_update(*folders, until)
    except AgainError as error:
        unknown = f"which step it is cannot be told: {error}"
        return Parting(seen.unequal is not None, seen.equal, seen.unequal, None, None, [*seen.texts, unknown])
    if found is None:
        texts = [*seen.texts, f"trained again they are equal up to step {until:,}"]
        return Parting(
            seen.unequal is not None, until - 1 if seen.unequal else until, seen.unequal, None, None, texts
        )
    text = found.told("" if found.what == "batch" else unlike_options(*jobs))
    return Parting(True, max(found.step - 1, 0), found.step, found.step, found.what, [*seen.texts, text])


def in_lines(found: Parting) -> list[str]:
    """What was found, for a person: the answer, then what it rests on."""
    if not found.parted:
        answer = f"they do not part: equal up to step {found.after:,}" if found.after else "they cannot be compared"
    elif found.step == 0:
        answer = "they part before the first step"
    elif found.step is not None:
        answer = f"they part at step {found.step:,}"
    else:
        answer = f"they part after step {found.after:,}, at step {found.by:,} at the latest"
    return [answer, *(f"  {text}" for text in found.texts)]


# --- what the files show ---


def evidence(one: Path, other: Path) -> Evidence:
    """The interval in which two runs part, from the rows and the checkpoints that both have."""
    rows, saved = compared_rows(one, other), list(compared_states(one, other))
    unequal = min((step for step, text in [*rows, *saved] if text), default=None)
    before = [step for step, text in rows if not text and (unequal is None or step < unequal)]
    states = [step for step, text in saved if not text and (unequal is None or step < unequal)]
    texts = []
    for name, kind, found in (("metrics.jsonl", "row", rows), ("checkpoints", "checkpoint", saved)):
        first = next(((step, text) for step, text in found if text), None)
        equal = [step for step, text in found if not text and (first is None or step < first[0])]
        known = f"equal up to step {equal[-1]:,}" if equal else f"the first {kind} that both have differs"
        if found:
            texts.append(f"{name}: {known}" + (f"; step {first[0]:,}: {first[1]}" if first else ""))
        else:
            texts.append(f"{name}: there is no step of which both have a {kind}")
    return Evidence(
        max([*before, *states], default=0), unequal, len(rows) + len(saved), texts, max(states, default=0)
    )


def compared_rows(one: Path, other: Path) -> list[tuple[int, str]]:
    """(step, difference or nothing) for each row that both have: of one split, step and number of steps."""
    left, right = (keyed_rows(path) for path in (one, other))
    return [(key[1], row_difference(left[key], right[key])) for key in sorted(left.keys() & right.keys(), key=_order)]


def keyed_rows(path: Path) -> dict[tuple[Any, ...], Row]:
    """The training and validation rows of a run, by what makes two of them comparable."""
    rows = [row for row in readable_rows(path / METRICS) if row.get("split") in ("train", "val")]
    return {
        (row["split"], row["step"], row.get("steps")): row
        for row in rows
        if type(row.get("step")) is int and type(row.get("loss")) in (int, float)
    }


def _order(key: tuple[Any, ...]) -> tuple[int, bool]:
    return key[1], key[0] == "val"  # a step's validation comes after its training


def row_difference(left: Row, right: Row) -> str:
    """The first figure that differs, bit for bit; times do not count."""
    for name in left:
        if name not in TIMES and name in right and repr(left[name]) != repr(right[name]):
            return f"{name} of {left['split']} is {left[name]!r} and {right[name]!r}"
    return ""


def compared_states(one: Path, other: Path) -> Iterator[tuple[int, str]]:
    """(step, difference or nothing) for each checkpoint that both have, up to the first that differs."""
    left, right = ({found.step: found for found in checkpoints(path / "checkpoints")} for path in (one, other))
    for step in sorted(left.keys() & right.keys()):
        try:
            names = dict(trained_differences(load_state(left[step]), load_state(right[step])))
        except DamagedError:
            continue
        text = ""
        if names:
            first, more = next(iter(names)), len(names) - 1
            text = f"{first} {names[first]}" + (f", and {more} more" if more else "")
        yield step, text
        if text:
            return


def trained_differences(left: Any, right: Any) -> Iterator[tuple[str, str]]:
    """The parts of two states that differ, by name: weights first. Python's and NumPy's generators do not count:
    a script that never draws from them need not seed them."""
    for name, text in state_differences(left, right):
        if name.split(".")[0] not in OF_ROWS and not {"python", "numpy"} & set(name.split(".")):
            yield name, text


def last_step(path: Path) -> int:
    """The last step that a row or a checkpoint of the run tells of."""
    rows = [key[1] for key in keyed_rows(path)]
    return max([*rows, *(found.step for found in checkpoints(path / "checkpoints"))], default=0)


# --- training again ---


def configuration(path: Path) -> Config:
    """The configuration of a run that can be trained again. Raises AgainError."""
    if not (path / CONFIG).is_file():
        raise AgainError(
            f"{path.name} was made by a script, which alone can train it again; with fs.Run(..., trace=True) in the "
            "script each step leaves a line to compare"
        )
    try:
        config = load_config(str(path / CONFIG), {})
    except UsageError as error:
        raise AgainError(str(error)) from error
    if "-" in config.data:
        raise AgainError(f"{path.name} learned from standard input, which was there only once")
    return config


def again(path: Path, config: Config, folder: Path, start: int, until: int) -> None:
    """Train the run at `path` again in `folder`, traced, from its checkpoint of `start` to step `until`.

    Raises AgainError where that fails, or does not give the run's own rows and weights.
    """
    facts = _facts(path)
    threads = config.threads or facts.get("threads")
    changes = {"run_dir": str(folder), "until": str(until), "sample_every": None, "sample_tokens": 0}
    config = msgspec.structs.replace(config, **changes, threads=threads if type(threads) is int else None)
    if start:
        try:
            saved = {found.step: found.path for found in checkpoints(path / "checkpoints")}[start]
            shutil.copytree(saved, folder / "checkpoints" / saved.name)
        except (KeyError, OSError) as error:  # a run that still trains removes older ones
            raise AgainError(f"the checkpoint of step {start:,} of {path.name} is gone; compare once more") from error
        for name in (CONFIG, ENVIRONMENT, TOKENIZER, METRICS):
            if (path / name).is_file():
                shutil.copyfile(path / name, folder / name)
    try:
        use_threads(config.threads)
        train_run(config, Console(file=io.StringIO()), resume=True, trace=True)
    except FivestepError as error:
        raise AgainError(f"training {path.name} again fails: {brief(error)}") from error
    if facts.get("data_sha256") != _facts(folder).get("data_sha256"):
        raise AgainError(f"the data of {path.name} has changed since")
    if text := unlike(path, folder):
        raise AgainError(f"trained again here, {path.name} does not give its own figures ({text})")


def unlike(path: Path, folder: Path) -> str:
    """The first row or checkpoint that a run trained again does not have as it was; nothing where all are equal."""
    wrong = [text for _, text in [*compared_rows(path, folder), *compared_states(path, folder)] if text]
    return wrong[0] if wrong else ""


def _facts(path: Path) -> dict[str, Any]:
    try:
        facts = json.loads(read_bounded(path / ENVIRONMENT, MOST_FACTS))
    except (OSError, ValueError, RecursionError):
        return {}
    return facts if isinstance(facts, dict) else {}


def unlike_options(one: Config, other: Config) -> str:
    """The options that differ and have a part in what a step computes, in words; nothing where there is none."""
    names = [
        field.name
        for field in msgspec.structs.fields(Config)
        if field.name not in (*MAY_CHANGE, *OF_DATA) and getattr(one, field.name) != getattr(other, field.name)
    ]
    if not names:
        return ""
    rounded = [ROUNDED[name] for name in names if name in ROUNDED]
    return f"the configurations differ in {', '.join(names)}" + (f" ({'; '.join(rounded)})" if rounded else "")


# --- the step ---


@dataclass(frozen=True)
class First:
    """The first step at which two traces part, and what does; `guess` is what may be behind it."""

    step: int
    what: str
    text: str
    guess: str = ""

    def told(self, known: str = "") -> str:
        """In a sentence, with what is known to be behind it in the place of a guess."""
        if known:
            return f"{self.text}; {known}"
        return f"{self.text}: {self.guess}" if self.guess else self.text


def first_difference(left: list[Line], right: list[Line]) -> First | None:
    """Where two traces part; None where the steps that both have are equal.

    A step reads weights, random state and batch, and gives a loss, gradients and the next step's weights: the first
    of these that differs is what parts. A random state of its own is nothing: perhaps nobody draws.
    """
    others = {line.get("step"): line for line in right}
    before: Line | None = None
    for line in left:
        step = line.get("step")
        if type(step) is not int or (other := others.get(step)) is None:
            continue
        unequal = [name for name in ("weights", "batches", "loss", "grad_norm") if line.get(name) != other.get(name)]
        if unequal:
            return parted(step, unequal[0], line, other, before, others)
        before = line
    return None


def parted(step: int, first: str, line: Line, other: Line, before: Line | None, others: dict[Any, Line]) -> First:
    """What parts at a step whose lines differ, in a sentence."""
    if first == "weights":
        if before is None:
            early = step == 1
            text = f"the weights before step {step:,} differ" + (": they begin from others" if early else "")
            return First(step - 1, "start" if early else "update", text)
        return of_updates(before, others[before["step"]])
    if first == "batches":
        return First(step, "batch", f"from equal weights, another batch: {of_batches(line, other).text}")
    if line.get("random") != other.get("random"):
        text = f"step {step:,}: from equal weights, on the same batch, with another state of torch's generator"
        return First(step, "random state", f"{text}: the loss is {_hex(line, 'loss')} and {_hex(other, 'loss')}")
    if first == "loss":
        values = f"{_hex(line, 'loss')} and {_hex(other, 'loss')}"
        text = f"step {step:,}: from equal weights, batch and random state, the loss is {values}"
        return First(step, "loss", text, "the model, the criterion or a kernel computes something else")
    values = f"{_hex(line, 'grad_norm')} and {_hex(other, 'grad_norm')}"
    return First(step, "gradients", f"step {step:,}: from an equal loss, the norm of the gradients is {values}")


def of_updates(line: Line, other: Line) -> First:
    """An update that led to other weights, from equal gradients."""
    step = line["step"]
    if line.get("lr") != other.get("lr"):
        text = f"the learning rate of the update is {_hex(line, 'lr')} and {_hex(other, 'lr')}"
        return First(step, "update", f"step {step:,}: {text}")
    text = f"step {step:,}: from equal gradients, the update is another one"
    return First(step, "update", text, "the optimizer has another setting, or clips otherwise")


def of_update(one: Path, other: Path, until: int) -> First | None:
    """The last update of two traces that are equal line by line, where the weights after it differ."""
    differs = next((text for step, text in compared_states(one, other) if step == until and text), "")
    if not differs:
        return None
    left, right = (read_trace(path)[-1] for path in (one, other))
    if not differs.startswith("model."):  # weights come first: they are equal, and what stands beside them is not
        return First(until, "update", f"step {until:,}: the weights after it are equal; {differs}")
    return of_updates(left, right)


def _hex(line: Line, name: str) -> str:
    value = line.get(name)
    return repr(float.fromhex(value)) if isinstance(value, str) else "not known"
