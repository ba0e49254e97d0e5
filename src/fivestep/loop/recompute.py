"""Activation checkpointing: less is kept for the backward pass, and computed again there.

    each block of a list of blocks keeps its input alone; in the backward pass torch computes it once more, from the
    same random state, so that losses and gradients are the same, bit for bit (Chen et al. 2016)

Owns where it applies, and takes itself out of the model after each step. The computing again is torch's.
"""

from typing import Any

from torch import nn
from torch.utils.checkpoint import checkpoint

from fivestep.errors import UsageError, named
from fivestep.loop.parallel import shard_units


class Recomputed:
    """Inside, the blocks of `model` compute their activations twice. Raises UsageError for a model without blocks."""

    def __init__(self, model: nn.Module):
        units = shard_units(model)
        inner = {id(module) for unit in units for module in unit.modules() if module is not unit}
        self.blocks = [unit for unit in units if id(unit) not in inner]  # a block inside a block would be thrice
        if not self.blocks:
            raise UsageError(
                f"activation_checkpointing is for models that are lists of blocks, and {named(model)} has no "
                "nn.ModuleList of them (--activation-checkpointing false)"
            )
        self.before: list[Any] = []

    def __enter__(self) -> None:
        """In the block's own dictionary, where `forward` is looked up first: no name and no class changes."""
        self.before = [block.__dict__.get("forward") for block in self.blocks]
        for block in self.blocks:
            block.__dict__["forward"] = Twice(block.forward)

    def __exit__(self, *error: object) -> None:
        for block, before in zip(self.blocks, self.before, strict=True):
            if before is None:
                del block.__dict__["forward"]
            else:
                block.__dict__["forward"] = before


class Twice:
    """A function whose inside is not kept for the backward pass."""

    def __init__(self, forward: Any):
        self.forward = forward

    def __call__(self, *inputs: Any, **named_inputs: Any) -> Any:
        """What it gives."""
        return checkpoint(self.forward, *inputs, use_reentrant=False, **named_inputs)
