"""THE FIVE STEPS, once, in order.

    TrainStep.__call__(*window)
        zero_grad -> for each micro-batch: forward, loss, backward -> norm, clip -> update

Owns one update and nothing around it: no data, no epochs, no evaluation, no files.
"""

import math
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grad_value_, clip_grads_with_norm_

from fivestep import processes
from fivestep.errors import UsageError
from fivestep.loop.arithmetic import (
    check_limits,
    check_mean,
    check_switches,
    counted,
    global_norm,
    loss_of,
    rate_scale,
    scaled,
    share_of,
    size_of,
    weighted,
    window_count,
)
from fivestep.loop.average import average_of
from fivestep.loop.batch import is_empty, to_device
from fivestep.loop.diagnosis import Before, checked_on_nonfinite, left_out
from fivestep.loop.graph import full_form
from fivestep.loop.graph_shared import graph_of
from fivestep.loop.lean import backward, zero_grad
from fivestep.loop.modes import check_model
from fivestep.loop.muon import update_of
from fivestep.loop.objective import as_objective
from fivestep.loop.optimizer import HeldParameters, as_optimizers
from fivestep.loop.parallel import parallel_of
from fivestep.loop.precision import LossScale, autocast
from fivestep.loop.recompute import Recomputed
from fivestep.loop.result import StepResult
from fivestep.loop.schedule import LearningRate, as_schedulers
from fivestep.loop.shares import as_shares
from fivestep.loop.state import State, state_of


class TrainStep:
    """The five steps on one batch, or on the micro-batches of one accumulation window: `five(batch)`, `five(a, b)`.

    criterion: a torch loss, a function, or an objective. optimizer: one, or a list stepped in order.
    scheduler: a function of completed updates, or a torch scheduler, stepped every `scheduler_every` (1, "1ep").
    clip_norm: largest global gradient 2-norm. clip_value: largest absolute gradient element.
    precision: "fp32"; "bf16" or, on a GPU, "fp16": torch's autocast over forward and loss.
    ema: decay of averaged weights, kept beside the model (`state.averaged()`).
    on_nonfinite: "stop", by a NonFiniteError, before an update that is not finite; "skip" leaves it out: the step
    returns None, and all is as before but `.grad` and the random states (buffers are copied before each step).
    graph: the five steps as one compiled program, for windows of the first one's shape (see `graph.py`).
    activation_checkpointing: each block of a list of blocks is computed once more in the backward pass instead of
    kept for it: less memory, more time, the same numbers.
    parallel: of several processes (torchrun): "auto" or "ddp", the model in each; "fsdp", its parameters in shards. A
    window is then this process's part of the window of all; loss, count, norm and update are of all.
    Raises UsageError for what does not fit together.
    """

    def __init__(
        self,
        model: nn.Module,
        criterion: Any,
        optimizer: Any,
        *,
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
        state: State | None = None,
    ):
        check_limits(clip_norm=clip_norm, clip_value=clip_value)
        check_switches(graph=graph, activation_checkpointing=activation_checkpointing)
        check_model(model)
        self.model, self.criterion = model, criterion
        self.objective = as_objective(criterion)
        self.optimizers = as_optimizers(optimizer)
        self.parallel = parallel_of(parallel, model, criterion, self.optimizers, precision)
        self.called = model if self.parallel is None else self.parallel.model
        self.own_random = nullcontext() if self.parallel is None else self.parallel
        self.updates = [update_of(one, self.parallel) for one in self.optimizers]
        self.held = HeldParameters(model, criterion, self.optimizers)
        self.clip_norm, self.clip_value = clip_norm, clip_value
        self.autocast = autocast(precision, self.parameters[0].device)
        self.state = state_of(state, model, criterion, self.optimizers, as_schedulers(scheduler))
        if self.parallel is not None and self.state.parallel is not None:
            self.parallel.random = self.state.parallel.random  # it goes on
        self.state.parallel = self.parallel
        if self.parallel is not None:
            self.held.followers.append(self.parallel.check_parameters)
        if ema is not None:
            self.state.average = average_of(self.state.average, [model, criterion], ema)
            self.held.followers.append(self.state.average.follow)
        if precision == "fp16" and self.state.loss_scale is None:
            self.state.loss_scale = LossScale()
        self.learning_rate = LearningRate(self.optimizers, scheduler, scheduler_every, self.state.clock)
        self.on_nonfinite = checked_on_nonfinite(on_nonfinite)
        self.left_out: dict[str, Any] = {}  # the figures of the last step that was skipped
        self.recomputed = Recomputed(model) if activation_checkpointing else nullcontext()
        if graph and activation_checkpointing:
            raise UsageError("one program keeps what it needs itself: leave activation_checkpointing, or graph, out")
        self.graph = graph_of(self, precision) if graph else None
        self.sized: list[tuple[int, int]] = []  # the sizes of a first window, checked
        self.frozen: set[nn.Module] = set()  # modules that the user keeps in eval(), as an epoch's start found them

    def __call__(self, *window: Any, apply: bool = True) -> StepResult | Any:  # Any: a checker need not ask for None
        """One update from `window`: a batch, or the micro-batches whose gradients it adds up.

        None where it was skipped, where each batch is empty, and where `apply` is False: computed, so that random
        states advance, and left out.
        """
        state, clock, objective, scaler = self.state, self.state.clock, self.objective, self.state.loss_scale
        if self.parallel is not None:
            processes.at(f"step {clock.step + 1}: forward and backward")
        if self.parallel is None and not self.sized:  # the clock counts after the update, too late for a wrong size
            self.sized = [size_of(objective, batch) for batch in window if not is_empty(batch)]
        shares = None if self.parallel is None else as_shares(objective, window)
        if self.graph is not None and apply and (made := self.graph(list(window), shares)) is not None:
            return self.completed(shares.batches if shares else window, *made, shares)
        batches = [to_device(one, self.parameters[0].device) for one in (shares.batches if shares else window)]
        batches, counts = (
            counted(objective, batches, where=self.where) if shares is None else (batches, shares.counts)
        )
        if not batches:  # each is None, or without rows
            self.left_out = {}
            return None
        count = window_count(counts) if shares is None else shares.count
        before = Before.window(self, undoable=not apply or self.on_nonfinite == "skip")

        while True:  # once; again, at a lower loss scale, where fp16 overflows
            # 1. Zero the gradients. First, so that they stay readable in `.grad` after the step.
            zero_grad(self.optimizers)

            losses: list[Tensor] = []
            carry = state.carry
            with self.own_random, self.recomputed:
                for batch, part in zip(batches, counts, strict=True):
                    if self.parallel is not None:
                        self.parallel.last(len(losses) == len(batches) - 1)  # then gradients are summed over all
                    # 2. Forward, and 3. loss: the mean over the batch's own count.
                    with self.autocast:
                        mean, carry = loss_of(objective, self.called, batch, carry)
                    check_mean(mean)
                    # 4. Backward, each mean weighted by its share of the window (1.0 for a single batch: plain).
                    share = share_of(part, count, mean)
                    backward(mean, share if scaler is None else scaled(share, scaler.scale, mean))
                    losses.append(weighted(mean.detach(), share, part))

            # The global norm, then clipping, with torch's own arithmetic.
            own = losses[0] if len(losses) == 1 else torch.stack(losses).sum()
            loss = own if self.parallel is None or shares is None else self.parallel.complete(own, shares.same)
            grads = self.held.gradients()
            if scaler is not None:
                scaler.unscale(grads)
            norm = global_norm(grads)
            finite = math.isfinite(torch.add(norm, loss, alpha=0))  # HOST READ: an eager step's one (0 * inf is NaN)
            if self.parallel is not None:
                self.parallel.hear()
            if finite or scaler is None or not scaler.overflowed(loss):
                break
        if not (finite and apply):
            before.undo(state)
            self.own_loss = own
            self.left_out = left_out(self, window, count, loss, norm, before) if apply else {}  # or stops
            return None
        if self.clip_norm is not None:
            clip_grads_with_norm_(self.parameters, self.clip_norm, norm)
        if self.clip_value is not None:
            clip_grad_value_(self.parameters, self.clip_value)

        # 5. Update the weights, at the learning rate of this update.
        scale = rate_scale(objective, batches) if shares is None else shares.rate
        rate = self.learning_rate.before_update(clock.step, state.plateau.annealing * scale)
        state.updating = True
        for update in self.updates:
            update()
        if scaler is not None:
            scaler.passed()
        return self.completed(batches, loss, count, norm, carry, rate, shares)

    def where(self) -> str:
        """Return the place of the window in the data, for an error; empty where the caller draws the batches."""
        state = self.state
        return f" at batch {state.position} of epoch {state.clock.epoch + 1}" if state.inside else ""

    def completed(
        self,
        batches: Sequence[Any],
        loss: Tensor,
        count: Any,
        norm: Tensor,
        carry: Any,
        rate: Any,
        shares: Any = None,
    ) -> StepResult:
        """What follows an update: averaged weights, the clock, torch's schedulers."""
        state, clock = self.state, self.state.clock
        if state.average is not None:
            state.average.update()
        if state.full is None:
            state.full = full_form(shares.whole if shares else list(batches), carry)
        passed = self.learning_rate.trigger.passed(clock)
        state.carry = carry
        clock.step = number = clock.step + 1
        epoch = clock.epoch + 1
        if self.parallel is not None and shares is not None:
            self.parallel.columns = shares.size[0] // len(batches)
        for samples, tokens in [shares.size] if shares else [size_of(self.objective, batch) for batch in batches]:
            clock.count(samples, tokens)
        self.learning_rate.after_update(passed, clock)
        state.last = {
            "step": number, "epoch": epoch, "loss": loss, "count": count, "grad_norm": norm, "learning_rate": rate,
        }  # fmt: skip
        state.updating = state.inside  # in the loop's step the data position and the means have yet to move
        return StepResult(number, epoch, loss, count, norm, rate, state)

    @property
    def parameters(self) -> list[nn.Parameter]:
        """Return the parameters that the optimizers held when a step last looked."""
        return self.held.ordered
