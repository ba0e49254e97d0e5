"""Elastic training: a launcher is lost at a random time, another joins later, and the run ends as if it were nothing.

Three torchruns on this machine, a process each, met through the c10d rendezvous on the loopback device.
"""

import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections import Counter

import pytest

from tests.processes import members
from tests.processes.launched import gone, killed, launching, tree

pytestmark = [pytest.mark.multiprocess, pytest.mark.slow]
STEPS = 63  # three epochs of 21
QUICK = (
    "last_call_timeout=1,keep_alive_interval=1,keep_alive_max_attempt=6,join_timeout=120"  # torch waits for minutes
)


class Launchers:
    """Torchruns of one training, that may come and go: `launchers(least, most)` gives what starts one."""

    def __init__(self, folder):
        self.folder, self.all = folder, []
        with socket.socket() as free:
            free.bind(("localhost", 0))
            self.port = free.getsockname()[1]

    def __call__(self, least, most):
        words = [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--nnodes",
            f"{least}:{most}",
            "--nproc-per-node",
            "1",
        ]
        words += ["--rdzv-backend", "c10d", "--rdzv-endpoint", f"localhost:{self.port}", "--rdzv-conf", QUICK]
        words += ["--max-restarts", "9", members.__file__, str(self.folder), str(STEPS)]

        def start():
            log = (self.folder / f"log-{len(self.all)}").open("w")
            # torch 2.13's launchers share one store, and one that joins later is not told its address.
            one = launching(TORCH_DISABLE_SHARE_RDZV_TCP_STORE="1")
            self.all.append(subprocess.Popen(words, stdout=log, stderr=log, env=one))
            log.close()
            if len(self.all) == 1:  # it holds the rendezvous: the others find it there
                self.until(self.there, 30, "the rendezvous")
            return self.all[-1]

        return start

    def there(self):
        with socket.socket() as one:
            return one.connect_ex(("localhost", self.port)) == 0

    def until(self, true, most, what):
        deadline = time.monotonic() + most
        while not true():
            assert time.monotonic() < deadline, f"{what} is not there after {most} s\n{self.said()}"
            time.sleep(0.05)

    def begun(self):
        """What the first process of each round has noted, the oldest first."""
        return sorted(self.folder.glob("round-*-*-0"))

    def sizes(self):
        return [int(path.name.split("-")[2]) for path in self.begun()]

    def newest(self, size):
        """How many steps the newest round has made; -1 where it is of another size."""
        files = self.begun()
        return files[-1].read_text().count("\n") if files and self.sizes()[-1] == size else -1

    def said(self):
        return "\n".join(path.read_text()[-3000:] for path in sorted(self.folder.glob("log-*")))

    def close(self):
        for process in self.all:
            killed(process)


@pytest.fixture
def launchers(tmp_path):
    (tmp_path / "slow").touch()
    made = Launchers(tmp_path)
    yield made
    made.close()


def seeded():
    """What draws the instants; its seed stands in the output of a test that fails."""
    seed = int.from_bytes(os.urandom(4))
    print(f"seed {seed}")
    return random.Random(seed)


def lost(process):
    """Kill a launcher and all it has started, at once; their numbers."""
    below = tree(process.pid)
    for pid in below:
        os.kill(pid, signal.SIGKILL)
    return below


def standing(folder):
    """The losses of the steps that stand at the end, and the windows that were computed for each."""
    rows = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
    losses = {row["step"]: row["loss"] for row in rows if row.get("split") == "train"}
    shown = {}
    for path in sorted(folder.glob("round-*")):  # the oldest first: what is made again replaces what was made
        for line in path.read_text().splitlines():
            one = json.loads(line)
            if shown.setdefault(one["step"], {}).get("round") != one["round"]:
                shown[one["step"]] = {"round": one["round"], "windows": []}
            shown[one["step"]]["windows"] += map(tuple, one["windows"])
    return losses, {step: one["windows"] for step, one in shown.items()}


def assert_as_if_nothing(folder, alone):
    members.main(alone, STEPS)
    (losses, shown), (wanted, windows) = standing(folder), standing(alone)
    assert sorted(losses) == sorted(shown) == list(range(1, STEPS + 1))
    for step, loss in wanted.items():
        assert loss == pytest.approx(losses[step], rel=1e-5), step
        assert Counter(shown[step]) == Counter(windows[step]), f"other windows in step {step}"
    data = members.data()
    for epoch in range(STEPS // len(data)):
        seen = Counter()
        for step in range(epoch * len(data) + 1, (epoch + 1) * len(data) + 1):
            seen.update(shown[step])
        assert set(seen.values()) == {1} and len(seen) == data.windows, "every window of the epoch once"


def waited(launchers, drawn, size, steps=2):
    """Until the newest round is of so many processes and under way, and then some."""
    launchers.until(lambda: launchers.newest(size) > steps, 120, f"a round of {size}")
    time.sleep(drawn.uniform(0.0, 0.8))


def test_one_joins_and_is_lost(launchers, tmp_path, tmp_path_factory):
    """1, 2, 1: what was begun alone two go on with; one is killed with its launcher, and the other ends alone."""
    drawn = seeded()
    start = launchers(1, 2)
    first = start()
    waited(launchers, drawn, 1)
    start()
    waited(launchers, drawn, 2)
    below = lost(launchers.all[1])
    waited(launchers, drawn, 1, 0)
    (tmp_path / "slow").unlink()
    assert first.wait(120) == 0, launchers.said()
    assert gone(below, 5)
    assert launchers.sizes() == [1, 2, 1]
    assert_as_if_nothing(tmp_path, tmp_path_factory.mktemp("alone"))


@pytest.mark.torture
@pytest.mark.parametrize("repeat", range(20))
def test_three_two_three(launchers, tmp_path, tmp_path_factory, repeat):
    """One of three launchers is killed with all it started; the two go on; a third joins; all end."""
    drawn = seeded()
    start = launchers(2, 3)
    kept = [start() for _ in range(3)]
    waited(launchers, drawn, 3)
    below = lost(kept.pop(drawn.choice((1, 2))))  # the first holds the rendezvous
    waited(launchers, drawn, 2)
    kept.append(start())
    waited(launchers, drawn, 3, 0)
    (tmp_path / "slow").unlink()
    for process in kept:
        assert process.wait(120) == 0, launchers.said()
    assert gone(below, 5)
    assert launchers.sizes() == [3, 2, 3]
    assert_as_if_nothing(tmp_path, tmp_path_factory.mktemp("alone"))
