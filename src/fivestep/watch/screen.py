"""Where the figures appear: a terminal, a notebook's cell, or plain text (a file, a pipe).

Each kind has `write` for what stays, `refresh` for what changes in place, and says how often that is worth its cost.
Owns rich, which is imported without a trace: its import draws from Python's global generator, which is the user's.
Colours are the terminal's own (magenta, and bold or dim text), so that they can be read on dark and on light; rich
leaves them out under NO_COLOR.
"""

import html
import os
import random
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any, Protocol

_state = random.getstate()

from rich import console as _console  # noqa: E402
from rich.console import Group  # noqa: E402
from rich.live import Live  # noqa: E402
from rich.text import Text  # noqa: E402

random.setstate(_state)

from fivestep.errors import visible  # noqa: E402

__all__ = ["Console", "Line", "Screen", "screen_of"]
BAR_STYLE = "magenta"
lost_output: list[OSError] = []  # why standard output could not be written
Line = str | tuple[str, str]  # text, or text and its style


class Console(_console.Console):
    """rich's console, on a stream that may be lost."""

    def __init__(self, *arguments: Any, file: Any = None, **options: Any):
        stream: Any = Lasting(sys.stdout if file is None else file)
        super().__init__(*arguments, file=stream, **options)

    def print(self, *objects: Any, **options: Any) -> None:
        """Print text with its control characters escaped, and other objects as rich does."""
        super().print(*[visible(one) if isinstance(one, str) else one for one in objects], **options)


class Lasting:
    """A text stream that falls silent where it cannot be written (a closed pipe, a full disk): training goes on."""

    def __init__(self, stream: Any):
        self.stream = stream  # None where the process has no standard output at all

    def write(self, text: str) -> int:
        """All of `text`, or nothing from the first failure on."""
        with self.surviving():
            if self.stream is not None:
                self.stream.write(text)
        return len(text)

    def flush(self) -> None:
        """The same for what is still in a buffer."""
        with self.surviving():
            if self.stream is not None:
                self.stream.flush()

    @contextmanager
    def surviving(self) -> Iterator[None]:
        """A stream that fails is given up; what it still holds goes nowhere, at the process's end too."""
        try:
            yield
        except OSError as error:
            if self.stream is sys.stdout:
                lost_output.append(error)
            with suppress(OSError, ValueError, AttributeError):
                os.dup2(os.open(os.devnull, os.O_WRONLY), self.stream.fileno())
            self.stream = None

    def isatty(self) -> bool:
        """Whether it is a terminal, still."""
        return self.stream is not None and self.stream.isatty()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)


class Screen(Protocol):
    """What a watcher draws on."""

    first: float  # seconds until the first refresh
    every: float  # seconds between two of them
    long: bool  # whether there is room for a bar and a second line

    @property
    def width(self) -> int:
        """Columns."""
        ...

    def write(self, line: str, bold: bool = False) -> None:
        """A line that stays."""
        ...

    def refresh(self, share: float | None, lines: list[str], below: Sequence[Line]) -> None:
        """What is so now: the share of the run that is done, lines about it, and text below them."""
        ...

    def close(self) -> None:
        """Leave only what stays."""
        ...


class Terminal:
    """The bar and its lines at the bottom, redrawn in place a few times a second, without a thread."""

    first, every, long = 0.0, 0.25, True

    def __init__(self, console: Console):
        self.console = console
        # Transient: the bar goes when training ends, the table stays.
        self.live = Live(console=console, auto_refresh=False, transient=True, vertical_overflow="ellipsis")

    @property
    def width(self) -> int:
        """Columns, less those of the `^C` that a terminal echoes."""
        return self.console.width - 3

    def write(self, line: str, bold: bool = False) -> None:
        """Above the bar."""
        self.console.print(line, style="bold" if bold else "", markup=False, highlight=False, soft_wrap=True)

    def refresh(self, share: float | None, lines: list[str], below: Sequence[Line]) -> None:
        """Draw the bar, in what room the first line leaves, the lines and the text below."""
        room = min(self.width - len(lines[0]) - 2, 60)
        drawn = [Text(visible(line), no_wrap=True, overflow="crop") for line in lines]
        if share is not None and room >= 5:
            full, empty = ("━", "─") if self.console.encoding.startswith("utf") else ("#", "-")
            done = round(share * room)
            drawn[0] = Text.assemble(
                (full * done, BAR_STYLE), (empty * (room - done), "dim"), "  ", visible(lines[0])
            )
        if below and self.console.height >= len(lines) + len(below) + 4:
            styled = [(line, "dim") if isinstance(line, str) else line for line in below]
            drawn += [Text(visible(line)[: self.width], style=style, no_wrap=True) for line, style in styled]
        self.live.start()
        self.live.update(Group(*drawn), refresh=True)

    def close(self) -> None:
        """Take the bar away."""
        self.live.stop()


class Paper:
    """No terminal (a file, a pipe, a log): nothing can be redrawn, so a plain line now and then."""

    first, every, long = 10.0, 30.0, False

    def __init__(self, console: Console):
        self.console = console
        self.below: Sequence[Line] = []

    @property
    def width(self) -> int:
        """Columns: COLUMNS, or 80."""
        return self.console.width

    def write(self, line: str, bold: bool = False) -> None:
        """A line, whole."""
        self.console.print(line, markup=False, highlight=False, soft_wrap=True)

    def refresh(self, share: float | None, lines: list[str], below: Sequence[Line]) -> None:
        """The lines as one, and the text below where it is new."""
        self.write("  ".join(lines))
        for line in below if below != self.below else []:
            self.write(text_of(line))
        self.below = below

    def close(self) -> None:
        """Nothing to take away."""


class Notebook:
    """One output of a cell, replaced as a whole: the lines that stay, then the bar."""

    first, every, long = 0.0, 1.0, True
    width = 120

    def __init__(self) -> None:
        self.handle: Any = None
        self.kept: list[tuple[str, bool]] = []

    def write(self, line: str, bold: bool = False) -> None:
        """A line of the table."""
        self.kept.append((line, bold))
        self.show(None, [])

    def refresh(self, share: float | None, lines: list[str], below: Sequence[Line]) -> None:
        """Replace the output."""
        self.show(share, [*lines, *map(text_of, below)])

    def show(self, share: float | None, lines: list[str]) -> None:
        """Send both forms, HTML and plain text; no colours of our own, so any theme will do."""
        from IPython.display import display  # here only: a notebook has it

        plain = "\n".join([line for line, _ in self.kept] + lines)
        rows = [f"<b>{html.escape(line)}</b>" if bold else html.escape(line) for line, bold in self.kept]
        bar = f'<progress value="{share:.4f}" max="1" style="width: 30em"></progress>\n' if share is not None else ""
        text = "\n".join([*rows, bar + html.escape("\n".join(lines))] if lines else rows)
        page = {"text/plain": plain, "text/html": f'<pre style="line-height: 1.4">{text}</pre>'}
        if self.handle is None:
            self.handle = display(page, raw=True, display_id=True)  # type: ignore[no-untyped-call]
        else:
            self.handle.update(page, raw=True)

    def close(self) -> None:
        """Take the bar away."""
        if self.handle is not None:
            self.show(None, [])


def text_of(line: Line) -> str:
    """A line without its style."""
    return line if isinstance(line, str) else line[0]


def screen_of(console: Console) -> Screen:
    """The kind of screen that `console` writes to."""
    if console.is_jupyter:
        return Notebook()
    return Terminal(console) if console.is_terminal and not console.is_dumb_terminal else Paper(console)
