"""`fit`: the generator drained, with the standard watchers.

    each step of train(...)   -> training row and evaluation row, where due -> watchers(result, rows)
    each epoch's end          -> the epoch's training row, evaluation where due -> watchers(result, rows)

A *row* is a dict like a line of metrics.jsonl. A *watcher* is a function of a step's result and the rows that the
step brought (mostly none). Owns when rows are made and what is in them; writes no file.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial
from inspect import signature
from sys import stderr
from typing import Any

from torch import Tensor, nn

from fivestep import processes
from fivestep.data.stream import check_batched, is_stream, steps_in
from fivestep.errors import UsageError, named
from fivestep.loop.checks import check_run, check_switches
from fivestep.loop.clock import Limit, Trigger, check_accumulate
from fivestep.loop.evaluate import evaluate, try_metrics
from fivestep.loop.mean import Mean
from fivestep.loop.metrics import OWN_FIELDS, figures_of_loss, try_figures
from fivestep.loop.optimizer import check_no_modes
from fivestep.loop.plateau import ANNEALED, PlateauRule
from fivestep.loop.result import StepResult, last_result
from fivestep.loop.settings import with_settings
from fivestep.loop.state import State
from fivestep.loop.step import TrainStep
from fivestep.loop.train import steps
from fivestep.watch.lens import Lens
from fivestep.watch.progress import Progress

Row = dict[str, Any]
RESERVED = {*OWN_FIELDS, "perplexity", "bits_per_char"}
Watcher = Callable[[StepResult, list[Row]], None]


def fit(
    model: nn.Module,
    data: Any,
    criterion: Any,
    optimizer: Any,
    *,
    epochs: int | None = None,
    max_iters: int | str | None = None,
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
    graph: bool = False,
    activation_checkpointing: bool = False,
    parallel: str = "auto",
    run: Any = None,
    anneal: float | None = None,
    anneal_patience: int = 0,
    early_stop: int | None = None,
    to_best: bool = False,
    lens: int | None = None,
    state: State | None = None,
) -> list[Row]:
    """Train to the first of `epochs`, `max_iters` (updates) and `until`; returns the history, a list of rows.

    data, val: a DataLoader, any iterable of batches, or a stream; under torchrun that of all processes, each of which
    takes its rows of each batch. `val` is evaluated whole, `eval_every` and at the end; `metrics` maps names to
    functions (outputs, targets) or torchmetrics objects (see `evaluate`), and is tried on its first batch at once.
    eval_every, log_every, until, scheduler_every: steps (250), "1ep", "50ksmp", "10Mtok", "30s", "5min", "2h".
    log_every: training rows beside those of each evaluation and each epoch's end.
    progress: the table, and a bar on a terminal or in a notebook; elsewhere a line after 10 seconds, then every 30.
    watchers: functions of (StepResult, rows), called at each step.
    accumulate: batches of `data` that make one step. state: go on from there.
    scheduler, scheduler_every, clip_norm, clip_value, precision, ema, on_nonfinite, graph, activation_checkpointing,
    parallel: as in `TrainStep`; with `ema` it is the averaged weights that are evaluated.
    run: an `fs.Run` inside its `with` block. Training resumes from its newest checkpoint; rows and state are saved.
    anneal: divide the learning rate by this after a validation that is no improvement (4, as word_language_model
    does), having let `anneal_patience` of them pass since the best or the last annealing. early_stop: end after so
    many in a row. to_best: at both, back to the weights and optimizer of the best validation.
    lens: look into each layer every so many steps (`watch/lens.py`): a row with split "lens", strips under the bar,
    and a warning where a layer dies, explodes or stops moving.

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
    check_run(run)
    check_switches(to_best=to_best)
    if not isinstance(progress, bool | Progress):
        raise UsageError(f"progress = {named(progress)} must be True, False or a Progress")
    rule = PlateauRule(anneal, anneal_patience, early_stop, to_best)
    if rule.acts and val is None:
        raise UsageError("anneal and early_stop follow the validation loss: give val= (--anneal, --early-stop)")
    for name in (metrics or {}) if isinstance(metrics, Mapping) else ():
        if name in RESERVED:
            raise UsageError(f"a metric is named {name!r}, as a row's own field is; give it another name")
    if isinstance(val, Iterator):
        raise UsageError(f"val is {named(val)}, which can be iterated only once; give a loader or a list")
    check_batched(data)
    check_batched(val)
    if val is not None and (
        isinstance(val, str | bytes | Mapping) or not (is_stream(val) or hasattr(val, "__iter__"))
    ):
        raise UsageError(f"val is {named(val)}; it must be a DataLoader, a list of batches, or a stream of fivestep")
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
        graph=graph,
        activation_checkpointing=activation_checkpointing,
        parallel=parallel,
        state=state,
    )
    check_no_modes(step.optimizers)
    watchers = checked_watchers(watchers)
    state, clock = step.state, step.state.clock
    history: list[Row] = []
    with processes.together():
        if run is not None:
            acts = {"anneal": anneal, "anneal_patience": anneal_patience, "to_best": to_best}
            history = run.attach(with_settings(step, data, accumulate, **acts))
    stopped_early = state.plateau.stopped(rule)
    ended = limit.reached(clock) or stopped_early
    if run is not None and ended:
        run.tell_ended(state, stopped_early)
    if not ended:  # now, not after an epoch
        try_figures(step.objective)
    if val is not None and not ended:
        try_metrics(model, val, criterion, metrics, precision)
    state.told = state.told or replace(clock)
    log, look = Trigger(log_every, "log_every (--log-every)"), Trigger(eval_every, "eval_every (--eval-every)")
    if not processes.is_first():
        progress = False  # one speaks for all
    elif progress is True:
        progress = Progress(limit.total_steps(partial(steps_in, data, accumulate)), limit=limit)
    shown = [progress] if isinstance(progress, Progress) else []
    journal = Journal(step, history, run, [*shown, *watchers])
    seen: Any = step if lens is None else Lens(step, lens)

    if rule.to_best and state.plateau.best is None and state.plateau.since_best:
        raise UsageError(
            "to_best= was not on where this state comes from: its best weights are not known (--to-best)"
        )

    def publish(result: StepResult, rows: list[Row], looking: bool, judging: bool = True) -> None:
        # Nothing is changed until the figures are there: interrupted before, it is done again after a resume.
        if looking and val is not None:
            with state.averaged():
                figures = evaluate(model, val, criterion, metrics=metrics, precision=precision)
            row = {**journal.row("val", result, figures["loss"]), **figures}
            if rule.acts and judging and not state.plateau.stopped(rule):
                row |= journal.judge(state, rule, figures["loss"])
            rows = [*rows, row]
        if rows and rows[-1].get("to_best"):
            state.return_to_best()
        journal.publish(result, rows)

    def due() -> tuple[bool, bool]:
        since = state.told or clock
        return look.due(since, clock), log.due(since, clock)

    def close_step(result: StepResult) -> None:
        looking, logging = due()
        rows = [journal.training_row(result, state.logged_loss)] if looking or logging else []
        publish(result, rows, looking)

    def close_epoch(result: StepResult) -> None:
        looking, logging = due()
        if looking or logging or epochs is not None:
            publish(result, [journal.training_row(result, state.epoch_loss)], looking)
        state.told = journal.epoch = replace(clock)

    result = last_result(state)  # where a training goes on
    try:
        if result and result.epoch > clock.epoch and any(due()):
            close_step(result)  # this was broken off
        while True:
            if result and state.told and clock.epoch > state.told.epoch:
                close_epoch(result)
            if limit.reached(clock) or state.plateau.stopped(rule):
                break
            # One epoch of the generator at a time: what is due at an epoch's end must come before the next one's
            # first step, and only a drained epoch knows that it has ended.
            for result in steps(seen, data, Limit(clock.epoch + 1, max_iters, until), accumulate, run):
                if lens is not None:
                    journal.look(seen, result, progress)
                close_step(result)
                if state.plateau.stopped(rule):
                    break
        if result:
            rows = [journal.training_row(result, state.logged_loss)] if state.logged_loss.entries else []
            # Not judged: another end of the same training would not have validated here.
            publish(result, rows, not journal.validated_at(result.step), judging=False)
        if run is not None:
            run.finish(state)
    except BaseException:
        if result and state.logged_loss.entries and not state.updating:
            journal.publish_despite(result, [journal.training_row(result, state.logged_loss)])
        with processes.together():  # a watcher's error, and a broken talk, are told and named
            raise
    finally:
        for one in shown:
            one.close()
    return journal.history


def checked_watchers(watchers: Any) -> list[Watcher]:
    """Return `watchers` as a list. Raises UsageError unless each is a function of a step's result and its rows."""
    given = [watchers] if callable(watchers) else watchers
    needs = "it must be a function that takes a step's result and its rows"
    if isinstance(given, str | Tensor) or not isinstance(given, Iterable):
        raise UsageError(f"watchers is {named(watchers)}; it must be a list of functions (result, rows)")
    given = list(given)
    for watcher in given:
        if isinstance(watcher, type):
            raise UsageError(f"a watcher is the class {watcher.__name__}; {needs}. Make an object of the class")
        if not callable(watcher):
            hint = ". Pass an fs.Run as run=" if hasattr(watcher, "attach") else ""
            raise UsageError(f"a watcher is {named(watcher)}; {needs}{hint}")
        try:
            signature(watcher).bind(None, [])
        except ValueError:  # of compiled code, which does not tell
            continue
        except TypeError as error:
            called = f"a watcher ({named(watcher)}) cannot be called as watcher(result, rows): {error}"
            raise UsageError(f"{called}. A watcher takes two arguments: a step's result and its rows") from error
    return given


class Journal:
    """Makes rows, keeps them as the history, and hands them to the run and to the watchers."""

    def __init__(self, step: TrainStep, history: list[Row], run: Any, watchers: Sequence[Watcher]):
        self.objective, self.history, self.run, self.watchers = step.objective, history, run, watchers
        self.clock = replace(step.state.clock)  # at the last training row
        self.epoch = replace(step.state.clock)  # at the last epoch's end

    def publish(self, result: StepResult, rows: list[Row]) -> None:
        """Keep `rows` and call every watcher; called for each step, with rows or without."""
        if rows:
            state = result.state
            state.told = self.clock = replace(state.clock)
            if rows[0]["split"] == "train":
                state.logged_loss.reset()
            self.history += rows
            if self.run is not None:
                self.run.record(rows)
        for watcher in self.watchers:
            watcher(result, rows)

    def look(self, lens: Lens, result: StepResult, progress: Progress | Any) -> None:
        """Keep and show what the lens saw of this step; its row leads to no other, and resets nothing."""
        if (row := lens.look(result)) is None:
            return
        self.history.append(row)
        if self.run is not None:
            self.run.record([row])
        if progress:
            progress.show_layers(row["layers"])
        say = (
            self.run.say
            if self.run is not None
            else progress.screen.write
            if progress
            else partial(print, file=stderr)
        )
        for text in lens.warnings:
            say(f"lens, step {result.step:,}: {text}")

    def publish_despite(self, result: StepResult, rows: list[Row]) -> None:
        """The same after an error, to every watcher whatever one of them raises: the first error is told.

        A run that is resumed from before makes these rows again.
        """
        self.history += rows
        if self.run is not None:
            with suppress(Exception):
                self.run.record(rows, counted=False)
        for watcher in self.watchers:
            with suppress(Exception, KeyboardInterrupt):
                watcher(result, rows)

    def training_row(self, result: StepResult, mean: Mean) -> Row:
        """The count-weighted mean loss of the steps in `mean`, and the rate of training since the row before.

        The usual sum of batch means over their number is wrong for a short last batch; this is not.
        """
        result.state.confirm()
        clock, since = result.state.clock, self.clock if mean is result.state.logged_loss else self.epoch
        seconds = clock.seconds - since.seconds or math.inf  # several processes count a step's with the next
        unit = "tokens" if clock.tokens else "samples"
        row = self.row("train", result, mean.result())
        row["steps"] = mean.entries
        row["lr"], row["grad_norm"] = float(result.learning_rate), float(result.grad_norm)
        row[unit] = getattr(clock, unit)
        row[f"{unit}_per_second"] = (getattr(clock, unit) - getattr(since, unit)) / seconds
        row["waiting_share"] = (clock.waiting - since.waiting) / seconds
        return row

    def judge(self, state: State, rule: PlateauRule, loss: float) -> Row:
        """What a validation brings: nothing, or the event and the learning rate's factor from here on."""
        event = state.plateau.judge(loss, rule)
        if rule.to_best and state.plateau.since_best == 0:
            state.keep_best()
        factor = {"annealing": state.plateau.annealing} if event == ANNEALED else {}
        return {"event": event, **factor, **({"to_best": True} if rule.to_best else {})} if event else {}

    def row(self, split: str, result: StepResult, loss: float) -> Row:
        """What every row holds."""
        elapsed = result.state.clock.seconds
        row = {"step": result.step, "epoch": result.epoch, "split": split, "loss": loss}
        return {**row, **figures_of_loss(self.objective, loss), "elapsed_seconds": elapsed}

    def validated_at(self, step: int) -> bool:
        """Whether the history holds a validation of this step."""
        return any(row["split"] == "val" and row["step"] == step for row in reversed(self.history))
