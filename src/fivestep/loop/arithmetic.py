"""The arithmetic of a step: counts, shares, the window's mean, the global norm. Pure functions, no bookkeeping."""

import math
from collections.abc import Callable
from numbers import Real
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grad_value_, clip_grads_with_norm_, get_total_norm

from fivestep.errors import UsageError, named
from fivestep.loop.batch import is_empty, rows, shapes, whole
from fivestep.loop.clock import checked_size


def global_norm(grads: list[Tensor]) -> Tensor:
    """The 2-norm of all gradients together, as torch's clip_grad_norm_ takes it, bit for bit."""
    if len({(grad.device, grad.dtype, grad.layout) for grad in grads}) == 1 and grads[0].layout is torch.strided:
        norm: Tensor = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(grads)))
        return norm if type(norm) is Tensor else whole(norm)
    return get_total_norm([grad.coalesce().values() if grad.is_sparse else grad for grad in grads])


def clip(parameters: list[nn.Parameter], norm: Tensor, clip_norm: float | None, clip_value: float | None) -> None:
    """Clip gradients in place, by their global 2-norm and by value, with torch's own arithmetic; None: no limit."""
    if clip_norm is not None:
        clip_grads_with_norm_(parameters, clip_norm, norm)
    if clip_value is not None:
        clip_grad_value_(parameters, clip_value)


def unpacked(returned: Any, method: str, *values: str) -> Any:
    """Return the values that an objective's method returned. Raises UsageError unless there is one for each name."""
    if not isinstance(returned, tuple | list) or len(returned) != len(values):
        got = f"{len(returned)} values" if isinstance(returned, tuple | list) else named(returned)
        raise UsageError(
            f"the objective's {method} returned {got}; it must return {len(values)}: {', '.join(values)} (the carry "
            "is None where the next batch needs nothing)"
        )
    return returned


def loss_of(objective: Any, model: Any, batch: Any, carry: Any) -> Any:
    """Return the mean loss over a batch and the next batch's carry. Raises UsageError for anything else."""
    return unpacked(objective.loss(model, batch, carry), "loss(model, batch, carry)", "the mean loss", "the carry")


def count_of(objective: Any, batch: Any) -> Any:
    """Return a batch's count: a number, 0 or more, or a scalar tensor. Raises UsageError for anything else."""
    count = objective.count(batch)
    if isinstance(count, Tensor) and count.numel() == 1 and not count.is_complex():
        return count.reshape(()) if count.ndim else count
    if isinstance(count, Real) and 0 <= float(count) < math.inf:
        return count
    got = f"a tensor {shapes(count)}" if isinstance(count, Tensor) else named(count)
    raise UsageError(
        f"count(batch) returned {got}; it must be a number, 0 or more, or a scalar tensor. Correct the objective's "
        "count()"
    )


def counted(
    objective: Any, batches: list[Any], reading: bool = True, where: Callable[[], str] = str
) -> tuple[list[Any], list[Any]]:
    """Return the batches and their counts, without empty batches and those of a count of 0, whose mean is 0/0.

    reading: look into counts that are tensors on the CPU too. torch's own losses need no look: their gradients over
    a count of 0 are 0. where: the place in the data, for the error.

    Raises UsageError if all batches that are not empty have a count of 0, or none was given.
    """
    filled = [batch for batch in batches if not is_empty(batch)]
    pairs = [(batch, count_of(objective, batch)) for batch in filled]
    if len(pairs) > 1 and reading and not hasattr(objective, "over"):
        pairs = [(b, c) for b, c in pairs if not isinstance(c, Tensor) or not c.is_cpu or c] or pairs
    pairs = [(batch, count) for batch, count in pairs if isinstance(count, Tensor) or count]
    if not pairs and (filled or not batches):
        raise UsageError(
            f"a step needs something to learn from; got {len(batches)} batches with a count of 0{where()}"
        )
    return [batch for batch, _ in pairs], [count for _, count in pairs]


def window_count(counts: list[Any]) -> Any:
    """The sum of the micro-batches' counts: what the step's mean is over."""
    return counts[0] if len(counts) == 1 else sum(counts)


def share_of(count: Any, total: Any, mean: Tensor) -> Tensor | None:
    """`count / total` as a scalar like `mean`; None, which `backward` takes as exactly 1, for a single batch.

    Multiplying a mean by n and dividing by n again is not exact (n = 41, 55, ...), so a single batch is not scaled.
    """
    if count is total:
        return None
    if isinstance(total, Tensor):
        wide = torch.promote_types(mean.dtype, torch.float32)  # a count does not fit into half precision
        return (torch.as_tensor(count, device=mean.device).to(wide) / total.to(wide)).to(mean.dtype)
    return mean.new_full((), count / total)  # made on the device: no copy from the host


def weighted(mean: Tensor, share: Tensor | None, count: Any) -> Tensor:
    """Return a micro-batch's part of the window's mean: 0 where it has no target; NaN where the window has none."""
    if not isinstance(count, Tensor) and not count:
        return torch.zeros_like(mean)  # it may be a mean over nothing
    if share is None:
        return mean
    return (torch.where(count > 0, mean, 0.0) if isinstance(count, Tensor) else mean) * share


def size_of(objective: Any, batch: Any) -> tuple[int, int]:
    """Samples and tokens in `batch`; an objective without `size` counts rows."""
    size = getattr(objective, "size", None)
    return (rows(batch), 0) if size is None else checked_size(size(batch))


def rate_scale(objective: Any, batches: list[Any]) -> float:
    """What the objective multiplies a step's learning rate by; the mean over the window's batches."""
    of = getattr(objective, "rate_scale", None)
    if of is None:
        return 1.0
    factors = [of(batch) for batch in batches]
    try:
        return float(sum(factors) / len(factors))
    except (TypeError, ValueError, RuntimeError) as error:
        raise UsageError(f"rate_scale(batch) returned {named(factors[0])}; it must return a number") from error
