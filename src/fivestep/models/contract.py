"""What the models of this folder have in common: the language-model contract, and the refusal of bad sizes.

Owns the `LanguageModel` protocol that `generate.py` relies on, and the checks that models run on their
arguments. Holds no layers.
"""

from collections.abc import Iterator
from inspect import signature
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from fivestep.errors import UsageError


class LanguageModel(Protocol):
    """Any `nn.Module` with a `predict_next`; one with a bounded context also has an int `block_size`.

    A `memory` belongs to the model that made it: hidden state, ids seen, or a key-value cache. A caller
    passes it back unread, with only the ids that came since, and never uses the same memory twice. A model with a
    `block_size` looks back on what `append_recent` keeps.
    """

    def predict_next(self, ids: Tensor, memory: Any) -> tuple[Tensor, Any]:
        """Logits `[batch, vocab_size]` of the token after `ids` `[batch, time]`, and the memory to pass next.

        `ids` are the ids not seen yet, at least one a row; `memory` is None at first.
        """
        ...

    def modules(self) -> Iterator[nn.Module]: ...

    def parameters(self) -> Iterator[nn.Parameter]: ...


def flag(name: str) -> str:
    """The command-line flag of an argument: `n_embd` is `--n-embd`."""
    return "--" + name.replace("_", "-")


def require_positive(**sizes: int) -> None:
    """Raise `UsageError` for the first size that is not an integer of at least 1."""
    for name, size in sizes.items():
        if not isinstance(size, int) or isinstance(size, bool) or size < 1:
            raise UsageError(f"{name} is {size!r}; it must be an integer of at least 1: change {flag(name)}.")


def require_dropout(dropout: float) -> None:
    """Raise `UsageError` unless `dropout` is a probability below 1 (at 1 nothing would be left to train)."""
    if not 0.0 <= dropout < 1.0:
        raise UsageError(f"dropout is {dropout!r}; it must be at least 0 and below 1: change --dropout.")


def require_divisible(n_embd: int, n_head: int) -> None:
    """Raise `UsageError` unless the heads share the width equally."""
    if n_embd % n_head != 0:
        raise UsageError(
            f"n_embd is {n_embd} and n_head is {n_head}; n_embd must be a multiple of n_head: "
            "change --n-embd or --n-head."
        )


def require_within_block(time: int, block_size: int) -> None:
    """Raise `UsageError` for a sequence of `time` tokens that is longer than the model's positions."""
    if time > block_size:
        raise UsageError(
            f"A sequence of {time} tokens was given; this model takes at most block_size = "
            f"{block_size}: shorten it or raise --block-size."
        )


def append_recent(seen: Tensor | None, ids: Tensor, block_size: int | None) -> Tensor:
    """`seen` followed by `ids`, both `[batch, time]`; beyond `block_size` the newest three quarters of a block.

    The one rule for what a model with a bounded context looks back on. Sliding by a single token would move every
    position at every token, and so cost a pass over the whole block for each; dropping a quarter at once costs one
    pass for every `block_size / 4` tokens. None means no bound.
    """
    together = ids if seen is None else torch.cat([seen, ids], dim=1)
    if block_size is None or together.shape[1] <= block_size:
        return together
    return together[:, -(block_size - block_size // 4) :]


def with_hidden(model: nn.Module, data: Tensor, hidden: Any) -> Any:
    """`model(data, hidden)`; a model that returns a hidden state but does not take one is named."""
    try:
        return model(data, hidden)
    except TypeError as error:
        try:
            signature(model.forward).bind(data, hidden)
        except TypeError:
            raise UsageError(
                f"{type(model).__name__} returns a hidden state but its forward takes none: "
                "write forward(self, data, hidden=None), or return the output alone"
            ) from error
        raise
