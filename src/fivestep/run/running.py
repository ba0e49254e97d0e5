"""Whether a run is being trained: a locked file, which the system unlocks when its process ends, however it ends.

    runs/NAME/.running   there and locked: running; there and not locked: killed; not there: ended in good order

Owns that file. Its content tells people who holds it; only the lock decides. Imports no torch.
"""

import os
import socket
from contextlib import suppress
from pathlib import Path
from time import monotonic, sleep
from typing import IO

from fivestep.data.files import locked, opened

RUNNING = ".running"
_held: dict[IO[str], str] = {}  # what this process has locked, and what a killed process had written there
READERS_SECONDS = 0.2  # a reader that asks `running` holds the lock for less


class TakenError(Exception):
    """Another process trains the run; the message is what it wrote of itself."""


def hold(run: Path) -> IO[str] | None:
    """Say that this process trains the run, until `release`; None where the file system has no locks.

    Raises TakenError, and OSError where the file cannot be made.
    """
    while True:
        file = (run / RUNNING).open("a+", encoding="utf-8", errors="backslashreplace")
        try:
            if not _locked_soon(file):
                file.close()
                return None
            if not os.path.samestat(os.fstat(file.fileno()), (run / RUNNING).stat()):
                raise FileNotFoundError  # whoever held it has just removed it: once more
        except BlockingIOError:
            file.seek(0)
            holder = file.read(200).strip()
            file.close()
            raise TakenError(holder or "another process") from None
        except FileNotFoundError:
            file.close()
            continue
        file.seek(0)
        earlier = file.read(200)
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        file.flush()
        _held[file] = earlier
        return file


def _locked_soon(file: IO[str]) -> bool:
    """Lock `file`; try again for a moment, because a reader may hold it. Raises BlockingIOError."""
    end = monotonic() + READERS_SECONDS
    while True:
        try:
            return locked(file)
        except BlockingIOError:
            if monotonic() > end:
                raise
            sleep(READERS_SECONDS / 10)


def release(run: Path, file: IO[str] | None, untouched: bool = False) -> None:
    """Take that back; nothing in a forked child, which never had it. untouched: who was killed before still is."""
    if file is not None and file not in _held:
        return
    with suppress(OSError):
        if untouched and file is not None and _held[file]:
            file.truncate(0)
            file.write(_held[file])
            file.flush()
        else:
            (run / RUNNING).unlink(missing_ok=True)
    if file is not None:
        del _held[file]
        file.close()


def running(run: Path) -> str | None:
    """Return "running", "killed", or "unknown" where the lock cannot be asked; None where training ended in order.

    Only reads: it needs no right to write, and changes nothing.
    """
    try:
        with opened(run / RUNNING, reading=True) as descriptor, os.fdopen(os.dup(descriptor), "rb") as file:
            try:
                return "killed" if locked(file, shared=True) else "unknown"
            except BlockingIOError:
                return "running"
    except FileNotFoundError:
        return None
    except OSError:
        return "unknown"


def _forget() -> None:
    """In a forked child (a loader's worker): it must not keep the lock when its parent is killed."""
    for file in _held:
        with suppress(OSError):
            os.close(file.fileno())
    _held.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget)
