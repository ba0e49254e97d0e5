"""How long a resume in the middle of a large shuffled DataLoader takes until its first batch, beside a fresh start.

    python benchmarks/resume_loader.py [--samples 10000000] [--share 0.9] [--repeats 5]

Both in one process, alternating: the dataset is map-style, the loader torch's own with shuffle=True. Only index lists
are drawn again; the dataset is not asked for what was consumed.
"""

import argparse
from statistics import median
from time import perf_counter

import torch
from torch.utils.data import DataLoader, TensorDataset

from fivestep.data.reader import build_reader


def main() -> None:
    """Measure, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=10_000_000, help="rows of the dataset  [10000000]")
    parser.add_argument("--share", type=float, default=0.9, help="of the epoch that is consumed  [0.9]")
    parser.add_argument("--repeats", type=int, default=5, help="of each  [5]")
    options = parser.parse_args()
    rows = torch.arange(options.samples)
    print(f"{options.samples:,} samples, {options.repeats} repeats; seconds to the first batch")
    for batch_size in (32, 64):
        position = int(options.samples / batch_size * options.share)
        fresh, resumed = [], []
        for _ in range(options.repeats):
            torch.manual_seed(0)
            reader = build_reader(DataLoader(TensorDataset(rows), batch_size=batch_size, shuffle=True))
            begun = perf_counter()
            next(reader.epoch(0))
            fresh.append(perf_counter() - begun)
            saved = reader.state_dict()
            reader = build_reader(DataLoader(TensorDataset(rows), batch_size=batch_size, shuffle=True))
            reader.load_state_dict(saved)
            begun = perf_counter()
            next(reader.epoch(0, position))
            resumed.append(perf_counter() - begun)
        extra = median(b - a for a, b in zip(fresh, resumed, strict=True))
        print(
            f"batch {batch_size}: fresh {median(fresh):.2f} s, at batch {position:,} {median(resumed):.2f} s "
            f"({min(resumed):.2f} to {max(resumed):.2f}): {extra:+.2f} s"
        )


if __name__ == "__main__":
    main()
