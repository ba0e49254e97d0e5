"""Averaged weights: an exponential moving average beside the model, updated after each step.

    average = decay * average + (1 - decay) * weight            (Polyak & Juditsky 1992; Tarvainen & Valpola 2017)

The first update takes the weights as they are, as torch's AveragedModel does, bit for bit. Owns the average and the
swap; what is evaluated or saved while it is in place is the caller's. Buffers are the model's own.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from fivestep.errors import UsageError


class Average:
    """The averaged parameters of `model`; `decay` per update, of [0, 1)."""

    def __init__(self, model: nn.Module, decay: float):
        if isinstance(decay, bool) or not isinstance(decay, int | float) or not 0 <= decay < 1:
            raise UsageError(f"ema = {decay!r} must be a decay of at least 0 and below 1, such as 0.999 (--ema)")
        self.live: list[Tensor] = list(model.parameters())
        self.decay, self.updates = decay, 0
        self.weights = [parameter.detach().clone() for parameter in self.live]

    @torch.no_grad()
    def update(self) -> None:
        """Take in the weights of one more step."""
        if self.updates == 0:
            torch._foreach_copy_(self.weights, self.live)
        else:
            torch._foreach_lerp_(self.weights, self.live, 1 - self.decay)
        self.updates += 1

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Inside, the model holds the averaged weights; afterwards its own, bit for bit, in the same storage."""
        if self.updates == 0:
            yield
            return
        with torch.no_grad():
            own = [parameter.detach().clone() for parameter in self.live]
            torch._foreach_copy_(self.live, self.weights)
        try:
            yield
        finally:
            with torch.no_grad():
                torch._foreach_copy_(self.live, own)

    def state_dict(self) -> dict[str, Any]:
        """A snapshot, copied."""
        return {"updates": self.updates, "weights": [weight.clone() for weight in self.weights]}

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        """Put a snapshot back."""
        self.updates = saved["updates"]
        weights: list[Tensor] = saved["weights"]
        for own, weight in zip(self.weights, weights, strict=True):
            own.copy_(weight)
