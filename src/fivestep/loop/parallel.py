"""One model in several processes: torch's DistributedDataParallel beside it, or its parameters in shards.

    ddp     every process holds the model; gradients are summed as the last backward of a window makes them
    fsdp    every process holds a part of each parameter (`fully_shard`, FSDP2), gathered where it is used

The user's model stays what it is: DDP stands beside it and is called in its place; `fully_shard` turns its
parameters into DTensors. Gradients are summed, never averaged: the shares of the loss are of the whole already.
"""

import json
import signal
from collections.abc import Mapping
from hashlib import sha256
from inspect import ismethod, signature
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from fivestep import processes
from fivestep.errors import UsageError, named
from fivestep.interrupts import agree, asked
from fivestep.loop.batch import in_shards, parts, rebuilt
from fivestep.loop.canonical_names import weights_of
from fivestep.loop.clock import Clock
from fivestep.loop.shares import OTHERS, columns_of, joined_carry, own_carry, share_random_state
from fivestep.loop.tables import put_rows, tables_of, use_of, used_rows_of

KINDS = ("auto", "ddp", "fsdp")
NOWHERE = "the model is on the device meta, so it has no values: build it on a CPU or a GPU"


class Called(nn.Module):
    """A model that is called by its forward, or by its `features`, which a loss without logits asks for."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, *inputs: Any, by_features: bool = False, **named: Any) -> Any:
        return (self.model.features if by_features else self.model)(*inputs, **named)  # type: ignore[operator]


class Replica(DistributedDataParallel):
    """The model as an objective calls it; what it is asked for beside that, the model answers.

    Whatever is computed for a backward goes through DDP's own forward: without that it sums no gradients.
    """

    def __init__(self, model: nn.Module, apart: list[str], **options: Any):
        """`apart`: the names of parameters whose gradients DDP leaves to others."""
        called = Called(model)
        ignore: Any = self._set_params_and_buffers_to_ignore_for_model
        ignore(called, [f"model.{name}" for name in apart])
        super().__init__(called, **options)
        vars(self)["is_made"] = True  # from here on names are the model's; before, DDP sets its own

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            called: Any = super().__getattr__("module")
            found = getattr(called.model, name)
            ours = name == "features" and ismethod(found)  # of a torchvision model it is a part
            return (lambda *inputs: self(*inputs, by_features=True)) if ours else found

    def __setattr__(self, name: str, value: Any) -> None:
        known = "is_made" not in vars(self) or name in vars(self) or hasattr(type(self), name)
        if not known and hasattr(self.replicated, name):
            setattr(self.replicated, name, value)
        else:
            super().__setattr__(name, value)

    def named_modules(self, *arguments: Any, **named: Any) -> Any:
        """Those of the model itself, and so its parameters and buffers, under its own names."""
        if "is_made" not in vars(self):
            return super().named_modules(*arguments, **named)
        return self.replicated.named_modules(*arguments, **named)

    @property
    def replicated(self) -> nn.Module:
        """The model itself."""
        called: Any = self.module
        model: nn.Module = called.model
        return model


class Parallel:
    """How a step's model runs in these processes: `model` is what is called, `last` says whether gradients travel."""

    def __init__(self, kind: str, model: nn.Module, criterion: Any, optimizers: list[Optimizer], precision: str):
        if isinstance(criterion, nn.Module) and any(p.requires_grad for p in criterion.parameters()):
            raise UsageError(
                f"the criterion ({named(criterion)}) has parameters of its own, which several processes would train "
                "apart: make it a part of the model"
            )
        for name, one in model.named_modules():
            if isinstance(one, nn.Embedding | nn.EmbeddingBag) and (one.max_norm or one.scale_grad_by_freq):
                raise UsageError(
                    f"the embedding {name or 'itself'} has max_norm or scale_grad_by_freq, which depend on the rows "
                    "that a process has: take them out to train in several"
                )
        if isinstance(model, DistributedDataParallel):
            raise UsageError("give the model itself, not wrapped in DistributedDataParallel: that is done here")
        processes.meet("the start of a training")
        check_alike(model, optimizers)
        self.sharded = kind == "fsdp" or any(map(in_shards, model.parameters()))
        self.tables: dict[str, nn.Parameter] = {}  # whose gradients are summed here, and not by DDP
        self.buckets: list[Tensor] = []  # of gradients on a CPU, that are to be summed
        self.seconds = 0.0  # of this process's steps, not told yet
        self.seen = [0]  # numbers of a window's gradients that torch has handed over
        self.reduced: list[nn.Parameter] = []  # whose gradients it is to hand over
        self.sums: Tensor | None = None  # of all: the loss, and what each has told
        self.heard = [0.0] * 4  # SIGTERM, SIGINT, a save, seconds
        self.shared_updates: list[Any] = []  # that all make together, or each by itself
        self.program = 0  # a number that is the same where programs are
        self.steps = 0  # by one operation at a time, of this process and all others
        self.no_program: str | None = "graph=False"  # why steps are eager ones; None where they may be programs
        device = next(model.parameters()).device
        if not self.sharded and max(processes.from_all(is_nowhere(model))):
            raise UsageError(f"{NOWHERE}; under parallel='fsdp' (--parallel) in process 0 alone")
        if self.sharded:
            if not any(map(in_shards, model.parameters())):
                shard(model, optimizers, precision, device_of_shards(model))
            self.model: nn.Module = model
        else:
            ids = [device.index] if device.type == "cuda" else None
            known = signature(DistributedDataParallel).parameters
            until_2_12, since = "broadcast_buffers", "forward_sync_buffers"
            options: dict[str, Any] = {since if since in known else until_2_12: False}  # see share_buffers
            if device.type == "cpu":  # sums do not run beside the backward pass: the fewer, the better
                options["bucket_cap_mb"] = 25
            self.tables = tables_of(model)
            self.model = Replica(model, list(self.tables), device_ids=ids, gradient_as_bucket_view=True, **options)
            self.model.register_comm_hook((self.buckets, self.seen), summed)
            self.reduced = [p for name, p in model.named_parameters() if name not in self.tables]
            for table in self.tables.values():
                dist.broadcast(table.detach(), 0)
        if self.sharded and hasattr(model, "predict_next") and "predict_next" not in vars(model):
            from torch.distributed.fsdp import register_fsdp_forward_method

            register_fsdp_forward_method(model, "predict_next")  # text is written by it, not by forward
        self.buffers_of = [(one._buffers, name) for one in model.modules() for name in one._buffers]
        self.share_buffers()
        self.columns = 0  # of segments: those of all processes
        share_random_state()
        self.random = self.shared_random = torch.get_rng_state()
        self.seed()

    def __enter__(self) -> None:
        """Inside, the host's random numbers are this process's own: the shared ones order the data, in all alike."""
        self.shared_random = torch.get_rng_state()
        torch.set_rng_state(self.random)

    def __exit__(self, *error: object) -> None:
        self.random = torch.get_rng_state()
        torch.set_rng_state(self.shared_random)

    def seed(self) -> None:
        """Random numbers of this process's own, for dropout, from the state that all share."""
        shared = torch.get_rng_state()
        begin = int(torch.randint(2**62, ()))  # of the state, not of the seed: a later training draws others
        torch.manual_seed(begin + 1_000_003 * (1 + processes.rank()))
        self.random = torch.get_rng_state()
        torch.set_rng_state(shared)

    def joined(self, saved: dict[str, Any]) -> dict[str, Any]:
        """The parts of a state with what each process has of its own: random states, columns of what is carried."""
        own = processes.tensors_of_all(self.random)
        carry = joined_carry(saved["carry"], self.columns) if self.columns else saved["carry"]
        return {**saved, "carry": carry, "processes": {"random": own}}

    def scattered(self, saved: dict[str, Any], state: Any) -> dict[str, Any]:
        """A saved state as this process holds it; with other processes than it was saved by, the order goes on."""
        own = saved.get("processes") or {}
        if len(own.get("random", [])) == processes.size():
            self.random = own["random"][processes.rank()]
        self.columns = columns_of(saved["carry"])
        saved = {**saved, "carry": own_carry(saved["carry"])}
        return laid_out(saved, self.layout(state)) if self.sharded else saved

    def layout(self, state: Any) -> dict[str, Tensor]:
        """The tensors in shards by their names in a saved state; a name that ends in a dot: for all below it."""
        if not self.sharded:
            return {}
        found = {f"model.{name}": value for name, value in weights_of(state.model).items()}
        for i, optimizer in enumerate(state.optimizers):
            held = [parameter for group in optimizer.param_groups for parameter in group["params"]]
            for number, parameter in enumerate(held):
                found[f"optimizers.{i}.state.{number}."] = found[f"optimizers.{i}.{number}."] = parameter
        found |= {f"average.weights.{i}": weight for i, weight in enumerate(state.average.weights)}
        found |= {f"plateau.best.{name}": value for name, value in found.items()}
        return {name: value for name, value in found.items() if in_shards(value)}

    def complete(self, loss: Tensor, same: list[int]) -> Tensor:
        """After a window's last backward: sum what torch has not, in two talks. Returns the loss of all.

        same: of the data, whole numbers below 65,536 that must be equal in all. Raises UsageError, in all, where they
        are not, and where torch does not see all gradients: it has then not summed them.
        """
        missed, again = self._missed(), True
        while again:  # where this step was a program in some, they come again
            total, uses, again = self._tell(loss, same, missed=missed)
        buckets, self.buckets[:] = [*self.buckets], []
        self._sum(buckets, uses)
        self.steps += 1
        return total

    def complete_program(self, loss: Tensor, same: list[int], rows: list[Tensor]) -> Tensor | None:
        """The same after a program that has put gradients into `rows` and tables; None, and nothing is summed, where
        it was an eager step in another process."""
        total, uses, again = self._tell(loss, same, by_program=True)
        if again:
            return None
        self._sum(rows, uses)
        return total

    def _tell(
        self, loss: Tensor, same: list[int], missed: bool = False, by_program: bool = False
    ) -> tuple[Tensor, list[Tensor], bool]:
        """The first talk: the loss of all, which rows of tables are used, whether the step must be taken again."""
        ended, save = asked()
        seconds, self.seconds = self.seconds if processes.is_first() else 0.0, 0.0
        told = [ended == signal.SIGTERM, ended == signal.SIGINT, save, seconds, missed]
        told += [self.versions != self._versions(), self.no_program is not None, by_program]
        told.append(not all(one.is_torchs() for one in self.shared_updates))
        told += [number**power for number in [self.program * by_program, *same] for power in (1, 2)]
        numbers = torch.tensor(told, dtype=torch.float64, device=loss.device)
        sums = self.sums = torch.cat([loss.detach().double().view(1), numbers])
        uses = [use_of(table) for table in self.tables.values()]
        processes.sum_together([sums, *uses])
        # Before gradients are summed, which may be more in one process than in another.
        return sums[0].to(loss.dtype), uses, loss.is_cpu and self.hear()

    def _sum(self, buckets: list[Tensor], uses: list[Tensor]) -> None:
        """The second talk: gradients."""
        rows = [used_rows_of(table, used) for table, used in zip(self.tables.values(), uses, strict=True)]
        processes.sum_together([*buckets, *(some for some, _ in rows if some is not None)])
        for table, (some, of) in zip(self.tables.values(), rows, strict=True):
            put_rows(table, some, of)

    def hear(self) -> bool:
        """Read what all have told, where the host waits for the step anyway. Raises UsageError.

        Returns whether this was a program's step in some processes and an eager one in others: it is taken again.
        """
        if self.sums is None:
            return False
        _, *told = self.sums.tolist()  # HOST READ: with the step's own one
        missed, changed, without, programs, apart, program, squares, *same = told[4:]
        self.sums = None
        self.heard = [one + more for one, more in zip(self.heard, told[:4], strict=True)]
        if missed:
            names = [name for name, p in self.model.named_parameters() if p.requires_grad and p.grad is None]
            shown = ", ".join(names[:3]) or "a parameter"
            raise UsageError(
                f"{shown}{', ...' if len(names) > 3 else ''} took no part in the loss, or not through the model's "
                "forward in the window's last batch, or was frozen or unfrozen meanwhile; in several processes each "
                "parameter must be reached so, in all of them: freeze it before training (requires_grad_(False)), or "
                "take it out"
            )
        if not all(map(all_alike, same[::2], same[1::2])):
            raise UsageError(OTHERS)
        for one in self.shared_updates:
            one.apart = bool(apart)
        if changed:
            self.share_buffers()
        if 0 < without < processes.size():
            why = processes.from_all(self.no_program)
            rank = next(rank for rank, reason in enumerate(why) if reason is not None)
            self.no_program = self.no_program or f"not in rank {rank}: {why[rank]}"
        if programs == processes.size() and not all_alike(program, squares):
            self.no_program = (
                "the processes would have different ones, and part: give all of them as many threads "
                "(OMP_NUM_THREADS) and processors of one kind"
            )
            return True
        return bool(0 < programs < processes.size())

    def share_buffers(self) -> None:
        """Let buffers that a forward pass has changed (running statistics) be process 0's in all, as torch has it."""
        processes.same_as_first(self._buffers())
        self.versions = self._versions()

    def _buffers(self) -> list[Tensor]:
        return [one for table, name in self.buffers_of if (one := table.get(name)) is not None]

    def _versions(self) -> list[Any]:
        """What tells that a buffer was changed, or replaced."""
        return [(id(one), one._version) for one in self._buffers()]

    def check_parameters(self) -> None:
        """Raise UsageError for a parameter that the model got after training began: DDP does not sum its gradient."""
        known = set(map(id, [*self.reduced, *self.tables.values()]))
        new = [name for name, p in self.model.named_parameters() if p.requires_grad and id(p) not in known]
        if new and not self.sharded:
            raise UsageError(
                f"parameter {new[0]} was added to the model after training began, so DDP does not all-reduce its "
                "gradient. Start a new training with the changed model (fs.train, fs.fit or TrainStep)"
            )

    def _missed(self) -> bool:
        """Whether there are gradients that torch has not seen in this window."""
        expected = sum(p.numel() for p in self.reduced if p.requires_grad)
        seen, self.seen[0] = self.seen[0], 0
        return not self.sharded and seen != expected

    def take_up(self, clock: Clock, seconds: float) -> None:
        """After a step: do as was asked of any process, and count the time of process 0, so that due is due in all.

        seconds: of this step, which the clock gets with the next.
        """
        (term, interrupt, save, spent), self.heard = self.heard, [0.0] * 4
        agree(signal.SIGTERM if term else signal.SIGINT if interrupt else 0, save)
        clock.seconds += spent
        self.seconds += seconds

    def reshard(self) -> None:
        """Let gathered parameters go: their shards are changed from outside of a step."""
        modules: Any = self.model.modules() if self.sharded else ()
        for module in modules:
            if hasattr(module, "reshard"):
                module.reshard()

    def last(self, last: bool) -> None:
        """Whether the pass that follows is the window's last, at whose end the gradients are summed."""
        if self.sharded:
            self.model.set_requires_gradient_sync(last)  # type: ignore[operator]
        else:
            self.model.require_backward_grad_sync = last  # type: ignore[assignment]


def all_alike(total: float, squares: float) -> bool:
    """Whether whole numbers, one of each process, are equal: that is where n times the squares are the square."""
    return processes.size() * squares == total**2


def check_alike(model: nn.Module, optimizers: list[Optimizer]) -> None:
    """Raise UsageError, in all, where the processes have other models or optimizers than each other."""
    shapes = [[name, list(p.shape), p.requires_grad] for name, p in model.named_parameters()]
    groups = [[type(one).__name__, *map(numbers_of, one.param_groups)] for one in optimizers]
    model_as_text = f"a model of {len(shapes)} parameters ({sha256(json.dumps(shapes).encode()).hexdigest()[:8]})"
    found = processes.first_difference({"model": model_as_text, "optimizers": str(groups)})
    if found is not None:
        _, first, rank, other = found
        raise UsageError(
            f"rank 0 has {first[:300]}, rank {rank} has {other[:300]}: start all processes with the same model and "
            "the same options"
        )


def numbers_of(group: dict[str, Any]) -> dict[str, Any]:
    """The numbers and words among the options of an optimizer's group."""
    found = {name: float(value) if isinstance(value, Tensor) else value for name, value in sorted(group.items())}
    return {name: value for name, value in found.items() if isinstance(value, int | float | str | tuple)}


def summed(told: tuple[list[Tensor], list[int]], bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:  # type: ignore[name-defined]
    """DDP's communication of a bucket of gradients: their sum; on a GPU beside the rest of the backward pass.

    On a CPU later, with all else: the cores are busy with the backward pass anyway, each talk costs a wait, and a
    callback in Python would be let go by a thread of gloo's, which aborts a process that is just ending.
    """
    buffer, (later, seen) = bucket.buffer(), told
    seen[0] += buffer.numel()
    future: torch.futures.Future[Tensor]
    if buffer.is_cpu:
        later.append(buffer)
        future = torch.futures.Future()
        future.set_result(buffer)
        return future
    future = dist.all_reduce(buffer, async_op=True).get_future().then(lambda done: done.value()[0])
    return future


def parallel_of(
    kind: str, model: nn.Module, criterion: Any, optimizers: list[Optimizer], precision: str
) -> Parallel | None:
    """How a model trains in the processes that there are; None alone. Raises UsageError."""
    if kind not in KINDS:
        raise UsageError(f"parallel = {kind!r} must be one of {', '.join(KINDS)} (--parallel)")
    parameter = next(model.parameters(), None)
    if parameter is not None:
        processes.join(processes.here() if parameter.is_meta else parameter.device, alone_too=kind != "auto")
    if not processes.joined():
        if is_nowhere(model):
            raise UsageError(NOWHERE)
        return None
    return Parallel("ddp" if kind == "auto" else kind, model, criterion, optimizers, precision)


def shard_units(model: nn.Module) -> list[nn.Module]:
    """What FSDP2 gathers as one: each module of a ModuleList that has parameters, so each block."""
    lists = [module for module in model.modules() if isinstance(module, nn.ModuleList)]
    return [unit for one in lists for unit in one if any(True for _ in unit.parameters())]


def shard(model: nn.Module, optimizers: list[Optimizer], precision: str, device: torch.device) -> None:
    """FSDP2: each block of a list of blocks by itself, and the rest together. Sums, as above.

    The numbers are process 0's; the others may have the model on meta, and none but that one ever holds it whole. The
    optimizers, which were made before, hold the new parameters from here on. With precision "bf16" parameters travel
    in it, and gradients are summed in float32; the shards stay as they are.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

    if any(optimizer.state for optimizer in optimizers):
        raise UsageError("an optimizer that has stepped before cannot be sharded: build it anew (--parallel fsdp)")
    policy = MixedPrecisionPolicy()
    if precision == "bf16":
        policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    mesh = init_device_mesh(device.type, (processes.size(),))
    held = taken_out(model, optimizers)
    for unit in [*shard_units(model), model]:
        values = values_of(unit, device)
        fully_shard(unit, mesh=mesh, mp_policy=policy)
        for name, parameter in unit.named_parameters():
            if name in values:
                fill(parameter, values.pop(name))
    for buffer in model.buffers():
        dist.broadcast(buffer.detach(), 0)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)  # gloo has no other
    after = dict(model.named_parameters())
    for group, ones in held:
        group["params"] = [after[one] if isinstance(one, str) else one for one in ones]


def taken_out(model: nn.Module, optimizers: list[Optimizer]) -> list[tuple[dict[str, Any], list[Any]]]:
    """The optimizers' groups with the names of their parameters, which they let go: what is cut is not kept whole."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    groups = [group for optimizer in optimizers for group in optimizer.param_groups]
    held = [(group, [names.get(id(one), one) for one in group["params"]]) for group in groups]
    for group in groups:
        group["params"] = []
    return held


def values_of(unit: nn.Module, device: torch.device) -> dict[str, Tensor]:
    """The whole parameters of a unit by name, but for those in shards. What is on meta gets memory, without values.

    On a CPU memory that nobody writes into is none; on a GPU it is that of one unit, as cutting it takes anyway.
    """
    made: dict[Tensor, Tensor] = {}
    for module in unit.modules():
        for name, tensor in [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]:
            if tensor.is_meta and not in_shards(tensor):
                room = torch.empty_like(tensor, device=device, requires_grad=False)
                trains = isinstance(tensor, nn.Parameter)
                new = made.setdefault(tensor, nn.Parameter(room, tensor.requires_grad) if trains else room)
                setattr(module, name, new)
    return {name: one.detach() for name, one in unit.named_parameters() if not in_shards(one)}


def fill(parameter: Any, value: Tensor) -> None:
    """Give each process its part of process 0's `value`."""
    part: Any = like(value, parameter)
    with torch.no_grad():
        parameter.to_local().copy_(part.to_local())


def device_of_shards(model: nn.Module) -> torch.device:
    """Where the shards of a model lie that all but process 0 may have on meta. Raises UsageError, in all."""
    own = next(model.parameters()).device
    (nowhere, kind, joined), *others = processes.from_all([is_nowhere(model), own.type, processes.device().type])
    if nowhere:
        raise UsageError(NOWHERE)
    if not any(one[0] for one in others):
        return own
    return processes.local_device(torch.device(joined if kind == "cpu" else kind))


def is_nowhere(model: nn.Module) -> bool:
    """Whether some of it is on meta: shapes without values."""
    return any(one.is_meta for one in model.parameters())


# --- what is saved ---


def laid_out(value: Any, layout: dict[str, Tensor], name: str = "") -> Any:
    """A tree with each whole tensor cut as the one of its name in `layout` is. All processes must ask at once."""
    if isinstance(value, Tensor):
        own = owner(layout, name)
        return value if own is None else like(value, own)
    keys = value.keys() if isinstance(value, Mapping) else range(len(parts(value)))
    below = [f"{name}.{key}" if name else str(key) for key in keys]
    return rebuilt(value, [laid_out(one, layout, at) for one, at in zip(parts(value), below, strict=True)])


def owner(layout: Mapping[str, Tensor], name: str) -> Tensor | None:
    """The tensor in shards that what is saved as `name` belongs to."""
    return layout.get(name, layout.get(name.rpartition(".")[0] + "."))


def like(value: Tensor, own: Any) -> Tensor:
    """A whole tensor of the shape of `own`, laid out as that is; any other as it is."""
    if in_shards(value) or value.shape != own.shape:
        return value
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(value.to(own.device), own.device_mesh, own.placements)
