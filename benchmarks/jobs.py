"""The small jobs that overheads are measured on, and the loops that run them: by hand, and by fivestep.

A loop is a function of a job's parts that trains once and returns seconds a step. All are stamped at the same place,
the model's forward pass, and the first steps are left out, so that what is compared is the steady step: everything
between one forward pass and the next.
"""

import io
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import fivestep as fs
from benchmarks.measure import per_step, stamped
from fivestep.data.segments import Segments
from fivestep.models.gpt import GPT
from fivestep.models.mlp import MLP
from fivestep.models.rnn import RNN
from fivestep.watch.progress import Progress
from fivestep.watch.screen import Console
from tests.seeds.plain import supervised, truncated_bptt

LOG_EVERY = 100  # steps between two rows of metrics
NEVER = 1_000_000_000  # steps until an evaluation is due: its trigger is asked at every step, and it is not measured


@dataclass
class Job:
    """A model with what it trains on; each training gets its own."""

    model: nn.Module
    data: Any
    criterion: Any
    optimizer: Any
    steps: int  # to train
    warm: int  # of these, the first ones that are not measured
    epochs: int = 1
    clip_norm: float | None = None
    by_hand: Callable[["Job"], Any] = lambda job: supervised(
        job.model, job.data, criterion=job.criterion, optimizer=job.optimizer, epochs=job.epochs
    )


def adamw(model: nn.Module) -> torch.optim.Optimizer:
    """The user's own optimizer, as everybody writes it."""
    return torch.optim.AdamW(model.parameters(), lr=1e-3)


def mlp(steps: int, build: Callable[[nn.Module], Any] = adamw, per_epoch: int | None = None) -> Job:
    """16 features, 64 hidden, 1 output; batches of 32 from a list; `per_epoch` of them make an epoch."""
    torch.manual_seed(0)
    model, batches = MLP([16, 64, 1]), per_epoch or steps
    data = [(torch.randn(32, 16), torch.randn(32, 1)) for _ in range(batches)]
    return Job(model, data, nn.MSELoss(), build(model), steps, steps // 8, epochs=steps // batches)


def lstm(steps: int, build: Callable[[nn.Module], Any] = adamw) -> Job:
    """One LSTM layer of 64 on a vocabulary of 100, segments of 16 × 16 tokens, clipped, as seed 000 has it."""
    torch.manual_seed(0)
    columns, bptt, clip = 16, 16, 0.25
    model = RNN(100, n_embd=64, n_hidden=64, n_layer=1, cell="lstm", dropout=0.0)
    tokens = torch.randint(100, (columns * (steps * bptt + 1),))

    def by_hand(job: Job) -> None:
        sizes = {"batch_size": columns, "bptt": bptt, "epochs": 1, "clip": clip}
        truncated_bptt(job.model, tokens, **sizes, optimizer=job.optimizer)

    data = Segments(tokens.numpy(), columns, bptt)
    return Job(model, data, fs.TruncatedBPTT(), build(model), steps, steps // 8, clip_norm=clip, by_hand=by_hand)


def gpt(steps: int, build: Callable[[nn.Module], Any] = adamw) -> Job:
    """A GPT of 2 layers, 32 wide, on 8 × 32 characters out of 65, from a list."""
    torch.manual_seed(0)
    model = GPT(65, block_size=32, n_layer=2, n_head=2, n_embd=32)
    windows = [torch.randint(65, (8, 33)) for _ in range(steps)]
    data = [(window[:, :-1].contiguous(), window[:, 1:].contiguous()) for window in windows]

    def by_hand(job: Job) -> None:
        def criterion(logits: Tensor, yb: Tensor) -> Tensor:
            return nn.functional.cross_entropy(logits.flatten(0, 1), yb.flatten())

        supervised(job.model, data, criterion=criterion, optimizer=job.optimizer, epochs=1)

    return Job(model, data, fs.NextToken(), build(model), steps, steps // 8, by_hand=by_hand)


# --- the loops ---
def by_hand(job: Job) -> float:
    """The plain loop."""
    stamps = stamped(job.model)
    job.by_hand(job)
    return per_step(stamps, job.warm, job.steps)


def by_train(job: Job) -> float:
    """`for info in fs.train(...)`, the norm included."""
    stamps = stamped(job.model)
    for _ in training(job):
        pass
    return per_step(stamps, job.warm, job.steps)


def training(job: Job, endless: bool = False, **options: Any) -> Iterator[Any]:
    """The generator over a job."""
    epochs = None if endless else job.epochs
    options |= {"epochs": epochs, "clip_norm": job.clip_norm}
    return fs.train(job.model, job.data, job.criterion, job.optimizer, **options)


def by_fit(job: Job, **limits: Any) -> float:
    """`fs.fit` with everything on: bar on a terminal, rows with a metric, norm, evaluation triggers."""
    stamps = stamped(job.model)
    limits = limits or {"epochs": job.epochs}
    fs.fit(
        job.model,
        job.data,
        job.criterion,
        job.optimizer,
        **limits,
        val=list(job.data)[:1],
        eval_every=NEVER,
        log_every=LOG_EVERY,
        metrics={"error": lambda outputs, targets: (outputs.flatten() - targets.flatten()).abs()}
        if isinstance(job.criterion, nn.MSELoss)
        else None,
        clip_norm=job.clip_norm,
        progress=Progress(job.steps, terminal()),
    )
    return per_step(stamps, job.warm, job.steps)


def terminal() -> Console:
    """A terminal that nobody sees: everything is drawn."""
    return Console(file=io.StringIO(), force_terminal=True, width=100)
