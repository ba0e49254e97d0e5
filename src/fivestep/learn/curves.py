"""Losses of several runs as curves: in a terminal, in an HTML file of its own, as PNG.

Owns the pictures; points and words are `compare.py`'s. The HTML is written here, with inline SVG: no script, no
network, no library. plotext draws in the terminal and matplotlib the PNG: both are the extra `plot`, imported where
they are used. Imports no torch.
"""

import html
import math
from collections.abc import Sequence
from io import BytesIO
from pathlib import Path
from statistics import median

from fivestep.data.files import expanded, write_durably
from fivestep.errors import FivestepError, UsageError
from fivestep.extras import installing
from fivestep.learn.compare import AXES, SPLITS, Comparison, Side, along, in_lines

SUFFIXES = (".html", ".png")
# Told apart by people who see colours otherwise too, on dark and on light (Okabe and Ito 2008).
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
DASHES = ("", "7 3", "2 3", "9 3 2 3", "12 4")  # another one each time that the colours begin anew
UNITS = {"step": "steps", "tokens": "tokens", "samples": "samples", "seconds": "seconds of training"}
WIDTH, HEIGHT = 760, 360  # of a chart, in pixels
LEFT, RIGHT, TOP, BOTTOM = 64, 20, 34, 44
FAR = 10  # a loss beyond so many times the median is out of the picture

Curve = list[tuple[float, float]]


def check_out(path: str | Path) -> Path:
    """Where a page or picture is to be written. Raises UsageError for another kind, and where PNG cannot be drawn."""
    place = expanded(path)
    if place.suffix.lower() not in SUFFIXES:
        raise UsageError(f"--out {path} must end in .html (a page, tables included) or .png (the curves)")
    if place.is_dir():
        raise UsageError(f"--out {path} is a directory; give a file in it")
    if not place.parent.is_dir():
        raise UsageError(f"--out {path}: there is no directory {place.parent}")
    if place.suffix.lower() == ".png":
        try:
            import matplotlib  # noqa: F401
        except ImportError:
            hint = f"{installing('plot')}; a .html file needs nothing"
            raise UsageError(f"--out {path} needs matplotlib: {hint}") from None
    return place


def write(found: Comparison, place: Path) -> None:
    """Write the page or the picture, whole. Raises FivestepError."""
    content = page(found).encode() if place.suffix.lower() == ".html" else picture(found)
    try:
        write_durably(place, content)
    except OSError as error:
        raise FivestepError(f"cannot write {place}: {error.strerror or error}") from error


def axes_of(sides: Sequence[Side]) -> list[str]:
    """The axes along which every run with a loss can be drawn."""
    drawn = [side for side in sides if any(side.curves.values())]
    return [axis for axis in AXES if drawn and all(curve_of(side, axis) for side in drawn)]


def curve_of(side: Side, axis: str) -> dict[str, Curve]:
    """The curves of a run along an axis, by split; those with no point are left out."""
    curves = {split: along(side.curves[split], axis) for split in SPLITS}
    return {split: curve for split, curve in curves.items() if curve}


def highest(sides: Sequence[Side]) -> float:
    """The top of the picture: the highest loss, but for those that are far out."""
    losses = [point.loss for side in sides for points in side.curves.values() for point in points]
    finite = [loss for loss in losses if math.isfinite(loss)]
    middle = median(finite) if finite else 1.0
    return max((loss for loss in finite if middle <= 0 or loss <= FAR * middle), default=1.0)


# --- in a terminal ---


def in_terminal(sides: Sequence[Side], width: int, colour: bool) -> list[str]:
    """The curves over steps, validation where every run has one, as lines; without plotext, how to have them."""
    drawn = [side for side in sides if any(side.curves.values())]
    if not drawn:
        return []
    try:
        import plotext
    except ImportError:
        return [f"curves are drawn here with plotext: {installing('plot')}"]
    split = "val" if all(len(side.curves["val"]) > 1 for side in drawn) else "train"
    figure, top = plotext.figure, highest(drawn)
    figure.clear()
    figure.plot_size(width, 18)
    figure.theme("simple" if colour else "colorless")
    figure.title(f"{split} loss over steps")
    for side in drawn:
        points = [(at, loss) for at, loss in along(side.curves[split], "step") if math.isfinite(loss) and loss <= top]
        if points:
            signal = figure.signal(*map(list, zip(*points, strict=True)), marker="braille" if colour else side.letter)
            figure.draw(signal.lines().label(side.letter))
    figure.legend(x=width - 12, y=0, ha="right")  # losses fall: the upper right is free
    text: str = figure.build().string(colorless=not colour)
    figure.clear()
    return text.rstrip("\n").split("\n")


# --- as a page ---

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 800px; margin: 2em auto; padding: 0 1em; }
body { color: #222; background: #fff; }
pre { overflow-x: auto; font-size: 13px; }
svg { width: 100%; height: auto; }
svg text { font-size: 12px; fill: currentColor; }
.grid { stroke: currentColor; stroke-opacity: 0.15; }
@media (prefers-color-scheme: dark) { body { color: #ddd; background: #181818; } }
"""


def page(found: Comparison) -> str:
    """One HTML file with the tables and a chart for each axis; it asks for nothing outside of itself."""
    title = html.escape(" / ".join(side.path for side in found.sides))
    charts = "\n".join(
        f"<h2>Loss over {UNITS[axis]}</h2>\n{chart(found.sides, axis)}" for axis in axes_of(found.sides)
    )
    text = html.escape("\n".join(in_lines(found, None)))
    return (
        f'<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n<title>{title}</title>\n'
        f"<style>{STYLE}</style>\n</head>\n<body>\n<h1>Runs compared</h1>\n<pre>{text}</pre>\n"
        f"{charts or '<p>No run has a loss to draw.</p>'}\n</body>\n</html>\n"
    )


def chart(sides: Sequence[Side], axis: str) -> str:
    """An SVG of all runs along an axis: validation thick, training thin."""
    curves = {side.letter: curve_of(side, axis) for side in sides}
    points = [point for one in curves.values() for curve in one.values() for point in curve]
    top = highest(sides)
    losses = [loss for _, loss in points if math.isfinite(loss) and loss <= top] or [0.0, 1.0]
    across = Scale(min(0.0, *(at for at, _ in points)), max(at for at, _ in points), LEFT, WIDTH - RIGHT)
    up = Scale(min(losses), max(losses), HEIGHT - BOTTOM, TOP)
    parts = [f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="loss over {UNITS[axis]}">']
    parts += [
        f'<clipPath id="in-{axis}"><rect x="{LEFT}" y="{TOP - 4}" width="{WIDTH - LEFT - RIGHT}" '
        f'height="{HEIGHT - TOP - BOTTOM + 8}"/></clipPath>'
    ]
    for loss in up.ticks(5):
        y = up(loss)
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text x="{LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">{loss:.4g}</text>')
    for at in across.ticks(6):
        parts.append(
            f'<text x="{across(at):.1f}" y="{HEIGHT - BOTTOM + 20}" text-anchor="middle">{tick_text(at)}</text>'
        )
    parts.append(f'<text x="{(LEFT + WIDTH) / 2}" y="{HEIGHT - 6}" text-anchor="middle">{UNITS[axis]}</text>')
    for index, side in enumerate(sides):
        colour, dash = COLOURS[index % len(COLOURS)], DASHES[index // len(COLOURS) % len(DASHES)]
        for split, curve in curves[side.letter].items():
            thick = "2.2" if split == "val" else "1"
            drawn = path_of([(across(at), up(loss)) for at, loss in curve])
            parts.append(
                f'<path d="{drawn}" fill="none" stroke="{colour}" stroke-width="{thick}" stroke-dasharray="{dash}" '
                f'stroke-linecap="round" clip-path="url(#in-{axis})"><title>{side.letter} {split}</title></path>'
            )
        x = LEFT + 46 * index
        parts.append(f'<text x="{x}" y="18" style="fill: {colour}" font-weight="bold">{side.letter}</text>')
        parts.append(
            f'<line x1="{x + 13}" x2="{x + 36}" y1="14" y2="14" stroke="{colour}" stroke-width="2.2" '
            f'stroke-dasharray="{dash}"/>'
        )
    thin = "thick: val, thin: train"
    parts.append(f'<text x="{WIDTH - RIGHT}" y="18" text-anchor="end" opacity="0.7">{thin}</text>')
    return "\n".join([*parts, "</svg>"])


class Scale:
    """From an amount to a pixel."""

    def __init__(self, least: float, most: float, begin: float, end: float):
        self.least, self.most = least, most if most > least else least + (abs(least) or 1.0)
        self.begin, self.end = begin, end

    def __call__(self, value: float) -> float:
        """The pixel; infinite where the value is."""
        return self.begin + (value - self.least) / (self.most - self.least) * (self.end - self.begin)

    def ticks(self, about: int) -> list[float]:
        """Round amounts within, about so many."""
        rough = (self.most - self.least) / about
        power = 10.0 ** math.floor(math.log10(rough))
        size = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough)
        first = math.ceil(self.least / size)
        return [index * size for index in range(first, math.floor(self.most / size + 1e-9) + 1)]


def tick_text(value: float) -> str:
    """`2000000` -> `2M`."""
    for scale, letter in ((1e9, "G"), (1e6, "M"), (1e4, "k")):
        if value >= scale:
            return f"{value / (1e3 if letter == 'k' else scale):g}{letter}"
    return f"{value:g}"


def path_of(pixels: Sequence[tuple[float, float]]) -> str:
    """The `d` of an SVG path; what is not finite breaks the line. A point alone is a dot."""
    parts, pen = [], "M"
    for x, y in pixels:
        if math.isfinite(x) and math.isfinite(y):
            parts.append(f"{pen}{x:.1f} {y:.1f}" + ("h0" if pen == "M" else ""))
            pen = "L"
        else:
            pen = "M"
    return "".join(parts)


# --- as PNG ---


def picture(found: Comparison) -> bytes:
    """The curves as PNG, a panel for each axis."""
    from matplotlib.figure import Figure

    axes = axes_of(found.sides)
    figure = Figure(figsize=(9, 3.6 * max(1, len(axes))), layout="constrained")
    for number, axis in enumerate(axes):
        panel = figure.add_subplot(len(axes), 1, number + 1)
        for index, side in enumerate(found.sides):
            for split, curve in curve_of(side, axis).items():
                thick, label = (2.0, f"{side.letter}  {side.path}") if split == "val" else (0.8, None)
                if split == "train" and not side.curves["val"]:
                    label = f"{side.letter}  {side.path} (train)"
                colour, dash = COLOURS[index % len(COLOURS)], ("-", "--", ":", "-.")[index // len(COLOURS) % 4]
                panel.plot(*zip(*curve, strict=True), dash, color=colour, linewidth=thick, label=label)
        panel.set(xlabel=UNITS[axis], ylabel="loss (thick: val)")
        bottom, _ = panel.get_ylim()
        panel.set_ylim(bottom, min(panel.get_ylim()[1], highest(found.sides) * 1.05))
        panel.grid(alpha=0.2)
        if number == 0:
            panel.legend(frameon=False)
    written = BytesIO()
    figure.savefig(written, format="png", dpi=130)
    return written.getvalue()
