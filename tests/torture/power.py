"""A disk whose power can be cut: what is durable is only what was fsynced, names and content each by themselves.

A recorded life (`faults.py`, mode "record") is played into a `Disk`. `cut` gives the tree of files that a power cut
at that point may leave, under what POSIX promises and no more:

- of a file, the content of its last fsync; of what was written since: nothing, all, or a part (half a write, zeros);
- of a folder, the names of its last fsync; of the changes since: none, all, or any of them, in their order.

No file system is that unkind in every respect, but each is in some.
"""

import base64
import os
from dataclasses import dataclass, field

LEAST, MOST, NAMES, ANY = "least", "most", "names", "any"
HOWS = (LEAST, MOST, NAMES, ANY)


@dataclass(eq=False)
class File:
    durable: bytes = b""
    now: bytes = b""

    def left(self, how, random):
        """The content that a power cut may leave."""
        if how == MOST or self.now == self.durable:
            return self.now
        if how == ANY:
            pairs = enumerate(zip(self.durable, self.now, strict=False))
            shorter = min(len(self.durable), len(self.now))
            same = next((at for at, (old, new) in pairs if old != new), shorter)  # appended to, it keeps what it had
            size = random.randint(same, len(self.now))
            torn = self.now[:size] + b"\0" * random.choice([0, len(self.now) - size])
            return random.choice([self.durable, self.now, torn])
        return self.durable


@dataclass(eq=False)
class Folder:
    durable: dict = field(default_factory=dict)
    now: dict = field(default_factory=dict)
    since: list = field(default_factory=list)  # changes of names, in order: functions of a dict

    def change(self, change):
        change(self.now)
        self.since.append(change)

    def left(self, how, random):
        """The names, with what they name, that a power cut may leave."""
        if how in (MOST, NAMES):
            return dict(self.now)
        names = dict(self.durable)
        for change in self.since if how == ANY else []:
            if random.random() < 0.5:
                change(names)
        return names


class Disk:
    """The folder `home`, empty and durable at first."""

    def __init__(self, home):
        self.home, self.root, self.handles = str(home), Folder(), {}
        self.saved = None  # the step that is durable, as the training believes
        self.kept = {}  # files that are, by name

    def at(self, path):
        """The node at a path."""
        node = self.root
        for name in os.path.relpath(path, self.home).split(os.sep):
            node = node if name == "." else node.now[name]
        return node

    def around(self, path):
        """The folder that a path is in, and the path's name there."""
        return self.at(os.path.dirname(path)), os.path.basename(path)

    def play(self, one):
        """Do an operation that was recorded."""
        getattr(self, "_" + one["op"])(one)

    def _open(self, one):
        if one["new"]:
            folder, name = self.around(one["path"])
            file = File()
            folder.change(lambda names: names.__setitem__(name, file))
        self.handles[one["handle"]] = self.at(one["path"])

    def _write(self, one):
        file = self.handles[one["handle"]]
        assert one["at"] == len(file.now), "a write that does not append"
        file.now += base64.b64decode(one["data"])

    def _fsync(self, one):
        node = self.handles[one["handle"]]
        node.durable = node.now if isinstance(node, File) else dict(node.now)
        if isinstance(node, Folder):
            node.since.clear()

    def _truncate(self, one):
        file = self.at(one["path"])
        file.now = file.now[: one["size"]]

    def _ftruncate(self, one):
        file = self.handles[one["handle"]]
        file.now = file.now[: one["size"]]

    def _mkdir(self, one):
        folder, name = self.around(one["path"])
        new = Folder()
        folder.change(lambda names: names.__setitem__(name, new))

    def _unlink(self, one):
        folder, name = self.around(one["path"])
        folder.change(lambda names: names.pop(name, None))

    _rmdir = _unlink

    def _rename(self, one):
        (folder, old), (other, new) = self.around(one["path"]), self.around(one["to"])
        assert folder is other, "a rename into another folder is not modelled"
        node = folder.now[old]

        def change(names):
            names.pop(old, None)
            names[new] = node

        folder.change(change)

    def _saved(self, one):
        self.saved = one["step"]

    def _kept(self, one):
        self.kept[one["name"]] = base64.b64decode(one["data"])

    def cut(self, how, random):
        """What a power cut now may leave: path -> content, None for a folder."""
        tree = {}

        def walk(folder, path):
            for name, node in folder.left(how, random).items():
                inner = f"{path}/{name}" if path else name
                if isinstance(node, Folder):
                    tree[inner] = None
                    walk(node, inner)
                else:
                    tree[inner] = node.left(how, random)

        walk(self.root, "")
        return tree


def lay(tree, home):
    """Write a tree to a real folder."""
    for path, content in tree.items():
        if content is None:
            (home / path).mkdir(parents=True)
        else:
            (home / path).write_bytes(content)
