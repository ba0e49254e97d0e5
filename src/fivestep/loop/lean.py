"""Three of the five steps as torch takes them, bit for bit, without what surrounds them there and nobody uses.

    zero_grad(optimizers)       gradients to None
    backward(loss, gradient)    the same of torch
    Update(optimizer)()         its step

Around these torch puts labels for a profiler, hooks, a graph break, and checks of what a step knows: 40 µs where the
arithmetic takes 100. Adam and AdamW of small models are stepped over lists of tensors, operation by operation
as torch does it tensor by tensor: the same bits, in 30 µs less. Whoever replaced or hooked one of torch's calls gets
that call. Owns no arithmetic that torch does not have; which rates apply is `schedule.py`'s.
"""

from collections.abc import Iterable
from inspect import signature, unwrap
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Adam, AdamW, Optimizer
from torch.overrides import has_torch_function_unary

from fivestep.errors import UsageError
from fivestep.loop.watched import step_hooks

SMALL = 100_000  # numbers in a model: up to here calls cost more than arithmetic
_ENGINE, _BACKWARD, _ZERO_GRAD = torch.autograd.Variable._execution_engine, Tensor.backward, Optimizer.zero_grad
PLAIN = (nn.Parameter, Tensor)
KINDS = (torch.float32, torch.float64, torch.bfloat16)  # of which lists of tensors have the bits of one at a time
UNUSUAL = ("amsgrad", "maximize", "foreach", "capturable", "differentiable", "fused")


def zero_grad(optimizers: Iterable[Optimizer]) -> None:
    """Set the gradients of all that the optimizers hold to None, without a profiler's label where none looks."""
    for optimizer in optimizers:
        if (
            type(optimizer).zero_grad is not _ZERO_GRAD
            or "zero_grad" in vars(optimizer)  # replaced
            or torch.autograd.profiler._is_profiler_enabled
        ):
            optimizer.zero_grad(set_to_none=True)
            continue
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                parameter.grad = None


def backward(loss: Tensor, gradient: Tensor | None) -> None:
    """torch's own; of a plain tensor on the CPU, the engine's call that it ends in."""
    if (
        type(loss) is not Tensor
        or not loss.is_cpu
        or has_torch_function_unary(loss)
        or Tensor.backward is not _BACKWARD
    ):
        loss.backward(gradient=gradient)  # type: ignore[no-untyped-call]
        return
    first = torch.ones_like(loss) if gradient is None else gradient
    _ENGINE.run_backward((loss,), (first,), False, False, (), allow_unreachable=True, accumulate_grad=True)


class Update:
    """Steps one optimizer, each time it is called."""

    def __init__(self, optimizer: Optimizer):
        self.optimizer, self.kind = optimizer, type(optimizer)
        self.step, self.plain_step = self.kind.step, plain_step(self.kind)
        self.hooks = step_hooks([optimizer])
        self.known = self.plain_step.__module__.startswith("torch.optim.")
        self.over_lists: bool | None = None if self.kind in (Adam, AdamW) else False  # None: not tried yet

    def __call__(self) -> None:
        """One update from the gradients that there are."""
        optimizer = self.optimizer
        if (
            not self.known
            or "step" in vars(optimizer)  # replaced, as torch's schedulers do
            or self.kind.step is not self.step
            or optimizer.defaults.get("differentiable")
            or any(self.hooks)
            or torch.autograd.profiler._is_profiler_enabled
        ):
            stepped(optimizer)
            return
        with torch.no_grad():
            if self.over_lists is None:
                self._try()
            elif not (self.over_lists and (groups := adam_groups(optimizer))):
                self.plain_step(optimizer)
            else:
                for options, lists in groups:
                    adam(options, *lists)

    def _try(self) -> None:
        """Step as torch does, and step copies over lists: the same bits decide on what follows."""
        groups = adam_groups(self.optimizer)
        if groups is None:
            self.plain_step(self.optimizer)
            return  # before the first update there is no state: it is tried at the next
        small = sum(p.numel() for _, lists in groups for p in lists[0]) <= SMALL
        copies = [(options, [[one.clone() for one in each] for each in lists]) for options, lists in groups if small]
        self.plain_step(self.optimizer)
        for options, lists in copies:
            adam(options, *lists)
        self.over_lists = small and all(
            torch.equal(mine, theirs)
            for (_, of), (_, copied) in zip(groups, copies, strict=True)
            for each, copy in zip(of, copied, strict=True)
            for mine, theirs in zip(each, copy, strict=True)
        )


def stepped(optimizer: Optimizer) -> None:
    """Call `optimizer.step()`. Raises UsageError where it turns out to need a closure."""
    try:
        optimizer.step()
    except (AssertionError, RuntimeError, TypeError, ValueError) as error:
        called_none = isinstance(error, TypeError) and "'NoneType' object is not callable" in str(error)
        takes_one = called_none and "closure" in signature(optimizer.step).parameters
        if takes_one or "closure" in str(error).lower():
            raise UsageError(needs_closure(optimizer)) from error
        raise


def needs_closure(optimizer: Optimizer) -> str:
    """Return the sentence for an optimizer that computes the loss again within its step."""
    return (
        f"{type(optimizer).__name__}.step() needs a closure, and fivestep does not pass one. Use an optimizer that "
        "needs no closure, or write your own loop for this optimizer"
    )


def adam_groups(optimizer: Optimizer) -> list[tuple[dict[str, Any], list[list[Tensor]]]] | None:
    """Of each group its options, and parameters, gradients, both averages and counts; None for torch's own step.

    Those of plain Adam or AdamW on the CPU, all parameters with a gradient and as many updates behind them.
    """
    found = []
    for group in optimizer.param_groups:
        parameters, states = group["params"], []
        for name in UNUSUAL:
            if group.get(name):
                return None
        grads = []
        for p in parameters:
            grad, state = p.grad, optimizer.state.get(p)
            if type(p) not in PLAIN or not p.is_cpu or grad is None or grad.layout is not torch.strided or not state:
                return None
            if p.dtype not in KINDS:  # complex: torch's own looks at parts
                return None
            grads.append(grad)
            states.append(state)
        first, second, counts = ([s[name] for s in states] for name in ("exp_avg", "exp_avg_sq", "step"))
        rate, (beta1, beta2) = group["lr"], group["betas"]
        if type(rate) is not float or type(beta1) is not float or type(beta2) is not float or not all_alike(counts):
            return None
        found.append((group, [parameters, grads, first, second, counts]))
    return found


def all_alike(counts: list[Tensor]) -> bool:
    """Whether every parameter was updated as often, and counts for itself."""
    return len({count.item() for count in counts}) == 1 and len(set(map(id, counts))) == len(counts)


def adam(
    group: dict[str, Any],
    parameters: list[Tensor],
    grads: list[Tensor],
    first: list[Tensor],
    second: list[Tensor],
    counts: list[Tensor],
) -> None:
    """`torch.optim.adam._single_tensor_adam` over lists, operation by operation (Kingma & Ba 2015; Loshchilov 2019).

    `first` and `second`: the running averages of gradients and of their squares. Changes all but `grads`.
    """
    rate, decay, (beta1, beta2) = group["lr"], group["weight_decay"], group["betas"]
    torch._foreach_add_(counts, 1.0)
    count = counts[0].item()
    if decay and group["decoupled_weight_decay"]:
        torch._foreach_mul_(parameters, 1 - rate * decay)
    elif decay:
        grads = list(torch._foreach_add(grads, parameters, alpha=decay))
    torch._foreach_lerp_(first, grads, 1 - beta1)
    torch._foreach_mul_(second, beta2)
    torch._foreach_addcmul_(second, grads, grads, 1 - beta2)
    denominators = torch._foreach_sqrt(second)
    torch._foreach_div_(denominators, (1 - beta2**count) ** 0.5)
    torch._foreach_add_(denominators, group["eps"])
    torch._foreach_addcdiv_(parameters, first, denominators, -(rate / (1 - beta1**count)))


def plain_step(kind: Any) -> Any:
    """The `step` that an optimizer's class defines, without what torch, and nobody else, has put around it."""
    return unwrap(kind.step, stop=lambda layer: not layer.__globals__["__name__"].startswith("torch."))
