"""What a person sees while it trains: a bar, and a table with a line for each set of rows.

A watcher: called with every step's result, it compares two times and returns, unless a redraw is due; only then it
reads the device. On a terminal that is four times a second, in a notebook once, and where nothing can be redrawn
(a file, a pipe) it writes a plain line after 10 seconds and then every 30. Owns what is shown; decides nothing.
"""

import math
from collections import deque
from dataclasses import replace
from time import perf_counter
from typing import Any

from fivestep.loop.clock import Clock, Limit
from fivestep.loop.result import StepResult
from fivestep.watch.lens import Strips
from fivestep.watch.screen import Console, Line, screen_of
from fivestep.watch.table import DISPENSABLE, clock_time, column_width, fitted, fitting_titles, short, table_line

RECENT = 20  # redraws that rates are taken over
SAMPLE_LINES = 4


class Progress:
    """The bar over `total_steps` updates (None where that is not known) and the table of what was measured.

    `limit` tells how much of a run that ends by tokens or time is done.
    """

    def __init__(self, total_steps: int | None, console: Console | None = None, limit: Limit | None = None):
        self.total_steps, self.limit = total_steps, limit
        self.screen = screen_of(console or Console())
        self.next_redraw = perf_counter() + self.screen.first
        self.begun: tuple[float, float | None] | None = None  # time and share done at the first call
        self.recent: deque[Clock] = deque(maxlen=RECENT)
        self.validation = ""
        self.sample: list[str] = []
        self.strips = Strips()
        self.layers: list[Line] = []  # of the lens, below the bar
        self.widths: dict[str, int] = {}  # of the table's columns, by title

    def __call__(self, result: StepResult, rows: list[dict[str, Any]]) -> None:
        """Redraw the bar if it is time, and write a line if there are rows."""
        if rows:
            self.write(rows)
        now = perf_counter()
        if self.begun is None:
            self.begun = now, self.share(result.state.clock)
        if now >= self.next_redraw:
            self.next_redraw = now + self.screen.every
            self.redraw(result, now)

    def write(self, rows: list[dict[str, Any]]) -> None:
        """A line of the table, under its titles where they change; what it lacks stays blank."""
        validations = [row for row in rows if row["split"] == "val"]
        if validations:
            self.validation = f"val {brief(validations[-1]['loss'])}"
        line, room = table_line(rows), self.screen.width
        titles = fitting_titles(line, room)
        # The columns stay while they hold what matters: a row with fewer figures leaves blanks.
        lacking = [title for title in titles if title not in self.widths and title not in DISPENSABLE]
        narrow = any(len(line.get(title, "")) >= width for title, width in self.widths.items())
        if lacking or narrow or sum(self.widths.values()) > room:
            self.widths = {title: column_width(title, line[title]) for title in titles}
            self.widths["step"] = column_width("step", f"{max(self.total_steps or 0, rows[-1]['step']):,}")
            self.screen.write("".join(f"{title:>{width}}" for title, width in self.widths.items()), bold=True)
        self.screen.write("".join(f"{line.get(title, ''):>{width}}" for title, width in self.widths.items()))
        for row in rows:
            if row.get("event"):
                self.screen.write(f"  {told(row)}")

    def show_sample(self, step: int, text: str) -> None:
        """Keep the first lines of a sample for below the bar."""
        lines = [line.rstrip() for line in text.strip().splitlines() if line.strip()]
        self.sample = [f"sample of step {step:,}:", *(f"  {line}" for line in lines[:SAMPLE_LINES])]
        self.next_redraw = perf_counter()

    def show_layers(self, layers: dict[str, Any]) -> None:
        """A strip a layer for below the bar, where there is one."""
        if self.screen.long:
            self.layers = list(self.strips.lines(layers, self.screen.width))

    def redraw(self, result: StepResult, now: float) -> None:
        """Show what is so now."""
        clock = result.state.clock
        share = self.share(clock)
        total = f"{result.step:,}/{self.total_steps:,}" if self.total_steps else f"step {result.step:,}"
        left = self.left(share, now - (result.state.latch.took if result.state.latch else 0.0))
        since = self.recent[0] if self.recent else Clock()
        self.recent.append(replace(clock))
        loss = float(result.loss)  # HOST READ, once a redraw
        figures = [f"epoch {result.epoch}", f"loss {brief(loss)}", self.validation, *rates(clock, since)]
        if self.screen.long:
            lines = [fitted([total, left], self.screen.width, [1]), line_of(figures, self.screen.width)]
        else:
            lines = [line_of([*figures, left], self.screen.width - len(total) - 2)]
            lines[0] = f"{total}  {lines[0]}"
        self.screen.refresh(share, lines, [*self.layers, *self.sample])

    def share(self, clock: Clock) -> float | None:
        """How much of the run is done, from 0 to 1, where its end is known."""
        ends: list[tuple[str, float]] = [("step", self.total_steps)] if self.total_steps else []
        if self.limit:
            ends += [(unit, end) for unit, end in self.limit.ends if unit not in ("step", "epoch")]
        return max((min(1.0, getattr(clock, unit) / end) for unit, end in ends if end), default=None)

    def left(self, share: float | None, now: float) -> str:
        """The time that the rest will take if it goes on as since the first step, evaluations included."""
        assert self.begun is not None
        then, before = self.begun
        if share is None or before is None or share <= before:
            return ""
        return f"{clock_time((now - then) * (1 - share) / (share - before))} left"

    def close(self) -> None:
        """Take the bar away; the table stays."""
        self.screen.close()


def rates(clock: Clock, since: Clock) -> list[str]:
    """Tokens or samples a second of training, and the share of it spent on waiting for data."""
    seconds = clock.seconds - since.seconds or math.inf  # several processes count a step's with the next
    unit, name = ("tokens", "tok/s") if clock.tokens else ("samples", "smp/s")
    amount = getattr(clock, unit) - getattr(since, unit)
    return [f"{short(amount / seconds)} {name}", f"wait {(clock.waiting - since.waiting) / seconds:.0%}"]


def line_of(figures: list[str], width: int) -> str:
    """The figures that there are, as many as fit: the wait goes first, then the epoch and the rate."""
    wanted = [figure for figure in figures if figure]
    order = [start for name in ("wait", "epoch", "/s") for start, text in enumerate(wanted) if name in text]
    return fitted(wanted, width, order)


def brief(loss: float) -> str:
    """A loss as it is shown beside others: four digits."""
    return f"{loss:.3f}" if not abs(loss) >= 1000 else f"{loss:.3g}"


def told(row: dict[str, Any]) -> str:
    """What a validation brought, for people: `annealed: the learning rate is multiplied by 0.25 from here on`."""
    if "annealing" in row:
        return f"{row['event']}: the learning rate is multiplied by {row['annealing']:.4g} from here on"
    return f"{row['event']}: validation has stopped improving"
