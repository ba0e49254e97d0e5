"""What a model's forward takes, compared with what a batch gives it. Owns the sentences for what does not fit."""

from inspect import signature
from typing import Any

from torch import Tensor

from fivestep.errors import named
from fivestep.loop.batch import shapes
from fivestep.loop.canonical_names import uncompiled

C_NAMES = {"float64": "double", "float16": "half", "int64": "long", "int32": "int", "int16": "short", "uint8": "byte"}


def other_inputs(model: Any, features: Any) -> str:
    """Return the sentence for a model whose forward does not take one argument; empty where it does."""
    model = uncompiled(getattr(model, "replicated", model))
    if takes(model.forward, features):
        return ""
    return (
        f"the model is {named(model)} with forward({', '.join(signature(model.forward).parameters)}), and a batch "
        f"(features, labels) gives it one argument, features ({shapes(features)}). Give forward one argument and "
        "unpack it there, or pass an objective with count() and loss() as criterion"
    )


def other_dtype(model: Any, features: Any, error: Exception) -> str:
    """Return the sentence for features of another dtype than the weights, where `error` is about that; else empty."""
    model = uncompiled(getattr(model, "replicated", model))
    weights = {p.dtype for p in model.parameters() if p.is_floating_point()}
    if not (isinstance(features, Tensor) and len(weights) == 1 and features.dtype not in weights):
        return ""
    weight, given = (str(dtype).removeprefix("torch.") for dtype in (*weights, features.dtype))
    said = str(error).lower()
    if (
        "type" not in said
        or "indices" in said
        or not any(name in said for name in (given, C_NAMES.get(given, given)))
    ):
        return ""
    fix = "features.float()" if weight == "float32" else f"features.to(torch.{weight})"
    return (
        f"the features are {given} and the model's weights {weight}; both must have one dtype: give {fix} ({error})"
    )


def takes(function: Any, *arguments: Any) -> bool:
    """Return whether a function, or a module by its forward, can be called with `arguments`; True if unknown."""
    try:
        parameters = signature(getattr(uncompiled(function), "forward", function))
    except (TypeError, ValueError):  # of compiled code, which does not tell
        return True
    try:
        parameters.bind(*arguments)
        return True
    except TypeError:
        return False
