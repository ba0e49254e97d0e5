"""An observed iteration as facts: the nine stages of seed 002, from the tensors of the job itself.

`explained(config, job, step)` gives an `Explanation`. Owns what is measured: which rows, positions and weights are
looked at, what a finite difference is taken of, what a softmax says. Copies are measured, never the training itself.
"""

import math
from collections.abc import Callable
from copy import copy
from typing import Any

import torch
from torch import Tensor, nn

from fivestep.data.stream import batches_per_epoch
from fivestep.data.tokenizer import Tokenizer
from fivestep.learn.explain_arithmetic import worked_out
from fivestep.learn.explain_facts import (
    ROWS,
    SEGMENTS,
    WINDOWS,
    Arithmetic,
    Batch,
    Carry,
    ExampleRow,
    Explanation,
    Forward,
    Gradients,
    Group,
    Guess,
    Heat,
    Kept,
    Layer,
    Likely,
    Loop,
    Loss,
    Parameters,
    Reset,
    Setting,
    Shape,
    Slope,
    TextRow,
    Update,
)
from fivestep.learn.explain_observe import (
    Iteration,
    Moment,
    added_up,
    held_by,
    observed,
    path_seen,
    window_loss,
)
from fivestep.loop.batch import tensors
from fivestep.run.build import WINDOWED, Job, is_by_program
from fivestep.run.config import Config
from fivestep.run.training import planned_steps

MOST_ROWS, MOST_EXAMPLES, MOST_PLACES, MOST_COLUMNS, LIKELIEST = 6, 32, 12, 24, 5  # of what is shown
LONGEST = 16  # letters of a token in a sentence
NUDGE = 1e-6  # of a weight, in float64: beyond, the curve bends; below, digits are lost
TOLERANCE, ROUGH = 1e-3, 0.1  # of a gradient beside its finite difference: in float32, in half precision

Index = tuple[int, ...]


def explained(
    config: Config,
    job: Job,
    step: int = 0,
    saved: dict[str, Any] | None = None,
    title: str = "",
    told: Callable[[int], None] | None = None,
) -> Explanation:
    """Step `step + 1` of `job`, trained up to there, as facts. The arguments are `observed`'s; `job` is used up.

    The facts are plain numbers and text: see `explain_facts.py`. Raises UsageError and NonFiniteError, as training.
    """
    return measured(config, job, observed(config, job, step, saved, told), title)


def measured(config: Config, job: Job, seen: Iteration, title: str = "") -> Explanation:
    """The facts of an iteration."""
    workload = ROWS if config.model == "mlp" else WINDOWS if config.model in WINDOWED else SEGMENTS
    reading = Reading(config, job, seen, workload)
    chosen = chosen_weights(seen)
    data = job.data
    about = [("model", f"{type(job.model).__name__}, {numbers_in(job.model):,} parameters"), ("data", data.name)]
    if data.tokenizer is not None:
        about.append(("vocabulary", f"{data.tokenizer.vocab_size:,} {data.tokenizer.kind}"))
    return Explanation(
        title or config.recipe or config.model,
        workload,
        about,
        parameters_of(config, job, seen, reading),
        groups_of(seen),
        loop_of(config, job, seen),
        reading.batch(),
        reading.forward(),
        reading.loss(),
        gradients_of(config, seen, chosen, reading.meaning),
        update_of(seen, chosen),
        reset_of(seen, chosen),
        notes_of(config, job),
    )


def notes_of(config: Config, job: Job) -> list[str]:
    """What a reader should know of the difference between this iteration and those of `fivestep train`."""
    notes = []
    if is_by_program(config, job):
        notes.append("fivestep train makes one compiled program of these five steps (--graph): the same, to rounding")
    if config.precision != "fp32":
        notes.append(f"forward and loss are in {config.precision}: gradients have two or three digits")
    return notes


# --- stages 1 to 3: what is there before the batch ---


def parameters_of(config: Config, job: Job, seen: Iteration, reading: "Reading") -> Parameters:
    """Stage 1: the options that decide most, and what they are applied to."""
    data, per_step = job.data.train, sum(units_in(batch, reading.workload) for batch in seen.before.window)
    tokens = getattr(data, "tokens", None)
    labels = getattr(data, "labels", None)
    size = len(tokens) if tokens is not None else len(labels) if labels is not None else None
    parameters = list(job.model.parameters())
    return Parameters(
        settings_of(config, reading.workload),
        type(job.model).__name__,
        numbers_in(job.model),
        sum(p.numel() for p in parameters if p.requires_grad),
        layers_of(seen),
        per_step,
        "rows" if reading.workload == ROWS else "tokens",
        size,
    )


def settings_of(config: Config, workload: str) -> list[Setting]:
    """The options that decide most, those that were given."""
    length = {WINDOWS: "tokens of a window", SEGMENTS: "tokens of a segment"}.get(workload, "")
    columns = {WINDOWS: "windows a step", SEGMENTS: "columns of text, side by side"}.get(workload, "rows a step")
    known = [
        ("max_iters", config.max_iters, "how many updates in all"),
        ("epochs", config.epochs, "how many passes over the data"),
        ("until", config.until, "where training ends"),
        ("learning_rate", config.learning_rate, "how far a weight may move in an update"),
        ("batch_size", config.batch_size, columns),
        ("block_size", config.block_size if workload == WINDOWS else None, length),
        ("bptt", config.bptt if workload == SEGMENTS else None, length),
        ("accumulate", config.accumulate if config.accumulate > 1 else None, "micro-batches that make a step"),
        ("dropout", config.dropout or None, "share of activations set to 0, at random, in training"),
        ("clip_norm", config.clip_norm or None, "largest norm of all gradients together"),
        ("seed", str(config.seed), "of the order of the data and of all random numbers"),
    ]
    return [Setting(name, number(value), meaning) for name, value, meaning in known if value is not None]


def number(value: Any) -> str:
    """An option's value for a reader."""
    return f"{value:,}" if isinstance(value, int) else f"{value:g}" if isinstance(value, float) else str(value)


def layers_of(seen: Iteration) -> list[Layer]:
    """Every parameter tensor, with the size of its weights, gradient and update."""
    kinds = {name: type(opt).__name__ for opt in seen.five.optimizers for name in names_in(seen, opt)}
    after = dict(seen.after.model.named_parameters())
    return [
        Layer(
            name,
            tuple(p.shape),
            p.numel(),
            kinds.get(name, "frozen"),
            norm(p),
            norm(seen.gradients[name]) if name in seen.gradients else None,
            norm(after[name].detach() - p.detach()),
        )
        for name, p in seen.before.model.named_parameters()
    ]


def groups_of(seen: Iteration) -> list[Group]:
    """Stage 2: every parameter group, with the rate of this update."""
    groups, names = [], names_by_id(seen)
    for optimizer, state, rates in zip(seen.five.optimizers, seen.after.optimizers, seen.rates, strict=True):
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            options = {"lr": rate}
            for key in ("weight_decay", "momentum", "eps"):
                if key in group and group[key] is not None:
                    options[key] = float(group[key])
            if "betas" in group:
                options |= {"beta1": float(group["betas"][0]), "beta2": float(group["betas"][1])}
            held = group["params"]
            kept = {key for p in held for key, value in state[names[id(p)]].items() if is_kept(value)}
            groups.append(
                Group(type(optimizer).__name__, len(held), sum(p.numel() for p in held), options, sorted(kept))
            )
    return groups


def is_kept(value: Any) -> bool:
    """Whether an optimizer's entry is one number a weight."""
    return isinstance(value, Tensor) and value.ndim > 0


def loop_of(config: Config, job: Job, seen: Iteration) -> Loop:
    """Stage 3."""
    before = seen.before
    return Loop(
        before.step,
        planned_steps(config, job),
        before.epoch + 1,
        before.position,
        batches_per_epoch(job.data.train, before.epoch),
        len(before.window),
        config.muon_learning_rate or config.learning_rate if config.optimizer == "muon" else config.learning_rate,
        seen.rates[0][0],
        config.schedule if config.schedule != "constant" or not config.warmup_iters else "constant after a warm-up",
    )


# --- stages 4 to 6: the batch, what the model says, how wrong it is ---


class Reading:
    """The first micro-batch under the weights it met, and the losses of the whole window, computed again on a copy.

    Same weights, same random states, same hidden state: the same numbers as in the step. Where the step's loss never
    held its logits (`loop/vocabulary.py`), the same to rounding.
    """

    def __init__(self, config: Config, job: Job, seen: Iteration, workload: str):
        self.config, self.job, self.seen, self.workload = config, job, seen, workload
        before, five = seen.before, seen.five
        objective, carry = five.objective, before.carry
        self.criterion: Any = copy(objective.criterion)
        self.criterion.reduction = "none"
        self.losses: list[Tensor] = []
        with torch.no_grad(), before.again(), path_seen(before.model) as path:
            for i, batch in enumerate(before.window):
                with five.autocast:
                    outputs, targets, carry = objective.forward(before.model, batch, carry)
                self.losses.append(self.criterion(outputs.float(), targets).detach())
                if not i:
                    self.outputs, self.targets, self.carry = outputs.float(), targets, carry
                    self.path = list(path.parts)
        self.inputs = objective.pair(before.window[0])[0]
        self.count = float(sum(float(objective.count(batch)) for batch in before.window))
        self.classes = None if self.targets.is_floating_point() else self.outputs.shape[-1]

    def token(self, id_: int) -> str:
        """The text of a token, the number of a class."""
        return token_text(self.job.data.tokenizer, id_)

    def axes(self, sizes: Index, is_output: bool = False) -> tuple[str, ...]:
        """Return names for the axes of a tensor of these sizes. is_output: it is what the whole model gives out."""
        if self.workload == ROWS:
            names: tuple[str, ...] = ("batch",)
        else:
            names = ("batch", "time") if self.workload == WINDOWS else ("seq_len", "batch_size")
        leading = tuple(self.inputs.shape[: len(names)])
        if sizes[: len(names)] != leading:
            return tuple(f"axis {i}" for i in range(len(sizes)))
        if is_output:
            return (*names, self.last_axis()) if len(sizes) > len(names) else names
        config, named = self.config, []
        named += [(config.n_hidden, "n_hidden")] if config.model != "gpt" and config.model != "gpt2" else []
        named += [(config.n_embd, "n_embd")] if self.workload != ROWS else []
        meanings = [[name for one, name in named if one == size] for size in sizes[len(names) :]]
        return (*names, *(found[0] if len(found) == 1 else "width" for found in meanings))

    def last_axis(self) -> str:
        """The name of the outputs' last axis."""
        if self.classes is None:
            return "values"
        return "classes" if self.workload == ROWS else "vocab_size"

    def meaning(self, name: str, index: Index) -> str:
        """Whose row of a table a weight is in, where the rows are the vocabulary's."""
        sizes = tuple(dict(self.seen.before.model.named_parameters())[name].shape)
        if self.job.data.tokenizer is None or sizes[0] != self.classes:
            return ""
        first = quoted(self.token(index[0]))
        if self.config.model == "bigram":
            return f"the logit of {quoted(self.token(index[1]))} after {first}"
        return f"of {first}" if len(sizes) == 1 else f"in the row of {first}"

    def shaped(self, name: str, sizes: Index, dtype: torch.dtype, axes: tuple[str, ...] = ()) -> Shape:
        """A tensor's shape with its axes named."""
        return Shape(name, axes or self.axes(sizes), sizes, str(dtype).removeprefix("torch."))

    def rows(self) -> tuple[Tensor, Tensor, Tensor]:
        """Inputs, targets and losses of the first micro-batch, a row for each window or column: [rows, time]."""
        inputs, targets, losses = self.inputs, self.targets, self.losses[0]
        if self.workload == SEGMENTS:
            seq_len, columns = inputs.shape
            return inputs.t(), targets.view(seq_len, columns).t(), losses.view(seq_len, columns).t()
        return inputs, targets.view(inputs.shape), losses.view(inputs.shape)

    def row_of_output(self, row: int, time: int) -> int:
        """Where the output of a window's, or column's, position stands among the flattened ones."""
        rows, length = self.rows()[0].shape
        return time * rows + row if self.workload == SEGMENTS else row * length + time

    def batch(self) -> Batch:
        """Stage 4."""
        before, objective = self.seen.before, self.seen.five.objective
        first, second = objective.pair(before.window[0])
        text: list[TextRow] = []
        examples: list[ExampleRow] = []
        if self.workload == ROWS:
            shapes = [
                self.shaped("features", tuple(first.shape), first.dtype, ("batch", "features")),
                self.shaped("labels", tuple(second.shape), second.dtype, ("batch", "values")[: second.ndim]),
            ]
            examples = [self.example(i) for i in range(min(MOST_EXAMPLES, len(first)))]
        else:
            names = ("xb", "yb") if self.workload == WINDOWS else ("data", "target")
            flat = ("seq_len * batch_size",) if self.workload == SEGMENTS else ()
            shapes = [
                self.shaped(names[0], tuple(first.shape), first.dtype),
                self.shaped(names[1], tuple(second.shape), second.dtype, flat),
            ]
            inputs, targets, losses = self.rows()
            text = [
                TextRow(
                    [self.token(i) for i in inputs[row].tolist()],
                    [self.token(i) for i in targets[row].tolist()],
                    losses[row].tolist(),
                )
                for row in range(min(MOST_ROWS, len(inputs)))
            ]
        offsets = getattr(self.job.data.train, "offsets", None)
        offset = None if offsets is None or self.workload == ROWS else int(offsets(before.epoch, before.position)[0])
        tokenizer = self.job.data.tokenizer
        joint = " " if tokenizer is not None and tokenizer.kind == "words" else ""
        return Batch(shapes, self.count, offset, text, joint, examples, self.side(), self.carried())

    def side(self) -> int | None:
        """Of square pictures: their side."""
        if self.job.data.name != "digits":
            return None
        side = math.isqrt(self.inputs.shape[-1])
        return side if side * side == self.inputs.shape[-1] else None

    def example(self, row: int) -> ExampleRow:
        """A row of features and labels."""
        return ExampleRow(
            self.inputs[row].flatten().tolist(),
            self.targets[row].flatten().tolist(),
            self.outputs[row].flatten().tolist(),
            float(self.losses[0][row].double().mean()),
        )

    def carried(self) -> Carry | None:
        """The hidden state; None for a model without one."""
        after = tensors(self.carry)
        if self.workload != SEGMENTS or not after:
            return None
        before = tensors(self.seen.before.carry)
        names = ("hidden", "cell")
        shapes = [
            self.shaped(name, tuple(one.shape), one.dtype, ("n_layer", "batch_size", "n_hidden"))
            for name, one in zip(names, after, strict=False)
        ]
        ended = None
        if self.seen.previous:
            target = self.seen.five.objective.pair(self.seen.previous[-1])[1]
            ended = self.token(int(target.view(-1, self.inputs.shape[1])[-1, 0]))
        return Carry(shapes, [norm(one) for one in before], [norm(one) for one in after], not before, ended)

    def forward(self) -> Forward:
        """Stage 5."""
        path = [
            (name, kind, self.shaped(name, sizes, dtype, self.axes(sizes, part == len(self.path))))
            for part, (name, kind, sizes, dtype) in enumerate(self.path, 1)
        ]
        sizes = (*self.inputs.shape[: -1 if self.workload == ROWS else None], *self.outputs.shape[-1:])
        output = self.shaped(
            "logits" if self.classes else "outputs", sizes, self.outputs.dtype, self.axes(sizes, True)
        )
        if self.classes is None:
            return Forward(path, output, [], None)
        places = self.places()
        picked = [places[i] for i in sorted({0, len(places) // 2, len(places) - 1})]
        return Forward(path, output, [self.guess(*place) for place in picked], self.heat(places[:MOST_PLACES]))

    def places(self) -> list[tuple[str, str, int]]:
        """A name, what is read there, and the row of its output, for each position of the first window or column."""
        if self.workload == ROWS:
            return [(f"row {i}", "", i) for i in range(min(MOST_PLACES, len(self.inputs)))]
        inputs = self.rows()[0][0].tolist()
        name = "xb[0, {}]" if self.workload == WINDOWS else "data[{}, 0]"
        return [(name.format(t), self.token(id_), self.row_of_output(0, t)) for t, id_ in enumerate(inputs)]

    def guess(self, place: str, sees: str, row: int) -> Guess:
        """What the model says at one position."""
        logits = self.outputs[row].double()
        shares, target = logits.softmax(0), int(self.targets[row])

        def likely(id_: int) -> Likely:
            return Likely(self.token(id_), float(logits[id_]), float(shares[id_]))

        top = logits.topk(min(LIKELIEST, len(logits))).indices.tolist()
        rank = 1 + int((logits > logits[target]).sum())
        return Guess(place, sees, [likely(i) for i in top], likely(target), rank, float(logits.logsumexp(0)))

    def heat(self, places: list[tuple[str, str, int]]) -> Heat:
        """The logits of some positions, for the tokens that matter there: the wanted ones and the likeliest."""
        rows = [row for _, _, row in places]
        wanted, columns = [int(self.targets[row]) for row in rows], set()
        assert self.classes is not None
        if self.classes <= MOST_COLUMNS:
            columns = set(range(self.classes))
        columns |= set(wanted)
        for rank in range(LIKELIEST):
            for row in rows:
                if len(columns) < MOST_COLUMNS:
                    columns.add(int(self.outputs[row].topk(min(LIKELIEST, self.classes)).indices[rank]))
        order = sorted(columns)
        return Heat(
            [place for place, _, _ in places],
            [sees for _, sees, _ in places],
            [self.token(id_) for id_ in order],
            [self.outputs[row][order].tolist() for row in rows],
            [order.index(target) for target in wanted],
        )

    def loss(self) -> Loss:
        """Stage 6."""
        losses = torch.cat([one.flatten() for one in self.losses]).double()
        if self.classes is not None:
            baseline, name = math.log(self.classes), f"ln {self.classes:,}"
        else:
            labels = torch.cat([self.seen.five.objective.pair(b)[1].flatten() for b in self.seen.before.window])
            baseline, name = float(labels.double().var(unbiased=False)), "the labels' variance"
        return Loss(
            float(self.seen.result.loss),
            float(losses.sum()) / self.count,
            len(losses),
            float(losses.min()),
            float(losses.max()),
            baseline,
            name,
            self.classes,
            float(getattr(self.criterion, "label_smoothing", 0.0)),
        )


# --- stages 7 to 9: gradients, update, reset ---


def chosen_weights(seen: Iteration) -> list[tuple[str, Index]]:
    """Three weights to look at: the steepest of the first, the middle and the last tensor that has a gradient; where
    there are fewer tensors, the steepest of all."""
    named = [name for name, grad in seen.gradients.items() if bool(grad.abs().max() > 0)]
    order = [name for name, _ in seen.before.model.named_parameters() if name in named]
    if len(order) >= 3:
        return [steepest(seen.gradients[name], name)[0] for name in (order[0], order[len(order) // 2], order[-1])]
    found = [one for name in order for one in steepest(seen.gradients[name], name, 3)]
    found.sort(key=lambda one: -abs(float(seen.gradients[one[0]][one[1]])))
    return found[:3]


def steepest(grad: Tensor, name: str, most: int = 1) -> list[tuple[str, Index]]:
    """The places of the largest gradients of a tensor."""
    flat = grad.abs().flatten().topk(min(most, grad.numel())).indices.tolist()
    return [(name, tuple(int(i) for i in torch.unravel_index(torch.tensor(at), grad.shape))) for at in flat]


def gradients_of(
    config: Config, seen: Iteration, chosen: list[tuple[str, Index]], meaning: Callable[[str, Index], str]
) -> Gradients:
    """Stage 7."""
    total = float(seen.result.grad_norm)
    factor = min(1.0, config.clip_norm / (total + 1e-6)) if config.clip_norm else 1.0
    unused = [
        name for name, p in seen.before.model.named_parameters() if p.requires_grad and name not in seen.gradients
    ]
    tolerance = TOLERANCE if config.precision == "fp32" else ROUGH
    return Gradients(
        finite_differences(seen, chosen, tolerance, meaning),
        total,
        config.clip_norm or None,
        config.clip_value or None,
        factor,
        unused,
        tolerance,
    )


def finite_differences(
    seen: Iteration, chosen: list[tuple[str, Index]], tolerance: float, meaning: Callable[[str, Index], str]
) -> list[Slope]:
    """The loss a little above and a little below each chosen weight, in float64."""
    moment = seen.before.in_double()
    weights = dict(moment.model.named_parameters())
    slopes = []
    for name, index in chosen:
        weight, gradient = float(weights[name][index].detach()), float(seen.gradients[name][index])
        above, below = (nudged(seen, moment, weights[name], index, weight + h) for h in (NUDGE, -NUDGE))
        difference = (above - below) / (2 * NUDGE)
        relative = abs(gradient - difference) / max(abs(gradient), abs(difference))
        agrees = relative <= tolerance
        slopes.append(
            Slope(
                name, index, meaning(name, index), weight, gradient, NUDGE, above, below, difference, relative, agrees
            )
        )
    return slopes


def nudged(seen: Iteration, moment: Moment, weights: Tensor, index: Index, value: float) -> float:
    """The window's loss with one weight set to `value`; it is put back."""
    with torch.no_grad(), moment.again():
        was = weights[index].clone()
        weights[index] = value
        loss = float(window_loss(seen.five, moment, moment.model, precise=True))
        weights[index] = was
    return loss


def update_of(seen: Iteration, chosen: list[tuple[str, Index]]) -> Update:
    """Stage 8: one weight of each optimizer worked out, and the batch's loss once more."""
    with seen.before.again():
        loss = float(window_loss(seen.five, seen.before, seen.after.model))
    found = [one for i in range(len(seen.five.optimizers)) if (one := arithmetic_of(seen, i, chosen)) is not None]
    return Update(found, loss)


def arithmetic_of(seen: Iteration, number: int, chosen: list[tuple[str, Index]]) -> Arithmetic | None:
    """One weight through an optimizer: a chosen one, else the steepest it holds; None where it moves nothing."""
    optimizer = seen.five.optimizers[number]
    held = names_in(seen, optimizer)
    mine = [one for one in chosen if one[0] in held]
    mine += [
        steepest(seen.clipped[name], name)[0]
        for name in held
        if not mine and name in seen.clipped and bool(seen.clipped[name].abs().max() > 0)
    ]
    if not mine:
        return None
    (name, index), names = mine[0], names_by_id(seen)
    for group, rate in zip(optimizer.param_groups, seen.rates[number], strict=True):
        if name in [names[id(p)] for p in group["params"]]:
            return worked_out(
                optimizer,
                group,
                rate,
                name,
                index,
                dict(seen.before.model.named_parameters())[name].detach(),
                seen.clipped[name],
                seen.before.optimizers[number][name],
                dict(seen.after.model.named_parameters())[name].detach(),
                seen.after.optimizers[number][name],
                seen.before.step,
            )
    return None


def reset_of(seen: Iteration, chosen: list[tuple[str, Index]]) -> Reset:
    """Stage 9: the next batch's gradient on top of what this step left, for real, on a copy."""
    without = added_up(seen.five, seen.after, seen.clipped)
    names = [name for name in without if name in seen.following]
    taken = [(seen.gradients[name], seen.clipped[name]) for name in seen.clipped]
    is_clipped = not all(torch.equal(gradient, clipped) for gradient, clipped in taken)
    kept = [
        Kept(name, index, *(float(of[name][index]) for of in (seen.clipped, seen.following, without)))
        for name, index in chosen
        if name in names
    ]
    now = (
        total(list(seen.clipped.values())) if is_clipped else float(seen.result.grad_norm)
    )  # stage 7 shows the latter
    following, both = total(list(seen.following.values())), total(list(without.values()))
    along = sum(float((seen.following[name].double() * without[name].double()).sum()) for name in names)
    return Reset(kept, now, following, both, along / (following * both) if following and both else 0.0)


# --- small things ---


def token_text(tokenizer: Tokenizer | None, id_: int) -> str:
    """The text of an id; the id itself where there is no tokenizer, or it has fewer."""
    if tokenizer is None or not 0 <= id_ < tokenizer.vocab_size:
        return str(id_) if tokenizer is None else f"#{id_}"
    return str(tokenizer.vocabulary[id_]) if tokenizer.kind in ("words", "bytes") else tokenizer.decode([id_])


def quoted(token: str) -> str:
    """A token in quotes, the beginning of a long one."""
    return repr(token if len(token) <= LONGEST else f"{token[: LONGEST - 1]}…")


def units_in(batch: Any, workload: str) -> int:
    """Target tokens, or rows, of a batch."""
    labels = tensors(batch)[-1]
    return len(labels) if workload == ROWS else labels.numel()


def names_in(seen: Iteration, optimizer: torch.optim.Optimizer) -> list[str]:
    """The names of the parameters that an optimizer holds, in its order."""
    names = names_by_id(seen)
    return [names[id(p)] for p in held_by(optimizer)]


def names_by_id(seen: Iteration) -> dict[int, str]:
    """The names of the training's own parameters."""
    return {id(p): name for name, p in seen.five.model.named_parameters()}


def numbers_in(model: nn.Module) -> int:
    """How many parameters a model has."""
    return sum(p.numel() for p in model.parameters())


def norm(tensor: Tensor) -> float:
    """The 2-norm, summed in float64."""
    return float(tensor.detach().double().norm())


def total(of: list[Tensor]) -> float:
    """The 2-norm of several tensors together."""
    return math.sqrt(sum(norm(one) ** 2 for one in of))
