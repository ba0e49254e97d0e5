"""Two processes of one thread each beside one process of two threads, on `gpt-chars`' model and batch.

    python -m benchmarks.processes

Each trains the same steps on the same batches (`torchrun --standalone --nproc-per-node 2`, gloo, against a process
alone), in turns; the steady step is measured in process 0. The share of communication is what goes of a step where
gradients stay where they are (the training is wrong then, and nothing else changes).
"""

import json
import subprocess
import sys
import tempfile
from itertools import pairwise
from pathlib import Path
from time import perf_counter

from benchmarks.measure import ROOT, Figure, add_options, alternate, child, figure, parsed, report, skipped

WARM = 5


def worker(out: str, steps: int, synced: bool, tiny: bool, graph: str) -> None:
    """Train, and write the seconds of each step: run by torchrun, or alone."""
    import fivestep as fs
    from fivestep import processes
    from fivestep.loop import train
    from fivestep.loop.clock import Limit
    from fivestep.run.build import build_data, build_job, step_options
    from fivestep.run.config import load_config

    small = {"n_layer": 1, "n_embd": 16, "n_head": 2} if tiny else {}
    config = load_config("gpt-chars", {"max_iters": steps, "graph": graph, **small})
    job = build_job(config, build_data(config))
    step = fs.TrainStep(job.model, job.objective, job.optimizers, **step_options(config, job))
    if step.parallel is not None and not synced:
        step.parallel.last = lambda last: setattr(step.world.model, "require_backward_grad_sync", False)  # type: ignore
        step.parallel.reduced += step.parallel.tables.values()
        step.parallel.tables, step.parallel._missed = {}, lambda: False  # type: ignore
    stamps = [perf_counter() for _ in train.steps(step, job.data.train, Limit(None, steps), 1)]
    if processes.is_first():
        Path(out).write_text(json.dumps([b - a for a, b in pairwise(stamps[WARM:])]))


def trained(processes: int, threads: int, steps: int, tiny: bool, synced: bool = True, graph: str = "off") -> float:
    """The mean seconds of a steady step."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "seconds"
        launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
        subprocess.run(
            [
                *(sys.executable, *(launch if processes > 1 else []), "-m", "benchmarks.processes"),
                *("--worker", str(out), str(steps), str(int(synced)), str(int(tiny)), graph),
            ],
            check=True,
            cwd=ROOT,
            env=child({"OMP_NUM_THREADS": str(threads), "PYTHONWARNINGS": "ignore"}),
        )
        seconds = json.loads(out.read_text())
    return sum(seconds) / len(seconds)


def main() -> None:
    """Measure, and report."""
    if sys.argv[1:2] == ["--worker"]:
        out, steps, synced, tiny, graph = sys.argv[2:]
        worker(out, int(steps), synced == "1", tiny == "1", graph)
        return
    options = parsed(add_options(__doc__, repeats=3, quick=1))
    import torch

    if not torch.distributed.is_available():
        report(options, [skipped("two processes", "this torch has no torch.distributed")])
        return
    steps, tiny = (10, True) if options.quick else (40, False)
    found = alternate(
        {
            "alone": lambda: trained(1, 2, steps, tiny),
            "two": lambda: trained(2, 1, steps, tiny),
            "silent": lambda: trained(2, 1, steps, tiny, synced=False),
            "alone by program": lambda: trained(1, 2, steps, tiny, graph="on"),
            "two by program": lambda: trained(2, 1, steps, tiny, graph="on"),
        },
        options.repeats,
    )
    shares = [1 - silent / two for silent, two in zip(found["silent"], found["two"], strict=True)]
    figures: list[Figure] = [
        figure("a step of two processes", found["two"], "ms", against=found["alone"], scale=1e3, target=1 / 0.9),
        figure("the same, gradients stay where they are", found["silent"], "ms", against=found["alone"], scale=1e3),
        figure("share of communication in a step", shares, ""),
        figure(
            "by program (graph): a step of two processes",
            found["two by program"],
            "ms",
            against=found["alone by program"],
            scale=1e3,
        ),
        figure("a step of two processes: by program", found["two by program"], "ms", against=found["two"], scale=1e3),
    ]
    report(options, figures)


if __name__ == "__main__":
    main()
