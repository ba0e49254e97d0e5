"""Two hosts, as network namespaces joined by a wire, each with a torchrun of its own; the wire may be cut."""

import itertools
import os
import shutil
import subprocess
import sys
from contextlib import contextmanager, suppress

import pytest

from tests.processes import fails
from tests.processes.launched import launching

_numbers = itertools.count()


def ip(*words):
    return subprocess.run(["ip", *words], capture_output=True, text=True, check=True)


@contextmanager
def wired():
    """The names of two namespaces, 10.77.0.1 and 10.77.0.2, and of the ends of the wire between them."""
    if sys.platform != "linux" or shutil.which("ip") is None:
        pytest.skip("network namespaces need Linux and the command ip")
    own = f"{os.getpid() % 100000}-{next(_numbers)}"
    names = [f"fivestep-{own}-{n}" for n in (1, 2)]
    ends = [f"fs{own}{n}" for n in "ab"]
    try:
        for name in names:
            ip("netns", "add", name)
        ip("link", "add", ends[0], "type", "veth", "peer", "name", ends[1])
        for n, (name, end) in enumerate(zip(names, ends, strict=True), 1):
            ip("link", "set", end, "netns", name)
            ip("-n", name, "addr", "add", f"10.77.0.{n}/24", "dev", end)
            ip("-n", name, "link", "set", end, "up")
            ip("-n", name, "link", "set", "lo", "up")
        yield list(zip(names, ends, strict=True))
    except subprocess.CalledProcessError as error:
        pytest.skip(f"network namespaces cannot be made here: {error.stderr.strip()}")
    finally:
        for name in names:
            with suppress(subprocess.CalledProcessError):
                ip("netns", "del", name)


def cut(host):
    """Cut the wire at one end."""
    ip("-n", host[0], "link", "set", host[1], "down")


def launch(host, rank, folder, steps):
    """torchrun on one of the hosts."""
    name, end = host
    words = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--nproc-per-node", "1"]
    words += ["--node-rank", str(rank), "--master-addr", "10.77.0.1", "--master-port", "29511"]
    with (folder / f"log-{rank}").open("w") as log:
        return subprocess.Popen(
            ["ip", "netns", "exec", name, *words, fails.__file__, str(folder), "sound", str(steps)],
            stdout=log,
            stderr=log,
            env=launching(GLOO_SOCKET_IFNAME=end),
        )


def said(folder):
    """What both have said."""
    return "".join((folder / f"log-{rank}").read_text() for rank in (0, 1))
