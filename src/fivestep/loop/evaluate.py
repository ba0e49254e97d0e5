"""Evaluation: the whole split, sums over counts, and no trace left behind.

Owns the averages of a split and the context that keeps an observer from disturbing training. Does not train.
"""

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from fivestep import processes
from fivestep.data.generators import random_state_kept
from fivestep.errors import UsageError, named
from fivestep.interrupts import poll
from fivestep.loop.batch import rows, shapes, to_device
from fivestep.loop.counting import kept_targets
from fivestep.loop.mean import Mean
from fivestep.loop.modes import enter_evaluation
from fivestep.loop.objective import as_objective
from fivestep.loop.precision import autocast
from fivestep.loop.shares import shared


@contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """Inside: no gradients. Afterwards: every module's mode and every global random state are as before."""
    modes = [(module, module.training) for module in model.modules()]
    try:
        # Not inference_mode: a table that a model caches on first use must serve training too.
        with torch.no_grad(), random_state_kept():
            yield
    finally:
        for module, training in modes:
            module.training = training


def evaluate(
    model: nn.Module,
    data: Any,
    criterion: Any,
    *,
    metrics: Mapping[str, Any] | None = None,
    precision: str = "fp32",
) -> dict[str, float]:
    """The mean loss over every batch of `data`, in eval mode: `{"loss": ..., "count": ..., **figures, **metrics}`.

    Label smoothing is left out: it is a means of training. `metrics` maps names to functions `(outputs, targets)` or
    torchmetrics objects. A function returns one value an item (summed over their number) or a batch mean (weighted
    by rows). Raises UsageError where `data` is empty. Of several processes all must call it; each takes its rows of
    every batch, and the figures are those of all: the same, to rounding, as of one, where a metric's batch mean is a
    mean over rows, as an F1 score of a batch is not.
    """
    objective = as_objective(criterion)
    if hasattr(objective, "in_evaluation"):
        objective = objective.in_evaluation()
    if not isinstance(metrics, Mapping | None):
        raise UsageError(f"metrics is {named(metrics)}; it must map names to functions or torchmetrics objects")
    device = next(iter(model.parameters()), torch.empty(0)).device
    watched = {name: Figure(metric, device) for name, metric in (metrics or {}).items()}
    if watched and not hasattr(objective, "forward"):
        raise UsageError("metrics= needs an objective with forward(model, batch, carry) -> outputs, targets, carry")
    loss, carry = Mean(), None
    with processes.together(), undisturbed(model), autocast(precision, device):
        processes.meet("an evaluation")
        enter_evaluation(model)
        processes.same_as_first([*model.buffers()])
        for batch, stands_in in shared(objective, data):
            poll()
            batch = to_device(batch, device)
            count = objective.count(batch)
            if stands_in:  # computed only where all processes must: a model in shards is gathered by all at once
                _, carry = objective.loss(model, batch, carry)
                continue
            if watched:
                outputs, targets, carry = objective.forward(model, batch, carry)
                mean = objective.compare(outputs, targets)
                for figure in watched.values():
                    figure.add(*scored(objective, outputs, targets))
            else:
                mean, carry = objective.loss(model, batch, carry)
            loss.add(mean.detach(), count)
        if not processes.totals(loss.entries)[0]:
            raise UsageError(f"the data to evaluate on ({type(data).__name__}) gave no batch")
        loss.sum_over_processes()
        mean_loss = loss.result()
        figures = objective.figures(mean_loss) if hasattr(objective, "figures") else {}
        results = {name: figure.result() for name, figure in watched.items()}
    return {"loss": mean_loss, "count": loss.weight, **figures, **results}


def scored(objective: Any, outputs: Any, targets: Any) -> tuple[Any, Any]:
    """Outputs [n, classes] and targets [n] of what is not ignored (padding at a split's end), for metrics to see.

    Where nothing is ignored, and where targets are no class indices, they stay as they are.
    """
    over = getattr(objective, "over", None)
    if over != "classes" or targets.is_floating_point() or outputs.ndim < 2:
        return outputs, targets
    kept = kept_targets(objective.criterion, targets)
    return (outputs, targets) if kept.all() else (outputs.movedim(1, -1)[kept], targets[kept])


class Figure:
    """One metric over a split: a function, averaged by sums over counts, or a torchmetrics object."""

    def __init__(self, metric: Any, device: torch.device):
        self.metric, self.sums, self.items = metric, Mean(), 0
        self.stateful = all(hasattr(metric, name) for name in ("update", "compute", "reset"))
        if self.stateful:
            metric.reset()
            if isinstance(metric, nn.Module):
                metric.to(device)
        elif not callable(metric):
            raise UsageError(
                f"a metric is {named(metric)}; it must be a function (outputs, targets), or a torchmetrics object"
            )

    def add(self, outputs: Any, targets: Any) -> None:
        """Take in one batch, unless all of it is ignored."""
        if not rows(targets):
            return
        if self.stateful:
            self.metric.update(outputs, targets)
            return
        value = self.metric(outputs, targets)
        value = value.detach() if isinstance(value, Tensor) else torch.tensor(float(value), dtype=torch.float64)
        items = value.numel() if value.ndim else rows(targets)
        # Exact for what is right or wrong, so the same however a batch was shared; else summed as wide as can be.
        wide = torch.int64 if not value.is_floating_point() else widest(value.device)
        self.sums.add(value.sum(dtype=wide) if value.ndim else value.to(wide) * items, 1)
        self.items += items

    def result(self) -> float:
        """The figure over all batches."""
        if not self.stateful:
            self.sums.sum_over_processes()
            (items,) = processes.totals(self.items)
            return self.sums.total / items if items else math.nan
        value = torch.as_tensor(self.metric.compute())
        if value.numel() != 1:
            raise UsageError(f"{named(self.metric)} computes {value.numel()} numbers; a metric must be one")
        return value.item()


def widest(device: torch.device) -> torch.dtype:
    """What sums are taken in there: Apple's GPUs have no float64."""
    return torch.float32 if device.type == "mps" else torch.float64


def accuracy(outputs: Tensor, labels: Tensor) -> Tensor:
    """Whether the likeliest class is the label, one value an item: outputs [n, classes, ...], labels [n, ...].

    Raises UsageError where the shapes are not such.
    """
    if outputs.ndim < 2 or outputs[:, 0].shape != labels.shape:
        raise UsageError(
            f"accuracy needs outputs [n, classes, ...] and labels [n, ...]; got {shapes((outputs, labels))}"
        )
    return outputs.argmax(dim=1) == labels
