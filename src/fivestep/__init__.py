"""fivestep: the PyTorch training loop, done right once. Your model, your data, five steps, nothing hidden.

    import fivestep as fs
    history = fs.fit(model, train_loader, criterion, optimizer, epochs=20, val=val_loader)

The names below are all there is to learn. They are imported when first used, so that `fivestep --help` and
`import fivestep` do not pay for torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fivestep.errors import FivestepError, NonFiniteError, UsageError
    from fivestep.fitting import fit
    from fivestep.loop.evaluate import accuracy, evaluate
    from fivestep.loop.language import NextToken, TruncatedBPTT
    from fivestep.loop.objective import Supervised
    from fivestep.loop.result import StepResult
    from fivestep.loop.schedule import warmup_cosine, warmup_linear, warmup_stable_decay
    from fivestep.loop.state import State
    from fivestep.loop.step import TrainStep
    from fivestep.loop.train import train
    from fivestep.run.loaded import load
    from fivestep.run.run import Run, load_weights

__version__ = "0.1.0"

_HOMES = {
    "fit": "fivestep.fitting",
    "train": "fivestep.loop.train",
    "evaluate": "fivestep.loop.evaluate",
    "TrainStep": "fivestep.loop.step",
    "StepResult": "fivestep.loop.result",
    "State": "fivestep.loop.state",
    "Supervised": "fivestep.loop.objective",
    "NextToken": "fivestep.loop.language",
    "TruncatedBPTT": "fivestep.loop.language",
    "accuracy": "fivestep.loop.evaluate",
    "warmup_cosine": "fivestep.loop.schedule",
    "warmup_linear": "fivestep.loop.schedule",
    "warmup_stable_decay": "fivestep.loop.schedule",
    "Run": "fivestep.run.run",
    "load": "fivestep.run.loaded",
    "load_weights": "fivestep.run.run",
    "FivestepError": "fivestep.errors",
    "UsageError": "fivestep.errors",
    "NonFiniteError": "fivestep.errors",
}
__all__ = [
    "FivestepError",
    "NextToken",
    "NonFiniteError",
    "Run",
    "State",
    "StepResult",
    "Supervised",
    "TrainStep",
    "TruncatedBPTT",
    "UsageError",
    "accuracy",
    "evaluate",
    "fit",
    "load",
    "load_weights",
    "train",
    "warmup_cosine",
    "warmup_linear",
    "warmup_stable_decay",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'fivestep' has no attribute '{name}'")
    value = getattr(import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*__all__, "__version__"])
