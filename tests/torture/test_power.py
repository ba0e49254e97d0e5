"""Power cuts at every operation of a life: what was said to be saved is there, and the run goes on from it."""

import random
import shutil

import pytest

from fivestep.run.checkpoint import DamagedError, load_state, newest_first, read_manifest
from tests.torture import faults, harness
from tests.torture.power import ANY, HOWS, LEAST, Disk, lay

OPTIONS = "--max-iters 6 --batch-size 4 --eval-every 3 --log-every 2 --sample-every 3 --checkpoint-every 2"
JOB = harness._train("bigram", OPTIONS)


@pytest.fixture(scope="module")
def whole(pool, tmp_path_factory):
    return harness.Whole(pool.one(), JOB, tmp_path_factory.mktemp("power") / "whole")


@pytest.fixture(scope="module")
def recorded(pool, tmp_path_factory):
    """The home of a life, and its operations."""
    home = harness.new_home(tmp_path_factory.mktemp("power") / "recorded")
    assert pool.one().run(JOB, home, fault={"mode": "record", "log": str(home / "ops")}) == 0, harness.said(home)
    return home, faults.operations(home / "ops")


def cuts(recorded, anyhow=1):
    """The disk after each operation, with each way that power may be cut there."""
    home, operations = recorded
    disk = Disk(home)
    for number, one in enumerate(operations):
        disk.play(one)
        for how in HOWS:
            for draw in range(anyhow if how == ANY else 1):
                yield number, how, draw, disk


def newest_sound(run):
    """The newest checkpoint that is sound, its state and its step."""
    for path in newest_first(run / "checkpoints"):
        try:
            state = load_state(read_manifest(path))
            return state, state["clock"]["step"]
        except DamagedError:
            continue
    return None, None


def promised(disk, tree, folder):
    """Raise AssertionError where a cut has taken what was promised."""
    for name, content in disk.kept.items():
        assert tree.get(f"run/{name}") == content, f"{name} is lost or torn"
    if disk.saved is not None:
        lay(tree, folder)
        state, step = newest_sound(folder / "run")
        shutil.rmtree(folder / "run")
        assert step is not None, "no checkpoint is sound"
        assert step >= disk.saved, f"step {disk.saved} was saved, step {step} is there"
        rows, size = disk.at(f"{disk.home}/run/metrics.jsonl").now, state["run"]["metrics"]
        assert tree["run/metrics.jsonl"][:size] == rows[:size], "metrics.jsonl has lost rows of the saved step"


def test_the_disk_forgets():
    """The harness proves itself: without fsyncs nothing is left, or names without content."""
    disk = Disk("/home")
    disk.play({"op": "mkdir", "path": "/home/run"})
    disk.play({"op": "open", "path": "/home/run/a", "handle": 1, "new": True})
    disk.play({"op": "write", "handle": 1, "at": 0, "data": "aGVsbG8="})
    drawn = random.Random(0)
    assert disk.cut("least", drawn) == {}
    assert disk.cut("names", drawn) == {"run": None, "run/a": b""}
    assert disk.cut("most", drawn) == {"run": None, "run/a": b"hello"}
    disk.play({"op": "fsync", "handle": 1})
    assert disk.cut("least", drawn) == {}
    assert disk.cut("names", drawn) == {"run": None, "run/a": b"hello"}


def test_what_was_saved_is_there(recorded, tmp_path):
    found, known = [], set()
    for number, how, draw, disk in cuts(recorded, 3):
        tree = disk.cut(how, random.Random(f"{number} {draw}"))
        this = hash((frozenset(tree.items()), disk.saved, len(disk.kept)))
        if this in known:  # as another cut left it
            continue
        known.add(this)
        try:
            promised(disk, tree, tmp_path)
        except AssertionError as error:
            found.append(f"operation {number}, {how} {draw}: {error}")
        harness.COUNTS["power cuts, looked at"] += 1
    assert not found, f"{len(found)} times: " + "; ".join(found[:4])


def restarted(whole, folder):
    def trial(server, item):
        number, how, draw, tree = item
        home = harness.new_home(folder / f"{number}-{how}-{draw}")
        lay(tree, home)
        harness.finish(server, whole, home, f"power cut after operation {number}, {how} {draw}")

    return trial


def trees(recorded, numbers, anyhow):
    for number, how, draw, disk in cuts(recorded, anyhow):
        if number in numbers:
            yield number, how, draw, disk.cut(how, random.Random(f"{number} {draw}"))


def test_restarts(pool, whole, recorded, tmp_path):
    step = max(1, len(recorded[1]) // 7)
    chosen = [item for item in trees(recorded, range(3, len(recorded[1]), step), 1) if item[1] in (LEAST, ANY)]
    pool.each("power cuts, restarted", restarted(whole, tmp_path), chosen[::2][:5])


@pytest.mark.torture
def test_full_restarts(pool, whole, recorded, tmp_path):
    chosen = trees(recorded, range(len(recorded[1])), 2)
    pool.each("power cuts, restarted", restarted(whole, tmp_path), chosen)
