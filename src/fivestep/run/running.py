"""Whether a run is being trained: a locked file, which the system unlocks when its process ends, however it ends.

    runs/NAME/.running   there and locked: running; there and not locked: killed; not there: ended in good order

Owns that file. Imports no torch.
"""

import os
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

RUNNING = ".running"


def hold(run: Path) -> IO[str] | None:
    """Say that this process trains the run, until `release`; None where the file system does not allow it."""
    with suppress(OSError):
        file = (run / RUNNING).open("w", encoding="utf-8")
        file.write(f"{os.getpid()}\n")
        file.flush()
        _lock(file)
        return file
    return None


def release(run: Path, file: IO[str] | None) -> None:
    """Take that back."""
    with suppress(OSError):
        (run / RUNNING).unlink(missing_ok=True)
    if file is not None:
        file.close()


def running(run: Path) -> bool | None:
    """True: a process trains it now. False: one did, and was killed. None: neither."""
    try:
        with (run / RUNNING).open("r+", encoding="utf-8") as file:
            try:
                _lock(file)
            except OSError:
                return True
            return False
    except OSError:
        return None


def _lock(file: IO[Any]) -> None:
    """Lock without waiting. Raises OSError where another process holds it; does nothing where locks are unknown."""
    try:
        import fcntl
    except ImportError:  # Windows
        return
    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
