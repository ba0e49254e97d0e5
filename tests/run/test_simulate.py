"""A step on N devices, foreseen: the arithmetic beside torch's own collectives and shards, as printed."""

import time
from itertools import pairwise

import pytest
import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

from fivestep.errors import UsageError
from fivestep.loop.precision import autocast
from fivestep.run import fake_world, memory, simulate, wire
from fivestep.run.build import build_data, build_model, build_objective, build_optimizers
from fivestep.run.config import load_config
from fivestep.run.forecast import forecast
from fivestep.run.ledger import Shapes
from tests.run.cli import fivestep  # noqa: F401  (a fixture)

TINY = {"data": ["python-manual"], "vocab_size": 53, "n_embd": 24, "n_layer": 2, "n_head": 2, "block_size": 16}
SEVEN_BILLION = """
recipe = "gpt2-124m"
vocab_size = 32000
block_size = 4096
max_len = 4096
n_layer = 32
n_head = 32
n_embd = 4096
tied = false
batch_size = 1024
accumulate = 1024
"""


def tiny(model="gpt2", **flags):
    return load_config("gpt2-124m" if model == "gpt2" else "gpt-chars", {**TINY, "max_len": None, **flags})


# --- the arithmetic ---


def ring(kind, world, elements):
    """A ring in plain Python, on `world` lists of distinct numbers: what each device holds in the end is checked;
    the elements that each one sends."""
    piece = elements // world
    held = [[float(10**3 * rank + i) for i in range(elements)] for rank in range(world)]
    wanted = [sum(column) for column in zip(*held, strict=True)]
    sent = [0] * world

    def turn(step, offset, add):
        moving = []
        for rank in range(world):
            at = (rank - step + offset) % world * piece
            moving.append((rank, at, held[rank][at : at + piece]))
            sent[rank] += piece
        for rank, at, values in moving:
            to = held[(rank + 1) % world]
            to[at : at + piece] = [a + b for a, b in zip(to[at : at + piece], values, strict=True)] if add else values

    if kind in ("all-reduce", "reduce-scatter"):
        for step in range(world - 1):
            turn(step, 0, add=True)
    if kind == "all-gather":  # device r begins with piece r of what all are to hold
        held[:] = [[wanted[i] if i // piece == rank else 0.0 for i in range(elements)] for rank in range(world)]
    if kind != "reduce-scatter":
        for step in range(world - 1):
            turn(step, 1 if kind == "all-reduce" else 0, add=False)
        assert all(one == wanted for one in held)
    else:
        assert all(
            held[rank][((rank + 1) % world) * piece] == wanted[((rank + 1) % world) * piece] for rank in range(world)
        )
    return sent


@pytest.mark.parametrize("kind", ["all-reduce", "all-gather", "reduce-scatter"])
@pytest.mark.parametrize("world", [2, 3, 8])
def test_bytes_sent_are_those_of_a_ring(kind, world):
    elements = 12 * world
    sent = ring(kind, world, elements)
    assert set(sent) == {wire.sent_bytes(wire.Collective(kind, elements), world)}


def test_buckets_are_those_of_torch():
    sizes = [3, 400_000, 200, 7_000_000, 1, 6_553_600, 9, 30_000_000, 5, 5]
    tensors = [torch.empty(size, device="meta") for size in sizes]
    limits = [dist._DEFAULT_FIRST_BUCKET_BYTES, wire.BUCKET_BYTES]
    assignment, _ = dist._compute_bucket_assignment_by_size(tensors, limits)
    assert wire.ddp_buckets([4 * size for size in sizes]) == [
        sum(4 * sizes[i] for i in indices) for indices in assignment
    ]


def test_shards_are_of_the_first_dimension():
    assert wire.shard_elements((768,), 8) == 96
    assert wire.shard_elements((50_257, 768), 8) == 6283 * 768  # 6,282.1 rows, rounded up
    assert wire.padded_elements((50_257, 768), 8) == 50_264 * 768
    assert wire.shard_elements((768, 3), 1024) == 3
    assert wire.padded_elements((768, 3), 1024) == 1024 * 3  # a quarter of the devices has none of it


def test_the_batch_is_shared_out():
    assert wire.share(480, 12, 1) == (40, 12)
    assert wire.share(480, 12, 8) == (5, 12)
    assert wire.share(480, 12, 64) == (1, 8)
    assert wire.share(100, 40, 2) == (2, 25)  # not 40 and 10


def test_latency_is_that_of_the_shorter_way():
    ours = wire.H100
    gather, reduce = wire.Collective("all-gather", 1), wire.Collective("all-reduce", 1)
    assert wire.latency_seconds(gather, ours, 8) == pytest.approx(7 * 3.4e-6)
    assert wire.latency_seconds(gather, ours, 1024) == pytest.approx(896 * 3.4e-6 + 127 * 14e-6)
    assert wire.latency_seconds(reduce, ours, 1024) == pytest.approx(2 * (7 * 3.4e-6 + 7 * 14e-6))  # a tree
    assert wire.latency_seconds(reduce, ours, 8) == pytest.approx(2 * 7 * 3.4e-6)


def test_bandwidth_is_that_of_the_narrowest_place():
    assert wire.ring_bytes_per_second(wire.H100, 8) == 450e9
    assert wire.ring_bytes_per_second(wire.H100, 16) == 400e9
    assert wire.ring_bytes_per_second(wire.A100, 16) == 200e9
    assert wire.wire_seconds([wire.Collective("all-reduce", 16 * 10**9)], wire.H100, 16) == pytest.approx(0.075)


def test_what_cannot_be_hidden_waits():
    assert wire.exposed_seconds(10, 1, 4) == 6
    assert wire.exposed_seconds(10, 1, 40) == 1


# --- beside torch ---


@pytest.mark.parametrize("world", [8])
@pytest.mark.parametrize(
    ("model", "flags"),
    [
        ("gpt2", {"parallel": "ddp", "accumulate": 1}),
        ("gpt2", {"parallel": "ddp", "accumulate": 2, "n_embd": 256}),  # several buckets
        ("gpt2", {"parallel": "ddp", "accumulate": 1, "n_embd": 512, "vocab_size": 30_000, "block_size": 1024}),
        ("gpt2", {"parallel": "fsdp", "accumulate": 1}),
        ("gpt2", {"parallel": "fsdp", "accumulate": 2, "tied": False}),
        ("gpt2", {"parallel": "fsdp", "accumulate": 2, "precision": "fp32"}),
        ("gpt", {"parallel": "fsdp", "accumulate": 2, "freeze": ["blocks.0.*"]}),
        ("gpt", {"parallel": "ddp", "accumulate": 2, "freeze": ["blocks.0.*"]}),
    ],
)
def test_collectives_are_those_that_torch_starts(model, flags, world):
    config = tiny(model, batch_size=2 * 1024, **flags)
    config_micro = wire.share(2048, 2048 // config.accumulate, world)[0]
    found = simulate.simulate(config, world, wire.H100)
    assert found.micro_batches == config_micro
    phases = simulate.phases_of(
        found.job, config.parallel, world, min(2, config_micro), simulate.gathered_bytes(config)
    )
    expected = [one for _, operations, _, times in phases for one in operations * times]
    seen = simulate.counted(config, world, found.job.widths)
    assert simulate.totals(seen) == simulate.totals(expected)
    assert not dist.is_initialized()


@pytest.mark.parametrize("world", [2, 5])
def test_shards_and_their_state_are_those_that_torch_makes(world):
    config = tiny(parallel="fsdp", batch_size=64, accumulate=1)
    found = simulate.simulate(config, world, wire.H100)
    model = build_model(config, 53, 53)
    ids = torch.zeros((1, 16), dtype=torch.int64)
    with fake_world.fake_world(world):  # real weights: the CPU is a device of FSDP2's
        model = fake_world.parallelised(model, "fsdp", config.precision, world)
        optimizers = build_optimizers(config, model)
        model(ids).sum().backward()
        for optimizer in optimizers:
            optimizer.step()
        local = [parameter.to_local() for parameter in model.parameters()]
        gradients = [parameter.grad.to_local() for parameter in model.parameters()]
        states = [value for one in optimizers for state in one.state.values() for value in state.values()]
        states = [value.to_local() if isinstance(value, DTensor) else value for value in states]
    assert found.memory.parameters == sum(tensor.nbytes for tensor in local)
    assert found.memory.gradients == sum(tensor.nbytes for tensor in gradients)
    assert found.memory.optimizer_state == sum(tensor.nbytes for tensor in states)


def test_a_thousand_devices_are_counted_too():
    config = tiny(parallel="fsdp", batch_size=1024, accumulate=1, n_layer=1)
    found = simulate.simulate(config, 1024, wire.H100)
    assert simulate.totals(simulate.counted(config, 1024, found.job.widths)) == simulate.totals(found.collectives)


@pytest.mark.parametrize("micro_batches", [2])
def test_memory_bounds_what_torchs_tracker_finds(micro_batches):
    """torch's own account of FSDP2's memory, by another way: of a second step, in a fake world."""
    tools = pytest.importorskip("torch.distributed._tools.fsdp2_mem_tracker", reason="a private part of torch")
    config = tiny(
        parallel="fsdp", batch_size=32 * micro_batches, accumulate=8 * micro_batches, block_size=64, n_embd=96
    )
    found = simulate.simulate(config, 8, wire.H100)
    with fake_world.fake_world(8):
        with torch.device("meta"):
            model = fake_world.parallelised(build_model(config, 53, 53), "fsdp", "bf16", 8)
        with Shapes(allow_non_fake_inputs=True):
            model.to_empty(device="cpu")
            (optimizer,), objective = build_optimizers(config, model), build_objective(config)
            batch = torch.zeros(4, 64, dtype=torch.int64), torch.zeros(4, 64, dtype=torch.int64)
            tracker = tools.FSDPMemTracker(model, optimizer)
            tracker.track_inputs(batch)
            with tracker:
                for _ in range(2):
                    for at in range(micro_batches):
                        model.set_requires_gradient_sync(at == micro_batches - 1)
                        with autocast("bf16", torch.device("cpu")):
                            loss = objective.loss(model, batch, None)[0]
                        loss.backward()
                        tracker.reset_mod_stats()
                    optimizer.step()
                    optimizer.zero_grad()
            (peak,) = tracker.get_tracker_snapshot("peak").values()
    assert found.micro_batches == micro_batches
    assert 0.75 * found.memory.total < peak["Total"] <= found.memory.total


# --- the job ---


@pytest.mark.parametrize("flags", [{"precision": "fp32"}, {"n_layer": 5, "accumulate": 4}])
def test_a_devices_parts_are_the_forecasts(flags):
    """What the dry run finds for a whole run on one device, part by part, and its fullest moment below their sum."""
    config = tiny(
        batch_size=16, eval_batch_size=2, **{"accumulate": 1, "tokenizer": "bytes", "vocab_size": 300, **flags}
    )
    facts = forecast(config, build_data(config), torch.device("cpu"))
    job = simulate.job_of(config, 16 // config.accumulate)
    memory = simulate.memory_of(job, "ddp", 1, config.accumulate, 2)
    assert memory.parameters + job.buffers == facts.weights
    assert memory.gradients == facts.gradients
    assert memory.optimizer_state == facts.optimizer_state
    assert job.elements == facts.parameters
    kept = job.activations + job.copies
    assert kept <= facts.activations <= kept + job.outputs
    assert 0.7 * memory.total < facts.peak[0] < memory.total - memory.communication


def test_flop_are_those_of_the_formula():
    """Per token 6 for each weight of a matrix (a look-up has no product), and 12 n_layer n_embd block_size."""
    config = tiny(batch_size=8, accumulate=1, block_size=1024, n_embd=32)
    job = simulate.job_of(config, 8)
    weights = 2 * 12 * 32**2 + 53 * 32
    assert job.flop == 8 * 1024 * (6 * weights + 12 * 2 * 32 * 1024)
    assert job.uncounted == []


def test_logits_are_told_from_weights_of_their_size():
    """A vocabulary of as many words as there are targets makes logits as large as the tables."""
    config = tiny(batch_size=4, accumulate=1, block_size=16, n_embd=64, vocab_size=50, tied=False)
    job = simulate.job_of(config, 4)  # 64 targets, 64 wide
    assert job.outputs == 64 * 50 * (2 + 2 + 4 + 4)
    other = simulate.job_of(config, 8)
    assert other.outputs == 2 * job.outputs
    assert other.activations == pytest.approx(2 * job.activations, rel=0.02)


def test_segments_and_rows_are_shared_out_too():
    words = load_config(
        "rnn-words", {"data": ["x"], "vocab_size": 100, "batch_size": 20, "accumulate": 3, "epochs": 1}
    )
    found = simulate.simulate(words, 8, wire.H100)
    assert (found.micro_batches, found.job.rows, found.rows) == (3, 3, 9)
    rows = load_config("regression", {"batch_size": 8})
    assert simulate.simulate(rows, 4, wire.H100).job.rows == 2


def test_seven_billion_parameters_need_no_room(tmp_path):
    (tmp_path / "7b.toml").write_text(SEVEN_BILLION)
    before, began = memory.held(torch.device("cpu")), time.process_time()
    config = load_config(str(tmp_path / "7b.toml"), {"parallel": "fsdp"})
    found = simulate.simulate(config, 64, wire.H100)
    assert found.job.elements == 32 * (12 * 4096**2 + 13 * 4096) + (2 * 32_000 + 4096 + 2) * 4096
    assert 6.7e9 < found.job.elements < 6.8e9
    assert found.memory.parameters == pytest.approx(4 * found.job.elements / 64, rel=0.001)
    assert time.process_time() - began < 20
    if before is not None:
        assert memory.held(torch.device("cpu")) - before < 5e8
    # Sharded it fits, and whole it does not.
    assert found.memory.total < 80e9
    config = load_config(str(tmp_path / "7b.toml"), {"parallel": "ddp"})
    assert simulate.simulate(config, 64, wire.H100, found.job).memory.total > 80e9


def test_more_devices_do_less_each():
    config = tiny(batch_size=64, accumulate=8, parallel="fsdp")
    found = [simulate.simulate(config, world, wire.H100) for world in (2, 4, 8, 64)]
    for fewer, more in pairwise(found):
        assert more.flop < fewer.flop
        assert more.memory.parameters < fewer.memory.parameters
    for one in found:
        assert 0 < one.expected < one.at_most <= 1
        assert one.step_seconds >= one.arithmetic_seconds / wire.H100.attained


# --- as printed ---


def test_the_command_prints_all_parts_and_leaves_nothing(fivestep, tmp_path):  # noqa: F811
    shape = ("--vocab-size", 53, "--n-embd", 24, "--n-layer", 2, "--n-head", 2, "--block-size", 16)
    shape += ("--max-len", 16, "--batch-size", 32, "--accumulate", 2)
    outcome = fivestep("train", "gpt2-124m", *shape, "--dry-run", "--simulate-world", 16, "--parallel", "fsdp")
    assert (outcome.code, outcome.err) == (0, "")
    assert list(tmp_path.iterdir()) == []
    for part in ("16 devices on 2 nodes, fsdp", "optimizer state", "logits and loss", "communication", "all-gather"):
        assert part in outcome.out
    assert "the same, byte for byte" in outcome.out
    outcome = fivestep("train", "gpt2-124m", *shape, "--dry-run", "--simulate-world", 16, "--hardware", "cpu")
    assert outcome.code == 0
    assert "16 devices on 16 nodes, ddp" in outcome.out and "all-reduce" in outcome.out


def test_what_torch_cannot_count_is_said(fivestep, monkeypatch):  # noqa: F811
    def broken(*arguments):
        raise RuntimeError("no such thing\nhere")

    monkeypatch.setattr(simulate, "count_collectives", broken)
    shape = ("--vocab-size", 53, "--n-embd", 24, "--n-layer", 2, "--n-head", 2, "--batch-size", 32, "--accumulate", 2)
    outcome = fivestep("train", "gpt2-124m", *shape, "--dry-run", "--simulate-world", 2)
    assert outcome.code == 0
    assert "not counted (no such thing)" in outcome.out


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("--simulate-world", 8), "add --dry-run"),
        (("--dry-run", "--hardware", "h100"), "--simulate-world N"),
        (("--dry-run", "--simulate-world", 8, "--hardware", "h200"), "did you mean 'h100'?"),
        (("--dry-run", "--simulate-world", 1), "--simulate-world"),
        (("--dry-run", "--simulate-world", 1024), "544 of 1,024 devices"),
        (("--dry-run", "--simulate-world", 8, "--parallel", "fdsp"), "did you mean 'fsdp'?"),
    ],
)
def test_bad_input_gets_its_sentence(fivestep, arguments, sentence):  # noqa: F811
    outcome = fivestep("train", "gpt2-124m", *arguments)
    assert outcome.code == 2
    assert sentence in outcome.err


def test_a_real_process_group_is_left_alone():
    with fake_world.fake_world(3):
        assert dist.get_world_size() == 3
        with pytest.raises(UsageError, match="without torchrun"), fake_world.fake_world(2):
            pass
    assert not dist.is_initialized()
