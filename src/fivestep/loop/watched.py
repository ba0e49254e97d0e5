"""Who else looks at a step: hooks of modules and of optimizers, and modes that see every operation.

Owns where torch keeps them. What follows from one being there is its caller's.
"""

from collections.abc import Iterable, Mapping
from typing import Any

from torch.nn.modules import module as torch_module
from torch.optim import Optimizer
from torch.optim import optimizer as torch_optimizer
from torch.utils._python_dispatch import TorchDispatchMode

HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")  # tables of a module

Tables = list[Mapping[Any, Any]]


def is_watched(module: Any) -> bool:
    """Whether calling `module` would do more than its forward."""
    return any(getattr(module, name) for name in HOOKS)


def module_hooks(modules: Iterable[Any]) -> Tables:
    """The tables of hooks that calls of these modules look into."""
    own = [vars(module)[name] for module in modules for name in HOOKS]
    return own + [vars(torch_module)[f"_global{name}"] for name in HOOKS]


def step_hooks(optimizers: Iterable[Optimizer]) -> Tables:
    """The tables of hooks that a step of these optimizers looks into."""
    own = [table for one in optimizers for table in (one._optimizer_step_pre_hooks, one._optimizer_step_post_hooks)]
    return [*own, torch_optimizer._global_optimizer_pre_hooks, torch_optimizer._global_optimizer_post_hooks]


class Watch(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """A mode whose `__torch_dispatch__` is asked at every operation."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """torch's question: no, there is nothing to skip; yes would import its compiler at the first operation."""
        return False
