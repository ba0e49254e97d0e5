"""Metrics over a split: functions, averaged by sums over items, and torchmetrics objects.

    names and metrics -> Figure each: add(outputs, targets) a batch, then result() -> figures by name

Owns what is averaged, and over what. Runs no model.
"""

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from fivestep import processes
from fivestep.errors import FivestepError, UsageError, brief, named
from fivestep.loop.batch import rows, shapes
from fivestep.loop.counting import kept_targets
from fivestep.loop.mean import Mean

OWN_FIELDS = {
    "step", "epoch", "split", "loss", "count", "elapsed_seconds", "event", "annealing", "to_best", "nonfinite",
}  # fmt: skip
NEEDED = {
    "forward": "forward(model, batch, carry) -> outputs, targets, carry",
    "compare": "compare(outputs, targets) -> the mean loss",
}


def figures_of(metrics: Any, objective: Any, device: torch.device) -> list["Figure"]:
    """Return a Figure for each of `metrics`. Raises UsageError where they, or the objective, are of a wrong kind."""
    if not isinstance(metrics, Mapping | None):
        raise UsageError(f"metrics is {named(metrics)}; it must map names to functions or torchmetrics objects")
    lacking = [name for name in NEEDED if not callable(getattr(objective, name, None))]
    if metrics and lacking:
        raise UsageError(
            f"metrics= needs an objective with {' and '.join(NEEDED.values())}; {named(objective)} has no "
            f"{' and no '.join(lacking)}. Add what is missing, or leave metrics= out"
        )
    return [Figure(name, metric, device) for name, metric in (metrics or {}).items()]


def figures_of_loss(objective: Any, loss: float) -> dict[str, float]:
    """Return what an objective adds to a mean loss, as numbers by name. Raises UsageError for anything else."""
    return checked_figures(objective.figures(loss)) if hasattr(objective, "figures") else {}


def try_figures(objective: Any) -> None:
    """Ask an objective for its figures before training. Raises UsageError where a row could not hold them."""
    try:
        figures = objective.figures(1.0) if hasattr(objective, "figures") else {}
    except Exception:  # it may need what `loss` has yet to leave behind
        return
    checked_figures(figures)


def checked_figures(figures: Any) -> dict[str, float]:
    """Return an objective's figures as numbers by name. Raises UsageError for names and values of another kind."""
    if not isinstance(figures, Mapping):
        raise UsageError(f"the objective's figures(loss) returned {named(figures)}; it must return a dict of numbers")
    for name in figures:
        if not isinstance(name, str):
            raise UsageError(f"figures(loss) returned a figure named {name!r}; a name must be a text")
        if name in OWN_FIELDS:
            raise UsageError(
                f"figures(loss) returned a figure named {name!r}, as a row's own field is; give it another name"
            )
    return {name: number(value, f"the figure {name!r} of figures(loss)") for name, value in figures.items()}


def number(value: Any, what: str) -> float:
    """Return a number, or the element of a tensor or array of one, as a float. Raises UsageError for the rest."""
    try:
        if not isinstance(value, str | bytes):
            return float(value.item() if hasattr(value, "item") else value)
    except (TypeError, ValueError, RuntimeError, OverflowError):
        pass
    got = f"a tensor {shapes(value)}" if isinstance(value, Tensor) else named(value)
    raise UsageError(f"{what} is {got}; it must be a number, or a tensor with one element")


def scored(objective: Any, outputs: Any, targets: Any) -> tuple[Any, Any]:
    """Return outputs [n, classes] and targets [n] of what is not ignored (padding at a split's end).

    Where nothing is ignored, and where targets are no class indices, they stay as they are.
    """
    if not of_classes(objective, targets) or outputs.ndim < 2:
        return outputs, targets
    kept = kept_targets(objective.criterion, targets)
    return (outputs, targets) if kept.all() else (outputs.movedim(1, -1)[kept], targets[kept])


def of_classes(objective: Any, targets: Any) -> bool:
    """Return whether each of `targets` is the index of a class, an item of its own."""
    return getattr(objective, "over", None) == "classes" and not targets.is_floating_point()


class Figure:
    """One metric over a split. A function's values are averaged; a torchmetrics object computes its own."""

    def __init__(self, name: str, metric: Any, device: torch.device):
        self.name, self.metric = name, metric
        self.sums: dict[str, tuple[Mean, list[int]]] = {}  # by key, "" for a metric of one value: sum, items
        if not isinstance(name, str):
            raise UsageError(f"a metric is named {name!r}; a name must be a text: metrics={{'accuracy': ...}}")
        if isinstance(metric, type):
            raise UsageError(f"the metric {name!r} is the class {named(metric)}; make an object of the class")
        self.stateful = all(hasattr(metric, method) for method in ("update", "compute", "reset"))
        if self.stateful:
            with self._failing("in reset()"):
                metric.reset()
            if isinstance(metric, nn.Module):
                metric.to(device)
        elif not callable(metric):
            raise UsageError(
                f"the metric {name!r} is {named(metric)}; it must be a function (outputs, targets), or a "
                "torchmetrics object"
            )

    def add(self, objective: Any, outputs: Any, targets: Any) -> None:
        """Take in one batch, unless all of it is ignored."""
        outputs, targets = scored(objective, outputs, targets)
        if not rows(targets):
            return
        with self._failing(f"on outputs {shapes(outputs)} and targets {shapes(targets)}"):
            value = self.metric.update(outputs, targets) if self.stateful else self.metric(outputs, targets)
        if self.stateful:
            return
        items = targets.numel() if of_classes(objective, targets) else rows(targets)
        for key, part in value.items() if isinstance(value, Mapping) else [("", value)]:
            self._add(str(key), part, items, {items, rows(targets), *sizes(targets), *sizes(outputs)})

    @contextmanager
    def _failing(self, where: str) -> Iterator[None]:
        """Inside, an error of the metric becomes a UsageError that names the metric."""
        try:
            yield
        except (FivestepError, torch.OutOfMemoryError):
            raise
        except Exception as error:
            raise UsageError(f"the metric {self.name!r} fails {where}: {brief(error)}") from error

    def _add(self, key: str, value: Any, items: int, known: set[int]) -> None:
        try:
            value = value.detach() if isinstance(value, Tensor) else torch.tensor(float(value), dtype=torch.float64)
        except (TypeError, ValueError, OverflowError) as error:
            raise UsageError(
                f"the metric {self.label(key)!r} returned {named(value):.80}; it must return a number, a tensor, or "
                "a dict of these"
            ) from error
        if value.ndim and not {len(value), value.numel()} & known:
            raise UsageError(
                f"the metric {self.label(key)!r} returned a tensor {shapes(value)} for a batch of {items:,} items; "
                "it must return one value an item, their mean, or a dict of such"
            )
        sums, count = self.sums.setdefault(key, (Mean(), [0]))
        # Exact for what is right or wrong, so the same however a batch was shared; else summed as wide as can be.
        wide = torch.int64 if not value.is_floating_point() else widest(value.device)
        sums.add(value.sum(dtype=wide) if value.ndim else value.to(wide) * items, 1)
        count[0] += value.numel() if value.ndim else items

    def label(self, key: str) -> str:
        """Return the name of the figure under `key`."""
        return f"{self.name}.{key}" if key else self.name

    def result(self) -> dict[str, float]:
        """Return the figures over all batches, by name. Raises UsageError where one is not a number."""
        if self.stateful:
            with self._failing("in compute()"):
                computed = self.metric.compute()
            parts = computed.items() if isinstance(computed, Mapping) else [("", computed)]
            return {self.label(str(key)): self._number(str(key), value) for key, value in parts}
        found: dict[str, float] = {}
        known = [key for keys in processes.from_all([*self.sums]) for key in keys]  # without rows there are none
        for key in dict.fromkeys(known or [""]):
            sums, count = self.sums.get(key, (Mean(), [0]))
            sums.sum_over_processes()
            (items,) = processes.totals(*count)
            found[self.label(key)] = sums.total / items if items else math.nan
        return found

    def _number(self, key: str, value: Any) -> float:
        held = value.numel() if isinstance(value, Tensor) else len(value) if isinstance(value, list | tuple) else 1
        if held != 1:
            raise UsageError(
                f"the metric {self.label(key)!r} computes {held} numbers; it must be one: with torchmetrics "
                'give average="macro" or "micro"'
            )
        return number(value[0] if isinstance(value, list | tuple) else value, f"the metric {self.label(key)!r}")


def sizes(value: Any) -> list[int]:
    """Return how many elements a tensor has, in a list; nothing for what is no tensor."""
    return [value.numel()] if isinstance(value, Tensor) else []


def widest(device: torch.device) -> torch.dtype:
    """Return the type that sums are taken in there: Apple's GPUs have no float64."""
    return torch.float32 if device.type == "mps" else torch.float64
