"""An explanation as one page: a picture for each stage, and under it the lines of the terminal.

Self-contained: no script, no font, no address; a policy in its head forbids the browser to ask for any. All that
comes from a user's data is escaped. Colours follow the reader's light or dark setting. Pure: facts in, HTML out.
Owns the pictures; the sentences are `explain_text.py`'s.
"""

from collections.abc import Callable, Iterable
from html import escape

from fivestep.learn.explain_facts import ROWS, ExampleRow, Explanation, Heat, TextRow, plain
from fivestep.learn.explain_text import HEADING, KEY, MOST_EXAMPLES, NOTE, STAGES, Line, lines, shape, shown

WIDTH = 88  # columns of the text
ROW, LETTER, FULL = 18, 7.3, 760  # pixels of a chart: a bar's row, a letter of its name, all of it
LONGEST, NARROW = 40, 14  # letters of a name beside a bar, of a token above a column
STYLE = """
:root { color-scheme: light dark; --page: #fbfbfd; --panel: #ffffff; --ink: #1b1d22; --soft: #636a76; --line: #dfe2e8;
  --mark: #a21caf; --hot: #dc5b1a; --cold: #2563eb; --right: #15803d; }
@media (prefers-color-scheme: dark) { :root { --page: #121418; --panel: #1a1d23; --ink: #e6e8ec; --soft: #9aa2af;
  --line: #31363f; --mark: #e879f9; --hot: #fb8a4c; --cold: #6ea0ff; --right: #4ade80; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 2rem 1rem 4rem; max-width: 60rem; background: var(--page); color: var(--ink);
  font: 16px/1.5 system-ui, sans-serif; }
h1 { font-size: 1.6rem; margin: 0 0 .3rem; } h2 { font-size: 1.15rem; margin: 0 0 .6rem; }
h2 b { color: var(--mark); margin-right: .5rem; }
p { margin: .3rem 0; } .soft, figcaption { color: var(--soft); font-size: .87rem; }
nav { display: flex; flex-wrap: wrap; gap: .3rem; margin: 1rem 0 1.5rem; }
nav a { color: var(--ink); text-decoration: none; border: 1px solid var(--line); border-radius: 99px;
  padding: .1rem .7rem; font-size: .87rem; background: var(--panel); }
nav a:hover, nav a:focus { border-color: var(--mark); }
section { background: var(--panel); border: 1px solid var(--line); border-radius: .6rem; padding: 1rem 1.2rem;
  margin: 0 0 1rem; scroll-margin-top: 1rem; }
pre, .text, table { font: 13px/1.5 ui-monospace, "DejaVu Sans Mono", Menlo, Consolas, monospace; }
pre { margin: 0; overflow-x: auto; } pre .note { color: var(--soft); } pre .key { font-weight: 700; }
figure { margin: 0 0 1rem; overflow-x: auto; } svg { display: block; max-width: 100%; height: auto; }
svg text { font: 12px ui-monospace, "DejaVu Sans Mono", Menlo, Consolas, monospace; fill: var(--ink); }
.bar { fill: var(--mark); } .track { fill: var(--line); } .dot { fill: var(--cold); } .out { fill: var(--hot); }
.text { margin: .3rem 0; overflow-wrap: anywhere; line-height: 1.9; }
.text span { border-radius: 3px; padding: .12em .05em; white-space: pre-wrap;
  background: color-mix(in srgb, var(--hot) var(--s), transparent); }
table { border-collapse: collapse; } td, th { padding: .12rem .4rem; text-align: center; font-weight: 400; }
td.heat { background: color-mix(in srgb, var(--tone) var(--s), transparent); min-width: 3.1em; }
td.wanted { outline: 2px solid var(--right); outline-offset: -2px; font-weight: 700; }
th { color: var(--soft); } th.row { text-align: right; white-space: pre; }
.strip td { border: 1px solid var(--line); min-width: 1.9em; white-space: pre; }
.strip .to td { color: var(--right); }
.tiles { display: flex; flex-wrap: wrap; gap: 1rem; } .tiles figure { margin: 0; text-align: center; }
"""


def page(facts: Explanation) -> str:
    """The whole page."""
    head, stages = in_stages(lines(facts, WIDTH))
    title = escape(head[0][0])
    about = "".join(f"<p class=soft>{escape(text.strip())}</p>\n" for text, _ in head[1:] if text.strip())
    links = "".join(f'<a href="#stage-{i}">{i} {escape(name)}</a>' for i, name in enumerate(STAGES, 1))
    sections = "".join(
        f'<section id="stage-{i}">\n<h2><b>{i}</b>{escape(name)}</h2>\n{PICTURES.get(i, nothing)(facts)}'
        f"<pre>{''.join(map(one_line, text))}</pre>\n</section>\n"
        for i, (name, text) in enumerate(zip(STAGES, stages, strict=True), 1)
    )
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'\">\n"
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{title}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n"
        f"<h1>{title}</h1>\n{about}<nav>{links}</nav>\n{sections}</body>\n</html>\n"
    )


def in_stages(written: list[Line]) -> tuple[list[Line], list[list[Line]]]:
    """What stands before the first heading, and what stands under each."""
    starts = [i for i, (_, style) in enumerate(written) if style == HEADING]
    ends = [*starts[1:], len(written)]
    ends = [end - (not written[end - 1][0]) for end in ends]  # without the empty line before a heading
    return written[: starts[0]], [written[start + 1 : end] for start, end in zip(starts, ends, strict=True)]


def one_line(line: Line) -> str:
    """A line of the text as the page has it."""
    text, style = escape(line[0]), {NOTE: "note", KEY: "key"}.get(line[1])
    return (f'<span class="{style}">{text}</span>' if style else text) + "\n"


def figure(content: str, caption: str) -> str:
    """A picture with what it shows."""
    return f"<figure>\n{content}\n<figcaption>{escape(caption)}</figcaption>\n</figure>\n"


def nothing(facts: Explanation) -> str:
    """A stage without a picture."""
    return ""


def bars(rows: Iterable[tuple[str, float, str]], caption: str) -> str:
    """A bar for each name, the longest one full; and its value as text."""
    rows = list(rows)
    top = max((value for _, value, _ in rows), default=0.0) or 1.0
    start = 8 + LETTER * max((len(short(name)) for name, _, _ in rows), default=0)
    room = FULL - start - 110
    drawn = []
    for i, (name, value, text) in enumerate(rows):
        y = i * ROW
        drawn.append(
            f'<text x="{start - 8:.1f}" y="{y + 13}" text-anchor="end">{escape(short(name))}</text>'
            f'<rect class="track" x="{start:.1f}" y="{y + 4}" width="{room:.1f}" height="10" rx="2"/>'
            f'<rect class="bar" x="{start:.1f}" y="{y + 4}" width="{room * value / top:.1f}" height="10" rx="2"/>'
            f'<text x="{start + room + 8:.1f}" y="{y + 13}">{escape(text)}</text>'
        )
    return figure(svg(FULL, ROW * len(rows), "".join(drawn), caption), caption)


def short(name: str) -> str:
    """The end of a long name."""
    return name if len(name) <= LONGEST else f"…{name[1 - LONGEST :]}"


def cell(token: str) -> str:
    """The beginning of a long token, escaped."""
    text = shown(token)
    return escape(text if len(text) <= NARROW else f"{text[: NARROW - 1]}…")


def svg(width: float, height: float, content: str, label: str) -> str:
    """A drawing."""
    return (
        f'<svg role="img" aria-label="{escape(label)}" viewBox="0 0 {width:g} {height:g}" width="{width:g}" '
        f'height="{height:g}">{content}</svg>'
    )


# --- a picture for each stage ---


def weights(facts: Explanation) -> str:
    """Stage 1: how many weights stand where."""
    layers = facts.parameters.layers
    return bars(((layer.name, layer.count, f"{layer.count:,}") for layer in layers), "weights of each tensor")


def progress(facts: Explanation) -> str:
    """Stage 3: where in the plan this step is."""
    loop = facts.loop
    if not loop.planned:
        return ""
    share = loop.before / loop.planned
    drawn = (
        f'<rect class="track" x="0" y="6" width="{FULL}" height="8" rx="4"/>'
        f'<rect class="bar" x="0" y="6" width="{FULL * share:.1f}" height="8" rx="4"/>'
        f'<circle class="bar" cx="{min(FULL - 7, max(7, FULL * share)):.1f}" cy="10" r="7"/>'
    )
    caption = f"step {loop.before + 1:,} of {loop.planned:,}"
    return figure(svg(FULL, 20, drawn, caption), caption)


def read(facts: Explanation) -> str:
    """Stage 4: what is read above what should come out, or the examples themselves."""
    one = facts.batch
    if facts.workload == ROWS:
        if one.side:
            tiles = "".join(tile(row, one.side) for row in one.examples[:MOST_EXAMPLES])
            return f'<div class="tiles">{tiles}</div>\n'
        return scatter(one.examples, False)
    names = [tensor.name for tensor in one.shapes]
    return "".join(strip(row, names) for row in one.text[:2])


def strip(row: TextRow, names: list[str]) -> str:
    """Two lines of cells: a token, and under it the one that should follow."""
    most = 16
    cells = [
        f'<tr{kind}><th class="row">{escape(name)}</th>{"".join(f"<td>{cell(one)}</td>" for one in of[:most])}</tr>'
        for kind, name, of in (("", names[0], row.sees), (' class="to"', names[1], row.predicts))
    ]
    return figure(f'<table class="strip">{"".join(cells)}</table>', "read, and under it what should be said next")


def tile(row: ExampleRow, side: int) -> str:
    """A picture of grey levels from 0 to 1, with its label."""
    size = 12
    drawn = "".join(
        f'<rect x="{i % side * size}" y="{i // side * size}" width="{size}" height="{size}" '
        f'fill="currentColor" fill-opacity="{min(1.0, max(0.0, value)):.2f}"/>'
        for i, value in enumerate(row.features)
    )
    label = f"label {row.label[0]:.0f}"
    return f"<figure>{svg(side * size, side * size, drawn, label)}<figcaption>{label}</figcaption></figure>\n"


def scatter(rows: list[ExampleRow], outputs: bool) -> str:
    """Points of one feature and one label; with `outputs`, the model's beside them."""
    if any(len(row.features) != 1 or len(row.label) != 1 for row in rows):
        return ""
    points = [(row.features[0], row.label[0], "dot") for row in rows]
    points += [(row.features[0], row.outputs[0], "out") for row in rows] if outputs else []
    width, height, edge = 420, 220, 16
    (left, right), (low, high) = (spread([point[axis] for point in points]) for axis in (0, 1))  # type: ignore[misc]
    drawn = "".join(
        f'<circle class="{kind}" r="5" cx="{edge + (width - 2 * edge) * (x - left) / (right - left):.1f}" '
        f'cy="{height - edge - (height - 2 * edge) * (y - low) / (high - low):.1f}">'
        f"<title>{x:.4f}: {y:.4f}</title></circle>"
        for x, y, kind in points
    )
    caption = "feature across, label up" + (" (blue), the model's output (orange)" if outputs else "")
    return figure(svg(width, height, drawn, caption), caption)


def spread(values: list[float]) -> tuple[float, float]:
    """The least and the largest, apart."""
    low, high = min(values), max(values)
    return (low, high) if high > low else (low - 1, high + 1)


def said(facts: Explanation) -> str:
    """Stage 5: the logits as a map, or outputs beside labels."""
    if facts.forward.heat is None:
        return scatter(facts.batch.examples, True)
    caption = (
        f"{shape(facts.forward.output)}: some positions, some columns; orange above 0, blue below, framed: wanted"
    )
    return figure(heat_table(facts.forward.heat), caption)


def heat_table(heat: Heat) -> str:
    """Logits in colour."""
    top = max((abs(value) for row in heat.logits for value in row), default=0.0) or 1.0
    head = "".join(f"<th>{cell(token)}</th>" for token in heat.tokens)
    digits = 1 if top >= 3 else 2
    body = []
    for place, sees, row, wanted in zip(heat.places, heat.sees, heat.logits, heat.targets, strict=True):
        cells = "".join(
            f'<td class="heat{" wanted" if i == wanted else ""}" style="--s: {80 * abs(value) / top:.0f}%; '
            f'--tone: var(--{"hot" if value > 0 else "cold"})">{value:.{digits}f}</td>'
            for i, value in enumerate(row)
        )
        body.append(f'<tr><th class="row">{escape(place)} {cell(sees) if sees else ""}</th>{cells}</tr>')
    return f"<table><tr><th></th>{head}</tr>{''.join(body)}</table>"


def losses(facts: Explanation) -> str:
    """Stage 6: the text in the colour of its loss."""
    rows = facts.batch.text
    if not rows:
        named = (
            (f"row {i}", row.loss, f"{row.loss:.4f}") for i, row in enumerate(facts.batch.examples[:MOST_EXAMPLES])
        )
        return bars(named, "the loss of the first rows")
    top = max(value for row in rows for value in row.losses) or 1.0
    joint = escape(facts.batch.joint)
    drawn = "".join(
        f'<p class="text">{joint.join(coloured(token, value, top) for token, value in pairs(row))}</p>\n'
        for row in rows
    )
    return figure(drawn, f"what should have been said, the darker the worse: 0 to {top:.2f}")


def pairs(row: TextRow) -> Iterable[tuple[str, float]]:
    """The targets of a row with their losses."""
    return zip(row.predicts, row.losses, strict=True)


def coloured(token: str, value: float, top: float) -> str:
    """A token on the colour of its loss; white space is shown by marks."""
    text = {" ": "·", "\n": "⏎", "\t": "⇥"}.get(token, token if token.isprintable() else repr(token))
    said = escape(f"{shown(token)}: {value:.4f}", quote=True)
    return f'<span style="--s: {85 * max(0.0, value) / top:.0f}%" title="{said}">{escape(text)}</span>'


def slopes(facts: Explanation) -> str:
    """Stage 7: the size of each tensor's gradient."""
    rows = ((one.name, one.gradient_norm or 0.0, plain(one.gradient_norm or 0.0)) for one in facts.parameters.layers)
    return bars(rows, "norm of each tensor's gradient, before clipping")


def moves(facts: Explanation) -> str:
    """Stage 8: the size of each tensor's move."""
    rows = ((one.name, one.update_norm, plain(one.update_norm)) for one in facts.parameters.layers)
    return bars(rows, "norm of each tensor's move")


def sums(facts: Explanation) -> str:
    """Stage 9: with and without a reset."""
    one = facts.reset
    named = (
        ("left by this batch", one.now),
        ("the next batch's own", one.following),
        ("both, without a reset", one.without),
    )
    return bars(((name, value, plain(value)) for name, value in named), "norm of all gradients")


PICTURES: dict[int, Callable[[Explanation], str]] = {
    1: weights,
    3: progress,
    4: read,
    5: said,
    6: losses,
    7: slopes,
    8: moves,
    9: sums,
}
