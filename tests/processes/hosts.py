"""Two hosts, as network namespaces joined by a wire, each with a torchrun of its own; it may be slow, or cut."""

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
def wired(rate=None):
    """The names of two namespaces, 10.77.0.1 and 10.77.0.2, and of the ends of the wire between them.

    rate: how much goes through at most, each way, in the words of `tc`.
    """
    if sys.platform != "linux" or None in (shutil.which("ip"), shutil.which("tc")):
        pytest.skip("network namespaces need Linux and the commands ip and tc")
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
            if rate is not None:
                limit = ["tbf", "rate", rate, "burst", "32kbit", "latency", "400ms"]
                subprocess.run(
                    ["tc", "-n", name, "qdisc", "add", "dev", end, "root", *limit],
                    capture_output=True,
                    text=True,
                    check=True,
                )
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


def launch(host, rank, folder, steps, mode="sound"):
    """torchrun on one of the hosts."""
    name, end = host
    words = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--nproc-per-node", "1"]
    words += ["--node-rank", str(rank), "--master-addr", "10.77.0.1", "--master-port", "29511"]
    with (folder / f"log-{rank}").open("w") as log:
        return subprocess.Popen(
            ["ip", "netns", "exec", name, *words, fails.__file__, str(folder), mode, str(steps)],
            stdout=log,
            stderr=log,
            env=launching(GLOO_SOCKET_IFNAME=end),
        )


def said(folder):
    """What both have said."""
    return "".join((folder / f"log-{rank}").read_text() for rank in (0, 1))
