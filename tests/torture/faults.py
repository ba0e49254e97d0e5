"""Between a training and its disk: every operation on its run's directory is numbered, and one of them goes wrong.

    count                    note each operation's name
    kill   at=n              SIGKILL just before operation n
    tear   at=n              of a write: half of it, then SIGKILL
    fail   at=n error=EIO    operation n raises; sticky: so does every later one that this error could strike
    record                   note operations with their content, for `power.py`

Patched are `os`, `io.open` and safetensors' `safe_open`, in a child only. Saves are waited for, so that operation n
is the same one in each life of a job.
"""

import base64
import builtins
import errno
import io
import json
import os
import signal
import threading
from pathlib import Path

CHANGING = {"create", "write", "fsync", "mkdir", "rmdir", "unlink", "rename", "truncate"}
READING = {"read", "list", "stat", "load"}
STRIKES = {  # which operations can end so
    "ENOSPC": {"create", "write", "fsync", "mkdir", "rename"},
    "EIO": CHANGING | READING,
    "EMFILE": {"create", "read", "list", "load"},
    "EROFS": CHANGING - {"fsync"},
    "EACCES": (CHANGING - {"fsync", "write"}) | READING,
}
REAL = {name: getattr(os, name) for name in dir(os) if callable(getattr(os, name))}
PATHS = {
    "mkdir": "mkdir", "rmdir": "rmdir", "unlink": "unlink", "remove": "unlink", "rename": "rename",
    "replace": "rename", "truncate": "truncate", "scandir": "list", "listdir": "list", "stat": "stat",
    "lstat": "stat",
}  # fmt: skip


class Layer:
    """Numbers operations, and does at number `at` what is to be done."""

    def __init__(self, run, mode, at=None, error=None, sticky=False, log=None):
        self.run, self.mode, self.at, self.error, self.sticky = os.path.abspath(run), mode, at, error, sticky
        self.log = REAL["open"](log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666) if log else None
        self.counted = CHANGING | READING if mode in ("fail", "count") else CHANGING
        self.number, self.lock, self.handles, self.opened = 0, threading.RLock(), {}, 0

    def inside(self, path):
        """The absolute path, where it is of the run; "" elsewhere. The folder around it counts: it holds its name."""
        if not isinstance(path, str | os.PathLike):
            return ""
        path = os.path.abspath(os.fspath(path))
        return path if path == self.run or path.startswith(self.run + os.sep) else ""

    def note(self, **facts):
        if self.log is not None:
            REAL["write"](self.log, json.dumps(facts).encode() + b"\n")

    def before(self, kind, path, tear=None):
        """Called just before an operation. tear: does half of it."""
        if kind not in self.counted:
            return
        with self.lock:
            number, self.number = self.number, self.number + 1
        if self.mode == "count":
            self.note(number=number, kind=kind, path=os.path.relpath(path, self.run))
        if self.mode in ("kill", "tear") and number == self.at:
            if self.mode == "tear" and tear is not None:
                tear()
            os.kill(os.getpid(), signal.SIGKILL)
        struck = number == self.at or (self.sticky and self.at is not None and number > self.at)
        if self.mode == "fail" and struck and kind in STRIKES[self.error]:
            code = getattr(errno, self.error)
            self.note(number=number, kind=kind, path=os.path.relpath(path, self.run), struck=True)
            raise OSError(code, os.strerror(code), path)

    def after(self, **facts):
        if self.mode == "record":
            self.note(**facts)


def plant(run, mode, serial=True, **options):
    """Patch this process."""
    layer = Layer(run, mode, **options)
    for name, kind in PATHS.items():
        setattr(os, name, _of_path(layer, name, kind))
    os.open, os.write, os.fsync, os.ftruncate = _open(layer), _write(layer), _fsync(layer), _ftruncate(layer)
    os.close = _close(layer)
    io.open = builtins.open = _io_open(layer)
    from fivestep.run import checkpoint, saving
    from fivestep.run import run as runs

    load = checkpoint.safe_open

    def safe_open(path, *arguments, **named):
        if layer.inside(path):
            layer.before("load", path)
        return load(path, *arguments, **named)

    checkpoint.safe_open = safe_open
    if serial:
        _serial(saving)
    if mode == "record":
        _announced(layer, saving, runs)


def _of_path(layer, name, kind):
    real = REAL[name]

    def operation(path=".", *arguments, **named):
        inside = layer.inside(path) if not named.get("dir_fd") else ""
        if not inside:
            return real(path, *arguments, **named)
        if not _refused(kind, inside):  # as it is: the system says so before anything else could go wrong
            layer.before(kind, inside)
        result = real(path, *arguments, **named)
        if kind in CHANGING:
            target = {"to": os.path.abspath(arguments[0])} if kind == "rename" else {}
            size = {"size": arguments[0]} if kind == "truncate" else {}
            layer.after(op=kind, path=inside, **target, **size)
        return result

    return operation


def _refused(kind, path):
    return os.path.lexists(path) == (kind == "mkdir") if kind in ("mkdir", "unlink", "rmdir") else False


def _open(layer):
    def opened(path, flags, *arguments, **named):
        inside = layer.inside(path)
        home = isinstance(path, str | os.PathLike) and os.path.abspath(path) == os.path.dirname(layer.run)
        if not inside and not home:
            return REAL["open"](path, flags, *arguments, **named)
        inside = inside or os.path.abspath(path)
        new = bool(flags & os.O_CREAT) and not os.path.lexists(inside)
        layer.before("create" if flags & (os.O_WRONLY | os.O_RDWR) else "read", inside)
        file = REAL["open"](path, flags, *arguments, **named)
        _opened(layer, file, inside, new)
        return file

    return opened


def _opened(layer, file, path, new):
    layer.opened += 1
    layer.handles[file] = (layer.opened, path)
    layer.after(op="open", path=path, handle=layer.opened, new=new)


def _close(layer):
    def close(file):
        layer.handles.pop(file, None)
        return REAL["close"](file)

    return close


def _write(layer):
    def write(file, content):
        if file not in layer.handles:
            return REAL["write"](file, content)
        handle, path = layer.handles[file]
        view = memoryview(content).cast("B")
        layer.before("write", path, tear=lambda: REAL["write"](file, view[: len(view) // 2]))
        size = REAL["fstat"](file).st_size  # every file here is only ever appended to
        written = REAL["write"](file, view)
        if layer.mode == "record":
            layer.after(op="write", handle=handle, at=size, data=base64.b64encode(view[:written]).decode())
        return written

    return write


def _fsync(layer):
    def fsync(file):
        if file not in layer.handles:
            return REAL["fsync"](file)
        handle, path = layer.handles[file]
        layer.before("fsync", path)
        if layer.mode != "record":  # nothing here tells whether it was done: it costs time only
            return None
        layer.after(op="fsync", handle=handle)
        return None

    return fsync


def _ftruncate(layer):
    def ftruncate(file, size):
        if file in layer.handles:
            handle, path = layer.handles[file]
            layer.before("truncate", path)
            layer.after(op="ftruncate", handle=handle, size=size)
        return REAL["ftruncate"](file, size)

    return ftruncate


class Watched:
    """A file object whose writes are operations too."""

    def __init__(self, layer, file, path):
        self._layer, self._file, self._path = layer, file, path

    def __getattr__(self, name):
        return getattr(self._file, name)

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self._file.close()

    def write(self, content):
        self._layer.before("write", self._path, tear=lambda: (self._file.write(content[:5]), self._file.flush()))
        return self._file.write(content)

    def flush(self):
        self._layer.before("write", self._path)
        return self._file.flush()

    def truncate(self, size):
        self._layer.before("truncate", self._path)
        return self._file.truncate(size)


def _io_open(layer):
    real = io.open

    def opened(path, mode="r", *arguments, **named):
        inside = layer.inside(path)
        if not inside:
            return real(path, mode, *arguments, **named)
        writing = any(letter in mode for letter in "wax+")
        new = writing and not os.path.lexists(inside)
        layer.before("create" if writing else "read", inside)
        file = real(path, mode, *arguments, **named)
        if new:
            layer.opened += 1
            layer.after(op="open", path=inside, handle=layer.opened, new=True)
        return Watched(layer, file, inside) if writing else file

    return opened


def _serial(saving):
    save = saving.Saver.save

    def saved(self, *arguments):
        save(self, *arguments)
        self.thread.join()

    saving.Saver.save = saved


def _announced(layer, saving, runs):
    """Note what is durable from here on, as the training believes."""
    save, write = saving.save_checkpoint, runs.Run.write

    def save_checkpoint(folder, weights, state, step, val_loss):
        final = save(folder, weights, state, step, val_loss)
        layer.after(op="saved", step=step)
        return final

    def written(self, name, text):
        write(self, name, text)
        layer.after(op="kept", name=name, data=base64.b64encode(text.encode()).decode())

    saving.save_checkpoint, runs.Run.write = save_checkpoint, written


def operations(log):
    """What a life noted."""
    return [json.loads(line) for line in Path(log).read_text().splitlines()]
