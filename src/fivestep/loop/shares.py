"""Whose part of a batch is whose, where several processes train on it together.

    batch of all    -> objective.share(batch, part, of), or rows  -> Share: a part, and the whole's count and size
    nothing is left -> a stand-in: one row, which is computed with and does not count

Everything that is configured is of the whole batch; a process takes rows n * part // of up to n * (part + 1) // of. A
loader whose DistributedSampler gives each process batches of its own is taken at its word: the parts are there
already. Owns who computes on what; the sums over processes are taken in the step.
"""

import random
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain, repeat
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fivestep import processes
from fivestep.data.loading import distributed_sampler
from fivestep.data.stream import batches, batches_per_epoch
from fivestep.errors import UsageError, named
from fivestep.interrupts import agree, asked
from fivestep.loop.arithmetic import count_of, rate_scale, size_of
from fivestep.loop.batch import cut, is_empty, parts, rebuilt, rows, tensors, without_empty
from fivestep.loop.clock import Clock

SEEN = 256  # numbers of a tensor
WEIGHTS = torch.arange(1, 16 * SEEN + 1)


@dataclass(slots=True)
class Share:
    """This process's part of a micro-batch."""

    batch: Any
    count: Any  # what the mean of the whole is over; None: not known here, summed over the processes
    size: tuple[int, int]  # samples and tokens: of the whole where its count is known, else of this part
    stands_in: bool = False  # computed with, and not counted
    rate: float = 1.0  # what the objective multiplies the learning rate by, for the whole
    mark: int = 0  # of the whole, and where it stands: equal where the data are
    whole: Any = None  # the micro-batch of all; None where each process has its own


OTHERS = (
    "the processes have other batches than each other: give all the same data in the same order (seeded alike: "
    "torch.manual_seed), or each its part by a torch.utils.data.DistributedSampler"
)


def share_random_state() -> None:
    """Let the host's random numbers, which order a loader's data, be process 0's in all."""
    version, words, gauss = random.getstate()
    kind, numbers, *rest = np.random.get_state(legacy=True)
    python, numpy, torchs = processes.from_first(
        [[version, list(words), gauss], [kind, np.asarray(numbers).tolist(), *rest], torch.get_rng_state().tolist()]
    )
    random.setstate((python[0], tuple(python[1]), python[2]))
    np.random.set_state((numpy[0], np.array(numpy[1], np.uint32), *numpy[2:]))
    torch.set_rng_state(torch.tensor(torchs, dtype=torch.uint8))


def span(n: int, part: int, of: int) -> tuple[int, int]:
    """The rows of one of `of` parts, of which none is larger than another by more than one: 10 of 4 is 2, 3, 2, 3."""
    return n * part // of, n * (part + 1) // of


def own_rows(objective: Any, batch: Any) -> tuple[Any, bool]:
    """This process's rows of a batch that all have, and whether they stand in for none. Raises UsageError for a batch
    that cannot be cut."""
    part, of, n = processes.rank(), processes.size(), batch_rows(objective, batch)
    begin, end = span(n, part, of)
    stands_in = begin == end
    if stands_in:
        begin, end = 0, 1
    return rows_of(objective, batch, begin, end), stands_in


def share_of_batch(objective: Any, batch: Any) -> Share:
    """This process's part of a batch that all have."""
    if is_empty(batch):
        return Share(batch, 0, (0, 0))
    own, stands_in = own_rows(objective, batch)
    rate = rate_scale(objective, [batch])
    return Share(own, count_of(objective, batch), size_of(objective, batch), stands_in, rate, mark_of(batch), batch)


def mark_of(batch: Any) -> int:
    """A weighted sum of bytes of a batch, of some hundred numbers of each tensor: other data have another."""
    mark = 0
    for tensor in tensors(batch):
        if tensor.is_cpu and tensor.numel() and tensor.layout is torch.strided:
            rows = tensor.detach()
            few = rows[: 1 + SEEN // max(1, rows[0].numel())] if rows.ndim else rows
            seen = few.reshape(-1)[:SEEN].contiguous().view(torch.uint8).long()
            mark = (31 * mark + int(seen @ WEIGHTS[: len(seen)])) % 65_521  # HOST READ: on the CPU
    return mark


def rows_of(objective: Any, batch: Any, begin: int, end: int) -> Any:
    """The rows begin .. end - 1 of a batch. Raises UsageError for one that cannot be cut."""
    shared = hasattr(objective, "share")
    own = objective.share(batch, begin, end) if shared else cut(batch, rows(batch), begin, end)
    if own is None:
        raise UsageError(
            f"a batch ({named(batch)}) cannot be shared among {processes.size()} processes by rows: give the "
            "objective a method share(batch, begin, end), or the loader a torch.utils.data.DistributedSampler"
        )
    return own


def batch_rows(objective: Any, batch: Any) -> int:
    """How many rows there are to share: columns, for segments."""
    if hasattr(objective, "share"):
        return size_of(objective, batch)[0]
    return rows(batch)


def no_batch_yet() -> str:
    """Return the sentence for a rank that has nothing to compute with while others have."""
    return (
        f"the first batch of rank {processes.rank()} is empty, or its loader is, while other ranks have data. "
        "Give every rank a first batch with rows"
    )


def is_own_share(data: Any) -> bool:
    """Whether the batches of `data` differ from process to process, and are together the batch of all."""
    return distributed_sampler(data) is not None


def check_sharers(state: Any, data: Any) -> None:
    """Raise UsageError where an epoch that each rank reads for itself would go on with another number of ranks."""
    if state.position and is_own_share(data) and state.sharers != processes.size():
        raise UsageError(
            f"the state was saved in the middle of an epoch with world size {state.sharers}, and this start has "
            f"world size {processes.size()}. With a DistributedSampler it can change only between epochs. Resume "
            f"with {state.sharers} processes, or remove the DistributedSampler: fivestep then splits batches itself"
        )


@dataclass(slots=True)
class Shares:
    """A window's shares: this process's micro-batches and counts, and the count and size of all together."""

    batches: list[Any]
    counts: list[Any]
    count: Any
    size: tuple[int, int]
    rate: float
    same: list[int]  # of the data, what must be equal in all
    whole: list[Any]  # the micro-batches of all; this process's where each has its own


def as_shares(objective: Any, window: tuple[Any, ...]) -> Shares:
    """Return the shares of a window, of shares or of batches that are this process's part, without empty ones.

    Raises UsageError, in all, for a count of 0.
    """
    given = [
        one if isinstance(one, Share) else Share(one, None, size_of(objective, one))
        for one in window
        if not is_empty(one)
    ]
    marks, shares = sum(one.mark for one in given) % 65_521, [one for one in given if not is_empty(one.batch)]
    if not shares:
        return Shares([], [], 0, (0, 0), 1.0, [0, marks], [])
    counts = [0 if one.stands_in else count_of(objective, one.batch) for one in shares]
    sizes: list[float] = [sum(one.size[at] for one in shares) for at in (0, 1)]
    rate, same = sum(one.rate for one in shares) / len(shares), [0, 0]
    if any(one.count is None for one in shares):
        known = float(sum(counts))  # HOST READ: a loader of this process's own; what the others have is not known
        own = rate_scale(objective, [one.batch for one in shares])
        number, *sizes, rate = processes.totals(known, *sizes, own / processes.size())
        count: Any = number if number % 1 else int(number)
    else:
        count = sum(one.count for one in shares)
        same = [len(shares), marks]
    if not isinstance(count, Tensor) and not count:
        raise UsageError(f"a step needs something to learn from; got {len(shares)} batches with a count of 0")
    whole = [one.batch if one.whole is None else one.whole for one in shares]
    return Shares([one.batch for one in shares], counts, count, (int(sizes[0]), int(sizes[1])), rate, same, whole)


class Sharing:
    """Cuts windows of micro-batches; remembers what an own loader gave last, to stand in where it has ended."""

    def __init__(self, objective: Any, data: Any):
        self.objective, self.own = objective, is_own_share(data)
        self.last: Any = None

    def begin(self, data: Any, epoch: int) -> None:
        """Before an epoch that all draw alike. Raises UsageError, in all, where it is longer for some."""
        processes.meet(f"epoch {epoch + 1}{', with a DistributedSampler' if self.own else ''}")
        share_random_state()  # the caller's body may have drawn, in one of them
        if self.own:
            return
        n = batches_per_epoch(data, epoch) or 0
        most, least = processes.highest(n, -n)
        if most != -least:
            raise UsageError(
                f"the data has {int(-least)} batches an epoch in one process and {int(most)} in another: give "
                "all the same, or each its part by a torch.utils.data.DistributedSampler"
            )

    def agreed(self, window: list[Any], clock: Clock, position: int) -> list[Share]:
        """What this process computes on in a step; empty where the data of all has ended.

        Where each has a loader of its own, they agree on that first; else the order, and its end, is one.
        """
        if self.own:
            processes.at(f"step {clock.step + 1}: drawing batches")
            most, data = processes.highest(len(window), sum(not is_empty(batch) for batch in window))
            return self.window(window, int(most)) if data else [Share(None, 0, (0, 0))] * int(most)
        shares = [share_of_batch(self.objective, batch) for batch in window]
        for share in shares[:1]:
            share.mark += 100_003 * clock.epoch + position
        return shares

    def all_ended(self, ended: bool) -> bool:
        """Return whether the epoch has ended on every rank; ranks that read the same data need not ask."""
        return not processes.highest(not ended)[0] if self.own else ended

    def window(self, window: list[Any], most: int) -> list[Share]:
        """Return the shares of a window of `most` micro-batches, of which this process may have fewer, or empty ones.

        All processes compute each micro-batch together, so another batch stands in for one that is missing.
        """
        filled = list(without_empty(window))
        if filled:
            self.last = filled[-1]
        elif self.last is None:
            raise UsageError(no_batch_yet())
        shares = [Share(batch, None, size_of(self.objective, batch)) for batch in filled]
        return shares + [Share(self.last, None, (0, 0), True) for _ in range(most - len(filled))]


# --- what is carried from batch to batch, by columns: [layers, columns, width], or [columns, width] ---


def _dimension(carry: Tensor) -> int:
    return 1 if carry.ndim > 2 else 0


def columns_of(carry: Any) -> int:
    """The columns of a carried state; 0 for none."""
    found = tensors(carry)
    return found[0].shape[_dimension(found[0])] if found and found[0].ndim else 0


def joined_carry(carry: Any, columns: int) -> Any:
    """The carried state of all `columns`, of the parts that the processes hold; the same in all of them."""
    if not isinstance(carry, Tensor):
        return rebuilt(carry, [joined_carry(one, columns) for one in parts(carry)])
    if not carry.ndim:
        return carry
    at, own = _dimension(carry), _columns(columns, processes.rank())
    if carry.shape[at] != max(own, 1):
        raise UsageError(
            f"a hidden state of shape {list(carry.shape)} cannot be saved by several processes: [layers, columns, "
            f"width] or [columns, width] can, with this process's {own} columns"
        )
    most = -(-columns // processes.size())
    pad = list(carry.shape)
    pad[at] = most - carry.shape[at]
    every = processes.tensors_of_all(torch.cat([carry, carry.new_zeros(pad)], at))
    return torch.cat([part.narrow(at, 0, _columns(columns, rank)) for rank, part in enumerate(every)], at)


def own_carry(carry: Any) -> Any:
    """This process's columns of a joined state."""
    if not isinstance(carry, Tensor):
        return rebuilt(carry, [own_carry(one) for one in parts(carry)])
    if not carry.ndim:
        return carry
    at = _dimension(carry)
    begin, end = span(carry.shape[at], processes.rank(), processes.size())
    return carry.narrow(at, begin, end - begin) if begin < end else carry.narrow(at, 0, 1)


def _columns(n: int, part: int) -> int:
    begin, end = span(n, part, processes.size())
    return end - begin


# --- evaluation ---


def shared(objective: Any, data: Any) -> Iterator[tuple[Any, bool]]:
    """Of each batch to evaluate on this process's part, and whether it stands in.

    All go on until the data of all has ended; what signals ask is agreed on.
    """
    if not processes.joined():
        yield from ((batch, False) for batch in without_empty(batches(data, 0)))
        return
    own, last, marks = is_own_share(data), None, [0, 0]  # batches, and what tells them from others
    if not own:
        share_random_state()  # a loader may shuffle, and the caller's body may have drawn in one process
    parts = own_parts(objective, data) if own else cut_parts(objective, data, marks)
    for position, part in enumerate(chain(parts, repeat(None))):
        processes.at(f"evaluation: batch {position}")
        most, *wanted = processes.highest(part is not None, *asked())
        agree(*wanted)
        if not most:
            if not processes.all_equal(*marks):
                raise UsageError(OTHERS)
            return
        if part is None and last is None:
            raise UsageError(no_batch_yet())
        yield part or (last, True)
        last = part[0] if part else last


def cut_parts(objective: Any, data: Any, marks: list[int]) -> Iterator[tuple[Any, bool]]:
    """This process's rows of each batch, of which all processes have the same: `marks` would tell."""
    for batch in without_empty(batches(data, 0)):
        marks[:] = marks[0] + 1, (31 * marks[1] + mark_of(batch)) % 65_521
        yield own_rows(objective, batch)


def own_parts(objective: Any, data: Any) -> Iterator[tuple[Any, bool]]:
    """The batches that this process has for itself, without the row that its sampler gives again to come out even."""
    sampler = distributed_sampler(data)
    repeats = sampler.rank + (sampler.num_samples - 1) * sampler.num_replicas >= len(sampler.dataset)
    left = sampler.num_samples
    for batch in without_empty(batches(data, 0)):
        n = batch_rows(objective, batch)
        left -= n
        if left or not repeats:
            yield batch, False
        else:
            yield (rows_of(objective, batch, 0, n - 1), False) if n > 1 else (batch, True)
