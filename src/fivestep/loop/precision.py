"""The arithmetic of forward and loss: float32, or bfloat16 where torch's autocast thinks it safe."""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

from fivestep.errors import UsageError, named, suggestion

PRECISIONS = ("fp32", "bf16")


def autocast(precision: str, device: torch.device) -> AbstractContextManager[Any]:
    """The context of forward and loss: none for fp32, torch's autocast for bf16."""
    if precision not in PRECISIONS:
        hint = suggestion(str(precision), PRECISIONS)
        raise UsageError(f"precision = {named(precision)} is not one of {', '.join(PRECISIONS)} (--precision){hint}")
    return nullcontext() if precision == "fp32" else torch.autocast(device.type, dtype=torch.bfloat16)
