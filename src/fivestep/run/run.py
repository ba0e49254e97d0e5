"""A run: a directory that holds what was trained, how, and with what result.

    config.toml  environment.json  tokenizer.json  metrics.jsonl  checkpoints/  samples/

Owns the directory: its files, its weights, its lock, and Ctrl-C while it is being filled. The loop does not know it:
a `Run` is a watcher like any other.
"""

import signal
import threading
from glob import escape
from itertools import count
from pathlib import Path
from types import FrameType
from typing import Any

from torch import nn

from fivestep.data.files import expanded, written_whole
from fivestep.errors import FivestepError, NonFiniteError, UsageError
from fivestep.fitting import Row
from fivestep.loop.state import State
from fivestep.loop.step import StepResult
from fivestep.run.checkpoint import check_saveable, checkpoints, find, load_checkpoint, save_checkpoint
from fivestep.run.metrics import append_rows
from fivestep.run.running import hold, release

CONFIG, ENVIRONMENT, TOKENIZER, METRICS = "config.toml", "environment.json", "tokenizer.json", "metrics.jsonl"


class Run:
    """A run's directory, and the watcher that fills it.

        with fs.Run("runs/mine") as run:
            fs.fit(..., watchers=[run])

    Rows go to metrics.jsonl; the weights are saved at each validation, at the end, and after a Ctrl-C, and the last
    and the best are kept (`fs.load_weights`): the averaged ones with `ema=`, and as they were validated, before a
    return `to_best`. Raises UsageError where the directory already holds something.
    """

    def __init__(self, path: str | Path):
        self.path = expanded(path)
        self.metrics, self.checkpoints = self.path / METRICS, self.path / "checkpoints"
        try:
            if self.metrics.exists():
                raise UsageError(f"{self.path} already holds a run; give another --run-dir, or remove it")
            if self.path.exists() and any(self.path.iterdir()):
                raise UsageError(f"{self.path} is not empty and holds no run; give another --run-dir")
            self.path.mkdir(parents=True, exist_ok=True)
            self.metrics.touch(exist_ok=False)  # of two that start at once, one wins
        except FileExistsError as error:
            raise UsageError(f"{self.path} is taken; give another --run-dir") from error
        except OSError as error:
            reason = error.strerror or error
            raise UsageError(f"cannot make the run's directory {self.path}: {reason} (--run-dir)") from error
        self.result: StepResult | None = None
        self.interrupted = False
        self.before: Any = None  # the caller's own SIGINT handler
        self.lock: Any = None  # held from `__enter__` to `__exit__`

    @classmethod
    def numbered(cls, name: str, parent: Path = Path("runs")) -> "Run":
        """The next free `runs/NAME-N`."""
        taken = max((_number(path, name) for path in parent.glob(f"{escape(name)}-*")), default=0)
        for free in count(taken + 1):
            path = parent / f"{name}-{free}"
            try:
                path.mkdir(parents=True)
            except FileExistsError:  # another run took it just now
                continue
            except OSError as error:
                raise UsageError(f"cannot make {path}: {error.strerror or error}; give --run-dir") from error
            return cls(path)
        raise AssertionError("unreachable")

    def __call__(self, result: StepResult, rows: list[Row]) -> None:
        """Keep the rows; save where there is a validation among them. Ctrl-C takes effect here, between two steps."""
        if self.result is None:
            check_saveable(result.state.model)
        elif result.state is not self.result.state:
            raise UsageError(f"{self.path} already holds a training; give the next one a fs.Run of its own")
        self.result = result
        self.record(rows)
        losses = [row["loss"] for row in rows if row["split"] == "val"]
        if losses:
            self.save(result.state, losses[-1])
        if self.interrupted:
            raise KeyboardInterrupt

    def record(self, rows: list[Row]) -> None:
        """Append rows to metrics.jsonl."""
        try:
            append_rows(self.metrics, rows)
        except OSError as error:
            raise FivestepError(f"cannot write {self.metrics}: {error.strerror or error}") from error

    def save(self, state: State, val_loss: float | None) -> None:
        """Save the weights that a validation judges: the averaged ones, where there are."""
        with state.averaged():
            save_checkpoint(self.checkpoints, state.model, state.clock.step, val_loss)

    def write(self, name: str, text: str) -> None:
        """Write a file of the run, whole."""
        try:
            with written_whole(self.path / name) as file:
                file.write(text.encode("utf-8"))
        except OSError as error:
            raise FivestepError(f"cannot write {self.path / name}: {error.strerror or error}") from error

    def discard(self) -> None:
        """Remove a run that never made a step: nothing half-made is left."""
        for name in (CONFIG, ENVIRONMENT, TOKENIZER, METRICS):
            (self.path / name).unlink(missing_ok=True)
        if not any(self.path.iterdir()):
            self.path.rmdir()

    def __enter__(self) -> "Run":
        """From here the first Ctrl-C ends training after the step in hand; a second one stops at once."""

        def note(number: int, frame: FrameType | None) -> None:
            self.interrupted = True
            signal.signal(signal.SIGINT, self.before)

        if _interruptible():
            self.before = signal.signal(signal.SIGINT, note)
        self.lock = hold(self.path)
        return self

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        """Save the last step's weights, unless an error struck inside an update and left them half changed."""
        if self.before is not None:
            signal.signal(signal.SIGINT, self.before)
            self.before = None
        try:
            self.end(error)
        finally:
            release(self.path, self.lock)

    def end(self, error: BaseException | None) -> None:
        """Note how training ended, and save what is not saved yet."""
        if self.result is None:
            return
        state = self.result.state
        if error is not None:
            event = "nonfinite" if isinstance(error, NonFiniteError) else "interrupted"
            row = {"event": event, "step": state.clock.step, "message": str(error) or type(error).__name__}
            self.record([{**row, "details": error.details} if isinstance(error, NonFiniteError) else row])
        saved = [one.step for one in checkpoints(self.checkpoints)]
        if not state.updating and state.clock.step not in saved:
            self.save(state, None)


def _interruptible() -> bool:
    """Handlers belong to the main thread; an ignored SIGINT (a job in a shell's background) stays ignored."""
    main = threading.current_thread() is threading.main_thread()
    return main and signal.getsignal(signal.SIGINT) not in (signal.SIG_IGN, None)


def _number(path: Path, name: str) -> int:
    suffix = path.name.removeprefix(f"{name}-")
    return int(suffix) if suffix.isdecimal() else 0


def load_weights(path: str | Path, model: nn.Module, which: str = "best") -> int:
    """Copy the `best` or `last` weights of the run at `path` into `model`; returns their step."""
    checkpoint = find(expanded(path) / "checkpoints", which)
    if checkpoint is None:
        raise UsageError(f"{path} holds no checkpoint: the run ended before its first validation")
    load_checkpoint(checkpoint, model)
    return checkpoint.step
