"""The life of a run from the command line: build, train, test, sample, and what is said of it.

Owns the order of these and the words; the directory is `run.py`'s, the figures on the way are the watchers'.
"""

import json
import sys
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import msgspec
import torch

from fivestep import processes
from fivestep.data import tokenizer as tokenizers
from fivestep.data.files import expanded, read_bounded
from fivestep.data.shards import local_files
from fivestep.data.stream import steps_in
from fivestep.data.tokens import verify_tokens
from fivestep.errors import FivestepError, NonFiniteError, UsageError, brief
from fivestep.fitting import Row, fit
from fivestep.interrupts import Terminated
from fivestep.loop.clock import Limit
from fivestep.loop.evaluate import evaluate
from fivestep.run import strict_json
from fivestep.run.build import (
    Data,
    Job,
    as_used,
    build_data,
    build_device,
    build_job,
    build_model,
    graph_notes,
    is_by_program,
    resolved,
    step_options,
)
from fivestep.run.checkpoint import find
from fivestep.run.config import LIMITS, Config, check_same, flag_of, load_config, settings, to_toml, validated
from fivestep.run.environment import environment
from fivestep.run.launch import begun_by_us
from fivestep.run.loaded import checked_tokenizer
from fivestep.run.memory import free
from fivestep.run.metrics import known_rows
from fivestep.run.names import CONFIG, ENVIRONMENT, METRICS, TOKENIZER, shell_word
from fivestep.run.reads import HostReads
from fivestep.run.report import made_from_python
from fivestep.run.run import MOST_FACTS, Run, load_weights
from fivestep.run.start import postpone_compiler, weights_at_most
from fivestep.run.writing import write
from fivestep.watch.preparation import preparation_shown
from fivestep.watch.progress import Progress
from fivestep.watch.samples import Samples, on_screen
from fivestep.watch.screen import Console
from fivestep.watch.table import figures_of, number

KEEPING = ("checkpoint_every", "keep_last", "keep_every")
NOT_IN_THE_STEP = ("dropout", "label_smoothing", "loss", "criterion", "text_field", "val_fraction", "test_fraction")
SAME_BITS = ("versions", "processor", "threads", "device")  # of environment.json: where bits are promised


def train_run(
    config: Config,
    console: Console | None = None,
    resume: bool = False,
    trace: bool = False,
    sync_budget: bool = False,
    tell_graph: bool = False,
    wished: Collection[str] | None = (),
) -> Run:
    """Train what `config` says into a run directory: validation and samples on the way, then test and a sample.

    resume: go on with the run that `config.run_dir` holds, if it holds one; what an earlier round of the same
    torchrun began is gone on with in any case. trace: as in `fs.Run`. sync_budget: count what the steps read from the
    device; a line that reads and is not marked is a FivestepError. tell_graph: say what `graph = "auto"` has decided.
    wished: options that a resume may change beside `config.MAY_CHANGE`; None: all that can be changed.
    Raises UsageError before a directory is made; one that the first step raises takes a new directory with it.
    """
    processes.join(processes.local_device(build_device(config.device)), alone_too=config.parallel != "auto")
    console = console or Console(quiet=not processes.is_first())
    postpone_compiler()
    with processes.together():
        return train_together(config, console, resume, trace, sync_budget, tell_graph, wished)


def check_same_options(config: Config) -> None:
    """Raise UsageError where processes were started with different options. Paths and threads may differ by host."""
    apart = ("data", "run_dir", "threads", "device")
    own = {name: str(value) for name, value in msgspec.structs.asdict(config).items() if name not in apart}
    found = processes.first_difference(own)
    if found is not None:
        name, first, rank, other = found
        raise UsageError(
            f"{name} is {first} in rank 0 and {other} in rank {rank}: start all processes with the same options "
            f"(--{name.replace('_', '-')})"
        )


def train_together(
    config: Config,
    console: Console,
    resume: bool,
    trace: bool,
    sync_budget: bool,
    tell_graph: bool,
    wished: Collection[str] | None = (),
) -> Run:
    """The same, of several processes perhaps, each of which runs it."""
    check_same_options(config)
    if processes.is_first():
        check_place(config, resume or (config.run_dir is not None and begun_by_us(expanded(config.run_dir))))
    with preparation_shown(console) as report:
        data = build_data(config, report)
    check_memory(config, data)
    job = build_job(config, data)
    options: dict[str, Any] = {name: getattr(config, name) for name in KEEPING}
    options |= {"say": partial(say, console), "trace": trace}
    options |= {"adopt_changes": True}  # what may differ was decided by `check_same_run`
    run = Run(config.run_dir, **options) if config.run_dir else Run.numbered(config.recipe or config.model, **options)
    run.options = {name: getattr(config, name) for name in NOT_IN_THE_STEP}
    begun = processes.from_first((run.path / CONFIG).exists())
    if not begun:
        job.data.notes.extend(graph_notes(config, job, tell_graph))
    try:
        config = with_graph_of_run(run, config, job) if begun else with_graph_decided(config, job)
        facts = check_same_run(run, config, job, wished) if begun and run.first else None
        with run:
            if begun and run.first:
                run.on_load = partial(check_limits, run, config)
                run.on_first_step = partial(describe_again, run, config, job, facts or {})
            elif run.first:
                describe(run, config, job)
            introduce(console, run, job, config)
            limit = Limit(config.epochs, config.max_iters, config.until)
            progress = Progress(planned_steps(config, job), console, limit)
            if sync_budget:
                train_counted(run, config, job, progress)
            else:
                train_job(run, config, job, progress)
            finish(console, run, job, config)
    except BaseException as error:
        if run.state is None or not run.state.clock.step:
            if not begun:
                run.discard()
        elif isinstance(error, KeyboardInterrupt | Terminated | NonFiniteError):
            wind_down(console, run, job, config, error)
        raise
    return run


def with_graph_decided(config: Config, job: Job) -> Config:
    """Return the configuration with `on` or `off` in the place of `graph = "auto"`: what a run keeps."""
    return msgspec.structs.replace(config, graph="on" if is_by_program(config, job) else "off")


def with_graph_of_run(run: Run, config: Config, job: Job) -> Config:
    """Return the configuration with the run's first decision in the place of `graph = "auto"`.

    A resume has more steps to go, or fewer, or another device, and would decide otherwise: it would part from the
    uninterrupted run. A run of an earlier version has kept `auto`, which is decided again.
    """
    kept = processes.from_first(load_config(str(run.path / CONFIG), {}).graph if run.first else None)
    return config if config.graph != "auto" else msgspec.structs.replace(config, graph=kept)


def check_place(config: Config, resume: bool) -> None:
    """Raise UsageError, before anything is made, where a run stands in the way, or there is none to go on with."""
    if resume and config.run_dir is None:
        raise UsageError("--resume needs the run's directory: give --run-dir, or use fivestep resume RUN")
    if config.run_dir is not None and made_from_python(expanded(config.run_dir)):
        raise UsageError(
            f"{config.run_dir} was made from Python (fs.Run), and only its script knows the model: run that script "
            "again to go on, or give another --run-dir"
        )
    if config.run_dir is not None and not resume and (expanded(config.run_dir) / METRICS).exists():
        name = shell_word(config.run_dir)
        raise UsageError(
            f"{config.run_dir} already holds a run; go on with it: fivestep resume {name}, or give another --run-dir"
        )


def check_same_run(run: Run, config: Config, job: Job, wished: Collection[str] | None) -> dict[str, Any]:
    """Return environment.json. Raises UsageError where something differs from the run's first start, unwished."""
    try:
        facts = json.loads(read_bounded(run.path / ENVIRONMENT, MOST_FACTS))
        if not isinstance(facts, dict):
            raise ValueError("it holds no table")
    except (OSError, ValueError, RecursionError) as error:
        raise UsageError(f"{run.path / ENVIRONMENT} is missing or damaged: {brief(error)}") from error
    kept, own = load_config(str(run.path / CONFIG), {}), _resolved(config, job)
    begun = facts.get("settings")
    before = validated({**without_none(kept), **begun}) if isinstance(begun, dict) else kept
    check_same(own, before, str(run.shown), wished)
    edited = [
        f"{name} = {getattr(kept, name)!r}"
        for name in settings(before)
        if getattr(kept, name) not in (getattr(before, name), getattr(own, name))
    ]
    if edited:
        run.say(
            f"{run.shown / CONFIG} was edited ({', '.join(edited)}). It is overwritten with this start's settings"
        )
    checked_tokenizer(run.path, facts)
    check_same_data(run, before, own, job.data, facts, wished)
    now = environment(job.device)
    changed = [
        f"{name} {str(facts.get(name))[:80]!r} -> {now[name]}"
        for name in SAME_BITS
        if facts.get(name) != now.get(name)
    ]
    if changed:
        run.say(f"this is not where the run was begun ({', '.join(changed)}): it goes on, but not bit for bit")
    return facts


def check_limits(run: Run, config: Config) -> None:
    """Raise UsageError where a new limit lies below what the run has reached."""
    kept = load_config(str(run.path / CONFIG), {})
    for name in LIMITS:
        limit = getattr(config, name)
        if limit is None or limit == getattr(kept, name) or run.state is None:
            continue
        unit, amount = Limit(**{**dict.fromkeys(LIMITS), name: limit}).ends[0]
        reached = getattr(run.state.clock, unit)
        if amount < reached:
            at = f"step {reached:,}" if unit == "step" else f"{round(reached, 1):,} {unit.removesuffix('s')}s"
            raise UsageError(
                f"{name} = {limit!r} is below {at}, which the run in {run.shown} has reached: give more "
                f"({flag_of(name)}), or leave it out"
            )


def check_same_data(
    run: Run, before: Config, config: Config, data: Data, facts: dict[str, Any], wished: Collection[str] | None
) -> None:
    """Raise UsageError where text, tokenizer or rows are others than the run's, or a token file is damaged."""
    known = facts.get("tokenizer_sha256")
    if known is not None and (data.tokenizer is None or data.tokenizer.fingerprint != known):
        raise UsageError(
            f"this data uses another tokenizer than the run in {run.shown}. Give --tokenizer-file "
            f"{shell_word(run.shown / TOKENIZER)}, or start a new run"
        )
    same = data.digest == facts.get("data_sha256") and (data.digest is not None or config.data == before.data)
    if not same and wished is not None and not {"val_fraction", "test_fraction", "text_field"} & set(wished):
        raise UsageError(
            f"the data ({data.name}) differs from the data that {run.shown} started with. Give the original data "
            "(--data), or --adopt-changes to continue with this data"
        )
    if same and config.data != before.data:
        moved = f"from {' '.join(before.data)} to {' '.join(config.data)}"
        run.say(f"the data has moved {moved}; its content is unchanged")
    if token_files(data) != facts.get("token_files"):  # copied, made anew, or written over
        with preparation_shown(Console(stderr=True, quiet=not run.first)) as report:
            for file in files_of_tokens(data):
                try:
                    verify_tokens(file, report)
                except UsageError as error:
                    raise UsageError(
                        f"{error}. The run in {run.shown} cannot resume with this file. Restore the original file; "
                        "if it lies in the token cache, delete it and it will be created again"
                    ) from error


def token_files(data: Data) -> list[list[Any]]:
    """Return the name, size and time of each token file: where these are as they were, so is the content."""
    states = [(file.name, file.stat()) for file in files_of_tokens(data)]
    return [[name, state.st_size, state.st_mtime_ns] for name, state in states]


def files_of_tokens(data: Data) -> list[Path]:
    """Return the token files that `data` reads from; ids that could not be cached are in none."""
    kept = [file for file in data.files if "uncached" not in file.metadata]
    return list(chain.from_iterable(map(local_files, kept)))


def without_none(config: Config) -> dict[str, Any]:
    """Return the options that have a value."""
    return {name: value for name, value in msgspec.to_builtins(config).items() if value is not None}


def describe_again(run: Run, config: Config, job: Job, facts: dict[str, Any]) -> None:
    """Write what a resume may have changed: the configuration, and what the next resume is compared with."""
    run.write(CONFIG, to_toml(_resolved(config, job)))
    now = {**facts, **begun_with(config, job)}
    if now != facts:
        run.write(ENVIRONMENT, json.dumps(now, indent=2))


def begun_with(config: Config, job: Job) -> dict[str, Any]:
    """Return what a resume is compared with."""
    own = settings(_resolved(config, job))
    return {
        "data": job.data.name,
        "data_sha256": job.data.digest,
        "token_files": token_files(job.data),
        "settings": own,
    }


def check_memory(config: Config, data: Data) -> None:
    """Raise UsageError where the weights alone need more memory than there is: asking for it could take for ever."""
    there = free(build_device(config.device))
    if there is not None and weights_at_most(config, data.inputs, data.outputs) <= there:
        return
    try:
        with torch.device("meta"):
            model = build_model(config, data.inputs, data.outputs)
    except (RuntimeError, TypeError, ArithmeticError) as error:  # sizes beyond 64 bits
        raise UsageError(
            f"such a model cannot be: {brief(error)}; lower --n-embd, --n-hidden or --vocab-size"
        ) from error
    need = sum(p.numel() * p.element_size() for p in model.parameters())
    if there is not None and need > there:
        raise UsageError(
            f"the model's weights alone need {need / 1e9:,.1f} GB, and {there / 1e9:,.1f} GB are free; "
            "lower --n-embd, --n-hidden, --n-layer or --vocab-size"
        )


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
        run=run,
        watchers=samples_of(run, config, job, progress),
        accumulate=config.accumulate,
        anneal=config.anneal or None,
        anneal_patience=config.anneal_patience,
        early_stop=config.early_stop,
        to_best=config.to_best,
        lens=config.lens,
        parallel=config.parallel,
        **step_options(config, job),
    )


def train_counted(run: Run, config: Config, job: Job, progress: Progress) -> None:
    """The same under a count of the values that steps read on the host; each line that did is said."""
    with HostReads() as reads:
        train_job(run, config, job, progress)
    for sentence in reads.sentences(run.state.clock.step if run.state else 0):
        run.say(sentence)
    if reads.beyond():
        raise FivestepError("a step reads more from the device than the one marked line may (--sync-budget)")


def samples_of(run: Run, config: Config, job: Job, progress: Progress) -> list[Samples]:
    """The watcher that writes samples along the way, where they are asked for."""
    tokenizer = job.data.tokenizer
    if tokenizer is None or config.sample_every is None or not takes_part(run, config):
        return []

    def text() -> str:
        processes.at_alone("a sample of text")
        return "".join(write(job.model, tokenizer, config.sample_prompt, max_new_tokens=config.sample_tokens))

    def keep(step: int, text: str) -> None:
        run.write(sample_name(step), text)
        progress.show_sample(step, text)

    return [Samples(config.sample_every, text, keep)]


def takes_part(run: Run, config: Config) -> bool:
    """Whether this process computes a sample: the first one does; of a model in shards, which all gather, each."""
    return run.first or config.parallel == "fsdp"


def sample_name(step: int) -> str:
    """The file of a sample in the run's directory."""
    return f"samples/step-{step:08}.txt"


def describe(run: Run, config: Config, job: Job) -> None:
    """Write what the run is made from; the configuration last: where it is, the rest is too."""
    data = job.data
    facts = {"inputs": data.inputs, "outputs": data.outputs, **begun_with(config, job)}
    facts["parameters"] = sum(parameter.numel() for parameter in job.model.parameters())
    if data.tokenizer is not None:
        facts["tokenizer_sha256"] = data.tokenizer.fingerprint
        run.write(TOKENIZER, tokenizers.as_text(data.tokenizer))
    run.write(ENVIRONMENT, strict_json.dumps({**facts, **environment(job.device)}, indent=2))
    run.write(CONFIG, to_toml(_resolved(config, job)))


def _resolved(config: Config, job: Job) -> Config:
    """The configuration as a run keeps it: whole paths, the tokenizer as it was used."""
    used = as_used(config, job.data.tokenizer)
    own = config.tokenizer_file and str(expanded(config.tokenizer_file).resolve())
    return msgspec.structs.replace(used, data=resolved(config.data), tokenizer_file=own, run_dir=None)


def introduce(console: Console, run: Run, job: Job, config: Config) -> None:
    """What is about to be trained, on what, where."""
    parameters = sum(parameter.numel() for parameter in job.model.parameters())
    threads = f" (threads: {torch.get_num_threads()})" if job.device.type == "cpu" else ""
    if processes.joined():
        threads += f", processes: {processes.size()}, {'fsdp' if config.parallel == 'fsdp' else 'ddp'}"
    vocabulary = (
        f", {job.data.tokenizer.kind}, vocabulary {job.data.tokenizer.vocab_size:,}" if job.data.tokenizer else ""
    )
    say(console, f"model: {type(job.model).__name__}, {parameters:,} parameters, on {job.device}{threads}")
    say(console, f"data: {job.data.name}{vocabulary}")
    for note in job.data.notes:
        say(console, f"  {note}")
    say(console, f"run: {run.shown}\n")


def finish(console: Console, run: Run, job: Job, config: Config) -> None:
    """With the best weights: the test split, a sample of text, and how to go on."""
    processes.from_first(None)  # the last checkpoint is written
    step = load_weights(run.path, job.model)
    if run.state is not None and run.state.parallel is not None:
        run.state.parallel.reshard()
    say(console, f"\nbest weights: those of step {step:,}")
    if job.data.test is not None:
        figures = evaluate(job.model, job.data.test, job.objective, metrics=job.metrics, precision=config.precision)
        epochs = [row["epoch"] for row in known_rows(run.metrics)[0] if row.get("split") and row["step"] == step]
        row = {"step": step, "epoch": epochs[0] if epochs else None, "split": "test", **figures}
        run.record([row])
        say(console, f"with these: {in_words(row)}")
    if job.data.tokenizer is not None and config.sample_tokens and takes_part(run, config):
        processes.at_alone("a sample of text")
        prompt, length = config.sample_prompt, config.sample_tokens
        text = "".join(write(job.model, job.data.tokenizer, prompt, max_new_tokens=length))
        run.write(sample_name(step), text)
        shown = on_screen(text, run.shown / sample_name(step))
        console.print(f"\n{shown}\n", markup=False, highlight=False)  # wrapped at the terminal's width
    say(console, f"run: {run.shown}")
    say_next(console, run, job, config, "best")


def wind_down(console: Console, run: Run, job: Job, config: Config, error: BaseException) -> None:
    """After a training that was stopped: where its state is, its figures if someone wants them, how to go on."""
    last = find(run.checkpoints, "last") if run.first else None
    if last is None:
        return
    say(console, f"\nthe state of step {last.step:,} is saved in {run.shown}")
    asks = processes.size() == 1 and console.is_terminal and sys.stdin.isatty()  # the others wait for no answer
    if isinstance(error, KeyboardInterrupt) and last.val_loss is None and asks:
        with declinable(console):
            if input("evaluate them on the validation split? [y/N] ").strip().lower() in ("y", "yes"):
                load_weights(run.path, job.model, "last")
                figures = evaluate(
                    job.model, job.data.val, job.objective, metrics=job.metrics, precision=config.precision
                )
                say(console, in_words({"split": "val", **figures}))
    if not isinstance(error, NonFiniteError):  # that would stop at the same batch
        say(console, f"go on:     fivestep resume {shell_word(run.shown)}")
    say_next(console, run, job, config, "last")


@contextmanager
def declinable(console: Console) -> Iterator[None]:
    """Inside, a second Ctrl-C, or the end of the input, says no; the line that it stands in ends."""
    try:
        yield
    except (KeyboardInterrupt, EOFError):
        say(console, "")


def say_next(console: Console, run: Run, job: Job, config: Config, which: str) -> None:
    """The commands to try next, and where to look."""
    rest = shell_word(run.shown) + (" --weights last" if which == "last" else "")
    if job.data.tokenizer is not None:
        say(console, f"more text: fivestep sample {rest}")
    say(console, f"evaluate:  fivestep eval {rest}")
    say(console, "all runs:  fivestep runs")
    if config.lens is not None:
        say(console, f'layers:    {run.shown / METRICS}, the rows with "split": "lens"')


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
