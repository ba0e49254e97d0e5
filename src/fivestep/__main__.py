"""`python -m fivestep` and the command `fivestep`: until the modules are there, a Ctrl-C ends the process at once."""

import os
import signal
from types import FrameType


def leave(number: int, frame: FrameType | None) -> None:
    """SIGTERM before there is anything to save."""
    os._exit(128 + number)


def go_on(number: int, frame: FrameType | None) -> None:
    """SIGUSR1 where there is nothing to save: not a reason to end, as the system would have it."""


leave.of_the_command_line = True  # type: ignore[attr-defined]


def start() -> None:
    """Load the command line and run it."""
    before = signal.getsignal(signal.SIGINT)
    if before is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    if signal.getsignal(signal.SIGTERM) is signal.SIG_DFL:
        signal.signal(signal.SIGTERM, leave)
    if hasattr(signal, "SIGUSR1") and signal.getsignal(signal.SIGUSR1) is signal.SIG_DFL:  # Windows has none
        signal.signal(signal.SIGUSR1, go_on)
    from fivestep.cli import main

    if before is signal.default_int_handler:
        signal.signal(signal.SIGINT, before)
    main()


if __name__ == "__main__":
    start()
