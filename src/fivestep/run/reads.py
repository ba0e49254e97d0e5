"""What a training reads from the device, by line of code: the development switch `--sync-budget`.

The budget is one marked read in an eager step, and none in a step by program. Owns the counting and the words; a read
on the way to the screen, into a file or in a validation is none of a step's.
"""

import linecache
import sys
from collections import Counter
from collections.abc import Callable
from types import FrameType
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from fivestep.loop import lean
from fivestep.loop.step import TrainStep
from fivestep.loop.watched import Watch

MARK = "# HOST READ"  # on the lines that may
COUNTS = (torch.optim.__path__[0], lean.__file__)  # optimizers keep counts of steps on the host, and read them there
STEP = TrainStep.__call__.__code__


class HostReads(Watch):
    """Inside, every value that a step reads on the host is counted, by the line that asked for it."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: Counter[tuple[str, int]] = Counter()
        self.whole = WholeReads(self.count)

    def __enter__(self) -> "HostReads":
        self.whole.__enter__()  # type: ignore[no-untyped-call]
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)  # type: ignore[no-untyped-call]
        self.whole.__exit__(*error)  # type: ignore[no-untyped-call]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default or torch.Tag.dynamic_output_shape in func.tags:
            self.count(sys._getframe(1))
        return func(*args, **(kwargs or {}))

    def count(self, frame: FrameType) -> None:
        """Note the line that reads, if it belongs to a step."""
        place = asking(frame) if inside_step(frame) else None
        if place is not None:
            self.lines[place] += 1

    def sentences(self, steps: int) -> list[str]:
        """One for each line that read, the marked ones first."""
        known = [(marked(place), place, count) for place, count in self.lines.most_common()]
        return [
            f"{'within' if mark else 'BEYOND'} the budget: {count / max(steps, 1):.2f} host reads a step at "
            f"{file}:{line}: {linecache.getline(file, line).strip()}"
            for mark, (file, line), count in sorted(known, key=lambda one: not one[0])
        ]

    def beyond(self) -> bool:
        """Whether a line that is not marked has read."""
        return any(not marked(place) for place in self.lines)


class WholeReads(TorchFunctionMode):
    """Inside, `seen` is called with the frame that reads a whole tensor: no operation tells of that."""

    def __init__(self, seen: Callable[[FrameType], None]):
        super().__init__()
        self.seen = seen

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (Tensor.tolist, Tensor.numpy, Tensor.__array__, Tensor.cpu):
            self.seen(sys._getframe(1))
        return func(*args, **(kwargs or {}))


def inside_step(frame: FrameType | None) -> bool:
    """Whether a step is being made."""
    while frame is not None and frame.f_code is not STEP:
        frame = frame.f_back
    return frame is not None


def asking(frame: FrameType | None) -> tuple[str, int] | None:
    """The innermost line that is none of torch's; None where an optimizer's own count is read."""
    torchs = torch.__path__[0]
    while frame is not None and frame.f_code.co_filename.startswith((torchs, __file__, *COUNTS)):
        if frame.f_code.co_filename.startswith(COUNTS):
            return None
        frame = frame.f_back
    return (frame.f_code.co_filename, frame.f_lineno) if frame is not None else None


def marked(place: tuple[str, int]) -> bool:
    """Whether the line says that it reads."""
    return MARK in linecache.getline(*place)
