"""What a model's forward takes, compared with what a batch gives it. Owns the sentence for a model of two inputs."""

from inspect import signature
from typing import Any

from fivestep.errors import named
from fivestep.loop.batch import shapes
from fivestep.loop.canonical_names import uncompiled


def other_inputs(model: Any, features: Any) -> str:
    """Return the sentence for a model whose forward does not take one argument; empty where it does."""
    model = uncompiled(getattr(model, "replicated", model))
    try:
        takes = signature(model.forward)
    except (TypeError, ValueError):  # of compiled code, which does not tell
        return ""
    try:
        takes.bind(features)
        return ""
    except TypeError:
        return (
            f"the model is {named(model)} with forward({', '.join(takes.parameters)}), and a batch (features, "
            f"labels) gives it one argument, features ({shapes(features)}). Give forward one argument and unpack it "
            "there, or pass an objective with count() and loss() as criterion"
        )
