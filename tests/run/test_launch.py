"""Under torchrun a later round goes on with what an earlier one of the same launch began, and with nobody else's."""

import json

import pytest

import fivestep as fs
from fivestep import processes, rounds
from fivestep.run.launch import LAUNCH, begun_before, begun_by_us, mark
from tests.run.cli import fivestep  # noqa: F401  (a fixture)

SMALL = ["train", "regression", "--epochs", "1", "--threads", "1"]


@pytest.fixture
def anew(monkeypatch):
    """`anew(launcher)`: this process is a new round, started by such a launcher."""

    def begin(launcher):
        monkeypatch.setattr(processes, "_alone", rounds.name())
        monkeypatch.setattr(rounds, "launcher", lambda: launcher)

    return begin


def test_who_began_it(tmp_path, anew):
    anew(None)
    mark(tmp_path)
    assert not list(tmp_path.iterdir()), "without torchrun nothing is noted"
    anew("a")
    assert not begun_by_us(tmp_path)
    mark(tmp_path)
    assert begun_by_us(tmp_path) and not begun_before(tmp_path), "this round's own"
    anew("a")
    assert begun_by_us(tmp_path) and begun_before(tmp_path)
    anew("b")
    assert not begun_by_us(tmp_path) and not begun_before(tmp_path)
    anew(None)
    assert not begun_by_us(tmp_path)


def test_one_launcher_in_common_is_enough(tmp_path, anew):
    (tmp_path / LAUNCH).write_text(json.dumps({"round": "x", "launchers": ["a", "b"]}))
    anew("b")
    assert begun_before(tmp_path)


@pytest.mark.parametrize("content", ["", "{", "[]", '{"round": 1}', '{"round": "x", "launchers": 3}', "[" * 100_000])
def test_a_damaged_note_is_nobodys(tmp_path, anew, content):
    anew("a")
    (tmp_path / LAUNCH).write_text(content)
    assert not begun_by_us(tmp_path) and not begun_before(tmp_path)


def test_numbered_runs_are_found_again_in_their_order(tmp_path, anew):
    def names(n):
        return [fs.Run.numbered("mine", tmp_path).path.name for _ in range(n)]

    anew(None)
    assert names(1) == ["mine-1"]  # somebody's
    anew("a")
    assert names(2) == ["mine-2", "mine-3"]
    anew("b")
    assert names(1) == ["mine-4"]
    anew("a")
    assert names(3) == ["mine-2", "mine-3", "mine-5"], "two again, and a third for the first time"


def test_a_command_goes_on_with_its_own_run_only(fivestep, anew, tmp_path):  # noqa: F811
    anew("a")
    assert fivestep(*SMALL, "--run-dir", "mine").code == 0
    anew("a")
    again = fivestep(*SMALL, "--run-dir", "mine")
    assert again.code == 0 and "already ended at step" in again.out + again.err
    anew("b")
    refused = fivestep(*SMALL, "--run-dir", "mine")
    assert refused.code == 2 and "already holds a run" in refused.err
    anew("b")
    refused = fivestep(*SMALL, "--run-dir", "mine")
    assert refused.code == 2, "what was refused is not its own when it is started again"


def test_a_run_that_was_only_just_made_is_gone_on_with(fivestep, anew, tmp_path):  # noqa: F811
    anew("a")
    (tmp_path / "mine").mkdir()
    mark(tmp_path / "mine")
    anew("a")
    assert fivestep(*SMALL, "--run-dir", "mine").code == 0


def test_what_fails_before_its_first_step_leaves_nothing(fivestep, anew, tmp_path, monkeypatch):  # noqa: F811
    def fails(*_):
        raise fs.UsageError("no step can be made")

    anew("a")
    monkeypatch.setattr("fivestep.run.training.train_job", fails)
    assert fivestep(*SMALL).code == 2
    assert not list(tmp_path.glob("runs/*"))
