"""Files: written whole or not at all, and names that can be used. Knows no format."""

import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from fivestep.errors import UsageError


def expanded(path: str | Path) -> Path:
    """`path` with `~` for the home folder. Raises UsageError for a name that no file can have."""
    try:
        found = Path(path).expanduser()
        str(found).encode()  # what is not UTF-8 cannot be written into TOML or JSON
        os.lstat(found)  # a NUL in it, or a name too long, shows here
    except (FileNotFoundError, NotADirectoryError, PermissionError):
        pass  # the caller says what it needs it for
    except (OSError, ValueError, RuntimeError, TypeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UsageError(f"{str(path)[:60]!a} is not a usable path: {reason}") from error
    return found


@contextmanager
def written_whole(path: Path) -> Iterator[BinaryIO]:
    """A binary file to write that becomes `path` when the block ends well, and vanishes when it does not.

    Written beside, under a name of its own (so several processes may race), flushed, fsynced, renamed.
    Makes the folder. Raises OSError.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.{uuid.uuid4().hex}.part")
    try:
        with beside.open("xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        beside.replace(path)
    except BaseException:
        with suppress(OSError):
            beside.unlink()
        raise
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Make the rename itself durable, on systems where a folder can be opened."""
    with suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
