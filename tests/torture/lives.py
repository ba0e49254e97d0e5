"""What a child lives: a command line, or a script of a user's."""

import os
import random
import signal
import sys
import time
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset

import fivestep as fs
from fivestep.__main__ import go_on, leave, start
from tests.torture import faults


def plant(run, fault):
    """A fault in the file operations of this life."""
    faults.plant(Path(run), **fault)


def unblock():
    """From here on signals arrive: those that were sent meanwhile too."""
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM, signal.SIGINT, signal.SIGUSR1})


def command(argv):
    """`python -m fivestep ARGV`, from its first line."""
    sys.argv = ["fivestep", *argv]
    signal.signal(signal.SIGTERM, leave)  # as `start` does at once
    signal.signal(signal.SIGUSR1, go_on)
    unblock()
    start()
    return 0


class Rows(Dataset):
    """Digit-like images with noise added from torch's, NumPy's and Python's generators as each is read."""

    def __init__(self, n, wait=0.0):
        generator = torch.Generator().manual_seed(5)
        self.images, self.wait = torch.randn(n, 16, generator=generator), wait
        self.labels = (self.images.sum(1) > 0).long()

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, index):
        time.sleep(self.wait)
        noise = torch.rand(16) + float(np.random.rand()) + random.random()
        return self.images[index] + 0.1 * noise, self.labels[index]


def script(epochs, n=54, workers=2, wait=0.0, checkpoint_every=4, slow_look=0.0):
    """A user's own training: a shuffled loader, random augmentation, workers, accumulation, dropout."""
    unblock()
    torch.set_num_threads(1)
    torch.manual_seed(3)
    np.random.seed(3)
    random.seed(3)
    loader = DataLoader(Rows(n, wait), batch_size=4, shuffle=True, num_workers=workers)
    model = nn.Sequential(nn.Linear(16, 12), nn.BatchNorm1d(12), nn.ReLU(), nn.Dropout(0.2), nn.Linear(12, 2))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    images = torch.randn(20, 16, generator=torch.Generator().manual_seed(6))
    val = [(images[i : i + 5], (images[i : i + 5].sum(1) > 0).long()) for i in range(0, 20, 5)]

    class Slow(nn.CrossEntropyLoss):
        def forward(self, output, target):
            if not model.training:
                time.sleep(slow_look)
            return super().forward(output, target)

    with fs.Run("run", checkpoint_every=checkpoint_every) as run:
        fs.fit(
            model,
            loader,
            Slow(),
            optimizer,
            epochs=epochs,
            val=val,
            accumulate=3,
            log_every=3,
            progress=False,
            run=run,
        )
    return 0


def stubborn(path):
    """Says that it lives, and waits: what a kill is proved with."""
    Path(path).write_text(str(os.getpid()))
    time.sleep(60)
