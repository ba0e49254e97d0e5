"""A step that is not finite: undone, looked into, and told.

    failed window -> undone -> "skip": its figures for the journal
                            -> "stop": gradients, parameters, buffers, batch, and one second pass -> NonFiniteError

Owns what `on_nonfinite` means, the snapshot that undoes a window, and the words. The second pass leaves no trace:
gradients, buffers, random states, modes and the carry are afterwards as they were.
"""

import math
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from fivestep import processes
from fivestep.data.generators import random_state_kept
from fivestep.data.stream import nothing_drawn
from fivestep.errors import NonFiniteError, UsageError, named, suggestion
from fivestep.loop.arithmetic import count_of
from fivestep.loop.batch import distinct, is_empty, rows, tensors, to_device
from fivestep.loop.canonical_names import canonical_pairs
from fivestep.loop.precision import SMALLEST
from fivestep.loop.shares import Share
from fivestep.loop.state import State

if TYPE_CHECKING:
    from fivestep.loop.step import TrainStep

ON_NONFINITE = ("stop", "skip")
NAMED = 5  # names that a message tells of a longer list

Buffers = list[tuple[nn.Module, str, Tensor, Tensor]]  # owner, name, the buffer itself, a copy of its values


def checked_on_nonfinite(given: str) -> str:
    """`given` itself. Raises UsageError for what is no way of treating a step that is not finite."""
    if given not in ON_NONFINITE:
        hint = suggestion(str(given), ON_NONFINITE)
        raise UsageError(f"on_nonfinite = {named(given)} is not one of stop, skip (--on-nonfinite){hint}")
    return given


@dataclass(slots=True)
class Before:
    """What a window's passes move beside the gradients, as it was before."""

    generator: Tensor | None  # the state of torch's generator on the parameters' device
    scale: tuple[float, int] | None  # of fp16
    buffers: Buffers | None  # None where a failed window ends the run: a copy a step would be for nothing

    @classmethod
    def window(cls, step: "TrainStep", undoable: bool) -> "Before":
        """As it is now. Takes about 2 µs on the CPU; where it is to be `undoable`, a copy of the buffers."""
        scale = step.state.loss_scale
        return cls(
            None if (generator := generator_of(step)) is None else generator.get_state(),
            (scale.scale, scale.good_steps) if scale else None,
            buffers_of(step) if undoable else None,
        )

    def undo(self, state: State) -> None:
        """Put loss scale and buffers back. Random states go on: a window left out draws as one that counts."""
        if state.loss_scale and self.scale is not None:
            state.loss_scale.scale, state.loss_scale.good_steps = self.scale
        put_back(self.buffers or [])


def left_out(
    step: "TrainStep", window: tuple[Any, ...], count: Any, loss: Tensor, norm: Tensor, before: Before
) -> dict[str, Any]:
    """The figures of a window that is skipped: the step it would have made, loss and gradient norm.

    Raises NonFiniteError where the run is to stop, and where the parameters themselves are not finite: then no other
    batch will do better.
    """
    stops = step.on_nonfinite == "stop" or processes.highest(spoilt(parameters_of(step))["count"])[0] > 0
    if stops and step.parallel is not None:
        raise found_together(step, len(window), loss, norm)
    if stops:
        details = diagnosed(step, window, count, loss, norm, before)
        raise NonFiniteError(in_words(details), details)
    return {"step": step.state.clock.step + 1, "loss": float(loss), "grad_norm": float(norm)}


def found_together(step: "TrainStep", batches: int, loss: Tensor, norm: Tensor) -> NonFiniteError:
    """The error of several processes, the same in all: it names those whose own part of the loss was not finite."""
    state, first = step.state, step.state.position
    host = None if math.isfinite(step.world.own_loss) else processes.host()
    told = processes.from_all([host, spoilt(parameters_of(step))])  # in shards a part of them each
    ranks = [host for host, _ in told if host]
    parameters = max((one for _, one in told), key=lambda one: one["count"])
    bad = f", {parameters['count']} of {parameters['of']} parameters not finite themselves"
    named_ranks = ", ".join(ranks) or "none: only the gradients were not finite"
    details = {
        "step": state.clock.step + 1,
        "epoch": state.clock.epoch + 1,
        "batches": [first, first + batches - 1],
        "loss": float(loss),
        "grad_norm": float(norm),
        "ranks": ranks,
        "parameters": parameters,
    }
    place = f"batch {first}" if batches == 1 else f"batches {first} to {first + batches - 1}"
    return NonFiniteError(
        f"stopped: step {details['step']} (epoch {details['epoch']}, {place}) was not finite: the loss is "
        f"{details['loss']}, the gradient norm {details['grad_norm']}; the loss of these was not: {named_ranks}. "
        f"No process applied the update: the weights are those of step {state.clock.step}"
        f"{bad if parameters['count'] else ''}. One process alone, resumed here, tells where it began",
        details,
    )


def nothing_learned(state: State, data: Any) -> NonFiniteError | UsageError | None:
    """Return the error for an epoch of `data`, just ended, without an update; None if there was one."""
    clock = state.clock
    if state.position == 0:
        return UsageError(nothing_drawn(data, clock.epoch))
    skipped = [entry for entry in state.skipped if entry["epoch"] == clock.epoch]
    if state.epoch_loss.entries:
        return None
    if not skipped:
        return UsageError(
            f"all batches of epoch {clock.epoch + 1} are empty ({state.position} in all: None, or tensors without "
            "elements). At least one must hold data. Check the loader's collate_fn"
        )
    return NonFiniteError(
        f"stopped: epoch {clock.epoch + 1} ended without a single update, each of its {len(skipped)} steps was "
        f"skipped as not finite (--on-nonfinite skip); the weights are those of step {clock.step}",
        {"step": clock.step, "epoch": clock.epoch + 1, "skipped": skipped},
    )


@contextmanager
def one_row_named(place: Callable[[], str | None]) -> Iterator[None]:
    """Turn torch's error about a batch norm that is given a single row into a UsageError that names the batch.

    place: returns the name of the batch with one row. Where it returns None, the error stays the model's own.
    """
    try:
        yield
    except ValueError as error:
        if "more than 1 value per channel" not in str(error) or (name := place()) is None:
            raise
        where = f", on rank {processes.rank()}," if processes.size() > 1 else ""
        raise UsageError(
            f"{name} has 1 row{where} and batch norm needs at least 2 rows to compute statistics. Use drop_last=True "
            "in the DataLoader, or another batch_size"
        ) from error


def place_of_one_row(state: State, window: list[Any]) -> str | None:
    """Return the place in the epoch of the first batch of `window` that has one row; None if there is none."""
    for number, share in enumerate(window):
        if has_one_row(share.batch if isinstance(share, Share) else share):
            return f"batch {state.position + number} of epoch {state.clock.epoch + 1}"
    return None


def has_one_row(batch: Any) -> bool:
    """Return whether `batch` holds tensors, and the first one has one row."""
    return bool(tensors(batch)) and rows(batch) == 1


def diagnosed(
    step: "TrainStep", window: tuple[Any, ...], count: Any, loss: Tensor, norm: Tensor, before: Before
) -> dict[str, Any]:
    """What is known of a failed window: numbers, names and lists that JSON can hold.

    step, epoch (from 1); batches: first and last, by position in the epoch; loss, grad_norm; on_nonfinite; where:
    what the reader calls the batch at fault, or all; targets: False where there was none; gradients, parameters,
    buffers: how many are not finite, of how many, and the first names; buffers_before: whether the buffers are those
    from before the window; inputs: the batches that hold NaN or infinite values, and how many; carry: whether the
    carried state was finite; origin, error: what `second_pass` found (`in`: "norm" where only the norm overflows).
    """
    state, first = step.state, step.state.position
    batches = [to_device(batch, step.parameters[0].device) for batch in window]
    bad_inputs = [sum(bad_values(tensor) for tensor in tensors(batch)) for batch in batches]
    owned = [pair for prefix, root in roots(step) for pair in canonical_pairs(root.named_parameters(prefix))]
    buffers = [pair for prefix, root in roots(step) for pair in canonical_pairs(root.named_buffers(prefix))]
    gradients = spoilt([(name, p.grad) for name, p in parameters_of(step) if p.grad is not None])
    if math.isfinite(loss) and not gradients["count"]:
        found: dict[str, Any] = {"origin": {"batch": None, "pass": "backward", "in": "norm"}, "error": None}
    else:
        found = second_pass(step, batches, before)
    culprit = found["origin"] and found["origin"]["batch"]
    return {
        "step": state.clock.step + 1,
        "epoch": state.clock.epoch + 1,
        "batches": [first, first + len(window) - 1],
        "loss": float(loss),
        "grad_norm": float(norm),
        "on_nonfinite": step.on_nonfinite,
        "where": where(state, *((first, len(window)) if culprit is None else (culprit, 1))),
        "targets": bool(count),
        "gradients": gradients,
        "parameters": spoilt(owned),
        "buffers": spoilt([(name, unmasked(one)) for name, one in buffers]),
        "buffers_before": before.buffers is not None,
        "inputs": [{"batch": first + n, "values": bad} for n, bad in enumerate(bad_inputs) if bad],
        "carry": not any(bad_values(tensor) for tensor in tensors(state.carry)),
        **found,
    }


def where(state: State, position: int, n: int) -> dict[str, Any]:
    """What names `n` batches from `position` of this epoch in the data: indices or offsets, a list a batch, or {}."""
    reader = getattr(state, "reader", None)
    known = {} if reader is None else reader.where(state.clock.epoch, position, n)
    return {name: [indices(batch) for batch in batches] for name, batches in known.items()}


def indices(batch: Any) -> list[Any]:
    """The indices of a batch, or the one of a batch that is an item."""
    return [index_of(one) for one in batch] if isinstance(batch, list | tuple) else [index_of(batch)]


def index_of(index: Any) -> Any:
    """An index as JSON can hold it: a sampler may give numbers of any library, or anything at all."""
    index = index.item() if hasattr(index, "item") else index
    return index if isinstance(index, int | str) else repr(index)


# --- the second pass ---


def second_pass(step: "TrainStep", batches: list[Any], before: Before) -> dict[str, Any]:
    """Forward, and where that is finite backward, once more with hooks, under the window's own random numbers.

    origin: where it began; None where all is finite this time. `batch`: the first, by position in the epoch, whose
    loss or gradient is not finite; `pass`: "forward" or "backward"; `in`: "module", the first in forward order whose
    output is not finite while its inputs are, or the first in backward order where the gradient stops being finite,
    with `name` and `class`; "data": the batch or the carry; "count": the loss of a batch whose count is 0; or
    "loss". error: why there was no second pass.
    """
    compiled = "torch._dynamo" in sys.modules
    eager = torch.compiler.set_stance("force_eager") if compiled else nullcontext()  # compiled code sees no new hooks
    try:
        with without_trace(step, before.generator), eager:
            counts = [0 if is_empty(batch) else count_of(step.objective, batch) for batch in batches]
            empty = [not bool(count) for count in counts]
            carry = step.state.carry
            for n, batch in enumerate(batches):
                if empty[n] and not isinstance(counts[n], Tensor):
                    continue  # the step left it out as well
                given = any(bad_values(tensor) for tensor in tensors([batch, carry]))
                with watched(step) as seen, step.autocast:
                    mean, carry = step.objective.loss(step.model, batch, carry)
                if empty[n] and not all(empty):
                    if is_finite_without_share(step, mean):
                        continue  # its mean is 0/0, with a share of 0
                    where = {"batch": step.state.position + n, "pass": "backward", "in": "count"}
                    return {"origin": where, "error": None}
                origin = origin_in(mean.detach(), seen, given) or origin_behind(step, mean, seen)
                if origin is not None:
                    return {"origin": {"batch": step.state.position + n, **origin}, "error": None}
    except Exception as error:  # whatever goes wrong here must not hide what went wrong before
        return {"origin": None, "error": f"{type(error).__name__}: {error}"}
    return {"origin": None, "error": None}


@contextmanager
def without_trace(step: "TrainStep", generator: Tensor | None) -> Iterator[None]:
    """Inside, torch's generator draws from `generator` on; afterwards all generators and buffers are as before."""
    own, buffers = generator_of(step), buffers_of(step)
    with random_state_kept():
        if own is not None and generator is not None:
            own.set_state(generator)
        try:
            yield
        finally:
            put_back(buffers)


@dataclass(slots=True)
class Call:
    """One call of a module, in the order in which calls end."""

    name: str
    module: nn.Module
    finite: bool  # its inputs
    inputs: list[Tensor]
    outputs: list[Tensor] = field(default_factory=list)
    bad: bool = False  # its output

    def origin(self, direction: str) -> dict[str, Any]:
        """For the details."""
        return {"pass": direction, "in": "module", "name": self.name, "class": type(self.module).__name__}


@contextmanager
def watched(step: "TrainStep") -> Iterator[list[Call]]:
    """Inside, every call of a module of the model, or of the criterion, is noted."""
    calls: list[Call] = []
    running: list[Call] = []
    hooks = []

    def enters(name: str, module: nn.Module) -> Any:
        def hook(_: nn.Module, args: Any, kwargs: Any) -> None:
            inputs = tensors([args, kwargs])
            running.append(Call(name, module, not any(bad_values(one) for one in inputs), inputs))

        return hook

    def leaves(module: nn.Module, args: Any, output: Any) -> None:
        call = running.pop()
        call.outputs = tensors(output)
        call.bad = any(bad_values(one) for one in call.outputs)
        calls.append(call)

    try:
        for name, module in modules_of(step):
            hooks.append(module.register_forward_pre_hook(enters(name, module), with_kwargs=True))
            hooks.append(module.register_forward_hook(leaves))
        yield calls
    finally:
        for hook in hooks:
            hook.remove()


def origin_in(mean: Tensor, seen: list[Call], given: bool) -> dict[str, Any] | None:
    """What made a mean that is not finite: a module, what it was `given`, or else the loss."""
    if not bad_values(mean):
        return None
    for call in seen:  # inner modules end before those that hold them
        if call.bad and call.finite:
            return call.origin("forward")
    return {"pass": "forward", "in": "data" if given or any(call.bad for call in seen) else "loss"}


def origin_behind(step: "TrainStep", mean: Tensor, seen: list[Call]) -> dict[str, Any] | None:
    """What made a gradient that is not finite, of a mean that is: a module, or else the loss."""
    trained = [p for p in step.parameters if p.requires_grad]
    passed = [one for call in seen for one in (*call.inputs, *call.outputs) if one.requires_grad]
    wanted = list({id(one): one for one in (*trained, *passed)}.values())
    scale = SMALLEST if step.state.loss_scale else 1.0  # where a larger one overflows, that is no fault
    grads = torch.autograd.grad(mean, wanted, mean.new_full((), scale), allow_unused=True)
    bad = {id(one) for one, grad in zip(wanted, grads, strict=True) if grad is not None and bad_values(grad)}
    if bad.isdisjoint(map(id, trained)):
        return None
    for last in (False, True):  # parameters last: other modules may share them
        for call in seen:
            behind = call.module.parameters() if last else call.inputs
            if bad.isdisjoint(map(id, call.outputs)) and not bad.isdisjoint(map(id, behind)):
                return call.origin("backward")
    return {"pass": "backward", "in": "loss"}


def is_finite_without_share(step: "TrainStep", mean: Tensor) -> bool:
    """Return whether a mean over a count of 0, weighted by 0, adds finite gradients."""
    wanted = [p for p in step.parameters if p.requires_grad]
    grads = torch.autograd.grad(mean, wanted, torch.zeros_like(mean), allow_unused=True)
    return not any(bad_values(grad) for grad in grads if grad is not None)


# --- what there is to look at ---


def roots(step: "TrainStep") -> list[tuple[str, nn.Module]]:
    """The model, and the criterion where it is a module, each with the prefix of its names."""
    criteria = [step.criterion, getattr(step.criterion, "criterion", None)]
    modules = [one for one in criteria if isinstance(one, nn.Module) and one is not step.model]
    return [("", step.model), *(("criterion", one) for one in modules[:1])]


def modules_of(step: "TrainStep") -> list[tuple[str, nn.Module]]:
    """Every module once, by name."""
    found: dict[nn.Module, str] = {}
    for prefix, root in roots(step):
        for name, module in canonical_pairs(root.named_modules(prefix=prefix)):
            found.setdefault(module, name)
    return [(name, module) for module, name in found.items()]


def parameters_of(step: "TrainStep") -> list[tuple[str, nn.Parameter]]:
    """The parameters that a step updates, by name, in the model's order."""
    held = {id(parameter) for parameter in step.held.now()}
    named_ones = [pair for prefix, root in roots(step) for pair in canonical_pairs(root.named_parameters(prefix))]
    return list({id(p): (name, p) for name, p in reversed(named_ones) if id(p) in held}.values())[::-1]


def buffers_of(step: "TrainStep") -> Buffers:
    """Return every buffer with a copy of its values; of an expanded buffer, of each element of memory once."""
    modules = [root for root in (step.model, step.criterion) if isinstance(root, nn.Module)]
    owners = dict.fromkeys(module for root in modules for module in root.modules())
    return [
        (owner, name, buffer, distinct(buffer).detach().clone())
        for owner in owners
        for name, buffer in owner._buffers.items()
        if buffer is not None and not is_lazy(buffer)
    ]


def put_back(buffers: Buffers) -> None:
    """The same buffers with the same values, also where the forward pass put another in one's place."""
    with torch.no_grad():
        for owner, name, buffer, values in buffers:
            owner._buffers[name] = buffer
            distinct(buffer).copy_(values)


def generator_of(step: "TrainStep") -> torch.Generator | None:
    """torch's own generator on the parameters' device, where its state is quick to read."""
    device = step.parameters[0].device
    if device.type == "cuda":
        return torch.cuda.default_generators[device.index or 0]
    return torch.default_generator if device.type == "cpu" else None


def bad_values(tensor: Tensor) -> int:
    """How many values of `tensor` are NaN or infinite. Reads the device."""
    if is_lazy(tensor) or not (tensor.is_floating_point() or tensor.is_complex()):
        return 0
    values = tensor.detach()
    if values.is_sparse:
        values = values.coalesce().values()
    return int(values.numel() - torch.isfinite(values).sum())


def spoilt(pairs: Iterable[tuple[str, Tensor]]) -> dict[str, Any]:
    """How many of the named tensors hold NaN or infinite values, of how many, and the first names."""
    found = [(name, bad_values(tensor) > 0) for name, tensor in pairs]
    names = [name for name, bad in found if bad]
    return {"count": len(names), "of": len(found), "names": names[:NAMED]}


def unmasked(buffer: Tensor) -> Tensor:
    """A buffer without its -inf, which attention's masks hold on purpose."""
    return buffer.clamp(min=0.0) if buffer.is_floating_point() and not is_lazy(buffer) else buffer


# --- the words ---


def in_words(details: dict[str, Any]) -> str:
    """A few lines: which step and batch, what was not finite, and where that began."""
    first, last = details["batches"]
    batches = f"batch {first}" if first == last else f"batches {first} to {last}"
    if not details["targets"]:
        batches += ", without a single target to learn from"
    step, epoch, loss, norm = (details[name] for name in ("step", "epoch", "loss", "grad_norm"))
    lines = [
        f"stopped before step {step} (epoch {epoch}, {batches}): the loss is {loss}, the gradient norm {norm}; "
        f"the update was not applied, the weights are those of step {step - 1}"
    ]
    lines += [
        f"batch {one['batch']} itself holds NaN or infinite values: {one['values']:,}" for one in details["inputs"]
    ]
    if details["inputs"] and details["on_nonfinite"] == "stop":
        lines[-1] += "; on_nonfinite = 'skip' (--on-nonfinite) leaves such a batch out"
    if details["parameters"]["count"]:
        spoilt_ones = listed(details["parameters"], "parameters")
        lines.append(f"not finite before this step already: {spoilt_ones}; go back to earlier weights")
    if details["buffers"]["count"]:
        since = "before this step already" if details["buffers_before"] else "after this batch"
        lines.append(f"not finite {since}: {listed(details['buffers'], 'buffers')}")
    if not details["carry"]:
        lines.append("the state carried from the batch before is not finite")
    lines += beginning(details)
    if details["gradients"]["count"]:
        lines.append(f"gradients not finite: {listed(details['gradients'], 'parameters')}")
    lines += [f"{name} in the data: {shortened(values)}" for name, values in details["where"].items()]
    return "\n  ".join(lines)


def beginning(details: dict[str, Any]) -> list[str]:
    """Where it began, in a line; nothing where the batch has been named already."""
    origin, (first, last) = details["origin"], details["batches"]
    if details["error"]:
        return [f"where it began is not known: a second pass failed ({details['error'].splitlines()[0]})"]
    if origin is None:
        return ["where it began is not known: it was not found again in a second pass"]
    if origin["in"] == "norm":
        return ["loss and gradients are finite, but too large for their norm"]
    forward, batch = origin["pass"] == "forward", "" if first == last else f" at batch {origin['batch']}"
    if origin["in"] == "data":
        return [] if details["inputs"] or not details["carry"] else [f"it began in what the model was given{batch}"]
    if origin["in"] == "count":
        return [
            f"it began in the loss of batch {origin['batch']}. The batch has a count of 0, so the gradient is 0/0. "
            "Divide by count.clamp(min=1) in the objective, so that the gradient is 0"
        ]
    if origin["in"] == "loss":
        what = "it" if forward else "its gradient"
        return [f"it began in the loss{batch}: {what} is not finite, the model's output is"]
    name = f"'{origin['name']}'" if origin["name"] else "the model"
    what = (
        "its output is not finite, its inputs are"
        if forward
        else "the gradient that reaches it is finite, the one it passes on is not"
    )
    return [f"it began in {name} ({origin['class']}){batch}: {what}"]


def listed(facts: dict[str, Any], kind: str) -> str:
    """`2 of 40 parameters (a, b)`."""
    more = ", ..." if facts["count"] > len(facts["names"]) else ""
    return f"{facts['count']} of {facts['of']} {kind} ({', '.join(facts['names'])}{more})"


def shortened(batches: list[list[Any]]) -> str:
    """The first indices of a few batches, and how many there are: `3, 17, 4, 4, 9, ... (64)`."""
    values = [str(value) for batch in batches for value in batch]
    return ", ".join(values[:NAMED]) + (f", ... ({len(values)})" if len(values) > NAMED else "")
