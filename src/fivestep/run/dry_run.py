"""`fivestep train RECIPE --dry-run`: what the run will need, printed, and three real steps where they fit.

Owns the words and the units; the figures are `forecast.py`'s. Nothing is left behind.
"""

import torch

from fivestep.errors import FivestepError
from fivestep.run.build import build_data, build_device
from fivestep.run.config import Config
from fivestep.run.environment import processor
from fivestep.run.forecast import Forecast, Measured, Plan, forecast, matmul_rate, measure, plan
from fivestep.run.memory import free
from fivestep.watch.screen import Console

PATIENCE = 60.0  # seconds that a real step of a dry run may take

Rows = list[tuple[str, str]]  # a name and its figures


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
        window = {"rnn": " --bptt 16", "transformer": " --bptt 16", "mlp": ""}.get(config.model, " --block-size 64")
        show([("  not tried", why), ("  smaller", f"--batch-size 1 --accumulate 1 --eval-batch-size 1{window}")])
        show([("  the planned run", f"at least {best} here")] if best else [])


def too_large(facts: Forecast, length: Plan, rate: float, available: int | None) -> str | None:
    """Why no real step should be tried here; None where nothing speaks against it."""
    need = max(facts.peak[0], facts.evaluation_peak)
    if available is not None and need > available:
        return f"it needs {in_bytes(need)}, and {in_bytes(available)} are free"
    seconds = facts.flop * length.per_step / rate
    if seconds > PATIENCE:
        return f"one would take at least {in_time(seconds)} here (matrix products at {in_units(rate)}FLOP/s)"
    return None


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
        *([("  averaged weights", in_bytes(facts.average))] if facts.average else []),
        ("  activations for backward", f"{in_bytes(facts.activations)}, of one micro-batch"),
        ("  largest tensor made", f"{in_bytes(largest[0])} ({largest[1]})"),
        ("  batch", in_bytes(facts.batch)),
        ("  in evaluation", f"{in_bytes(facts.evaluation_peak)} at the fullest moment"),
        ("arithmetic", ""),
        ("  forward and backward", f"{in_units(facts.flop)}FLOP a {unit}, matrix products{left_out}"),
        ("  by the rule 6N", f"{in_units(6 * facts.parameters)}FLOP a {unit}"),
        (
            "a checkpoint",
            f"{in_bytes(facts.saved)} of weights, {in_bytes(facts.saved + facts.optimizer_state)} with the "
            "optimizer's state; as much memory more once one was written",
        ),
    ]


def plan_rows(length: Plan) -> Rows:
    """The run's length."""
    epoch = f"{length.per_epoch:,} {length.unit}, {length.steps_per_epoch:,} steps"
    planned = "until the time is up" if length.steps is None else f"{length.steps:,} steps"
    return [
        ("an epoch", epoch),
        ("a step", f"{length.per_step:,.0f} {length.unit}, on average over an epoch"),
        (
            "the planned run",
            planned + ("" if length.evaluations is None else f", {length.evaluations:,} validations"),
        ),
    ]


def time_rows(length: Plan, measured: Measured, val_batches: int, peak: int | None) -> Rows:
    """What was measured, and what it says of the whole run."""
    step, evaluation = measured.step_seconds, measured.evaluation_seconds
    rows = [
        ("  the first, a warm-up", f"{measured.warmup_seconds:.3g} s"),
        ("  each of the others", f"{step:.3g} s, {length.per_step / step:,.0f} {length.unit}/s"),
        ("  memory used at most", memory_text(measured.peak, peak)),
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


def memory_text(used: int | None, peak: int | None) -> str:
    """What was used beside its forecast, and why the two may differ."""
    if used is None:
        return "not told by this system"
    if peak is None:
        return in_bytes(used)
    text = f"{in_bytes(used)} (forecast: {in_bytes(peak)})"
    if used < 0.9 * peak:
        return f"{text}; a process fills the memory first that it has kept, e.g. from reading the data"
    if used > 1.1 * peak:
        return (
            f"{text}; the allocator keeps what is freed: less with MALLOC_MMAP_THRESHOLD_=131072 in the environment"
        )
    return text


def in_bytes(size: float) -> str:
    """`498_000_000` -> `498 MB`; a MB is 10**6 bytes."""
    return f"{in_units(size)}B"


def in_units(number: float) -> str:
    """`7.474e8` -> `747 M`: three digits and the prefix of a unit."""
    number = float(f"{number:.3g}")
    power = min(max(0, (len(str(int(number))) - 1) // 3), 6)
    scaled = number / 1000**power
    digits = max(0, 3 - len(str(int(scaled)))) if power else 0
    return f"{scaled:.{digits}f} {['', 'k', 'M', 'G', 'T', 'P', 'E'][power]}"


def in_time(seconds: float) -> str:
    """`93784` -> `1 d 2 h`: the two largest units."""
    units = {"d": 86_400, "h": 3600, "min": 60, "s": 1}
    for (name, size), (smaller, part) in zip(units.items(), list(units.items())[1:], strict=False):
        if seconds >= size:
            return f"{seconds // size:,.0f} {name} {seconds % size // part:.0f} {smaller}"
    return f"{seconds:.2g} s"
