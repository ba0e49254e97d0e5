"""At every single file operation of a life: a kill, a torn write, an error, once and from there on."""

import re
import shutil

import pytest

from fivestep.run.checkpoint import checkpoints, load_state, newest_first
from tests.torture import faults, harness

OPTIONS = "--max-iters 6 --batch-size 4 --eval-every 3 --log-every 2 --sample-every 3 --checkpoint-every 2"
JOB = harness._train("bigram", OPTIONS)
# What may fail in silence: looking, and clearing away what nobody needs; a lock that is not removed is not held.
SILENT = {"stat", "unlink", "rmdir"}


class Life:
    """A life of the job, from nothing or from what a kill left, with its operations."""

    def __init__(self, pool, whole, folder, begun):
        self.whole, self.begun = whole, None
        if begun:  # killed in the last file of the third save, with the second save's folder half removed
            self.begun = harness.new_home(folder / "begun")
            every = [one for one in self.counted(pool, folder / "first") if one["kind"] in faults.CHANGING]
            last = [at for at, one in enumerate(every) if one["path"].endswith(".step-00000004.part/manifest.json")]
            assert pool.one().run(JOB, self.begun, fault={"mode": "kill", "at": last[1]}) == -9
            (self.begun / "log").unlink()
        self.operations = self.counted(pool, folder / "counted")

    def home(self, path):
        if self.begun is None:
            return harness.new_home(path)
        return shutil.copytree(self.begun, path)

    def counted(self, pool, path):
        home = self.home(path)
        assert pool.one().run(JOB, home, fault={"mode": "count", "log": str(home / "ops")}) == 0, harness.said(home)
        operations = faults.operations(home / "ops")
        assert operations[0]["number"] == 0
        assert len(operations) > 100
        return operations

    def changing(self, tearing=False):
        """The numbers of the operations that change something, as they are numbered for a kill."""
        changing = [one for one in self.operations if one["kind"] in faults.CHANGING]
        return [at for at, one in enumerate(changing) if not tearing or one["kind"] == "write"]


@pytest.fixture(scope="module", params=[False, True], ids=["from-nothing", "after-a-kill"])
def life(request, pool, tmp_path_factory):
    folder = tmp_path_factory.mktemp("operations")
    return Life(pool, harness.Whole(pool.one(), JOB, folder / "whole"), folder, request.param)


def killing(life, folder):
    def trial(server, item):
        mode, at = item
        home = life.home(folder / f"{mode}-{at}")
        status = server.run(JOB, home, fault={"mode": mode, "at": at})
        assert status == -9, f"it was not killed: {status}"
        harness.finish(server, life.whole, home, f"{mode} at operation {at}")

    return trial


def failing(life, folder):
    def trial(server, item):
        error, sticky, at = item
        home = life.home(folder / f"{error}-{sticky}-{at}")
        before = newest_first(home / "run" / "checkpoints")
        fault = {"mode": "fail", "at": at, "error": error, "sticky": sticky, "log": str(home / "struck")}
        status = server.run(JOB, home, fault=fault)
        said, struck = harness.said(home), [one["kind"] for one in faults.operations(home / "struck")]
        note = f"{error} at operation {at} ({struck[:3]}), status {status}"
        assert "Traceback" not in said, f"{note}: {said}"
        if status:
            assert status in (1, 2), note
            assert re.search(r"^fivestep: .{10}", said, re.M), f"{note}: nothing is said: {said}"
        else:
            told = re.search("cannot|damaged|lost|disturbed", said)
            assert told or set(struck) <= SILENT or _tolerable(life, at, struck), (
                f"{note}: it failed in silence: {said}"
            )
        if before:
            found = checkpoints(home / "run" / "checkpoints")
            assert found, f"{note}: no checkpoint is left"
            load_state(found[-1])
        # A sample that failed is told, and not written again: it is no part of the training.
        harness.finish(server, life.whole, home, note, sampled=False)

    return trial


def _tolerable(life, at, struck):
    """Whether the operation belongs to clearing away, or to telling people that this process trains."""
    kind, path = life.operations[at]["kind"], life.operations[at]["path"]
    clearing = kind in ("list", "rename", "load", "read") and "checkpoints" in path
    return set(struck) <= SILENT | {"list", "rename", "read"} and (clearing or path == ".running")


def sample(items, n, seed):
    """n of them, spread over all."""
    items = list(items)
    return [items[(seed + i * len(items)) // n % len(items)] for i in range(n)]


def faulty(life, errors=faults.STRIKES):
    """Every (errno, sticky, operation) that can be."""
    return [
        (error, sticky, one["number"])
        for error in errors
        for sticky in (False, True)
        for one in life.operations
        if one["kind"] in faults.STRIKES[error]
    ]


def test_killed_or_torn(pool, life, tmp_path):
    items = [("kill", at) for at in sample(life.changing(), 6, 3)]
    items += [("tear", at) for at in sample(life.changing(tearing=True), 3, 1)]
    pool.each("kills and torn writes at an operation", killing(life, tmp_path), items)


def test_failed(pool, life, tmp_path):
    pool.each("failed operations", failing(life, tmp_path), sample(faulty(life), 10, 5))


@pytest.mark.torture
def test_full_killed_or_torn(pool, life, tmp_path):
    items = [("kill", at) for at in life.changing()] + [("tear", at) for at in life.changing(tearing=True)]
    pool.each("kills and torn writes at an operation", killing(life, tmp_path), items)


@pytest.mark.torture
@pytest.mark.parametrize("error", faults.STRIKES)
def test_full_failed(pool, life, tmp_path, error):
    pool.each(f"operations that failed with {error}", failing(life, tmp_path), faulty(life, [error]))
