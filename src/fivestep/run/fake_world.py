"""The collectives that torch itself starts in a step of N devices, counted in one process: no data is sent.

    torch's fake process group of N  +  DDP or FSDP2 around the model  ->  each collective's kind and bytes

Owns how torch is asked. The arithmetic that is held against it is `wire.py`'s. torch keeps its fake process group
among its testing parts: where it is missing or changed, there is simply nothing to compare with.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from fivestep.errors import UsageError
from fivestep.loop.lean import backward
from fivestep.loop.parallel import shard_units
from fivestep.loop.watched import Watch
from fivestep.run.ledger import Shapes
from fivestep.run.wire import Collective, Kind

aten = torch.ops.aten
# The operations that torch's process groups are called by, and which argument holds what is counted.
PAYLOADS: dict[str, tuple[Kind, int]] = {
    "allreduce_": ("all-reduce", 0),
    "_allgather_base_": ("all-gather", 0),  # what is written
    "_reduce_scatter_base_": ("reduce-scatter", 1),  # what is read
}


class Collectives(Watch):  # type: ignore[no-untyped-call]
    """Counts collectives while it is entered: `.seen`, in order."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Collective] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d" and func._opname in PAYLOADS:
            kind, at = PAYLOADS[func._opname]
            tensors = args[at] if isinstance(args[at], list | tuple) else [args[at]]
            self.seen.append(Collective(kind, sum(tensor.nbytes for tensor in tensors)))
        if func is aten.copy_.default and args[1].is_meta and not args[0].is_meta:
            return args[0]  # the order of DDP's buckets, back from rank 0: that is this process, which has it
        return func(*args, **(kwargs or {}))


@contextmanager
def fake_world(world: int) -> Iterator[None]:
    """Inside, this process is rank 0 of `world`, and what it sends goes nowhere.

    Raises UsageError where it belongs to a real process group, RuntimeError where torch has no fake one.
    """
    if dist.is_initialized():
        raise UsageError("a world is simulated in one process: start the command without torchrun")
    try:
        from torch.testing._internal.distributed.fake_pg import FakeStore
    except ImportError as error:
        raise RuntimeError(f"this torch has no fake process group ({error})") from error
    dist.init_process_group("fake", rank=0, world_size=world, store=FakeStore())
    try:
        yield
    finally:
        dist.destroy_process_group()


def parallelised(model: nn.Module, parallel: str, precision: str, world: int) -> nn.Module:
    """`model` under torch's own DDP, or FSDP2: gathered in `precision`, gradients reduced in float32.

    With weights on torch's device "meta", where N shards cost nothing, however many they are.
    """
    if parallel == "ddp":
        wrapped = nn.parallel.DistributedDataParallel(model, init_sync=False, broadcast_buffers=False)
        wrapped.register_comm_hook(None, reduce_bucket)
        wrapped.logger = SimpleNamespace(set_runtime_stats_and_log=lambda: None)  # it times known devices alone
        return wrapped
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    kinds = {"bf16": torch.bfloat16, "fp16": torch.float16}
    policy = MixedPrecisionPolicy(param_dtype=kinds.get(precision), reduce_dtype=torch.float32)
    with torch.device("cpu"):  # numbers that are read
        mesh = init_device_mesh("cpu", (world,))
    for unit in shard_units(model):
        fully_shard(unit, mesh=mesh, mp_policy=policy)
    return fully_shard(model, mesh=mesh, mp_policy=policy)  # type: ignore[return-value]


def reduce_bucket(_: None, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:  # type: ignore[name-defined]
    """What DDP does with a full bucket; its own way asks a fake process group for a result, and gets none."""
    dist.all_reduce(bucket.buffer())
    reduced: torch.futures.Future[Tensor] = torch.futures.Future()
    reduced.set_result(bucket.buffer())
    return reduced


def count_collectives(
    build: Callable[[], nn.Module], inputs: Tensor, parallel: str, precision: str, world: int, micro_batches: int
) -> list[Collective]:
    """The collectives of one step of `world` devices: forward and backward of each micro-batch on `inputs`.

    build: makes the model, on torch's device "meta". What is differentiated is the sum of its outputs: a loss would
    change nothing of what is sent. The gradients of all micro-batches but the last stay where they are. Under DDP a
    step goes before, after which it puts its buckets in the order of the gradients.
    """
    ddp = parallel == "ddp"
    with fake_world(world):
        with torch.device("meta"):
            model = parallelised(build(), parallel, precision, world)
        # FSDP2 runs on devices that there are, so its shards become tensors without storage on the CPU.
        with torch.device("meta") if ddp else Shapes(allow_non_fake_inputs=True):
            inputs = inputs.to("meta") if ddp else torch.zeros_like(inputs)
            if not ddp:
                model.to_empty(device="cpu")
            for _ in range(2 if ddp else 1):
                with Collectives() as counted:
                    for at in range(micro_batches):
                        with synchronised(model, parallel, at == micro_batches - 1):
                            outputs = model(inputs)
                            backward((outputs[0] if isinstance(outputs, tuple) else outputs).sum(), None)
        seen: list[Collective] = counted.seen
    return seen


def synchronised(model: Any, parallel: str, last: bool) -> Any:
    """The context of a micro-batch: gradients are reduced with the window's last one only."""
    if parallel == "ddp":
        return nullcontext() if last else model.no_sync()
    model.set_requires_gradient_sync(last)
    return nullcontext()
