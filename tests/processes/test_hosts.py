"""Two hosts, as network namespaces joined by a wire, each with a torchrun of its own; the wire may be cut.

Needs Linux, `ip` and the right to make namespaces; skipped where that is missing.
"""

import json
import os
import shutil
import subprocess
import sys
import time
from contextlib import suppress

import pytest

from tests.processes import fails
from tests.processes.launched import launching

pytestmark = [pytest.mark.multiprocess, pytest.mark.slow]


def ip(*words):
    return subprocess.run(["ip", *words], capture_output=True, text=True, check=True)


@pytest.fixture
def hosts():
    """The names of two namespaces, 10.77.0.1 and 10.77.0.2."""
    if sys.platform != "linux" or shutil.which("ip") is None:
        pytest.skip("network namespaces need Linux and the command ip")
    names = [f"fivestep-{os.getpid()}-{n}" for n in (1, 2)]
    ends = [f"fs{os.getpid() % 100000}{n}" for n in "ab"]
    try:
        for name in names:
            ip("netns", "add", name)
        ip("link", "add", ends[0], "type", "veth", "peer", "name", ends[1])
        for n, (name, end) in enumerate(zip(names, ends, strict=True), 1):
            ip("link", "set", end, "netns", name)
            ip("-n", name, "addr", "add", f"10.77.0.{n}/24", "dev", end)
            ip("-n", name, "link", "set", end, "up")
            ip("-n", name, "link", "set", "lo", "up")
    except subprocess.CalledProcessError as error:
        for name in names:
            with suppress(subprocess.CalledProcessError):
                ip("netns", "del", name)
        pytest.skip(f"network namespaces cannot be made here: {error.stderr.strip()}")
    yield list(zip(names, ends, strict=True))
    for name in names:
        with suppress(subprocess.CalledProcessError):
            ip("netns", "del", name)


def launch(host, rank, folder, steps):
    """torchrun on one of the hosts."""
    name, end = host
    words = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--nproc-per-node", "1"]
    words += ["--node-rank", str(rank), "--master-addr", "10.77.0.1", "--master-port", "29511"]
    log = (folder / f"log-{rank}").open("w")
    return subprocess.Popen(
        ["ip", "netns", "exec", name, *words, fails.__file__, str(folder), "sound", str(steps)],
        stdout=log,
        stderr=log,
        env=launching(GLOO_SOCKET_IFNAME=end),
    )


@pytest.fixture
def started(hosts, tmp_path):
    made = []

    def start(steps):
        made.extend(launch(host, rank, tmp_path, steps) for rank, host in enumerate(hosts))
        return made

    yield start
    for one in made:
        one.kill()
        one.wait()


def said(folder):
    return "".join((folder / f"log-{rank}").read_text() for rank in (0, 1))


def test_two_hosts_train_as_one_process(started, tmp_path, tmp_path_factory):
    both = started(30)
    for one in both:
        assert one.wait(120) == 0, said(tmp_path)
    alone = tmp_path_factory.mktemp("alone")
    fails.main(alone, "sound", 30)
    made, wanted = (json.loads((folder / "made.json").read_text()) for folder in (tmp_path, alone))
    for (step, loss, count), (_, theirs, theirs_count) in zip(made, wanted, strict=True):
        assert count == theirs_count
        assert loss == pytest.approx(theirs, rel=1e-12), step


@pytest.mark.torture
def test_a_cut_wire_is_noticed(started, hosts, tmp_path):
    both = started(100_000)
    deadline = time.monotonic() + 90
    while len(list(tmp_path.glob("pid-*"))) < 2:
        assert time.monotonic() < deadline, said(tmp_path)
        time.sleep(0.1)
    ip("-n", hosts[1][0], "link", "set", hosts[1][1], "down")
    for one in both:
        assert one.wait(90) != 0, said(tmp_path)
    assert "has not answered for" in said(tmp_path)
