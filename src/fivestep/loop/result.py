"""What a step gives."""

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from fivestep.loop.state import State


@dataclass(slots=True)
class StepResult:
    """One completed step. `loss` and `grad_norm` are scalar tensors that stay on the device until you read them."""

    step: int  # completed updates, this one included
    epoch: int  # the epoch it belongs to, from 1
    loss: Tensor  # the mean over the whole window's `count`
    count: Any  # what the mean is over: a number or a scalar tensor
    grad_norm: Tensor  # global 2-norm, before clipping
    learning_rate: Any  # of the first parameter group: a float, or the optimizer's own tensor
    state: State = field(repr=False)


def last_result(state: State) -> StepResult | None:
    """What the last step gave, in another process perhaps; None before the first."""
    return StepResult(**state.last, state=state) if state.last else None
