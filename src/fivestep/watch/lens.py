"""The lens: at chosen steps, each layer's gradient, update and activations.

    before the step   the weights copied, a hook on each layer
    after it          the hooks taken away; norms of gradients, updates and weights; all figures in one read
                      -> a row of the metrics, a strip a layer under the bar, warnings

A layer is a module that has trained parameters of its own. Owns the figures and the warnings; when a step is made and
where a row is written are `fitting.py`'s. Between two looks nothing of it is on the model, and nothing that it does
changes a bit of the training. A step by program calls no hooks: there gradients and updates are all that is seen.
"""

import math
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from fivestep.errors import UsageError
from fivestep.loop.canonical_names import canonical_pairs
from fivestep.loop.result import StepResult
from fivestep.loop.step import TrainStep

Row = dict[str, Any]
Figures = dict[str, float | None]
KEPT = 12  # looks that a strip shows
MOST_STRIPS = 16  # lines under the bar: layers beyond are shown together with their neighbours
DEAD = 0.95  # share of units from which a layer counts as dead
STILL = 1e-7  # update per weight below which float32 does not move
LARGE = 1.0  # update per weight above which nothing of the weights is left
WILD = 1e3  # spread of the output, also as a multiple of the first look's
IDLE = 0.01  # of the highest learning rate so far: below, no movement is expected
CONVOLUTIONS = (nn.modules.conv._ConvNd, nn.modules.batchnorm._NormBase, nn.GroupNorm)  # their units are dimension 1


@dataclass
class Layer:
    """A module with parameters of its own, and what its hook has noted in one step, on the device."""

    name: str
    module: nn.Module
    parameters: list[nn.Parameter]
    sizes: list[int] = field(default_factory=list)  # elements of each output
    moments: list[tuple[Tensor, Tensor]] = field(default_factory=list)  # std and mean of each output
    alive: Tensor | None = None  # units `[units]` that reached it with anything but 0

    def note(self, module: nn.Module, inputs: Any, output: Any) -> None:
        """The forward hook: reads tensors, keeps three small ones, gives nothing back."""
        given, read = first_tensor(output), first_tensor(inputs)
        if given is not None and given.numel():
            self.sizes.append(given.numel())
            self.moments.append(torch.std_mean(exact(given), correction=0))
        if read is not None and read.requires_grad and read.ndim > 1 and read.numel():  # else it is data, not units
            unit = 1 if isinstance(module, CONVOLUTIONS) else read.ndim - 1
            alive = read.detach().any(dim=[one for one in range(read.ndim) if one != unit])
            if self.alive is None or self.alive.shape == alive.shape:
                self.alive = alive if self.alive is None else self.alive | alive


class Lens:
    """A `TrainStep` that is looked into at every multiple of `every` steps: called in its place, with its attributes.

        seen = Lens(step, 50)
        for result in steps(seen, data, ...):
            row = seen.look(result)        # None at all other steps; seen.warnings says what is wrong, once a layer

    Raises UsageError for an `every` that is no whole number above 0.
    """

    def __init__(self, step: TrainStep, every: int):
        if isinstance(every, bool) or not isinstance(every, int) or every < 1:
            raise UsageError(f"lens = {every!r} must be a whole number of steps, 1 or more (--lens)")
        self.step, self.every = step, every
        self.taken: tuple[int, list[Layer], list[Tensor]] | None = None  # of the step just made
        self.judge = Judge()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.step, name)

    def __call__(self, *window: Any, apply: bool = True) -> Any:
        """The step; where it is a chosen one, its layers take notes."""
        self.taken = None
        number = self.step.state.clock.step + 1
        if number % self.every or not apply:
            return self.step(*window, apply=apply)
        layers = layers_of(self.step)
        weights = [p.detach() for layer in layers for p in layer.parameters]
        before = [torch.empty_like(weight) for weight in weights]
        if layers:
            torch._foreach_copy_(before, weights)
        with watched(self.step, layers):
            result = self.step(*window)
        if result is not None and layers:
            self.taken = number, layers, before
        return result

    def look(self, result: StepResult) -> Row | None:
        """The row of the step that was just made, where it is a chosen one; its gradients must still be in `.grad`.

            {"step": 50, "epoch": 1, "split": "lens", "layers": {"blocks.0.mlp.input": {
                "grad_norm": 0.12, "update": 0.0011, "mean": 0.01, "std": 0.98, "dead": 0.03}, ...}}

        grad_norm: 2-norm, as the optimizer read it: after clipping. update: 2-norm of what the step changed, over
        that of the weights before. mean, std: of all elements of the layer's output. dead: of the units that reach
        the layer (its input's last dimension; channels), the share that is 0 for the whole batch. None: not known.
        """
        taken, self.taken = self.taken, None
        if taken is None or taken[0] != result.step:
            return None
        layers = figures(*taken[1:])
        self.judge.see(layers, float(result.learning_rate))
        return {"step": result.step, "epoch": result.epoch, "split": "lens", "layers": layers}

    @property
    def warnings(self) -> list[str]:
        """What the last look found wrong, a sentence a layer; each layer's once."""
        return self.judge.found


# --- a look ---


def layers_of(step: TrainStep) -> list[Layer]:
    """The layers of the step's model, in its order; a parameter that two modules share is the first one's."""
    trained, found = {id(p) for p in step.held.now() if p.requires_grad}, []
    for name, module in canonical_pairs(step.model.named_modules()):
        own = [p for p in module.parameters(recurse=False) if id(p) in trained]
        trained -= {id(p) for p in own}
        if own:
            found.append(Layer(name or type(module).__name__, module, own))
    return found


@contextmanager
def watched(step: TrainStep, layers: list[Layer]) -> Iterator[None]:
    """Inside, the layers take notes of what they read and give; afterwards no hook is left, whatever happened."""
    hooks = []
    try:
        for layer in layers if sees_activations(step) else []:
            if layer.module not in left_alone(step):
                hooks.append(layer.module.register_forward_hook(layer.note))
        yield
    finally:
        for hook in hooks:
            hook.remove()


def sees_activations(step: TrainStep) -> bool:
    """Whether hooks may be put on: a program would not call them, and compiled code would be compiled anew."""
    by_program = step.graph is not None and not step.graph.refused
    modules = step.model.modules()
    return not by_program and not any(
        isinstance(one, torch.jit.ScriptModule)
        or one._compiled_call_impl is not None
        or type(one).__name__ == "OptimizedModule"
        for one in modules
    )


def left_alone(step: TrainStep) -> list[Any]:
    """The modules whose hooks would have the objective take another path: a fused loss calls neither."""
    fused = getattr(step.objective, "fused", False)
    return [step.model, getattr(step.model, "decoder", None)] if fused else []


def figures(layers: list[Layer], before: list[Tensor]) -> dict[str, Figures]:
    """Each layer's figures, by its name. Changes `before` into what the step took away."""
    parameters = [p for layer in layers for p in layer.parameters]
    grads = [dense(p.grad) if p.grad is not None else torch.zeros(1, device=p.device) for p in parameters]
    sizes = norms(before)
    torch._foreach_sub_(before, [p.detach() for p in parameters])
    alive = [(layer.alive.sum() / layer.alive.numel()) for layer in layers if layer.alive is not None]
    moments = [value for layer in layers for pair in layer.moments for value in pair]
    values = iter(read([*norms(grads), *norms(before), *sizes, *moments, *alive]))
    of_grads, of_updates, of_weights = ([next(values) for _ in parameters] for _ in range(3))
    pairs = {layer.name: [(next(values), next(values)) for _ in layer.moments] for layer in layers}
    shares = {layer.name: next(values) for layer in layers if layer.alive is not None}

    found, at = {}, 0
    for layer in layers:
        here = slice(at, at := at + len(layer.parameters))
        size = math.hypot(*of_weights[here])
        mean, std = pooled(layer.sizes, pairs[layer.name])
        found[layer.name] = {
            "grad_norm": math.hypot(*of_grads[here]),
            "update": math.hypot(*of_updates[here]) / size if size else None,
            "mean": mean,
            "std": std,
            "dead": 1 - shares[layer.name] if layer.name in shares else None,
        }
    return found


def norms(tensors: list[Tensor]) -> list[Tensor]:
    """The 2-norm of each tensor, in float32 at least."""
    half = [tensor.dtype in (torch.float16, torch.bfloat16) for tensor in tensors]
    if not any(half):
        return list(torch._foreach_norm(tensors, 2))
    halves = iter(
        torch._foreach_norm([one for one, is_half in zip(tensors, half, strict=True) if is_half], 2, torch.float32)
    )
    wholes = [one for one, is_half in zip(tensors, half, strict=True) if not is_half]
    others = iter(torch._foreach_norm(wholes, 2) if wholes else ())
    return [next(halves if is_half else others) for is_half in half]


def read(scalars: list[Tensor]) -> list[float]:
    """All of them at once."""
    kinds: dict[Any, list[int]] = defaultdict(list)
    for index, scalar in enumerate(scalars):
        kinds[scalar.dtype, scalar.device].append(index)
    values = [0.0] * len(scalars)
    for indices in kinds.values():  # one, but for models of several kinds of numbers, or on several devices
        for index, value in zip(indices, torch.stack([scalars[i] for i in indices]).tolist(), strict=True):
            values[index] = value
    return values


def pooled(sizes: list[int], pairs: list[tuple[float, float]]) -> tuple[float | None, float | None]:
    """Mean and standard deviation of all elements together, from those of each part (std, mean)."""
    if not sizes:
        return None, None
    whole = sum(sizes)
    mean = sum(size * part for size, (_, part) in zip(sizes, pairs, strict=True)) / whole
    squares = sum(size * (std**2 + (part - mean) ** 2) for size, (std, part) in zip(sizes, pairs, strict=True))
    return mean, math.sqrt(squares / whole) if squares >= 0 else math.nan


def first_tensor(value: Any) -> Tensor | None:
    """The first dense tensor of floating point numbers in a module's inputs or output."""
    if isinstance(value, Tensor):
        usual = value.is_floating_point() and value.layout is torch.strided
        return value if usual else None
    inside = value if isinstance(value, list | tuple) else value.values() if isinstance(value, dict) else ()
    return next((found for part in inside if (found := first_tensor(part)) is not None), None)


def exact(value: Tensor) -> Tensor:
    """For sums over many elements: float32 at least."""
    value = value.detach()
    return value if value.dtype in (torch.float32, torch.float64) else value.float()


def dense(grad: Tensor) -> Tensor:
    """The values of a gradient: of a sparse one those that are there."""
    return grad.coalesce().values() if grad.layout is torch.sparse_coo else grad


# --- what is wrong ---


class Judge:
    """Says once a layer what is wrong: it died, explodes, or stopped moving.

    Two looks in a row must agree, but where an output explodes: there may be no second one.
    """

    def __init__(self) -> None:
        self.first: dict[str, Figures] = {}
        self.suspected: dict[str, str] = {}
        self.told: set[str] = set()
        self.highest = 0.0  # learning rate so far
        self.found: list[str] = []

    def see(self, layers: dict[str, Figures], rate: float) -> None:
        """One look; `found` holds what it brought."""
        self.highest = max(self.highest, rate)
        self.found = []
        for name, now in layers.items():
            wrong = fault(now, self.first.setdefault(name, now), moves=rate > IDLE * self.highest)
            sure = wrong == "explodes" or (wrong and self.suspected.get(name) == wrong)
            if sure and name not in self.told:
                self.told.add(name)
                self.found.append(in_words(name, wrong, now))
            self.suspected[name] = wrong


def fault(now: Figures, first: Figures, moves: bool = True) -> str:
    """What a layer's figures say: "explodes", "overrun", "dead", "unreached", "still", or nothing."""
    if any(value is not None and not math.isfinite(value) for value in now.values()):
        return "explodes"
    spread, spread_first = now["std"] or 0.0, first["std"] or 0.0
    if spread > WILD and spread > WILD * spread_first:
        return "explodes"
    if now["update"] is not None and now["update"] > LARGE:
        return "overrun"
    if now["dead"] is not None and now["dead"] >= DEAD:
        return "dead"
    if now["grad_norm"] == 0:
        return "unreached"
    return "still" if moves and now["update"] is not None and now["update"] < STILL else ""


def in_words(name: str, wrong: str, now: Figures) -> str:
    """A warning and its remedy."""
    if wrong == "dead":
        return (
            f"{name} reads a dead layer: {now['dead']:.0%} of the units that reach it are 0 for the whole batch; "
            "lower the learning rate, warm it up (--warmup-iters), or take an activation with a slope below 0 (GELU)"
        )
    if wrong == "explodes":
        spread = "not known" if now["std"] is None else f"{now['std']:.3g}"
        return (
            f"{name} explodes: the spread of its output is {spread}; lower the learning rate, clip (--clip-norm 1), "
            "or normalise before it"
        )
    if wrong == "overrun":
        return (
            f"{name} explodes: a step changes it by {now['update']:.2g} times its weights; lower the learning rate, "
            "or warm it up (--warmup-iters)"
        )
    if wrong == "unreached":
        return (
            f"{name} does not move: its gradient is 0; see that the loss depends on its output, and that no "
            "activation after it is dead"
        )
    return (
        f"{name} does not move: a step changes it by {now['update']:.1g} of its weights, less than float32 can hold; "
        "raise the learning rate, or see what makes its gradient so small"
    )


# --- under the bar ---

BLOCKS = "▁▂▃▄▅▆▇█"
LOW, HIGH = -6.0, 0.0  # decades of updates per weight that the blocks span


class Strips:
    """A line a layer: its updates at the last looks as blocks, and the newest figures."""

    def __init__(self) -> None:
        self.past: dict[str, list[float]] = defaultdict(list)
        self.warned: set[str] = set()

    def lines(self, layers: dict[str, Figures], width: int) -> list[tuple[str, str]]:
        """(text, style) of each, under a title; at most MOST_STRIPS, neighbours together where there are more."""
        groups = grouped(list(layers))
        room = max(map(len, groups))
        shown = [(f"{'update/weight':<{room + KEPT + 2}}      now  gradient    dead", "bold")]
        for group, names in groups.items():
            now = [layers[name] for name in names]
            update = max((one["update"] or 0.0 for one in now), default=0.0)
            gradient = math.hypot(*(one["grad_norm"] or 0.0 for one in now))
            dead = [one["dead"] for one in now if one["dead"] is not None]
            past = self.past[group] = [*self.past[group], update][-KEPT:]
            strip = "".join(map(block, past)).ljust(KEPT)
            share = f"{max(dead):.0%}" if dead else "-"
            text = f"{group:<{room}}  {strip}  {update:>7.1e}  {gradient:>8.1e}  {share:>6}"
            shown.append((text[:width], "bold red" if any(map(fault, now, now)) else "cyan"))
        return shown


def block(update: float) -> str:
    """An update per weight as a block: a millionth is the lowest, all of it the highest."""
    if not update > 0:
        return " "
    height = (math.log10(update) - LOW) / (HIGH - LOW) if math.isfinite(update) else 1.0
    return BLOCKS[min(len(BLOCKS) - 1, max(0, int(height * len(BLOCKS))))]


def grouped(names: list[str]) -> dict[str, list[str]]:
    """The names, the longest cut by a part until few enough are left: `blocks.0.mlp.input` -> `blocks.0`."""
    groups = {name: [name] for name in names}
    while len(groups) > MOST_STRIPS and (deepest := max(name.count(".") for name in groups)):
        merged: dict[str, list[str]] = defaultdict(list)
        for name, within in groups.items():
            merged[name.rpartition(".")[0] if name.count(".") == deepest else name] += within
        groups = dict(merged)
    if len(groups) > MOST_STRIPS:  # the first and the last tell most
        kept = [*list(groups)[: MOST_STRIPS // 2], *list(groups)[-MOST_STRIPS // 2 :]]
        groups = {name: groups[name] for name in kept}
    return groups
