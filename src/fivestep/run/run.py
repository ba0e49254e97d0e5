"""A run: a directory that holds what was trained, how, and with what result.

    config.toml  environment.json  tokenizer.json  metrics.jsonl  checkpoints/  samples/

Owns the directory and the life of a run from the command line: build, train, test, sample. The loop does not know it:
a `Run` is a watcher like any other.
"""

import json
import shlex
import signal
import threading
from dataclasses import dataclass
from glob import escape
from itertools import count
from pathlib import Path
from types import FrameType
from typing import Any, cast

import msgspec
import torch
from torch import Tensor, nn

from fivestep.data import tokenizer as tokenizers
from fivestep.data.files import expanded, written_whole
from fivestep.data.sources import BUILTINS
from fivestep.data.tokenizer import Tokenizer
from fivestep.errors import FivestepError, NonFiniteError, UsageError
from fivestep.fitting import Row, fit
from fivestep.loop.clock import Limit
from fivestep.loop.evaluate import evaluate, undisturbed
from fivestep.loop.step import StepResult
from fivestep.models.contract import LanguageModel
from fivestep.models.generate import generate
from fivestep.run.build import ROWS, Job, build_device, build_job, build_model
from fivestep.run.checkpoint import check_saveable, checkpoints, find, load_checkpoint, save_checkpoint
from fivestep.run.config import Config, load_config, to_toml
from fivestep.run.environment import environment
from fivestep.run.metrics import append_rows, read_rows
from fivestep.watch.preparation import preparation_shown
from fivestep.watch.progress import Progress, table_line
from fivestep.watch.screen import Console

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

    @classmethod
    def numbered(cls, name: str, parent: Path = Path("runs")) -> "Run":
        """The next free `runs/NAME-N`."""
        taken = max((_number(path, name) for path in parent.glob(f"{escape(name)}-*")), default=0)
        for number in count(taken + 1):
            path = parent / f"{name}-{number}"
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
            save_checkpoint(self.checkpoints, result.state.model, result.step, losses[-1])
        if self.interrupted:
            raise KeyboardInterrupt

    def record(self, rows: list[Row]) -> None:
        """Append rows to metrics.jsonl."""
        try:
            append_rows(self.metrics, rows)
        except OSError as error:
            raise FivestepError(f"cannot write {self.metrics}: {error.strerror or error}") from error

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
        return self

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        """Save the last step's weights, unless an error struck inside an update and left them half changed."""
        if self.before is not None:
            signal.signal(signal.SIGINT, self.before)
            self.before = None
        if self.result is None:
            return
        state = self.result.state
        if error is not None:
            event = "nonfinite" if isinstance(error, NonFiniteError) else "interrupted"
            self.record([{"event": event, "step": state.clock.step, "message": str(error) or type(error).__name__}])
        saved = [one.step for one in checkpoints(self.checkpoints)]
        if not state.updating and state.clock.step not in saved:
            save_checkpoint(self.checkpoints, state.model, state.clock.step, None)


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
        seed: int = 0,
    ) -> str:
        """`prompt` (a new line if not given) and `max_new_tokens` tokens after it.

        Raises UsageError for a model without a tokenizer.
        """
        if self.tokenizer is None:
            raise UsageError(
                f"this run's model ({self.config.model}) learned rows, not text: it has nothing to write"
            )
        return sampled(self.model, self.tokenizer, prompt, max_new_tokens, temperature, top_k, seed)

    def predict(self, features: Tensor) -> Any:
        """The model's output for `features`, in eval mode, without gradients."""
        with undisturbed(self.model):
            self.model.eval()
            return self.model(features.to(next(self.model.parameters()).device))


def load(path: str | Path, which: str = "best", device: str = "auto") -> Loaded:
    """The model of the run at `path` with its `best` or `last` weights, its tokenizer and its configuration."""
    path = expanded(path)
    if not (path / CONFIG).is_file():
        known = sorted(str(one.parent) for one in path.parent.glob(f"*/{CONFIG}"))
        hint = f"; there is {', '.join(known[:5])}" if known else ""
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


def sampled(
    model: nn.Module,
    tokenizer: Tokenizer,
    prompt: str | None,
    max_new_tokens: int,
    temperature: float = 1.0,
    top_k: int | None = None,
    seed: int = 0,
) -> str:
    """`prompt` and what the model writes after it; without a prompt, from a new line where the text has lines."""
    if prompt is None:
        prompt = "\n" if "\n" in tokenizer.vocabulary or tokenizer.kind != "chars" else tokenizer.vocabulary[0]
    ids = torch.from_numpy(tokenizer.encode_prompt(prompt).astype("int64"))
    if not len(ids):
        raise UsageError("the prompt has no token in it; give --prompt some text")
    ids = ids.to(next(model.parameters()).device)
    written = generate(
        cast(LanguageModel, model), ids, max_new_tokens, temperature=temperature, top_k=top_k, seed=seed
    )
    return tokenizer.decode(written[0].cpu().numpy())


def train_run(config: Config, console: Console | None = None) -> Run:
    """Train what `config` says into a new run directory: validation along the way, then test and a sample.

    Raises UsageError before the directory is made; one that the first step raises takes the directory with it.
    """
    console = console or Console()
    with preparation_shown(console) as report:
        job = build_job(config, report)
    run = Run(config.run_dir) if config.run_dir else Run.numbered(config.recipe or config.model)
    try:
        describe(run, config, job)
        introduce(console, run, job)
        with run:
            train_job(run, config, job, Progress(planned_steps(config, job), console))
    except BaseException as error:
        if run.result is None:
            run.discard()
        elif (
            isinstance(error, KeyboardInterrupt | NonFiniteError)
            and (last := find(run.checkpoints, "last")) is not None
        ):
            say(console, f"the weights of step {last.step:,} are saved in {run.path}")
        raise
    finish(console, run, job, config)
    return run


def train_job(run: Run, config: Config, job: Job, progress: Progress) -> None:
    """Drain the loop, with the bar and the run as its watchers."""
    fit(
        job.model,
        job.data.train,
        job.objective,
        job.optimizer,
        epochs=config.epochs,
        max_iters=config.max_iters,
        until=config.until,
        val=job.data.val,
        eval_every=config.eval_every,
        log_every=config.log_every,
        metrics=job.metrics,
        progress=progress,
        watchers=[run],
        accumulate=config.accumulate,
        scheduler=job.scheduler,
        clip_norm=config.clip_norm or None,
        clip_value=config.clip_value or None,
        precision=config.precision,
    )


def describe(run: Run, config: Config, job: Job) -> None:
    """Write what the run is made from."""
    known = {"-", *BUILTINS, *ROWS}
    sources = [source if source in known else str(expanded(source).resolve()) for source in config.data]
    own = config.tokenizer_file and str(expanded(config.tokenizer_file).resolve())
    run.write(CONFIG, to_toml(msgspec.structs.replace(config, data=sources, tokenizer_file=own, run_dir=None)))
    data = job.data
    facts = {"inputs": data.inputs, "outputs": data.outputs, "data": data.name, "data_sha256": data.digest}
    if data.tokenizer is not None:
        facts["tokenizer_sha256"] = data.tokenizer.fingerprint
        tokenizers.save(data.tokenizer, run.path / TOKENIZER)
    run.write(ENVIRONMENT, json.dumps({**facts, **environment(job.device)}, indent=2))


def introduce(console: Console, run: Run, job: Job) -> None:
    """What is about to be trained, on what, where."""
    parameters = sum(parameter.numel() for parameter in job.model.parameters())
    threads = f" (threads: {torch.get_num_threads()})" if job.device.type == "cpu" else ""
    vocabulary = f", {job.data.tokenizer.kind}, vocabulary {job.data.inputs:,}" if job.data.tokenizer else ""
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
        shown = [f"{title} {text}" for title, text in table_line([row]).items() if title not in ("step", "epoch")]
        say(console, f"with these: {', '.join(shown)}")
    if job.data.tokenizer is not None and config.sample_tokens:
        text = sampled(job.model, job.data.tokenizer, None, config.sample_tokens)
        run.write(f"samples/step-{step:08}.txt", text)
        console.print(f"\n{text.strip()}\n", markup=False, highlight=False)  # wrapped at the terminal's width
    say(console, f"run: {run.path}")
    if job.data.tokenizer is not None:
        say(console, f"more text: fivestep sample {shlex.quote(str(run.path))}")


def say(console: Console, text: str) -> None:
    """Print `text` as it is: no markup, no colours guessed, no line broken."""
    console.print(text, markup=False, highlight=False, soft_wrap=True)


def planned_steps(config: Config, job: Job) -> int | None:
    """The length of the run in updates, where it is known."""
    return Limit(config.epochs, config.max_iters).total_steps(-(-len(job.data.train) // config.accumulate))
