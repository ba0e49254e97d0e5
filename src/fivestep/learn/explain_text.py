"""An explanation as lines of text, for a terminal or a pipe: 80 to 100 columns, nine headings.

`lines(explanation, width)` gives (text, style) pairs; a style only helps the eye, the text says all. Pure: facts in,
text out. Every number that is written is a field of the facts, or a sum that stands beside it.
"""

import math
from collections.abc import Iterable, Iterator
from itertools import chain
from textwrap import wrap

from fivestep.learn.explain_facts import (
    ROWS,
    SEGMENTS,
    WINDOWS,
    Arithmetic,
    Explanation,
    Guess,
    Layer,
    Shape,
    TextRow,
    place_of,
    plain,
)
from fivestep.watch.table import counted

Line = tuple[str, str]
STAGES = (
    "Parameters",
    "Optimizer",
    "The loop",
    "Get a batch",
    "Forward",
    "Loss",
    "Gradients",
    "Update",
    "Reset",
)
HEADING, NOTE, KEY = "bold magenta", "dim", "bold"
LEAST, MOST = 80, 100  # columns
MOST_LAYERS, MOST_PAIRS, MOST_TEXTS, MOST_EXAMPLES = 12, 10, 3, 6
BAR, LONGEST = 24, 28  # letters of a full bar, of a token
ASCII = {
    "β": "beta", "ε": "eps", "×": "x", "−": "-", "√": "sqrt ", "²": "^2", "→": "->", "─": "-", "━": "#",
    "Σ": "sum ", "°": " degrees", "·": ".", "…": "...",
}  # fmt: skip


def lines(explanation: Explanation, width: int = 80, unicode: bool = True) -> list[Line]:
    """The whole explanation, at most `width` columns wide where words allow it."""
    width = min(MOST, max(LEAST, width))
    loop = explanation.loop
    of = f" of {loop.planned:,}" if loop.planned is not None else ""
    of = f", after the planned {loop.planned:,}" if loop.planned is not None and loop.before >= loop.planned else of
    written: list[Line] = [(f"One iteration of {explanation.title}: step {loop.before + 1:,}{of}", KEY)]
    written += [(f"  {name:<11}{value}", "") for name, value in explanation.about]
    for note in explanation.notes:
        written += sentence(note, width, NOTE)
    stages = (parameters, optimizers, the_loop, batch, forward, loss, gradients, update, reset)
    for number, (name, stage) in enumerate(zip(STAGES, stages, strict=True), 1):
        written += [("", ""), (f"{number}  {name} {'─' * (width - len(name) - 4)}", HEADING)]
        written += stage(explanation, width)
    if not unicode:
        written = [(in_ascii(text), style) for text, style in written]
    return [(text.rstrip(), style) for text, style in written]


def in_ascii(text: str) -> str:
    """`text` for a terminal that has no other characters; a reader's own text is left alone."""
    for character, plainer in ASCII.items():
        text = text.replace(character, plainer)
    return text


def sentence(text: str, width: int, style: str = "", indent: str = "") -> list[Line]:
    """`text` in lines."""
    return [(line, style) for line in wrap(text, width, initial_indent=indent, subsequent_indent=indent)]


def table(
    rows: Iterable[Iterable[str]], right: Iterable[int] = (), indent: str = "  ", width: int = MOST
) -> list[Line]:
    """Columns side by side; those at the indices `right` are aligned to the right. Where `width` has no room for all,
    the first column loses the beginning of its names."""
    cells = [list(row) for row in rows]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    room = width - len(indent) - sum(size + 2 for size in widths[1:])
    if 8 <= room < widths[0]:
        cells = [[row[0] if len(row[0]) <= room else f"…{row[0][1 - room :]}", *row[1:]] for row in cells]
        widths[0] = room
    right = set(right)
    return [
        (
            indent
            + "  ".join(
                text.rjust(size) if i in right else text.ljust(size)
                for i, (text, size) in enumerate(zip(row, widths, strict=True))
            ),
            "",
        )
        for row in cells
    ]


def shown(token: str) -> str:
    """A token on a line: as it is, or quoted and escaped where it would not be seen; the beginning of a long one."""
    text = token if token.strip() == token and token.isprintable() and token else repr(token)
    return text if len(text) <= LONGEST else f"{text[: LONGEST - 1]}…"


def shape(one: Shape) -> str:
    """`xb [batch 32, time 8] int64`."""
    axes = ", ".join(f"{axis} {size:,}" for axis, size in zip(one.axes, one.sizes, strict=True))
    return f"{one.name} [{axes}] {one.dtype}"


def sizes(one: tuple[int, ...]) -> str:
    """`65 × 65`."""
    return " × ".join(f"{size:,}" for size in one) or "1"


def bar(share: float) -> str:
    """A share of 1 as a bar."""
    return "━" * round(BAR * share)


# --- the stages ---


def parameters(facts: Explanation, width: int) -> Iterator[Line]:
    """Stage 1."""
    one, planned = facts.parameters, facts.loop.planned
    yield from sentence("What is decided before anything is computed:", width)
    yield from table(((s.name, s.value, s.meaning) for s in one.settings), right=[1])
    said = f"A step learns from {one.units_per_step:,} {one.units}."
    if planned is not None:
        said += f" {planned:,} such steps see {planned * one.units_per_step:,}"
        if one.train_units:
            said += f": {planned * one.units_per_step / one.train_units:.1f} times the {one.train_units:,} there are"
        said += "."
    yield from sentence(said, width)
    yield from sentence(
        f"What will be learned are the {one.count:,} weights of {one.model}"
        + (f", {one.trained:,} of them trained:" if one.trained != one.count else ":"),
        width,
    )
    yield from table(
        ((layer.name, sizes(layer.sizes), f"{layer.count:,}") for layer in most(one.layers)),
        right=[1, 2],
        width=width,
    )
    yield from left_out(one.layers)


def most(layers: list[Layer]) -> list[Layer]:
    """The first and last of many."""
    half = MOST_LAYERS // 2
    return layers if len(layers) <= MOST_LAYERS else layers[:half] + layers[-half:]


def left_out(layers: list[Layer]) -> Iterator[Line]:
    """How many of them are not in a table."""
    if len(layers) > MOST_LAYERS:
        yield f"  (and {len(layers) - MOST_LAYERS} tensors between the first and the last six)", NOTE


def optimizers(facts: Explanation, width: int) -> Iterator[Line]:
    """Stage 2."""
    yield from sentence(
        "An optimizer turns the gradient of a weight into a move of that weight. It holds the model's own tensors:",
        width,
    )
    for group in facts.groups:
        yield (f"  {group.optimizer}: {counted(group.tensors, 'tensor')}, {group.count:,} weights", KEY)
        options = ", ".join(f"{name} {value:g}" for name, value in group.options.items())
        yield from sentence(options, width, indent="    ")
        if group.kept:
            numbers = "one number" if len(group.kept) == 1 else f"{len(group.kept)} numbers"
            yield from sentence(f"remembers {numbers} of each weight: {', '.join(group.kept)}", width, indent="    ")
    if not any(group.kept for group in facts.groups):
        yield from sentence("It remembers nothing from one step to the next.", width, indent="    ")


def the_loop(facts: Explanation, width: int) -> Iterator[Line]:
    """Stage 3."""
    loop = facts.loop
    times = f"{loop.planned:,}" if loop.planned is not None else "…"
    carried = ", hidden" if facts.batch.carry else ""
    call = {WINDOWS: "logits = model(xb)", SEGMENTS: f"output{carried} = model(data{carried})"}
    yield f"  for step in 1 … {times}:", ""
    steps = (
        ("take the next batch", "4"),
        ("zero_grad()", "9, first: gradients stay readable"),
        (call.get(facts.workload, "outputs = model(features)"), "5"),
        ("loss = criterion(...)", "6"),
        ("loss.backward()", "7"),
        ("optimizer.step()", "8"),
    )
    yield from table(steps, indent="      ", width=width)
    epoch = f"epoch {loop.epoch:,}, batch {loop.position + 1:,}"
    epoch += f" of {loop.per_epoch:,}" if loop.per_epoch is not None else ""
    rate = f"The learning rate is {loop.rate:g}"
    if loop.rate != loop.base_rate:
        rate += f", {loop.rate / loop.base_rate:.3g} times {loop.base_rate:g}"
    yield from sentence(
        f"This is step {loop.before + 1:,}: {loop.before:,} updates are behind it ({epoch}). {rate} "
        f"(schedule: {loop.schedule}).",
        width,
    )
    if loop.micro_batches > 1:
        yield from sentence(
            f"It adds up the gradients of {loop.micro_batches} micro-batches; the first is shown.", width
        )
    if not loop.rate:
        yield from sentence("The schedule has come to its end: at a rate of 0 no weight moves.", width, NOTE)


def batch(facts: Explanation, width: int) -> Iterator[Line]:
    """Stage 4."""
    one = facts.batch
    for tensor in one.shapes:
        yield f"  {shape(tensor)}", KEY
    if facts.workload == ROWS:
        yield from rows(facts, width)
        return
    inputs, targets = (tensor.name for tensor in one.shapes)
    row, where = one.text[0], "row" if facts.workload == WINDOWS else "column"
    offset = f" (from token {one.offset:,} of the text)" if one.offset is not None else ""
    for number, other in enumerate(one.text[:MOST_TEXTS]):
        yield f"  {where} {number}:  {one_line(other.sees, one.joint, width - 14)}", ""
    yield from sentence(
        f"{targets} is {inputs} one token later, so that each position of {where} 0{offset} has its answer:",
        width,
    )
    shown_pairs = list(zip(row.sees, row.predicts, strict=True))[:MOST_PAIRS]
    whole = facts.parameters.model != "Bigram"  # else the last token is all that the model looks at
    yield from table(
        (f"{i}", f"after {'… ' if whole and i else ''}{shown(sees)}", "comes", shown(wanted))
        for i, (sees, wanted) in enumerate(shown_pairs)
    )
    if len(row.sees) > MOST_PAIRS:
        yield f"  (and {len(row.sees) - MOST_PAIRS} more)", NOTE
    if one.carry is not None:
        yield from carry(facts, width)


def one_line(tokens: list[str], joint: str, width: int) -> str:
    """Tokens as one text, quoted, cut where the line ends."""
    text = repr(joint.join(tokens))
    return text if len(text) <= width else f"{text[: width - 1]}…"


def carry(facts: Explanation, width: int) -> Iterator[Line]:
    """The hidden state between segments."""
    one = facts.batch.carry
    assert one is not None
    for tensor in one.shapes:
        yield f"  {shape(tensor)}", KEY
    if one.fresh:
        said = "The hidden state is what a column's text has left in the model so far. Here an epoch begins: zeros."
    else:
        norms = " and ".join(plain(value) for value in one.norms_before)
        said = (
            f"The hidden state goes on from the segment before: norm {norms}. It is detached: no gradient goes back."
        )
        if one.ended_with is not None:
            begins = facts.batch.text[0].sees[0]
            said += (
                f" Column 0 went as far as {shown(one.ended_with)}, and goes on with {shown(begins)}: a target "
                "becomes the next input."
            )
    yield from sentence(said, width)
    yield from sentence(f"After this segment its norm is {' and '.join(map(plain, one.norms_after))}.", width)


def rows(facts: Explanation, width: int) -> Iterator[Line]:
    """Features and labels."""
    one, classes = facts.batch, facts.loss.classes
    yield from sentence("Each row is an example: its features are read, its label is what should come out.", width)
    if one.side:
        first = one.examples[0]
        yield from picture(first.features, one.side)
        yield f"  row 0, label {first.label[0]:.0f}", ""
        yield from sentence(
            "labels of the next rows: " + ", ".join(f"{row.label[0]:.0f}" for row in one.examples[1:MOST_EXAMPLES]),
            width,
            "",
            "  ",
        )
        return
    yield from table(
        (
            f"row {i}",
            "features " + listed(row.features),
            "label " + (f"{row.label[0]:.0f}" if classes else listed(row.label)),
        )
        for i, row in enumerate(one.examples[:MOST_EXAMPLES])
    )


def listed(values: list[float]) -> str:
    """A few numbers."""
    return ", ".join(f"{value:z.4f}" for value in values[:4]) + (" …" if len(values) > 4 else "")


def picture(values: list[float], side: int) -> Iterator[Line]:
    """Grey levels of 0 to 1, two characters each."""
    levels = " .:-=+*#%@"
    for at in range(0, side * side, side):
        marks = [levels[min(9, max(0, int(value * 9.99)))] * 2 for value in values[at : at + side]]
        yield f"    {''.join(marks)}", ""


def forward(facts: Explanation, width: int) -> Iterator[Line]:
    """Stage 5."""
    one = facts.forward
    yield from sentence("The batch goes through the model, part by part:", width)
    path = one.path if len(one.path) <= MOST_LAYERS else one.path[: MOST_LAYERS // 2] + one.path[-MOST_LAYERS // 2 :]
    yield from table(
        ((name, kind, shape(tensor).removeprefix(f"{tensor.name} ")) for name, kind, tensor in path), width=width
    )
    if len(one.path) > MOST_LAYERS:
        yield f"  (and {len(one.path) - MOST_LAYERS} parts in between)", NOTE
    yield f"  {shape(one.output)}", KEY
    if not one.guesses:
        yield from sentence("The output is the answer itself; beside the label:", width)
        yield from table(
            (
                (f"row {i}", f"output {listed(row.outputs)}", f"label {listed(row.label)}")
                for i, row in enumerate(facts.batch.examples[:MOST_EXAMPLES])
            ),
        )
        return
    what = "class" if facts.workload == ROWS else "token"
    yield from sentence(
        f"A logit is a score, one for each {what}. Softmax makes shares of 1 of them, exp(logit) over all their sum:",
        width,
    )
    for guess in one.guesses:
        yield from guessed(guess, width)


def guessed(guess: Guess, width: int) -> Iterator[Line]:
    """The likeliest at one position, and the one that was wanted."""
    yield f"  {guess.place}{f' = {shown(guess.sees)}' if guess.sees else ''}", KEY
    wanted = f"wanted: rank {guess.rank:,}"
    found = [(shown(one.token), one, wanted if one == guess.target else "") for one in guess.likeliest]
    if guess.target not in guess.likeliest:
        found.append((shown(guess.target.token), guess.target, wanted))
    yield from table(
        (
            (token, f"{one.logit:.4f}", f"{one.probability:.2%}", bar(one.probability) or "·", mark)
            for token, one, mark in found
        ),
        right=[1, 2],
        indent="    ",
    )


def loss(facts: Explanation, width: int) -> Iterator[Line]:
    """Stage 6."""
    one = facts.loss
    if one.classes is None:
        yield from squared(facts, width)
        return
    yield from sentence(
        "How wrong was it? The loss of one answer is −ln of the share that the wanted one got: ln Σ exp(logit) "
        "less its logit: 0 for a share of 1, more the smaller the share.",
        width,
    )
    if one.smoothing:
        yield from sentence(
            f"({one.smoothing:g} of each target is spread over all classes: --label-smoothing)", width
        )
    for guess in facts.forward.guesses:
        target = guess.target
        yield (
            f"  {guess.place}: {guess.log_sum:.4f} − {in_brackets(target.logit)} = {guess.log_sum - target.logit:.4f}"
            f" = −ln {target.probability:.3g}",
            "",
        )
    if facts.batch.text:
        where = "row" if facts.workload == WINDOWS else "column"
        yield from sentence(f"Position by position, {where} 0 of the batch:", width)
        yield from position_losses(facts.batch.text[0], width)
    what = "rows" if facts.workload == ROWS else "positions"
    yield from sentence(
        f"The mean of all {one.count:,} {what} is {one.mean:.4f}; the smallest is {one.smallest:.4f}, the largest "
        f"{one.largest:.4f}. The step's own loss: {one.step:.4f}.",
        width,
        KEY,
    )
    even = (
        f"{one.baseline_name} = {one.baseline:.4f} is what a model pays that holds all {one.classes:,} for equally "
    )
    ratio = one.mean - one.baseline
    yield from sentence(
        f"{even}likely. This one is {abs(ratio):.4f} {'above' if ratio > 0 else 'below'} it: as if it chose among "
        f"{math.exp(min(one.mean, 700)):.1f}.",
        width,
    )


def in_brackets(value: float) -> str:
    """A number after an operator."""
    return f"{value:z.4f}" if round(value, 4) >= 0 else f"(−{-value:.4f})"


def position_losses(row: TextRow, width: int) -> Iterator[Line]:
    """Each target of a row with its loss under it, as many to a line as fit."""
    cells = [(shown(token), f"{value:.2f}") for token, value in zip(row.predicts, row.losses, strict=True)]
    line: list[tuple[str, str]] = []
    for cell in [*cells, None]:
        used = sum(max(map(len, one)) + 1 for one in line)
        if line and (cell is None or used + max(map(len, cell)) > width - 2):
            yield "  " + " ".join(token.rjust(max(len(token), len(value))) for token, value in line), ""
            yield "  " + " ".join(value.rjust(max(len(token), len(value))) for token, value in line), NOTE
            line = []
        if cell is not None:
            line.append(cell)


def squared(facts: Explanation, width: int) -> Iterator[Line]:
    """The loss of values."""
    one = facts.loss
    yield from sentence("How wrong was it? The loss of an output is the square of how far off it is:", width)
    for i, row in enumerate(facts.batch.examples[:MOST_EXAMPLES]):
        if len(row.label) == 1:
            output, label = row.outputs[0], row.label[0]
            yield f"  row {i}: ({output:.4f} − {in_brackets(label)})² = {row.loss:.4f}", ""
        else:
            yield f"  row {i}: {row.loss:.4f}", ""
    yield from sentence(
        f"The mean of all {one.count:,} is {one.mean:.4f}; the smallest is {plain(one.smallest)}, the largest "
        f"{plain(one.largest)}. The step's own loss: {one.step:.4f}.",
        width,
        KEY,
    )
    yield from sentence(f"Always answering the labels' mean would cost their variance, {one.baseline:.4f}.", width)


def gradients(facts: Explanation, width: int) -> Iterator[Line]:
    """Stage 7."""
    one = facts.gradients
    yield from sentence(
        "backward() gives every weight a gradient: by how much the loss grows for each unit that the weight grows. "
        "It can be checked without it: move one weight a little both ways and see what the loss does "
        f"(h = {one.slopes[0].h:g}, in float64, the same dropout):"
        if one.slopes
        else "No weight got a gradient that is not 0.",
        width,
    )
    for slope in one.slopes:
        meaning = f", {slope.meaning}" if slope.meaning else ""
        yield f"  {place_of(slope.name, slope.index)} = {plain(slope.weight)}{meaning}", KEY
        verdict = "they agree" if slope.agrees else "THEY DIFFER"
        yield from table(
            (
                ("gradient", plain(slope.gradient), ""),
                (
                    "(loss(w+h) − loss(w−h)) / 2h",
                    plain(slope.difference),
                    f"{verdict}, to {slope.relative:.1e} of it",
                ),
            ),
            right=[1],
            indent="    ",
        )
    if one.unused:
        yield from sentence(f"No gradient reached {', '.join(one.unused[:6])}.", width)
    yield from sentence(
        f"All gradients together have the norm {plain(one.norm)}"
        + (
            f": above clip_norm = {one.clip_norm:g}, so each is multiplied by {one.factor:.4f}."
            if one.clip_norm and one.factor < 1
            else f", below clip_norm = {one.clip_norm:g}: nothing is clipped."
            if one.clip_norm
            else "."
        )
        + (f" No element may exceed {one.clip_value:g} (clip_value)." if one.clip_value else ""),
        width,
    )


def update(facts: Explanation, width: int) -> Iterator[Line]:
    """Stage 8."""
    one = facts.update
    for arithmetic in one.arithmetic:
        yield from worked(arithmetic, facts, width)
    if not one.arithmetic:
        yield from sentence("This optimizer's arithmetic is not written out here.", width)
    yield from sentence("Every tensor with the size of its weights, its gradient and its move:", width)
    head = ("", "weights", "gradient", "move", "move/weights")
    body = (
        (
            layer.name,
            plain(layer.weight_norm),
            plain(layer.gradient_norm) if layer.gradient_norm is not None else "none",
            plain(layer.update_norm),
            f"{layer.update_norm / layer.weight_norm:.2%}" if layer.weight_norm else "",
        )
        for layer in most(facts.parameters.layers)
    )
    yield from table(chain([head], body), right=[1, 2, 3, 4], width=width)
    yield from left_out(facts.parameters.layers)
    change = one.loss_after - facts.loss.step
    yield from sentence(
        f"The same batch once more, with the new weights: {facts.loss.step:.6f} → {one.loss_after:.6f} "
        f"({change:+.6f}).",
        width,
        KEY,
    )


def worked(one: Arithmetic, facts: Explanation, width: int) -> Iterator[Line]:
    """One weight's arithmetic."""
    place = place_of(one.name, one.index)
    yield f"  {one.optimizer} moves {place}, for the {ordinal(one.updates + 1)} time", KEY
    if one.optimizer == "Muon":
        yield from sentence(
            "Muon moves a matrix as a whole. Its momentum B is mixed with the gradient G; the mixture U is stretched "
            "in a few directions, and Newton-Schulz rounds make all of them about equally long:",
            width,
            indent="    ",
        )
    clipped = " (after clipping)" if facts.gradients.factor < 1 or facts.gradients.clip_value else ""
    yield f"    w = {one.inputs['w']:.9g}, g = {one.inputs['g']:.9g}{clipped}, lr = {one.rate:g}", ""
    for term in one.terms:
        yield f"    {term.name:<9} = {term.formula}", NOTE
        value = f"{term.value:.9g}"
        both = f"{term.worked} = {value}" if term.worked else value
        kept = f"   (the optimizer has {term.found:.9g})" if term.found is not None else ""
        text = f"              = {both}{kept}"
        if len(text) <= width:
            yield text, ""
        else:
            yield from split_line(f"              = {term.worked}", f"              = {value}{kept}", width)
    verdict = "equal, but for float32's rounding" if one.equal else "THEY DIFFER"
    yield f"    found after step(): {one.found:.9g}: {verdict}", KEY


def split_line(first: str, second: str, width: int) -> Iterator[Line]:
    """A long line of arithmetic, and its value on the next."""
    yield from ((text, "") for text in wrap(first, width, subsequent_indent=" " * 16))
    yield second, ""


def ordinal(number: int) -> str:
    """`1st`, `2nd`, `11th`."""
    ending = "th" if 10 <= number % 100 <= 20 else {1: "st", 2: "nd", 3: "rd"}.get(number % 10, "th")
    return f"{number:,}{ending}"


def reset(facts: Explanation, width: int) -> Iterator[Line]:
    """Stage 9."""
    one = facts.reset
    yield from sentence(
        "backward() adds to what is in .grad. Without zero_grad() the next batch's gradient would come on top of "
        "this one's, and the next update would follow both:",
        width,
    )
    head = ("", "this batch", "next batch", "without a reset")
    body = (
        (place_of(kept.name, kept.index), plain(kept.now), plain(kept.following), plain(kept.without))
        for kept in one.kept
    )
    whole = ("norm of all", plain(one.now), plain(one.following), plain(one.without))
    yield from table(chain([head], body, [whole]), right=[1, 2, 3], width=width)
    before = facts.gradients
    if before.factor < 1 or before.clip_value:
        yield from sentence(
            f"This batch's gradient is shown after clipping. Before clipping its norm was {plain(before.norm)}, as "
            "in stage 7. The next batch's is not clipped.",
            width,
        )
    angle = math.degrees(math.acos(max(-1.0, min(1.0, one.cosine))))
    yield from sentence(
        f"The sum points {angle:.0f}° away from the next batch's own gradient. With zero_grad(set_to_none=True) the "
        "next step begins with none at all.",
        width,
    )
