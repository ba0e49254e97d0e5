"""What saving costs a training loop: a GPT-2 of 124 M parameters with AdamW, one checkpoint a minute.

    python benchmarks/save_cost.py [--saves 5] [--threads N]

Two things are measured in one run, alternating blocks of steps with and without a save in them:
the time that a save takes from the loop (the snapshot), and how much slower steps are while the thread writes. Both,
over a minute, are the cost of one checkpoint a minute.
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
    parser.add_argument("--saves", type=int, default=5, help="saves to measure  [5]")
    parser.add_argument("--layers", type=int, default=12, help="layers of the model  [12: GPT-2's 124 M]")
    parser.add_argument("--threads", type=int, default=None, help="threads of torch  [torch's choice]")
    parser.add_argument("--folder", type=Path, default=None, help="where to save  [a temporary folder]")
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    model = GPT2(50_257, 1024, n_layer=options.layers, n_head=12, n_embd=768)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    ids = torch.randint(50_257, (1, 65))
    data = [(ids[:, :-1], ids[:, 1:])] * 10_000
    folder = Path(tempfile.mkdtemp(dir=options.folder))
    plain, stalls, slowed, writing = [], [], [], []
    try:
        with fs.Run(folder / "run", checkpoint_every=None, keep_last=1) as run:
            steps = fs.train(model, data, fs.NextToken(), optimizer, run=run)
            for _ in range(3):
                state = next(steps).state
            for _ in range(options.saves):
                for _ in range(8):
                    plain.append(timed(lambda: next(steps)))
                stalls.append(timed(lambda: run.save(state)))
                begun = perf_counter()
                while run.saver.thread is not None and run.saver.thread.is_alive():
                    slowed.append(timed(lambda: next(steps)))
                writing.append(perf_counter() - begun)
                run.saver.wait()
            steps.close()
    finally:
        shutil.rmtree(folder)
    step, slow = median(plain), sum(slowed) / max(1, len(slowed))
    extra = median(stalls) + median(writing) * (1 - step / slow)
    parameters = sum(p.numel() for p in model.parameters())
    print(f"{parameters:,} parameters, AdamW, batch 1 x 64, {torch.get_num_threads()} threads")
    print(f"{platform.machine()}, torch {torch.__version__}, {options.saves} saves, {len(plain)} plain steps")
    print(f"a step:                 {step:8.3f} s (median; {min(plain):.3f} to {max(plain):.3f})")
    print(f"the loop waits a save:  {median(stalls):8.3f} s (median; {min(stalls):.3f} to {max(stalls):.3f})")
    print(f"writing takes:          {median(writing):8.3f} s, beside {len(slowed)} steps of {slow:.3f} s on average")
    print(f"cost of a checkpoint:   {extra:8.3f} s of the loop: {extra / 60:.2%} at one a minute")


def timed(work) -> float:  # type: ignore[no-untyped-def]
    """Seconds that `work()` takes."""
    begun = perf_counter()
    work()
    return perf_counter() - begun


if __name__ == "__main__":
    main()
