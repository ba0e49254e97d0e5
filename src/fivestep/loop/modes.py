"""Training and evaluation modes of a model, and who may change them.

A module in eval() below a model in train() was frozen on purpose, and stays so. Owns modes; trains nothing.
"""

from torch import nn


def enter_training(model: nn.Module, frozen: set[nn.Module]) -> None:
    """`model.train()`, once an epoch; modules that the user froze in eval() stay so.

    A module in eval() below a root in train() was frozen on purpose; `frozen` keeps them, for the case that the
    caller left the whole model in eval() at the epoch's end.
    """
    if model.training:
        frozen.clear()
        frozen.update(module for module in model.modules() if not module.training)
    model.train()
    for module in frozen:
        module.training = False
