"""Rows as text: the columns of the table, their order, and which of them a width has room for.

Pure: rows and widths in, text out. Prints nothing.
"""

from collections.abc import Iterable, Mapping
from typing import Any

# Figures of a row that have a column of their own: name -> title, format.
FIGURES = {
    "perplexity": ("perplexity", "{:.2f}"),
    "bits_per_char": ("bits/char", "{:.4f}"),
    "accuracy": ("accuracy", "{:.2%}"),
}
STANDARD = {"step", "epoch", "split", "loss", "elapsed_seconds", "annealing", *FIGURES}  # every row has them, or may
# Where there is no room for all, the first of these go first.
DISPENSABLE = ("waiting", "grad norm", "lr", "tokens/s", "samples/s", "epoch", "time", "bits/char", "perplexity")
GAP = 2


def table_line(rows: list[dict[str, Any]]) -> dict[str, str]:
    """One line for the rows of one step: column title -> text. The figures beside the losses are the validation's."""
    by_split = {row["split"]: row for row in rows}
    last, train = rows[-1], by_split.get("train", {})
    line = {"step": f"{last['step']:,}"} | ({"epoch": str(last["epoch"])} if "epoch" in last else {})
    line |= {split: number(row["loss"]) for split, row in by_split.items()}
    line |= figures_of(by_split["val"]) if "val" in by_split else {}
    for name, value in train.items():
        if name.endswith("_per_second"):
            line[name.replace("_per_second", "/s")] = f"{value:,.0f}" if value < 1e7 else f"{value:.3g}"
    if "elapsed_seconds" in last:
        line["time"] = clock_time(last["elapsed_seconds"])
    for name, title in (("lr", "lr"), ("grad_norm", "grad norm")):
        if name in train:
            line[title] = f"{train[name]:.3g}"
    if "waiting_share" in train:
        line["waiting"] = f"{train['waiting_share']:.0%}"
    return line


def figures_of(row: Mapping[str, Any]) -> dict[str, str]:
    """The figures beside the loss of an evaluation, the caller's own metrics too: title -> text."""
    figures = {}
    for name, (title, form) in FIGURES.items():
        if name in row:
            figures[title] = form.format(row[name]) if not row[name] >= 1e5 else f"{row[name]:.3g}"
    own = [name for name in row if name not in STANDARD and name != "count" and isinstance(row[name], float)]
    return figures | {name: number(row[name]) for name in own}


def number(value: float) -> str:
    """Four decimals; four digits where that would be long."""
    return f"{value:z.4f}" if not abs(value) >= 1000 else f"{value:.4g}"


def counted(n: int, thing: str) -> str:
    """`1 tensor`, `800 rows`."""
    return f"{n:,} {thing}{'' if n == 1 else 's'}"


def column_width(title: str, text: str) -> int:
    """Of a column; all of the usual ones together fit 80."""
    least = 5 if title == "epoch" else 7
    return max(least, len(title), len(text)) + GAP


def fitting_titles(line: Mapping[str, str], width: int) -> list[str]:
    """The titles of `line` that fit `width` columns together; the most dispensable are left out."""
    titles = list(line)
    for dispensable in (*DISPENSABLE, *reversed([title for title in titles if title not in DISPENSABLE])):
        if sum(column_width(title, line[title]) for title in titles) <= width:
            break
        if dispensable in titles and len(titles) > 1:
            titles.remove(dispensable)
    return titles


def fitted(parts: Iterable[str], width: int, dispensable: Iterable[int] = ()) -> str:
    """`parts` side by side; where they do not fit, those at the indices `dispensable` are left out in turn."""
    kept = dict(enumerate(parts))
    for index in dispensable:
        if sum(map(len, kept.values())) + GAP * (len(kept) - 1) <= width:
            break
        kept.pop(index, None)
    return (" " * GAP).join(kept.values())[:width]


def clock_time(seconds: float) -> str:
    """`75.2` -> `1:15`; hours where there are any."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def short(value: float) -> str:
    """`41234` -> `41.2k`: three digits and a scale."""
    for scale, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= 0.9995 * scale:
            return f"{value / scale:.{0 if value >= 99.95 * scale else 1}f}{letter}"
    return f"{value:.0f}" if value >= 9.95 else f"{value:.1f}"
