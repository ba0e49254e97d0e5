"""The one object that must survive: everything that a step changes.

Nothing else may change between steps. `state_dict()` holds tensors, numbers, strings, None, lists and dicts only;
`load_state_dict()` puts it back so that the next step is the one that would have followed. Writing it to a disk is
not done here.
"""

import random
from dataclasses import dataclass, field, fields
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from fivestep.loop.clock import Clock
from fivestep.loop.mean import Mean


@dataclass(slots=True)
class State:
    """Model, optimizers, schedulers, clock, stream position, carry and running averages of one training."""

    model: nn.Module
    optimizers: list[Optimizer]
    schedulers: list[Any] = field(default_factory=list)  # torch's; a pure function has no state
    clock: Clock = field(default_factory=Clock)
    position: int = 0  # micro-batches drawn in the current epoch
    carry: Any = None  # what the next batch needs of the last (hidden state, detached)
    epoch_loss: Mean = field(default_factory=Mean)  # since the epoch's start
    logged_loss: Mean = field(default_factory=Mean)  # since the last training row

    def state_dict(self) -> dict[str, Any]:
        """A snapshot, copied: later steps do not change it. Reads the device."""
        return {
            "model": _copied(self.model.state_dict()),
            "optimizers": [_copied(optimizer.state_dict()) for optimizer in self.optimizers],
            "schedulers": [_copied(scheduler.state_dict()) for scheduler in self.schedulers],
            "clock": {f.name: getattr(self.clock, f.name) for f in fields(Clock)},
            "position": self.position,
            "carry": _copied(self.carry),
            "epoch_loss": self.epoch_loss.state_dict(),
            "logged_loss": self.logged_loss.state_dict(),
            "random": random_state(),
        }

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        """Put a snapshot back, random states included."""
        self.model.load_state_dict(saved["model"])
        for optimizer, state in zip(self.optimizers, saved["optimizers"], strict=True):
            optimizer.load_state_dict(_copied(state))
        for scheduler, state in zip(self.schedulers, saved["schedulers"], strict=True):
            scheduler.load_state_dict(_copied(state))
        for name, value in saved["clock"].items():
            setattr(self.clock, name, value)
        self.position, self.carry = saved["position"], _copied(saved["carry"])
        self.epoch_loss.load_state_dict(saved["epoch_loss"])
        self.logged_loss.load_state_dict(saved["logged_loss"])
        restore_random_state(saved["random"])


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


def _copied(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.detach().clone()
    if isinstance(value, dict):
        return {key: _copied(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)([_copied(item) for item in value])
    return value
