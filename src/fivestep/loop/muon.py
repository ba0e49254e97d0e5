"""torch's Muon in several processes: each orthogonalises its share of the matrices, and gets the others' from them.

    momentum    of every matrix, or of those rows of it that this process holds
    there       in shards: the rows of each matrix, to whom it falls to
    Newton-Schulz iterations of this process's matrices
    back        the result, in bfloat16 as torch has it, to all, or each row to who holds it
    update      of every matrix, or of those rows

The bits of parameters and state are those of torch's step on whole matrices, under `fsdp` too: there torch's own
would gather a matrix for each of its fifteen products, and sum them in bfloat16. Owns no arithmetic that torch does
not have, and is used only where a trial gives torch's bits.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from fivestep import processes
from fivestep.loop.batch import in_shards
from fivestep.loop.lean import PLAIN, Update, plain_step

Group = dict[str, Any]
OPTIONS = ("lr", "weight_decay", "momentum", "nesterov", "ns_coefficients", "eps", "ns_steps", "adjust_lr_fn")


def update_of(optimizer: Optimizer, parallel: Any) -> Callable[[], None]:
    """What steps an optimizer; in several processes, where there is a `parallel`, all must ask at once."""
    if parallel is not None and type(optimizer).__name__ == "Muon":
        shared = SharedMuon(optimizer)
        if processes.highest(not shared.can())[0] == 0:
            parallel.shared_updates.append(shared)
            return shared
    return Update(optimizer)


class SharedMuon:
    """Steps a Muon, each time it is called, together with the other processes."""

    def __init__(self, optimizer: Optimizer):
        self.optimizer, self.plain = optimizer, Update(optimizer)
        self.apart = False  # in one of the processes somebody looks at it: each makes the step by itself

    def can(self) -> bool:
        """Whether nothing but torch's own step would be called, on matrices whose rows lie one after the other."""
        groups = self.optimizer.param_groups
        parameters = [p for group in groups for p in group["params"]]
        whole = all(type(p) in PLAIN for p in parameters)
        return (
            self.is_torchs()
            and all(p.dtype in (torch.float32, torch.float64) for p in parameters)
            and (whole or all(map(is_by_rows, parameters)))
            and all(map(as_torch, groups))
        )

    def is_torchs(self) -> bool:
        """Whether its step is torch's own, and nobody looks at it; that of torch's schedulers notes calls alone."""
        own, replaced = self.plain, vars(self.optimizer).get("step")
        others = (
            replaced is not None and not hasattr(replaced, "_wrapped_by_lr_sched")
        ) or own.kind.step is not own.step
        return own.known and not others and not any(own.hooks)

    def __call__(self) -> None:
        """One update from the gradients that there are."""
        if self.apart:
            self.plain()
            return
        self.optimizer._opt_called = True  # type: ignore[attr-defined]  # what torch's schedulers look at
        with torch.no_grad():
            found = [
                (p, group) for group in self.optimizer.param_groups for p in group["params"] if p.grad is not None
            ]
            sharded = {in_shards(p) for p, _ in found}
            if len(sharded) != 1:  # nothing to do; or a group that was added later and lies otherwise
                self.plain()
                return
            states = [self.optimizer.state[p] for p, _ in found]
            for state, (p, _) in zip(states, found, strict=True):
                if "momentum_buffer" not in state:
                    state["momentum_buffer"] = torch.zeros_like(p.grad, memory_format=torch.preserve_format)
            averages = [held(state["momentum_buffer"]) for state in states]
            grads, groups = [held(p.grad) for p, _ in found], [group for _, group in found]
            for group in self.optimizer.param_groups:
                ones = [n for n, own in enumerate(groups) if own is group]
                average([averages[n] for n in ones], [grads[n] for n in ones], group)
            exchange = Exchange([p.shape for p, _ in found], True in sharded, grads[0].device)
            updates = exchange.all(
                lambda i: direction(grads[i], averages[i], groups[i]), lambda i, one: orthogonal(one, groups[i])
            )
            for (p, group), update in zip(found, updates, strict=True):
                apply(held(p), update, group, p.shape)


def held(value: Any) -> Tensor:
    """What of it this process holds."""
    own: Tensor = value.to_local() if in_shards(value) else value
    return own


def is_by_rows(parameter: Any) -> bool:
    """Whether the processes hold its rows as torch.chunk shares them out, in the order of their ranks."""
    if not in_shards(parameter):
        return False
    from torch.distributed.tensor import Shard

    mesh = parameter.device_mesh
    by_rows = tuple(parameter.placements) == (Shard(0),) and mesh.size() == processes.size()
    return bool(
        by_rows
        and mesh.get_local_rank() == processes.rank()
        and len(parameter.to_local()) == rows_of(parameter.shape[0], processes.rank())
    )


def rows_of(rows: int, rank: int) -> int:
    """How many of them a process holds."""
    chunk = -(-rows // processes.size())
    return max(0, min(chunk, rows - rank * chunk))


class Exchange:
    """Who orthogonalises which of the matrices of these shapes, and how these come there, and back."""

    def __init__(self, shapes: Sequence[torch.Size], by_rows: bool, device: torch.device):
        self.shapes, self.by_rows, self.device = shapes, by_rows, device
        self.owned: list[list[int]] = [[] for _ in range(processes.size())]
        self.mine = self.owned[processes.rank()]
        work = [0] * processes.size()
        cost = [min(shape) ** 2 * max(shape) for shape in shapes]
        for i in sorted(range(len(shapes)), key=lambda i: -cost[i]):  # the most expensive first
            owner = work.index(min(work))
            self.owned[owner].append(i)
            work[owner] += cost[i]

    def all(self, given: Callable[[int], Tensor], made: Callable[[int, Tensor], Tensor]) -> list[Tensor]:
        """Of each matrix what is `made` of what is `given`: whole in all processes, or by rows, as it was given.

        What travels does so in bfloat16.
        """
        found = self._by_rows(given, made) if self.by_rows else self._whole(given, made)
        return [found[i] for i in range(len(self.shapes))]

    def _whole(self, given: Callable[[int], Tensor], made: Callable[[int, Tensor], Tensor]) -> dict[int, Tensor]:
        flat = self._joined([made(i, given(i)) for i in self.mine])
        sizes = [sum(self.shapes[i].numel() for i in ones) for ones in self.owned]
        every = processes.tensors_of_all(torch.cat([flat, flat.new_zeros(max(sizes) - len(flat))]))
        found: dict[int, Tensor] = {}
        for ones, row in zip(self.owned, every, strict=True):
            found |= self._matrices(ones, row, None)
        return found

    def _by_rows(self, given: Callable[[int], Tensor], made: Callable[[int, Tensor], Tensor]) -> dict[int, Tensor]:
        own, ranks = processes.rank(), range(processes.size())
        there = [sum(self._rows(i, own) * self.shapes[i][1] for i in ones) for ones in self.owned]
        here = [sum(self._rows(i, rank) * self.shapes[i][1] for i in self.mine) for rank in ranks]
        sent = self._joined([given(i) for ones in self.owned for i in ones])
        came = torch.split(processes.exchanged(sent, there, here), here)
        parts = [self._matrices(self.mine, row, rank) for rank, row in zip(ranks, came, strict=True)]
        done = {i: made(i, torch.cat([part[i] for part in parts])) for i in self.mine}
        rows = {i: torch.split(done[i], [self._rows(i, rank) for rank in ranks]) for i in self.mine}
        sent = self._joined([rows[i][rank] for rank in ranks for i in self.mine])
        back = torch.split(processes.exchanged(sent, here, there), there)
        found: dict[int, Tensor] = {}
        for ones, row in zip(self.owned, back, strict=True):
            found |= self._matrices(ones, row, own)
        return found

    def _rows(self, i: int, rank: int | None) -> int:
        return self.shapes[i][0] if rank is None else rows_of(self.shapes[i][0], rank)

    def _joined(self, ones: list[Tensor]) -> Tensor:
        empty = torch.empty(0, dtype=torch.bfloat16, device=self.device)
        return torch.cat([empty, *[one.bfloat16().flatten() for one in ones]])

    def _matrices(self, ones: list[int], flat: Tensor, rank: int | None) -> dict[int, Tensor]:
        """Those that lie in `flat`, whole, or the rows that `rank` holds."""
        found, begin = {}, 0
        for i in ones:
            shape = self._rows(i, rank), self.shapes[i][1]
            found[i] = flat[begin : begin + shape[0] * shape[1]].view(shape)
            begin += shape[0] * shape[1]
        return found


# --- torch's arithmetic (Jordan et al. 2024), operation by operation ---


def average(averages: list[Tensor], grads: list[Tensor], group: Group) -> None:
    """Take gradients into their running averages."""
    if grads:
        torch._foreach_lerp_(averages, grads, 1 - group["momentum"])


def direction(grad: Tensor, mean: Tensor, group: Group) -> Tensor:
    """What is orthogonalised, of a gradient and the running average of gradients."""
    return grad.lerp(mean, group["momentum"]) if group["nesterov"] else mean


def orthogonal(matrix: Tensor, group: Group) -> Tensor:
    """torch's Newton-Schulz iterations."""
    from torch.optim._muon import _zeropower_via_newtonschulz

    made: Tensor = _zeropower_via_newtonschulz(matrix, group["ns_coefficients"], group["ns_steps"], group["eps"])
    return made


def apply(parameter: Tensor, update: Tensor, group: Group, shape: torch.Size) -> None:
    """Weight decay, and the update, at the rate for a whole matrix of this shape."""
    from torch.optim._muon import _adjust_lr

    rate: Any = group["lr"].squeeze() if isinstance(group["lr"], Tensor) else group["lr"]
    parameter.mul_(1 - rate * group["weight_decay"])
    parameter.add_(update, alpha=-_adjust_lr(rate, group["adjust_lr_fn"], shape))


def as_torch(group: Group) -> bool:
    """Whether two steps of two small matrices have the bits of torch's."""
    generator = torch.Generator().manual_seed(0)
    try:
        ours, grads = [[torch.randn(shape, generator=generator) for shape in ((4, 6), (6, 4))] for _ in range(2)]
        theirs = [nn.Parameter(one.clone()) for one in ours]
        optimizer = torch.optim.Muon(theirs, **{name: group[name] for name in OPTIONS})
        averages = [torch.zeros_like(one) for one in ours]
        with torch.no_grad():
            for _ in range(2):
                average(averages, grads, group)
                for parameter, one, grad, mean in zip(theirs, ours, grads, averages, strict=True):
                    parameter.grad = grad.clone()
                    apply(one, orthogonal(direction(grad, mean, group), group), group, one.shape)
                plain_step(torch.optim.Muon)(optimizer)
        return all(map(torch.equal, ours, theirs))
    except (ImportError, KeyError, TypeError, ValueError):  # another torch's Muon
        return False
