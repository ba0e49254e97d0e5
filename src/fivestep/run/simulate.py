"""`fivestep train RECIPE --dry-run --simulate-world N`: one device's part of a step on N devices, foreseen on none.

    the job's model, loss and optimizer on tensors without storage  ->  Job: what a device computes and keeps
    the arithmetic of `wire.py` over its shapes                     ->  memory by part, bytes on the wire, seconds
    torch's own DDP or FSDP2 in a fake world of N                   ->  its collectives, to compare with

Owns what is put together and printed. Allocates no weights and sends nothing; of the data it reads only the size of
the vocabulary, and not even that where `vocab_size` says it.
"""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils import flop_counter
from torch.utils._pytree import tree_leaves

from fivestep.errors import FivestepError, UsageError, suggestion
from fivestep.loop.lean import Update, backward
from fivestep.loop.optimizer import freeze
from fivestep.loop.parallel import shard_units
from fivestep.loop.precision import autocast
from fivestep.run.build import (
    WINDOWED,
    build_data,
    build_device,
    build_model,
    build_objective,
    build_optimizers,
    micro_batch_size,
)
from fivestep.run.config import Config
from fivestep.run.dry_run import Rows, in_bytes, in_units
from fivestep.run.fake_world import count_collectives
from fivestep.run.forecast import matmul_rate
from fivestep.run.ledger import FORMULAS, Ledger, Shapes, attention_flop, nbytes, uncounted
from fivestep.run.memory import free
from fivestep.run.wire import (
    A100,
    H100,
    Collective,
    Hardware,
    Shape,
    Unit,
    ddp_collectives,
    exposed_seconds,
    fsdp_backward,
    fsdp_forward,
    machines_like_this,
    nodes,
    padded_elements,
    seconds,
    sent_bytes,
    shard_elements,
    share,
    wire_seconds,
)
from fivestep.watch.screen import Console

aten = torch.ops.aten
PRODUCTS = {aten.mm, aten.addmm, aten.bmm, aten.baddbmm}
HARDWARE = ("h100", "a100", "cpu")
MOST_COUNTED = 4096  # devices of a fake world
REDUCED_BYTES = 4  # of a gradient's element while it is reduced: float32
FORWARD = 1 / 3  # of a step's products; backward makes the other two thirds


# --- the job on one device ---


class Parameter(NamedTuple):
    name: str
    shape: Shape
    itemsize: int
    trained: bool


class StateTensor(NamedTuple):
    """A tensor of an optimizer's state; one shaped like its parameter is cut as that is."""

    shape: Shape
    itemsize: int
    like_parameter: bool


@dataclass(frozen=True)
class Job:
    """What a device computes and keeps for one micro-batch of `rows` rows, by itself. Sizes in bytes."""

    widths: tuple[int, int]  # inputs (rows of the embedding table) and outputs of the model
    parameters: list[Parameter]
    units: list[Unit]  # of FSDP2, the root first
    gradients: list[int]  # in the order in which backward has them ready
    optimizer: list[StateTensor]
    buffers: int
    rows: int
    tokens: int  # of a row; 0 where the data has none
    batch: int
    activations: int  # kept from forward for backward, without the next two
    copies: int  # of weights, in the precision of the products: autocast's
    outputs: int  # tensors of the size of the model's outputs (logits), at the most: in forward, loss and backward
    flop: int  # of forward and backward, matrix products, what is computed a second time not counted twice
    uncounted: list[str]

    @property
    def elements(self) -> int:
        return sum(_numel(parameter.shape) for parameter in self.parameters)


class Parts(Ledger):  # type: ignore[no-untyped-call]
    """A ledger that tells apart copies of weights, and what the model's outputs become in the loss and its backward.

    Those are the tensors of as many elements that other operations than products make from the outputs: products with
    their gradient, of which one may happen to be as large, are the weights' and the features'.
    """

    def __init__(self, device: torch.device):
        super().__init__(device)
        self.weights = set[int]()
        self.copies: dict[int, int] = {}
        self.outputs: dict[int, int] = {}
        self.outputs_peak, self.elements = 0, 0

    def outputs_of(self, model: nn.Module) -> None:
        """Watch what `model` gives; in its place and not by a hook, which would keep a fused loss from being one."""
        forward = model.forward

        def marked(*inputs: Any) -> Any:
            given = forward(*inputs)
            output = given[0] if isinstance(given, tuple) else given
            self.elements = output.numel()
            self._mark(output)
            return given

        model.forward = marked

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = super().__torch_dispatch__(func, types, args, kwargs)
        if func is aten._to_copy.default and _key(args[0]) in self.weights:
            self.copies[_key(out)] = out.untyped_storage().nbytes()
        if func.overloadpacket not in PRODUCTS and any(_key(one) in self.outputs for one in args):
            for tensor in tree_leaves(out):
                if isinstance(tensor, Tensor) and tensor.numel() == self.elements:
                    self._mark(tensor)
        return out

    def _mark(self, tensor: Tensor) -> None:
        self.outputs[_key(tensor)] = tensor.untyped_storage().nbytes()
        self.outputs_peak = max(self.outputs_peak, sum(self.outputs.values()))

    def _drop(self, key: int) -> None:
        super()._drop(key)
        self.copies.pop(key, None)
        self.outputs.pop(key, None)


def job_of(config: Config, rows: int) -> Job:
    """The job's sizes, from a micro-batch of `rows` rows on tensors without storage.

    On the run's device if it is there, else on this one: GPUs keep the same activations but for what their kernels do
    differently. Raises UsageError for what does not fit together.
    """
    device, (inputs, outputs) = build_device(config.device), widths(config)
    with warnings.catch_warnings(), Shapes() as shapes, device:
        warnings.filterwarnings("ignore", message="Accessing the data pointer of FakeTensor")
        x, y = batch_like(config, rows, inputs, outputs)
        with Parts(device) as parts:
            model = build_model(config, inputs, outputs)
            freeze(model, config.freeze)
            objective, optimizers = build_objective(config), build_optimizers(config, model)
            parts.weights = {_key(parameter) for parameter in model.parameters()}
            parts.outputs_of(model)
            gradients = ready(model)
            x, y = shapes.from_tensor(x), shapes.from_tensor(y)
            before = parts.live
            with counting() as counter:
                with autocast(config.precision, device):
                    loss, _ = objective.loss(model, (x, y), None)
                kept, copies = parts.live - before, sum(parts.copies.values())
                activations = kept - copies - sum(parts.outputs.values())
                backward(loss, None)
            peak = parts.outputs_peak
            for optimizer in optimizers:
                Update(optimizer)()
        return Job(
            widths=(inputs, outputs),
            parameters=[
                Parameter(name, tuple(p.shape), p.element_size(), p.requires_grad)
                for name, p in model.named_parameters()
            ],
            units=units_of(model),
            gradients=gradients,
            optimizer=state_of(optimizers),
            buffers=nbytes(list(model.buffers())),
            rows=rows,
            tokens=y.numel() // rows if config.model != "mlp" else 0,
            batch=nbytes([x, y]),
            activations=activations,
            copies=copies,
            outputs=peak,
            flop=counter.get_total_flops(),
            uncounted=uncounted(parts.operations),
        )


def counting() -> flop_counter.FlopCounterMode:
    """Counts model FLOP: a fused attention's backward as four products, without the scores that it computes again."""
    once = {
        aten._scaled_dot_product_flash_attention_for_cpu_backward: lambda _, *qkv, **out: 2 * attention_flop(*qkv)
    }
    return flop_counter.FlopCounterMode(display=False, custom_mapping=FORMULAS | once)


def widths(config: Config) -> tuple[int, int]:
    """Rows of the embedding table (or features of a row), and outputs; the data is read where they are not given."""
    if config.model != "mlp" and config.vocab_size is not None:
        return config.vocab_size, config.vocab_size
    data = build_data(config)
    return data.inputs, data.outputs


def batch_like(config: Config, rows: int, inputs: int, outputs: int) -> tuple[Tensor, Tensor]:
    """Inputs and targets of the shapes that the job's own have."""
    if config.model == "mlp":
        labels = torch.zeros(rows, outputs) if config.criterion == "mse" else torch.zeros(rows, dtype=torch.int64)
        return torch.zeros(rows, inputs), labels
    windowed = config.model in WINDOWED
    ids = torch.zeros((rows, config.block_size) if windowed else (config.bptt, rows), dtype=torch.int64)
    return ids, ids.clone() if windowed else ids.flatten().clone()


def ready(model: nn.Module) -> list[int]:
    """A list to which the next backward adds the bytes of each gradient, when it is ready."""
    sizes: list[int] = []
    for parameter in model.parameters():
        if parameter.requires_grad:
            add = parameter.register_post_accumulate_grad_hook
            add(lambda one: sizes.append(one.numel() * one.element_size()))  # type: ignore[no-untyped-call]
    return sizes


def units_of(model: nn.Module) -> list[Unit]:
    """What FSDP2 gathers together: the root, then each block."""
    taken: set[int] = set()
    blocks = []
    for module in shard_units(model):
        own = [parameter for parameter in module.parameters() if id(parameter) not in taken]
        taken |= {id(parameter) for parameter in own}
        blocks.append(_unit(own, root=False))
    return [_unit([p for p in model.parameters() if id(p) not in taken], root=True), *blocks]


def _unit(parameters: Sequence[nn.Parameter], root: bool) -> Unit:
    trained = [tuple(p.shape) for p in parameters if p.requires_grad]
    return Unit([tuple(p.shape) for p in parameters], trained, root)


def state_of(optimizers: Sequence[torch.optim.Optimizer]) -> list[StateTensor]:
    """The tensors of the optimizers' states."""
    return [
        StateTensor(tuple(tensor.shape), tensor.element_size(), tensor.shape == parameter.shape)
        for optimizer in optimizers
        for parameter, state in optimizer.state.items()
        for tensor in tree_leaves(dict(state))
        if isinstance(tensor, Tensor)
    ]


def _key(tensor: Any) -> int:
    return int(tensor.untyped_storage()._cdata) if isinstance(tensor, Tensor) else 0


def _numel(shape: Shape) -> int:
    return shard_elements(shape, 1) if shape else 1


# --- one of N devices ---


@dataclass(frozen=True)
class Memory:
    """Bytes of a device, by part. Not all parts are at their largest at one moment: the sum is a bound."""

    parameters: int
    gradients: int
    optimizer_state: int
    activations: int
    weight_copies: int  # autocast's; FSDP2 gathers its parameters in that precision instead
    logits_and_loss: int
    communication: int
    buffers_and_batch: int

    @property
    def total(self) -> int:
        return sum(getattr(self, field.name) for field in fields(self))


@dataclass(frozen=True)
class Simulation:
    """A step of `world` devices, seen from the one that does most."""

    parallel: str
    world: int
    hardware: Hardware
    rows: int  # of the device, in a step
    micro_batches: int
    job: Job
    memory: Memory
    collectives: list[Collective]  # of a step
    flop: int  # of the device, in a step
    arithmetic_seconds: float  # at the peak
    wire_seconds: float  # at the full bandwidth, without latency
    step_seconds: float  # expected

    @property
    def at_most(self) -> float:
        """The utilisation if arithmetic ran at its peak and communication beside all of it."""
        return self.arithmetic_seconds / max(self.arithmetic_seconds, self.wire_seconds)

    @property
    def expected(self) -> float:
        """The utilisation if arithmetic attains what it does in published trainings, and what is not hidden waits."""
        return self.arithmetic_seconds / self.step_seconds


def simulate(config: Config, world: int, hardware: Hardware, job: Job | None = None) -> Simulation:
    """One step of `config` on `world` devices: memory, traffic and time of the busiest device.

    `parallel` "auto" is ddp, as under torchrun. job: what `job_of` said of as many rows, where that is known already.
    Raises UsageError for a batch with fewer rows than devices.
    """
    parallel = parallel_of(config)
    micro_batches, micro_rows = shares(config, world)
    job = job or job_of(config, micro_rows)
    flop = job.flop * micro_batches
    arithmetic = flop / hardware.flop_per_second[config.precision]
    phases = phases_of(job, parallel, world, micro_batches, gathered_bytes(config))
    collectives = [one for _, operations, _, times in phases for one in operations * times]
    each = arithmetic / hardware.attained / micro_batches  # seconds of a micro-batch
    waits = sum(
        times * exposed_seconds(seconds(operations, hardware, world), seconds(bare, hardware, world), each * part)
        for part, operations, bare, times in phases
    )
    return Simulation(
        parallel=parallel,
        world=world,
        hardware=hardware,
        rows=micro_batches * micro_rows,
        micro_batches=micro_batches,
        job=job,
        memory=memory_of(job, parallel, world, micro_batches, gathered_bytes(config)),
        collectives=collectives,
        flop=flop,
        arithmetic_seconds=arithmetic,
        wire_seconds=wire_seconds(collectives, hardware, world),
        step_seconds=arithmetic / hardware.attained + waits,
    )


def parallel_of(config: Config) -> str:
    """ddp or fsdp."""
    return "ddp" if config.parallel == "auto" else config.parallel


def gathered_bytes(config: Config) -> int:
    """Bytes of an element while FSDP2 gathers it."""
    return 4 if config.precision == "fp32" else 2


def shares(config: Config, world: int) -> tuple[int, int]:
    """Micro-batches of the busiest device in a step, and rows of one: windows, examples or columns."""
    if config.batch_size < world:
        raise UsageError(
            f"a batch of {config.batch_size:,} rows leaves {world - config.batch_size:,} of {world:,} devices "
            "without one: raise --batch-size, or lower --simulate-world"
        )
    if config.model in WINDOWED or config.model == "mlp":
        return share(config.batch_size, micro_batch_size(config), world)
    return config.accumulate, share(config.batch_size, config.batch_size, world)[1]


Phase = tuple[float, list[Collective], list[Collective], int]


def phases_of(job: Job, parallel: str, world: int, micro_batches: int, itemsize: int) -> list[Phase]:
    """What a step sends, phase by phase: the share of a micro-batch's arithmetic that runs beside it, its
    collectives, those of them that nothing can run beside, and how often the phase comes.

    Backward is beside a DDP's all-reduces but for the last bucket's, which is full when backward ends; forward beside
    FSDP2's all-gathers but for the first two units', backward beside its collectives but for the last reduce-scatter.
    """
    backward = 1 - FORWARD
    if parallel == "ddp":
        operations = ddp_collectives(job.gradients)
        return [(backward, operations, operations[-1:], 1)]
    forward = fsdp_forward(job.units, world, itemsize)
    gathers, last = (fsdp_backward(job.units, world, itemsize, reduced) for reduced in (None, REDUCED_BYTES))
    scatter_of_root = last[len(gathers) : len(gathers) + 1]
    return [
        (FORWARD, forward, forward[:2], micro_batches),
        (backward, gathers, gathers[:1], micro_batches - 1),
        (backward, last, scatter_of_root, 1),
    ]


def memory_of(job: Job, parallel: str, world: int, micro_batches: int, itemsize: int) -> Memory:
    """A device's memory by part; of FSDP2 rank 0's, whose shards are the largest.

    FSDP2 holds whole gradients, in float32, from one micro-batch to the next where a step has several: they are
    reduced once, with the last. Beside its shards there are, gathered: the root from forward to backward, the block
    in use and the one that is fetched; and of gradients on their way: the root's, and a block's with the copy that is
    reduced. DDP's buckets are as large as all gradients together: a bound, for here gradients are views of them.
    """
    fsdp = parallel == "fsdp"
    cut = world if fsdp else 1
    whole = sum(REDUCED_BYTES * _numel(p.shape) for p in job.parameters if p.trained)
    shards = sum(p.itemsize * shard_elements(p.shape, cut) for p in job.parameters if p.trained)
    if fsdp:
        root, *blocks = (sum(padded_elements(shape, world) for shape in unit.shapes) for unit in job.units)
        block = max(blocks, default=0)
        gathered = itemsize * (root + 2 * block)
        moving = max(itemsize * root + (itemsize + REDUCED_BYTES) * block, (itemsize + REDUCED_BYTES) * root)
    return Memory(
        parameters=sum(p.itemsize * shard_elements(p.shape, cut) for p in job.parameters),
        gradients=whole if fsdp and micro_batches > 1 else shards,
        optimizer_state=sum(
            state.itemsize * (shard_elements(state.shape, cut) if state.like_parameter else _numel(state.shape))
            for state in job.optimizer
        ),
        activations=job.activations,
        weight_copies=0 if fsdp else job.copies,
        logits_and_loss=job.outputs,
        communication=gathered + moving if fsdp else whole,
        buffers_and_batch=job.buffers + micro_batches * job.batch,
    )


def counted(config: Config, world: int, sizes: tuple[int, int]) -> list[Collective]:
    """The collectives of a step, as torch starts them in its fake process group; of at most two micro-batches.

    On tensors without storage, with one row: what is sent depends on the parameters alone. sizes: the `widths`.
    Raises RuntimeError where this torch cannot.
    """
    if world > MOST_COUNTED:
        raise RuntimeError(f"torch cuts each weight into {world:,} pieces for that")
    inputs, outputs = sizes
    micro_batches = min(2, shares(config, world)[0])

    def build() -> nn.Module:
        model = build_model(config, inputs, outputs)
        freeze(model, config.freeze)
        return model

    x, _ = batch_like(config, 1, inputs, outputs)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return count_collectives(build, x, parallel_of(config), config.precision, world, micro_batches)


# --- what is printed ---


def hardware_named(name: str, config: Config) -> Hardware:
    """A preset by name. Raises UsageError for another one."""
    if name == "cpu":
        device = torch.device("cpu")
        return machines_like_this(matmul_rate(device, config.precision), float(free(device) or 0))
    presets = {"h100": H100, "a100": A100}
    if name not in presets:
        raise UsageError(
            f"hardware = '{name}' is not one of {', '.join(HARDWARE)} (--hardware){suggestion(name, HARDWARE)}"
        )
    return presets[name]


def print_simulation(config: Config, world: int, hardware: str, console: Console | None = None) -> None:
    """Foresee one step of `world` devices, and print what came of it. Leaves nothing behind."""
    console = console or Console()
    found = simulate(config, world, hardware_named(hardware, config))
    for name, value in rows_of(found, config):
        console.print(f"{name:<32}{value}".rstrip(), markup=False, highlight=False, soft_wrap=True)


def rows_of(found: Simulation, config: Config) -> Rows:
    """All figures, by name."""
    return [*job_rows(found, config), *memory_rows(found), *wire_rows(found, config), *time_rows(found)]


def job_rows(found: Simulation, config: Config) -> Rows:
    """What is simulated."""
    job, world, count = found.job, found.world, nodes(found.hardware, found.world)
    tokens = f", {config.batch_size * job.tokens:,} tokens" if job.tokens else ""
    pieces = f"{found.micro_batches:,} micro-batch{'es' if found.micro_batches > 1 else ''} of {job.rows:,}"
    return [
        ("simulated", f"{world:,} devices on {count:,} node{'s' if count > 1 else ''}, {found.parallel}"),
        ("  each", found.hardware.about),
        ("parameters", f"{job.elements:,}"),
        ("a step", f"{config.batch_size:,} rows{tokens}"),
        ("  of the busiest device", f"{found.rows:,} rows: {pieces}"),
    ]


def memory_rows(found: Simulation) -> Rows:
    """Memory by part, and whether it fits."""
    memory, room = found.memory, found.hardware.memory_bytes
    fits = "" if memory.total <= room else ": does not fit"
    parts = [(f"  {field.name.replace('_', ' ')}", getattr(memory, field.name)) for field in fields(memory)]
    return [
        ("memory of a device, at most", f"{in_bytes(memory.total)} of {in_bytes(room)}{fits}"),
        *((name, in_bytes(size)) for name, size in parts if size),
    ]


def wire_rows(found: Simulation, config: Config) -> Rows:
    """Bytes that a device sends in a step, by kind, and whether torch starts the same collectives."""
    sent = sum(sent_bytes(one, found.world) for one in found.collectives)
    rows = [("sent by a device in a step", f"{in_bytes(sent)}, and as much received")]
    for kind in ("all-reduce", "all-gather", "reduce-scatter"):
        of_kind = [one for one in found.collectives if one.kind == kind]
        if of_kind:
            bytes_sent = in_bytes(sum(sent_bytes(one, found.world) for one in of_kind))
            rows.append((f"  {kind}", f"{bytes_sent}, in {len(of_kind):,} operations"))
    return [*rows, ("  as torch starts them", comparison(found, config))]


def comparison(found: Simulation, config: Config) -> str:
    """The arithmetic beside torch's own collectives in a fake world."""
    two = min(2, found.micro_batches)
    phases = phases_of(found.job, found.parallel, found.world, two, gathered_bytes(config))
    expected = [one for _, operations, _, times in phases for one in operations * times]
    try:
        seen = counted(config, found.world, found.job.widths)
    except FivestepError:
        raise
    except Exception as error:  # private parts of torch, and models that need values
        return f"not counted ({str(error).splitlines()[0][:80]})"
    ours, theirs = (in_bytes(sum(sent_bytes(one, found.world) for one in some)) for some in (expected, seen))
    how = "in a fake process group" + (", of two micro-batches" if found.micro_batches > 2 else "")
    if totals(expected) == totals(seen):
        return f"the same, byte for byte ({len(seen):,} operations {how})"
    return f"{theirs} in {len(seen):,} operations, not {ours} in {len(expected):,} ({how})"


def totals(collectives: Sequence[Collective]) -> dict[str, tuple[int, int]]:
    """Number and payload bytes by kind."""
    kinds = {one.kind for one in collectives}
    of = {kind: [one.payload_bytes for one in collectives if one.kind == kind] for kind in kinds}
    return {kind: (len(payloads), sum(payloads)) for kind, payloads in of.items()}


def time_rows(found: Simulation) -> Rows:
    """Arithmetic, seconds and utilisation."""
    left_out = f", without {', '.join(found.job.uncounted)}" if found.job.uncounted else ""
    attained = found.hardware.attained
    assumed = f"arithmetic at {attained:.0%} of its peak" if attained < 1 else "arithmetic at the rate measured here"
    rate = ""
    if found.job.tokens:
        rate = f", {found.rows * found.job.tokens / found.step_seconds:,.0f} tokens/s a device"
    return [
        ("arithmetic of a device", f"{in_units(found.flop)}FLOP a step, matrix products{left_out}"),
        ("seconds of a step", ""),
        ("  arithmetic, at the least", in_seconds(found.arithmetic_seconds)),
        ("  communication, at the least", in_seconds(found.wire_seconds)),
        ("  expected", f"{in_seconds(found.step_seconds)}{rate}: {assumed}, and what it cannot hide"),
        ("utilisation of the peak", f"at most {found.at_most:.1%}, expected {found.expected:.1%}"),
    ]


def in_seconds(time: float) -> str:
    """`0.01234` -> `12.3 ms`."""
    return f"{time * 1000:.3g} ms" if time < 1 else f"{time:.3g} s"
