"""Evaluation: the whole split, sums over counts, and no trace left behind.

Owns the averages of a split and the context that keeps an observer from disturbing training. Does not train.
"""

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from fivestep import processes
from fivestep.data.generators import owned_generators, random_state_kept, restore, state_of
from fivestep.data.reader import DATA_PARTS, SAMPLER_PARTS
from fivestep.errors import UsageError, named
from fivestep.interrupts import poll
from fivestep.loop.arithmetic import count_of, loss_of, unpacked
from fivestep.loop.batch import parts, rebuilt, shapes, to_device
from fivestep.loop.checks import check_mean, check_model
from fivestep.loop.diagnosis import has_one_row, one_row_named
from fivestep.loop.mean import Mean
from fivestep.loop.metrics import Figure, figures_of, figures_of_loss, try_figures
from fivestep.loop.modes import enter_evaluation
from fivestep.loop.objective import Objective, as_objective
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
    torchmetrics objects. A function returns one value an item, or the mean over a batch's items, and is averaged over
    all items of the split. With `Supervised` or `NextToken` and a cross-entropy the items are the class indices that
    are not ignored; otherwise, and for an objective of your own, the rows of the targets. What is no mean over items,
    such as an F1 score, is exact as a torchmetrics object alone. A dict of values, by a function or a
    MetricCollection, gives a figure `name.key` for each. Raises UsageError where `data` is empty, and where a metric
    does not fit. In distributed training every rank must call it. Each rank evaluates its rows of every batch. The
    figures cover all ranks and equal those of one process, up to rounding.
    """
    objective, figures = as_objective(criterion), figures_of(metrics, as_objective(criterion), device_of(model))
    return _evaluated(model, data, objective, figures, precision)


def try_metrics(
    model: nn.Module, data: Any, criterion: Any, metrics: Mapping[str, Any] | None, precision: str = "fp32"
) -> None:
    """Evaluate the first batch of `data` with `metrics`, if there are any. Raises UsageError where they do not fit.

    Random states, those of a loader's own generators too, and the model's modes are as before; metrics are reset. A
    model with lazy parameters is not tried: it would be built from other random numbers.
    """
    objective = as_objective(criterion)
    try_figures(in_evaluation(objective))
    figures = figures_of(metrics, objective, device_of(model))
    if not figures or any(map(is_lazy, [*model.parameters(), *model.buffers()])):
        return
    owned = owned_generators(data, "val", SAMPLER_PARTS | DATA_PARTS, set()).values()
    states = [(generator, state_of(generator)) for generator in owned]
    try:
        _evaluated(model, data, objective, figures, precision, most=1)
    finally:
        for generator, state in states:
            restore(generator, state)
        figures_of(metrics, objective, device_of(model))  # resets what keeps a state


def _evaluated(
    model: nn.Module, data: Any, objective: Any, watched: list[Figure], precision: str, most: int | None = None
) -> dict[str, float]:
    """Return the figures over the batches of `data`, at most the first `most`."""
    objective = in_evaluation(objective)
    device = device_of(model)
    loss, carry, passes, batch = Mean(), None, Passes(), None
    named_rows = one_row_named(lambda: "an evaluation batch" if has_one_row(batch) else None)
    with processes.together(), undisturbed(model), autocast(precision, device), named_rows:
        processes.meet("an evaluation")
        enter_evaluation(model)
        processes.same_as_first([*model.buffers()])
        for batch, stands_in in islice(shared(objective, data), most):
            poll()
            batch = to_device(batch, device)
            count = count_of(objective, batch)
            if stands_in:  # computed only where all processes must: a model in shards is gathered by all at once
                _, carry = passes(loss_of, objective, model, batch, carry)
                continue
            if watched:
                mean, outputs, targets, carry = passes(compared, objective, model, batch, carry)
                for figure in watched:
                    figure.add(objective, outputs, targets)
            else:
                mean, carry = passes(loss_of, objective, model, batch, carry)
            check_mean(mean, learning=False)
            loss.add(mean.detach(), count)
        if not processes.totals(loss.entries)[0]:
            raise UsageError(f"the data to evaluate on ({type(data).__name__}) gave no batch")
        loss.sum_over_processes()
        mean_loss = loss.result()
        figures = figures_of_loss(objective, mean_loss)
        results = [figure.result() for figure in watched]
    return {
        "loss": mean_loss,
        "count": loss.weight,
        **figures,
        **{name: v for one in results for name, v in one.items()},
    }


def in_evaluation(objective: Any) -> Any:
    """Return the objective that judges. Raises UsageError where `in_evaluation` returns none."""
    judge = objective.in_evaluation() if hasattr(objective, "in_evaluation") else objective
    if not isinstance(judge, Objective):
        raise UsageError(
            f"the objective's in_evaluation() returned {named(judge)}; it must return an objective, such as itself"
        )
    return judge


def device_of(model: nn.Module) -> torch.device:
    """Return where the model's parameters are. Raises UsageError where it is no model."""
    check_model(model)
    return next(iter(model.parameters()), torch.empty(0)).device


class Passes:
    """Calls functions of a model without gradients, and with them from the first call on that needs them.

    A model may differentiate in its forward: forces are the gradient of an energy.
    """

    differentiates = False

    def __call__(self, function: Any, *arguments: Any) -> Any:
        """Return what `function` returns, cut from any graph."""
        if not self.differentiates:
            try:
                return function(*arguments)
            except RuntimeError as error:
                if not re.search(r"requires? grad", str(error)):
                    raise
                self.differentiates = True
        with torch.enable_grad():
            return detached(function(*arguments))


def detached(value: Any) -> Any:
    """Return `value` with its tensors, also those in tuples, lists and dicts, cut from the graph."""
    if isinstance(value, Tensor):
        return value.detach()
    return rebuilt(value, list(map(detached, parts(value)))) if type(value) in (tuple, list, dict) else value


def compared(objective: Any, model: nn.Module, batch: Any, carry: Any) -> tuple[Any, Any, Any, Any]:
    """Return the mean loss, the outputs, the targets and the carry for the next batch."""
    method = "forward(model, batch, carry)"
    outputs, targets, carry = unpacked(
        objective.forward(model, batch, carry), method, "outputs", "targets", "the carry"
    )
    return objective.compare(outputs, targets), outputs, targets, carry


def accuracy(outputs: Tensor, labels: Tensor) -> Tensor:
    """Whether the likeliest class is the label, one value an item: outputs [n, classes, ...], labels [n, ...].

    Raises UsageError where the shapes are not such.
    """
    if outputs.ndim < 2 or outputs[:, 0].shape != labels.shape:
        raise UsageError(
            f"accuracy needs outputs [n, classes, ...] and labels [n, ...]; got {shapes((outputs, labels))}"
        )
    return outputs.argmax(dim=1) == labels
