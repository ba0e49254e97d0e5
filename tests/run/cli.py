"""Run the command line in this process, and see what a user sees."""

from dataclasses import dataclass

import pytest

from fivestep.cli import main


@dataclass
class Outcome:
    code: int
    out: str
    err: str


@pytest.fixture
def fivestep(capsys, tmp_path, monkeypatch):
    """`fivestep("train", "bigram", ...)` in an empty directory -> exit code, stdout, stderr."""
    monkeypatch.chdir(tmp_path)

    def call(*arguments):
        capsys.readouterr()
        try:
            main([str(argument) for argument in arguments])
            code = 0
        except SystemExit as stop:
            code = stop.code
        captured = capsys.readouterr()
        return Outcome(0 if code is None else code, captured.out, captured.err)

    return call
