"""The generator around the five steps: epochs of windows of micro-batches, one `yield` a step.

    data -> epoch e, from position p -> window of `accumulate` micro-batches -> TrainStep -> yield

The caller's own `for` is the loop: what stands in its body happens after the step and before the next batch is
drawn. Owns the order of things; the step owns the arithmetic, the stream the order of the data.
"""

from collections.abc import Iterator
from itertools import islice
from time import perf_counter
from typing import Any

from torch import nn

from fivestep.data.stream import batches, batches_per_epoch, is_stream, nothing_drawn, own_generators
from fivestep.errors import UsageError, named
from fivestep.loop.clock import Limit
from fivestep.loop.diagnosis import nothing_learned
from fivestep.loop.state import State, random_state, restore_random_state
from fivestep.loop.step import StepResult, TrainStep


def train(
    model: nn.Module,
    data: Any,
    criterion: Any,
    optimizer: Any,
    *,
    epochs: int | None = None,
    max_iters: int | None = None,
    until: int | str | None = None,
    accumulate: int = 1,
    scheduler: Any = None,
    scheduler_every: int | str = 1,
    clip_norm: float | None = None,
    clip_value: float | None = None,
    precision: str = "fp32",
    ema: float | None = None,
    on_nonfinite: str = "stop",
    state: State | None = None,
) -> Iterator[StepResult]:
    """Train, and yield a `StepResult` after each step (a skipped one yields none).

    data: a DataLoader, any iterable of batches, or a stream; `accumulate` of its batches make one step.
    Ends at the first of `epochs`, `max_iters` (updates) and `until` ("10Mtok", "5min"), counted from the clock of
    `state`, never by itself where none is given. The other arguments are `TrainStep`'s. Raises UsageError at once.
    """
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
    check_accumulate(accumulate)
    return steps(step, data, Limit(epochs, max_iters, until), accumulate)


def steps(step: TrainStep, data: Any, limit: Limit, accumulate: int) -> Iterator[StepResult]:
    """The loop itself, up to `limit`; it may be called again with the same `step` to go on."""
    state, clock = step.state, step.state.clock

    while not limit.reached(clock):
        resumed = perf_counter()
        enter_training(step.model, step.frozen)
        if state.position == 0:  # an epoch's start, not a resume within it
            state.carry = None
            state.epoch_loss.reset()
        stream, per_epoch = rest_of_epoch(data, state), batches_per_epoch(data, clock.epoch)

        while window := list(islice(stream, accumulate)):  # shorter at the epoch's end
            drawn = perf_counter()
            result = step(*window, apply=not (known := state.is_skipped(len(window))))
            if result is not None:
                state.epoch_loss.add(result.loss, result.count)
                state.logged_loss.add(result.loss, result.count)
            elif not known:
                state.skip(len(window), step.left_out)
            state.position += len(window)
            clock.waiting += drawn - resumed
            clock.seconds += perf_counter() - resumed
            if result is not None:
                yield result
            resumed = perf_counter()
            if limit.reached(clock):
                if state.position != per_epoch:
                    return
                break  # that was the epoch's last batch: the epoch is complete

        if state.position == 0:
            raise UsageError(nothing_drawn(data, clock.epoch))
        if error := nothing_learned(state):
            raise error
        passed = step.learning_rate.trigger.passed(clock)
        clock.epoch += 1
        state.position = 0
        step.learning_rate.after_update(passed, clock)


def rest_of_epoch(data: Any, state: State) -> Iterator[Any]:
    """The current epoch of `data`, from `state.position` on.

    Our streams seek. A user's loader is iterated anew under the random states of the epoch's start, so that it draws
    the same order; what was consumed is drawn and dropped, and the random states are put back.
    """
    epoch, position = state.clock.epoch, state.position
    if is_stream(data) or isinstance(data, list | tuple):  # neither draws a random number
        return batches(data, epoch, position)
    generators = own_generators(data)
    if position == 0:
        state.epoch_random = {**random_state(), "loader": [generator.get_state() for generator in generators]}
        return batches(data, epoch)
    if isinstance(data, Iterator) or state.epoch_random is None:
        raise UsageError(f"cannot go on within an epoch of {named(data)}: give data that can be iterated again")
    now = random_state()
    restore_random_state(state.epoch_random)
    for generator, saved in zip(generators, state.epoch_random["loader"], strict=True):
        generator.set_state(saved)
    stream = batches(data, epoch)
    for _ in islice(stream, position):
        pass
    restore_random_state(now)
    return stream


def enter_training(model: nn.Module, frozen: set[nn.Module]) -> None:
    """`model.train()`, once an epoch; modules that the user froze in eval() stay so.

    A module in eval() below a root in train() was frozen on purpose; `frozen` keeps them, for the case that the
    caller left the whole model in eval() at the epoch's end.
    """
    if model.training:
        frozen.clear()
        frozen.update(module for module in model.modules() if not module.training)
    model.train()
    for module in frozen:
        module.training = False


def check_accumulate(accumulate: int) -> None:
    """The number of micro-batches a step must be a whole one."""
    if isinstance(accumulate, bool) or not isinstance(accumulate, int) or accumulate < 1:
        raise UsageError(f"accumulate = {accumulate!r} must be a whole number, 1 or more (--accumulate)")
