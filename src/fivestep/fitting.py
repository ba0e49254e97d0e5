"""`fit`: the generator drained, with the standard watchers.

    each step of train(...)   -> training row and evaluation row, where due -> watchers(result, rows)
    each epoch's end          -> the epoch's training row, evaluation where due -> watchers(result, rows)

A *row* is a dict like a line of metrics.jsonl. A *watcher* is a function of a step's result and the rows that the
step brought (mostly none). Owns when rows are made and what is in them; writes no file.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial
from typing import Any

from torch import nn

from fivestep.data.stream import steps_in
from fivestep.errors import UsageError, named
from fivestep.loop.clock import Clock, Limit, Trigger
from fivestep.loop.evaluate import evaluate
from fivestep.loop.mean import Mean
from fivestep.loop.plateau import ANNEALED, STOPPED, PlateauRule
from fivestep.loop.state import State
from fivestep.loop.step import StepResult, TrainStep
from fivestep.loop.train import check_accumulate, steps
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
    scheduler: Any = None,
    scheduler_every: int | str = 1,
    clip_norm: float | None = None,
    clip_value: float | None = None,
    precision: str = "fp32",
    ema: float | None = None,
    on_nonfinite: str = "stop",
    anneal: float | None = None,
    anneal_patience: int = 0,
    early_stop: int | None = None,
    to_best: bool = False,
    state: State | None = None,
) -> list[Row]:
    """Train to the first of `epochs`, `max_iters` (updates) and `until`; returns the history, a list of rows.

    data, val: a DataLoader, any iterable of batches, or a stream. `val` is evaluated whole, `eval_every` and at the
    end; `metrics` maps names to functions (outputs, targets) or torchmetrics objects.
    eval_every, log_every, until, scheduler_every: steps (250), "1ep", "50ksmp", "10Mtok", "30s", "5min", "2h".
    log_every: training rows beside those of each evaluation and each epoch's end.
    progress: the table, and a bar on a terminal or in a notebook; elsewhere a line after 10 seconds, then every 30.
    watchers: functions of (StepResult, rows), called at each step.
    accumulate: batches of `data` that make one step. state: go on from there.
    scheduler, scheduler_every, clip_norm, clip_value, precision, ema, on_nonfinite: as in `TrainStep`; with `ema` it
    is the averaged weights that are evaluated.
    anneal: divide the learning rate by this after a validation that is no improvement (4, as word_language_model
    does), having let `anneal_patience` of them pass since the best or the last annealing. early_stop: end after so
    many in a row. to_best: at both, back to the weights and optimizer of the best validation.

    A row: step, epoch (from 1), split, loss, elapsed_seconds, and what the objective adds (perplexity). A training
    row's loss is the count-weighted mean over its last `steps` steps; it adds lr and grad_norm of the last step, and
    samples_per_second or tokens_per_second, and waiting_share: of its seconds, those of drawing batches. A validation
    row adds count and the metrics, and `event` where it brought one ("annealed", "stopped early").
    Raises UsageError for arguments and batches that do not fit, NonFiniteError before a non-finite update, or, where
    these are skipped (`state.skipped` lists them), after an epoch without any other.
    """
    limit = Limit(epochs, max_iters, until)
    if not limit.ends:
        raise UsageError("say how long to train: epochs=, max_iters= or until= (--epochs, --max-iters, --until)")
    check_accumulate(accumulate)
    rule = PlateauRule(anneal, anneal_patience, early_stop, to_best)
    if rule.acts and val is None:
        raise UsageError("anneal and early_stop follow the validation loss: give val= (--anneal, --early-stop)")
    if isinstance(val, Iterator):
        raise UsageError(f"val is {named(val)}, which can be iterated only once; give a loader or a list")
    step = TrainStep(
        model,
        criterion,
        optimizer,
        scheduler=scheduler,
        scheduler_every=scheduler_every,
        clip_norm=clip_norm,
        clip_value=clip_value,
        precision=precision,
        ema=ema,
        on_nonfinite=on_nonfinite,
        state=state,
    )
    clock = step.state.clock
    log = Trigger(log_every, "log_every (--log-every)", clock)
    look = Trigger(eval_every, "eval_every (--eval-every)", clock)
    if progress is True:
        progress = Progress(limit.total_steps(partial(steps_in, data, accumulate)), limit=limit)
    logged = step.state.logged_loss
    journal = Journal(step, [*([progress] if progress else []), *watchers])

    if rule.to_best and step.state.plateau.best is None and step.state.plateau.since_best:
        raise UsageError(
            "to_best= was not on where this state comes from: its best weights are not known (--to-best)"
        )

    def publish(result: StepResult, rows: list[Row], looking: bool, judging: bool = True) -> None:
        if looking and val is not None:
            try:
                with result.state.averaged():
                    figures = evaluate(model, val, criterion, metrics=metrics, precision=precision)
            except BaseException:
                journal.publish_despite(result, rows)  # what the training measured is not lost with it
                raise
            row = {**journal.row("val", result, figures["loss"]), **figures}
            if rule.acts and judging and not journal.ended():
                row |= journal.judge(result.state, rule, figures["loss"])
            rows = [*rows, row]
        journal.publish(result, rows)
        if looking and rule.to_best and row.get("event"):
            result.state.return_to_best()

    result: StepResult | None = None
    try:
        while not limit.reached(clock) and not journal.ended():
            started = replace(clock)
            # One epoch of the generator at a time: what is due at an epoch's end must come before the next one's
            # first step, and only a drained epoch knows that it has ended.
            for result in steps(step, data, Limit(clock.epoch + 1, max_iters, until), accumulate):
                looking, logging = look.due(clock), log.due(clock)
                rows = [journal.training_row(result, logged, journal.clock)] if looking or logging else []
                publish(result, rows, looking)
                if journal.ended():
                    break
            looking, logging = look.due(clock), log.due(clock)
            if result and clock.epoch > started.epoch and (looking or logging or epochs is not None):
                rows = [journal.training_row(result, step.state.epoch_loss, started)]
                publish(result, rows, looking)
        if result:
            rows = [journal.training_row(result, logged, journal.clock)] if logged.entries else []
            # Not judged: another end of the same training would not have validated here.
            publish(result, rows, not journal.validated_at(result.step), judging=False)
    except BaseException:
        if result and logged.entries and not step.state.updating:
            journal.publish_despite(result, [journal.training_row(result, logged, journal.clock)])
        raise
    finally:
        if progress:
            progress.close()
    return journal.history


class Journal:
    """Makes rows, keeps them as the history, and hands them to the watchers."""

    def __init__(self, step: TrainStep, watchers: Sequence[Watcher]):
        self.objective, self.watchers = step.objective, watchers
        self.history: list[Row] = []
        self.stopped = False  # early, by the plateau's rule
        self.clock = replace(step.state.clock)  # at the last training row

    def publish(self, result: StepResult, rows: list[Row]) -> None:
        """Keep `rows` and call every watcher; called for each step, with rows or without."""
        self.history += rows
        for watcher in self.watchers:
            watcher(result, rows)

    def publish_despite(self, result: StepResult, rows: list[Row]) -> None:
        """The same after an error, to every watcher whatever one of them raises: the first error is told."""
        self.history += rows
        for watcher in self.watchers:
            with suppress(Exception, KeyboardInterrupt):
                watcher(result, rows)

    def training_row(self, result: StepResult, mean: Mean, since: Clock) -> Row:
        """The count-weighted mean loss of the steps in `mean`, and the rate of training `since` an earlier clock.

        The usual sum of batch means over their number is wrong for a short last batch; this is not.
        """
        clock = result.state.clock
        seconds = max(clock.seconds - since.seconds, 1e-9)
        unit = "tokens" if clock.tokens else "samples"
        row = self.row("train", result, mean.result())
        row["steps"] = mean.entries
        row["lr"], row["grad_norm"] = float(result.learning_rate), float(result.grad_norm)
        row[f"{unit}_per_second"] = (getattr(clock, unit) - getattr(since, unit)) / seconds
        row["waiting_share"] = (clock.waiting - since.waiting) / seconds
        mean.reset()
        result.state.logged_loss.reset()
        self.clock = replace(clock)
        return row

    def ended(self) -> bool:
        """Whether validation has stopped improving for too long."""
        return self.stopped

    def judge(self, state: State, rule: PlateauRule, loss: float) -> Row:
        """What a validation brings: nothing, or the event and the learning rate's factor from here on."""
        event = state.plateau.judge(loss, rule)
        if rule.to_best and state.plateau.since_best == 0:
            state.keep_best()
        self.stopped = event == STOPPED
        factor = {"annealing": state.plateau.annealing} if event == ANNEALED else {}
        return {"event": event, **factor} if event else {}

    def row(self, split: str, result: StepResult, loss: float) -> Row:
        """What every row holds."""
        elapsed = result.state.clock.seconds
        row = {"step": result.step, "epoch": result.epoch, "split": split, "loss": loss}
        figures = self.objective.figures(loss) if hasattr(self.objective, "figures") else {}
        return {**row, **figures, "elapsed_seconds": elapsed}

    def validated_at(self, step: int) -> bool:
        """Whether the history holds a validation of this step."""
        return any(row["split"] == "val" and row["step"] == step for row in reversed(self.history))
