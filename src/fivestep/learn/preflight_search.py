"""`fivestep doctor --find-lr`, `--find-batch`: values tried on a job, in a process of their own.

    this process ── what to try (JSON) ──> python -m fivestep.learn.preflight_search ── a line each ──> a file

What runs out of memory, or crashes, takes that process with it and no more; what it found before stands. Only a value
that was tried is returned. Owns what is tried, where it ends and which is taken; leaves nothing behind.
"""

import json
import math
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from time import perf_counter, sleep
from typing import Any

import msgspec
import torch

from fivestep.errors import FivestepError, UsageError, brief
from fivestep.learn.preflight_finding import number
from fivestep.learn.preflight_job import Examined, aside, examined, row_count, take, updated
from fivestep.learn.preflight_learning import try_rate
from fivestep.loop.batch import parts, rebuilt
from fivestep.loop.modes import enter_training
from fivestep.run import strict_json
from fivestep.run.build import build_data, build_job
from fivestep.run.memory import STATUS, free

SPAN, PER_DECADE = 3, 2  # decades tried below and above the job's learning rate, and rates in each
BUDGET = 40.0  # seconds that all rates take together, about
FEWEST, MOST = 5, 40  # steps at a rate
LOST = 2.0  # times the first loss: larger rates are not tried any more
GROWS = 1.05  # how much faster a batch of twice the size must be, to count
LARGEST = 1 << 16  # rows
SHARE = 0.8  # of the free memory that may be used

Say = Callable[[str], None]
Line = dict[str, Any]


@dataclass(frozen=True)
class Found:
    """What was tried, a line each, which value was taken, and what ended the search."""

    tried: list[Line]
    value: float | int | None
    why: str


# --- what is taken ---


def best_rate(tried: list[Line]) -> float | None:
    """Of the rates that were not lost the one with the lowest loss, at least one below the first that was lost."""
    kept = [one for one in tried if one["after"] is not None and one["after"] < one["before"]]
    lost = [one["value"] for one in tried if one["after"] is None or one["after"] > one["before"]]
    ceiling = min((rate for rate in lost if not kept or rate > kept[0]["value"]), default=math.inf)
    below = [one for one in kept if one["value"] * 10 ** (1.5 / PER_DECADE) < ceiling] or kept[:1]
    best = min(below, key=lambda one: one["after"], default=None)
    return None if best is None else best["value"]


def best_batch(tried: list[Line]) -> int | None:
    """The smallest of the sizes that are nearly as fast as the fastest."""
    fastest = max((one["rows_per_second"] for one in tried), default=0.0)
    return next((one["value"] for one in tried if GROWS * one["rows_per_second"] >= fastest), None)


# --- this process ---


def find(what: str, source: str | None, flags: Mapping[str, Any], say: Say, limit: int | None = None) -> Found:
    """Try rates ("lr") or batch sizes ("batch") in a process of its own. limit: bytes of memory it may have.

    Raises UsageError where the job cannot be examined.
    """
    with tempfile.TemporaryDirectory("-fivestep-doctor") as folder:
        lines, log = Path(folder) / "tried.jsonl", Path(folder) / "log"
        lines.touch()
        request = {"what": what, "source": source, "flags": dict(flags), "limit": limit, "lines": str(lines)}
        tried: list[Line] = []
        with log.open("wb") as output, started(request, output) as process:
            try:
                for line in following(lines, process):
                    tried.append(line)
                    if "value" in line:
                        say(shown(what, line))
            finally:
                process.kill()
                process.wait()
        return judged(what, tried, process.returncode, log.read_text("utf-8", "replace"))


def started(request: Line, output: Any) -> subprocess.Popen[bytes]:
    """The process that tries."""
    here = os.pathsep.join([str(Path(__file__).parents[2]), *filter(None, [os.environ.get("PYTHONPATH")])])
    process = subprocess.Popen(
        [sys.executable, "-m", "fivestep.learn.preflight_search", json.dumps(request)],
        stdin=subprocess.DEVNULL,
        stdout=output,
        stderr=subprocess.STDOUT,
        env={**os.environ, "PYTHONPATH": here, "PYTHONDONTWRITEBYTECODE": "1"},
    )
    return process


def following(path: Path, process: subprocess.Popen[bytes]) -> Iterator[Line]:
    """The lines of a file as they are written, until the process has ended."""
    with path.open("r", encoding="utf-8") as file:
        while True:
            ended = process.poll() is not None
            for line in file:
                yield json.loads(line)
            if ended:
                return
            sleep(0.02)


def judged(what: str, lines: list[Line], code: int, log: str) -> Found:
    """The value that is taken. Raises FivestepError where nothing was tried at all."""
    tried = [line for line in lines if "value" in line]
    last = next((line["trying"] for line in reversed(lines) if "trying" in line), None)
    why = next((line["why"] for line in lines if "why" in line), "")
    if not tried and code:
        said = [line for line in log.splitlines() if line.strip()] or ["it said nothing"]
        error = FivestepError(said[-1].removeprefix("fivestep: "))
        error.exit_code = 2 if code == 2 else 1
        raise error
    if code and not why:
        ended = f"signal {-code}" if code < 0 else f"exit code {code}"
        why = f"the process ended at {last} ({ended}): most likely out of memory"
    return Found(tried, best_rate(tried) if what == "lr" else best_batch(tried), why)


HEADS = {"lr": f"{'learning rate':>14}{'loss before':>13}{'after':>10}{'steps':>7}",
         "batch": f"{'batch size':>10}{'rows/s':>12}{'a step':>12}{'memory':>10}"}  # fmt: skip


def shown(what: str, line: Line) -> str:
    """A value's line of the table."""
    if what == "lr":
        after = "lost" if line["after"] is None else number(line["after"])
        return f"{number(line['value']):>14}{number(line['before']):>13}{after:>10}{line['steps']:>7}"
    used = "-" if line["memory"] is None else f"{line['memory'] / 1e6:,.0f} MB"
    milliseconds = f"{1000 * line['seconds']:.3g} ms"
    return f"{line['value']:>10,}{line['rows_per_second']:>12,.0f}{milliseconds:>12}{used:>10}"


def search(what: str, source: str | None, flags: Mapping[str, Any], as_json: bool, say: Say) -> bool:
    """Try values, show all that were tried, and the one to take; whether there is one."""
    if not as_json:
        say(HEADS[what])
    found = find(what, source, flags, (lambda line: None) if as_json else say)
    flag = "--learning-rate" if what == "lr" else "--batch-size"
    if as_json:
        say(strict_json.dumps({"value": found.value, "why": found.why, "tried": found.tried}))
    elif found.value is None:
        say(f"\nnone of these can be taken: {found.why or 'the loss falls at none'}")
    else:
        why = f"  ({found.why})" if found.why else ""
        say(f"\n{flag} {number(found.value) if what == 'lr' else found.value}{why}")
    return found.value is not None


# --- the process that tries ---


def tried_rates(job: Examined) -> Iterator[Line]:
    """An exponential range test (Smith 2017): a short training at each rate, from equal weights, with real steps."""
    factors = [10 ** (power / PER_DECADE) for power in range(-SPAN * PER_DECADE, SPAN * PER_DECADE + 1)]
    steps = int(min(max(BUDGET / len(factors) / job.step_seconds, FEWEST), MOST))
    own = float(job.optimizers[0].param_groups[0]["lr"])
    for factor in factors:
        yield {"trying": own * factor}
        with aside():
            trial = try_rate(job, factor, steps)
        after = trial.after if math.isfinite(trial.after) else None
        yield {"value": trial.rate, "before": trial.before, "after": after, "steps": steps}
        if after is None or after > LOST * trial.before:
            yield {"why": "larger rates were not tried: the loss is lost already"}
            return


def tried_sizes(job: Examined) -> Iterator[Line]:
    """Batches of 1, 2, 4, ... rows, until memory ends or twice the rows are no faster, twice."""
    fastest, slower, size = 0.0, 0, 1
    while size <= LARGEST:
        yield {"trying": size}
        try:
            line = timed(sized(job, size))
        except (MemoryError, RuntimeError) as error:
            if not isinstance(error, MemoryError) and "memory" not in str(error).lower():
                raise
            yield {"why": f"a batch of {size:,} does not fit into memory"}
            return
        except FivestepError as error:
            yield {"why": f"a batch of {size:,} cannot be made: {brief(error)}"}
            return
        yield {"value": size, **line}
        slower = slower + 1 if line["rows_per_second"] < GROWS * fastest else 0
        if slower == 2:
            yield {"why": "larger batches are no faster"}
            return
        fastest, size = max(fastest, line["rows_per_second"]), 2 * size


def sized(job: Examined, size: int) -> Examined:
    """The job with a batch of so many rows: made by its configuration, or by joining the batches of its loader."""
    if job.config is not None:
        config = msgspec.structs.replace(job.config, batch_size=size, accumulate=1)
        made = build_job(config, data := build_data(config))
        batch = next(iter(data.train.epoch(0)))
        if row_count(job, batch) < size:
            raise UsageError(f"the data has {row_count(job, batch):,} rows")
        return replace(job, model=made.model, criterion=made.objective, optimizers=made.optimizers, batches=[batch])
    given = sum(row_count(job, one) for one in job.batches)
    batch = joined(job.batches * -(-size // given))  # the same rows again, where there are too few
    return replace(job, batches=[take(job, batch, 0, size)])


def joined(batches: list[Any]) -> Any:
    """Batches of one form as one, joined over their rows."""
    if isinstance(batches[0], torch.Tensor):
        return torch.cat(batches) if batches[0].ndim else batches[0]
    inside = [joined(list(same)) for same in zip(*map(parts, batches), strict=True)]
    return rebuilt(batches[0], inside)


def timed(job: Examined) -> Line:
    """Rows a second of the job's first batch, its step and the memory held after it, the best of three."""
    own, seconds = job.copy(), []
    enter_training(own.model, set())
    for _ in range(4):  # the first warms up
        start = perf_counter()
        updated(own, job.batches[0])
        seconds.append(perf_counter() - start)
    rows, least = row_count(job, job.batches[0]), min(seconds[1:])
    on_gpu = job.device.type == "cuda"
    memory = torch.cuda.max_memory_allocated(job.device) if on_gpu else peak_of_process()
    return {"rows_per_second": rows / least, "seconds": least, "memory": memory}


def peak_of_process() -> int | None:
    """The most bytes that this process has held."""
    with suppress(ImportError):
        import resource

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return None


def limit_memory(limit: int | None, device: torch.device) -> None:
    """Let this process ask for so many bytes more, or for most of what is free; where the system can."""
    there = limit if limit is not None else int(SHARE * (free(torch.device("cpu")) or 0))
    if device.type == "cpu" and there and STATUS.exists():
        import resource

        now = next(
            int(line.split()[1]) * 1024 for line in STATUS.read_text().splitlines() if line.startswith("VmSize")
        )
        resource.setrlimit(resource.RLIMIT_AS, (now + there, resource.getrlimit(resource.RLIMIT_AS)[1]))


def trying(request: Line) -> None:
    """Try what is asked for, and write a line of each."""
    job = examined(request["source"], request["flags"])
    job.step_seconds  # noqa: B018  (a first step, before memory is limited: it loads libraries)
    limit_memory(request["limit"], job.device)
    with Path(request["lines"]).open("a", encoding="utf-8", buffering=1) as file:
        for line in (tried_rates if request["what"] == "lr" else tried_sizes)(job):
            file.write(json.dumps(line) + "\n")


if __name__ == "__main__":
    try:
        trying(json.loads(sys.argv[1]))
    except FivestepError as error:
        print(f"fivestep: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
