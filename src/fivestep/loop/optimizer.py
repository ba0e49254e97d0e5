"""Optimizers by name, with groups by name. Any other optimizer object the user brings is taken as it is.

Owns which parameters decay and which parameters a step updates. Does not step.
"""

import sys
import warnings
from collections.abc import Callable, Iterable, Sequence
from fnmatch import fnmatchcase
from inspect import signature
from operator import is_
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from fivestep import processes
from fivestep.errors import UsageError, named, suggestion
from fivestep.loop.canonical_names import canonical_pairs
from fivestep.loop.lean import needs_closure

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
        # The class's own step: torch's schedulers replace the one of the instance by a function that shows `self`.
        if isinstance(one, torch.optim.LBFGS) or required_arguments(type(one).step)[1:]:
            raise UsageError(needs_closure(one))
    if not optimizers:
        raise UsageError("the optimizer is an empty list; it must be a torch optimizer, or a list of them")
    return optimizers


def required_arguments(function: Any) -> list[str]:
    """Return the names of the arguments that `function` cannot do without; none where it does not tell."""
    try:
        known = signature(function).parameters.values()
    except (TypeError, ValueError):
        return []
    return [one.name for one in known if one.default is one.empty and "VAR" not in one.kind.name]


def check_no_modes(optimizers: Iterable[Optimizer]) -> None:
    """Raise UsageError for an optimizer with train() and eval() modes: fit and fs.Run do not switch them."""
    for one in optimizers:
        if callable(getattr(one, "train", None)) and callable(getattr(one, "eval", None)):
            raise UsageError(
                f"the optimizer is {named(one)}, which has train() and eval() modes, as schedule-free optimizers do. "
                "fit and fs.Run do not switch them, so they would validate and save the weights of train mode. Use "
                "another optimizer (ema= keeps averaged weights), or switch the modes in a loop of your own over "
                "fs.train without run="
            )


def optimized(optimizers: Iterable[Optimizer]) -> list[nn.Parameter]:
    """Return every parameter that the optimizers hold, in their order."""
    return [p for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]]


class HeldParameters:
    """The parameters that the optimizers hold now, in the model's order.

    A user may swap, extend or edit the groups between two steps, replace a parameter of the model, or freeze one. So
    the groups are compared at each step, by identity. Parameters of a criterion that is itself a module count as the
    model's. Warns once of trainable parameters that no optimizer holds, and of held ones that the model lost. Raises
    UsageError where an optimizer is built from parameters of another model, or one parameter is held twice.
    """

    def __init__(self, model: nn.Module, criterion: Any, optimizers: Sequence[Optimizer]):
        self.owners = [one for one in (model, criterion) if isinstance(one, nn.Module)]
        self.optimizers = optimizers
        self.followers: list[Callable[[], None]] = []  # called after the parameters have changed
        self.held: list[nn.Parameter] = []  # in the order of the groups
        self.ordered: list[nn.Parameter] = []  # in the model's order: a hand-written clip takes them in this one
        self.frozen: list[nn.Parameter] = []  # no optimizer holds them
        self.gradients_before = -1  # how many the last step had
        self.quiet: set[str] = set()  # names that were reported, or that an optimizer has held: taken out on purpose
        EVERY_OPTIMIZER.update(optimizers)
        self._follow(optimized(optimizers))
        foreign = len(self.ordered) - len(self._owned().keys() & set(map(id, self.ordered)))
        if foreign:
            raise UsageError(
                f"{foreign} of the optimizer's {len(self.ordered)} parameter tensors do not belong to the model. "
                "Build the optimizer from model.parameters(), after the model is complete"
            )

    def now(self) -> list[nn.Parameter]:
        """Return them. Takes about 1 microsecond for a small model."""
        held = optimized(self.optimizers)
        if len(held) != len(self.held) or not all(map(is_, held, self.held)):
            self._follow(held)
            self._compare()
        return self.ordered

    def gradients(self) -> list[Tensor]:
        """Return the gradients of those that have one. Compares with the model when their number has changed."""
        gradients = [parameter.grad for parameter in self.now() if parameter.grad is not None]
        if len(gradients) != self.gradients_before or any(p.requires_grad for p in self.frozen):
            self.gradients_before = len(gradients)
            self._compare()
        return gradients

    def _owned(self) -> dict[int, tuple[str, nn.Parameter]]:
        """Return the model's and the criterion's parameters with their names, once each, by id."""
        named_ones = [pair for owner in self.owners for pair in canonical_pairs(owner.named_parameters())]
        return {id(p): (name, p) for name, p in named_ones}

    def _follow(self, held: list[nn.Parameter]) -> None:
        by_id = {id(p): p for p in held}
        if not held:
            raise UsageError("the optimizer holds no parameters: build it from model.parameters()")
        if len(by_id) < len(held):
            raise UsageError(
                "the same parameter is in two optimizers or parameter groups and would be updated twice per step. "
                "Put each parameter into one group only"
            )
        known = self._owned()
        owned = {number: name for number, (name, _) in known.items() if number in by_id}
        self.quiet.update(owned.values())
        self.held, self.ordered = (
            held,
            [by_id[number] for number in [*owned, *(one for one in by_id if one not in owned)]],
        )

    def _compare(self) -> None:
        """Compare the optimizers' parameters with the model's, and report each difference once."""
        owned, held = self._owned(), set(map(id, self.held))
        elsewhere = set(map(id, optimized(EVERY_OPTIMIZER)))
        apart = [(name, p) for number, (name, p) in owned.items() if number not in held | elsewhere]
        self.frozen = [p for _, p in apart if not p.requires_grad]
        if untrained := [name for name, p in apart if p.requires_grad and name not in self.quiet]:
            self._report(
                f"no optimizer holds {listed(untrained)} of the model, so training does not change them: add them to "
                "an optimizer, or freeze them (requires_grad_(False))",
                *untrained,
            )
        if LOST not in self.quiet and (lost := len(held - owned.keys())):
            self._report(
                f"parameters of the optimizer that are no longer in the model: {lost}. They are not saved. Add the "
                "model's current parameters with optimizer.add_param_group",
                LOST,
            )
        for follow in self.followers:
            follow()

    def _report(self, sentence: str, *names: str) -> None:
        self.quiet.update(names)
        if processes.is_first():
            warnings.warn(sentence, stacklevel=frames_of_this_package())


LOST = ""  # stands among the reported names for parameters that have none any more
EVERY_OPTIMIZER: WeakSet[Optimizer] = WeakSet()  # of every step: a GAN's other step may hold what this one does not


def listed(names: Sequence[str]) -> str:
    """Return `2 trainable parameters (a, b)`, with the first names of a longer list."""
    more = ", ..." if len(names) > 4 else ""
    kind = "trainable parameter" + ("s" if len(names) > 1 else "")
    return f"{len(names)} {kind} ({', '.join(names[:4])}{more})"


def frames_of_this_package() -> int:
    """Return the stacklevel at which a warning of the caller points at the first line outside of this package."""
    frame, level = sys._getframe(1), 1
    while frame.f_back is not None and str(frame.f_globals.get("__name__")).startswith("fivestep."):
        frame, level = frame.f_back, level + 1
    return level
