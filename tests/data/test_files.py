import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest

from fivestep.data import files
from fivestep.data.files import written_whole
from fivestep.errors import UsageError


def test_the_file_appears_at_the_end_and_nothing_else_stays(tmp_path):
    path = tmp_path / "new" / "file"
    with written_whole(path) as file:
        file.write(b"abc")
        assert not path.exists()
    assert path.read_bytes() == b"abc"
    assert [entry.name for entry in path.parent.iterdir()] == ["file"]


def test_an_error_leaves_the_old_file_and_no_part(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"old")
    with pytest.raises(KeyboardInterrupt), written_whole(path) as file:
        file.write(b"half")
        raise KeyboardInterrupt
    assert path.read_bytes() == b"old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize("broken", ["fsync", "replace"])
def test_a_failing_disk_leaves_no_part(tmp_path, monkeypatch, broken):
    def fail(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os if broken == "fsync" else type(tmp_path), broken, fail)
    with pytest.raises(OSError, match="No space"), written_whole(tmp_path / "file") as file:
        file.write(b"x")
    assert not list(tmp_path.iterdir())


def test_the_mode_is_the_usual_one(tmp_path):
    (tmp_path / "plain").write_bytes(b"")
    with written_whole(tmp_path / "file"):
        pass
    assert (tmp_path / "file").stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_a_part_taken_for_a_leftover_before_it_was_locked_is_begun_anew(tmp_path, monkeypatch):
    real, taken = files.locked, []

    def late(file):
        if len(taken) < 2:  # another process was quicker: it holds the lock, or has removed the part already
            taken.append(file.name)
            Path(file.name).unlink()
            if len(taken) == 2:
                raise BlockingIOError(errno.EAGAIN, "taken")
        return real(file)

    monkeypatch.setattr(files, "locked", late)
    with written_whole(tmp_path / "file") as file:
        file.write(b"abc")
    assert (tmp_path / "file").read_bytes() == b"abc" and len(taken) == 2
    assert [entry.name for entry in tmp_path.iterdir()] == ["file"]


@pytest.mark.multiprocess
def test_several_processes_write_one_file(tmp_path):
    program = f"""
from pathlib import Path
from fivestep.data.files import written_whole
from fivestep.errors import UsageError
for _ in range(400):
    with written_whole(Path({str(tmp_path / "x.json")!r})) as file:
        file.write(b"x" * 100)
"""
    racers = [subprocess.Popen([sys.executable, "-c", program]) for _ in range(3)]
    assert [racer.wait() for racer in racers] == [0, 0, 0]
    assert [entry.name for entry in tmp_path.iterdir()] == ["x.json"]


@pytest.mark.skipif(files.fcntl is None, reason="this system has no flock")
@pytest.mark.parametrize("code", [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP])
def test_without_locks_files_are_written_and_parts_left_alone(tmp_path, monkeypatch, code):
    def refuse(*_):
        raise OSError(code, "no locks here")

    monkeypatch.setattr(files.fcntl, "flock", refuse)
    part = tmp_path / ".file.0.part"
    part.write_bytes(b"another's")
    with written_whole(tmp_path / "file") as file:
        file.write(b"abc")
    assert (tmp_path / "file").read_bytes() == b"abc" and part.exists()


def test_a_link_to_itself_is_no_usable_path(tmp_path):
    (tmp_path / "self.txt").symlink_to("self.txt")
    (tmp_path / "missing.txt").symlink_to("nothing")
    with pytest.raises(UsageError, match="is not a usable path: Too many levels of symbolic links"):
        files.expanded(tmp_path / "self.txt")
    assert files.expanded(tmp_path / "missing.txt") == tmp_path / "missing.txt"
