"""The sentence on cores that others keep busy: when, and from what."""

import subprocess
import sys
import time

import pytest

from fivestep.run import busy
from fivestep.run.busy import Moment, busy_note, moment

START = Moment(wall=100.0, busy=500.0, ours=20.0, cores=4)


def note(others, threads, seconds=2.0, ours=1.5):
    """After `seconds` in which others used so many cores, and we `ours`."""
    return busy_note(START, Moment(100 + seconds, 500 + (others + ours) * seconds, 20 + ours * seconds, 4), threads)


@pytest.mark.parametrize(
    ("others", "threads", "fewer"),
    [(0.0, 4, None), (0.4, 4, None), (1.2, 4, 2), (3.8, 4, 1), (1.2, 2, None), (3, 2, 1)],
)
def test_it_is_said_where_the_threads_have_no_core_each(others, threads, fewer):
    said = note(others, threads)
    assert (said is None) == (fewer is None)
    if said:
        assert f"other processes keep {others:.1f} of the 4 cores busy" in said and f"--threads {fewer}" in said


def test_what_cannot_be_judged_is_not():
    assert note(4, 1) is None, "one thread waits for none"
    assert note(4, 4, seconds=0.3) is None, "too short"
    assert busy_note(None, START, 4) is None and busy_note(START, None, 4) is None


def test_a_system_that_does_not_tell(monkeypatch, tmp_path):
    monkeypatch.setattr(busy, "STAT", tmp_path / "none")
    assert moment() is None
    (tmp_path / "stat").write_text("cpu0 not numbers\n")
    monkeypatch.setattr(busy, "STAT", tmp_path / "stat")
    assert moment() is None


@pytest.mark.skipif(moment() is None, reason="the system does not tell")
def test_ours_and_that_of_others_are_told_apart():
    spin = "import time\nwhile time.process_time() < 0.3: pass"
    before = moment()
    other = subprocess.Popen([sys.executable, "-c", spin])  # another's, until it is waited for
    end = time.process_time() + 0.3
    while time.process_time() < end:
        pass
    now = moment()
    assert now.ours - before.ours >= 0.25
    assert now.busy - before.busy >= now.ours - before.ours - 0.1, "ours is a part of it"
    other.wait()
    assert moment().ours - now.ours >= 0.2, "a child that was waited for is ours"
