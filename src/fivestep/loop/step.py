"""THE FIVE STEPS, once, in order.

    TrainStep.__call__(*window)
        zero_grad -> for each micro-batch: forward, loss, backward -> norm, clip -> update

Owns one update and nothing around it: no data, no epochs, no evaluation, no files.
"""

import math
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grad_value_, clip_grads_with_norm_, get_total_norm

from fivestep.errors import NonFiniteError, UsageError, suggestion
from fivestep.loop.batch import rows, to_device
from fivestep.loop.objective import as_objective
from fivestep.loop.optimizer import as_optimizers, updated_parameters
from fivestep.loop.schedule import LearningRate, as_schedulers
from fivestep.loop.state import State

PRECISIONS = ("fp32", "bf16")


@dataclass(slots=True)
class StepResult:
    """One completed step. `loss` and `grad_norm` are scalar tensors that stay on the device until you read them."""

    step: int  # completed updates, this one included
    epoch: int  # the epoch it belongs to, from 1
    loss: Tensor  # the mean over the whole window's `count`
    count: Any  # what the mean is over: a number or a scalar tensor
    grad_norm: Tensor  # global 2-norm, before clipping
    learning_rate: float  # of the first parameter group
    state: State = field(repr=False)


class TrainStep:
    """The five steps on one batch, or on the micro-batches of one accumulation window: `five(batch)`, `five(a, b)`.

    criterion: a torch loss, a function, or an objective. optimizer: one, or a list stepped in order.
    scheduler: a function of completed updates, or a torch scheduler, stepped every `scheduler_every` (1, "1ep").
    clip_norm: largest global gradient 2-norm. clip_value: largest absolute gradient element.
    precision: "fp32", or "bf16" (torch's autocast over forward and loss).
    Raises UsageError for what does not fit together, NonFiniteError before a non-finite update would be applied.
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
        state: State | None = None,
    ):
        for name, limit in (("clip_norm", clip_norm), ("clip_value", clip_value)):
            if limit is not None and not limit > 0:
                flag = "--" + name.replace("_", "-")
                raise UsageError(f"{name} = {limit!r} must be above 0, or None for no clipping ({flag})")
        self.model, self.criterion = model, criterion
        self.objective = as_objective(criterion)
        self.optimizers = as_optimizers(optimizer)
        self.parameters = updated_parameters(model, criterion, self.optimizers)
        self.clip_norm, self.clip_value = clip_norm, clip_value
        self.autocast = autocast(precision, self.parameters[0].device)
        self.state = state or State(model, self.optimizers, as_schedulers(scheduler))
        self.learning_rate = LearningRate(self.optimizers, scheduler, scheduler_every, self.state.clock)
        self.frozen: set[nn.Module] = set()  # modules that the user keeps in eval(), as an epoch's start found them

    def __call__(self, *window: Any) -> StepResult:
        state, clock, objective = self.state, self.state.clock, self.objective
        device = self.parameters[0].device
        batches = [to_device(batch, device) for batch in window]
        counts = [objective.count(batch) for batch in batches]
        count = window_count(counts)
        losses, carry = [], state.carry

        # 1. Zero the gradients. First, so that they stay readable in `.grad` after the step.
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none=True)

        for batch, part in zip(batches, counts, strict=True):
            # 2. Forward, and 3. loss: the mean over the batch's own count.
            with self.autocast:
                mean, carry = objective.loss(self.model, batch, carry)
            check_mean(mean)
            # 4. Backward, each mean weighted by its share of the window (1.0 for a single batch: the plain loop).
            share = share_of(part, count, mean)
            mean.backward(gradient=share)
            losses.append(weighted(mean.detach(), share, part))

        # The global norm, then clipping, with torch's own arithmetic.
        loss = losses[0] if len(losses) == 1 else torch.stack(losses).sum()
        grads = [parameter.grad for parameter in self.updated() if parameter.grad is not None]
        norm = get_total_norm(grads)
        if not math.isfinite(torch.add(norm, loss, alpha=0)):  # HOST READ: the one of an eager step (0 * inf is NaN)
            raise NonFiniteError(self.report_nonfinite(loss, norm, count, len(window)))
        if self.clip_norm is not None:
            clip_grads_with_norm_(self.parameters, self.clip_norm, norm)
        if self.clip_value is not None:
            clip_grad_value_(self.parameters, self.clip_value)

        # 5. Update the weights, at the learning rate of this update.
        rate = self.learning_rate.before_update(clock.step)
        for optimizer in self.optimizers:
            optimizer.step()

        state.carry = carry
        clock.step += 1
        for batch in batches:
            samples, tokens = self.size(batch)
            clock.samples += samples
            clock.tokens += tokens
        self.learning_rate.after_update(clock)
        return StepResult(clock.step, clock.epoch + 1, loss, count, norm, rate, state)

    def updated(self) -> list[nn.Parameter]:
        """The parameters that the optimizers hold now: a group added while training is clipped too."""
        held = sum(len(group["params"]) for optimizer in self.optimizers for group in optimizer.param_groups)
        if held != len(self.parameters):
            self.parameters = updated_parameters(self.model, self.criterion, self.optimizers)
        return self.parameters

    def size(self, batch: Any) -> tuple[int, int]:
        """Samples and tokens in `batch`; an objective without `size` counts rows."""
        size = getattr(self.objective, "size", None)
        return (rows(batch), 0) if size is None else size(batch)

    def report_nonfinite(self, loss: Tensor, norm: Tensor, count: Any, drawn: int) -> str:
        """Which step and which batches, and what was not finite."""
        clock, first = self.state.clock, self.state.position
        batches = f"batch {first}" if drawn == 1 else f"batches {first} to {first + drawn - 1}"
        if not count:
            batches += ", without a single target to learn from"
        return (
            f"stopped before step {clock.step + 1} (epoch {clock.epoch + 1}, {batches}): the loss is {float(loss)}, "
            f"the gradient norm {float(norm)}; the update was not applied, the weights are those of step {clock.step}"
        )


def window_count(counts: list[Any]) -> Any:
    """The sum of the micro-batches' counts: what the step's mean is over."""
    if len(counts) == 1:
        return counts[0]
    total = sum(counts)
    if not counts or (not isinstance(total, Tensor) and not total):
        raise UsageError(f"a step needs something to learn from; got {len(counts)} batches with a count of 0")
    return total


def share_of(count: Any, total: Any, mean: Tensor) -> Tensor | None:
    """`count / total` as a scalar like `mean`; None, which `backward` takes as exactly 1, for a single batch.

    Multiplying a mean by n and dividing by n again is not exact (n = 41, 55, ...), so a single batch is not scaled.
    """
    if count is total:
        return None
    if isinstance(total, Tensor):
        return torch.as_tensor(count, device=mean.device).to(mean.dtype) / total.to(mean.dtype)
    return mean.new_full((), count / total)  # made on the device: no copy from the host


def weighted(mean: Tensor, share: Tensor | None, count: Any) -> Tensor:
    """A micro-batch's part of the window's mean; one without any target (mean 0/0) has none."""
    if share is None:
        return mean
    return torch.where(count > 0, mean * share, 0.0) if isinstance(count, Tensor) else mean * share


def check_mean(mean: Tensor) -> None:
    """A loss must be one number that depends on a parameter."""
    if mean.ndim:
        raise UsageError(f"the loss must be one number, the mean over the batch; got shape {list(mean.shape)}")
    if not mean.requires_grad:
        raise UsageError("the loss depends on no parameter with requires_grad=True: nothing can be learned from it")


def autocast(precision: str, device: torch.device) -> AbstractContextManager[Any]:
    """The context of forward and loss: none for fp32, torch's autocast for bf16."""
    if precision not in PRECISIONS:
        hint = suggestion(precision, PRECISIONS)
        raise UsageError(f"precision = {precision!r} is not one of {', '.join(PRECISIONS)} (--precision){hint}")
    return nullcontext() if precision == "fp32" else torch.autocast(device.type, dtype=torch.bfloat16)
