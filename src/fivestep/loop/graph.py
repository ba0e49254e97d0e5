"""The five steps as one compiled program, for windows of one shape.

    first window            the eager step: it gives the optimizer its state, and says which shape is the full one
    windows of that shape   one call of a program: forward, backward, norm, clip, update
    any other window        the eager step: nothing is ever compiled twice

The same five steps as in `step.py`, on the same tensors: weights, `.grad`, the optimizer's own state. Nothing is read
on the host. An update that is not finite is left out on the device, and so is every one after it, until `confirm`
reads what was latched: where a row is made, at an epoch's end, and before anything is evaluated, sampled or saved.
Owns what may be a program and the words where it may not; recording and compiling are `program.py`'s.
"""

import copy
import math
import random
import sys
import warnings
import weakref
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import chain, repeat
from operator import attrgetter, getitem, is_, itemgetter
from time import perf_counter
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils.stateless import _reparametrize_module
from torch.optim import Optimizer

from fivestep.data.generators import undisturbed
from fivestep.errors import NonFiniteError
from fivestep.interrupts import left_at_once
from fivestep.loop.arithmetic import counted, loss_of, share_of, weighted, window_count
from fivestep.loop.batch import parts, rebuilt, to_device
from fivestep.loop.canonical_names import canonical_pairs
from fivestep.loop.checks import check_mean
from fivestep.loop.diagnosis import roots
from fivestep.loop.lean import plain_step
from fivestep.loop.program import (
    Function,
    NoProgramError,
    Program,
    Recording,
    compile,
    is_kept,
    load,
    recorded,
    require_compiler,
)
from fivestep.loop.state import State
from fivestep.loop.watched import is_watched, module_hooks, step_hooks
from fivestep.loop.window import Window

if TYPE_CHECKING:
    from fivestep.loop.step import TrainStep

AGREEMENT = {"fp32": 1e-3, "bf16": 5e-2}  # relative, of loss and norm: what the first run of a program is held to
RNN_LISTS = ("_flat_weights", "_flat_weight_refs")
UNREAD = 1000  # steps until what was latched is read even where nobody asks
TABLES = ("_parameters", "_buffers", "_modules")  # of a module
# Of a step: what its program is made with.
SETTINGS = attrgetter("model", "objective", "clip_norm", "clip_value", "autocast")
GROUPS, MEMBERS = attrgetter("param_groups"), itemgetter("params")  # of an optimizer, of a group
MARKS = attrgetter("requires_grad", "_backward_hooks", "_post_accumulate_grad_hooks")  # of a parameter
ON_CPU = attrgetter("is_cpu")
PROPORTIONAL = ("Muon",)  # optimizers that read their rate on the host, and whose updates are proportional to it


Figures = Callable[[list[Tensor], list[Tensor]], dict[str, Tensor]]  # of outputs, and of inputs afterwards


@dataclass(slots=True)
class Held:
    """The tensors that a program reads and changes, in the order of its arguments."""

    weights: list[Tensor]
    buffers: list[Tensor]
    gradients: list[Tensor]
    states: list[Tensor]  # of the optimizers
    rates: list[Tensor]
    latch: Tensor


class Graph:
    """The program of a `TrainStep`, made when a full window comes; `say` is told what a person should know."""

    def __init__(self, step: "TrainStep", precision: str):
        self.owner, self.precision = weakref.ref(step), precision  # weak: a step and its program are no cycle
        self.say: Callable[[str], None] | None = None
        self.program: Program | None = None
        self.refused: str | None = None
        self.took = 0.0  # seconds of making the program: no training
        self.shape: Any = None  # of the windows, and the carry, that the program takes
        self.count: Any = None
        self.latch = torch.zeros(4, dtype=torch.float64)  # of the first step that was not finite: number, loss, norm
        self.unread: list[tuple[int, int, int]] = []  # epoch, position and batches of each step since `confirm`
        self.reads = step.on_nonfinite == "skip"  # the figures of each step, on the host
        step.state.latch = self

    @property
    def step(self) -> "TrainStep":
        """The step that this is the program of."""
        step = self.owner()
        assert step is not None
        return step

    def __call__(self, given: Window) -> tuple[Tensor, Any, Tensor, Any, Any] | None:
        """Make one update: return loss, count, norm, carry, rate; None where the window is for the eager step."""
        if self.refused:
            return None
        state, window = self.step.state, given.batches
        leaves: list[Tensor] = []
        shape = form(window, leaves), None if state.carry is None else form(state.carry, leaves)
        if not all(map(ON_CPU, leaves)):
            window, leaves = [to_device(one, self.latch.device) for one in window], []
            shape = form(window, leaves), None if state.carry is None else form(state.carry, leaves)
        ready = shape == self.shape or (
            self.program is None and self._is_full(window) and self._captured(window, leaves, shape)
        )
        if not (ready and self._as_recorded()):
            self.confirm(state)
            return None
        if len(self.unread) >= UNREAD:
            self.confirm(state)
        before = self._random_state() if self.reads else self.latch
        rate = self._set_rates(given.rate(self.step.objective))
        made = self._run(leaves)
        if made is None:
            self.step.learning_rate.unscale()
            state.updating = False
            self.confirm(state)
            return None
        loss, count, norm, carried = made
        if self.reads and not math.isfinite(torch.add(norm, loss, alpha=0)):  # HOST READ: one a step
            self.latch.zero_()
            self.step.learning_rate.unscale()
            self._go_back(before)
            state.updating = False
            return None  # the eager step finds out, and journals it
        self.unread.append((state.clock.epoch, state.position, len(window)))
        return loss, count, norm, filled(self.carry, iter(carried)) if carried else self.carry, rate

    def _run(self, leaves: list[Tensor]) -> tuple[Tensor, Any, Tensor, list[Tensor]] | None:
        """Loss, count, norm and what is carried on; None where the eager step is to name what is wrong."""
        self.step.state.updating = True
        try:
            loss, norm, *rest = self.program.run(self.held + leaves)  # type: ignore[union-attr]
        except RuntimeError:  # an index out of range, before anything is changed
            return None
        self._give_gradients()
        return loss, rest[0] if self.count is None else self.count, norm, rest[len(rest) - self.carried :]

    def _give_gradients(self) -> None:
        for parameter, grad in self.grads:
            if parameter.grad is not grad:
                parameter.grad = grad

    def _random_state(self) -> Tensor:
        return torch.get_rng_state()

    def _go_back(self, random_state: Tensor) -> None:
        torch.set_rng_state(random_state)

    # --- which windows ---

    def _is_full(self, window: list[Any]) -> bool:
        full, carry = self.step.state.full, self.step.state.carry
        return (
            full is not None and full["window"] == repr(form(window, [])) and full["carried"] == (carry is not None)
        )

    # --- the program ---

    def _captured(self, window: list[Any], leaves: list[Tensor], shape: Any) -> bool:
        """Make the program, or say why there is none."""
        begun = perf_counter()
        try:
            self._capture(window, leaves)
        except NoProgramError as error:
            self.refuse(str(error))
            return False
        finally:
            self.took += perf_counter() - begun
        self.shape = shape
        return True

    def refuse(self, reason: str) -> None:
        """From here on steps are eager ones."""
        self.refused, self.program = reason, None
        sentence = f"graph: this step cannot be one program: {reason}; the steps run one operation at a time"
        self._speak(sentence, partial(warnings.warn, stacklevel=6))

    def _speak(self, sentence: str, otherwise: Callable[[str], None]) -> None:
        (self.say or otherwise)(sentence)

    def _capture(self, window: list[Any], leaves: list[Tensor]) -> None:
        if reason := refusal(self.step, self.precision):
            raise NoProgramError(reason)
        self._hold()
        self._programs(window, leaves)

    def _programs(self, window: list[Any], leaves: list[Tensor]) -> None:
        function = self.five_steps(window, self.step.state.carry)
        self.program = self._made(function, [*self.held, *leaves], loss_and_norm)

    def _made(self, function: Function, inputs: list[Tensor], figures: Figures) -> Program:
        """The program of a function, whose `figures` are as those of the function itself."""
        generators = random.getstate(), np.random.get_state()
        with undisturbed(), self._kept():
            recording = self._recorded(function, used := copies(inputs))
            drawn = random.getstate() != generators[0] or any(
                not np.array_equal(old, new) for old, new in zip(generators[1], np.random.get_state(), strict=True)
            )
        if drawn:
            raise NoProgramError("the model draws from Python's or NumPy's random numbers")
        if not is_kept(recording):
            require_compiler()
            about = 8 + recording.operations // 25
            self._speak(f"compiling the step, about {about} s the first time", partial(print, file=sys.stderr))
            with undisturbed():
                left_at_once(compile, function, copies(inputs), recording)
        program, trial = load(recording), copies(inputs)
        with undisturbed():
            try:
                tried = figures(program.run(trial), trial)
            except RuntimeError as error:
                raise NoProgramError(f"it was compiled, and fails: {str(error).splitlines()[0]}") from error
        for name, eager in figures(recording.outputs, used).items():
            ours, theirs = tried[name].item(), eager.item()  # HOST READ: once, when a program is made
            if not abs(ours - theirs) <= AGREEMENT[self.precision] * abs(theirs) and math.isfinite(theirs):
                raise NoProgramError(f"its {name} is {ours:.6g} where the eager step has {theirs:.6g}")
        return program

    def _recorded(self, function: Function, inputs: list[Tensor]) -> Recording:
        """What a run does on `inputs`, which it may change; refused is one that does something else the second time,
        as no program can."""
        again = copies(inputs)
        try:
            with undisturbed():
                first = recorded(function, inputs)
            second = recorded(function, again)
        except NoProgramError:
            raise
        except Exception as error:  # of the user's model and objective, which have passed this shape as eager steps
            reason = (str(error).splitlines() or [""])[0]
            raise NoProgramError(f"it fails where it is recorded: {type(error).__name__}: {reason}") from error
        same = first.digest == second.digest and len(first.outside) == len(second.outside)
        if not same or not all(map(torch.equal, first.outside, second.outside)):
            raise NoProgramError("it computes with something that changes from step to step")
        return first

    @contextmanager
    def _kept(self) -> Iterator[None]:
        """Refuses what keeps Python values from pass to pass inside, and puts them back."""
        owners = self._owners()
        before = [dict(vars(owner)) for owner in owners]
        inside = [(v, copy.copy(v)) for table in before for v in table.values() if type(v) in (list, dict, set)]
        changed = None
        try:
            yield
        finally:
            for owner, table in zip(owners, before, strict=True):
                for name, value in list(vars(owner).items()):
                    if name not in table or table[name] is not value:
                        changed = changed or (owner, name)
                        vars(owner).pop(name)
                vars(owner).update(table)
            for value, values in inside:
                if len(value) != len(values):
                    changed = changed or next(
                        (o, n) for o, t in zip(owners, before, strict=True) for n, v in t.items() if v is value
                    )
                    value.clear()
                    (value.extend if isinstance(value, list) else value.update)(values)
        if changed is not None:
            raise NoProgramError(f"{type(changed[0]).__name__} keeps '{changed[1]}', which changes from step to step")

    def _hold(self) -> None:
        """Gather the tensors that the program reads and changes, in their order."""
        step = self.step
        self.owned = roots(step)
        self.modules = [module for _, root in self.owned for module in root.modules()]
        self.parameters = {
            (n, name): p for n, (_, root) in enumerate(self.owned) for name, p in root.named_parameters()
        }
        self.buffers = {(n, name): b for n, (_, root) in enumerate(self.owned) for name, b in root.named_buffers()}
        self.trained = step.held.now()
        self.gradients = self._room(self.trained)
        self.groups = [dict(group) for optimizer in step.optimizers for group in optimizer.param_groups]
        self.rates = [torch.zeros((), dtype=torch.float64, device=self.trained[0].device) for _ in self.groups]
        self.rate_values: list[Any] = [None] * len(self.groups)
        self.held = self._held()
        self._look()

    def _room(self, parameters: list[nn.Parameter]) -> list[Tensor]:
        """Where the gradients of these will lie."""
        return [torch.zeros_like(p, memory_format=torch.preserve_format) for p in parameters]

    def _look(self) -> None:
        """Note what else the program is made with, and could be changed between steps."""
        step, owners = self.step, self._owners()
        tables = [vars(one) for one in owners]
        self.tables = [vars(module)[name] for module in self.modules for name in TABLES]
        self.tables += [step.criterion.keywords] if isinstance(step.criterion, partial) else []
        self.sizes = [len(table) for table in self.tables]
        apart = vars(nn.Module()).keys() - {"training"}  # what every module has, and is looked at by itself
        places = {id(table): table for table in (*tables, *self.tables)}.values()  # a criterion is a module too
        self.seen = Seen((table, name) for table in places for name in table if name not in apart)
        self.settings = SETTINGS(step)
        kinds = {kind for optimizer in step.optimizers for kind in type(optimizer).__mro__ if "step" in vars(kind)}
        self.seen.add((vars(kind), "step") for kind in kinds)
        self.replaced = [vars(one).get("step") for one in step.optimizers]
        self.hooks = module_hooks(self.modules) + step_hooks(step.optimizers)
        self.members = [p for group in self.groups for p in group["params"]]
        self.own = (*self.parameters.values(), *self.buffers.values())
        self.marks = list(map(MARKS, self.own))
        self.forms, self.places = forms(self.own), list(map(Tensor.data_ptr, self.own))
        self.untouched = list(self._now())

    def _owners(self) -> list[Any]:
        """Whose attributes the step's arithmetic may depend on."""
        return [
            *self.modules,
            *(one for one in (self.step.objective, self.step.criterion) if hasattr(one, "__dict__")),
        ]

    def _held(self) -> list[Tensor]:
        """All of them: the optimizers' states are those of now."""
        optimizers = self.step.optimizers
        self.states = [optimizer.state for optimizer in optimizers]
        self.inside = [state for table in self.states for state in table.values()]
        self.entries = Seen((vars(optimizer), "state") for optimizer in optimizers)
        self.entries.add((one, name) for one in self.inside for name in one if isinstance(one[name], Tensor))
        kept = [
            value
            for optimizer in optimizers
            for group in optimizer.param_groups
            for p in group["params"]
            if p in optimizer.state
            for value in optimizer.state[p].values()
            if isinstance(value, Tensor)
        ]
        known = (*self.parameters.values(), *self.buffers.values(), *self.gradients)
        return [*known, *kept, *self.rates, self.latch]

    def _now(self) -> Iterator[Any]:
        """Every object that the program was made with and whose place can be given to another, in one order."""
        optimizers = self.step.optimizers
        return chain(
            map(getitem, self.seen.tables, self.seen.names),
            map(getitem, self.entries.tables, self.entries.names),
            chain.from_iterable(map(dict.values, self.states)),
            chain.from_iterable(map(MEMBERS, chain.from_iterable(map(GROUPS, optimizers)))),
            map(dict.get, map(vars, optimizers), repeat("step")),
            map(len, self.tables),
            SETTINGS(self.step),
            (SETTINGS,),  # the end
        )

    def _as_recorded(self) -> bool:
        """Whether all that the program was made for is as it was; an optimizer's loaded state is taken up."""
        groups = [*chain.from_iterable(map(GROUPS, self.step.optimizers))]
        for group, before in zip(groups, self.groups, strict=False):
            before["lr"] = group["lr"]
        try:
            known = all(map(is_, self._now(), self.untouched)) or self._fits()
        except KeyError:  # a name is gone
            return False
        if not known or groups != self.groups or any(self.hooks):
            return False
        places = [*map(Tensor.data_ptr, self.own)]
        if places != self.places:  # `p.data = ...`, `.to(memory_format=...)`
            if forms(self.own) != self.forms:
                return False
            self.places = places
        marks = [*map(MARKS, self.own)]
        return marks == self.marks or [list(map(bool, one)) for one in marks] == [
            list(map(bool, one)) for one in self.marks
        ]

    def _fits(self) -> bool:
        """Whether what was replaced (see `_now`) may be: an optimizer's state by one of its form, a number by an
        equal one."""
        optimizers = self.step.optimizers
        members = [*chain.from_iterable(map(MEMBERS, chain.from_iterable(map(GROUPS, optimizers))))]
        replaced = [vars(one).get("step") for one in optimizers]
        same = (
            same_ones(members, self.members)
            and same_ones(replaced, self.replaced)
            and self.seen.same()
            and all(map(same_number, SETTINGS(self.step), self.settings))
            and list(map(len, self.tables)) == self.sizes
        )
        if not same:  # nothing is taken up before this: the program reads and changes the parameters it was made with
            return False
        inside = [*chain.from_iterable(map(dict.values, self.states))]
        if not (same_ones(inside, self.inside) and self.entries.same()):
            before = self.states, self.inside, self.entries
            held = self._held()
            if forms(held) != forms(self.held):
                self.states, self.inside, self.entries = before
                return False
            self.held = held
            self.untouched = list(self._now())
        return True

    def _set_rates(self, scale: float) -> Any:
        step, state = self.step, self.step.state
        shown = step.learning_rate.before_update(state.clock.step, state.plateau.annealing * scale)
        for n, group in enumerate(chain.from_iterable(map(GROUPS, step.optimizers))):
            if group["lr"] is not self.rate_values[n]:
                self.rate_values[n] = None if isinstance(group["lr"], Tensor) else group["lr"]
                self.rates[n].fill_(group["lr"])
        return shown

    # --- the five steps ---

    def five_steps(self, window: list[Any], carry: Any) -> Function:
        """The function that becomes the program: every tensor it changes is an argument."""

        def run(*flat: Tensor) -> list[Tensor]:
            left = iter(flat)
            held = self._taken(left)
            batches, counts = counted(self.step.objective, filled(window, left), reading=False)
            count = window_count(counts)
            loss, hidden, grads, statistics = self._passes(
                held.weights, held.buffers, batches, counts, count, filled(carry, left)
            )
            norm = self._updated(held, grads, held.buffers, statistics, loss)
            self.count = None if isinstance(count, Tensor) else count
            return [loss, norm, *([count] if isinstance(count, Tensor) else []), *self._carried(hidden)]

        return run

    def _taken(self, left: Iterator[Tensor]) -> Held:
        """The tensors that the program has in place of those that are held, in their order."""
        sizes = [len(self.parameters), len(self.buffers), len(self.gradients)]
        sizes += [len(self.held) - sum(sizes) - len(self.rates) - 1, len(self.rates)]
        weights, buffers, gradients, states, rates = ([next(left) for _ in range(size)] for size in sizes)
        return Held(weights, buffers, gradients, states, rates, next(left))

    def _carried(self, hidden: Any) -> list[Tensor]:
        carried: list[Tensor] = []
        form(hidden, carried)
        self.carry, self.carried = hidden, len(carried)
        return carried

    def _passes(
        self,
        weights: list[Tensor],
        buffers: list[Tensor],
        batches: list[Any],
        counts: list[Any],
        count: Any,
        carry: Any,
    ) -> tuple[Tensor, Any, list[Tensor | None], list[Tensor]]:
        """1. No gradients yet. 2. Forward, 3. loss, 4. backward, each mean weighted by its share of the window.

        The window's mean loss, what it carries on, its gradients (None of what the loss does not depend on), and the
        buffers as the passes leave them.
        """
        step = self.step
        known = self.parameters.values()
        of = {id(p): w.detach().requires_grad_(p.requires_grad) for p, w in zip(known, weights, strict=True)}
        statistics, trained = [buffer.clone() for buffer in buffers], [of[id(p)] for p in self.trained]
        grads: list[Tensor | None] = [None] * len(trained)
        losses: list[Tensor] = []
        with self._in_place(list(of.values()), statistics):
            for batch, part in zip(batches, counts, strict=True):
                with step.autocast:
                    mean, carry = loss_of(step.objective, step.model, batch, carry)
                check_mean(mean)
                share, wanted = share_of(part, count, mean), [p for p in trained if p.requires_grad]
                found = iter(torch.autograd.grad(mean, wanted, share, allow_unused=True))
                new = [next(found) if p.requires_grad else None for p in trained]
                grads = [b if a is None else a if b is None else a + b for a, b in zip(grads, new, strict=True)]
                losses.append(weighted(mean.detach(), share, part))
        pairs = zip(self.trained, self.gradients, grads, strict=True)
        self.grads = [(p, buffer) for p, buffer, grad in pairs if grad is not None]
        return losses[0] if len(losses) == 1 else torch.stack(losses).sum(), carry, grads, statistics

    def _updated(
        self,
        held: Held,
        grads: list[Tensor | None],
        buffers: list[Tensor],
        statistics: list[Tensor],
        loss: Tensor,
    ) -> Tensor:
        """Norm, clip, and 5. update: of copies, which are taken over where everything so far was finite. The norm.

        statistics: what `buffers` become.
        """
        known, latch = self.parameters.values(), held.latch
        of = {id(p): w for p, w in zip(known, held.weights, strict=True)}
        with torch.no_grad():
            norm = global_norm_of([grad for grad in grads if grad is not None])
            grads = [grad if grad is None else self._clipped(grad, norm) for grad in grads]
            updated = {id(p): of[id(p)].detach().clone() for p in self.trained}
            for p, grad in zip(self.trained, grads, strict=True):
                updated[id(p)].grad = grad
            counts_of_steps = [exact(state) for state in held.states]
            self._update(updated, iter(counts_of_steps), held.rates)
            fine = torch.isfinite(norm + 0 * loss) & (latch[0] == 0)
            old = [w for p, w in zip(known, held.weights, strict=True) if id(p) in updated]
            new = [updated[id(p)] for p in known if id(p) in updated]
            old, new = [*old, *buffers, *held.states], [*new, *statistics, *counts_of_steps]
            for kept, value in zip(old, new, strict=True):
                kept.copy_(torch.where(fine, value.to(kept.dtype), kept))
            for buffer, grad in zip(held.gradients, grads, strict=True):
                if grad is not None and grad is not buffer:
                    buffer.copy_(grad)
            latch.copy_(latched(latch, fine, loss, norm))
        return norm

    def _clipped(self, grad: Tensor, norm: Tensor) -> Tensor:
        """A gradient within both limits, as torch's clip_grad_norm_ and clip_grad_value_ have it."""
        step = self.step
        if step.clip_norm is not None:
            grad = grad * torch.clamp(step.clip_norm / (norm + 1e-6), max=1.0)
        return grad if step.clip_value is None else grad.clamp(-step.clip_value, step.clip_value)

    @contextmanager
    def _in_place(self, weights: list[Tensor], buffers: list[Tensor]) -> Iterator[None]:
        """Inside, the modules hold these tensors; a buffer that a forward pass replaces is refused."""
        with ExitStack() as stack:
            tables: list[dict[str, Tensor]] = [{} for _ in self.owned]
            for (n, name), tensor in zip([*self.parameters, *self.buffers], [*weights, *buffers], strict=True):
                tables[n][name] = tensor
            recurrent = [module for module in self.modules if isinstance(module, nn.RNNBase)]
            for module in recurrent:  # they keep their weights in two more lists
                kept = {name: vars(module)[name] for name in RNN_LISTS if name in vars(module)}
                stack.callback(vars(module).update, kept)
                vars(module).update({name: list(value) for name, value in kept.items()})
            for (_, root), table in zip(self.owned, tables, strict=True):
                stack.enter_context(_reparametrize_module(root, table, tie_weights=True))
            for module in recurrent:
                module._flat_weights = [getattr(module, name) for name in module._flat_weights_names]
            yield
            for n, (_, root) in enumerate(self.owned):
                for name, buffer in root.named_buffers():
                    if (n, name) in self.buffers and buffer is not tables[n][name]:
                        raise NoProgramError(f"buffer '{name}' is replaced in the forward pass; change it in place")

    def _update(self, updated: dict[int, Tensor], states: Iterator[Tensor], rates: list[Tensor]) -> None:
        """Step a private copy of each optimizer, over tensors that stand for the parameters and their state."""
        rate = iter(rates)
        for optimizer in self.step.optimizers:
            kind, private = type(optimizer), copy.copy(optimizer)
            private.state, private.param_groups = defaultdict(dict), []
            for group in optimizer.param_groups:
                own = {
                    **group,
                    "params": [updated[id(p)] for p in group["params"] if id(p) in updated],
                    "lr": next(rate),
                }
                own |= {name: True for name in ("capturable", "foreach") if name in group}
                own |= {"fused": None} if "fused" in group else {}
                private.param_groups.append(own)
                for p in group["params"]:
                    if p in optimizer.state and id(p) in updated:
                        state = optimizer.state[p]
                        private.state[updated[id(p)]] = {
                            name: next(states) if isinstance(value, Tensor) else value
                            for name, value in state.items()
                        }
            proportional = kind.__module__.startswith("torch.optim") and kind.__name__ in PROPORTIONAL
            factors = [group["lr"] for group in private.param_groups]
            starts = [[p.clone() for p in group["params"]] for group in private.param_groups] if proportional else []
            if proportional:
                for group in private.param_groups:
                    group["lr"] = 1.0
            before = numbers(private)
            plain_step(kind)(private)
            if numbers(private) != before:
                raise NoProgramError(f"{kind.__name__} counts in Python numbers, which a program cannot")
            for group, start, factor in zip(private.param_groups, starts, factors, strict=False):
                for p, old in zip(group["params"], start, strict=True):
                    p.copy_(old + factor.to(p.dtype) * (p - old))

    # --- what was latched ---

    def confirm(self, state: State) -> None:
        """Read what was latched. Raises NonFiniteError where a step since the last time was not finite.

        state: that of the step, which may be gone.
        """
        steps, self.unread = self.unread, []
        if not steps:
            return
        bad, loss, norm, _ = self.latch.tolist()  # HOST READ: the one of a log point
        done = len(steps)
        if not bad:
            self.latch.zero_()
            return
        self.latch.zero_()
        state.updating = True  # the clock has moved on, the weights have not: nothing may be saved
        epoch, position, batches = steps[int(bad) - 1]
        number = state.clock.step - done + int(bad)
        where = f"batch {position}" if batches == 1 else f"batches {position} to {position + batches - 1}"
        raise NonFiniteError(
            f"stopped: step {number} (epoch {epoch + 1}, {where}) was not finite: the loss is {loss}, the gradient "
            f"norm {norm}; neither its update nor one of the {done - int(bad)} after it was applied, the weights are "
            f"those of step {number - 1}. Resume with --graph off to learn where it began",
            {
                "step": number, "epoch": epoch + 1, "batches": [position, position + batches - 1],
                "loss": loss, "grad_norm": norm, "graph": True,
            },
        )  # fmt: skip


class Uncompiled:
    """The compiled step of a step that is not compiled."""

    took = 0.0

    def __call__(self, window: Window) -> None:
        """Return None: every window is for the eager step."""


UNCOMPILED = Uncompiled()


def refusal(step: "TrainStep", precision: str) -> str | None:
    """Why the step cannot be a program, as far as can be told before the first one."""
    device = step.parameters[0].device
    if any(type(p.detach()) is not Tensor for p in step.parameters):
        return "its parameters are no plain tensors"
    if device.type != "cpu":
        return f"programs are compiled for the CPU, and the model is on {device.type}"
    if precision == "fp16":
        return "fp16 tries a step again at another scale, which a program cannot; use bf16"
    for name, module in (pair for _, root in roots(step) for pair in canonical_pairs(root.named_modules())):
        if isinstance(module, torch.jit.ScriptModule):
            return f"{name or type(module).__name__} is scripted, and torch's compiler does not look into it"
        if is_watched(module):
            return f"{name or type(module).__name__} has hooks, which a program would not call"
    if any(p._backward_hooks or getattr(p, "_post_accumulate_grad_hooks", None) for p in step.parameters):
        return "a parameter has hooks, which a program would not call"
    for optimizer in step.optimizers:
        if any(step_hooks([optimizer])):
            return f"{type(optimizer).__name__} has hooks, which a program would not call"
        replaced = vars(optimizer).get("step")  # torch's schedulers put one there that counts the calls
        if replaced is not None and not hasattr(replaced, "_wrapped_by_lr_sched"):
            return f"the step of {type(optimizer).__name__} was replaced, and a program would not call it"
    return None


def forms(tensors: Iterable[Tensor]) -> list[Any]:
    """What of tensors a program is compiled for."""
    return [(tensor.shape, tensor.stride(), tensor.dtype) for tensor in tensors]


def loss_and_norm(outputs: list[Tensor], inputs: list[Tensor]) -> dict[str, Tensor]:
    """What a program of all five steps is held to."""
    return {"loss": outputs[0], "gradient norm": outputs[1]}


class Seen:
    """Entries of tables, each `(table, name)`, with the values that they have now."""

    def __init__(self, entries: Iterable[tuple[Any, Any]]):
        self.tables: list[Any] = []
        self.names: list[Any] = []
        self.values: list[Any] = []
        self.add(entries)

    def add(self, entries: Iterable[tuple[Any, Any]]) -> None:
        """More of them."""
        for table, name in entries:
            self.tables.append(table)
            self.names.append(name)
            self.values.append(table[name])

    def same(self) -> bool:
        """Whether each is still that very value, or an equal number."""
        return all(map(same_number, map(getitem, self.tables, self.names), self.values))


def same_ones(some: list[Any], others: list[Any]) -> bool:
    """Whether two lists hold the very same objects."""
    return len(some) == len(others) and all(map(is_, some, others))


def same_number(one: Any, other: Any) -> bool:
    """Whether both are the same plain value; anything else is told apart by identity."""
    return one is other or (type(one) is type(other) and type(one) in (int, float, str, bool) and bool(one == other))


def form(value: Any, leaves: list[Tensor]) -> Any:
    """The structure of a batch, with shape, strides and type of each tensor; the tensors go to `leaves`, in order."""
    kind = type(value)
    if kind is Tensor or isinstance(value, Tensor):
        leaves.append(value)
        return value.shape, value.stride(), value.dtype
    if isinstance(value, (list, tuple)):
        return (kind, *map(form, value, repeat(leaves)))
    if value is None or isinstance(value, str | int | float):
        return kind, value
    if isinstance(value, Mapping):
        return (kind, *value, *[form(one, leaves) for one in value.values()])
    return object()  # what is not known equals nothing


def full_form(window: list[Any], carry: Any) -> dict[str, Any]:
    """What is noted of a training's first window: windows of its form are the full ones."""
    return {"window": repr(form(window, [])), "carried": carry is not None}


def filled(value: Any, leaves: Iterator[Tensor]) -> Any:
    """A value of the same structure with the next tensors of `leaves` in it."""
    if isinstance(value, Tensor):
        return next(leaves)
    return rebuilt(value, [filled(one, leaves) for one in parts(value)])


def global_norm_of(grads: list[Tensor]) -> Tensor:
    """The 2-norm of all gradients together; where they are of one exact type, without a list of norms in memory."""
    if {grad.dtype for grad in grads} in ({torch.float32}, {torch.float64}):
        total = grads[0].square().sum()
        for grad in grads[1:]:
            total = total + grad.square().sum()
        return total.sqrt()
    norm: Tensor = torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(grad) for grad in grads]))
    return norm


def latched(latch: Tensor, fine: Tensor, loss: Tensor, norm: Tensor) -> Tensor:
    """The latch after a step: number, loss and norm of the first that was not finite (else 0), and steps so far."""
    place = torch.arange(4, device=latch.device)
    steps = latch[3] + 1
    now = torch.where(place == 1, loss.double(), torch.where(place == 2, norm.double(), steps))
    first = (latch[0] == 0) & ~fine
    return torch.where(first | (place == 3), now, latch)


def exact(state: Tensor) -> Tensor:
    """A copy of an optimizer's tensor; of a count of steps in float64, as eager steps compute with it."""
    return state.double() if state.ndim == 0 and state.is_floating_point() else state.clone()


def copies(tensors: list[Tensor]) -> list[Tensor]:
    """The same values elsewhere, laid out alike: a program is compiled for the strides that it is shown."""
    made = []
    for tensor in tensors:
        one = tensor.detach().clone()
        if one.stride() != tensor.stride():  # with gaps, or expanded: clone() closes them
            span = 1 + sum((n - 1) * step for n, step in zip(tensor.shape, tensor.stride(), strict=True))
            whole = tensor.detach().as_strided((span,), (1,), tensor.storage_offset())
            one = whole.clone().as_strided(tensor.shape, tensor.stride())
        made.append(one)
    return made


def numbers(optimizer: Optimizer) -> Any:
    """All that an optimizer knows and that is not a tensor."""
    states = [
        sorted((k, repr(v)) for k, v in one.items() if not isinstance(v, Tensor)) for one in optimizer.state.values()
    ]
    kept = [sorted(one) for one in optimizer.state.values()]
    groups = [{k: repr(v) for k, v in one.items() if k != "params" and k != "lr"} for one in optimizer.param_groups]
    return states, kept, groups
