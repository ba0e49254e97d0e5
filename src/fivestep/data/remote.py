"""Files elsewhere, through fsspec: a small one is read, a large one is brought into the cache, once a machine.

    s3://bucket/wiki/  ──read──>  shards.json
                       ──pieces, tried again──>  checked by its digest ──>  $FIVESTEP_CACHE/remote/DIGEST.safetensors

Owns the driver, the tries and the bounded cache. What a file holds is `tokens.py`'s and `shards.py`'s. A file in the
cache goes by its digest, so that a copy elsewhere is not brought again; of several processes that need one, one
brings it and the others wait. A file that another process has mapped may be removed: its map stays.
"""

import os
import re
import warnings
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path
from time import sleep
from typing import Any, TypeVar
from urllib.parse import urlsplit
from urllib.request import url2pathname

from fivestep.data.files import cache_folder, one_at_a_time, written_whole
from fivestep.errors import UsageError, brief

TRIES, FIRST_WAIT = 4, 1.0  # seconds before the second try; twice as long before each after
PIECE = 16 << 20  # bytes asked for at a time
CACHE_GB = 100.0  # of remote files kept, unless FIVESTEP_REMOTE_GB says otherwise
DRIVERS = {
    "s3": " s3fs",
    "s3a": " s3fs",
    "gs": " gcsfs",
    "gcs": " gcsfs",
    "http": "",
    "https": "",
}  # beside the extra
FINAL = (FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError, NotImplementedError)

T = TypeVar("T")


def is_url(source: str) -> bool:
    """Whether `source` names something by a scheme: s3://bucket/wiki, memory://wiki, file:///data/wiki."""
    return re.match(r"[A-Za-z][\w+.:-]*://", source) is not None


def local_path(url: str) -> Path | None:
    """The path that a file:// URL names; None for every other."""
    parts = urlsplit(url)
    return Path(url2pathname(parts.path)) if parts.scheme in ("file", "local") else None


class Remote:
    """A folder elsewhere. Raises UsageError where it has no driver, and in every method where it cannot be read."""

    def __init__(self, url: str) -> None:
        self.name = _shown(url).rstrip("/")
        self._files, self._root = _driver(url)
        self._root = self._root.rstrip("/")

    def read(self, name: str, most: int) -> bytes:
        """The content of a file of at most `most` bytes."""
        content: bytes = self._tried(name, lambda: self._files.cat_file(self._path(name), start=0, end=most + 1))
        if len(content) > most:
            raise UsageError(f"--data {self.name}/{name} has more than {most:,} bytes, so it is no such file")
        return content

    def sizes(self) -> dict[str, int]:
        """The files there and their bytes; empty where the place cannot list them."""
        try:
            listed = self._files.ls(self._root, detail=True)
        except Exception:  # many a web server: then what is missing shows when it is needed
            return {}
        return {
            str(one["name"]).rpartition("/")[2]: int(one["size"]) for one in listed if one.get("size") is not None
        }

    def size(self, name: str) -> int:
        """The bytes of a file."""
        return int(self._tried(name, lambda: self._files.info(self._path(name)))["size"] or 0)

    def piece(self, name: str, start: int, stop: int) -> bytes:
        """Bytes [start, stop) of a file, all of them."""

        def read() -> bytes:
            found: bytes = self._files.cat_file(self._path(name), start=start, end=stop)
            if len(found) != stop - start:
                raise OSError(f"it gave {len(found):,} bytes where {stop - start:,} were asked for")
            return found

        return self._tried(name, read)

    def fetch(self, name: str, size: int, digest: str, check: Callable[[Path], str]) -> Path:
        """A file's copy in the cache, brought there where it is not. check: reads a copy whole, gives its digest."""
        folder = cache_folder("remote")
        path = folder / f"{digest}{Path(name).suffix}"
        if _present(path, size):
            return path
        try:
            with one_at_a_time(path):
                if _present(path, size):
                    return path
                make_room(folder, size)
                with written_whole(path) as file:
                    for start in range(0, size, PIECE):
                        file.write(self.piece(name, start, min(start + PIECE, size)))
                    file.flush()
                    self._check(name, Path(file.name), digest, check)
        except OSError as error:
            raise UsageError(
                f"the cache for remote files {folder} cannot be written ({error.strerror or error}); "
                "set FIVESTEP_CACHE to a folder that you can write to"
            ) from error
        return path

    def _check(self, name: str, copy: Path, digest: str, check: Callable[[Path], str]) -> None:
        try:
            found = check(copy)
        except UsageError as error:
            reason = str(error).replace(str(copy), "the copy")
            raise UsageError(f"--data {self.name}/{name} did not arrive whole: {reason}") from error
        if found != digest:
            raise UsageError(f"--data {self.name}/{name} is not the file that it should be: its digest is another")

    def _path(self, name: str) -> str:
        return f"{self._root}/{name}" if self._root else name

    def _tried(self, name: str, read: Callable[[], T]) -> T:
        wait = FIRST_WAIT
        for number in range(1, TRIES + 1):
            try:
                return read()
            except FINAL as error:
                reason = "it is not there" if isinstance(error, FileNotFoundError) else brief(error)
                raise UsageError(f"--data {self.name}/{name} cannot be read ({reason})") from error
            except Exception as error:  # each driver has exceptions of its own for a network that fails
                reason = f"{type(error).__name__}: {brief(error)}"
                if number == TRIES:
                    raise UsageError(
                        f"--data {self.name}/{name} cannot be read after {TRIES} tries ({reason}): see to the "
                        "connection, then go on with `fivestep resume`"
                    ) from error
                warnings.warn(
                    f"{self.name}/{name}: try {number} of {TRIES} failed ({reason}); again in {wait:g} s",
                    stacklevel=2,
                )
                sleep(wait)
                wait *= 2
        raise AssertionError("unreachable")


def check_room(name: str, sizes: Iterable[int]) -> None:
    """Raises UsageError where files of so many bytes are more than the cache may hold."""
    needed, room = sum(sizes), cache_bytes()
    if needed > room:
        raise UsageError(
            f"--data {name} has {needed / 1e9:,.1f} GB, but the cache for remote files holds {room / 1e9:,.1f} GB: "
            "set FIVESTEP_REMOTE_GB to more, or copy the files to a disk"
        )


def cache_bytes() -> int:
    """How much the cache for remote files may hold: FIVESTEP_REMOTE_GB, 100 if not set. Raises UsageError."""
    given = os.environ.get("FIVESTEP_REMOTE_GB")
    try:
        gigabytes = CACHE_GB if given is None else float(given)
        if not 0 < gigabytes < 1e9:
            raise ValueError
    except ValueError:
        raise UsageError(f"FIVESTEP_REMOTE_GB = {given!r} must be a number of GB above 0") from None
    return int(gigabytes * 1e9)


def make_room(folder: Path, size: int) -> None:
    """Remove the files of the cache that were used longest ago, until `size` more bytes fit."""
    found = []
    for path in folder.glob("*.safetensors"):
        with suppress(OSError):  # another process removed it
            status = path.stat()
            found.append((status.st_mtime_ns, status.st_size, path))
    left = sum(one for _, one, _ in found) + size - cache_bytes()
    for _, one, path in sorted(found):
        if left <= 0:
            return
        with suppress(OSError):
            path.unlink()
            left -= one


def _present(path: Path, size: int) -> bool:
    """Whether the cache holds the file; then it counts as used now."""
    try:
        if path.stat().st_size != size:
            return False
        os.utime(path)
    except OSError:
        return False
    return True


def _driver(url: str) -> tuple[Any, str]:
    """fsspec's file system for a URL, and the path in it."""
    shown, scheme = _shown(url), url.partition("://")[0]
    try:
        from fsspec.core import url_to_fs
    except ImportError:
        raise UsageError(f"--data {shown} needs fsspec: pip install 'fivestep[remote]'") from None
    try:
        found, path = url_to_fs(url)
    except ImportError as error:
        install = f"pip install 'fivestep[remote]'{DRIVERS[scheme]}" if scheme in DRIVERS else brief(error)
        raise UsageError(f"--data {shown} needs a driver for {scheme}:// that is not installed: {install}") from error
    except Exception as error:  # an unknown scheme, or a driver's own refusal
        raise UsageError(f"--data {shown} cannot be opened ({brief(error)})") from error
    return found, str(path)


def _shown(url: str) -> str:
    """A URL without what may be secret: a name and password, a signature."""
    return re.sub(r"//[^/@]*@", "//", url).partition("?")[0]
