"""Checkpoints written while training goes on.

    snapshot (training waits) -> a thread: metrics fsynced, checkpoint written, older ones pruned -> "saved"

The snapshot is complete before `save` returns, so later steps cannot mix into it. Never more than one deep: the next
save waits for the last. Of several processes the first writes; where the model is in shards each has such a thread
and writes what it holds, and what these threads tell each other goes through a group of their own. Owns the threads
and which checkpoints stay; the format is `checkpoint.py`'s.
"""

import os
import shutil
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from fivestep import processes
from fivestep.errors import FivestepError, UsageError
from fivestep.loop.batch import whole
from fivestep.loop.canonical_names import weights_of
from fivestep.loop.copies import Copies
from fivestep.loop.state import State
from fivestep.run.checkpoint import Checkpoint, best_of, prune, save_checkpoint, save_shards
from fivestep.run.shards import snapshot, supported
from fivestep.watchdog import looks_broken


def checkpoint_bytes(state: State) -> int:
    """About what a checkpoint takes, before the optimizers have a state of their own, too."""
    weights: int = sum(value.nbytes for value in state.model.state_dict().values())
    trained = [p for optimizer in state.optimizers for group in optimizer.param_groups for p in group["params"]]
    moments: int = sum(p.nbytes for p in trained if p.requires_grad) * max(map(_moments, state.optimizers))
    average: int = sum(weight.nbytes for weight in state.average.weights)
    return weights + moments + 2 * average  # the averaged weights are kept as they are used, too


def _moments(optimizer: Optimizer) -> int:
    """Tensors of a parameter's size that an optimizer keeps of it: two, but for these."""
    name, settings = type(optimizer).__name__, optimizer.defaults
    if name == "SGD":
        return 1 if settings.get("momentum") else 0
    return 1 if name in ("Adagrad", "Lion", "Muon", "Adafactor") else 2


class Saver:
    """Writes checkpoints into `folder`.

    Keeps the `keep_last` newest, the best, and one for every multiple of `keep_every` steps.
    """

    def __init__(self, folder: Path, keep_last: int, keep_every: int | None):
        self.folder, self.keep_last, self.keep_every = folder, keep_last, keep_every
        self.thread: threading.Thread | None = None
        self.error: BaseException | None = None
        self.pace = threading.Lock()
        self.hurried = False  # somebody waits for what is being written
        self.spare: list[Tensor] = []  # memory of the last snapshot, which is written by then
        self.side: Any = None  # of several processes: the group of their threads

    def save(self, state: State, run: dict[str, Any], val_loss: float | None, first: Callable[[], None]) -> None:
        """Take a snapshot and begin to write it. `run` is saved with it; `first` is called before all writing.

        Raises what the last save failed with: nothing is lost silently.
        """
        self.wait()
        copies = Copies("cpu", self.spare)
        parallel = state.parallel
        if parallel is not None and parallel.sharded and processes.size() > 1 and supported():
            self._save_shards(state, run, val_loss, first, copies)
            return
        if parallel is not None and not parallel.sharded and not processes.is_first():
            state.live()  # takes part in what all give; another has all the rest
            return
        tree: dict[str, Any] = {**state.state_dict(copies), "run": run}
        weights = tree["model"]
        if state.average:
            with state.averaged():
                held = weights_of(state.model)
                weights = Copies("cpu").of(held if parallel is None else whole(held))
        if not processes.is_first():
            return
        step = state.clock.step

        def write() -> None:
            first()
            save_checkpoint(self.folder, weights, tree, step, val_loss)

        self._begin(write, copies)

    def _save_shards(
        self, state: State, run: dict[str, Any], val_loss: float | None, first: Any, copies: Copies
    ) -> None:
        """The same in each of the processes, of what it holds."""
        if self.side is None:
            self.side = processes.side_group()
        tree: dict[str, Any] = {**state.live(), "run": run}
        if not state.average:
            weights = snapshot(tree["model"], copies)
            rest = snapshot({**tree, "model": None}, copies)
        else:
            with state.averaged():
                weights = snapshot(weights_of(state.model), Copies("cpu"))  # in the same memory as the others
            rest = snapshot(tree, copies)
        step, tell = state.clock.step, partial(processes.from_all, group=self.side)
        self._begin(lambda: save_shards(self.folder, weights, rest, step, val_loss, first, tell), copies)

    def _begin(self, write: Callable[[], None], copies: Copies) -> None:
        self.spare = list(copies.made.values())
        # Not a daemon: a process that is made to end waits for what is being written.
        thread = threading.Thread(target=self._work, args=(write,), name="fivestep-save", daemon=False)
        try:
            thread.start()
        except RuntimeError:  # no more threads here: training waits
            self._write(write)
        else:
            self.thread = thread

    def _work(self, write: Callable[[], None]) -> None:
        with self.pace:
            if not self.hurried:
                give_way(True)
        self._write(write)

    def _write(self, write: Callable[[], None]) -> None:
        try:
            write()
            if processes.is_first():
                prune(self.folder, self.kept)
        except BaseException as error:  # told by the thread that waits
            self.error = error

    def kept(self, found: list[Checkpoint]) -> set[Path]:
        """The newest, the best, and those worth keeping; of one step, its newest."""
        steps = {one.step: one for one in found}  # oldest first: the newest of a step stays
        best = best_of(found)
        kept = [
            *list(steps.values())[-self.keep_last :],
            *(one for one in steps.values() if self.keep_every and one.step % self.keep_every == 0),
        ]
        return {one.path for one in [*kept, *([best] if best else [])]}

    def check_room(self, state: State) -> None:
        """Raise UsageError where the disk has no room for what will be kept, and the one that is being written."""
        size, there = checkpoint_bytes(state), list(self.folder.glob("step-*"))
        missing = max(0, self.keep_last + 2 - len(there))  # the newest, the best, the next
        free = shutil.disk_usage(next(path for path in (self.folder, *self.folder.parents) if path.exists())).free
        if missing * size > free:
            raise UsageError(
                f"checkpoints of about {size / 1e9:,.2f} GB need room for {missing} in {self.folder}, and "
                f"{free / 1e9:,.2f} GB are free; make room, train into another --run-dir, or lower --keep-last"
            )

    def failing(self) -> bool:
        """Whether what was begun has failed; waits for it."""
        if self.thread is not None:
            with self.pace:
                self.hurried = True
                give_way(False, self.thread.native_id)
            self.thread.join()
            self.thread, self.hurried = None, False
        return self.error is not None

    def failed(self) -> FivestepError | None:
        """What the last save failed with, told once; waits for it."""
        if not self.failing():
            return None
        error, self.error = self.error, None
        if error is not None and looks_broken(error):
            raise error  # another process is gone: nothing to try again
        return error if isinstance(error, FivestepError) else FivestepError(f"cannot save: {error}")

    def wait(self) -> None:
        """Until what was begun is durable. Raises what it failed with."""
        error = self.failed()
        if error is not None:
            raise error


def give_way(way: bool, thread: int | None = None) -> None:
    """Let a thread run only where the cores have nothing else to do, or as any other again.

    On Linux, where threads have priorities of their own. Who may not take it back gives less way: on cores that are
    always busy the idle wait for ever.
    """
    if sys.platform != "linux":
        return
    thread = thread or threading.get_native_id()
    with suppress(OSError, ImportError):
        import resource

        if os.geteuid() == 0 or resource.getrlimit(resource.RLIMIT_NICE)[0] >= 20:
            os.sched_setscheduler(thread, os.SCHED_IDLE if way else os.SCHED_OTHER, os.sched_param(0))
        elif way:
            os.setpriority(os.PRIO_PROCESS, thread, 10)
