"""Names of weights and modules as the model itself has them, whether or not torch.compile has wrapped a part of it.

`torch.compile(module)` puts the module under the name `_orig_mod` of a wrapper, so each name below it gets one more
part. A name without that part is *canonical*: weights saved under canonical names load into the compiled model and
into the plain one. Owns the names; reads and writes no file.
"""

from collections.abc import Iterable
from inspect import unwrap
from typing import Any

import torch
from torch import Tensor, nn

from fivestep.loop.batch import distinct

WRAPPED = "_orig_mod"  # torch's name for the compiled module within its wrapper


def canonical(name: str) -> str:
    """Return `name` without the parts that torch.compile has added."""
    return ".".join(part for part in name.split(".") if part != WRAPPED) if WRAPPED in name else name


def canonical_pairs(pairs: Iterable[tuple[str, Any]]) -> list[tuple[str, Any]]:
    """Return (name, value) pairs, such as named_parameters() gives, under canonical names."""
    return [(canonical(name), value) for name, value in pairs]


def weights_of(module: nn.Module) -> dict[str, Tensor]:
    """Return `module.state_dict()` under canonical names."""
    weights = module.state_dict()
    return {canonical(name): value for name, value in weights.items()} if is_wrapped(weights) else weights


def load_weights_into(module: nn.Module, saved: dict[str, Any]) -> None:
    """Copy saved weights into `module`, whichever of the two was compiled. Raises RuntimeError if they do not fit."""
    own = module.state_dict()
    if is_wrapped(own) or is_wrapped(saved):
        names = {canonical(name): name for name in own}
        saved = {names.get(canonical(name), name): value for name, value in saved.items()}
    expanded = {name: one for name, one in own.items() if isinstance(one, Tensor) and distinct(one) is not one}
    if not expanded:
        module.load_state_dict(saved)
        return
    # torch does not copy into an expanded buffer, so what is behind it is copied here.
    left = module.load_state_dict({n: value for n, value in saved.items() if n not in expanded}, strict=False)
    lacking = [name for name in left.missing_keys if name not in saved]
    if lacking or left.unexpected_keys:
        raise RuntimeError(f"missing: {', '.join(lacking)}; unexpected: {', '.join(left.unexpected_keys)}")
    with torch.no_grad():
        for name, one in expanded.items():
            behind = distinct(one)
            behind.copy_(saved[name][tuple(slice(size) for size in behind.shape)])


def is_wrapped(names: Iterable[str]) -> bool:
    """Return whether torch.compile has added a part to any of the names."""
    return any(WRAPPED in name.split(".") for name in names)


def uncompiled(value: Any) -> Any:
    """Return the module or function that torch.compile was given to make `value`; any other value itself."""
    if isinstance(value, nn.Module):
        return value._modules.get(WRAPPED, value)
    return unwrap(value, stop=lambda layer: not is_of_the_compiler(layer)) if is_of_the_compiler(value) else value


def is_of_the_compiler(function: Any) -> bool:
    """Return whether `function` is one that torch.compile has put around another."""
    return str(getattr(function, "__globals__", {}).get("__name__")).startswith("torch._dynamo")
