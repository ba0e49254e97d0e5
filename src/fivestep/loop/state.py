"""The one object that must survive: everything that a step changes.

Nothing else may change between steps. `state_dict()` holds tensors, numbers, strings, None, lists and dicts only;
`load_state_dict()` puts it back so that the next step is the one that would have followed. Writing it to a disk is
not done here.
"""

import random
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, field, fields
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from fivestep.errors import UsageError, named
from fivestep.loop.average import Average
from fivestep.loop.batch import parts, rebuilt
from fivestep.loop.clock import Clock
from fivestep.loop.mean import Mean
from fivestep.loop.plateau import Plateau
from fivestep.loop.precision import LossScale


@dataclass(slots=True)
class State:
    """Model, optimizers, schedulers, clock, stream position, carry and running averages of one training.

    `TrainStep` makes it, and takes one back as `state=`, for the same model and optimizers.
    """

    model: nn.Module
    optimizers: list[Optimizer]
    schedulers: list[Any] = field(default_factory=list)  # torch's; a pure function has no state
    criterion: nn.Module | None = None  # where it has parameters or buffers of its own
    clock: Clock = field(default_factory=Clock)
    position: int = 0  # micro-batches drawn in the current epoch
    carry: Any = None  # what the next batch needs of the last (hidden state, detached)
    epoch_loss: Mean = field(default_factory=Mean)  # since the epoch's start
    logged_loss: Mean = field(default_factory=Mean)  # since the last training row
    epoch_random: dict[str, Any] | None = None  # random states before a user's loader was iterated, this epoch
    plateau: Plateau = field(default_factory=Plateau)  # what validation reached, and the annealing factor
    average: Average | None = None  # averaged weights, where they are kept
    loss_scale: LossScale | None = None  # of fp16
    skipped: list[dict[str, Any]] = field(default_factory=list)  # steps left out: epoch (from 0), position, batches
    updating: bool = False  # inside an update: the weights belong to no step, and nothing may be saved

    def is_skipped(self, batches: int) -> bool:
        """Whether the next so many `batches` stand in `skipped`: once left out, a step is left out again."""
        here = (self.clock.epoch, self.position, batches)
        return any((one["epoch"], one["position"], one["batches"]) == here for one in self.skipped)

    def skip(self, batches: int, figures: dict[str, Any]) -> None:
        """Note that the next so many `batches` were left out, with what was found."""
        here = {"epoch": self.clock.epoch, "position": self.position, "batches": batches}
        self.skipped.append({**here, **figures})

    def averaged(self) -> AbstractContextManager[None]:
        """Inside, the model holds the weights to evaluate, sample and keep: the averaged ones, where there are."""
        return nullcontext() if self.average is None else self.average.in_place()

    def keep_best(self) -> None:
        """Remember the weights, and what the optimizers know of them, as the best so far."""
        self.plateau.best = _copied(
            {
                "model": self.model.state_dict(),
                "criterion": self.criterion.state_dict() if self.criterion is not None else {},
                "optimizers": [optimizer.state_dict()["state"] for optimizer in self.optimizers],
                "average": self.average.state_dict() if self.average else None,
            }
        )

    def return_to_best(self) -> None:
        """Put back what `keep_best` remembered; learning rates, clock, order and random states go on."""
        best = _copied(self.plateau.best)
        if best is not None:
            self.model.load_state_dict(best["model"])
            if self.criterion is not None:
                self.criterion.load_state_dict(best["criterion"])
            for optimizer, state in zip(self.optimizers, best["optimizers"], strict=True):
                groups = optimizer.state_dict()["param_groups"]  # as they are: a scheduler counts on its own rates
                optimizer.load_state_dict({"state": state, "param_groups": groups})
            if self.average is not None:
                self.average.load_state_dict(best["average"])

    def state_dict(self) -> dict[str, Any]:
        """A snapshot, copied: later steps do not change it. Reads the device."""
        return {
            "model": _copied(self.model.state_dict()),
            "optimizers": [_copied(optimizer.state_dict()) for optimizer in self.optimizers],
            "schedulers": [_copied(scheduler.state_dict()) for scheduler in self.schedulers],
            "criterion": _copied(self.criterion.state_dict()) if self.criterion is not None else {},
            "clock": {f.name: getattr(self.clock, f.name) for f in fields(Clock)},
            "position": self.position,
            "carry": _copied(self.carry),
            "epoch_loss": self.epoch_loss.state_dict(),
            "logged_loss": self.logged_loss.state_dict(),
            "epoch_random": _copied(self.epoch_random),
            "plateau": _copied({f.name: getattr(self.plateau, f.name) for f in fields(Plateau)}),
            "average": self.average.state_dict() if self.average else None,
            "loss_scale": asdict(self.loss_scale) if self.loss_scale else None,
            "skipped": _copied(self.skipped),
            "random": random_state(),
        }

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        """Put a snapshot back, random states included."""
        self.model.load_state_dict(saved["model"])
        for optimizer, state in zip(self.optimizers, saved["optimizers"], strict=True):
            optimizer.load_state_dict(_copied(state))
        for scheduler, state in zip(self.schedulers, saved["schedulers"], strict=True):
            scheduler.load_state_dict(_copied(state))
        if self.criterion is not None:
            self.criterion.load_state_dict(saved["criterion"])
        for name, value in saved["clock"].items():
            setattr(self.clock, name, value)
        self.position, self.carry = saved["position"], _copied(saved["carry"])
        self.epoch_loss.load_state_dict(saved["epoch_loss"])
        self.logged_loss.load_state_dict(saved["logged_loss"])
        self.epoch_random, self.updating = _copied(saved["epoch_random"]), False
        self.plateau = Plateau(**_copied(saved["plateau"]))
        if (self.average is None) != (saved["average"] is None):
            raise UsageError(
                "the saved state and this training differ in averaged weights: give the same ema (--ema)"
            )
        if self.average is not None:
            self.average.load_state_dict(saved["average"])
        self.skipped = _copied(saved["skipped"])
        if self.loss_scale is not None and saved["loss_scale"] is not None:
            self.loss_scale = LossScale(**saved["loss_scale"])
        restore_random_state(saved["random"])


def state_of(
    given: State | None, model: nn.Module, criterion: Any, optimizers: list[Optimizer], schedulers: list[Any]
) -> State:
    """A new state, or the one given, which must be of these very objects."""
    own = criterion if isinstance(criterion, nn.Module) and criterion.state_dict() else None
    if given is None:
        return State(model, optimizers, schedulers, own)
    if not isinstance(given, State):
        raise UsageError(f"state is {named(given)}; it must be a fivestep.State, such as a StepResult's")
    held = [given.model, given.criterion, *given.optimizers, *given.schedulers]
    wanted = [model, own, *optimizers, *schedulers]
    if len(held) != len(wanted) or any(old is not new for old, new in zip(held, wanted, strict=True)):
        raise UsageError(
            "state= belongs to another model, criterion, optimizer or scheduler: "
            "take TrainStep(...).state of these, and its load_state_dict"
        )
    return given


def random_state() -> dict[str, Any]:
    """The states of every global generator: Python's, NumPy's, torch's, and each device's that is in use."""
    version, words, gauss = random.getstate()
    legacy: dict[str, Any] = np.random.get_state(legacy=False)
    key = torch.from_numpy(legacy["state"]["key"].astype(np.int64))
    return {
        "python": {"version": version, "words": list(words), "gauss": gauss},
        "numpy": {**legacy, "state": {**legacy["state"], "key": key}},
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        "mps": torch.mps.get_rng_state() if torch.backends.mps.is_available() else None,
    }


def restore_random_state(saved: dict[str, Any]) -> None:
    """Put back what `random_state` returned."""
    python, legacy = saved["python"], saved["numpy"]
    random.setstate((python["version"], tuple(python["words"]), python["gauss"]))
    key = legacy["state"]["key"].numpy().astype(np.uint32)
    np.random.set_state({**legacy, "state": {**legacy["state"], "key": key}})
    torch.set_rng_state(saved["torch"])
    if saved["cuda"]:
        torch.cuda.set_rng_state_all(saved["cuda"])
    if saved["mps"] is not None:
        torch.mps.set_rng_state(saved["mps"])


def _copied(value: Any) -> Any:
    return value.detach().clone() if isinstance(value, Tensor) else rebuilt(value, [_copied(v) for v in parts(value)])
