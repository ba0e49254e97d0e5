"""Output that cannot be written, or that a terminal cannot show: training goes on, and says one sentence."""

import io
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import fivestep as fs
from fivestep.data import files
from fivestep.run.metrics import read_rows
from fivestep.watch.screen import Console
from tests.run.cli import fivestep  # noqa: F401  (a fixture)

TEXT = "".join(
    f"ά{i} and {i * 7 % 13} make 世{i + i * 7 % 13}, said the {('cat', 'fox')[i % 2]}.\n" for i in range(400)
)
SMALL = ["train", "bigram", "--data", "text.txt", "--max-iters", "60", "--eval-every", "20", "--sample-tokens", "40"]


@pytest.fixture(autouse=True)
def text(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.txt").write_text(TEXT)


def started(*arguments, **options):
    environment = {**os.environ, "PYTHONPATH": str(Path(fs.__file__).parents[1]), "OMP_NUM_THREADS": "1"}
    environment |= {"PYTHONUNBUFFERED": ""} | options.pop("env", {})
    command = [sys.executable, "-m", "fivestep", *arguments]
    return subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment, **options)


@pytest.mark.multiprocess
def test_training_outlives_its_reader():
    process = started(*SMALL, stdout=subprocess.PIPE)
    process.stdout.readline()
    process.stdout.close()
    assert process.wait(timeout=300) == 0, process.stderr.read()
    assert process.stderr.read() == ""
    rows = read_rows(Path("runs/bigram-1/metrics.jsonl"))
    assert [row["step"] for row in rows if row["split"] == "val"] == [20, 40, 60]


@pytest.mark.multiprocess
@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no /dev/full")
def test_training_outlives_a_full_disk_for_its_log():
    with Path("/dev/full").open("w") as full:
        process = started(*SMALL, stdout=full)
        assert process.wait(timeout=300) == 1
    assert process.stderr.read().count("standard output cannot be written") == 1
    assert fs.load("runs/bigram-1").step == 60


@pytest.mark.multiprocess
@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no /dev/full")
@pytest.mark.parametrize(
    "arguments", [["--help"], ["completion", "bash"], ["runs"], ["explain", "bigram", "--data", "text.txt"]]
)
def test_an_answer_that_nobody_got_is_an_error(arguments):
    with Path("/dev/full").open("w") as full:
        process = started(*arguments, stdout=full)
        assert process.wait(timeout=60) == 1
    assert process.stderr.read() == "fivestep: standard output cannot be written: No space left on device\n"
    closed = subprocess.run(
        ["bash", "-c", 'exec "$@" >&-', "bash", sys.executable, "-m", "fivestep", *arguments],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(Path(fs.__file__).parents[1])},
    )
    assert (closed.returncode, closed.stderr.count("standard output is closed")) == (1, 1)


@pytest.mark.multiprocess
def test_a_forecast_that_nobody_got_is_an_error():
    process = started(*SMALL, "--dry-run", stdout=subprocess.PIPE)
    process.stdout.close()
    assert (process.wait(timeout=300), process.stderr.read()) == (1, "")


@pytest.mark.multiprocess
def test_any_alphabet_on_an_ascii_terminal():
    with Path("out.txt").open("w") as out:
        process = started(*SMALL, stdout=out, env={"PYTHONIOENCODING": "ascii"})
        assert process.wait(timeout=300) == 0, process.stderr.read()
    shown = Path("out.txt").read_text()
    assert "\\u4e16" in shown or "\\u03ac" in shown
    assert "more text: fivestep sample" in shown


@pytest.mark.multiprocess
def test_ctrl_c_while_it_loads_shows_no_traceback():
    process = started(*SMALL, stdout=subprocess.PIPE)
    maps, deadline = Path(f"/proc/{process.pid}/maps"), time.monotonic() + 300
    time.sleep(0.4)
    while maps.exists() and "libtorch" not in maps.read_text() and time.monotonic() < deadline:
        time.sleep(0.01)  # a busy machine needs longer until it loads torch
    process.send_signal(signal.SIGINT)
    code = process.wait(timeout=300)
    assert code in (-signal.SIGINT, 130)
    assert "Traceback" not in process.stderr.read()
    process.stdout.close()


def test_a_console_without_a_stream_is_silent():
    class Closed(io.StringIO):
        def write(self, text):
            raise OSError(28, "No space left on device")

    console = Console(file=Closed())
    console.print("nobody reads this")
    console.print("nor this")
    assert not console.file.isatty()


def test_a_full_disk_at_the_start_of_a_run(fivestep, monkeypatch):  # noqa: F811
    done = fivestep(*SMALL)  # the token file is in the cache now
    assert done.code == 0
    before = sorted(Path("runs").rglob("*"))

    def full(path):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files, "sync_folder", full)
    done = fivestep(*SMALL)
    assert (done.code, done.err.count("\n")) == (2, 1)
    assert "No space left on device" in done.err
    assert sorted(Path("runs").rglob("*")) == before


def test_a_directory_of_oddities(fivestep):  # noqa: F811
    assert fivestep(*SMALL).code == 0
    odd = Path("runs/odd\x1b[31m\nname")
    odd.mkdir()
    (odd / "metrics.jsonl").write_text(
        '{"split": "val", "step": 1, "loss": 1e999}\n{"split": "val", "step": 2, "loss": 3}\n'
    )
    os.mkfifo(odd / "environment.json")
    out = fivestep("runs").out
    assert "\x1b" not in out
    assert "odd" in out
    found = [json.loads(line, parse_constant=pytest.fail) for line in fivestep("runs", "--json").out.splitlines()]
    assert [run["best_val_loss"] for run in found if run["path"].startswith("runs/odd")] == [3]
