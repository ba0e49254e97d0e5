"""The arithmetic of forward and loss: float32, or half precision where torch's autocast thinks it safe.

bf16 needs no more than autocast. fp16 has too small a range for gradients, so the loss is scaled up before backward
and the gradients down before the norm. Owns the choice and the scale; the step applies both.
"""

import math
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from fivestep.errors import UsageError, named, suggestion

PRECISIONS = ("fp32", "bf16", "fp16")
GROW_AFTER = 2000  # steps without overflow until a larger scale is tried, as torch's GradScaler has it
SMALLEST = 2.0**-14  # of a scale: what overflows even then is not the scale's doing


def autocast(precision: str, device: torch.device) -> AbstractContextManager[Any]:
    """The context of forward and loss: none for fp32, torch's autocast for bf16 and fp16 (a GPU's only)."""
    if precision not in PRECISIONS:
        hint = suggestion(str(precision), PRECISIONS)
        raise UsageError(f"precision = {named(precision)} is not one of {', '.join(PRECISIONS)} (--precision){hint}")
    if precision == "fp16" and device.type == "cpu":
        raise UsageError(
            "precision = 'fp16' needs a GPU: on the CPU it is slower than fp32, and torch has no fp16 LSTM there; "
            "use --precision bf16 or fp32, or another --device"
        )
    kinds = {"bf16": torch.bfloat16, "fp16": torch.float16}
    return nullcontext() if precision == "fp32" else torch.autocast(device.type, dtype=kinds[precision])


@dataclass(slots=True)
class LossScale:
    """What an fp16 loss is multiplied by before backward: a power of two, so that undoing it is exact.

    Halved where gradients overflow, and then the same batch is done again, so that no data is skipped and neither
    schedule nor clock knows (dropout draws again, and batch-norm takes the batch into its statistics again). Doubled
    after GROW_AFTER steps without an overflow (Micikevicius et al. 2018).
    """

    scale: float = 2.0**16
    good_steps: int = 0

    def state_dict(self) -> dict[str, Any]:
        """Return a snapshot."""
        return asdict(self)

    def scaled(self, share: Tensor | None, mean: Tensor) -> Tensor | None:
        """Return `share * scale`, in float32 where the loss is in half precision's range: 65536 is no float16."""
        return mean.new_full((), self.scale) if share is None else share * self.scale

    def unscaled(self, grads: list[Tensor]) -> list[Tensor]:
        """Divide gradients by the scale, in place, and return them."""
        torch._foreach_mul_(grads, 1 / self.scale)
        return grads

    def overflowed(self, loss: Tensor) -> bool:
        """After a norm that is not finite: whether a lower scale may help; it is then set. Reads the loss."""
        if self.scale <= SMALLEST or not math.isfinite(loss):
            return False
        self.scale, self.good_steps = self.scale / 2, 0
        return True

    def passed(self) -> None:
        """After an update."""
        self.good_steps += 1
        if self.good_steps >= GROW_AFTER:
            self.scale, self.good_steps = self.scale * 2, 0


class Unscaled:
    """The loss scale of float32 and bfloat16: none. It is false, where a LossScale is true."""

    scale, good_steps = 1.0, 0

    def __bool__(self) -> bool:
        return False

    def state_dict(self) -> None:
        """Return None: nothing is saved."""

    def scaled(self, share: Tensor | None, mean: Tensor) -> Tensor | None:
        """Return `share`."""
        return share

    def unscaled(self, grads: list[Tensor]) -> list[Tensor]:
        """Return the gradients as they are."""
        return grads

    def overflowed(self, loss: Tensor) -> bool:
        """Return False: no other scale would help."""
        return False

    def passed(self) -> None:
        """Count nothing."""


UNSCALED = Unscaled()
