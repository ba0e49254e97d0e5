"""What a step costs when the dataset augments its items at random, beside the loop by hand over the same loader.

    python -m benchmarks.augmentation

Images of the size of scikit-learn's digits are shifted by up to a pixel, as in `examples/images.py`, and noise from
NumPy is added. The model is a small convnet, and a batch has 64 images. Each training has a fresh model and loader.
The first steps, and with them the start of the workers, are left out. The last figure is of a dataset that draws
nothing and an MLP: it shows what keeping the random generators apart costs at most.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset

import fivestep as fs
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

WARM = 5
BATCH = 64


class Images(Dataset[Any]):
    """Images [1, 8, 8] with their classes, each shifted and made noisy at random where `augmented`."""

    def __init__(self, n: int, augmented: bool):
        self.images, self.labels, self.augmented = torch.rand(n, 1, 8, 8), torch.randint(10, (n,)), augmented

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        image = self.images[index]
        if self.augmented:
            down, right = torch.randint(3, (2,)).tolist()
            image = nn.functional.pad(image, (1, 1, 1, 1))[:, down : down + 8, right : right + 8]
            image = image + 0.1 * np.random.rand()
        return image, self.labels[index]


def convnet() -> nn.Module:
    """The model of `examples/images.py`."""
    return nn.Sequential(
        *(nn.Conv2d(1, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.MaxPool2d(2)),  # [16, 4, 4]
        *(nn.Conv2d(16, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(), nn.MaxPool2d(2)),  # [32, 2, 2]
        *(nn.Flatten(), nn.Linear(128, 10)),
    )


def mlp() -> nn.Module:
    """A model so small that nothing hides the loader."""
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))


def trained(build: Callable[[], nn.Module], augmented: bool, workers: int, steps: int, by_hand: bool) -> float:
    """Seconds a step of one training."""
    torch.manual_seed(0)
    loader = DataLoader(Images(steps * BATCH, augmented), batch_size=BATCH, shuffle=True, num_workers=workers)
    model, criterion = build(), nn.CrossEntropyLoss()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    stamps = stamped(model)
    if by_hand:
        loop_by_hand(model, loader, criterion, optimizer)
    else:
        fs.fit(model, loader, criterion, optimizer, epochs=1, progress=False)
    return per_step(stamps, WARM, steps)


def loop_by_hand(model: nn.Module, loader: Any, criterion: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """One epoch of seed 001's loop."""
    total = 0.0
    model.train()
    for features, labels in loader:
        optimizer.zero_grad()
        loss = criterion(model(features), labels)
        loss.backward()
        optimizer.step()
        total += loss.item()


def main() -> None:
    """Measure, and print."""
    parser = add_options(__doc__, repeats=9, quick=1)
    parser.add_argument("--steps", type=int, default=None, help="of each training  [150]")
    add_cpu_time(parser)
    options = parsed(parser)
    if options.cpu_time:
        use_cpu_time()
    steps = options.steps or (8 if options.quick else 150)
    jobs = {
        "convnet, augmented, no workers: fs.fit": (partial(trained, convnet, True, 0, steps), 1.05),
        "convnet, augmented, 2 workers: fs.fit": (partial(trained, convnet, True, 2, steps), 1.05),
        "MLP, a dataset that draws nothing, no workers: fs.fit": (partial(trained, mlp, False, 0, steps), None),
    }
    figures: list[Figure] = []
    for name, (job, target) in jobs.items():
        found = alternate({"by hand": partial(job, True), "ours": partial(job, False)}, options.repeats)
        figures.append(figure(name, found["ours"], "ms", against=found["by hand"], target=target, scale=1e3))
    report(options, figures)


if __name__ == "__main__":
    main()
