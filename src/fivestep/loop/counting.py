"""What a criterion's mean is over: elements, classes or rows.

Owns the divisors of torch's own losses with reduction="mean"; every other criterion is taken to average over rows. A
count is made from the targets alone, without reading the device.
"""

from copy import copy
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from fivestep.errors import UsageError, named
from fivestep.loop.batch import rows, shapes
from fivestep.loop.canonical_names import uncompiled

# fmt: off
ELEMENTWISE: tuple[Any, ...] = (
    nn.MSELoss, nn.L1Loss, nn.SmoothL1Loss, nn.HuberLoss, nn.BCELoss, nn.BCEWithLogitsLoss, nn.PoissonNLLLoss,
    nn.SoftMarginLoss, nn.HingeEmbeddingLoss, nn.KLDivLoss,
)
ELEMENTWISE_FUNCTIONS: tuple[Any, ...] = (
    F.mse_loss, F.l1_loss, F.smooth_l1_loss, F.huber_loss, F.binary_cross_entropy, F.binary_cross_entropy_with_logits,
    F.poisson_nll_loss, F.soft_margin_loss, F.hinge_embedding_loss, F.kl_div,
)
# fmt: on
FLOATS: tuple[Any, ...] = (nn.HuberLoss, nn.BCELoss, nn.BCEWithLogitsLoss, nn.KLDivLoss)
FLOAT_FUNCTIONS: tuple[Any, ...] = (
    F.huber_loss,
    F.binary_cross_entropy,
    F.binary_cross_entropy_with_logits,
    F.kl_div,
)
CLASSWISE: tuple[Any, ...] = (nn.CrossEntropyLoss, nn.NLLLoss)
CLASSWISE_FUNCTIONS: tuple[Any, ...] = (F.cross_entropy, F.nll_loss)


def option(criterion: Any, name: str, default: Any) -> Any:
    """An option of a criterion: a torch module's attribute, or a keyword bound by functools.partial."""
    if isinstance(criterion, partial):
        return criterion.keywords.get(name, default)
    return getattr(criterion, name, default)


def without_smoothing(criterion: Any) -> Any:
    """A copy of a torch loss, or of a partial of one, with label_smoothing 0."""
    if isinstance(criterion, partial):
        return partial(criterion.func, *criterion.args, **{**criterion.keywords, "label_smoothing": 0.0})
    plain = copy(uncompiled(criterion))  # a copy of torch.compile's wrapper would hold the user's own loss
    plain.label_smoothing = 0.0
    return plain


def divisor(criterion: Any) -> str:
    """`"elements"`, `"classes"` or `"rows"`. Raises UsageError for a criterion that gives no mean."""
    reduction = option(criterion, "reduction", "mean")
    legacy = [option(criterion, name, None) for name in ("size_average", "reduce")]  # deprecated, still obeyed
    if reduction not in ("mean", "batchmean") or False in legacy:
        raise UsageError(f"the criterion's reduction is {reduction!r}; a mean is needed: reduction='mean'")
    known = uncompiled(criterion.func if isinstance(criterion, partial) else criterion)
    if _is(known, CLASSWISE) or known in CLASSWISE_FUNCTIONS:
        return "classes"
    if (_is(known, ELEMENTWISE) or known in ELEMENTWISE_FUNCTIONS) and reduction == "mean":
        return "elements"
    return "rows"


def _is(criterion: Any, kinds: tuple[Any, ...]) -> bool:
    """Whether it is one of torch's losses; a subclass with a forward of its own may divide by something else."""
    return any(isinstance(criterion, kind) and type(criterion).forward is kind.forward for kind in kinds)


def count_targets(criterion: Any, over: str, targets: Any) -> Any:
    """How much `criterion` divides by for `targets`: a number, or a scalar tensor on their device."""
    if over == "rows":
        return rows(targets)
    if not isinstance(targets, Tensor):
        raise UsageError(
            f"targets must be a tensor for {named(criterion)}; got {named(targets)}: try torch.as_tensor"
        )
    return targets.numel() if over == "elements" else count_classes(criterion, targets)


def count_classes(criterion: Any, targets: Tensor) -> Any:
    """Class indices: those not ignored, or their summed class weights; class probabilities: their rows."""
    if targets.is_floating_point():
        return targets.numel() // targets.shape[1 if targets.ndim > 1 else 0]
    kept = kept_targets(criterion, targets)
    weight = option(criterion, "weight", None)
    if weight is None:
        return kept.sum()
    try:
        return torch.where(kept, weight.to(targets.device)[torch.where(kept, targets, 0)], 0).sum()
    except IndexError as error:
        raise UsageError(f"a target is out of range for {len(weight)} class weights: {error}") from error


def compared(criterion: Any, over: str, outputs: Any, targets: Any) -> Any:
    """Return `criterion(outputs, targets)`. Where the class weights of the targets sum to 0 it is NaN, gradients 0.

    torch's gradients are 0/0 there. A share of 0 in an accumulation window would not make them 0. With label
    smoothing targets of weight 0 have a loss, which no share of 0 can stand for: that stays 0/0.
    """
    weight = option(criterion, "weight", None) if over == "classes" else None
    if weight is None or targets.is_floating_point() or option(criterion, "label_smoothing", 0.0):
        return criterion(outputs, targets)
    weighs = count_classes(criterion, targets) != 0
    weight = torch.where(weighs, weight, 1.0)
    if isinstance(criterion, nn.Module):
        names = [name for name, buffer in criterion.named_buffers() if name.split(".")[-1] == "weight"]
        mean = functional_call(criterion, dict.fromkeys(names, weight), (outputs, targets))
    else:
        mean = criterion(outputs, targets, weight=weight)
    return torch.where(weighs, mean, torch.nan)


def kept_targets(criterion: Any, targets: Tensor) -> Tensor:
    """The mask of the class indices that are not the criterion's ignore_index."""
    return targets.ne(option(criterion, "ignore_index", -100))


def unfit(criterion: Any, outputs: Tensor, targets: Any) -> bool:
    """Return whether shapes differ, which torch may broadcast, or a loss that needs floats gets integers."""
    if outputs.shape != targets.shape or targets.is_floating_point():
        return bool(outputs.shape != targets.shape)
    known = uncompiled(criterion.func if isinstance(criterion, partial) else criterion)
    return _is(known, FLOATS) or known in FLOAT_FUNCTIONS


def named_criterion(criterion: Any) -> str:
    """Return the name of a loss: of its function, or of its class."""
    return str(getattr(uncompiled(criterion), "__name__", type(uncompiled(criterion)).__name__))


def is_torch_loss(criterion: Any) -> bool:
    """Return whether it is a module, or a function, of torch itself."""
    known = uncompiled(criterion)
    if isinstance(known, nn.Module):
        return type(known).forward.__module__.startswith("torch.")
    return any(known is function for function in vars(F).values())


def misfit(criterion: Any, over: str, outputs: Any, targets: Any) -> str:
    """Return the sentence for outputs that do not fit their targets."""
    name = named_criterion(criterion)
    hint = ""
    if not isinstance(outputs, Tensor):
        hint = (
            f"; the model returned {named(outputs)}, and {name} compares one tensor: return it alone, or pass an "
            "objective with count() and loss() (docs/objectives.md)"
        )
    elif isinstance(outputs, Tensor) and isinstance(targets, Tensor):
        kind = str(targets.dtype).removeprefix("torch.")
        as_float = "" if targets.is_floating_point() else ".float()"
        if outputs.shape == targets.shape and as_float and unfit(criterion, outputs, targets):
            return f"{name} needs targets of floats, and these are {kind}: give labels.float()"
        indices = over == "classes" and targets.ndim == outputs.ndim - 1
        if indices and kind not in ("int64", "uint8") and kind != str(outputs.dtype).removeprefix("torch."):
            return f"{name} needs class indices of int64, and these are {kind}: give labels.long()"
        if outputs.shape == targets.shape and name in ("BCELoss", "binary_cross_entropy"):
            hint = "; it needs both between 0 and 1: end the model with a sigmoid, or use nn.BCEWithLogitsLoss()"
        elif over == "classes" and outputs.ndim == 3:
            hint = "; for logits [batch, time, vocab_size] use fivestep.NextToken()"
        elif over == "elements" and outputs.shape == (*targets.shape, 1):
            hint = f"; give both the same shape, e.g. labels{as_float}.unsqueeze({targets.ndim})"
        elif over == "elements" and targets.shape == (*outputs.shape, 1):
            hint = f"; give both the same shape, e.g. labels{as_float}.squeeze({outputs.ndim})"
        elif over == "elements" and outputs.shape != targets.shape:
            hint = "; give both the same shape"
    return f"{name} cannot compare the model's output {shapes(outputs)} with targets {shapes(targets)}{hint}"
