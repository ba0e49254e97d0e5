"""Files: written whole or not at all, and names that can be used. Knows no format."""

import errno
import hashlib
import os
import stat
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from glob import escape
from pathlib import Path
from time import sleep
from typing import IO, Any, BinaryIO

import platformdirs

from fivestep.errors import UsageError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]


WRITE_PIECE = 1 << 20  # bytes
FILLED = ".filled"  # the ending of a folder that is being filled, beside its part
LOOK_SECONDS = 0.05  # between two looks whether a lock is free


def expanded(path: str | Path) -> Path:
    """`path` with `~` for the home folder. Raises UsageError for a name that no file can have."""
    try:
        found = Path(path).expanduser()
        str(found).encode()  # what is not UTF-8 cannot be written into TOML or JSON
        found.stat()  # a NUL in it, a name too long, or a link to itself shows here
    except (FileNotFoundError, NotADirectoryError, PermissionError):
        pass  # the caller says what it needs it for
    except (OSError, ValueError, RuntimeError, TypeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UsageError(f"{str(path)[:60]!a} is not a usable path: {reason}") from error
    return found


def cache_folder(name: str) -> Path:
    """The folder `name` in $FIVESTEP_CACHE, or in the user's cache folder. Raises UsageError for an unusable path."""
    return expanded(os.environ.get("FIVESTEP_CACHE") or platformdirs.user_cache_dir("fivestep")) / name


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


@contextmanager
def folder_written_whole(path: Path) -> Iterator[Path]:
    """A folder to fill that becomes `path` when the block ends well, and vanishes when it does not.

    As `written_whole`: filled beside, renamed at the end, and removed later where its process was killed. Its files
    are to be fsynced by who writes them. Raises OSError, also where `path` is there and no empty folder.
    """
    make_folder(path.parent)
    remove_leftovers(path)
    part, file = _part(path)  # its lock says that the folder beside it is being filled
    folder = part.with_suffix(FILLED)
    try:
        with file:
            folder.mkdir()
            yield folder
            sync_folder(folder)
            if path.is_dir():
                path.rmdir()  # refuses one that is not empty
            folder.rename(path)
    finally:
        remove_folder(folder, careful=False)
        with suppress(OSError):
            part.unlink()
    sync_folder(path.parent)


@contextmanager
def one_at_a_time(path: Path) -> Iterator[None]:
    """Waits while another process or thread is in such a block for `path`; does not where there are no locks."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.with_name(f".{path.name}.lock").open("ab") as file:
        while True:
            try:
                locked(file)
                break
            except BlockingIOError:
                sleep(LOOK_SECONDS)
        yield


def remove_leftovers(path: Path) -> None:
    """Remove the parts of `path` that no living process writes: the lock on a part ends with its process.

    Where the file system has no locks nothing is removed, for nobody can tell.
    """
    for part in path.parent.glob(f".{escape(path.name)}.*.part"):
        with suppress(OSError), part.open("r+b") as file:  # NFS gives this lock only to who may write
            if locked(file) or fcntl is None:  # raises where its writer lives; on Windows the removal does
                part.unlink()
                remove_folder(part.with_suffix(FILLED), careful=False)


def _part(path: Path) -> tuple[Path, BinaryIO]:
    """A new part of `path`, open and locked. Until it is locked another process may take it for a leftover."""
    while True:
        beside = path.with_name(f".{path.name}.{uuid.uuid4().hex}.part")
        file = beside.open("x+b")
        try:
            locked(file)
            if os.path.samestat(os.fstat(file.fileno()), beside.stat()):
                return beside, file
        except (BlockingIOError, FileNotFoundError):
            pass  # it was taken for one: again, under another name
        except BaseException:
            file.close()
            beside.unlink(missing_ok=True)
            raise
        file.close()


def locked(file: IO[Any], shared: bool = False) -> bool:
    """Lock an open file without waiting; False where the system, or the file system, has no locks.

    Raises BlockingIOError where another process holds it. The lock ends with the process. A `shared` lock needs no
    right to write, and goes together with other shared ones.
    """
    if fcntl is not None:
        try:
            fcntl.flock(file, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
            return True
        except OSError as error:
            if error.errno not in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP):
                raise
    return False


def sync_folder(folder: Path) -> None:
    """Make the names in `folder` durable, where the system has that. Raises OSError."""
    if os.name == "nt":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # a file system that knows no such thing
            raise
    finally:
        os.close(descriptor)


def make_folder(folder: Path, exist_ok: bool = True) -> None:
    """Make `folder`, durably with those above it that are new. Raises OSError."""
    new = [one for one in (folder, *folder.parents) if not one.exists()]
    folder.mkdir(parents=True, exist_ok=exist_ok)
    try:
        for one in new:
            sync_folder(one.parent)
    except OSError:
        for one in new:
            with suppress(OSError):
                one.rmdir()
        raise


@contextmanager
def opened(path: Path, reading: bool = False, follow: bool = False) -> Iterator[int]:
    """The descriptor of a regular file: to read, or a new one to write. Raises OSError.

    A pipe would wait, a device never end; a link leads elsewhere, and is followed only where that is allowed.
    """
    how = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) if reading else os.O_WRONLY | os.O_CREAT | os.O_EXCL
    flags = how | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_BINARY", 0)
    try:
        descriptor = os.open(path, flags | (0 if follow else getattr(os, "O_NOFOLLOW", 0)), 0o666)
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise OSError(errno.ELOOP, "it is a link; a run's files are its own") from error
        raise
    try:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise OSError(errno.EINVAL, "it is no regular file")
        yield descriptor
    finally:
        os.close(descriptor)


def read_bounded(path: Path, most: int) -> bytes:
    """The content of a regular file of at most `most` bytes, or of a link to one. Raises OSError."""
    with opened(path, reading=True, follow=True) as file:
        size = os.fstat(file).st_size
        if size > most:
            raise OSError(errno.EFBIG, f"it has {size:,} bytes, more than the {most:,} of any of its kind")
        with os.fdopen(os.dup(file), "rb") as stream:
            return stream.read(most)


class Digested:
    """Writes to a descriptor, all of it, and takes the SHA-256 of what it writes."""

    def __init__(self, descriptor: int):
        self.descriptor, self.size, self.sha256 = descriptor, 0, hashlib.sha256()

    def write(self, content: bytes | memoryview) -> None:
        """Write `content` in pieces: each is hashed while it is in the cache."""
        left = memoryview(content)
        while left:
            piece = left[:WRITE_PIECE]
            self.sha256.update(piece)
            self.size += len(piece)
            left = left[len(piece) :]
            while piece:
                piece = piece[os.write(self.descriptor, piece) :]

    def hexdigest(self) -> str:
        """Of all that was written."""
        return self.sha256.hexdigest()


def write_durably(path: Path, content: bytes) -> None:
    """Write a file whole or not at all, through to the disk: beside, fsynced, renamed, the folder fsynced."""
    beside = path.with_name(f".{path.name}.part")
    with suppress(FileNotFoundError):
        beside.unlink()
    try:
        with opened(beside) as file:
            Digested(file).write(content)
            os.fsync(file)
        beside.replace(path)
    except BaseException:
        with suppress(OSError):
            beside.unlink()
        raise
    sync_folder(path.parent)


def put_away(folder: Path) -> None:
    """Remove a folder: it has lost its name before the first of its files is gone."""
    hidden = folder.with_name(f".{folder.name}.part")
    with suppress(OSError):
        folder.rename(hidden)
        remove_folder(hidden, careful=False)


def remove_folder(folder: Path, careful: bool = True) -> None:
    """Remove a folder of files, if it is there. Raises OSError unless not `careful`. Follows no link."""
    try:
        if folder.is_symlink():
            folder.unlink()
            return
        with os.scandir(folder) as entries:
            names = [(entry.path, entry.is_dir(follow_symlinks=False)) for entry in entries]
        for path, is_folder in names:
            if is_folder:
                remove_folder(Path(path), careful)
            else:
                Path(path).unlink()
        folder.rmdir()
    except FileNotFoundError:
        pass
    except NotADirectoryError:
        folder.unlink()
    except (OSError, RecursionError) as error:
        if careful:
            raise OSError(f"cannot remove {folder}: {error}") from error
