"""Files: written whole or not at all, and names that can be used. Knows no format."""

import errno
import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from glob import escape
from pathlib import Path
from typing import BinaryIO

from fivestep.errors import UsageError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]


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

    Written beside, under a name of its own (so several processes may race), flushed, fsynced, renamed. What a
    process left there that was killed while it wrote is removed first. Makes the folder. Raises OSError.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    remove_leftovers(path)
    beside, file = _part(path)
    try:
        with file:
            yield file
            file.flush()
            os.fsync(file.fileno())
            beside.replace(path)  # still open: until it has its name, it is locked
    except BaseException:
        with suppress(OSError):
            beside.unlink()
        raise
    sync_folder(path.parent)


def remove_leftovers(path: Path) -> None:
    """Remove the parts of `path` that no living process writes: the lock on a part ends with its process.

    Where the file system has no locks nothing is removed, for nobody can tell.
    """
    for part in path.parent.glob(f".{escape(path.name)}.*.part"):
        with suppress(OSError), part.open("r+b") as file:  # NFS gives this lock only to who may write
            if _locked(file):  # raises where its writer lives
                part.unlink()


def _part(path: Path) -> tuple[Path, BinaryIO]:
    """A new part of `path`, open and locked. Until it is locked another process may take it for a leftover."""
    while True:
        beside = path.with_name(f".{path.name}.{uuid.uuid4().hex}.part")
        file = beside.open("x+b")
        try:
            _locked(file)
            if os.path.samestat(os.fstat(file.fileno()), beside.stat()):
                return beside, file
        except (BlockingIOError, FileNotFoundError):
            pass  # it was taken for one: again, under another name
        except BaseException:
            file.close()
            beside.unlink(missing_ok=True)
            raise
        file.close()


def _locked(file: BinaryIO) -> bool:
    """Lock an open file; False where the system or the file system has no locks. Raises where another holds it."""
    if fcntl is not None:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP):
                raise
            return False
    return True  # without fcntl, on Windows, a file that is open cannot be removed anyway


def sync_folder(folder: Path) -> None:
    """Make the rename itself durable, on systems where a folder can be opened."""
    with suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
