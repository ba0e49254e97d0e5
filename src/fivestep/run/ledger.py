"""Tensors without storage, and a ledger of what the operations on them would allocate and compute.

Owns how memory and FLOP are counted. Knows no model and no configuration.
"""

import math
import weakref
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils import flop_counter
from torch.utils._pytree import tree_leaves

from fivestep.loop.watched import Watch

aten = torch.ops.aten


class Shapes(FakeTensorMode):  # type: ignore[no-untyped-call]
    """Tensors with shapes and devices and no storage; a copied layer (nn.TransformerEncoder's) stays among them."""

    def __deepcopy__(self, memo: Any) -> "Shapes":
        return self


class Ledger(Watch):  # type: ignore[no-untyped-call]
    """Follows the storages on one kind of device: bytes `live` now, the `peak` since `rewind`, the `largest` made.

    `peak` and `largest` come with the operation that allocated then. A host read gets 1: without storage there is
    no value, and the loop asks only whether one is finite.
    """

    def __init__(self, device: torch.device):
        super().__init__()
        self.kind = device.type
        self.sizes: dict[int, int] = {}  # of the storages that live, by their address
        self.operations: set[Any] = set()
        self.live = 0
        self.rewind()

    def rewind(self) -> None:
        """Begin a new peak."""
        self.peak, self.largest = (self.live, ""), (0, "")

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.operations.add(func.overloadpacket)
        if func is aten._local_scalar_dense.default:
            return True if args[0].dtype == torch.bool else 1.0 if args[0].is_floating_point() else 1
        out = func(*args, **(kwargs or {}))
        self.add(out, str(func.overloadpacket).removeprefix("aten."))
        return out

    def add(self, tensors: Any, operation: str = "") -> None:
        """Count the storages of nested `tensors`, each once, until it is freed."""
        for tensor in tree_leaves(tensors):
            if not isinstance(tensor, Tensor) or tensor.device.type != self.kind:
                continue
            storage = tensor.untyped_storage()
            key, size = storage._cdata, storage.nbytes()
            if key not in self.sizes:
                self.sizes[key] = size
                self.live += size
                self.peak = max(self.peak, (self.live, operation), key=lambda one: one[0])
                self.largest = max(self.largest, (size, operation), key=lambda one: one[0])
                weakref.finalize(storage, self._drop, key)

    def _drop(self, key: int) -> None:
        self.live -= self.sizes.pop(key)


def nbytes(tensors: Any) -> int:
    """Bytes of the storages of nested `tensors`, shared ones once."""
    storages = [tensor.untyped_storage() for tensor in tree_leaves(tensors) if isinstance(tensor, Tensor)]
    return sum({storage._cdata: storage.nbytes() for storage in storages}.values())


def recurrent_flop(x: Any, weight: Any, recurrent: Any, *rest: Any, **out: Any) -> int:
    """Of one recurrent layer, forward: x [time, batch, inputs] by both its matrices; 2 FLOP for each product."""
    products: int = math.prod(x[:-1]) * (math.prod(weight) + math.prod(recurrent))
    return 2 * products


def attention_flop(q: Any, k: Any, v: Any, *rest: Any, **out: Any) -> int:
    """Of fused attention, forward: both its products, the masked half of a causal one included."""
    products: int = 2 * math.prod(q) * k[-2]
    return 2 * products


FORMULAS: dict[Any, Any] = {  # from shapes, for operations that torch's own counter does not know
    aten._scaled_dot_product_flash_attention_for_cpu: attention_flop,
    # Five products instead of two: the scores are computed again.
    aten._scaled_dot_product_flash_attention_for_cpu_backward: lambda _, *qkv, **out: attention_flop(*qkv) * 5 // 2,
    aten.mkldnn_rnn_layer: recurrent_flop,
    aten.mkldnn_rnn_layer_backward: lambda *shapes, **out: 2 * recurrent_flop(*shapes),
}


def count_flops() -> flop_counter.FlopCounterMode:
    """Counts the FLOP of matrix products while it is entered: `.get_total_flops()`."""
    return flop_counter.FlopCounterMode(display=False, custom_mapping=FORMULAS)


def uncounted(operations: set[Any]) -> list[str]:
    """Those with matrix products inside for which no formula is known, by name."""
    unknown = operations - set(FORMULAS) - set(flop_counter.flop_registry)
    names = {str(operation).removeprefix("aten.") for operation in unknown}
    return sorted(name for name in names if any(part in name for part in ("rnn", "lstm", "gru", "attention", "conv")))
