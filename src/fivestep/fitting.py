"""`fit`: the generator drained, with the standard watchers.

    each step of train(...)   -> training row and evaluation row, where due -> watchers(result, rows)
    each epoch's end          -> the epoch's training row, evaluation where due -> watchers(result, rows)

A *row* is a dict like a line of metrics.jsonl. A *watcher* is a function of a step's result and the rows that the
step brought (mostly none). Owns when rows are made and what is in them; writes no file.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from time import perf_counter
from typing import Any

from torch import nn

from fivestep.data.stream import batches_per_epoch
from fivestep.errors import UsageError
from fivestep.loop.clock import Clock, Limit, Trigger
from fivestep.loop.evaluate import evaluate
from fivestep.loop.mean import Mean
from fivestep.loop.objective import as_objective
from fivestep.loop.state import State
from fivestep.loop.step import StepResult
from fivestep.loop.train import train
from fivestep.watch.progress import Progress

Row = dict[str, Any]
Watcher = Callable[[StepResult, list[Row]], None]


def fit(
    model: nn.Module,
    data: Any,
    criterion: Any,
    optimizer: Any,
    *,
    epochs: int | None = None,
    max_iters: int | None = None,
    until: int | str | None = None,
    val: Any = None,
    eval_every: int | str | None = "1ep",
    log_every: int | str | None = None,
    metrics: Mapping[str, Any] | None = None,
    progress: Progress | bool = True,
    watchers: Sequence[Watcher] = (),
    accumulate: int = 1,
    state: State | None = None,
    **step_options: Any,
) -> list[Row]:
    """Train to the first of `epochs`, `max_iters`, `until`; returns the history, a list of rows.

    `val`: evaluated over the whole split, `eval_every` and at the end, with `metrics`. `log_every`: training rows
    beside those of each evaluation and each epoch's end. The other arguments are those of `train`.
    """
    limit = Limit(epochs, max_iters, until)
    if not limit.ends:
        raise UsageError("say how long to train: epochs=, max_iters= or until= (--epochs, --max-iters, --until)")
    log, look = (
        Trigger(log_every, "log_every (--log-every)"),
        Trigger(eval_every, "eval_every (--eval-every)"),
    )
    clock = state.clock if state else Clock()
    log.start(clock)
    look.start(clock)
    if progress is True:
        per_epoch = batches_per_epoch(data)
        progress = Progress(limit.total_steps(per_epoch and -(-per_epoch // accumulate)))
    journal = Journal(as_objective(criterion), [*([progress] if progress else []), *watchers])

    def validated(result: StepResult) -> list[Row]:
        if val is None:
            return []
        precision = step_options.get("precision", "fp32")
        return [
            journal.validation_row(
                result, lambda: evaluate(model, val, criterion, metrics=metrics, precision=precision)
            )
        ]

    result: StepResult | None = None
    try:
        while not limit.reached(clock):
            epoch = clock.epoch
            # One epoch of the generator at a time: what is due at an epoch's end must come before the next one's
            # first step, and only a drained epoch knows that it has ended.
            steps = train(
                model,
                data,
                criterion,
                optimizer,
                epochs=epoch + 1,
                max_iters=max_iters,
                until=until,
                accumulate=accumulate,
                state=state,
                **step_options,
            )
            for result in steps:
                state, clock = result.state, result.state.clock
                rows: list[Row] = []
                looking = look.due(clock)
                if looking or log.due(clock):
                    rows.append(journal.training_row(result, result.state.logged_loss))
                if looking:
                    rows += validated(result)
                journal.publish(result, rows)
            looking = look.due(clock)
            if result and clock.epoch > epoch and (looking or epochs is not None):
                rows = [journal.training_row(result, result.state.epoch_loss)]
                journal.publish(result, rows + (validated(result) if looking else []))
        if result and val is not None and not journal.validated_at(result.step):
            rows = (
                [journal.training_row(result, result.state.logged_loss)] if result.state.logged_loss.entries else []
            )
            journal.publish(result, rows + validated(result))
    finally:
        if progress:
            progress.close()
    return journal.history


class Journal:
    """Makes rows, keeps them as the history, and hands them to the watchers."""

    def __init__(self, objective: Any, watchers: Sequence[Watcher]):
        self.objective, self.watchers = objective, watchers
        self.history: list[Row] = []
        self.clock, self.away = Clock(), 0.0  # at the last training row; seconds of evaluation since

    def publish(self, result: StepResult, rows: list[Row]) -> None:
        """Keep `rows` and call every watcher; called for each step, with rows or without."""
        self.history += rows
        for watcher in self.watchers:
            watcher(result, rows)

    def training_row(self, result: StepResult, mean: Mean) -> Row:
        """The count-weighted mean loss of the steps in `mean`, the rate of training since the last such row.

        Seed 001 divides the sum of batch means by their number, which is wrong for a short last batch; this does not.
        """
        clock, last = result.state.clock, self.clock
        seconds = max(clock.seconds - last.seconds - self.away, 1e-9)
        unit = "tokens" if clock.tokens else "samples"
        row = self.row("train", result, mean.result())
        row["steps"] = mean.entries
        row["learning_rate"], row["grad_norm"] = result.learning_rate, float(result.grad_norm)
        row[f"{unit}_per_second"] = (getattr(clock, unit) - getattr(last, unit)) / seconds
        mean.reset()
        result.state.logged_loss.reset()
        self.clock, self.away = replace(clock), 0.0
        return row

    def validation_row(self, result: StepResult, evaluated: Callable[[], dict[str, float]]) -> Row:
        """The figures of a split at this step; the time they take is not training time."""
        started = perf_counter()
        figures = evaluated()
        self.away += perf_counter() - started
        return {**self.row("val", result, figures["loss"]), **figures}

    def row(self, split: str, result: StepResult, loss: float) -> Row:
        """What every row holds."""
        elapsed = result.state.clock.seconds
        row = {"step": result.step, "epoch": result.epoch, "split": split, "loss": loss}
        figures = self.objective.figures(loss) if hasattr(self.objective, "figures") else {}
        return {**row, **figures, "elapsed_seconds": elapsed}

    def validated_at(self, step: int) -> bool:
        """Whether the history holds a validation of this step."""
        return any(row["split"] == "val" and row["step"] == step for row in reversed(self.history))
