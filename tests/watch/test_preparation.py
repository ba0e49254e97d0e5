import io

import pytest

from fivestep.watch.preparation import preparation_shown, size
from fivestep.watch.screen import Console


def shown(terminal, seconds):
    """What stands on the screen after two stages of ten reports, `seconds` apart."""
    console = Console(file=io.StringIO(), force_terminal=terminal, width=100)
    now = 0.0
    with preparation_shown(console, clock=lambda: now) as report:
        for stage in ("reading", "encoding"):
            for part in range(1, 11):
                now += seconds
                report(stage, part * 100_000, 1_000_000)
    return console.file.getvalue()


@pytest.mark.parametrize("terminal", [False, True])
def test_a_short_preparation_shows_nothing(terminal):
    assert shown(terminal, 0.04) == ""


def test_without_a_terminal_there_is_a_line_a_stage():
    assert shown(False, 1) == "reading: 1.0 MB\nencoding: 1.0 MB\n"


def test_on_a_terminal_there_is_a_bar_that_goes_away():
    text = shown(True, 1)
    assert "reading" in text and "500.0 kB of 1.0 MB" in text and "1.0 MB of 1.0 MB" in text
    assert text.endswith("\x1b[2K") or "\x1b[?25h" in text  # the line is cleared, the cursor back


def test_sizes():
    assert [size(n) for n in (7, 7_000, 1_234_567, 1_234_000_000)] == ["7 B", "7.0 kB", "1.2 MB", "1.2 GB"]
