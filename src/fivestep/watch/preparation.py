"""What a person sees while a text is prepared: nothing for the first second, then a bar, or a line for each stage.

Owns the screen during preparations; decides nothing. Where the output is no terminal there is no bar, only lines.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from time import perf_counter

from fivestep.watch.screen import Console, screen_of

SHORT_SECONDS = 1.0  # a preparation that takes no longer shows nothing
REDRAW_SECONDS = 0.1


@contextmanager
def preparation_shown(console: Console, clock: Callable[[], float] = perf_counter) -> Iterator[Callable[..., None]]:
    """A function to call with (stage, done_bytes, total_bytes), shown on `console` until the block ends."""
    screen, shown, next_redraw = screen_of(console), "", clock() + SHORT_SECONDS

    def report(stage: str, done_bytes: int, total_bytes: int) -> None:
        nonlocal shown, next_redraw
        now = clock()
        if now < next_redraw or (not screen.long and stage == shown):
            return
        shown, next_redraw = stage, now + (REDRAW_SECONDS if screen.long else 0.0)
        figures = f"{size(done_bytes)} of {size(total_bytes)}" if screen.long else size(total_bytes)
        screen.refresh(done_bytes / max(1, total_bytes), [f"{stage}: {figures}"], [])

    try:
        yield report
    finally:
        screen.close()


def size(count: int) -> str:
    """`1_234_000_000` -> `1.2 GB` (of 1,000 MB)."""
    for unit, power in (("GB", 9), ("MB", 6), ("kB", 3)):
        if count >= 10**power:
            return f"{count / 10**power:.1f} {unit}"
    return f"{count} B"
