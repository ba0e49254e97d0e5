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
from fivestep.loop.canonical_names import canonical_pairs

OPTIMIZERS: dict[str, Any] = {"sgd": torch.optim.SGD, "adam": torch.optim.Adam, "adamw": torch.optim.AdamW}
if hasattr(torch.optim, "Muon"):
    OPTIMIZERS["muon"] = torch.optim.Muon


def build_optimizer(
    model: nn.Module,
    name: str,
    learning_rate: float,
    *,
    no_decay: Sequence[str] = (),
    parameters: Iterable[tuple[str, nn.Parameter]] | None = None,
    **options: Any,
) -> Optimizer:
    """The optimizer `name` (sgd, adam, adamw, muon) over the parameters of `model` that train, or those given.

    Parameters whose name matches a pattern of `no_decay` (`*.bias`, `*norm*`) form a second group with
    weight_decay 0. `options` go to torch's class as they are. Raises UsageError where nothing is left to train.
    """
    if name not in OPTIMIZERS:
        raise UsageError(
            f"optimizer = {name!r} is not one of {', '.join(OPTIMIZERS)} (--optimizer){suggestion(name, OPTIMIZERS)}"
        )
    decayed: list[nn.Parameter] = []
    spared: list[nn.Parameter] = []
    for parameter_name, parameter in canonical_pairs(model.named_parameters() if parameters is None else parameters):
        if parameter.requires_grad:
            matches = any(fnmatchcase(parameter_name, pattern) for pattern in no_decay)
            (spared if matches else decayed).append(parameter)
    if not decayed and not spared:
        raise UsageError("no parameter of the model is left to train: freeze fewer (--freeze)")
    groups: list[dict[str, Any]] = [{"params": decayed}, {"params": spared, "weight_decay": 0.0}]
    optimizer: Optimizer = OPTIMIZERS[name](
        [group for group in groups if group["params"]], lr=learning_rate, **options
    )
    return optimizer


def build_muon(
    model: nn.Module, matrix_rate: float, momentum: float, rate: float, *, weight_decay: float, **options: Any
) -> list[Optimizer]:
    """torch's Muon on the hidden matrices of `model` at `matrix_rate`, AdamW on the rest at `rate`: two optimizers.

    Muon (Jordan et al. 2024) orthogonalises each matrix's momentum; its updates are scaled to the size that AdamW's
    have (Liu et al. 2025), so both rates are of one kind. Embeddings and the output layer are AdamW's. Raises
    UsageError for a model without hidden matrices.
    """
    if not hasattr(torch.optim, "Muon"):
        raise UsageError("this torch has no Muon; install torch 2.9 or newer, or take --optimizer adamw")
    hidden = hidden_matrices(model)
    trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    matrices = [(name, p) for name, p in trained if name in hidden]
    rest = [(name, p) for name, p in trained if name not in hidden]
    if not matrices:
        why = "all of which are frozen here (--freeze)" if hidden else "which this model has none of"
        raise UsageError(f"muon needs hidden matrices, {why}: take --optimizer adamw")
    no_decay = options.pop("no_decay", ())
    shared: dict[str, Any] = {"no_decay": no_decay, "weight_decay": weight_decay}
    scaled: dict[str, Any] = {"momentum": momentum, "adjust_lr_fn": "match_rms_adamw"}
    muon = build_optimizer(model, "muon", matrix_rate, parameters=matrices, **shared, **scaled)
    return [muon, *([build_optimizer(model, "adamw", rate, parameters=rest, **shared, **options)] if rest else [])]


def hidden_matrices(model: nn.Module) -> set[str]:
    """The names of the parameters with two dimensions, less embeddings, the last linear layer and what is tied."""
    linears = [module for module in model.modules() if isinstance(module, nn.Linear)]
    outer = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    outer |= {id(linears[-1].weight)} if linears else set()
    return {name for name, p in model.named_parameters() if p.ndim == 2 and id(p) not in outer}


def freeze(model: nn.Module, patterns: Sequence[str]) -> int:
    """Take the parameters whose name matches one of `patterns` out of training; how many numbers that are.

    Raises UsageError for a pattern that matches none.
    """
    frozen: dict[str, nn.Parameter] = {}
    named_ones = canonical_pairs(model.named_parameters())
    for pattern in patterns:
        matching = {name: p for name, p in named_ones if fnmatchcase(name, pattern)}
        if not matching:
            names = [name for name, _ in named_ones]
            hint = suggestion(pattern, names) or f"; the names are {', '.join(names[:6])}, ..."
            raise UsageError(f"freeze = {pattern!r} matches no parameter of the model (--freeze){hint}")
        frozen |= matching
    for parameter in frozen.values():
        parameter.requires_grad_(False)
    return sum(parameter.numel() for parameter in frozen.values())


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
