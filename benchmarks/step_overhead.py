"""What a step costs beyond the loop written by hand, on models so small that nothing hides it.

    python -m benchmarks.step_overhead

Each training is a fresh model and optimizer, the same for all, fed from a list (the LSTM: from its segments); the
steady step is measured. By hand is the loop of seed 001 with its `.item()` (seed 000's for the LSTM, with its clip).
`fs.train` takes the gradient norm; `fs.fit` has everything on: bar, rows of metrics, norm, evaluation triggers. "By
name" has its optimizer from `build_optimizer(model, "adamw", fused=True)`. With `graph=True`, the first steps (and
the compilation) are left out, and a turn is three times as many steps, by hand too: it would last 12 ms otherwise.
"""

import inspect
from collections import deque
from collections.abc import Callable, Iterator
from functools import partial
from itertools import islice
from typing import Any

import torch
from torch import nn

import fivestep as fs
from benchmarks.jobs import Job, adamw, by_fit, by_hand, by_train, gpt, lstm, mlp, training
from benchmarks.measure import (
    Figure,
    add_cpu_time,
    add_options,
    alternate,
    figure,
    now,
    parsed,
    report,
    skipped,
    use_cpu_time,
)
from fivestep.loop.optimizer import build_optimizer

GRAPHS = inspect.signature(fs.train).parameters.keys() & {"graph"}


class Both(list):
    """Two optimizers that a loop by hand steps as one; fivestep takes the list as it is."""

    def zero_grad(self) -> None:
        for optimizer in self:
            optimizer.zero_grad()

    def step(self) -> None:
        for optimizer in self:
            optimizer.step()


def by_name(model: nn.Module) -> Any:
    """The optimizer that fivestep builds."""
    return build_optimizer(model, "adamw", 1e-3, fused=True)


def muon(model: nn.Module) -> Any:
    """torch's Muon on the matrices, AdamW on the rest."""
    matrices = [p for p in model.parameters() if p.ndim == 2]
    rest = [p for p in model.parameters() if p.ndim != 2]
    return Both([torch.optim.Muon(matrices, lr=1e-3), torch.optim.AdamW(rest, lr=1e-3)])


OPTIMIZERS: dict[str, tuple[Callable[[nn.Module], Any], float]] = {
    "AdamW": (adamw, 0.25),
    "SGD": (lambda model: torch.optim.SGD(model.parameters(), lr=1e-3), 0.25),
    "RMSprop": (lambda model: torch.optim.RMSprop(model.parameters(), lr=1e-3), 0.25),
    "Muon": (muon, 0.6),
}


def compared(build: Callable[[], Job], ours: dict[str, tuple[Any, float]], repeats: int) -> list[Figure]:
    """Loops of ours, by the name of their figure with its target, each against the loop by hand."""
    contestants = {name: loop for name, (loop, _) in ours.items()}
    found = alternate({"by hand": lambda: by_hand(build()), **contestants}, repeats)
    hand = found["by hand"]
    return [figure(name, found[name], "µs", against=hand, target=ours[name][1], scale=1e6) for name in ours]


def eager(steps: int, repeats: int) -> list[Figure]:
    """The figures of the eager step."""
    named, two = partial(mlp, steps, by_name), partial(mlp, steps, per_epoch=2)
    figures = compared(
        partial(mlp, steps),
        {
            "MLP, own optimizer: fs.train": (lambda: by_train(mlp(steps)), 1.05),
            "MLP, own optimizer: fs.fit": (lambda: by_fit(mlp(steps)), 1.05),
            "MLP, optimizer by name: fs.train": (lambda: by_train(named()), 0.90),
            "MLP, optimizer by name: fs.fit": (lambda: by_fit(named()), 0.90),
        },
        repeats,
    )
    figures += compared(
        two,
        {
            "MLP, epochs of two batches: fs.train": (lambda: by_train(two()), 1.10),
            "MLP, epochs of two batches: fs.fit, max_iters": (lambda: by_fit(two(), max_iters=steps), 1.10),
            "MLP, epochs of two batches: fs.fit, a row an epoch": (lambda: by_fit(two()), None),
        },
        repeats,
    )
    for label, job in (("LSTM", partial(lstm, steps // 4)), ("GPT", partial(gpt, steps // 4))):
        loops = {
            f"tiny {label}: fs.train": (lambda job=job: by_train(job()), 1.02),
            f"tiny {label}: fs.fit": (lambda job=job: by_fit(job()), 1.02),
        }
        figures += compared(job, loops, repeats)
    return figures


def graphed(name: str, steps: int, repeats: int) -> list[Figure]:
    """`graph=True` on the MLP with one optimizer."""
    build, target = OPTIMIZERS[name]
    job = mlp(100, build)
    job.optimizer = list(job.optimizer) if isinstance(job.optimizer, Both) else job.optimizer
    generator = training(job, endless=True, graph=True)
    drain(generator, 200)
    found = alternate(
        {"by hand": lambda: by_hand(mlp(steps, build)), "graph": lambda: drain(generator, steps)}, repeats
    )
    generator.close()
    label = f"MLP, {name}, graph=True: fs.train"
    return [figure(label, found["graph"], "µs", against=found["by hand"], target=target, scale=1e6)]


def drain(generator: Iterator[Any], steps: int) -> float:
    """Seconds a step of the next `steps`."""
    begun = now()
    last = deque(islice(generator, steps), maxlen=1).pop()
    float(last.loss)  # all of it is done
    return (now() - begun) / steps


def main() -> None:
    """Measure, and print."""
    parser = add_options(__doc__, repeats=9, quick=1)
    parser.add_argument("--steps", type=int, default=None, help="of each training  [500]")
    parser.add_argument("--only", choices=["eager", "graph"], help="one half  [both]")
    add_cpu_time(parser)
    options = parsed(parser)
    if options.cpu_time:
        use_cpu_time()
    steps = options.steps or (32 if options.quick else 500)
    figures = [] if options.only == "graph" else eager(steps, options.repeats)
    for name in [] if options.only == "eager" else OPTIMIZERS:
        label = f"MLP, {name}, graph=True: fs.train"
        if not GRAPHS:
            figures.append(skipped(label, "fs.train has no graph= here"))
        elif not options.quick or name == "AdamW":
            figures += graphed(name, 3 * steps, options.repeats)
    report(options, figures)


if __name__ == "__main__":
    main()
