"""What other trainers add to a step: the same MLP, batches, loss and AdamW in each, and the loop by hand.

    python -m benchmarks.peers        (pip install -e '.[peers]'; what is not installed is left out)

16 features, 64 hidden, 1 output, batches of 32 from a list, no clipping, on the CPU. Each is set up as its own pages
say, once at its fastest (Lightning: `barebones=True`; the Trainer of transformers: no logging, no saving, no bar),
and once as it comes, with its bar, which is drawn to where nobody sees it. Nobody saves or evaluates. `fs.fit` has
its bar, rows of metrics, norm and triggers on. Steady steps: set-up and the first eighth are left out.
"""

import importlib
import logging
import os
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

from torch import nn

from benchmarks.jobs import Job, by_fit, by_hand, by_train, mlp
from benchmarks.measure import (
    Figure,
    add_cpu_time,
    add_options,
    alternate,
    figure,
    parsed,
    per_step,
    report,
    skipped,
    stamped,
    use_cpu_time,
)

Loop = Callable[[Job], None]


def by_accelerate(job: Job) -> None:
    """The loop of Accelerate's pages: prepare, `accelerator.backward`."""
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True)
    model, optimizer, data = accelerator.prepare(job.model, job.optimizer, job.data)
    model.train()
    total = 0.0
    for features, labels in data:
        optimizer.zero_grad()
        loss = job.criterion(model(features), labels)
        accelerator.backward(loss)
        optimizer.step()
        total += loss.item()


def by_fabric(job: Job) -> None:
    """The loop of Fabric's pages: setup, `fabric.backward`."""
    from lightning.fabric import Fabric

    fabric = Fabric(accelerator="cpu", devices=1)
    model, optimizer = fabric.setup(job.model, job.optimizer)
    model.train()
    total = 0.0
    for features, labels in job.data:
        optimizer.zero_grad()
        loss = job.criterion(model(features), labels)
        fabric.backward(loss)
        optimizer.step()
        total += loss.item()


class Iterable:
    """A list as a mere iterable: Lightning takes a list for several loaders to be read side by side."""

    def __init__(self, batches: list[Any]):
        self.batches = batches

    def __iter__(self) -> Iterator[Any]:
        return iter(self.batches)

    def __len__(self) -> int:
        return len(self.batches)


def by_lightning(job: Job, **settings: Any) -> None:
    """A LightningModule with its Trainer."""
    import lightning

    class Regression(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model = job.model

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            features, labels = batch
            return job.criterion(self.model(features), labels)

        def configure_optimizers(self) -> Any:
            return job.optimizer

    trainer = lightning.Trainer(accelerator="cpu", devices=1, max_epochs=job.epochs, **settings)
    trainer.fit(Regression(), Iterable(job.data))


def by_lightning_with_bar(job: Job) -> None:
    """As it comes, but for files: a log of metrics and checkpoints are not part of the job."""
    by_lightning(job, logger=False, enable_checkpointing=False)


class Batches(list):
    """A list of batches that says how many samples it holds, which the Trainer asks of its loader."""

    batch_size = None

    @property
    def dataset(self) -> list[Any]:
        return self


class WithLoss(nn.Module):
    """The form of model that transformers' Trainer trains: named inputs in, a dict with the loss out."""

    def __init__(self, model: nn.Module, criterion: Any):
        super().__init__()
        self.model, self.criterion = model, criterion

    def forward(self, features: Any, labels: Any) -> dict[str, Any]:
        return {"loss": self.criterion(self.model(features), labels)}


def by_transformers(job: Job, **settings: Any) -> None:
    """transformers' Trainer, given its batches by the method that its pages name for that."""
    import torch
    from transformers import Trainer, TrainingArguments

    data = Batches({"features": features, "labels": labels} for features, labels in job.data)

    class FromList(Trainer):
        def get_train_dataloader(self) -> Any:
            return data

    with tempfile.TemporaryDirectory() as folder:
        common = {"use_cpu": True, "save_strategy": "no", "report_to": "none", "max_grad_norm": 0.0}
        arguments = TrainingArguments(folder, num_train_epochs=job.epochs, **common, **settings)
        constant = torch.optim.lr_scheduler.LambdaLR(job.optimizer, lambda step: 1.0)
        trainer = FromList(WithLoss(job.model, job.criterion), arguments, optimizers=(job.optimizer, constant))
        trainer.train()


def by_bare_transformers(job: Job) -> None:
    """Without what can be switched off."""
    off = {"logging_strategy": "no", "disable_tqdm": True, "logging_nan_inf_filter": False}
    by_transformers(job, **off, average_tokens_across_devices=False)


def by_ignite(job: Job, bar: bool = False) -> None:
    """Ignite's supervised trainer; with its bar as its pages attach it."""
    from ignite.engine import create_supervised_trainer

    trainer = create_supervised_trainer(job.model, job.optimizer, job.criterion)
    if bar:
        from ignite.handlers import ProgressBar

        ProgressBar().attach(trainer, output_transform=lambda loss: {"loss": loss})
    trainer.run(job.data, max_epochs=job.epochs)


# Name, the modules that it needs, the loop.
PEERS: list[tuple[str, str, Loop]] = [
    ("Fabric", "lightning", by_fabric),
    ("Ignite", "ignite", by_ignite),
    ("Ignite, with its bar", "ignite", lambda job: by_ignite(job, bar=True)),
    ("Accelerate", "accelerate", by_accelerate),
    ("transformers' Trainer, all off", "transformers accelerate", by_bare_transformers),
    (
        "transformers' Trainer, with its bar",
        "transformers accelerate",
        lambda job: by_transformers(job, disable_tqdm=False),
    ),
    ("Lightning's Trainer, barebones", "lightning", lambda job: by_lightning(job, barebones=True)),
    ("Lightning's Trainer, with its bar", "lightning", by_lightning_with_bar),
]


def timed(loop: Loop, job: Job) -> float:
    """Seconds a step of `loop`, whose output goes where nobody sees it."""
    stamps = stamped(job.model)
    with quiet():
        loop(job)
    assert len(stamps) == job.steps, f"{len(stamps)} steps were made instead of {job.steps}"
    return per_step(stamps, job.warm, job.steps)


@contextmanager
def quiet() -> Iterator[None]:
    """What is written goes to the null device: a bar is drawn all the same."""
    with ExitStack() as stack:
        null = stack.enter_context(Path(os.devnull).open("w"))
        stack.enter_context(redirect_stdout(null))
        stack.enter_context(redirect_stderr(null))
        stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore")
        yield


def importable(modules: str) -> bool:
    """Whether a peer is installed, by importing it: this is not measured."""
    try:
        with quiet():
            for module in modules.split():
                importlib.import_module(module)
    except ImportError:
        return False
    return True


def main() -> None:
    """Measure, and print."""
    parser = add_options(__doc__, repeats=5, quick=1)
    parser.add_argument("--steps", type=int, default=None, help="of each training  [1600]")
    add_cpu_time(parser)
    options = parsed(parser)
    if options.cpu_time:
        use_cpu_time()
    steps = options.steps or (16 if options.quick else 1600)
    logging.disable(logging.WARNING)  # of what is missing for a GPU, or a schedule
    there = [(name, loop) for name, modules, loop in PEERS if importable(modules)]
    contestants: dict[str, Callable[[], float]] = {"by hand": lambda: by_hand(mlp(steps))}
    contestants["fivestep: fs.train"] = lambda: by_train(mlp(steps))
    contestants["fivestep: fs.fit, with its bar"] = lambda: by_fit(mlp(steps))
    contestants |= {name: (lambda loop=loop: timed(loop, mlp(steps))) for name, loop in there}
    found = alternate(contestants, options.repeats)
    report(options, figures(found))


def figures(found: dict[str, list[float]]) -> list[Figure]:
    """The step of each against the one by hand, and what it adds; a peer that is missing is named."""
    hand = found.pop("by hand")
    rows = [figure(name, seconds, "µs", against=hand, scale=1e6) for name, seconds in found.items()]
    for name, seconds in found.items():
        extra = [mine - bare for mine, bare in zip(seconds, hand, strict=True)]
        rows.append(figure(f"{name}: adds to a step", extra, "µs", scale=1e6))
    missing = [name for name, _, _ in PEERS if name not in found]
    return rows + [skipped(name, "not installed (the extra peers)") for name in missing]


if __name__ == "__main__":
    main()
