"""Runs that somebody prepared: digests and seals are right, the content is not. And what watches over them."""

import gc
import hashlib
import json
import os
import pickle
import shutil
import stat
import sys
import time
from contextlib import contextmanager
from pathlib import Path

from fivestep.run.checkpoint import sealed
from fivestep.run.memory import forget_peak, held, peak_held

WEIGHTS, TENSORS, TREE, MANIFEST = "model.safetensors", "state.safetensors", "state.json", "manifest.json"
MOST_SECONDS, MOST_BYTES = 1.0, 600 << 20
USUAL = 0.02  # seconds of a loop of a million turns, on the core that the second is promised for
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
NEVER = (
    *("subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "os.fork", "pickle.find_class", "ctypes.dlopen"),
    *("socket.connect", "socket.bind", "socket.send", "code.__new__", "webbrowser.open", "urllib.Request"),
)
CHANGING = ("os.remove", "os.rename", "os.rmdir", "os.mkdir", "os.truncate", "os.link", "os.symlink", "os.chmod",
            "os.chown", "os.utime", "os.setxattr")  # fmt: skip


class Watch:
    """An audit hook: what runs code, or changes something outside of `allowed`, is noted."""

    def __init__(self):
        self.allowed, self.seen = None, []
        self.known = {name.split(".")[0] for name in sys.modules} | set(sys.stdlib_module_names)
        sys.addaudithook(self.hook)

    def hook(self, event, args):
        if self.allowed is None:
            return
        if event.startswith(NEVER):
            if not (event == "subprocess.Popen" and args[0] == "git"):  # of environment.json, as every run asks
                self.seen.append((event, str(args)[:200]))
        elif event == "import":
            if args[0].split(".")[0] not in self.known:
                self.seen.append((event, args[0]))
        elif event in ("exec", "compile"):
            name = getattr(args[0], "co_filename", None) if event == "exec" else args[1]
            if not str(name).startswith((sys.prefix, sys.base_prefix, "<frozen", str(Path("src").absolute()))):
                self.seen.append((event, str(name)))
        elif event == "open" and isinstance(args[2], int) and args[2] & WRITING and not isinstance(args[0], int):
            self.changed(event, args[0])
        elif event in CHANGING:
            for path in args[: 2 if event in ("os.rename", "os.link") else 1]:
                if isinstance(path, str | bytes | os.PathLike):
                    self.changed(event, path)

    def changed(self, event, path):
        whole = str(Path(os.fsdecode(path)).absolute())
        if not whole.startswith((*self.allowed, os.devnull)):
            self.seen.append((event, whole))

    @contextmanager
    def over(self, *allowed):
        self.seen, self.allowed = [], tuple(map(str, allowed))
        try:
            yield self.seen
        finally:
            self.allowed = None


_watch: list[Watch] = []


def watch():
    """The one of this process: a hook stays for good."""
    if not _watch:
        _watch.append(Watch())
    return _watch[0]


def slowness():
    """How many times longer than USUAL a plain loop takes just now, on this core; at least 1."""
    begun = time.process_time()
    for _ in range(1_000_000):
        pass
    return max(1.0, (time.process_time() - begun) / USUAL)


@contextmanager
def left_alone():
    """Inside, what other tests have left is not looked through by the collector of garbage."""
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


@contextmanager
def bounded():
    """Inside, less than a second of this process's time, more on a slow core, and 600 MB more than before."""
    most = MOST_SECONDS * slowness()
    tells = forget_peak(_cpu())
    before, begun = held(_cpu()), time.process_time()
    yield
    taken = time.process_time() - begun
    assert taken < most, f"it took {taken:.2f} s"
    if tells and before is not None:
        assert peak_held(_cpu()) - before < MOST_BYTES, "it took too much memory"


def _cpu():
    import torch

    return torch.device("cpu")


def tree(folder):
    """Everything in a folder: kinds, contents, modes, times of change."""
    found = {}
    for path in sorted(folder.rglob("*")):
        about = path.lstat()
        kind = stat.S_IFMT(about.st_mode)
        content = path.read_bytes() if stat.S_ISREG(kind) else str(path.readlink()) if path.is_symlink() else None
        found[path.relative_to(folder).as_posix()] = (
            about.st_mode,
            about.st_mtime_ns if kind != stat.S_IFDIR else 0,
            content,
        )
    return found


def reseal(checkpoint, **changes):
    """Give a checkpoint the manifest that its files would have, sealed."""
    manifest = json.loads((checkpoint / MANIFEST).read_text())
    del manifest["seal"]
    for name in (WEIGHTS, TENSORS, TREE):
        path = checkpoint / name
        if path.is_file():
            with path.open("rb") as file:
                manifest["files"][name] = [path.stat().st_size, hashlib.file_digest(file, "sha256").hexdigest()]
    (checkpoint / MANIFEST).write_bytes(sealed({**manifest, **changes}))


def checkpoint_of(run):
    """The only one."""
    (found,) = (run / "checkpoints").glob("step-*")
    return found


# --- pickles ---


class Poison:
    def __init__(self, victim):
        self.victim = victim

    def __reduce__(self):
        return os.mkdir, (self.victim,)


def pickled(victim, protocol):
    return pickle.dumps({"state": Poison(str(victim / "poisoned"))}, protocol=protocol)


# --- safetensors ---


def raw(header, data=b"", length=None):
    """A safetensors file of any header."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text + data


def entry(shape=(2,), offsets=(0, 8), dtype="F32"):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


def headers():
    """Name -> the bytes of an absurd file."""
    return {
        "length 2**63": raw({"w": entry()}, bytes(8), 2**63),
        "length 2**64 - 1": raw({"w": entry()}, bytes(8), 2**64 - 1),
        "length beyond the file": raw({"w": entry()}, bytes(8), 1 << 20),
        "length 0": raw(b"", b"", 0),
        "no header": b"",
        "three bytes": b"\x01\x02\x03",
        "overlapping": raw({"v": entry(), "w": entry((2,), (4, 12))}, bytes(12)),
        "a hole": raw({"v": entry(), "w": entry((2,), (16, 24))}, bytes(24)),
        "beyond the end": raw({"w": entry((2**40,), (0, 2**42))}, bytes(8)),
        "backwards": raw({"w": entry((2,), (8, 0))}, bytes(8)),
        "huge shape": raw({"w": entry((2**62, 2**62), (0, 8))}, bytes(8)),
        "shape that overflows to its size": raw({"w": entry((2**63, 2, 2), (0, 0))}),
        "huge and empty": raw({"w": entry((2**63 - 1, 2**63 - 1, 0), (0, 0))}),
        "negative shape": raw({"w": entry((-2, -1), (0, 8))}, bytes(8)),
        "negative offsets": raw({"w": entry((2,), (-8, 0))}, bytes(8)),
        "floats for a shape": raw({"w": entry((2.5,), (0, 8))}, bytes(8)),
        "text for a shape": raw({"w": {**entry(), "shape": "2"}}, bytes(8)),
        "1e308": raw(b'{"w":{"dtype":"F32","shape":[1e308],"data_offsets":[0,8]}}', bytes(8)),
        "unknown dtype": raw({"w": entry(dtype="F1024")}, bytes(8)),
        "odd dtype": raw({"w": entry((4,), (0, 4), "F8_E8M0")}, bytes(4)),
        "sub-byte dtype": raw({"w": entry((3,), (0, 1), "F4")}, bytes(1)),
        "2,000 dimensions": raw({"w": entry((1,) * 2000, (0, 4))}, bytes(4)),
        "duplicate keys": raw(
            b'{"w":' + json.dumps(entry()).encode() + b',"w":' + json.dumps(entry()).encode() + b"}", bytes(8)
        ),
        "deep nesting": lambda: raw(b'{"w":' + b"[" * 200_000 + b"]" * 200_000 + b"}"),
        "deep metadata": lambda: raw(b'{"__metadata__":' + b'{"a":' * 50_000 + b"1" + b"}" * 50_000 + b"}"),
        "no JSON": raw(b"\xff" * 64),
        "a list": raw([entry()], bytes(8)),
        "a header of 100 MB": lambda: raw(b"{" + b" " * (99 << 20) + b"}"),
        "a header of 15 MB": lambda: raw(b"{" + b" " * (15 << 20) + b"}"),
        "20,000 names": lambda: raw({f"t{i}": entry((0,), (0, 0)) for i in range(20_000)}),
        "no tensors": raw({}),
        "a name that climbs": raw({"../../../beside/w": entry()}, bytes(8)),
        "a name with a bell": raw({"\x07\x1b[2Jw": entry()}, bytes(8)),
    }


def made_now(content):
    """The large ones are functions."""
    return content() if callable(content) else content


# --- JSON ---


def bombs():
    """Name -> JSON that is none of ours, or too much of it."""
    return {
        "empty": b"",
        "deep list": lambda: b"[" * 1_000_000,
        "deep list, closed": b"[" * 50_000 + b"]" * 50_000,
        "deep table": lambda: b'{"a":' * 300_000 + b"1" + b"}" * 300_000,
        "deep state": b'{"shared":false,"weights":{},"state":' + b"[" * 900 + b"]" * 900 + b"}",
        "a number of 1,000,000 digits": lambda: b'{"shared":false,"weights":{},"state":' + b"9" * 1_000_000 + b"}",
        "a number of 4,000 digits": b'{"shared":false,"weights":{},"state":' + b"9" * 4_000 + b"}",
        "1e999": b'{"shared":1e999,"weights":NaN,"state":-Infinity}',
        "NaN": b"NaN",
        "duplicate names": b'{"shared":false,"weights":{},"state":{},"state":{}}',
        "200,000 names": lambda: b"{" + b",".join(b'"%d":0' % i for i in range(200_000)) + b"}",
        "200,000 lists": lambda: b"[" + b",".join([b"[]"] * 200_000) + b"]",
        "larger than any": lambda: b" " * ((1 << 27) + 1),
        "a list": b"[]",
        "null": b"null",
        "text": b'"state"',
        "UTF-16": '{"state":{}}'.encode("utf-16"),
        "no UTF-8": b'{"state":"\xff\xfe"}',
        "NUL": b"\0" * 1000,
        "marks": b'{"shared":true,"weights":{"$tensor":"w"},"state":{"$tuple":7}}',
        "a mark in a mark": b'{"shared":false,"weights":{},"state":{"$tensor":{"$tensor":"w"}}}',
        "an unhashable key": b'{"shared":false,"weights":{},"state":{"$dict":[[[],1]]}}',
        "bytes of a kind": b'{"shared":false,"weights":{},"state":{"$bytes":"!!!!"}}',
        "a list for a state": b'{"shared":true,"weights":[],"state":[]}',
        "a state of nothing": b'{"shared":true,"weights":{},"state":{}}',
        "a run of nothing": b'{"shared":true,"weights":{},"state":{"run":{}}}',
    }


# --- the content of a state ---

ODD = (None, True, -1, 2**63, 10**30, 0.5, float("nan"), float("inf"), "text", [], {}, [[]], {"step": 1},
       {"$tuple": []}, {"$bytes": "AAAA"}, {"$tensor": "?"}, {"$dict": [[0, None]]}, [0] * 1000)  # fmt: skip


def places(value, path=(), most=3):
    """The path of every part of a JSON tree; of long lists the first parts only."""
    if path:
        yield path
    if isinstance(value, dict):
        for key, part in value.items():
            yield from places(part, (*path, key), most)
    elif isinstance(value, list):
        for i, part in enumerate(value[:most] if len(value) > 50 else value):
            yield from places(part, (*path, i), most)


def marked(value):
    """The names of the tensors in a JSON tree."""
    if isinstance(value, dict):
        return [value["$tensor"]] if "$tensor" in value else [n for part in value.values() for n in marked(part)]
    return [name for part in value for name in marked(part)] if isinstance(value, list) else []


def changed(content, path, new):
    """A copy of a JSON tree with `new` at `path`; `...` takes it away."""
    content = json.loads(json.dumps(content))
    place = content
    for key in path[:-1]:
        place = place[key]
    if new is ...:
        del place[path[-1]]
    else:
        place[path[-1]] = new
    return content


def copy_run(source, target):
    shutil.copytree(source, target, symlinks=True)
    return target
