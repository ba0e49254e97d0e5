"""What is shown: a line a set of rows, titles once, nothing wider than its screen, no bar without a terminal."""

import io
import os
import re
import struct
import sys

import pytest
import torch
from rich.console import Console
from torch import nn

import fivestep as fs
import fivestep.watch.screen as screen
from fivestep.cli import main
from fivestep.loop.clock import Clock, Limit
from fivestep.loop.result import StepResult
from fivestep.loop.state import State
from fivestep.watch.progress import Progress
from fivestep.watch.table import clock_time, fitting_titles, number, short, table_line

TRAIN = {
    "step": 10_000,
    "epoch": 3,
    "split": "train",
    "loss": 2.5,
    "steps": 5,
    "lr": 3e-4,
    "grad_norm": 1.25,
    "tokens_per_second": 1_234_567.8,
    "waiting_share": 0.125,
    "elapsed_seconds": 75.2,
}
VAL = {
    "step": 10_000,
    "epoch": 3,
    "split": "val",
    "loss": 2.25,
    "count": 1000,
    "perplexity": 9.4877,
    "bits_per_char": 3.246,
    "accuracy": 0.9834,
    "elapsed_seconds": 75.2,
}
TITLES = ["step", "epoch", "train", "val", "perplexity", "bits/char", "accuracy", "tokens/s", "time"]


@pytest.fixture
def now(monkeypatch):
    """The time in seconds, for the test to set."""
    import fivestep.watch.progress as module

    times = [1000.0]
    monkeypatch.setattr(module, "perf_counter", lambda: times[0])
    return times


def result_at(step, seconds=0.0, tokens=0, waiting=0.0, epoch=0):
    clock = Clock(step=step, epoch=epoch, samples=step, tokens=tokens, seconds=seconds, waiting=waiting)
    state = State(nn.Linear(1, 1), [], clock=clock)
    return StepResult(step, epoch + 1, torch.tensor(2.5), 1, torch.tensor(1.0), 0.1, state)


def plain(text):
    """Without the terminal's control sequences."""
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text)


def test_table_line():
    assert table_line([TRAIN, VAL]) == {
        "step": "10,000",
        "epoch": "3",
        "train": "2.5000",
        "val": "2.2500",
        "perplexity": "9.49",
        "bits/char": "3.2460",
        "accuracy": "98.34%",
        "tokens/s": "1,234,568",
        "time": "1:15",
        "lr": "0.0003",
        "grad norm": "1.25",
        "waiting": "12%",
    }
    assert table_line([{**VAL, "loss": float("nan")}])["val"] == "nan"
    own = table_line([TRAIN, {**VAL, "f1": 0.5, "name": "x"}])
    assert own["f1"] == "0.5000", "the caller's own metric"
    assert "name" not in own
    assert "count" not in own
    assert "perplexity" not in table_line([{**TRAIN, "perplexity": 12.2}]), "the column is the validation's"


@pytest.mark.parametrize("width, missing", [(40, 6), (60, 3), (80, 1), (200, 0)])
def test_columns_that_do_not_fit_are_left_out(width, missing):
    line = table_line([TRAIN, {**VAL, "perplexity": 1e12}])
    titles = fitting_titles(line, width)
    assert {"step", "train", "val"} <= set(titles)
    assert len([title for title in TITLES if title not in titles]) <= missing
    assert ("waiting" in titles) == (width == 200)
    if width == 80:
        assert "lr" not in titles


def test_titles_once_and_no_wrap():
    for width in (50, 80, 200):
        shown = io.StringIO()
        progress = Progress(10, Console(file=shown, width=width))
        for _ in range(2):
            progress.write([TRAIN, {key: value for key, value in VAL.items() if key != "accuracy"}])
        progress.write([{key: value for key, value in TRAIN.items() if key != "tokens_per_second"}])
        progress.close()
        lines = shown.getvalue().splitlines()
        assert len(lines) == 4, "titles, and three rows: one with fewer figures keeps the columns"
        assert all(len(line.rstrip()) <= width for line in lines)
        assert lines[3].split()[0] == "10,000"
        assert len(lines[3]) == len(lines[0])


def test_titles_again_where_a_figure_is_new():
    shown = io.StringIO()
    progress = Progress(10, Console(file=shown, width=80))
    progress.write([TRAIN])
    progress.write([TRAIN, VAL])
    assert [line.split()[0] for line in shown.getvalue().splitlines()] == ["step", "10,000", "step", "10,000"]


def test_plain_lines_come_by_time(now):
    """Without a terminal: the first after 10 seconds, then one every 30."""
    shown = io.StringIO()
    progress = Progress(2000, Console(file=shown, width=80))
    told = []
    for step in range(1, 101):
        now[0] += 1.0
        progress(result_at(step, seconds=step, tokens=4000 * step, waiting=step / 50), [VAL] if step == 15 else [])
        told.append(shown.getvalue().count("loss"))
    assert [step for step in range(2, 101) if told[step - 1] > told[step - 2]] == [10, 40, 70, 100]
    lines = [line for line in shown.getvalue().splitlines() if "loss" in line]
    assert lines[0] == "10/2,000  epoch 1  loss 2.500  4.0k tok/s  wait 2%  33:10 left"
    assert lines[1] == "40/2,000  epoch 1  loss 2.500  val 2.250  4.0k tok/s  wait 2%  32:40 left"
    assert all(len(line) < 80 for line in shown.getvalue().splitlines())
    assert "\x1b" not in shown.getvalue()


@pytest.mark.parametrize("until, share", [("100tok", 0.4), ("200s", 0.05), ("1000smp", 0.01), (None, 0.01)])
def test_the_share_that_is_done(until, share):
    progress = Progress(1000, Console(file=io.StringIO()), Limit(None, 1000, until))
    assert progress.share(result_at(10, seconds=10.0, tokens=40).state.clock) == pytest.approx(share)
    assert Progress(None, Console(file=io.StringIO())).share(Clock(step=3)) is None


@pytest.mark.parametrize("width", [30, 80, 200])
@pytest.mark.parametrize("total", [None, 6, 1_000_000])
def test_a_bar_on_a_terminal(now, width, total):
    shown = io.StringIO()
    progress = Progress(total, Console(file=shown, force_terminal=True, width=width, height=30))
    progress(result_at(1, 1.0, 4000), [])
    now[0] += 10
    progress.show_sample(5, "a line of text that is longer than a narrow terminal has columns " * 3 + "\n\nmore")
    progress(result_at(6, 10.0, 24_000, 5.0), [TRAIN, VAL])
    progress.close()
    text = plain(shown.getvalue())
    lines = [line for line in re.split(r"[\r\n]+", text) if line]
    assert any("loss 2.500" in line for line in lines)
    if width >= 80:
        assert any("val 2.250" in line and "wait 56%" in line for line in lines)
    assert any(line.startswith("sample of step 5") for line in lines)
    assert max(map(len, lines)) <= width - (0 if width > 30 else -20)
    assert all(len(line) <= width for line in lines if "loss" in line or "sample" in line or "of text" in line)
    assert "\x1b[?25h" in shown.getvalue(), "the cursor is shown again"
    assert ("━" in text or "─" in text) == (total is not None)


@pytest.mark.parametrize("setting", [None, "NO_COLOR"])
def test_colours_of_the_terminals_own(now, monkeypatch, setting):
    """Magenta, bold and dim only: readable on dark and on light; NO_COLOR leaves the magenta out."""
    monkeypatch.delenv("NO_COLOR", raising=False)
    if setting:
        monkeypatch.setenv(setting, "1")
    shown = io.StringIO()
    progress = Progress(6, Console(file=shown, force_terminal=True, width=80, color_system="truecolor"))
    progress(result_at(3, 1.0, 4000), [TRAIN, VAL])
    now[0] += 10
    progress(result_at(5, 2.0, 8000), [])
    progress.close()
    codes = set(re.findall(r"\x1b\[([0-9;]+)m", shown.getvalue()))
    assert codes <= {"0", "1", "2", "35"}
    assert ("35" in codes) == (setting is None)


def test_through_fit(monkeypatch):
    shown = io.StringIO()
    model = nn.Linear(2, 1)
    batches = [(torch.randn(4, 2), torch.randn(4, 1))] * 3
    progress = Progress(6, Console(file=shown, force_terminal=True, width=80))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    history = fs.fit(model, batches, nn.MSELoss(), optimizer, epochs=2, progress=progress)
    assert "1/6" in shown.getvalue()
    assert all(0 <= row["waiting_share"] <= 1 for row in history if row["split"] == "train")


def test_waiting_is_counted():
    """A loader that takes long: most of the seconds are spent on waiting for it."""
    from time import sleep

    def slow():
        for _ in range(5):
            sleep(0.02)
            yield torch.randn(4, 2), torch.randn(4, 1)

    model = nn.Linear(2, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for result in fs.train(model, slow(), nn.MSELoss(), optimizer, max_iters=5):
        clock = result.state.clock
    assert 0.1 <= clock.waiting <= clock.seconds


@pytest.mark.multiprocess
@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
@pytest.mark.parametrize("width", [80, 200])
def test_a_real_terminal(tmp_path, width):
    """Through a pty: no line is wider than the terminal, and what stays is the table."""
    pty = pytest.importorskip("pty")
    fcntl = pytest.importorskip("fcntl")
    termios = pytest.importorskip("termios")
    pid, terminal = pty.fork()  # the child has torch imported already
    if pid == 0:
        code = 1
        try:
            os.chdir(tmp_path)
            os.environ.pop("COLUMNS", None)
            os.environ["TERM"] = "xterm-256color"
            fcntl.ioctl(1, termios.TIOCSWINSZ, struct.pack("HHHH", 40, width, 0, 0))
            sys.stdin, sys.stdout, sys.stderr = open(0), open(1, "w"), open(2, "w")  # noqa: SIM115
            screen.Terminal.every = 0.0
            main(["train", "regression", "--epochs", "3", "--threads", "1"])
            code = 0
        finally:
            os._exit(code)
    written = b""
    while True:
        try:
            part = os.read(terminal, 65536)
        except OSError:  # Linux: the other end is closed
            break
        if not part:
            break
        written += part
    os.close(terminal)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0, written.decode()
    text = written.decode()
    lines = re.split(r"[\r\n]+", plain(text))
    assert max(map(len, lines)) <= width
    assert any("smp/s" in line and "wait" in line for line in lines)
    assert "\x1b[?25h" in text, "the cursor is shown again"
    assert len([line for line in lines if line.split()[:3] == ["step", "epoch", "train"]]) == 1
    assert any("waiting" in line for line in lines if "epoch" in line and "train" in line) == (width == 200)


def test_numbers_and_times():
    assert [clock_time(seconds) for seconds in (0.4, 59.6, 3600, 3725)] == ["0:00", "1:00", "1:00:00", "1:02:05"]
    given = (0.04, 3.14, 41.2, 999.6, 1000, 41_234, 412_340, 1.5e6)
    assert [short(value) for value in given] == ["0.0", "3.1", "41", "1.0k", "1.0k", "41.2k", "412k", "1.5M"]
    assert [number(value) for value in (2.25, -1e-7, 123456.7, float("inf"))] == [
        "2.2500",
        "0.0000",
        "1.235e+05",
        "inf",
    ]
