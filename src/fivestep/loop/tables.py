"""Gradients of large embeddings, summed over processes: of the rows that some process has used, and no others.

A step uses a few rows of a large table, and its gradient is 0 in all others, where a sum of zeros need not travel:
the sums are those of the whole, bit for bit. On the CPU, where to look for the rows costs little beside sending all.
"""

from collections import Counter
from typing import Any

import torch
from torch import Tensor, nn

from fivestep import processes

LARGE = 1 << 18  # numbers in a table: below, a call more costs as much as it saves
EXACT = 53  # bits of whole numbers that a float64 holds
MOST = 0.5  # share of the rows above which all of them travel
BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int32}  # wider ones torch is slow to compare


def tables_of(model: nn.Module) -> dict[str, nn.Parameter]:
    """The weights of large embeddings that nothing else uses, by name; none where the model has nothing else."""
    places = Counter(id(p) for _, p in model.named_parameters(remove_duplicate=False))
    found: dict[str, nn.Parameter] = {}
    for name, module in model.named_modules():
        if not isinstance(module, nn.Embedding | nn.EmbeddingBag) or module.sparse:
            continue
        weight: Any = module.weight
        large = type(weight) is nn.Parameter and weight.is_cpu and weight.numel() >= LARGE
        if large and weight.requires_grad and places[id(weight)] == 1:
            found[f"{name}.weight" if name else "weight"] = weight
    others = [p for p in model.parameters() if p.requires_grad and all(p is not one for one in found.values())]
    return found if others else {}


def use_of(weight: nn.Parameter) -> Tensor:
    """Which rows of a table its gradient holds anything in, and at the end whether there is one: see `packed`."""
    used = torch.zeros(weight.shape[0] + 1, dtype=torch.bool)
    if weight.grad is not None:
        used[:-1], used[-1] = used_rows(weight.grad), True
    return packed(used)


def places() -> tuple[int, Tensor]:
    """Of a number that holds several counts: the bits of a count of all processes, and where each count begins."""
    bits = processes.size().bit_length()
    return bits, torch.arange(0, EXACT - bits + 1, bits)


def packed(used: Tensor) -> Tensor:
    """Booleans as few numbers that can be added up over all processes: each has a count of its own in one of them."""
    _, begin = places()
    rows = torch.nn.functional.pad(used.double(), (0, -len(used) % len(begin)))
    made: Tensor = rows.view(-1, len(begin)) @ (torch.ones_like(begin) << begin).double()
    return made


def unpacked(sums: Tensor, n: int) -> Tensor:
    """Which of `n` booleans are true in some process, of the sums of what each has packed."""
    bits, begin = places()
    counts: Tensor = (sums.long().unsqueeze(1) >> begin) & (2**bits - 1)
    return (counts != 0).flatten()[:n]


def used_rows_of(weight: nn.Parameter, used: Tensor) -> tuple[Tensor | None, Tensor | None]:
    """What of a table's gradient is to be summed, and the numbers of these rows: None for all of them.

    used: its use, packed, of all processes added up. Nothing is to be summed, and it stays None, where it is None in
    all.
    """
    rows = weight.shape[0]
    some = unpacked(used, rows + 1)
    if not some[rows]:
        return None, None
    if weight.grad is None:
        weight.grad = torch.zeros_like(weight)
    numbers = some[:rows].nonzero().squeeze(1)
    if len(numbers) > MOST * rows or not weight.grad.is_contiguous():
        return weight.grad, None
    return weight.grad.index_select(0, numbers), numbers


def put_rows(weight: nn.Parameter, some: Tensor | None, numbers: Tensor | None) -> None:
    """Put the sums of rows into the gradient they were taken from."""
    if weight.grad is not None and some is not None and numbers is not None:
        weight.grad.index_copy_(0, numbers, some)


def used_rows(grad: Tensor) -> Tensor:
    """Which rows of a gradient hold anything but 0, by their bits: a number may be too small for sums, or NaN."""
    bits = grad.view(BITS[grad.element_size()]).flatten(1)
    return (bits.amax(1) != 0) | (bits.amin(1) != 0)  # one by one: both at once take five times as long
