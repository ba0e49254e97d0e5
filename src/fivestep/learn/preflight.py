"""`fivestep doctor JOB`: what is wrong with a job, before it is paid for.

    job -> each check on copies of its own, random states put back -> a finding -> a line of the table, or JSON

Owns which checks there are, their order, how one is run, and how findings are shown. A check is a function of the
job; what it looks for stands with it, in the `preflight_*` modules beside this one. Nothing is left behind.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from time import perf_counter
from typing import Any

import torch

from fivestep.errors import NonFiniteError, brief
from fivestep.learn.preflight_data import features, overlap, room, speed
from fivestep.learn.preflight_finding import FAILED, LEFT_OUT, OK, WARNING, Finding, failed, left_out
from fivestep.learn.preflight_job import Examined, NotApplicableError, aside, examined
from fivestep.learn.preflight_learning import (
    gradients,
    initial_loss,
    inputs_alone,
    learning_rate,
    one_batch,
    schedule,
)
from fivestep.learn.preflight_structure import causality, examples_leak, halves, modes, next_tokens, repeats, saves
from fivestep.run import strict_json
from fivestep.run.environment import processor
from fivestep.watch.screen import Console
from fivestep.watch.table import counted

Check = Callable[[Examined], Finding]

CHECKS: tuple[tuple[str, Check], ...] = (
    ("initial loss", initial_loss),
    ("inputs alone", inputs_alone),
    ("one batch by heart", one_batch),
    ("gradients", gradients),
    ("examples apart", examples_leak),
    ("causality", causality),
    ("next tokens", next_tokens),
    ("modes", modes),
    ("accumulation", halves),
    ("repeats", repeats),
    ("saves and loads", saves),
    ("overlap", overlap),
    ("features", features),
    ("learning rate", learning_rate),
    ("schedule", schedule),
    ("speed", speed),
    ("memory and disk", room),
)


@dataclass(frozen=True)
class Checked:
    """A check's name, what it found, and what it took."""

    name: str
    finding: Finding
    seconds: float


def run_check(check: Check, job: Examined) -> Finding:
    """What a check says; equal seeds inside, every random state as before afterwards.

    A check that raises has found something too: a job that cannot do what is tried of it.
    """
    with aside():
        try:
            return check(job)
        except NotApplicableError as why:
            return left_out(str(why))
        except NonFiniteError:
            return left_out("a step is not finite: see the learning rate and the first loss")
        except Exception as error:
            return failed(f"{type(error).__name__}: {brief(error)}", "the job cannot do what this check tries")


def checked(job: Examined) -> Iterator[Checked]:
    """Every check in its order, each when it is done."""
    for name, check in CHECKS:
        start = perf_counter()
        finding = run_check(check, job)
        yield Checked(name, finding, perf_counter() - start)


def preflight(
    source: str | None, flags: Mapping[str, Any], as_json: bool = False, console: Console | None = None
) -> bool:
    """Check the job that `source` names and show what was found; whether nothing failed. Raises UsageError."""
    console, start = console or Console(), perf_counter()
    job = examined(source, flags)
    if as_json:
        found = list(checked(job))
        console.print(in_json(job, found), markup=False, highlight=False, soft_wrap=True)
        return healthy(found)
    for line in introduction(job):
        show(console, line)
    found = []
    for one in checked(job):
        found.append(one)
        show(console, *line_of(one))
        if one.finding.remedy:
            show(console, f"{'':<12}-> {one.finding.remedy}", "dim" if one.finding.verdict == WARNING else "")
    show(console, f"\n{summary(found)}, in {perf_counter() - start:.0f} s")
    return healthy(found)


def healthy(found: list[Checked]) -> bool:
    """Whether no check failed."""
    return all(one.finding.verdict != FAILED for one in found)


def show(console: Console, text: str, style: str = "") -> None:
    """A line, whole."""
    console.print(text, style=style, markup=False, highlight=False, soft_wrap=True)


def introduction(job: Examined) -> list[str]:
    """What is examined, and where."""
    weights = sum(parameter.numel() for parameter in job.model.parameters())
    threads = torch.get_num_threads()
    lines = [f"{job.name}: {type(job.model).__name__}, {weights:,} parameters"]
    lines += [f"on {job.device} ({processor()}), threads: {threads}", *(f"note: {note}" for note in job.notes), ""]
    return lines


def line_of(one: Checked) -> tuple[str, str]:
    """A check's line, and its style."""
    verdict = one.finding.verdict
    shown = "-" if verdict == LEFT_OUT else verdict
    style = {FAILED: "bold magenta", WARNING: "bold", OK: ""}.get(verdict, "dim")
    return f"  {shown:<9} {one.name:<20}{one.finding.figure}", style


def summary(found: list[Checked]) -> str:
    """How many of each verdict."""
    verdicts = [one.finding.verdict for one in found]
    bad, said = verdicts.count(FAILED), verdicts.count(WARNING)
    apart = f"{verdicts.count(LEFT_OUT)} not applicable"
    return f"{f'{bad} failed' if bad else 'healthy'}: {verdicts.count(OK)} ok, {counted(said, 'warning')}, {apart}"


def in_json(job: Examined, found: list[Checked]) -> str:
    """The same for machines."""
    checks = [{"check": one.name, **asdict(one.finding), "seconds": round(one.seconds, 3)} for one in found]
    return strict_json.dumps({"job": job.name, "healthy": healthy(found), "notes": job.notes, "checks": checks})
