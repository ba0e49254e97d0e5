"""The five steps of several processes, each of which holds the model: two compiled programs, and the sums between.

    first    forward, loss, backward: this process's part of the window's gradients, side by side in memory
    sums     of what all have told, of the loss, of the gradients: `Parallel.complete_program`
    second   norm, clip, update: of the sums, so alike in all

A step is made in one way by all: where it cannot be a program in one (a short batch, an index out of range), what the
first program made is dropped in the others, and it is an eager step in each. Where one can have no program none has.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from fivestep import processes
from fivestep.data.generators import undisturbed
from fivestep.errors import UsageError
from fivestep.loop.graph import Graph, copies, filled, global_norm_of
from fivestep.loop.parallel import Parallel
from fivestep.loop.program import Function, NoProgramError, Program
from fivestep.loop.several import RankWindow
from fivestep.loop.shares import Shares
from fivestep.loop.window import Window

if TYPE_CHECKING:
    from fivestep.loop.step import TrainStep

ALIGNED = 16  # numbers: where a gradient begins
WASTED = 20  # steps begun by program and made one operation at a time, from which on they may be too many


def graph_of(step: "TrainStep", precision: str) -> Graph:
    """The programs of a step. Raises UsageError where its parameters lie in shards."""
    if step.parallel is None:
        return Graph(step, precision)
    if step.parallel.sharded:
        raise UsageError(
            "parameters in shards are gathered while a step is made, which no program does: take parallel='ddp' "
            "(--parallel ddp), or graph=False (--graph off)"
        )
    return SharedGraph(step, precision, step.parallel)


class SharedGraph(Graph):
    """The programs of a `TrainStep` of several processes."""

    shares: Shares
    second: Program

    def __init__(self, step: "TrainStep", precision: str, parallel: Parallel):
        super().__init__(step, precision)
        self.parallel, self.reads = parallel, True  # all wait for the sums anyway
        self.rows: list[Tensor] = []  # of gradients, one of each type
        self.made = self.wasted = 0  # steps
        parallel.no_program = None

    def __call__(self, given: Window) -> tuple[Tensor, Any, Tensor, Any, Any] | None:
        """Make one update of all ranks from this rank's part of a window."""
        assert isinstance(given, RankWindow)
        self.shares = given.shares
        if self.parallel.no_program and not self.refused:  # as another process told
            self.refuse(self.parallel.no_program)
        return super().__call__(given)

    def refuse(self, reason: str) -> None:
        """From here on steps are eager ones, in all processes."""
        self.parallel.no_program = reason
        super().refuse(reason)

    def _speak(self, sentence: str, otherwise: Callable[[str], None]) -> None:
        if processes.is_first():
            super()._speak(sentence, otherwise)

    def _is_full(self, window: list[Any]) -> bool:
        # DDP talks of its buckets in the second of its steps, and all must be there.
        return self.parallel.steps > 1 and super()._is_full(self.shares.whole)

    def _random_state(self) -> Tensor:
        return self.parallel.random

    def _go_back(self, random_state: Tensor) -> None:
        self.parallel.random = random_state

    def _room(self, parameters: list[nn.Parameter]) -> list[Tensor]:
        """Side by side, for one sum; apart what is summed by rows, or not at all."""
        tables = {id(table) for table in self.parallel.tables.values()}
        found = super()._room(parameters)
        together = [n for n, p in enumerate(parameters) if p.requires_grad and id(p) not in tables]
        self.rows = []
        for dtype in dict.fromkeys(found[n].dtype for n in together):
            ones = [n for n in together if found[n].dtype == dtype]
            sizes = [-(-found[n].numel() // ALIGNED) * ALIGNED for n in ones]
            row = found[ones[0]].new_zeros(sum(sizes))
            self.rows.append(row)
            for n, part in zip(ones, torch.split(row, sizes), strict=True):
                found[n] = part.as_strided(found[n].shape, found[n].stride())
        return found

    # --- the programs ---

    def _programs(self, window: list[Any], leaves: list[Tensor]) -> None:
        inputs, function = self._inputs(leaves), self.passes(window, self.step.state.carry)
        self.changed: list[int] = []  # the numbers of the buffers that a forward pass changes
        with undisturbed(), self._kept():
            self._recorded(function, copies(inputs))
        pairs = enumerate(zip(self.buffers.values(), self.statistics, strict=True))
        self.changed = [n for n, (before, after) in pairs if after._version or not torch.equal(before, after)]
        ends = len(self.parameters) + len(self.buffers), self._end()
        self.program = self._made(
            function,
            inputs,
            lambda outputs, given: {"loss": outputs[0], "gradient norm": global_norm_of(given[slice(*ends)])},
        )
        with undisturbed():
            loss, *rest = self.program.run(inputs)  # gradients as they come, for the second to be tried with
        known = [*self.held, *rest[: len(self.changed)], loss]
        self.second = self._made(self.update(), known, lambda outputs, _: {"gradient norm": outputs[0]})
        self.parallel.program = int(self.second.digest, 16) % 65_521

    def _end(self) -> int:
        """How many of the tensors that are held are weights, buffers and gradients."""
        return len(self.parameters) + len(self.buffers) + len(self.gradients)

    def _inputs(self, leaves: list[Tensor]) -> list[Tensor]:
        """Of the first program: the last one is each micro-batch's share of the window of all."""
        counts, count = self.shares.counts, self.shares.count
        shares = [torch.as_tensor(one).double() / count for one in counts]  # of numbers too: as Python divides them
        return [*self.held[: self._end()], *leaves, torch.stack(shares)]

    def passes(self, window: list[Any], carry: Any) -> Function:
        """The function that becomes the first program: loss, changed buffers, what is carried on."""

        def run(*flat: Tensor) -> list[Tensor]:
            left = iter(flat)
            weights, buffers, gradients = (
                [next(left) for _ in known] for known in (self.parameters, self.buffers, self.gradients)
            )
            batches, hidden, counts = filled(window, left), filled(carry, left), [*next(left)]
            whole = counts[0].new_ones(())
            loss, hidden, grads, self.statistics = self._passes(weights, buffers, batches, counts, whole, hidden)
            for parameter, buffer, grad in zip(self.trained, gradients, grads, strict=True):
                if grad is not None:
                    buffer.copy_(grad)
                elif parameter.requires_grad:
                    raise NoProgramError("the loss does not depend on every parameter that trains")
            return [loss, *[self.statistics[n] for n in self.changed], *self._carried(hidden)]

        return run

    def update(self) -> Function:
        """The function that becomes the second program: of the sums the norm, and all that an update changes."""
        trains = [parameter.requires_grad for parameter in self.trained]

        def run(*flat: Tensor) -> list[Tensor]:
            left = iter(flat)
            held, statistics, loss = self._taken(left), [next(left) for _ in self.changed], next(left)
            grads = [grad if own else None for grad, own in zip(held.gradients, trains, strict=True)]
            return [self._updated(held, grads, [held.buffers[n] for n in self.changed], statistics, loss)]

        return run

    def _run(self, leaves: list[Tensor]) -> tuple[Tensor, Any, Tensor, list[Tensor]] | None:
        parallel, shares, before = self.parallel, self.shares, self.parallel.random
        try:
            with parallel:
                own, *rest = self.program.run(self._inputs(leaves))  # type: ignore[union-attr]
        except RuntimeError:  # an index out of range
            parallel.random = before
            return None
        self._give_gradients()
        loss = parallel.complete_program(own, shares.same, self.rows)
        if loss is None:
            parallel.random = before
            self.wasted += 1
            if self.wasted > max(WASTED, self.made):
                self.refuse("the windows of the processes are seldom full at once")
            return None
        statistics = rest[: len(self.changed)]
        processes.same_as_first(statistics)
        self.step.state.updating = True
        [norm] = self.second.run([*self.held, *statistics, loss])
        self.made += 1
        return loss, shares.count, norm, rest[len(statistics) :]
