"""Checks of whether a job learns: its first loss, its inputs, one batch by heart, gradients, the learning rate.

Each trains copies for some dozen steps. Owns the thresholds, which stand beside their use.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fivestep.learn.preflight_finding import Finding, failed, left_out, listed, number, ok, share, warning
from fivestep.learn.preflight_job import (
    PATIENCE,
    Examined,
    NotApplicableError,
    learn,
    plain_adam,
    scored,
    take,
    tokens,
    updated,
)
from fivestep.loop.evaluate import Passes
from fivestep.loop.modes import enter_training
from fivestep.loop.schedule import set_rate
from fivestep.loop.step import TrainStep
from fivestep.watch.table import counted

FACTORS = (0.01, 0.1, 1.0, 10.0, 100.0, 1000.0)  # of the job's learning rate
LEAST, TRIAL = 3, 8  # steps at each of them
BY_HEART, RATHER = 0.25, 0.5  # of the first loss: what is left of it where a batch was learned by heart


def initial_loss(job: Examined) -> Finding:
    """The loss before training, beside that of an answer that is the same for all: ln V, or the targets' variance."""
    loss = scored(job, job.copy(), job.batches)
    same, words, classes = same_for_all(job)
    figure = f"{number(loss)}; {words} is {number(same)}"
    if not math.isfinite(loss):
        return failed(figure, "the first loss is no number: look at the inputs, and at logarithms and divisions")
    most = 1.5 * same + 1 if classes else 10 * same
    if loss > most:
        return failed(figure, remedy_of_scale(classes))
    if loss > (1.15 * same + 0.1 if classes else 3 * same):
        return warning(figure, remedy_of_scale(classes))
    if classes and loss < 0.5 * same:
        return warning(figure, "it knows the answers: right for a pretrained model; else a target is in the inputs")
    return ok(figure)


def remedy_of_scale(classes: bool) -> str:
    """What to do about a first loss that is too large."""
    if classes:
        return "the first outputs are too sure: make the last layer's initial weights and bias smaller"
    return "standardize the targets, or set the last layer's bias to their mean"


def same_for_all(job: Examined) -> tuple[float, str, bool]:
    """The loss of one answer for all, what it is, and whether it is a choice among classes."""
    batch, objective, own = job.batches[0], job.objective, job.copy()
    if not hasattr(objective, "forward") or not hasattr(objective, "compare"):
        raise NotApplicableError("the objective is the job's own: what an answer for all would lose is not known")
    if hasattr(objective, "in_evaluation"):
        objective = objective.in_evaluation()
    with torch.no_grad():
        outputs, targets, _ = Passes()(objective.forward, own.model.eval(), batch, None)
    if not (isinstance(outputs, Tensor) and isinstance(targets, Tensor)):
        raise NotApplicableError("outputs and targets are no two tensors")
    if isinstance(getattr(objective, "criterion", None), nn.NLLLoss):
        return math.log(outputs.shape[1]), f"ln {outputs.shape[1]:,}", True
    if targets.is_floating_point() and targets.shape == outputs.shape and not between(targets):
        constant = targets.mean(0, keepdim=True).expand_as(targets)
        variance = isinstance(getattr(objective, "criterion", None), nn.MSELoss)
        return (
            float(objective.compare(constant, targets)),
            "the targets' variance" if variance else "their mean's",
            False,
        )
    same = float(objective.compare(torch.zeros_like(outputs), targets))
    classes = round(math.exp(min(same, 30)))  # as cross-entropy has it, whatever the outputs' shape
    if classes > 1 and abs(same - math.log(classes)) < 1e-4 * same:
        return same, f"ln {classes:,}", True
    return same, "that of equal outputs", True


def between(targets: Tensor) -> bool:
    """Whether the targets are zeros and ones, as of a choice between two."""
    return bool(((targets == 0) | (targets == 1)).all())


def inputs_alone(job: Examined) -> Finding:
    """Whether the inputs help: a copy that sees zeros instead must do worse, on other rows than it learned from.

    (Karpathy 2019, "A recipe for training neural networks": the input-independent baseline.) Of tokens the batches
    learned are scored: some dozen steps are too few for a language.
    """
    language = tokens(job, job.batches[0]) is not None
    learned = job.small[:2] if language else job.batches[:8]
    others = learned if language else job.batches[8:] or job.val_batches
    if not others:
        return left_out("there are too few batches to keep some aside, and no validation data")
    own, losses = learn(job, learned, 60, job.quick_rate, patience=PATIENCE / 2)
    steps = len(losses)
    if steps < 10:
        return left_out(f"{steps} steps took {PATIENCE / 2:.0f} s, too few to tell")
    seeing = scored(job, own, others)
    blind = scored(job, learn(job, learned, steps, job.quick_rate, torch.zeros_like)[0], others, torch.zeros_like)
    where = "by heart" if language else "on other rows"
    figure = f"loss {number(seeing)} {where} after {steps} steps; with zeros as inputs {number(blind)}"
    if seeing < 0.98 * blind:
        return ok(figure)
    remedy = "the inputs do not help: do inputs and targets belong to the same rows? does the model use its inputs?"
    return warning(figure, remedy) if few_of_each(job, learned) else failed(figure, remedy)


def few_of_each(job: Examined, data: list[Any]) -> bool:
    """Whether there are fewer than five rows a class, too few to tell."""
    targets = [job.pair(batch)[1] for batch in data]
    if not all(isinstance(one, Tensor) and not one.is_floating_point() for one in targets):
        return False
    together = torch.cat([one.flatten() for one in targets])
    return len(together) < 5 * len(torch.unique(together))


def one_batch(job: Examined) -> Finding:
    """Whether a small batch can be learned by heart: a model that cannot do that cannot learn."""
    steps, batch = 150, take(job, job.small[0], 0, 8)
    first = scored(job, job.copy(), [batch])
    _, losses = learn(job, [batch], steps, job.quick_rate, enough=0.1 * first, patience=PATIENCE)
    figure = f"loss {number(first)} to {number(min(losses))} in {len(losses)} steps of at most 8 rows"
    if min(losses) <= BY_HEART * first:
        return ok(figure)
    if len(losses) < steps:
        return left_out(f"{figure}, and no more were made in {PATIENCE:.0f} s")
    remedy = "look for a bottleneck, a detached part, outputs that are clamped, or equal inputs with unequal targets"
    return (warning if min(losses) <= RATHER * first else failed)(figure, remedy)


def gradients(job: Examined) -> Finding:
    """Whether every parameter that trains gets a finite gradient that is not zero, in one of the first steps.

    Several: behind weights that begin as zeros there is none in the first.
    """
    own, steps = job.copy(), 4
    enter_training(own.model, set())
    held = {id(parameter) for parameter in own.parameters}
    trained = {name: p for name, p in own.model.named_parameters() if p.requires_grad}
    silent, broken = dict(trained), set()
    adam, precision = plain_adam(list(trained.values()), 1e-3), job.options.get("precision", "fp32")
    five = TrainStep(own.model, own.criterion, adam, precision=precision, on_nonfinite="skip")
    for batch in (job.batches * steps)[:steps]:
        updated(five, batch)
        for name, parameter in trained.items():
            if parameter.grad is not None:
                broken |= set() if parameter.grad.isfinite().all() else {name}
                if name in silent and parameter.grad.any():
                    del silent[name]
        if not silent:
            break
    left = [name for name, parameter in trained.items() if id(parameter) not in held]
    return judged_gradients(len(trained), sorted(broken), list(silent), left)


def judged_gradients(trained: int, broken: list[str], silent: list[str], left: list[str]) -> Finding:
    """The worst of what was found."""
    if broken:
        return failed(
            f"not finite: {listed(broken)}", "lower the learning rate; look for logarithms, roots, divisions"
        )
    if silent:
        return failed(
            f"no gradient, or zeros: {listed(silent)}", "use them in forward, take them out, or requires_grad_(False)"
        )
    if left:
        return warning(f"in no optimizer: {listed(left)}", "give them to the optimizer, or requires_grad_(False)")
    return ok(f"finite, and not all zeros: {counted(trained, 'parameter tensor')}")


# --- the learning rate ---


@dataclass(frozen=True)
class Trial:
    """A short training at one learning rate: the loss before and after it, infinite where it was lost."""

    rate: float
    before: float
    after: float

    @property
    def gain(self) -> float:
        return self.before - self.after


def try_rate(job: Examined, factor: float, steps: int, judge: list[Any] | None = None) -> Trial:
    """Train a copy from the job's own weights with its own optimizers, at `factor` times their rates.

    The rate rises in a straight line over the steps, as a warm-up would have it.
    """
    own, judge = job.copy(), judge or job.batches[:2]
    groups = [group for optimizer in own.optimizers for group in optimizer.param_groups]
    full = [float(group["lr"]) * factor for group in groups]
    before = scored(job, own, judge)
    enter_training(own.model, set())
    for step in range(steps):
        for group, rate in zip(groups, full, strict=True):
            set_rate(group, rate * (step + 1) / steps)
        if not math.isfinite(updated(own, job.batches[step % len(job.batches)])):
            return Trial(full[0], before, math.inf)
    after = scored(job, own, judge)
    return Trial(full[0], before, after if math.isfinite(after) else math.inf)


def learning_rate(job: Examined) -> Finding:
    """The job's learning rate among others, each tried for a few steps from the same weights (Smith 2017)."""
    job.afford(len(FACTORS) * LEAST)
    steps = min(TRIAL, int(PATIENCE / len(FACTORS) / job.step_seconds))
    trials = [try_rate(job, factor, steps) for factor in FACTORS]
    own, best = trials[FACTORS.index(1.0)], max(trials, key=lambda trial: trial.gain)
    lower = f"{number(own.rate)} takes the loss from {number(own.before)} to {number(own.after)} in {steps} steps"
    figure = f"{lower}; {number(best.rate)} to {number(best.after)}"
    search = "fivestep doctor --find-lr tries more rates"
    if not own.after <= 1.5 * own.before:
        return failed(figure, f"lower the learning rate: at this one the loss grows; {search}")
    if best.gain <= 0:
        return warning(figure, f"none of the rates lowers the loss in so few steps; {search}")
    if own.gain <= 0 and best.rate < own.rate:
        return warning(figure, f"a high rate: the loss grows at first, so give a warm-up, or a lower one; {search}")
    if own.gain < 1e-4 * best.gain and best.rate > own.rate:
        return failed(figure, f"raise the learning rate: at this one almost nothing is learned; {search}")
    if own.gain < 0.05 * best.gain and best.rate > own.rate:
        return warning(figure, f"a slow rate, right only for a long run ({planned(job)}); {search}")
    if own.gain < 0.5 * best.gain or own.after > 2 * best.after:
        faster = f"a rate of {number(best.rate)} learns more in these steps, which is not to say in the whole run"
        return ok(figure, f"{faster}; {search}")
    return ok(figure)


def planned(job: Examined) -> str:
    """The run's length, for a sentence."""
    return "its length is not known" if job.steps is None else f"{job.steps:,} steps are planned"


def schedule(job: Examined) -> Finding:
    """The schedule's course over the planned steps: it must reach its peak, and end where the run does."""
    if job.scheduler is None or job.steps is None:
        why = "the learning rate is constant" if job.scheduler is None else "the run's length is not known"
        return left_out(why if job.config is not None or job.scheduler else "the job names no schedule")
    n, factor = job.steps, job.scheduler
    inside, beyond = sampled(factor, 0, n), sampled(factor, n, 10 * n)
    peak, last = max(inside), factor(n - 1)
    at = inside.index(peak) / len(inside)
    idle = sum(value <= max(last, 1e-3) * 1.001 for value in inside[int(at * len(inside)) :]) / len(inside)
    figure = f"{n:,} steps: the peak after {share(at)} of them, {number(last)} of the full rate in the last"
    if peak < 0.95 * max(beyond) or at > 0.5:
        text = f"{figure}; the run ends inside the warm-up" if peak < 0.95 * max(beyond) else figure
        kind = failed if peak < 0.95 * max(beyond) else warning
        return kind(text, "shorten the warm-up (--warmup-iters), or train for longer")
    if last < 0.2 * peak and idle > 0.25:
        return failed(f"{figure}; the decay ends {share(idle)} of the run before", "plan the decay for the whole run")
    if last > 0.5 * peak and min(beyond) < 0.2 * peak:
        return failed(f"{figure}; the decay ends after it", "plan the decay for the length that is trained")
    return ok(figure)


def sampled(factor: Callable[[int], float], first: int, last: int, most: int = 2000) -> list[float]:
    """A schedule's values at up to so many evenly spaced steps of first .. last - 1."""
    every = max(1, (last - first) // most)
    return [factor(step) for step in range(first, max(last, first + 1), every)]
