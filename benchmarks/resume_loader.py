"""How long a resume in the middle of a large shuffled DataLoader takes until its first batch, beside a fresh start.

    python -m benchmarks.resume_loader

Both in one process, alternating: the dataset is map-style, the loader torch's own with shuffle=True. Only index lists
are drawn again; the dataset is not asked for what was consumed.
"""

from time import perf_counter

import torch
from torch.utils.data import DataLoader, TensorDataset

from benchmarks.measure import Figure, add_options, figure, parsed, report
from fivestep.data.reader import build_reader


def main() -> None:
    """Measure, and print."""
    parser = add_options(__doc__, repeats=3, quick=1)
    parser.add_argument("--samples", type=int, default=None, help="rows of the dataset  [10000000]")
    parser.add_argument("--share", type=float, default=0.9, help="of the epoch that is consumed  [0.9]")
    options = parsed(parser)
    rows = torch.arange(options.samples or (10_000 if options.quick else 10_000_000))
    figures = [one for size in (32, 64) for one in measure(rows, size, options.share, options.repeats)]
    report(options, figures)


def measure(rows: torch.Tensor, batch_size: int, share: float, repeats: int) -> list[Figure]:
    """Seconds to the first batch of a fresh epoch, and of one that `share` of is consumed."""
    position = int(len(rows) / batch_size * share)
    fresh, resumed = [], []
    for _ in range(repeats):
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
    extra = [after - before for before, after in zip(fresh, resumed, strict=True)]
    where = f"{len(rows):,} samples, batches of {batch_size}"
    return [
        figure(f"{where}: first batch at {share:.0%} of the epoch", resumed, "s", against=fresh),
        figure(f"{where}: what that adds", extra, "s"),
    ]


if __name__ == "__main__":
    main()
