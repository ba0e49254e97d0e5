"""Checks of how a job is made: who depends on whom, what the modes change, and whether it repeats and goes on.

Every comparison is of fresh copies under equal seeds, so that dropout draws the same masks.
"""

import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fivestep.data.generators import restore_random_state
from fivestep.errors import FivestepError, brief
from fivestep.learn.preflight_finding import Finding, failed, left_out, listed, number, ok, warning
from fivestep.learn.preflight_job import (
    Examined,
    apart,
    predicts_next,
    row_count,
    seed_all,
    shifted,
    take,
    tokens,
    updated,
    upright,
    with_inputs,
)
from fivestep.loop.arithmetic import counted, share_of, window_count
from fivestep.loop.language import NextToken
from fivestep.loop.lean import backward
from fivestep.loop.modes import enter_training
from fivestep.loop.state import State
from fivestep.loop.step import TrainStep
from fivestep.run.checkpoint import load_state, read_manifest, save_checkpoint

SAME = 1e-6  # of the largest output: below, two outputs differ by rounding only
ROUNDED = 1e-4  # the same of gradients, and of outputs that another kernel may have made


def examples_leak(job: Examined) -> Finding:
    """Whether an example's output depends on another example of its batch."""
    job.require_repeatable()
    batch = job.small[0]
    if row_count(job, batch) < 2:
        return left_out("a batch has one example")
    changed = with_inputs(job, batch, lambda x: other_first(job, x))
    moved = {
        training: apart(job.outputs(batch, training)[1:], job.outputs(changed, training)[1:])
        for training in (False, True)
    }
    figure = "the first example's inputs changed: the others' outputs move by "
    if moved[False] > SAME:
        remedy = "normalize and pool within an example: look for means, sums, reshapes over dimension 0"
        return failed(f"{figure}{number(moved[False])} of the largest", remedy)
    if moved[True] > SAME and normalizing(job.model):
        return ok(f"none in evaluation; in training batch norm joins them, as it does ({number(moved[True])})")
    if moved[True] > SAME:
        return failed(
            f"{figure}{number(moved[True])} in training", "look for what acts over the batch in training only"
        )
    return ok(f"{figure}nothing")


def other_first(job: Examined, x: Tensor) -> Tensor:
    """The inputs, those of the first example replaced: ids by another row's, numbers by others."""
    rows = upright(job, x).clone()
    if x.is_floating_point():
        rows[0] = 1.5 - 2 * rows[0]
    else:
        rows[0] = rows[1].flip(0) if not torch.equal(rows[0], rows[1].flip(0)) else rows[0].roll(1, 0)
    return upright(job, rows).contiguous()


def causality(job: Examined) -> Finding:
    """Whether no output depends on a later token: later ids are changed, earlier outputs must stay."""
    batch = take(job, job.batches[0], 0, 4)
    if not predicts_next(job):
        return left_out("its targets are not its inputs' next tokens")
    job.require_repeatable()
    found = tokens(job, batch)
    assert found is not None
    time = found[0].shape[1]
    outputs, moved = job.outputs(batch), 0.0
    for cut in sorted({1, time // 2, time - 1} - {0}):
        later = with_inputs(job, batch, partial(other_later, job, cut))
        moved = max(moved, apart(outputs[:, :cut], job.outputs(later)[:, :cut]))
    figure = f"later tokens changed: outputs before them move by {number(moved) if moved > SAME else 'nothing'}"
    if moved > SAME:
        return failed(figure, "mask attention to later positions; no mean, norm or reverse layer over time")
    return ok(figure)


def other_later(job: Examined, cut: int, x: Tensor) -> Tensor:
    """The ids with others, of the same batch, from `cut` on."""
    rows = upright(job, x).clone()
    known = torch.unique(rows)
    place = torch.searchsorted(known, rows[:, cut:].contiguous())
    rows[:, cut:] = known[(place + 1 + torch.arange(place.shape[1], device=x.device) % 2) % len(known)]
    return upright(job, rows).contiguous()


def next_tokens(job: Examined) -> Finding:
    """Whether targets are the inputs, shifted by one."""
    found = tokens(job, job.batches[0])
    if found is None:
        return left_out("its batches are no ids with a target for each")
    shares = {by: shifted(*found, by) for by in (1, 0, 2, -1)}
    best = max(shares, key=lambda by: shares[by])
    figure = f"{100 * shares[1]:.4g} % of the targets are the next input"
    if shares[1] > 0.99:
        return ok(figure)
    if shares[best] > 0.9 and best != 1:
        where = {0: "the input itself", 2: "the input after the next", -1: "the input before"}[best]
        return failed(
            f"{100 * shares[best]:.4g} % of the targets are {where}",
            "y = ids[i + 1 : i + 1 + n] for x = ids[i : i + n]",
        )
    if isinstance(job.objective, NextToken):  # a language model by its objective
        return failed(figure, "y = ids[i + 1 : i + 1 + n] for x = ids[i : i + n]")
    return left_out(f"{figure}: it labels tokens, or predicts something else")


def modes(job: Examined) -> Finding:
    """Whether train() and eval() differ where a module says so, and nowhere else."""
    job.require_repeatable()
    batch = job.small[0]
    evaluated = job.outputs(batch)
    if (drawn := apart(evaluated, job.outputs(batch, seed=1))) > SAME:
        remedy = "it draws in eval() too: F.dropout(x, p, training=self.training)"
        return failed(f"two evaluations under other seeds differ by {number(drawn)} of the largest output", remedy)
    acting = acting_modules(job.model)
    trained = job.outputs(batch, training=True)
    differ = apart(evaluated, trained)
    if not acting:
        if differ > ROUNDED:
            remedy = "nothing here is dropout or a batch norm: look where the model reads self.training"
            return failed(f"train() and eval() differ by {number(differ)} of the largest output", remedy)
        return ok("train() and eval() agree: no dropout, no batch norm")
    if differ <= SAME:
        return warning(
            f"{listed(acting)}, and train() and eval() agree", "is the layer used, and not kept in eval()?"
        )
    return ok(f"train() and eval() differ, as {listed(acting)} should make them")


def acting_modules(model: nn.Module) -> list[str]:
    """The modules that mean something else in training, by name; those kept in eval() do not."""
    dropping = (nn.modules.dropout._DropoutNd, nn.RNNBase, nn.MultiheadAttention)
    names = []
    for name, module in model.named_modules():
        kept = model.training and not module.training
        rate = getattr(module, "p", 0) if isinstance(module, dropping[0]) else getattr(module, "dropout", 0)
        drops = (
            (isinstance(module, dropping) or "dropout" in vars(module)) and isinstance(rate, float | int) and rate > 0
        )
        if (drops or isinstance(module, nn.modules.batchnorm._NormBase)) and not kept:
            names.append(name or type(module).__name__)
    return names


def normalizing(model: nn.Module) -> bool:
    """Whether a batch norm joins the examples of a batch in training."""
    return any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in model.modules())


def halves(job: Examined) -> Finding:
    """Whether two accumulated halves give the gradient of the whole batch, weighted by the objective's counts."""
    job.require_repeatable()
    batch = job.batches[0]
    size = row_count(job, batch)
    if size < 2:
        return left_out("a batch has one example")
    parts = [take(job, batch, 0, size // 2), take(job, batch, size // 2, size)]
    whole = job.outputs(batch)
    if apart(whole, torch.cat([job.outputs(part) for part in parts])) > ROUNDED:
        return left_out("its outputs depend on the other examples of a batch, or on chance in evaluation")
    one, other = gradient(job, [batch]), gradient(job, parts)
    differ = float((one - other).norm() / one.norm().clamp_min(1e-30))
    figure = f"gradients differ by {number(differ)} of their norm"
    rounded = max(torch.finfo(parameter.dtype).eps for parameter in job.copy().parameters)
    if differ > max(1e-3, 8 * rounded):
        remedy = "the criterion must be a mean over rows; else give an objective with count(): what the mean is over"
        return failed(figure, remedy)
    return ok(figure)


def gradient(job: Examined, window: list[Any]) -> Tensor:
    """The flattened gradient of an accumulation window in evaluation: without dropout, hidden state or autocast."""
    own = job.copy()
    own.model.eval()
    seed_all(0)
    window, counts = counted(own.objective, window)
    count = window_count(counts)
    with torch.backends.cudnn.flags(enabled=False):
        for batch, part in zip(window, counts, strict=True):
            mean = own.objective.loss(own.model, batch, None)[0]
            backward(mean, share_of(part, count, mean))
    return torch.cat([parameter.grad.flatten() for parameter in own.parameters if parameter.grad is not None])


def repeats(job: Examined) -> Finding:
    """Whether two trainings of a few steps from equal weights and seeds agree, bit for bit."""
    steps = 3
    job.afford(2 * steps)
    one, other = trained(job, steps), trained(job, steps)
    weights = one.model.state_dict()
    differing = [name for name, value in other.model.state_dict().items() if not bitwise(value, weights[name])]
    if differing or not job.repeatable:
        where = listed(differing) if differing else "outputs under equal seeds"
        remedy = "seed what the model draws from, or torch.use_deterministic_algorithms(True)"
        return failed(f"after {steps} steps from equal seeds these differ: {where}", remedy)
    return ok(f"{steps} steps, twice: all weights equal, bit for bit")


def trained(job: Examined, steps: int) -> TrainStep:
    """A copy after so many steps of its own optimizers."""
    own = job.copy()
    enter_training(own.model, set())
    seed_all(0)
    for step in range(steps):
        updated(own, job.batches[step % len(job.batches)])
    return own


def bitwise(one: Any, other: Any) -> bool:
    """Whether two values of a state are the same, NaN with NaN."""
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return one.shape == other.shape and bool(((one == other) | ((one != one) & (other != other))).all())
    return bool(one == other)


def saves(job: Examined) -> Finding:
    """Whether a checkpoint on the disk, loaded into a fresh copy, makes the same next step."""
    job.require_repeatable()
    job.afford(5)
    batch = job.batches[-1]
    step, fresh = job.copy(), job.copy()
    enter_training(step.model, set())
    enter_training(fresh.model, set())
    for batch_ in (job.batches * 2)[:2]:
        step(batch_)
    try:
        saved, size = through_the_disk(step.state)
    except FivestepError as error:
        return failed(brief(error), "what cannot be saved cannot be gone on with")
    fresh.state.load_state_dict(saved)
    after = [float(fresh(batch).loss)]
    restore_random_state(saved["random"])
    after.append(float(step(batch).loss))
    weights = step.model.state_dict()
    differing = [name for name, value in fresh.model.state_dict().items() if not bitwise(value, weights[name])]
    if differing or after[0] != after[1]:
        figure = f"the next step's loss is {after[1]!r}, and after loading {after[0]!r}"
        remedy = "something outside of the state changes with the steps: make it a buffer (register_buffer)"
        return failed(figure, remedy)
    return ok(f"{size / 1e6:,.3g} MB; weights and next step equal, bit for bit")


def through_the_disk(state: State) -> tuple[dict[str, Any], int]:
    """A state saved and loaded, and the bytes that it took there."""
    with tempfile.TemporaryDirectory("-fivestep-doctor") as folder:
        taken = state.state_dict()
        path = save_checkpoint(Path(folder), taken["model"], taken, state.clock.step, None)
        return load_state(read_manifest(path)), sum(file.stat().st_size for file in path.iterdir())
