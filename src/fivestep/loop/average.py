"""Averaged weights: an exponential moving average beside the model, updated after each step.

    average = decay * average + (1 - decay) * weight            (Polyak & Juditsky 1992; Tarvainen & Valpola 2017)

The first update takes the weights as they are, as torch's AveragedModel does, bit for bit. Owns the average and the
swap; what is evaluated or saved while it is in place is the caller's. Buffers are the model's own.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedParameter

from fivestep.errors import UsageError
from fivestep.loop.batch import in_shards


class Average:
    """The average of `parameters`; `decay` per update, of [0, 1).

    Kept in float32 at least: in bfloat16 the small steps of an average round to nothing. What does not train
    (`requires_grad` False) has no average, and is itself.
    """

    def __init__(self, parameters: Iterable[Tensor], decay: float):
        self.decay = checked_decay(decay)
        self.updates = 0
        self.live = list(parameters)
        self.owners: list[nn.Module] = []
        if any(isinstance(parameter, UninitializedParameter) for parameter in self.live):
            raise UsageError("ema needs weights that are there; call the lazy model once before (--ema)")
        self.weights = [parameter.detach().to(wide(parameter.dtype), copy=True) for parameter in self.live]

    def follow(self) -> None:
        """Take up the parameters that the owners have now; the average of a new one begins at its value."""
        live: list[Tensor] = list(dict.fromkeys(p for owner in self.owners for p in owner.parameters()))
        if not live or [id(p) for p in live] == [id(p) for p in self.live]:
            return
        kept = {id(p): weight for p, weight in zip(self.live, self.weights, strict=True)}
        new = Average((p for p in live if id(p) not in kept), self.decay)
        kept |= {id(p): weight for p, weight in zip(new.live, new.weights, strict=True)}
        self.live, self.weights = live, [kept[id(p)] for p in live]

    def pairs(self) -> tuple[list[Tensor], list[Tensor]]:
        """The averages and the parameters, of those that train."""
        trained = [(kept, live) for kept, live in zip(self.weights, self.live, strict=True) if live.requires_grad]
        with torch.no_grad():
            return [own_part(kept) for kept, _ in trained], [own_part(live) for _, live in trained]

    @torch.no_grad()
    def update(self) -> None:
        """Take in the weights of one more step."""
        kept, live = self.pairs()
        if self.updates == 0:
            torch._foreach_copy_(kept, live)
        else:
            torch._foreach_lerp_(kept, [p.to(wide(p.dtype)) for p in live], 1 - self.decay)
        self.updates += 1

    @contextmanager
    def in_place(self, changed: Callable[[], None] = lambda: None) -> Iterator[None]:
        """Inside, the model holds the averaged weights; afterwards its own, bit for bit, in the same storage.

        `changed` is called after both changes.
        """
        if self.updates == 0:
            yield
            return
        kept, live = self.pairs()
        with torch.no_grad():
            own = [parameter.detach().clone() for parameter in live]
        try:
            with torch.no_grad():
                torch._foreach_copy_(live, kept)
            changed()
            yield
        finally:
            with torch.no_grad():
                torch._foreach_copy_(live, own)
            changed()

    def state_dict(self) -> dict[str, Any]:
        """A snapshot, copied."""
        return {"updates": self.updates, "weights": [weight.clone() for weight in self.weights]}

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        """Put a snapshot back."""
        self.updates = saved["updates"]
        weights: list[Tensor] = saved["weights"]
        for own, weight in zip(self.weights, weights, strict=True):
            own.copy_(weight)


class NoAverage:
    """The averaged weights of a training that keeps none. It is false, where an Average is true."""

    decay: ClassVar[float | None] = None
    weights: ClassVar[list[Tensor]] = []

    def __bool__(self) -> bool:
        return False

    def update(self) -> None:
        """Take in nothing."""

    def in_place(self, changed: Callable[[], None] = lambda: None) -> AbstractContextManager[None]:
        """Return a context in which the model holds its own weights."""
        return nullcontext()

    def state_dict(self) -> None:
        """Return None: nothing is saved."""

    def load_state_dict(self, saved: None) -> None:
        """Take nothing."""


NO_AVERAGE = NoAverage()


def own_part(tensor: Any) -> Tensor:
    """What of a tensor in shards lies in this process, in its own storage; any other tensor itself."""
    part: Tensor = tensor.to_local() if in_shards(tensor) else tensor
    return part


def average_of(given: Average | NoAverage, owners: Iterable[Any], decay: float) -> Average:
    """A new average over the parameters of those `owners` that are modules, or the one `given`, with this `decay`."""
    modules = [owner for owner in owners if isinstance(owner, nn.Module)]
    average = (
        given
        if isinstance(given, Average)
        else Average(dict.fromkeys(p for module in modules for p in module.parameters()), decay)
    )
    average.decay, average.owners = checked_decay(decay), modules
    average.follow()
    return average


def checked_decay(decay: float) -> float:
    """`decay` itself. Raises UsageError unless it is of [0, 1)."""
    if isinstance(decay, bool) or not isinstance(decay, int | float) or not 0 <= decay < 1:
        raise UsageError(f"ema = {decay!r} must be a decay of at least 0 and below 1, such as 0.999 (--ema)")
    return decay


def wide(dtype: torch.dtype) -> torch.dtype:
    """float32 for what is narrower, else the same."""
    return torch.promote_types(dtype, torch.float32) if dtype.is_floating_point else dtype
