"""What looking into every layer costs: `lens=50` against the same training without it.

    python -m benchmarks.lens

Each training is a fresh model and optimizer, the same for both, by `fs.fit` with everything on and a run's directory
that the rows are written to. The figure is the steady training, looks included: seconds a step over the last seven
eighths. The `gpt-chars` model has four layers of 128 and 12 × 64 characters a step.
"""

import argparse
import tempfile
from collections.abc import Callable
from functools import partial
from itertools import count
from pathlib import Path

import torch

import fivestep as fs
from benchmarks.jobs import NEVER, Job, adamw, gpt, mlp, terminal
from benchmarks.measure import (
    Figure,
    add_cpu_time,
    add_options,
    alternate,
    figure,
    parsed,
    per_step,
    report,
    stamped,
    use_cpu_time,
)
from fivestep.models.gpt import GPT
from fivestep.watch.progress import Progress

EVERY, TARGET = 50, 1.02


def chars(steps: int) -> Job:
    """The model of `gpt-chars` without its n-grams."""
    torch.manual_seed(0)
    model = GPT(65, block_size=64, n_layer=4, n_head=4, n_embd=128)
    windows = [torch.randint(65, (12, 65)) for _ in range(steps)]
    data = [(window[:, :-1].contiguous(), window[:, 1:].contiguous()) for window in windows]
    return Job(model, data, fs.NextToken(), adamw(model), steps, steps // 8)


def trained(build: Callable[[], Job], folder: Path, numbers: count, lens: int | None) -> float:  # type: ignore[type-arg]
    """Seconds a step of one training."""
    job = build()
    stamps = stamped(job.model)
    with fs.Run(folder / str(next(numbers)), checkpoint_every=NEVER, keep_last=1) as run:
        fs.fit(
            job.model,
            job.data,
            job.criterion,
            job.optimizer,
            epochs=1,
            log_every=100,
            progress=Progress(job.steps, terminal()),
            run=run,
            lens=lens,
        )
    return per_step(stamps, job.warm, job.steps)


def costs(options: argparse.Namespace, folder: Path) -> list[Figure]:
    """A figure for each model."""
    numbers, found = count(), []
    sizes = {"steps": 8, "many": 60} if options.quick else {"steps": 201, "many": 1501}
    jobs = {
        f"gpt-chars' model, lens={EVERY}": partial(chars, sizes["steps"]),
        f"GPT, 2 layers, 32 wide, lens={EVERY}": partial(gpt, sizes["many"]),
        f"MLP, 16-64-1, lens={EVERY}": partial(mlp, sizes["many"]),
    }
    for name, build in jobs.items():
        times = alternate(
            {
                "without": partial(trained, build, folder, numbers, None),
                "with": partial(trained, build, folder, numbers, EVERY),
            },
            options.repeats,
        )
        target = None if "MLP" in name else TARGET
        found.append(figure(name, times["with"], "µs", against=times["without"], target=target, scale=1e6))
    return found


def main() -> None:
    """Measure, and print."""
    parser = add_options(__doc__, repeats=2, quick=1)
    add_cpu_time(parser)
    options = parsed(parser)
    if options.cpu_time:
        use_cpu_time()
    with tempfile.TemporaryDirectory() as folder:
        report(options, costs(options, Path(folder)))


if __name__ == "__main__":
    main()
