"""What saving costs a training loop: a GPT-2 of 124 M parameters with AdamW, one checkpoint a minute.

    python benchmarks/save_cost.py [--saves 5] [--threads N]

Blocks of steps with and without a save alternate in one process. What a block with a save takes longer is what the
save costs: the snapshot, for which the loop waits, and the writing, which shares the cores with the steps.
"""

import argparse
import platform
import shutil
import tempfile
from pathlib import Path
from statistics import median
from time import perf_counter

import torch

import fivestep as fs
from fivestep.models.gpt2 import GPT2


def main() -> None:
    """Measure, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--saves", type=int, default=5, help="pairs of blocks to measure  [5]")
    parser.add_argument("--steps", type=int, default=20, help="steps of a block; it should outlast the writing  [20]")
    parser.add_argument("--tokens", type=int, default=64, help="of a batch  [64]")
    parser.add_argument("--layers", type=int, default=12, help="layers of the model  [12: GPT-2's 124 M]")
    parser.add_argument("--threads", type=int, default=None, help="threads of torch  [torch's choice]")
    parser.add_argument("--folder", type=Path, default=None, help="where to save  [a temporary folder]")
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    model = GPT2(50_257, 1024, n_layer=options.layers, n_head=12, n_embd=768)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    ids = torch.randint(50_257, (1, options.tokens + 1))
    data = [(ids[:, :-1], ids[:, 1:])] * 10_000
    folder = Path(tempfile.mkdtemp(dir=options.folder))
    plain, saving, stalls, writing = [], [], [], []
    try:
        with fs.Run(folder / "run", checkpoint_every=None, keep_last=1) as run:
            steps = fs.train(model, data, fs.NextToken(), optimizer, run=run)

            def block() -> float:
                return timed(lambda: [next(steps) for _ in range(options.steps)])

            state = next(steps).state
            for _ in range(options.saves + 2):  # the first two bring memory and disk into their steady state
                plain.append(block())
                stalls.append(timed(lambda: run.save(state)))
                saving.append(stalls[-1] + block())
                writing.append(timed(run.saver.wait))
            steps.close()
    finally:
        shutil.rmtree(folder)
    plain, saving, stalls, writing = plain[2:], saving[2:], stalls[2:], writing[2:]
    costs = [with_save - without for without, with_save in zip(plain, saving, strict=True)]
    parameters = sum(p.numel() for p in model.parameters())
    print(f"{parameters:,} parameters, AdamW, batch 1 x {options.tokens}, {torch.get_num_threads()} threads")
    print(
        f"{platform.machine()}, torch {torch.__version__}, {options.saves} pairs of blocks of {options.steps} steps"
    )
    print(f"a block without a save: {spread(plain)}")
    print(f"a block with one:       {spread(saving)}")
    print(f"the loop waits a save:  {spread(stalls)}")
    print(f"not written by its end: {spread(writing)}")
    print(f"a checkpoint costs:     {spread(costs)}; {median(costs) / 60:.2%} of the loop at one a minute")


def spread(seconds: list[float]) -> str:
    """Median, least and most."""
    return f"{median(seconds):7.3f} s ({min(seconds):.3f} to {max(seconds):.3f})"


def timed(work) -> float:  # type: ignore[no-untyped-def]
    """Seconds that `work()` takes."""
    begun = perf_counter()
    work()
    return perf_counter() - begun


if __name__ == "__main__":
    main()
