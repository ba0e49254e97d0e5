"""Training and evaluation modes of a model, and who may change them.

A module in eval() below a model in train() was frozen on purpose, and stays so. Owns modes; trains nothing.
"""

from inspect import Parameter, signature
from typing import Any

from torch import nn

from fivestep.errors import UsageError, named


def enter_training(model: nn.Module, frozen: set[nn.Module]) -> None:
    """`model.train()`, once an epoch; modules that the user froze in eval() stay so.

    A module in eval() below a root in train() was frozen on purpose; `frozen` keeps them, for the case that the
    caller left the whole model in eval() at the epoch's end.
    """
    if model.training:
        frozen.clear()
        frozen.update(module for module in model.modules() if not module.training)
    check_mode_methods(model)
    model.train()
    for module in frozen:
        module.training = False


def enter_evaluation(model: nn.Module) -> None:
    """Call `model.eval()`. Raises UsageError where it, or train(), is a method of another meaning."""
    check_mode_methods(model)
    model.eval()


def check_mode_methods(model: nn.Module) -> None:
    """Raise UsageError where a module's train() or eval() is not torch's: both are called to switch modes."""
    for module in model.modules():
        for name, own in (("train", nn.Module.train), ("eval", nn.Module.eval)):
            if getattr(type(module), name) is own and name not in vars(module):
                continue
            found: Any = getattr(module, name)
            if not callable(found) or not switches_mode(found, takes_mode=name == "train"):
                usual = "train(mode=True)" if name == "train" else "eval()"
                raise UsageError(
                    f"{named(module)}, a module of the model, replaces torch's {usual} by a {name} of another "
                    "meaning. fivestep calls train(mode=True) and eval() to switch modes. Rename yours, for example "
                    f"to {name}_model"
                )


def switches_mode(method: Any, takes_mode: bool) -> bool:
    """Return whether `method` can be called without arguments and, if it takes the mode, with a bool."""
    try:
        known = signature(method)
    except (TypeError, ValueError):  # of compiled code, which does not tell
        return True
    try:
        known.bind()
        if takes_mode:
            known.bind(True)
    except TypeError:
        return False
    first = next(iter(known.parameters.values()), None)
    return not takes_mode or first is None or first.default is Parameter.empty or isinstance(first.default, bool)
