"""SIGKILL at random times, once and twenty times in one run: a restart ends bit for bit where the whole one ended."""

import os
import random
import signal
import time

import pytest

from tests.torture.harness import LONGEST, finish, jobs, new_home, said

NAMES = list(jobs(1))


def kill(server, pid, seconds):
    """SIGKILL after so many seconds; whether it struck a process that still lived."""
    status = server.wait(pid, seconds)
    if status is None:
        os.kill(pid, signal.SIGKILL)
        status = server.wait(pid)
    assert status in (0, -signal.SIGKILL), f"it ended by itself with {status}"
    return status == -signal.SIGKILL


def kill_in_a_save(server, pid, home, random, seconds):
    """SIGKILL while a checkpoint is being written: up to 5 ms after its folder appears."""
    checkpoints, end = home / "run" / "checkpoints", time.monotonic() + LONGEST
    time.sleep(seconds)
    while time.monotonic() < end and server.wait(pid, 0) is None:
        if checkpoints.exists() and any(path.name.startswith(".") for path in checkpoints.iterdir()):
            time.sleep(random.uniform(0, 0.005))
            return kill(server, pid, 0)
    return False


def one_kill(whole, folder):
    """A trial: a life, a kill by `item` = (number, how), a restart, the comparison."""

    def trial(server, item):
        number, how = item
        drawn = random.Random(f"{whole.home.name} {number}")
        home = new_home(folder / f"{number}")
        pid = server.start(whole.job, home, fresh=how == "fresh")
        seconds = drawn.uniform(0, whole.seconds)
        if how == "start":
            seconds = drawn.uniform(0, min(0.3, whole.seconds))
        if how == "fresh":
            seconds += 2.5  # the imports
        try:
            if how == "save":
                kill_in_a_save(server, pid, home, drawn, seconds * 0.8)
            else:
                kill(server, pid, seconds)
        except AssertionError as error:
            raise AssertionError(f"{error}: {said(home)}") from error
        finish(server, whole, home, f"killed ({how}) after {seconds:.4f} s")

    return trial


def chain(whole, folder, kills):
    """A trial: so many kills in one run. Each life is given time for some progress."""

    def trial(server, number):
        drawn = random.Random(f"{whole.home.name} chain {number}")
        home = new_home(folder / f"chain-{number}")
        struck = 0
        while struck < kills:
            pid = server.start(whole.job, home)
            struck += kill(server, pid, drawn.uniform(0.02, 0.35) + drawn.random() * whole.seconds / kills)
        finish(server, whole, home, f"a chain of {kills} kills")

    return trial


def test_the_kill_is_a_real_one(pool, tmp_path):
    """The harness proves itself: a life has a process id of its own, and nothing but the signal ends it."""
    server = pool.one()
    stubborn = {"target": "stubborn", "arguments": {"path": str(tmp_path / "pid")}}
    pid = server.start(stubborn, new_home(tmp_path / "home"))
    while not (tmp_path / "pid").exists() or not (tmp_path / "pid").read_text():
        assert server.wait(pid, 0.01) is None
    assert int((tmp_path / "pid").read_text()) == pid != os.getpid()
    os.kill(pid, signal.SIGKILL)
    assert server.wait(pid) == -signal.SIGKILL


@pytest.mark.parametrize("name", NAMES)
def test_killed_at_any_time(pool, wholes, tmp_path, name):
    whole = wholes(name)
    pool.each(f"kills of {name}", one_kill(whole, tmp_path), [(1, "time"), (2, "save")])


def test_killed_again_and_again(pool, wholes, tmp_path):
    pool.each("chains of 5 kills", chain(wholes("script"), tmp_path, 5), [1])


@pytest.mark.torture
@pytest.mark.parametrize("name", NAMES)
def test_full_kills(pool, wholes, tmp_path, name):
    hows = ["time"] * 25 + ["save"] * 15 + ["start"] * 7 + ["fresh"] * 3
    pool.each(f"kills of {name}", one_kill(wholes(name, 5), tmp_path), enumerate(hows))


@pytest.mark.torture
@pytest.mark.parametrize("name", NAMES)
def test_full_chains(pool, wholes, tmp_path, name):
    pool.each(f"chains of 20 kills of {name}", chain(wholes(name, 5), tmp_path, 20), [1, 2])
