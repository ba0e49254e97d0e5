"""What a run will need, before it is started: parameters, memory, arithmetic, time.

    the run's own TrainStep on tensors without storage   -> every allocation, every matrix product   (`forecast`)
    three real steps and one evaluation batch of the run -> seconds, memory in use                   (`measure`)

Owns the dry run: its figures and how they are shown. Makes no directory and keeps nothing. The forecast follows the
allocations of the very step that will run, so no formula for a model is in it, and it needs no memory of their size.
"""

import math
import warnings
from dataclasses import dataclass
from itertools import islice
from time import perf_counter

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from fivestep.data.stream import batches
from fivestep.errors import FivestepError
from fivestep.loop.batch import to_device
from fivestep.loop.clock import Limit, parse_amount
from fivestep.loop.evaluate import evaluate
from fivestep.loop.precision import autocast
from fivestep.loop.step import TrainStep
from fivestep.loop.train import train
from fivestep.run.build import Data, build_data, build_device, build_job, build_objective, step_options
from fivestep.run.config import Config
from fivestep.run.environment import processor
from fivestep.run.ledger import Ledger, Shapes, count_flops, nbytes, uncounted
from fivestep.run.memory import forget_peak, free, held, peak_held
from fivestep.watch.screen import Console

PATIENCE = 60.0  # seconds that a real step of a dry run may take
STEPS = 3  # real ones; the first warms up

Rows = list[tuple[str, str]]  # a name and its figures


@dataclass(frozen=True)
class Forecast:
    """What a step needs: elements, bytes, and FLOP of forward and backward together."""

    parts: dict[str, int]  # parameters by top-level part, shared ones with the first that has them
    trainable: int
    weights: int  # buffers included
    gradients: int
    optimizer_state: int
    activations: int  # that one micro-batch keeps from forward for backward
    batch: int  # of at most two micro-batches, where they live on the run's device
    largest: tuple[int, str]  # the largest tensor that a step makes, and the operation that makes it
    peak: tuple[int, str]  # the most that is held at once, from the second step on
    evaluation_peak: int
    saved: int  # of the weights in a checkpoint
    flop: float  # of a token, or of a sample where the data has no tokens
    uncounted: list[str]  # operations with products in them that `flop` leaves out

    @property
    def parameters(self) -> int:
        return sum(self.parts.values())


@dataclass(frozen=True)
class Plan:
    """How long the run is."""

    unit: str  # "tokens" or "samples"
    per_epoch: int  # of these
    steps_per_epoch: int
    steps: int | None  # None where it is not known beforehand
    evaluations: int | None

    @property
    def per_step(self) -> float:
        """Tokens or samples of a step, on average."""
        return self.per_epoch / self.steps_per_epoch


@dataclass(frozen=True)
class Measured:
    """What three real steps took."""

    warmup_seconds: float
    step_seconds: float
    evaluation_seconds: float  # of one batch
    peak: int | None  # bytes, beside what the process held before; None where the system does not tell


def forecast(config: Config, data: Data, device: torch.device) -> Forecast:
    """Two steps and one evaluation batch of the run, on tensors without storage.

    Of accumulated micro-batches two are taken: the second one finds the gradients of the first, as all later ones do.
    """
    with warnings.catch_warnings(), Shapes() as shapes, Ledger(device) as ledger:
        warnings.filterwarnings("ignore", message="Accessing the data pointer of FakeTensor")
        with device:
            job = build_job(config, data)
        for group in [group for optimizer in job.optimizers for group in optimizer.param_groups]:
            if device.type == "cuda" and group.get("foreach", False) is None:
                group["foreach"] = True  # torch's own choice there, which it does not make for these tensors
        model, objective, weights = job.model, job.objective, ledger.live
        window = [
            tree_map_only(Tensor, shapes.from_tensor, batch)
            for batch in islice(batches(data.train, 0), min(2, config.accumulate))
        ]
        ledger.add(window)
        before = ledger.live
        with autocast(config.precision, device):
            kept = objective.loss(model, to_device(window[0], device), None)
        activations = ledger.live - before
        del kept
        step = TrainStep(model, objective, job.optimizers, **step_options(config, job))
        with count_flops() as counter:
            step(*window)
        ledger.rewind()
        step(*window)  # as every later one: beside the optimizer's state
        peak, largest = ledger.peak, ledger.largest
        ledger.rewind()
        with torch.no_grad(), autocast(config.precision, device):
            val_batch = tree_map_only(Tensor, shapes.from_tensor, next(iter(batches(data.val, 0))))
            objective.loss(model.eval(), to_device(val_batch, device), None)
        samples, tokens = (sum(sizes) for sizes in zip(*map(objective.size, window), strict=True))
        return Forecast(
            parts=by_part(model),
            trainable=sum(p.numel() for p in model.parameters() if p.requires_grad),
            weights=weights,
            gradients=nbytes([p.grad for p in model.parameters()]),
            optimizer_state=nbytes([dict(optimizer.state) for optimizer in step.optimizers]),
            activations=activations,
            batch=before - weights,
            largest=largest,
            peak=peak,
            evaluation_peak=ledger.peak[0],
            saved=nbytes(model.state_dict()),
            flop=counter.get_total_flops() / (tokens or samples),
            uncounted=uncounted(ledger.operations),
        )


def by_part(model: nn.Module) -> dict[str, int]:
    """Parameters by top-level part of the model; what two parts share counts where it comes first."""
    parts: dict[str, int] = {}
    for name, parameter in model.named_parameters():
        part = name.partition(".")[0]
        parts[part] = parts.get(part, 0) + parameter.numel()
    return parts


def plan(config: Config, data: Data, step_seconds: float | None = None) -> Plan:
    """The run's length; limits and intervals given as time need the `step_seconds` of a measured step."""
    objective, count = build_objective(config), len(data.train)
    sizes = [objective.size(next(iter(batches(data.train, 0, at)))) for at in (0, count - 1)]
    samples, tokens = ((count - 1) * first + last for first, last in zip(*sizes, strict=True))
    steps_per_epoch = -(-count // config.accumulate)
    per_step = {
        "step": 1.0,
        "epoch": 1 / steps_per_epoch,
        "samples": samples / steps_per_epoch,
        "tokens": tokens / steps_per_epoch,
        "seconds": step_seconds or 0.0,
    }
    ends = [
        end / per_step[unit]
        for unit, end in Limit(config.epochs, config.max_iters, config.until).ends
        if per_step[unit]
    ]
    steps = math.ceil(round(min(ends), 6)) if ends else None
    unit, every = parse_amount(config.eval_every, "eval_every (--eval-every)")
    evaluations = None
    if steps is not None and per_step[unit]:
        evaluations = math.ceil(round(steps * per_step[unit] / every, 6))  # the run's end is validated as well
    return Plan("tokens" if tokens else "samples", tokens or samples, steps_per_epoch, steps, evaluations)


def measure(config: Config, data: Data, device: torch.device) -> Measured:
    """Three steps of the run, with its own model, stream, optimizer and precision, and one evaluation batch."""
    before = held(device)
    job = build_job(config, data)
    steps = train(
        job.model,
        data.train,
        job.objective,
        job.optimizers,
        accumulate=config.accumulate,
        **step_options(config, job),
    )
    seconds, told = [], False
    for number in range(STEPS):
        if number == 1:
            told = forget_peak(device)
        start = perf_counter()
        float(next(steps).loss)  # HOST READ: the step is over
        seconds.append(perf_counter() - start)
    peak = peak_held(device) if told else None
    batch = next(iter(batches(data.val, 0)))
    start = perf_counter()
    evaluate(job.model, [batch], job.objective, metrics=job.metrics, precision=config.precision)
    evaluation_seconds = perf_counter() - start
    used = None if before is None or peak is None else peak - before
    return Measured(seconds[0], sum(seconds[1:]) / (STEPS - 1), evaluation_seconds, used)


def matmul_rate(device: torch.device, precision: str, size: int = 1024) -> float:
    """FLOP a second of a square matrix product, the best of three: what a step cannot exceed by much."""
    matrix = torch.ones(size, size, dtype=torch.float32 if precision == "fp32" else torch.bfloat16, device=device)
    seconds = []
    for _ in range(4):  # the first warms up
        start = perf_counter()
        float((matrix @ matrix)[0, 0])  # HOST READ: the product is there
        seconds.append(perf_counter() - start)
    return 2 * size**3 / min(seconds[1:])


def too_large(facts: Forecast, length: Plan, rate: float, available: int | None) -> str | None:
    """Why no real step should be tried here; None where nothing speaks against it."""
    need = max(facts.peak[0], facts.evaluation_peak)
    if available is not None and need > available:
        return f"it needs {in_bytes(need)}, and {in_bytes(available)} are free"
    seconds = facts.flop * length.per_step / rate
    if seconds > PATIENCE:
        return f"one would take at least {in_time(seconds)} here (matrix products at {in_units(rate)}FLOP/s)"
    return None


def print_dry_run(config: Config, console: Console | None = None) -> None:
    """Forecast the run, try three of its steps where they fit, and print what came of it. Leaves nothing behind."""
    console = console or Console()

    def show(rows: Rows) -> None:
        for name, value in rows:
            console.print(f"{name:<32}{value}".rstrip(), markup=False, highlight=False, soft_wrap=True)

    device, data = build_device(config.device), build_data(config)
    length = plan(config, data)
    try:
        facts = forecast(config, data, device)
    except FivestepError:
        raise
    except Exception as error:  # a model may do what tensors without values cannot, such as branch on them
        facts = None
        show([("parameters, memory, FLOP", f"not known for this model ({str(error).splitlines()[0]})")])
    if facts is not None:
        show(need_rows(facts, length))
    show(plan_rows(length))
    rate = matmul_rate(device, config.precision)
    why = too_large(facts, length, rate, free(device)) if facts is not None else None
    show([("", ""), ("three real steps", f"on {device} ({processor()}), threads: {torch.get_num_threads()}")])
    if why is None:
        measured = measure(config, data, device)
        length = plan(config, data, measured.step_seconds)
        show(time_rows(length, measured, len(data.val), facts.peak[0] if facts else None))
    elif facts is not None:
        best = "" if length.steps is None else in_time(facts.flop * length.per_step / rate * length.steps)
        window = "--bptt" if config.model in ("rnn", "transformer") else "--block-size"
        show([("  not tried", why), ("  smaller", f"--batch-size 1 --accumulate 1 {window} 64 --eval-batch-size 1")])
        show([("  the planned run", f"at least {best} here")] if best else [])


def need_rows(facts: Forecast, length: Plan) -> Rows:
    """Parameters, memory and arithmetic."""
    unit = length.unit.removesuffix("s")
    left_out = f", without {', '.join(facts.uncounted)}" if facts.uncounted else ""
    peak, largest = facts.peak, facts.largest
    return [
        ("parameters", f"{facts.parameters:,}, {facts.trainable:,} of them trained"),
        *((f"  {part}", f"{size:,}") for part, size in facts.parts.items()),
        ("memory of a step, forecast", f"{in_bytes(peak[0])} at the fullest moment ({peak[1]}), of these parts:"),
        ("  weights", in_bytes(facts.weights)),
        ("  gradients", in_bytes(facts.gradients)),
        ("  optimizer state", in_bytes(facts.optimizer_state)),
        ("  activations for backward", f"{in_bytes(facts.activations)}, of one micro-batch"),
        ("  largest tensor made", f"{in_bytes(largest[0])} ({largest[1]})"),
        ("  batch", in_bytes(facts.batch)),
        ("  in evaluation", f"{in_bytes(facts.evaluation_peak)} at the fullest moment"),
        ("arithmetic", ""),
        ("  forward and backward", f"{in_units(facts.flop)}FLOP a {unit}, matrix products{left_out}"),
        ("  by the rule 6N", f"{in_units(6 * facts.parameters)}FLOP a {unit}"),
        (
            "a checkpoint",
            f"{in_bytes(facts.saved)} of weights; {in_bytes(facts.saved + facts.optimizer_state)} "
            "with the optimizer's state",
        ),
    ]


def plan_rows(length: Plan) -> Rows:
    """The run's length."""
    epoch = f"{length.per_epoch:,} {length.unit}, {length.steps_per_epoch:,} steps"
    planned = "until the time is up" if length.steps is None else f"{length.steps:,} steps"
    return [
        ("an epoch", epoch),
        ("a step", f"{length.per_step:,.0f} {length.unit}"),
        (
            "the planned run",
            planned + ("" if length.evaluations is None else f", {length.evaluations:,} validations"),
        ),
    ]


def time_rows(length: Plan, measured: Measured, val_batches: int, peak: int | None) -> Rows:
    """What was measured, and what it says of the whole run."""
    step, evaluation = measured.step_seconds, measured.evaluation_seconds
    used = "not told by this system" if measured.peak is None else in_bytes(measured.peak)
    rows = [
        ("  the first, a warm-up", f"{measured.warmup_seconds:.3g} s"),
        ("  each of the others", f"{step:.3g} s, {length.per_step / step:,.0f} {length.unit}/s"),
        ("  memory used at most", used + ("" if peak is None else f" (forecast: {in_bytes(peak)})")),
    ]
    if length.steps is not None and length.evaluations is not None:
        validations = f"{length.evaluations:,} × {val_batches:,} batches of {evaluation:.3g} s"
        rows += [
            ("time for the planned run", ""),
            ("  training", in_time(length.steps * step)),
            ("  validation", f"{in_time(length.evaluations * val_batches * evaluation)} ({validations})"),
            ("  not in these", "loading the data, saving, the test and the sample at the end"),
        ]
    return rows


def in_bytes(size: float) -> str:
    """`498_000_000` -> `498 MB`; a MB is 10**6 bytes."""
    return f"{in_units(size)}B"


def in_units(number: float) -> str:
    """`7.47e8` -> `747 M`: three digits or more, and the prefix of a unit."""
    power = min(max(0, (len(str(int(number))) - 1) // 3), 6)
    scaled = number / 1000**power
    digits = max(0, 3 - len(str(int(scaled))))
    return f"{scaled:.{digits}f} {['', 'k', 'M', 'G', 'T', 'P', 'E'][power]}"


def in_time(seconds: float) -> str:
    """`93784` -> `1 d 2 h`: the two largest units."""
    units = {"d": 86_400, "h": 3600, "min": 60, "s": 1}
    for (name, size), (smaller, part) in zip(units.items(), list(units.items())[1:], strict=False):
        if seconds >= size:
            return f"{seconds // size:,.0f} {name} {seconds % size // part:.0f} {smaller}"
    return f"{seconds:.2g} s"
