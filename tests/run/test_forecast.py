"""The dry run: figures against hand arithmetic and against what real steps use, and no trace left."""

import json
import os
import subprocess
import sys

import pytest
import torch
from torch import nn

from fivestep.run import build, memory
from fivestep.run.build import build_data, build_job
from fivestep.run.config import load_config
from fivestep.run.dry_run import in_bytes, in_time, in_units, memory_text, time_rows, too_large
from fivestep.run.forecast import Measured, Plan, forecast, matmul_rate, plan
from tests.run.cli import fivestep  # noqa: F401

CPU = torch.device("cpu")
FRESH = """
import json, sys
import torch
from fivestep.run.build import build_data
from fivestep.run.config import load_config
from fivestep.run.forecast import forecast, measure
config = load_config(sys.argv[1], json.loads(sys.argv[2]))
data, device = build_data(config), torch.device("cpu")
facts = forecast(config, data, device)
print(json.dumps([facts.parameters, facts.peak[0], measure(config, data, device).peak]))
"""


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("the quick brown fox jumps over the lazy dog, and so on and on and on.\n" * 100)
    return str(path)


def facts_of(recipe, **flags):
    config = load_config(recipe, flags)
    data = build_data(config)
    return forecast(config, data, CPU), build_job(config, data)


@pytest.mark.parametrize("recipe", ["gpt-chars", "rnn-words", "transformer-words", "bigram"])
def test_sizes_are_those_of_the_real_objects(recipe, text):
    facts, job = facts_of(recipe, data=[text], optimizer="adamw", learning_rate=1e-3, batch_size=4)
    elements = sum(parameter.numel() for parameter in job.model.parameters())
    assert facts.parameters == facts.trainable == elements
    assert facts.gradients == 4 * elements
    assert facts.optimizer_state == 2 * 4 * elements + 4 * len(list(job.model.parameters()))  # a count of steps each
    buffers = sum(buffer.nbytes for buffer in job.model.buffers())
    assert facts.weights == 4 * elements + buffers
    assert facts.peak[0] >= facts.weights + facts.gradients + facts.optimizer_state
    assert facts.uncounted == []


@pytest.mark.parametrize("recipe", ["gpt-chars", "transformer-words"])
def test_activations_are_the_tensors_that_autograd_really_saves(recipe, text):
    facts, job = facts_of(recipe, data=[text], dropout=0.1)
    ours = {parameter.untyped_storage().data_ptr() for parameter in job.model.parameters()}
    ours |= {buffer.untyped_storage().data_ptr() for buffer in job.model.buffers()}
    batch = next(iter(job.data.train.epoch(0)))
    ours |= {tensor.untyped_storage().data_ptr() for tensor in batch}
    saved = {}

    def keep(tensor):
        saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        mean, _ = job.objective.loss(job.model, batch, None)
    kept = sum(storage.nbytes() for place, storage in saved.items() if place not in ours)
    assert mean.requires_grad
    assert facts.activations == pytest.approx(kept, rel=0.01)


def test_flop_of_a_perceptron_are_its_products():
    facts, job = facts_of("regression")
    first, *others = [layer for layer in job.model.modules() if isinstance(layer, nn.Linear)]
    # Forward, the weights' gradients, and the inputs' gradients, which the first layer need not give.
    assert facts.flop == 2 * 2 * first.weight.numel() + sum(3 * 2 * layer.weight.numel() for layer in others)


def test_accumulation_holds_gradients_beside_activations(text):
    cut, _ = facts_of("gpt-chars", data=[text], optimizer="sgd", batch_size=8, accumulate=2)
    one, _ = facts_of("gpt-chars", data=[text], optimizer="sgd", batch_size=4)
    assert cut.activations == one.activations
    assert cut.batch == 2 * one.batch
    assert cut.peak[0] > one.peak[0] + 0.5 * one.gradients
    assert cut.optimizer_state == 0


def test_averaged_weights_count_too(text):
    plain, _ = facts_of("bigram", data=[text])
    averaged, _ = facts_of("bigram", data=[text], ema=0.99)
    assert (plain.average, averaged.average) == (0, plain.gradients)
    assert averaged.peak[0] == plain.peak[0] + averaged.average
    assert averaged.evaluation_peak == plain.evaluation_peak + 2 * averaged.average  # its own weights wait as well


def test_bf16_keeps_less(text):
    wide, _ = facts_of("gpt-chars", data=[text], batch_size=64)
    narrow, _ = facts_of("gpt-chars", data=[text], batch_size=64, precision="bf16")
    assert narrow.activations < 0.9 * wide.activations
    assert narrow.weights == wide.weights


def test_the_plan_counts_in_any_unit(text):
    config = load_config(
        "gpt-chars", {"data": [text], "batch_size": 4, "block_size": 16, "epochs": 3, "eval_every": "500"}
    )
    data = build_data(config)
    length = plan(config, data)
    seen = sum(yb.numel() for _, yb in data.train.epoch(0))
    assert (length.unit, length.per_epoch, length.steps_per_epoch) == ("tokens", seen, len(data.train))
    assert (length.steps, length.evaluations) == (3 * len(data.train), 1)  # every 500 steps, and at the end

    def of(step_seconds=None, **flags):
        flags = {"data": [text], "batch_size": 4, "block_size": 16, "schedule": "constant", **flags}
        length = plan(load_config("gpt-chars", flags), data, step_seconds)
        return length.steps, length.evaluations

    assert of(max_iters=100, eval_every="30") == (100, 4)
    assert of(max_iters=len(data.train), eval_every="1ep") == (len(data.train), 1)
    assert of(until=f"{2 * seen}tok", eval_every="1ep") == (2 * len(data.train), 2)
    assert of(until="1min", eval_every="20s") == (None, None)
    assert of(0.5, until="1min", eval_every="20s") == (120, 3)
    assert of(max_iters=100, eval_every="20s") == (100, None)


def test_drawn_lengths_are_counted(text):
    config = load_config("rnn-words", {"data": [text], "variable_bptt": True, "batch_size": 2, "epochs": 1})
    data = build_data(config)
    assert plan(config, data).per_epoch == sum(target.numel() for _, target in data.train.epoch(0))


def test_rows_have_a_plan_too():
    config = load_config("digits", {"epochs": 2}) if _has_sklearn() else load_config("regression", {"epochs": 2})
    length = plan(config, build_data(config))
    assert length.unit == "samples"
    assert length.steps == 2 * length.steps_per_epoch


def _has_sklearn():
    import importlib.util

    return importlib.util.find_spec("sklearn") is not None


def test_what_is_too_large_is_not_tried(text):
    facts, _ = facts_of("gpt-chars", data=[text])
    length = Plan("tokens", 10**6, 100, 1000, 10)
    assert too_large(facts, length, 1e12, 2 * facts.peak[0]) is None
    assert too_large(facts, length, 1e12, None) is None
    assert "are free" in too_large(facts, length, 1e12, facts.peak[0] - 1)
    assert "1 min 1 s" in too_large(facts, length, facts.flop * 10**4 / 61, None)


def test_time_is_for_training_and_validation_apart():
    rows = dict(time_rows(Plan("tokens", 1000, 10, 7200, 3), Measured(1.0, 0.5, 0.1, None), 100, None))
    assert rows["  training"] == "1 h 0 min"
    assert rows["  validation"].startswith("30 s (3 × 100")
    assert rows["  each of the others"] == "0.5 s, 200 tokens/s"
    assert rows["  memory used at most"] == "not told by this system"


def test_units():
    assert [in_units(n) for n in (0, 640, 999, 1000, 747e6, 2.3e9)] == [
        "0 ", "640 ", "999 ", "1.00 k", "747 M", "2.30 G",
    ]  # fmt: skip
    assert in_bytes(497_759_232) == "498 MB"
    assert in_bytes(999_600) == "1.00 MB"
    assert [in_time(s) for s in (0.05, 30, 61, 3600, 93784)] == [
        "0.05 s",
        "30 s",
        "1 min 1 s",
        "1 h 0 min",
        "1 d 2 h",
    ]
    assert "allocator" in memory_text(120, 100) and "kept" in memory_text(50, 100)
    assert memory_text(104, 100) == "104 B (forecast: 100 B)"
    assert matmul_rate(CPU, "fp32", 64) > 1e6


@pytest.mark.skipif(memory.held(CPU) is None, reason="only Linux tells a process what it holds")
def test_the_peak_is_what_was_held_at_once():
    # In a process of its own: what other tests left here may be let go, or used again, while we look.
    script = """
import torch
from fivestep.run import memory
cpu = torch.device("cpu")
torch.ones(10)
before = memory.held(cpu)
forgotten = memory.forget_peak(cpu)
blocks = [torch.ones(50_000_000, dtype=torch.uint8) for _ in range(2)]
del blocks
print(int(forgotten), memory.peak_held(cpu) - before, memory.held(cpu) - before)
"""
    told = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=300)
    forgotten, peak, kept = map(int, told.stdout.split())
    if not forgotten:
        pytest.skip("this system does not let a process forget its peak")
    assert peak == pytest.approx(1e8, rel=0.1) and kept < 2e7
    assert memory.free(CPU) > 0


def test_a_dry_run_leaves_nothing(fivestep, text, tmp_path):  # noqa: F811
    before = sorted(tmp_path.rglob("*"))
    outcome = fivestep("train", "gpt-chars", "--data", text, "--dry-run", "--n-layer", "1", "--max-iters", "50")
    assert (outcome.code, outcome.err) == (0, "")
    assert sorted(tmp_path.rglob("*")) == before
    for part in ("parameters", "token_embedding_table", "optimizer state", "by the rule 6N", "50 steps", "tokens/s"):
        assert part in outcome.out
    assert "forecast: " in outcome.out or "not told" in outcome.out


def test_a_model_that_needs_values_is_said_to_be_unknown(fivestep, text, monkeypatch):  # noqa: F811
    class Picky(nn.Embedding):
        def forward(self, ids):
            assert len(torch.nonzero(ids >= 0)) == ids.numel()  # its shape depends on values
            return super().forward(ids)

    monkeypatch.setattr(build, "build_model", lambda config, inputs, outputs: Picky(inputs, outputs))
    outcome = fivestep("train", "bigram", "--data", text, "--dry-run")
    assert outcome.code == 0
    assert "not known for this model" in outcome.out
    assert "tokens/s" in outcome.out


def test_bad_input_gets_its_sentence(fivestep, text):  # noqa: F811
    outcome = fivestep("train", "gpt2-124m", "--data", text, "--dry-run", "--block-size", "2048")
    assert outcome.code == 2
    assert "--max-len" in outcome.err


def test_gpt2_has_its_parameters_and_is_not_tried_where_it_takes_too_long(fivestep, text, monkeypatch):  # noqa: F811
    monkeypatch.setattr("fivestep.run.dry_run.matmul_rate", lambda *_: 1e9)
    outcome = fivestep(
        "train", "gpt2-124m", "--data", text, "--tokenizer", "bytes", "--val-fraction", "0.5", "--dry-run"
    )
    assert (outcome.code, outcome.err) == (0, "")
    assert "124,439,808" in outcome.out
    assert "not tried" in outcome.out and "--block-size 64" in outcome.out


def in_a_fresh_process(recipe, **flags):
    """Parameters, forecast and measured peak; where the C library is glibc, it is asked to return what is freed."""
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "131072", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", FRESH, recipe, json.dumps(flags)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=True)
    return json.loads(done.stdout)


@pytest.mark.skipif(memory.held(CPU) is None, reason="only Linux tells a process what it holds")
def test_the_forecast_is_what_steps_use(text):
    _, foreseen, used = in_a_fresh_process("gpt-chars", data=[text], n_embd=256)
    assert used == pytest.approx(foreseen, rel=0.1)


@pytest.mark.slow
@pytest.mark.skipif((memory.free(CPU) or 0) < 6e9, reason="needs 6 GB of free memory on Linux")
def test_the_forecast_of_gpt2_is_what_a_step_uses(text):
    parameters, foreseen, used = in_a_fresh_process(
        "gpt2-124m",
        data=[text],
        tokenizer="bytes",
        max_vocabulary=None,
        batch_size=1,
        accumulate=1,
        block_size=64,
        eval_batch_size=1,
        precision="fp32",
    )
    assert parameters == 124_439_808
    assert used == pytest.approx(foreseen, rel=0.1)
