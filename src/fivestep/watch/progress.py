"""What a person sees while it trains: a bar, and a table with a line for each set of rows.

A watcher: called with every step's result, it reads the device only when it redraws, a few times a second. Owns the
screen; decides nothing. Where the output is no terminal there is no bar, only the table.
"""

from time import perf_counter
from typing import Any

from fivestep.loop.step import StepResult
from fivestep.watch.screen import (
    BarColumn,
    Console,
    MofNCompleteColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from fivestep.watch.screen import Progress as Bar

REDRAW_SECONDS = 0.25
# Figures of a row that have a column of their own: name -> title, format.
FIGURES = {
    "perplexity": ("perplexity", "{:.2f}"),
    "bits_per_char": ("bits/char", "{:.4f}"),
    "accuracy": ("accuracy", "{:.2%}"),
}


class Progress:
    """The bar over `total_steps` updates (None where that is not known) and the table of what was measured."""

    def __init__(self, total_steps: int | None, console: Console | None = None):
        self.console = console or Console()
        self.next_redraw = 0.0
        self.titles: list[str] = []
        self.bar = Bar(
            TextColumn("step"),
            MofNCompleteColumn(),
            BarColumn(bar_width=15),  # leaves room for the "^C" that a terminal echoes
            TextColumn("{task.fields[figures]}"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=self.console,
            auto_refresh=False,  # no thread of its own beside the training
            transient=True,
            disable=not self.console.is_terminal,
        )
        self.task = self.bar.add_task("training", total=total_steps, figures="")

    def __call__(self, result: StepResult, rows: list[dict[str, Any]]) -> None:
        """Redraw the bar if it is time, and write a line if there are rows."""
        if rows:
            self.write(table_line(rows))
        now = perf_counter()
        if self.bar.disable or now < self.next_redraw:
            return
        self.next_redraw = now + REDRAW_SECONDS
        self.bar.start()
        figures = f"epoch {result.epoch}  loss {float(result.loss):.4f}"  # HOST READ, once in REDRAW_SECONDS
        self.bar.update(self.task, completed=result.step, figures=figures, refresh=True)

    def write(self, line: dict[str, str]) -> None:
        """A line of the table, under its titles where it has new ones; what it lacks stays blank."""
        if not set(line) <= set(self.titles):
            self.titles = list(line)
            self.console.print(
                "".join(f"{title:>{width(title)}}" for title in line), style="bold", highlight=False, soft_wrap=True
            )
        self.console.print(
            "".join(f"{line.get(title, ''):>{width(title)}}" for title in self.titles),
            highlight=False,
            soft_wrap=True,
        )

    def close(self) -> None:
        """Take the bar away; the table stays."""
        self.bar.stop()


def width(title: str) -> int:
    """Of a column; all of them together fit 80."""
    return max(len(title), 7) + 2


def table_line(rows: list[dict[str, Any]]) -> dict[str, str]:
    """One line for the rows of one step: column title -> text. Figures are the validation's where there is one."""
    by_split = {row["split"]: row for row in rows}
    last = rows[-1]
    line = {"step": f"{last['step']:,}"} | ({"epoch": str(last["epoch"])} if "epoch" in last else {})
    line |= {f"{split}": f"{row['loss']:.4f}" for split, row in by_split.items()}
    for name, (title, form) in FIGURES.items():
        if name in last:
            line[title] = form.format(last[name])
    for name, value in by_split.get("train", {}).items():
        if name.endswith("_per_second"):
            line[name.replace("_per_second", "/s")] = f"{value:,.0f}"
    if "elapsed_seconds" in last:
        line["time"] = clock_time(last["elapsed_seconds"])
    return line


def clock_time(seconds: float) -> str:
    """`75.2` -> `1:15`; hours where there are any."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
