"""Optimizers by name, with groups by name. Any other optimizer object the user brings is taken as it is.

Owns which parameters decay and which parameters a step updates. Does not step.
"""

from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from fivestep.errors import UsageError, named, suggestion

OPTIMIZERS: dict[str, Any] = {"sgd": torch.optim.SGD, "adam": torch.optim.Adam, "adamw": torch.optim.AdamW}


def build_optimizer(
    model: nn.Module, name: str, learning_rate: float, *, no_decay: Sequence[str] = (), **options: Any
) -> Optimizer:
    """The optimizer `name` (sgd, adam, adamw) over the parameters of `model` that train.

    Parameters whose name matches a pattern of `no_decay` (`*.bias`, `*norm*`) form a second group with
    weight_decay 0. `options` go to torch's class as they are.
    """
    if name not in OPTIMIZERS:
        raise UsageError(
            f"optimizer = {name!r} is not one of {', '.join(OPTIMIZERS)} (--optimizer){suggestion(name, OPTIMIZERS)}"
        )
    decayed: list[nn.Parameter] = []
    spared: list[nn.Parameter] = []
    for parameter_name, parameter in model.named_parameters():
        if parameter.requires_grad:
            matches = any(fnmatchcase(parameter_name, pattern) for pattern in no_decay)
            (spared if matches else decayed).append(parameter)
    groups: list[dict[str, Any]] = [{"params": decayed}, {"params": spared, "weight_decay": 0.0}]
    optimizer: Optimizer = OPTIMIZERS[name](
        [group for group in groups if group["params"]], lr=learning_rate, **options
    )
    return optimizer


def as_optimizers(optimizer: Any) -> list[Optimizer]:
    """`optimizer` as a list: one, or several stepped in order."""
    optimizers = list(optimizer) if isinstance(optimizer, list | tuple) else [optimizer]
    for one in optimizers:
        if not isinstance(one, Optimizer):
            raise UsageError(f"the optimizer is {named(one)}; it must be a torch optimizer, or a list of them")
        if isinstance(one, torch.optim.LBFGS):
            raise UsageError("LBFGS needs a closure, which five steps do not have: call it in a loop of your own")
    if not optimizers:
        raise UsageError("the optimizer is an empty list; it must be a torch optimizer, or a list of them")
    return optimizers


def optimized(optimizers: Iterable[Optimizer]) -> list[nn.Parameter]:
    """Every parameter the optimizers hold, in their order."""
    return [p for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]]


def updated_parameters(model: nn.Module, criterion: Any, optimizers: Sequence[Optimizer]) -> list[nn.Parameter]:
    """The parameters a step updates, in the model's order (the order a hand-written clip would take them in).

    Parameters of a criterion that is itself a module count as the model's. Raises UsageError where an optimizer
    holds a parameter of neither, or two hold the same one.
    """
    own = [*model.parameters(), *(criterion.parameters() if isinstance(criterion, nn.Module) else ())]
    owned = {id(parameter): parameter for parameter in own}  # once each: a criterion may hold the model
    held = optimized(optimizers)
    ids = {id(parameter) for parameter in held}
    if len(ids) < len(held):
        raise UsageError("two optimizers hold the same parameter: it would be updated twice in a step")
    parameters = [parameter for parameter in owned.values() if id(parameter) in ids]
    foreign = len(ids) - len(parameters)
    if foreign:
        raise UsageError(
            f"the optimizer holds {foreign} of {len(ids)} parameter tensors that are not the model's: "
            "build it from model.parameters(), after the model is made"
        )
    return parameters
