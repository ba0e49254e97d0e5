"""`fivestep explain`: one real iteration of a recipe or a run, in nine stages, as text and as a page.

Owns where the iteration is taken from (a recipe trained so far, or a run's checkpoint), and the order of the rest:
`explain_observe.py` makes it, `explain_measure.py` measures it, `explain_text.py` and `explain_page.py` show it.
Leaves nothing behind but the page that was asked for; a run is only read.
"""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import Any

from fivestep.data.files import expanded, read_bounded, write_durably
from fivestep.errors import UsageError, brief
from fivestep.learn.explain_facts import Explanation
from fivestep.learn.explain_measure import explained
from fivestep.learn.explain_page import page
from fivestep.learn.explain_text import lines
from fivestep.run.build import Job, build_data, build_job
from fivestep.run.checkpoint import DamagedError, load_state, newest_first, read_manifest
from fivestep.run.config import DEFAULT_RECIPE, Config, load_config
from fivestep.run.loaded import why_no_run
from fivestep.run.names import CONFIG, ENVIRONMENT
from fivestep.run.run import MOST_FACTS
from fivestep.run.start import postpone_compiler
from fivestep.run.training import check_memory, planned_steps
from fivestep.watch.preparation import preparation_shown
from fivestep.watch.screen import Console, screen_of


@dataclass(frozen=True)
class Source:
    """What is explained: a job, a state of it to go on from (None: its beginning), and the step before the one."""

    config: Config
    job: Job
    saved: dict[str, Any] | None
    step: int
    title: str
    notes: list[str]


def explain(
    source: str | None,
    flags: dict[str, Any],
    step: int | None = None,
    html: Path | None = None,
    console: Console | None = None,
) -> Explanation:
    """Print one iteration of `source`: a recipe, a TOML file, or a run's directory; and write it as a page.

    flags: options of the configuration, for a recipe or a file. step: updates to make first; of a run, the
    checkpoint at or before it (its last, if not given). html: the page's file. Raises UsageError.
    """
    console = console or Console()
    if html is not None:
        check_page(html)
    postpone_compiler()
    place = expanded(source) if source is not None else None
    if place is not None and place.is_dir():
        taken = from_run(place, flags, step, console)
    else:
        taken = from_recipe(source, flags, step or 0, console)
    with trained_so_far(console, taken.step) as told:
        facts = explained(taken.config, taken.job, taken.step, taken.saved, taken.title, told)
    facts.notes[:0] = taken.notes
    unicode = console.encoding.startswith("utf")
    for line, style in lines(facts, console.width, unicode):
        console.print(line, style=style, markup=False, highlight=False, soft_wrap=True)
    if html is not None:
        try:
            write_durably(html, page(facts).encode("utf-8"))
        except OSError as error:
            raise UsageError(f"cannot write {html}: {error.strerror or error} (--html)") from error
        console.print(f"\nas a page: {html}", markup=False, highlight=False, soft_wrap=True)
    return facts


def check_page(path: Path) -> None:
    """Raise UsageError where a page cannot be written: before anything is trained."""
    if path.is_dir() or not path.absolute().parent.is_dir():
        what = "is a directory" if path.is_dir() else "is in a directory that does not exist"
        raise UsageError(f"{path} {what}: give a file's name (--html)")


def from_recipe(source: str | None, flags: dict[str, Any], step: int, console: Console) -> Source:
    """A recipe, or what a TOML file describes, from its beginning."""
    config = load_config(source or DEFAULT_RECIPE, flags)
    job = built(config, console)
    planned = planned_steps(config, job)
    if planned is not None and step >= planned:
        raise UsageError(
            f"step = {step:,}, but this training ends after {planned:,}: give a smaller --step, or a higher "
            "--max-iters or --epochs"
        )
    notes: list[str] = []
    if step and (config.anneal or config.early_stop):
        notes.append(
            "validations on the way, and what they would have changed (--anneal, --early-stop), are left out"
        )
    return Source(config, job, None, step, config.recipe or source or config.model, notes)


def from_run(path: Path, flags: dict[str, Any], step: int | None, console: Console) -> Source:
    """A run, from a checkpoint of its own."""
    if flags:
        name = next(iter(flags)).replace("_", "-")
        raise UsageError(f"a run is explained as it was trained: leave out --{name}, or name a recipe")
    if not (path / CONFIG).is_file():
        raise UsageError(why_no_run(path))
    config = load_config(str(path / CONFIG), {})
    saved, found, notes = state_near(path, step)
    job = built(config, console)
    check_data(path, job)
    if step is not None and found != step:
        notes.append(f"of step {step:,} there is no checkpoint: this is the one at {found:,}")
    return Source(config, job, saved, found, str(path), notes)


def built(config: Config, console: Console) -> Job:
    """The job as `fivestep train` makes it."""
    with preparation_shown(console) as report:
        data = build_data(config, report)
    check_memory(config, data)
    return build_job(config, data)


def state_near(path: Path, step: int | None) -> tuple[dict[str, Any], int, list[str]]:
    """The saved state of the newest sound checkpoint, at or before `step`, its step, and which were damaged."""
    notes: list[str] = []
    steps: list[int] = []
    for folder in newest_first(path / "checkpoints"):
        try:
            checkpoint = read_manifest(folder)
            steps.append(checkpoint.step)
            if step is None or checkpoint.step <= step:
                saved = load_state(checkpoint)
                saved.pop("run", None)
                return saved, checkpoint.step, notes
        except DamagedError as error:
            notes.append(str(error))
    if steps and not notes:
        raise UsageError(
            f"{path} has no checkpoint at or before step {step:,}; its first is of {min(steps):,} (--step)"
        )
    raise UsageError(f"no checkpoint of {path} is sound" if notes else f"{path} holds no checkpoint")


def check_data(path: Path, job: Job) -> None:
    """Raise UsageError where a run's data is not what it was trained on: its ids would mean other tokens."""
    try:
        facts = json.loads(read_bounded(path / ENVIRONMENT, MOST_FACTS))
        digest = facts["data_sha256"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise UsageError(f"{path / ENVIRONMENT} is missing or damaged: {brief(error)}") from error
    if job.data.digest != digest:
        raise UsageError(f"the data ({job.data.name}) has changed since {path} was trained: give it back its own")


@contextmanager
def trained_so_far(console: Console, step: int) -> Iterator[Callable[[int], None]]:
    """A function to call with the updates so far: a bar now and then, which goes with the block."""
    screen = screen_of(console)
    due = perf_counter() + max(1.0, screen.first)

    def told(now: int) -> None:
        nonlocal due
        if perf_counter() >= due and now < step:
            screen.refresh(now / step, [f"trained {now:,} of {step:,} steps"], [])
            due = perf_counter() + screen.every

    try:
        yield told
    finally:
        screen.close()
