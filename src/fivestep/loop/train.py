"""The generator around the five steps: epochs of windows of micro-batches, one `yield` a step.

    data -> epoch e, from position p -> window of `accumulate` micro-batches -> TrainStep -> yield

The caller's `for` is the loop: its body runs after a step and before the next batch is drawn. Owns their order.
"""

from collections.abc import Iterator
from contextlib import nullcontext
from itertools import islice
from time import perf_counter
from typing import Any

from torch import nn

from fivestep import processes
from fivestep.data.stream import batches_per_epoch, check_batched
from fivestep.loop.checks import check_run
from fivestep.loop.clock import Limit, check_accumulate
from fivestep.loop.diagnosis import nothing_learned, one_row_named, place_of_one_row
from fivestep.loop.modes import enter_training
from fivestep.loop.optimizer import check_no_modes
from fivestep.loop.result import StepResult, last_result
from fivestep.loop.settings import with_settings
from fivestep.loop.state import State
from fivestep.loop.step import TrainStep


def train(
    model: nn.Module,
    data: Any,
    criterion: Any,
    optimizer: Any,
    *,
    epochs: int | None = None,
    max_iters: int | str | None = None,
    until: int | str | None = None,
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
    state: State | None = None,
) -> Iterator[StepResult]:
    """Train, and yield a `StepResult` after each step (a skipped one yields none).

    data: a DataLoader, any iterable of batches, or a stream; `accumulate` of its batches make one step.
    Ends at the first of `epochs`, `max_iters` (updates) and `until` ("10Mtok", "5min"), counted from the clock of
    `state`, never by itself where none is given. The other arguments are `TrainStep`'s. Raises UsageError at once.
    run: an `fs.Run` inside its `with` block. Training resumes from its newest checkpoint and saves new ones. A loop
    without epochs, max_iters and until is complete when left by `break`; a new start yields the last step again.
    Under torchrun every process runs the same program, and `data` is that of all: each takes its rows of each batch.
    """
    step = TrainStep(
        model, criterion, optimizer, scheduler=scheduler, scheduler_every=scheduler_every, clip_norm=clip_norm,
        clip_value=clip_value, precision=precision, ema=ema, on_nonfinite=on_nonfinite, graph=graph,
        activation_checkpointing=activation_checkpointing, parallel=parallel, state=state,
    )  # fmt: skip
    check_accumulate(accumulate)
    check_batched(data)
    check_run(run)
    if run is not None:
        check_no_modes(step.optimizers)
        with processes.together():
            run.attach(with_settings(step, data, accumulate))
    step.state.told = None  # the caller tells
    limit, ending, again = Limit(epochs, max_iters, until), None, None
    if run is not None:
        ending = run.saved_at_the_end(step.state, limit)
        if not limit.ends and run.left_at == step.state.clock.step:
            again = last_result(step.state)  # `break` ended the loop here: its body looks at this step once more
    return steps(step, data, limit, accumulate, run, ending, again)


def steps(
    step: TrainStep, data: Any, limit: Limit, accumulate: int, run: Any = None, ending: Any = None, again: Any = None
) -> Iterator[StepResult]:
    """The loop itself, up to `limit`; it may be called again with the same `step` to go on.

    `run.keep(state)` is called whenever a step is asked for: after the caller's body for the one before. `ending` is
    a context that ends where the loop does, or where the caller leaves it. `again` is a result to yield first.
    """
    state, clock, world, run = step.state, step.state.clock, step.world, run or UNKEPT
    stopwatch = Stopwatch(step)
    window: list[Any] = []
    state.check_whole()

    with processes.together(), ending or nullcontext(), one_row_named(lambda: place_of_one_row(state, window)):
        world.begin_training(data)
        if again is not None:
            yield again
        while not limit.reached(clock):
            run.keep(state)
            stopwatch.start()
            enter_training(step.model, step.frozen)
            world.begin_epoch(state, data)
            reader = state.reading(data)
            if reader.draws:
                state.before_drawing()
            stream = state.rest_of_epoch(reader)

            # A window: `accumulate` micro-batches, fewer at the epoch's end.
            while window := world.agreed(reader.draw(list, islice(stream, accumulate)), state):
                stopwatch.drawn()
                run.before_step(state, window)
                known = state.begin_step(len(window))
                result = step(*window, apply=not known)
                state.move_past(len(window), result, {} if known else step.left_out)
                stopwatch.stop()
                state.step_is_made()
                if result is not None:
                    yield result
                if limit.reached(clock):
                    state.confirm()
                    if not world.all_ended(has_ended(state, data, stream)):
                        return
                    break  # that was the epoch's last batch: the epoch is complete
                run.keep(state)
                stopwatch.start()
                if reader.draws_always:
                    run.before_drawing(state)

            state.confirm()
            if error := nothing_learned(state, data):
                raise error
            reader.finish()
            step.end_epoch()


def has_ended(state: State, data: Any, stream: Iterator[Any]) -> bool:
    """Return whether the epoch's last batch was drawn; `len(data)`, which may be wrong, only says when to look."""
    claimed = batches_per_epoch(data, state.clock.epoch)
    return claimed is not None and state.position >= claimed and state.reading(data).ended(stream)


class Stopwatch:
    """Tells the clock the seconds of each step, and those of waiting for data; compiling a step is not counted."""

    def __init__(self, step: TrainStep):
        self.world, self.clock, self.compiled = step.world, step.state.clock, step.compiled

    def start(self) -> None:
        """Begin a step."""
        self.begun, self.compiling = perf_counter(), self.compiled.took

    def drawn(self) -> None:
        """Note that the batches of the step are there."""
        self.waited = perf_counter() - self.begun

    def stop(self) -> None:
        """Count the step."""
        self.clock.waiting += self.waited
        seconds = perf_counter() - self.begun - (self.compiled.took - self.compiling)
        self.world.count_time(self.clock, seconds)


class Unkept:
    """The run of a training that is not kept: it does nothing."""

    def keep(self, state: State) -> None:
        """Save nothing."""

    def before_step(self, state: State, window: list[Any]) -> None:
        """Remember nothing."""

    def before_drawing(self, state: State) -> None:
        """Remember nothing."""


UNKEPT = Unkept()
