"""A run: a directory that holds what was trained, how, and with what result.

    config.toml  environment.json  tokenizer.json  metrics.jsonl  checkpoints/  samples/

Owns the directory and the life of a run from the command line: build, train, test, sample. The loop does not know it:
a `Run` is a watcher like any other.
"""

import json
import shlex
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from glob import escape
from itertools import count
from pathlib import Path
from types import FrameType
from typing import Any

import msgspec
import torch
from torch import Tensor, nn

from fivestep.data import tokenizer as tokenizers
from fivestep.data.files import expanded, written_whole
from fivestep.data.sources import BUILTINS
from fivestep.data.stream import steps_in
from fivestep.data.tokenizer import Tokenizer
from fivestep.errors import FivestepError, NonFiniteError, UsageError, suggestion
from fivestep.fitting import Row, fit
from fivestep.loop.clock import Limit
from fivestep.loop.evaluate import evaluate, undisturbed
from fivestep.loop.state import State
from fivestep.loop.step import StepResult
from fivestep.run.build import ROWS, Job, build_data, build_device, build_job, build_model, step_options
from fivestep.run.checkpoint import check_saveable, checkpoints, find, load_checkpoint, save_checkpoint
from fivestep.run.config import Config, load_config, to_toml
from fivestep.run.environment import environment
from fivestep.run.metrics import append_rows, read_rows
from fivestep.run.running import hold, release
from fivestep.run.writing import prompt_ids, write
from fivestep.watch.preparation import preparation_shown
from fivestep.watch.progress import Progress
from fivestep.watch.samples import Samples
from fivestep.watch.screen import Console
from fivestep.watch.table import figures_of, number

CONFIG, ENVIRONMENT, TOKENIZER, METRICS = "config.toml", "environment.json", "tokenizer.json", "metrics.jsonl"


class Run:
    """A run's directory, and the watcher that fills it.

        with fs.Run("runs/mine") as run:
            fs.fit(..., watchers=[run])

    Rows go to metrics.jsonl; the weights are saved at each validation, at the end, and after a Ctrl-C, and the last
    and the best are kept (`fs.load_weights`). Raises UsageError where the directory already holds something.
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
        with written_whole(self.path / name) as file:
            file.write(text.encode("utf-8"))

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
            self.record([{"event": event, "step": state.clock.step, "message": str(error) or type(error).__name__}])
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


@dataclass(frozen=True)
class Loaded:
    """A trained model with what it needs to be used."""

    model: nn.Module
    tokenizer: Tokenizer | None
    config: Config
    step: int

    def generate(
        self,
        prompt: str | None = None,
        max_new_tokens: int = 500,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        min_p: float | None = None,
        repetition_penalty: float = 1.0,
        stop: str | Sequence[str] = (),
        seed: int = 0,
        cache: bool = True,
    ) -> str:
        """`prompt` (a new line if not given) and at most `max_new_tokens` tokens after it, up to a `stop` string.

        The arguments are those of `models.generate.generate`. Raises UsageError for bad ones, and for a model
        without a tokenizer.
        """
        return "".join(
            self.stream(
                prompt,
                max_new_tokens=max_new_tokens,
                temperature=temperature,
                top_k=top_k,
                top_p=top_p,
                min_p=min_p,
                repetition_penalty=repetition_penalty,
                stop=stop,
                seed=seed,
                cache=cache,
            )
        )

    def stream(self, prompt: str | None = None, **how: Any) -> Iterator[str]:
        """The text of `generate`, with the same arguments by name, in pieces as they come: the prompt first."""
        if self.tokenizer is None:
            raise UsageError(
                f"this run's model ({self.config.model}) learned rows, not text: it has nothing to write"
            )
        return write(self.model, self.tokenizer, prompt, **how)

    def predict(self, features: Tensor) -> Any:
        """The model's output for `features`, in eval mode, without gradients."""
        with undisturbed(self.model):
            self.model.eval()
            return self.model(features.to(next(self.model.parameters()).device))


def load(path: str | Path, which: str = "best", device: str = "auto") -> Loaded:
    """The model of the run at `path` with its `best` or `last` weights, its tokenizer and its configuration."""
    path = expanded(path)
    if not (path / CONFIG).is_file():
        known = sorted(str(one.parent) for place in (path.parent, Path("runs")) for one in place.glob(f"*/{CONFIG}"))
        hint = suggestion(str(path), known) or (f"; there is {', '.join(known[:5])}" if known else "")
        raise UsageError(f"{path} is not a run of fivestep train: it has no {CONFIG}{hint}")
    config = load_config(str(path / CONFIG), {})
    try:
        facts = json.loads((path / ENVIRONMENT).read_text("utf-8"))
        inputs, outputs = int(facts["inputs"]), int(facts["outputs"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UsageError(f"{path / ENVIRONMENT} is missing or damaged, so the model's sizes are not known") from error
    model = build_model(config, inputs, outputs).to(build_device(device))
    tokenizer = tokenizers.load(path / TOKENIZER) if (path / TOKENIZER).exists() else None
    step = load_weights(path, model, which)
    model.eval()
    return Loaded(model, tokenizer, config, step)


def train_run(config: Config, console: Console | None = None) -> Run:
    """Train what `config` says into a new run directory: validation and samples on the way, then test and a sample.

    Raises UsageError before the directory is made; one that the first step raises takes the directory with it.
    """
    console = console or Console()
    with preparation_shown(console) as report:
        data = build_data(config, report)
    job = build_job(config, data)
    if data.tokenizer is not None and config.sample_prompt is not None:
        prompt_ids(data.tokenizer, config.sample_prompt)  # refused now rather than after hours
    run = Run(config.run_dir) if config.run_dir else Run.numbered(config.recipe or config.model)
    try:
        describe(run, config, job)
        introduce(console, run, job)
        with run:
            limit = Limit(config.epochs, config.max_iters, config.until)
            train_job(run, config, job, Progress(planned_steps(config, job), console, limit))
    except BaseException as error:
        if run.result is None:
            run.discard()
        elif isinstance(error, KeyboardInterrupt | NonFiniteError):
            wind_down(console, run, job, config, ask=isinstance(error, KeyboardInterrupt))
        raise
    finish(console, run, job, config)
    return run


def train_job(run: Run, config: Config, job: Job, progress: Progress) -> None:
    """Drain the loop, with the bar and the run as its watchers."""
    fit(
        job.model,
        job.data.train,
        job.objective,
        job.optimizers,
        epochs=config.epochs,
        max_iters=config.max_iters,
        until=config.until,
        val=job.data.val,
        eval_every=config.eval_every,
        log_every=config.log_every,
        metrics=job.metrics,
        progress=progress,
        watchers=[run, *samples_of(run, config, job, progress)],
        accumulate=config.accumulate,
        anneal=config.anneal or None,
        anneal_patience=config.anneal_patience,
        early_stop=config.early_stop,
        to_best=config.to_best,
        **step_options(config, job),
    )


def samples_of(run: Run, config: Config, job: Job, progress: Progress) -> list[Samples]:
    """The watcher that writes samples along the way, where they are asked for."""
    tokenizer = job.data.tokenizer
    if tokenizer is None or config.sample_every is None:
        return []

    def text() -> str:
        return "".join(write(job.model, tokenizer, config.sample_prompt, max_new_tokens=config.sample_tokens))

    def keep(step: int, text: str) -> None:
        run.write(sample_name(step), text)
        progress.show_sample(step, text)

    return [Samples(config.sample_every, text, keep)]


def sample_name(step: int) -> str:
    """The file of a sample in the run's directory."""
    return f"samples/step-{step:08}.txt"


def describe(run: Run, config: Config, job: Job) -> None:
    """Write what the run is made from."""
    known = {"-", *BUILTINS, *ROWS}
    sources = [source if source in known else str(expanded(source).resolve()) for source in config.data]
    own = config.tokenizer_file and str(expanded(config.tokenizer_file).resolve())
    run.write(CONFIG, to_toml(msgspec.structs.replace(config, data=sources, tokenizer_file=own, run_dir=None)))
    data = job.data
    facts = {"inputs": data.inputs, "outputs": data.outputs, "data": data.name, "data_sha256": data.digest}
    facts["parameters"] = sum(parameter.numel() for parameter in job.model.parameters())
    if data.tokenizer is not None:
        facts["tokenizer_sha256"] = data.tokenizer.fingerprint
        tokenizers.save(data.tokenizer, run.path / TOKENIZER)
    run.write(ENVIRONMENT, json.dumps({**facts, **environment(job.device)}, indent=2))


def introduce(console: Console, run: Run, job: Job) -> None:
    """What is about to be trained, on what, where."""
    parameters = sum(parameter.numel() for parameter in job.model.parameters())
    threads = f" (threads: {torch.get_num_threads()})" if job.device.type == "cpu" else ""
    vocabulary = (
        f", {job.data.tokenizer.kind}, vocabulary {job.data.tokenizer.vocab_size:,}" if job.data.tokenizer else ""
    )
    say(console, f"model: {type(job.model).__name__}, {parameters:,} parameters, on {job.device}{threads}")
    say(console, f"data: {job.data.name}{vocabulary}")
    for note in job.data.notes:
        say(console, f"  {note}")
    say(console, f"run: {run.path}\n")


def finish(console: Console, run: Run, job: Job, config: Config) -> None:
    """With the best weights: the test split, a sample of text, and how to go on."""
    step = load_weights(run.path, job.model)
    say(console, f"\nbest weights: those of step {step:,}")
    if job.data.test is not None:
        figures = evaluate(job.model, job.data.test, job.objective, metrics=job.metrics, precision=config.precision)
        epochs = [row["epoch"] for row in read_rows(run.metrics) if row.get("split") and row["step"] == step]
        row = {"step": step, "epoch": epochs[0], "split": "test", **figures}
        run.record([row])
        say(console, f"with these: {in_words(row)}")
    if job.data.tokenizer is not None and config.sample_tokens:
        prompt, length = config.sample_prompt, config.sample_tokens
        text = "".join(write(job.model, job.data.tokenizer, prompt, max_new_tokens=length))
        run.write(sample_name(step), text)
        console.print(f"\n{text.strip()}\n", markup=False, highlight=False)  # wrapped at the terminal's width
    say(console, f"run: {run.path}")
    say_next(console, run, job, "best")


def wind_down(console: Console, run: Run, job: Job, config: Config, ask: bool) -> None:
    """After a training that was stopped: where its weights are, their figures if someone wants them, how to go on."""
    last = find(run.checkpoints, "last")
    if last is None:
        return
    say(console, f"\nthe weights of step {last.step:,} are saved in {run.path}")
    if ask and console.is_terminal and sys.stdin.isatty():
        with suppress(KeyboardInterrupt, EOFError):  # a second Ctrl-C says no
            if input("evaluate them on the validation split? [y/N] ").strip().lower() in ("y", "yes"):
                load_weights(run.path, job.model, "last")
                figures = evaluate(
                    job.model, job.data.val, job.objective, metrics=job.metrics, precision=config.precision
                )
                say(console, in_words({"split": "val", **figures}))
    say_next(console, run, job, "last")


def say_next(console: Console, run: Run, job: Job, which: str) -> None:
    """The commands to try next."""
    rest = shlex.quote(str(run.path)) + (" --weights last" if which == "last" else "")
    if job.data.tokenizer is not None:
        say(console, f"more text: fivestep sample {rest}")
    say(console, f"evaluate:  fivestep eval {rest}")
    say(console, "all runs:  fivestep runs")


def in_words(row: Row) -> str:
    """The figures of a row: `val 2.5012, perplexity 12.20`."""
    return ", ".join(
        f"{title} {text}" for title, text in {row["split"]: number(row["loss"]), **figures_of(row)}.items()
    )


def say(console: Console, text: str) -> None:
    """Print `text` as it is: no markup, no colours guessed, no line broken."""
    console.print(text, markup=False, highlight=False, soft_wrap=True)


def planned_steps(config: Config, job: Job) -> int | None:
    """The length of the run in updates, where it is known."""
    return Limit(config.epochs, config.max_iters).total_steps(partial(steps_in, job.data.train, config.accumulate))
