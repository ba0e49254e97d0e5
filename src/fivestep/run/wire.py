"""The arithmetic of one step on N devices: what each of them holds, sends and waits for.

    shapes, N  ->  shards, the collectives of a step, bytes on the wire, seconds

Pure functions of sizes: no torch, no model, no device. Units are in the names; a "device" is one process with one
GPU (or one CPU), "the world" all N of them. Owns the formulas and the figures of known hardware; what is held against
them is `fake_world.py`'s (torch's own collectives, counted), what is printed `simulate.py`'s.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

Shape = tuple[int, ...]
Kind = Literal["all-reduce", "all-gather", "reduce-scatter"]
FIRST_BUCKET_BYTES, BUCKET_BYTES = 1 << 20, 25 << 20  # torch's DistributedDataParallel, where no size is asked for


@dataclass(frozen=True)
class Hardware:
    """Devices, the nodes that hold them, and what joins them. All rates are peaks, one way, as the maker states them.

    attained: the share of the peak that the arithmetic of decoders attains in published trainings, communication
    hidden: an assumption, for the figure that is called expected.
    """

    name: str
    about: str
    flop_per_second: dict[str, float]  # by precision, of dense products
    memory_bytes: float  # of a device
    devices_a_node: int
    within_bytes_per_second: float  # from a device into its node
    between_bytes_per_second: float  # from a node to the others, all its adapters together
    within_hop_seconds: float  # from one device of a ring to the next, before any byte counts
    between_hop_seconds: float
    attained: float


# Peaks: NVIDIA's data sheets (H100 SXM5 80 GB; A100 SXM4 80 GB), without sparsity; float32 as torch multiplies by
# default, without TF32. Nodes: DGX H100 (eight adapters of 400 Gb/s) and DGX A100 (eight of 200 Gb/s). Hops: NCCL's
# own model of rings under its "simple" protocol (src/graph/tuning.cc), 3.4 us by NVLink, 14 us by a network.
# Attained: the lower ends of torchtitan's published trainings with FSDP2: 33 to 39 % on 8 and 128 H100 (Llama 3.1
# 8B, 2024-12), 57 to 61 % on 64 A100 (Llama 3 8B, Llama 2 13B).
H100 = Hardware(
    name="h100",
    about="H100 SXM: 8 a node by NVLink, 450 GB/s each way; nodes by InfiniBand, 400 Gb/s for each device",
    flop_per_second={"bf16": 989e12, "fp16": 989e12, "fp32": 67e12},
    memory_bytes=80e9,
    devices_a_node=8,
    within_bytes_per_second=450e9,
    between_bytes_per_second=8 * 50e9,
    within_hop_seconds=3.4e-6,
    between_hop_seconds=14e-6,
    attained=0.33,
)
A100 = Hardware(
    name="a100",
    about="A100 SXM 80 GB: 8 a node by NVLink, 300 GB/s each way; nodes by InfiniBand, 200 Gb/s for each device",
    flop_per_second={"bf16": 312e12, "fp16": 312e12, "fp32": 19.5e12},
    memory_bytes=80e9,
    devices_a_node=8,
    within_bytes_per_second=300e9,
    between_bytes_per_second=8 * 25e9,
    within_hop_seconds=3.4e-6,
    between_hop_seconds=14e-6,
    attained=0.57,
)


def machines_like_this(flop_per_second: float, memory_bytes: float) -> Hardware:
    """N machines with this CPU, each a process, by Ethernet of 10 Gb/s.

    flop_per_second is measured here, so all of it is taken as attained; 50 us is a usual TCP hop in one building.
    """
    return Hardware(
        name="cpu",
        about="machines with this CPU, one process each; by Ethernet, 10 Gb/s",
        flop_per_second={"fp32": flop_per_second, "bf16": flop_per_second},
        memory_bytes=memory_bytes,
        devices_a_node=1,
        within_bytes_per_second=1.25e9,
        between_bytes_per_second=1.25e9,
        within_hop_seconds=50e-6,
        between_hop_seconds=50e-6,
        attained=1.0,
    )


# --- the share of a device ---


def share(rows: int, micro_rows: int, world: int) -> tuple[int, int]:
    """Of a batch of `rows`, computed `micro_rows` at a time: micro-batches of the busiest device, and rows of the
    largest of them.

    ceil(rows / world) rows are its own, cut into as few micro-batches of at most `micro_rows` as there can be:
    `share(480, 12, 8)` is (5, 12), `share(480, 12, 64)` is (1, 8).
    """
    own = -(-rows // world)
    micro_batches = -(-own // micro_rows)
    return micro_batches, -(-own // micro_batches)


def shard_elements(shape: Shape, world: int) -> int:
    """Elements of rank 0's shard: FSDP2 cuts the first dimension into pieces of ceil(size / world) rows.

    No other rank has more; the last ones have fewer, or none: `shard_elements((768,), 1024)` is 1.
    """
    return math.ceil(shape[0] / world) * math.prod(shape[1:])


def padded_elements(shape: Shape, world: int) -> int:
    """Elements that an all-gather of the shards moves: `world` equal shards, the last ones padded."""
    return world * shard_elements(shape, world)


# --- the collectives of a step ---


@dataclass(frozen=True)
class Collective:
    """One collective operation over the whole world.

    payload_bytes: of what is reduced (all-reduce), of the whole that each device has in the end (all-gather), of the
    whole that each one had before (reduce-scatter).
    """

    kind: Kind
    payload_bytes: int


@dataclass(frozen=True)
class Unit:
    """Parameters that FSDP2 gathers together: those of a block, or of the root, which is all that is in no block."""

    shapes: list[Shape]
    trained: list[Shape]  # of these
    root: bool


def ddp_buckets(gradient_bytes: Sequence[int]) -> list[int]:
    """Bytes of the all-reduces of DistributedDataParallel, in their order.

    gradient_bytes: of each parameter that trains, in the order in which backward has them ready, last layer first. A
    bucket is closed by the gradient that fills it: the first at 1 MiB, the others at 25 MiB.
    """
    buckets: list[int] = []
    filled = 0
    for size in gradient_bytes:
        filled += size
        if filled >= (BUCKET_BYTES if buckets else FIRST_BUCKET_BYTES):
            buckets.append(filled)
            filled = 0
    return buckets + ([filled] if filled else [])


def ddp_collectives(gradient_bytes: Sequence[int]) -> list[Collective]:
    """Of a whole step: one all-reduce a bucket, after the window's last backward."""
    return [Collective("all-reduce", size) for size in ddp_buckets(gradient_bytes)]


def fsdp_forward(units: Iterable[Unit], world: int, itemsize: int) -> list[Collective]:
    """All-gathers of one forward pass: each unit's parameters, in `itemsize` bytes each, before they are used."""
    payloads = [itemsize * sum(padded_elements(shape, world) for shape in unit.shapes) for unit in units]
    return [Collective("all-gather", payload) for payload in payloads]


def fsdp_backward(units: Sequence[Unit], world: int, itemsize: int, reduced: int | None) -> list[Collective]:
    """Collectives of one backward pass: the blocks are gathered once more (the root is kept), and each unit's
    gradients reduced and scattered, in `reduced` bytes each; None where that waits for the window's last backward."""
    gathers = fsdp_forward([unit for unit in units if not unit.root], world, itemsize)
    if reduced is None:
        return gathers
    payloads = [reduced * sum(padded_elements(shape, world) for shape in unit.trained) for unit in units]
    return gathers + [Collective("reduce-scatter", payload) for payload in payloads if payload]


# --- bytes and seconds ---


def rounds(kind: Kind) -> int:
    """How often each byte goes around the ring: an all-reduce is a reduce-scatter and an all-gather."""
    return 2 if kind == "all-reduce" else 1


def sent_bytes(collective: Collective, world: int) -> float:
    """Bytes that each device sends, and as many it receives, in a ring.

    payload * (N - 1) / N, twice for an all-reduce: the least that any algorithm needs without arithmetic in the
    network (Patarasuk and Yuan 2009, "Bandwidth optimal all-reduce algorithms for clusters of workstations").
    """
    return rounds(collective.kind) * collective.payload_bytes * (world - 1) / world


def nodes(hardware: Hardware, world: int) -> int:
    """Nodes that hold `world` devices."""
    return -(-world // hardware.devices_a_node)


def ring_bytes_per_second(hardware: Hardware, world: int) -> float:
    """Of a ring through all devices, as many rings at once as a node has adapters: a ring enters each node once and
    leaves it once, so that all adapters of a node together carry what one device passes on."""
    within, between = hardware.within_bytes_per_second, hardware.between_bytes_per_second
    return within if nodes(hardware, world) == 1 else min(within, between)


def latency_seconds(collective: Collective, hardware: Hardware, world: int) -> float:
    """What a collective takes before any byte counts, as NCCL models it (src/graph/tuning.cc).

    A ring has N - 1 hops a round, one in each node but one between nodes; an all-reduce may take a tree instead, up
    and down: the devices of a node in a row, the nodes in log2(nodes) hops.
    """
    count, within, between = nodes(hardware, world), hardware.within_hop_seconds, hardware.between_hop_seconds
    ring = rounds(collective.kind) * ((world - count) * within + (count - 1) * between)
    if collective.kind != "all-reduce":
        return ring
    tree = 2 * ((min(world, hardware.devices_a_node) - 1) * within + math.log2(count) * between)
    return min(ring, tree)


def wire_seconds(collectives: Iterable[Collective], hardware: Hardware, world: int) -> float:
    """Bytes over bandwidth: the least, with no latency at all."""
    return sum(sent_bytes(one, world) for one in collectives) / ring_bytes_per_second(hardware, world)


def seconds(collectives: Sequence[Collective], hardware: Hardware, world: int) -> float:
    """Of collectives one after the other: bytes over bandwidth, and each one's latency."""
    waits = sum(latency_seconds(one, hardware, world) for one in collectives)
    return wire_seconds(collectives, hardware, world) + waits


def exposed_seconds(total: float, never_hidden: float, behind: float) -> float:
    """Communication that arithmetic waits for: what does not fit `behind` it, and at least the part that cannot."""
    return max(never_hidden, total - behind)
