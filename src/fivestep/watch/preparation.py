"""What a person sees while a text is prepared: nothing for the first second, then a bar, or a line for each stage.

Owns the screen during preparations; decides nothing. Where the output is no terminal there is no bar, only lines.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from time import perf_counter

from fivestep.watch.screen import BarColumn, Console, TextColumn, TimeRemainingColumn
from fivestep.watch.screen import Progress as Bar

SHORT_SECONDS = 1.0  # a preparation that takes no longer shows nothing
REDRAW_SECONDS = 0.1


@contextmanager
def preparation_shown(console: Console, clock: Callable[[], float] = perf_counter) -> Iterator[Callable[..., None]]:
    """A function to call with (stage, done_bytes, total_bytes), shown on `console` until the block ends."""
    bar = Bar(
        TextColumn("{task.description}"),
        BarColumn(bar_width=15),
        TextColumn("{task.fields[figures]}"),
        TextColumn("left"),
        TimeRemainingColumn(),
        console=console,
        auto_refresh=False,
        transient=True,
        disable=not console.is_terminal,
    )
    task, shown, next_redraw = bar.add_task("", figures=""), "", clock() + SHORT_SECONDS

    def report(stage: str, done_bytes: int, total_bytes: int) -> None:
        nonlocal shown, next_redraw
        now = clock()
        if now < next_redraw:
            return
        figures = f"{size(done_bytes)} of {size(total_bytes)}"
        if not console.is_terminal:
            if stage != shown:
                console.print(f"{stage}: {size(total_bytes)}", markup=False, highlight=False, soft_wrap=True)
        else:
            next_redraw = now + REDRAW_SECONDS
            bar.start()
            if stage != shown:
                bar.reset(task, description=stage, total=total_bytes)
            bar.update(task, completed=done_bytes, total=total_bytes, figures=figures, refresh=True)
        shown = stage

    try:
        yield report
    finally:
        bar.stop()


def size(count: int) -> str:
    """`1_234_000_000` -> `1.2 GB` (of 1,000 MB)."""
    for unit, power in (("GB", 9), ("MB", 6), ("kB", 3)):
        if count >= 10**power:
            return f"{count / 10**power:.1f} {unit}"
    return f"{count} B"
