"""THE FIVE STEPS, once, in order.

    TrainStep.__call__(*window)
        zero_grad -> for each micro-batch: forward, loss, backward -> norm, clip -> update

Owns one update and nothing around it: no data, no epochs, no evaluation, no files.
"""

import math
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from fivestep.errors import UsageError
from fivestep.loop.arithmetic import clip, global_norm, loss_of, share_of, weighted
from fivestep.loop.average import average_of
from fivestep.loop.checks import check_limits, check_mean, check_model, check_switches
from fivestep.loop.diagnosis import Before, checked_on_nonfinite, left_out
from fivestep.loop.graph import UNCOMPILED, full_form
from fivestep.loop.graph_shared import graph_of
from fivestep.loop.lean import backward, zero_grad
from fivestep.loop.muon import update_of
from fivestep.loop.objective import as_objective
from fivestep.loop.optimizer import HeldParameters, as_optimizers
from fivestep.loop.parallel import parallel_of
from fivestep.loop.precision import LossScale, autocast
from fivestep.loop.recompute import Recomputed
from fivestep.loop.result import StepResult
from fivestep.loop.schedule import LearningRate, as_schedulers
from fivestep.loop.several import Several
from fivestep.loop.state import State, state_of
from fivestep.loop.window import Window
from fivestep.loop.world import Alone


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
        if precision == "fp16" and not self.state.loss_scale:
            self.state.loss_scale = LossScale()
        self.learning_rate = LearningRate(self.optimizers, scheduler, scheduler_every, self.state.clock)
        self.on_nonfinite = checked_on_nonfinite(on_nonfinite)
        self.left_out: dict[str, Any] = {}  # the figures of the last window without an update
        self.world = Alone(model, self.state)
        if self.parallel is not None:
            self.world = Several(self.parallel, self.objective, self.state)
        self.recomputed = Recomputed(model) if activation_checkpointing else nullcontext()
        if graph and activation_checkpointing:
            raise UsageError("one program keeps what it needs itself: leave activation_checkpointing, or graph, out")
        self.graph = graph_of(self, precision) if graph else None
        self.compiled = self.graph or UNCOMPILED
        self.frozen: set[nn.Module] = set()  # modules that the user keeps in eval(), as an epoch's start found them

    def __call__(self, *batches: Any, apply: bool = True) -> StepResult | Any:  # Any: a checker need not ask for None
        """Make one update from a batch, or from the micro-batches whose gradients it adds up.

        None where it was skipped, where each batch is empty, and where `apply` is False: computed, so that random
        states advance, and left out.
        """
        state, window = self.state, self.world.window(self.objective, batches)
        if apply and (made := self.compiled(window)) is not None:
            return self._finish(window, *made)
        window.count_targets(self.objective, self.parameters[0].device)
        if not window.batches:  # each is None, or without rows
            self.left_out = {}
            return None
        before = Before.window(self, undoable=not apply or self.on_nonfinite == "skip")

        while True:  # once; fp16 goes round again, at half the loss scale, where it overflows
            # 1. Zero the gradients. First, so that they stay readable in `.grad` after the step.
            zero_grad(self.optimizers)

            losses, carry = [], state.carry
            with self.world.own_random, self.recomputed:
                for batch, count in self.world.passes(window):
                    # 2. Forward, and 3. loss: the mean over the batch's own count.
                    with self.autocast:
                        mean, carry = loss_of(self.objective, self.world.model, batch, carry)
                    # 4. Backward, each mean weighted by its share of the window (1.0 for a single batch: plain).
                    share = share_of(count, window.count, check_mean(mean))
                    backward(mean, state.loss_scale.scaled(share, mean))
                    losses.append(weighted(mean.detach(), share, count))

            # The global norm, then clipping, with torch's own arithmetic.
            loss = self.world.summed(losses, window)
            norm = global_norm(state.loss_scale.unscaled(self.held.gradients()))
            finite = math.isfinite(torch.add(norm, loss, alpha=0))  # HOST READ: an eager step's one (0 * inf is NaN)
            self.world.hear()
            if finite or not state.loss_scale.overflowed(loss):
                break
        if not (finite and apply):
            before.undo(state)
            self.left_out = left_out(self, batches, window.count, loss, norm, before) if apply else {}  # or stops
            return None
        clip(self.parameters, norm, self.clip_norm, self.clip_value)

        # 5. Update the weights, at the learning rate of this update.
        factor = state.plateau.annealing * window.rate(self.objective)
        rate = self.learning_rate.before_update(state.clock.step, factor)
        state.updating = True
        for update in self.updates:
            update()
        state.loss_scale.passed()
        return self._finish(window, loss, window.count, norm, carry, rate)

    def _finish(self, window: Window, loss: Tensor, count: Any, norm: Tensor, carry: Any, rate: Any) -> StepResult:
        """Move what follows an update: averaged weights, the clock, torch's schedulers."""
        state, clock = self.state, self.state.clock
        state.average.update()
        if state.full is None:
            state.full = full_form(window.whole, carry)
        passed = self.learning_rate.trigger.passed(clock)
        state.carry = carry
        clock.step = number = clock.step + 1
        epoch = clock.epoch + 1
        for samples, tokens in window.sizes(self.objective):
            clock.count(samples, tokens)
        self.learning_rate.after_update(passed, clock)
        state.last = {
            "step": number, "epoch": epoch, "loss": loss, "count": count, "grad_norm": norm, "learning_rate": rate,
        }  # fmt: skip
        state.updating = state.inside  # in the loop's step the data position and the means have yet to move
        return StepResult(number, epoch, loss, count, norm, rate, state)

    def end_epoch(self) -> None:
        """Move the clock to the next epoch, and step the schedulers that count in epochs."""
        state, clock = self.state, self.state.clock
        passed = self.learning_rate.trigger.passed(clock)
        state.updating = True
        clock.epoch += 1
        state.position = 0
        self.learning_rate.after_update(passed, clock)
        state.step_is_made()

    @property
    def parameters(self) -> list[nn.Parameter]:
        """Return the parameters that the optimizers held when a step last looked."""
        return self.held.ordered
