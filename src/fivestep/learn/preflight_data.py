"""Checks of the data and of what the run will cost: overlap, features, waiting, memory and disk.

Each looks at no more rows than a few seconds allow, and says how many.
"""

import shutil
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fivestep.data.stream import batches
from fivestep.learn.preflight_finding import Finding, failed, left_out, ok, seconds, share, warning
from fivestep.learn.preflight_job import Examined, row_count, tokens, updated
from fivestep.loop.batch import tensors, to_device, without_empty
from fivestep.loop.modes import enter_training
from fivestep.run.dry_run import in_bytes, in_time, in_units
from fivestep.run.forecast import matmul_rate
from fivestep.run.ledger import Ledger, count_flops, nbytes
from fivestep.run.memory import free
from fivestep.watch.table import counted

SECONDS, ROWS = 3.0, 20_000  # that a look at the data takes at most
LONG, LONG_OF_WORDS, WORDS = 50, 13, 512  # tokens of an n-gram; the ids from which on tokens are words (or parts)
TEXT = 5_000_000  # tokens that are compared
ONCE = "its loader can be iterated only once"


def overlap(job: Examined) -> Finding:
    """The share of the validation data that is in the training data: exact rows, or long n-grams of a text.

    (n-grams of 13 words: Brown et al. 2020, appendix C; of 50 characters where tokens are those.)
    """
    if job.val is None:
        return left_out("the job has no validation data")
    if job.val is job.train:
        return failed("training and validation are one loader", "keep some data aside")
    train, val = ids_of(job, job.train), ids_of(job, job.val)
    if train is not None and val is not None:
        n = LONG_OF_WORDS if max(train.max(), val.max()) >= WORDS else LONG
        if min(train.shape[1], val.shape[1]) >= n:
            part, of = shared(hashes(val, n), hashes(train, n))
            return judged_overlap(part, f"{of:,} validation {n}-grams are in the training data", 0.01, 0.2)
    known, wanted = rows_of(job, job.train), rows_of(job, job.val)
    if not known or not wanted:
        return left_out(ONCE)
    part, of = shared(wanted, known)
    seen = f"{of:,} validation rows are in the training data, of which {len(known):,} rows were looked at"
    return judged_overlap(part, seen, 0.0, 0.05)


def ids_of(job: Examined, data: Any) -> Any:
    """The ids of a text, `[1, length]`, or of a loader's windows, `[windows, time]`; None where there are none."""
    text = getattr(data, "tokens", None)
    if text is not None:
        return np.asarray(text[:TEXT]).astype(np.int64)[None]
    found = [tokens(job, batch) for batch in looked_at(data)]
    windows = [pair[0].cpu() for pair in found if pair is not None]
    if not windows or len(windows) < len(found) or len({one.shape[1] for one in windows}) > 1:
        return None
    return torch.cat(windows)[: TEXT // windows[0].shape[1]].numpy()


def shared(ours: Any, theirs: Any) -> tuple[float, int]:
    """The share of `ours` that is in `theirs` too, and how many `ours` are."""
    return (float(np.isin(ours, theirs).mean()) if len(ours) else 0.0), len(ours)


def hashes(ids: Any, n: int) -> Any:
    """A 64-bit polynomial hash of each n-gram of the rows of `ids`."""
    length = ids.shape[1] - n + 1
    if length < 1:
        return np.zeros(0, np.uint64)
    total = np.zeros((len(ids), length), np.uint64)
    for place in range(n):
        total = (
            total * np.uint64(0x9E3779B97F4A7C15) + ids[:, place : place + length].astype(np.uint64) + np.uint64(1)
        )
    return total.ravel()


def judged_overlap(part: float, words: str, little: float, much: float) -> Finding:
    """A share of the validation data that the training data has, above `little`, or above `much`."""
    figure = f"{share(part)} of {words}"
    if part > much:
        return failed(figure, "split before copying, windowing or augmenting; take what is in both out of one")
    if part > little:
        return warning(figure, "validation is that much too good: take what is in both out of one")
    return ok(figure)


def rows_of(job: Examined, data: Any) -> list[int]:
    """A hash of each row of a loader, inputs and targets together."""
    found: list[int] = []
    for batch in looked_at(data):
        size = row_count(job, batch)
        held = [one.detach().cpu().contiguous() for one in tensors(batch) if one.ndim and one.shape[0] == size]
        flat = [one.reshape(size, -1).view(torch.uint8).numpy() for one in held]
        found += [hash(b"".join(part[row].tobytes() for part in flat)) for row in range(size)]
        if len(found) >= ROWS:
            break
    return found


def looked_at(data: Any) -> Iterator[Any]:
    """Batches, until the time is up."""
    begun = perf_counter()
    for batch in without_empty(batches(data, 0)):
        yield batch
        if perf_counter() - begun > SECONDS:
            return


def features(job: Examined) -> Finding:
    """NaN, constant and duplicated features, of inputs that are numbers."""
    inputs = job.pair(job.batches[0])[0]
    if not isinstance(inputs, Tensor) or not inputs.is_floating_point():
        return left_out("the inputs are ids" if isinstance(inputs, Tensor) else "the inputs are several tensors")
    gathered: list[Tensor] = []
    for batch in looked_at(job.train):
        for place, part in zip(("inputs", "targets"), batch, strict=True):
            bad = sum(int((~one.isfinite()).sum()) for one in tensors(part) if one.is_floating_point())
            if bad:
                where = f"batch {len(gathered) + 1}"
                return failed(f"{bad} values of the {place} in {where} are not finite", "fill or drop those rows")
        table = batch[0].detach().cpu().reshape(len(batch[0]), -1)
        gathered.append(table.float() if table.dtype == torch.bfloat16 else table)  # which NumPy does not know
        if sum(map(len, gathered)) >= ROWS or gathered[0].shape[1] * sum(map(len, gathered)) > 5e7:
            break
    if not gathered:
        return left_out(ONCE)
    if len({one.shape[1] for one in gathered}) > 1:
        return left_out("its inputs are of several lengths; all are finite")
    return judged_features(torch.cat(gathered).numpy())


def judged_features(table: Any) -> Finding:
    """Constant and duplicated columns of finite numbers `[rows, features]`."""
    rows, columns = table.shape
    figure = f"{counted(columns, 'feature')} of {counted(rows, 'row')}, all finite"
    if rows < 2 or columns < 2:
        return ok(figure)
    varying = table[:, (table != table[0]).any(0)]
    constant = columns - varying.shape[1]
    duplicated = varying.shape[1] - len({column.tobytes() for column in np.ascontiguousarray(varying.T)})
    if not constant + duplicated:
        return ok(f"{figure}, none constant or twice there")
    text = f"{figure}; {constant:,} constant, {duplicated:,} twice there"
    remedy = "leave them out, or look where they were made: they say nothing"
    return (failed if constant + duplicated > columns / 2 else warning)(text, remedy)


def speed(job: Examined) -> Finding:
    """What a step waits for, data or arithmetic, and how far it is from the machine's rate of matrix products."""
    draws, step = drawing(job), job.step_seconds
    if not draws:
        return left_out(ONCE)
    drawn = median(draws)
    waiting = drawn / (drawn + step)
    own = job.copy()
    enter_training(own.model, set())
    with count_flops() as counter:
        own(job.batches[0], apply=False)
    precision = job.options.get("precision", "fp32")
    flop, rate = counter.get_total_flops() / step, matmul_rate(job.device, precision)
    products = f"; {share(flop / rate)} of this machine's {in_units(rate)}FLOP/s" if flop else ""
    figure = f"{share(waiting)} waiting: drawing {seconds(drawn)}, a step {seconds(step)}{products}"
    remedy = "the data is what takes the time: more num_workers, larger reads, items made beforehand"
    if waiting > 0.8:
        return failed(figure, remedy)
    return warning(figure, remedy) if waiting > 0.4 else ok(figure)


def drawing(job: Examined) -> list[float]:
    """What some draws of a batch take, in seconds, each after a step, in which workers may go on."""
    source, own = without_empty(batches(job.train, 0)), job.copy()
    enter_training(own.model, set())
    taken: list[float] = []
    begun = perf_counter()
    while len(taken) < 20 and (perf_counter() - begun < SECONDS or len(taken) < 2):
        start = perf_counter()
        try:
            batch = to_device(next(source), job.device)
        except StopIteration:
            break
        taken.append(perf_counter() - start)
        updated(own, batch)
    return taken[1:] or taken  # the first starts the workers


def room(job: Examined) -> Finding:
    """Memory and disk of the whole run, forecast, beside what is free."""
    if job.facts is not None:
        facts = job.facts
        need, saved = max(facts.peak[0], facts.evaluation_peak), facts.saved + facts.optimizer_state
    else:
        need, saved = followed(job)
    copies = (job.config.keep_last if job.config is not None else 2) + 2  # the best, and one being written
    there, disk = free(job.device), shutil.disk_usage(Path.cwd()).free
    memory = "" if there is None else f" of {in_bytes(there)} free"
    figure = f"memory {in_bytes(need)}{memory}; disk {in_bytes(copies * saved)} of {in_bytes(disk)} free"
    if there is not None and need > there:
        return failed(figure, "a smaller --batch-size with --accumulate, or a smaller model")
    if copies * saved > disk:
        return failed(figure, f"{copies} checkpoints do not fit: free the disk, or another --run-dir")
    if job.steps is not None and job.config is not None and not job.notes:
        figure += f"; {job.steps:,} steps take {in_time(job.steps * job.step_seconds * job.config.accumulate)}"
    return ok(figure)


def followed(job: Examined) -> tuple[int, int]:
    """The most bytes that a second step holds at once, and those of a checkpoint, from the allocations of two."""
    own = job.copy()
    enter_training(own.model, set())
    with Ledger(job.device) as ledger:
        ledger.add(list(own.model.state_dict().values()))
        for number_ in range(2):
            if number_:
                ledger.rewind()
            updated(own, job.batches[0])
    return ledger.peak[0], nbytes(own.model.state_dict()) + nbytes([dict(one.state) for one in own.optimizers])
