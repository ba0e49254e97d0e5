"""Checks of what a caller gives to a step and a loop: limits, switches, the model, the run, a loss."""

from typing import Any

from torch import Tensor, nn

from fivestep.errors import UsageError, named


def check_model(model: Any) -> None:
    """Raise UsageError unless the model is an nn.Module: neither a class nor a function."""
    if not isinstance(model, nn.Module):
        kind = "the class " if isinstance(model, type) else ""
        raise UsageError(f"the model is {kind}{named(model)}; it must be an nn.Module, such as nn.Linear(4, 3)")


def check_limits(**limits: Any) -> None:
    """Raise UsageError unless each limit of clipping is a number above 0, or None."""
    for name, limit in limits.items():
        if limit is not None and not (isinstance(limit, int | float) and limit > 0):
            flag = "--" + name.replace("_", "-")
            raise UsageError(f"{name} = {limit!r} must be above 0, or None for no clipping ({flag})")


def check_switches(**switches: Any) -> None:
    """Raise UsageError unless each switch is True or False: a text such as "off" would switch it on."""
    for name, switch in switches.items():
        if not isinstance(switch, bool):
            raise UsageError(f"{name} = {named(switch)} must be True or False")


def check_run(run: Any) -> None:
    """Raise UsageError unless the run is an fs.Run, not its folder, or None."""
    if run is not None and not hasattr(run, "attach"):
        raise UsageError(
            f"run is {named(run)}; it must be an fs.Run inside its with block: with fs.Run(folder) as run: ..."
        )


def check_mean(mean: Any, learning: bool = True) -> Tensor:
    """Return the loss: one real number; while learning, one that depends on a parameter. Raises UsageError."""
    if not isinstance(mean, Tensor):
        raise UsageError(f"the loss must be a scalar tensor; got {named(mean)}")
    if mean.ndim:
        raise UsageError(f"the loss must be one number, the mean over the batch; got shape {list(mean.shape)}")
    if mean.is_complex():
        raise UsageError(f"the loss must be real; got {mean.dtype}: take its .abs() or .real")
    if learning and not mean.requires_grad:
        raise UsageError("the loss depends on no parameter with requires_grad=True: nothing can be learned from it")
    return mean
