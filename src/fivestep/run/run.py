"""A run: a directory that holds what was trained, how, and with what result, and from which it goes on.

    config.toml  environment.json  tokenizer.json  metrics.jsonl  checkpoints/  samples/

Owns the directory: its files, its checkpoints, its lock, and when to save. The loop calls `attach` once, `keep`
whenever a step is asked for, `record` with the rows, `finish` at the end; it knows no file.
"""

import os
import stat
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace
from glob import escape
from itertools import count
from pathlib import Path
from typing import IO, Any

from torch import nn

from fivestep import processes
from fivestep.data.files import expanded, make_folder, write_durably
from fivestep.errors import FivestepError, NonFiniteError, UsageError, brief, visible
from fivestep.interrupts import is_agreed, noticed, poll, save_wanted, take_over
from fivestep.loop.clock import Clock, Limit, Trigger
from fivestep.loop.settings import Change, adopt, changes, changes_of_options, is_of_model, listed, refusal
from fivestep.loop.state import State
from fivestep.run.checkpoint import (
    DamagedError,
    Layout,
    check_saveable,
    first_sound,
    load_checkpoint,
    load_state,
    misnamed,
    newest_first,
    read_manifest,
    remove_leftovers,
    verify,
)
from fivestep.run.export import is_export, load_export
from fivestep.run.launch import LAUNCH, begun_before, mark
from fivestep.run.metrics import append_rows, cut_rows, known_rows, readable_rows, sync_rows
from fivestep.run.names import CONFIG, ENVIRONMENT, METRICS, TOKENIZER
from fivestep.run.running import RUNNING, TakenError, hold, release
from fivestep.run.saving import Saver
from fivestep.run.trace import Trace
from fivestep.run.tree import flattened

EARLIER = "metrics.earlier.jsonl"
SKIPPED = "skipped.jsonl"
CHECKPOINT_EVERY = "5min"
MOST_FACTS = 1 << 20  # bytes of environment.json
Row = dict[str, Any]


def silent(text: str) -> None:
    """Tell nobody: another process does."""


def to_stderr(text: str) -> None:
    """Tell a person."""
    print(f"fivestep: {visible(text)}", file=sys.stderr, flush=True)


class Run:
    """A run's directory: it keeps the metrics and the whole state, and a second start goes on where the first ended.

        with fs.Run("runs/mine") as run:
            fs.fit(..., run=run)                          # or: for info in fs.train(..., run=run): ...

    The state is saved every `checkpoint_every` ("5min" of training, 500, "1ep"), at each validation that is the best
    so far, at the end, after Ctrl-C, SIGTERM (exit 143) and SIGUSR1 (which saves and goes on), and after an error
    between two steps. The `keep_last` newest checkpoints stay, the best, and one for every multiple of `keep_every`
    steps. Killed at any instant, the next start loads the newest that is sound and ends, bit for bit, where the
    uninterrupted training would have (same machine, versions and thread count). `say` is told what a person should
    know. `trace` writes a line a step too, of what it read and its loss (trace.jsonl): two runs can then be compared,
    as `fivestep doctor` does. A start whose settings differ from those of the first (learning rate, batch size, data,
    scheduler, frozen parameters) is refused; with `adopt_changes=True` training continues with the new settings, and
    a row of metrics.jsonl notes them. Raises UsageError for a directory that holds something else, or that another
    process trains in.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        checkpoint_every: int | str | None = CHECKPOINT_EVERY,
        keep_last: int = 2,
        keep_every: int | None = None,
        say: Callable[[str], None] = to_stderr,
        trace: bool = False,
        adopt_changes: bool = False,
    ):
        self.shown, self.say = expanded(path), say  # as it was given; the process may change its folder
        self.path = self.shown.absolute()
        self.metrics, self.checkpoints = self.path / METRICS, self.path / "checkpoints"
        self.due = Trigger(checkpoint_every, "checkpoint_every (--checkpoint-every)")
        for name, value in (("keep_last", keep_last), ("keep_every", keep_every or 1)):
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise UsageError(f"{name} = {value!r} must be a whole number, 1 or more (--{name.replace('_', '-')})")
        self.saver = Saver(self.checkpoints, keep_last, keep_every)
        processes.join_here()
        self.first = processes.is_first()  # of several processes the first writes the files
        if not self.first:
            self.say = silent
        try:
            held = self.metrics.is_file() or bool(newest_first(self.checkpoints))
            if self.first:
                if self.path.exists() and not held and not all(map(_ours, self.path.iterdir())):
                    raise UsageError(f"{self.shown} is not empty and holds no run; give another --run-dir")
                make_folder(self.path)
        except OSError as error:
            reason = error.strerror or error
            raise UsageError(f"cannot make the run's directory {self.shown}: {reason} (--run-dir)") from error
        self.state: State | None = None  # of the training that is attached
        self.saved: Clock | None = None  # of the newest checkpoint
        self.position = 0  # bytes of the metrics that belong to the steps so far
        self.validated: tuple[int, float] | None = None  # step and loss of the last validation
        self.best, self.improved = float("inf"), False  # the best validation; whether it is still to be saved
        self.checked = False  # that all of the state can be saved
        self.journaled = 0  # entries of state.skipped that are written
        self.trainer: int | None = None  # the process that entered, while it is inside
        self.leaving = False  # the last state is being saved
        self.handlers_changed = True  # perhaps: a loader may have started its first worker
        self.lost = False  # rows that could not be written
        self.left_at: int | None = None  # the step after which `break` ended a loop that has no other end
        if trace and processes.announced() > 1:
            raise UsageError("a trace is of one process: leave trace= out, or start without torchrun")
        self.trace = Trace(self.path) if trace else None
        self.closing: ExitStack | None = None
        self.adopt_changes = adopt_changes
        self.options: dict[
            str, Any
        ] = {}  # settings of the caller's own, compared at a resume beside those of the loop
        self.on_load: Callable[[], None] | None = None  # called when a checkpoint is loaded, before a file changes
        self.on_first_step: Callable[[], None] | None = None  # called once, before the first step of this start
        self.changed: list[Change] = []  # settings of this start that differ; noted before its first step

    @classmethod
    def numbered(cls, name: str, parent: Path = Path("runs"), **options: Any) -> "Run":
        """The next free `runs/NAME-N`; of several processes, the first one's.

        Started anew by torchrun it is the one that the earlier round began.
        """
        processes.join_here()
        if not processes.is_first():
            return cls(processes.from_first(None), **options)
        taken = {_number(path, name): path for path in parent.glob(f"{escape(name)}-*")}
        before = [number for number, path in taken.items() if number and begun_before(path)]
        for free in [min(before)] if before else count(max(taken, default=0) + 1):
            path = parent / f"{name}-{free}"
            try:
                make_folder(path, exist_ok=bool(before))
                mark(path)
            except FileExistsError:  # another run took it just now
                continue
            except OSError as error:
                raise UsageError(f"cannot make {path}: {error.strerror or error}; give --run-dir") from error
            return cls(processes.from_first(str(path)) if processes.joined() else path, **options)
        raise AssertionError("unreachable")

    # --- what the loop calls ---

    def attach(self, state: State) -> list[Row]:
        """Put the newest sound checkpoint into `state` and cut the metrics to it; returns the rows up to there.

        Raises UsageError where there are checkpoints and none is sound, or the state is of another training.
        """
        if self.closing is None:
            raise UsageError("enter the run first: with fs.Run(...) as run: ...")
        if self.state is not None and state is not self.state:
            raise UsageError(f"{self.shown} already holds a training; give the next one an fs.Run of its own")
        check_saveable(state.model)
        processes.meet("the start of a run")
        first, self.state = self.state is None, state
        if state.latch is not None:
            state.latch.say = self.say
        if first:
            state.settings = {**state.settings, **self.options} if state.settings else None
            try:
                self.check_seen()
                self.restore(state)
                if self.first:
                    self.saver.check_room(state)
            except BaseException:
                self.state = None  # half loaded: never to be saved
                raise
        rows, damaged = known_rows(self.metrics) if self.first else ([], 0)
        if damaged:
            self.say(f"{self.metrics} is damaged: {damaged:,} of its lines are no rows, and are left out here")
        rows = processes.from_first(rows)
        return [row for row in rows if "event" not in row or "split" in row]

    def tell_ended(self, state: State, stopped_early: bool = False) -> None:
        """Say that the run had come to its end before, so that this start trains nothing, and what to change."""
        if self.saved is not None and state.clock.step and state.begun.step == state.clock.step:
            how, remedy = "already ended", "raise max_iters, epochs or until (--max-iters, --epochs, --until)"
            if stopped_early:
                how, remedy = "stopped early", "raise early_stop (--early-stop), or leave it out"
            self.say(
                f"{self.shown} {how} at step {state.clock.step:,}, so nothing was trained. To train on, {remedy}"
            )

    def check_seen(self) -> None:
        """Raise UsageError, in all, where one of several processes does not see the directory that process 0 sees."""
        if not processes.joined():
            return
        sign = self.path / f".seen-{processes.this_round()}"
        if self.first:
            sign.touch()
        processes.from_first(None)
        told = processes.from_all(None if sign.exists() else f"{self.path.resolve()} of {processes.host()}")
        if self.first:
            sign.unlink(missing_ok=True)
        if apart := [one for one in told if one]:
            raise UsageError(
                f"{apart[0]} is not the run directory of rank 0: give all hosts one that they share, on NFS, Lustre "
                "or a volume that all have mounted (--run-dir)"
            )

    def restore(self, state: State) -> None:
        """The newest sound checkpoint, if there is any, into `state`; the metrics cut to it."""
        saved, changed = self.newest_sound(state.layout()), []
        if saved is not None:
            if isinstance(saved.get("settings"), dict) and state.settings and is_of_model(saved, state.model):
                changed = changes(saved["settings"], state.settings)
                if changed and not self.adopt_changes:
                    raise UsageError(refusal(self.shown, changed))
            try:
                own = saved.pop("run")
                position, self.left_at = checked_position(own), checked_left_at(own)
                if saved.get("settings") is None and (unknown := changes_of_options(state, saved)):
                    changed = unknown if self.adopt_changes else []
                    if not changed:
                        self.say(
                            "this checkpoint is from an earlier version, which did not record its settings. Some "
                            f"optimizer options differ (saved -> yours): {listed(unknown)}. The saved values are "
                            "used. To use yours, give adopt_changes=True (--adopt-changes)"
                        )
                if changed:
                    adopt(state, saved, changed)
                state.load_state_dict(saved)
            except Exception as error:  # torch and a scheduler raise anything
                raise UsageError(
                    f"the checkpoint in {self.shown} does not fit this training: {brief(error)}"
                ) from error
            if self.on_load is not None:
                self.on_load()
            self.position, self.best = position
            self.saved = replace(state.clock)
            self.say(f"goes on after step {state.clock.step:,} (epoch {state.clock.epoch + 1}) of {self.shown}")
        elif self.first and self.metrics.exists() and self.metrics.stat().st_size:
            self.metrics.replace(self.path / EARLIER)
            self.metrics.touch()
            self.say(f"{self.shown} holds no checkpoint: it begins anew, and its rows so far are in {EARLIER}")
        self.known_skipped(state)
        if not self.first:
            return
        try:
            left = cut_rows(self.metrics, self.position)
        except OSError as error:
            raise UsageError(f"cannot write {self.metrics}: {error.strerror or error}") from error
        if left < self.position:
            self.say(
                f"{self.metrics} has lost rows: {left:,} bytes are there of the {self.position:,} that were saved"
            )
            self.position = left
        if self.trace is not None:
            self.trace.cut(state.clock.step)
        self.changed = changed

    def note_changes(self, state: State) -> None:
        """Say, and note in the metrics, with which new settings training goes on."""
        text = f"resumed with changed settings: {listed(self.changed)}"
        self.say(text)
        values = {change.shown: [change.old, change.new] for change in self.changed}
        self.changed = []
        self.record([{"event": "changed", "step": state.clock.step, "message": text, "changes": values}])

    def newest_sound(self, layout: Layout | None = None) -> dict[str, Any] | None:
        """The saved state of the newest checkpoint that is sound, laid out as `layout` is; damaged ones are named.

        Several processes share the looking at digests, and agree: the directory must be in sight of all.
        """
        strange, names = processes.from_first(
            [list(map(str, misnamed(self.checkpoints))), [path.name for path in newest_first(self.checkpoints)]]
        )
        damaged = [f"{path} is no checkpoint: it has been renamed" for path in strange]
        for text in damaged:
            self.say(text)
        for name in names:
            saved, problem = self.loaded(self.checkpoints / name, layout)
            if not problem:
                return saved
            damaged.append(problem)
            self.say(problem)
        if damaged:
            raise UsageError(
                f"no checkpoint of {self.shown} is sound; nothing was changed. To begin anew, train into another "
                "--run-dir"
            )
        return None

    def loaded(self, path: Path, layout: Layout | None) -> tuple[dict[str, Any] | None, str | None]:
        """What is saved in `path`, of what lies in shards this process's part, or, in all, what is damaged there."""
        saved, problem = None, None
        try:
            checkpoint = read_manifest(path)
            verify(checkpoint, list(checkpoint.files)[processes.rank() :: processes.size()])
            saved = load_state(checkpoint, verified=True, layout=layout)
        except DamagedError as error:
            problem = str(error)
        problems = [one for one in processes.from_all(problem) if one]
        return saved, problems[0] if problems else None

    def before_step(self, state: State, window: list[Any]) -> None:
        """The next step will read `window`."""
        if self.changed:
            self.note_changes(state)
        if self.on_first_step is not None:
            self.on_first_step()
            self.on_first_step = None
        if self.handlers_changed:
            take_over()
            self.handlers_changed = False
        state.before_step()
        if self.trace is not None:
            self.trace.begin(state, window)

    def before_drawing(self, state: State) -> None:
        """Remember what drawing the next window uses up."""
        state.before_drawing()

    def keep(self, state: State) -> None:
        """Between two steps: save where that is due, and leave where an end was asked for."""
        if self.closing is None:
            raise UsageError(f"{self.shown} was left: its with block has ended, and another process may train it")
        if self.trace is not None:
            self.trace.end(state)
        if len(state.skipped) > self.journaled:
            self.tell_skipped(state)
        poll()  # what is not saved yet is, on the way out
        if not self.checked and state.clock.step:
            flattened(state.parts())  # what cannot be saved is refused now, not at the first save
            self.checked = True
        wanted, since = save_wanted(), self.saved or state.begun
        if self.saver.error and processes.joined():
            self.saver.wait()  # raises: what one process tries again, the others would not
        if wanted or self.saver.error or self.improved or self.due.due(since, state.clock):
            self._save(state)
            if wanted:
                self.saver.wait()
                self.say(f"saved step {state.clock.step:,} in {self.shown}")

    def tell_skipped(self, state: State) -> None:
        """Write down each step that was left out, once: a restart from before it leaves it out again."""
        for entry in state.skipped[self.journaled :]:
            first, last = entry["position"], entry["position"] + entry["batches"] - 1
            batches = f"batch {first}" if first == last else f"batches {first} to {last}"
            figures = f"the loss is {entry['loss']}, the gradient norm {entry['grad_norm']}"
            text = f"skipped {batches} of epoch {entry['epoch'] + 1}, for step {entry['step']}: {figures}"
            self.say(text)
            try:
                if self.first:
                    append_rows(self.path / SKIPPED, [entry])
            except OSError as error:
                raise FivestepError(f"cannot write {self.shown / SKIPPED}: {error.strerror or error}") from error
            self.record([{"event": "skipped", "message": text, **entry}])
        self.journaled = len(state.skipped)

    def known_skipped(self, state: State) -> None:
        """Add what the journal knows beyond the saved state."""
        written = readable_rows(self.path / SKIPPED) if self.first and (self.path / SKIPPED).exists() else []
        if written := processes.from_first(list(written)):
            keys = ("epoch", "position", "batches")
            known = {tuple(entry[key] for key in keys) for entry in state.skipped}
            for row in written:
                place = tuple(row.get(key) for key in keys)
                if all(type(number) is int for number in place) and place not in known:
                    state.skipped.append(row)
        self.journaled = len(state.skipped)

    def record(self, rows: list[Row], counted: bool = True) -> None:
        """Append rows to metrics.jsonl. Not `counted`: rows that a resume makes again, or events of this end."""
        if not rows:
            return
        self.handlers_changed = True
        try:
            size = append_rows(self.metrics, rows) if self.first else 0
        except OSError as error:
            self.lost = counted  # a state that says these rows are there must not be saved
            raise FivestepError(f"cannot write {self.metrics}: {error.strerror or error}") from error
        if counted:
            self.position = size
        for row in rows:
            if counted and row.get("split") == "val" and not row.get("to_best"):  # else these weights are gone
                self.validated = row["step"], row["loss"]
                if row["loss"] < self.best:
                    self.best, self.improved = row["loss"], True

    def save(self, state: State) -> None:
        """Begin to save the state as it is now: of several processes all must call it."""
        processes.meet(f"a checkpoint of step {state.clock.step}")
        self._save(state)

    def _save(self, state: State) -> None:
        step = state.clock.step
        val_loss = self.validated[1] if self.validated is not None and self.validated[0] == step else None
        position = {"metrics": self.position, "best": self.best, "left_at": self.left_at}
        failed = self.saver.failed()
        if failed is not None:  # once more; if that fails too, training ends
            self.say(f"{failed}; trying again")
        self.saver.save(state, position, val_loss, lambda: sync_rows(self.metrics))
        self.improved, self.saved = False, replace(state.clock)
        if failed is not None:
            self.saver.wait()

    def finish(self, state: State) -> None:
        """At the end of training: what is not saved yet is, durably, when this returns."""
        if self.trainer != os.getpid():
            return
        if self.trace is not None:
            self.trace.end(state)
        if self.half_made(state) or state.updating:
            self.say(f"step {state.clock.step + 1} was broken off inside: the last checkpoint is kept as it is")
            self.saver.wait()
            return
        unsaved = self.improved or self.saved != state.clock or self.saver.failing()
        if not (state.updating or self.lost) and state.clock.step and unsaved:
            self._save(state)
            if self.saver.failing() and not processes.joined():
                self._save(state)  # once more
        self.saver.wait()

    def half_made(self, state: State) -> bool:
        """Whether a step was broken off that changes more than weights: the statistics of a batch norm, for one."""
        owners = [state.model, *([state.criterion] if state.criterion is not None else [])]
        saved = [value for owner in owners for value in owner.state_dict(keep_vars=True).values()]
        return state.inside and any(not (isinstance(v, nn.Parameter) and v.requires_grad) for v in saved)

    @contextmanager
    def saved_at_the_end(self, state: State, limit: Limit) -> Iterator[None]:
        """`finish` after the block, and where a caller's `for` is left by `break`; not after an error.

        limit: where the loop ends by itself. A loop without one is complete when it is left by `break`.
        """
        if limit.reached(state.clock):
            self.tell_ended(state)
        try:
            yield
        except GeneratorExit:
            if not limit.ends and self.left_at != state.clock.step:
                self.left_at, self.saved = state.clock.step, None
            if not processes.joined():  # by an error of one, perhaps, which `leave` will know: a save takes all
                self.finish(state)
            raise
        self.finish(state)

    def is_critical(self) -> bool:
        """Whether nothing may break off what is under way: an update, or the last save."""
        return self.leaving or (self.state is not None and self.state.updating)

    # --- the directory ---

    def write(self, name: str, text: str) -> None:
        """Write a file of the run, whole."""
        if not self.first:
            return
        try:
            make_folder((self.path / name).parent)
            write_durably(self.path / name, text.encode("utf-8"))
        except OSError as error:
            raise FivestepError(f"cannot write {self.shown / name}: {error.strerror or error}") from error

    def discard(self) -> None:
        """Remove a run that never made a step: nothing half-made is left."""
        if not self.first:
            return
        for name in (CONFIG, ENVIRONMENT, TOKENIZER, METRICS, LAUNCH):
            (self.path / name).unlink(missing_ok=True)
        with suppress(OSError):
            self.path.rmdir()

    def __enter__(self) -> "Run":
        """Take the lock; from here on signals are noted, and a second Ctrl-C stops at once."""
        if not self.first:  # of several processes: it notices signals, and writes nothing
            self.closing, self.trainer = ExitStack(), os.getpid()
            self.closing.enter_context(noticed(self.is_critical))
            return self
        check_own(self.path)
        with ExitStack() as closing:
            try:
                lock: IO[str] | None = hold(self.path)
            except TakenError as error:
                raise UsageError(
                    f"{self.shown} is being trained by {error}; wait for it, or train into another --run-dir"
                ) from error
            except OSError as error:
                raise UsageError(f"cannot write in {self.shown}: {error.strerror or error}") from error
            closing.callback(lambda: release(self.path, lock, untouched=self.state is None))
            remove_leftovers(self.checkpoints)
            closing.enter_context(noticed(self.is_critical))
            try:
                mark(self.path)
                append_rows(self.metrics, [])  # it is there from the start
            except OSError as error:
                raise UsageError(f"cannot write in {self.shown}: {error.strerror or error}") from error
            self.closing, self.trainer = closing.pop_all(), os.getpid()
        return self

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        """Save the last step, unless an error struck inside an update and left it half made."""
        closing, self.closing = self.closing, None
        if self.trainer != os.getpid() or closing is None:
            return  # a forked child of the trainer: nothing here is its own
        self.leaving = True
        try:
            if self.state is not None:
                self.leave(self.state, error)
        except BaseException:
            self.trainer = None
            if not closing.__exit__(*sys.exc_info()):
                raise
        else:
            self.trainer = None
            closing.__exit__(kind, error, trace)
        finally:
            self.leaving = False

    def leave(self, state: State, error: BaseException | None) -> None:
        """Save what is not saved, and note how training ended."""
        if isinstance(error, NonFiniteError) and error.details.get("parameters", {}).get("count"):
            self.say("the weights are not finite themselves: the last checkpoint is kept as it is")
            self.lost = True
        agreed = error is None or isinstance(error, NonFiniteError) or is_agreed(error)
        if not agreed and isinstance(error, KeyboardInterrupt | SystemExit):  # a `sys.exit` in the body, of all?
            agreed = processes.all_say(f"left at step {state.clock.step}")
        try:
            if agreed or not processes.joined():
                self.finish(state)
            else:  # another process may be gone, and a state is saved by all together
                processes.tell(error)
                self.saver.wait()
        except Exception as failure:
            if error is None:
                raise
            self.say(str(failure))  # the first error is the one to raise
        if error is not None and not isinstance(error, GeneratorExit):
            event = "nonfinite" if isinstance(error, NonFiniteError) else "interrupted"
            row = {"event": event, "step": state.clock.step, "message": str(error) or type(error).__name__}
            if isinstance(error, NonFiniteError):
                row["details"] = error.details
            with suppress(FivestepError):
                self.record([row], counted=False)


def check_own(path: Path) -> None:
    """Raise UsageError where what a run writes into is not its own: a link leads elsewhere, a pipe never ends."""
    kinds = dict.fromkeys((METRICS, SKIPPED, RUNNING), stat.S_ISREG) | dict.fromkeys(
        ("checkpoints", "samples"), stat.S_ISDIR
    )
    for name, of_kind in kinds.items():
        try:
            about = (path / name).lstat()
        except FileNotFoundError:
            continue
        except OSError as error:
            raise UsageError(f"cannot look at {path / name}: {error.strerror or error}") from error
        if not of_kind(about.st_mode):
            what = "a link" if stat.S_ISLNK(about.st_mode) else "of another kind"
            raise UsageError(f"{path / name} is {what}: a run writes only into files and folders of its own")
        if of_kind is stat.S_ISREG and about.st_nlink > 1:
            raise UsageError(
                f"{path / name} is a file that has another name too (a hard link), which a run would change: copy it"
            )


def checked_position(saved: Any) -> tuple[int, float]:
    """Of a saved state, the bytes of the metrics that belong to it, and the best validation so far."""
    metrics, best = saved["metrics"], saved["best"]
    if type(metrics) is not int or not 0 <= metrics < 1 << 63 or not isinstance(best, float):
        raise ValueError("its place in the metrics is none")
    return metrics, best


def checked_left_at(saved: Any) -> int | None:
    """Return the step after which `break` ended the loop; earlier versions did not save it."""
    left_at = saved.get("left_at")
    if type(left_at) not in (int, type(None)):
        raise ValueError(f"left_at = {str(left_at)[:20]} is no step")
    return left_at  # type: ignore[no-any-return]


def _ours(path: Path) -> bool:
    """Whether a run that was just being made could have left this."""
    return path.name.strip(".").removesuffix(".part") in (
        CONFIG,
        ENVIRONMENT,
        TOKENIZER,
        METRICS,
        "running",
        "launch",
    )


def _number(path: Path, name: str) -> int:
    suffix = path.name.removeprefix(f"{name}-")
    return int(suffix) if suffix.isdecimal() else 0


def load_weights(path: str | Path, model: nn.Module, which: str = "best") -> int:
    """Copy the `best` or `last` weights of the run at `path`, or those exported there, into `model`; their step.

    Where these are damaged, the next that are sound are taken, and a person is told.
    """
    if is_export(expanded(path)):
        return load_export(expanded(path), model)
    return first_sound(expanded(path), which, lambda one: load_checkpoint(one, model), to_stderr).step
