"""The command line: verbs and flags.

The flags of `train` are the fields of the configuration. Owns parsing, exit codes and the sentence on an error;
imports torch only once a verb needs it.
"""

import gc
import os
import shutil
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import partial
from io import TextIOWrapper
from pathlib import Path
from typing import Any

import click

from fivestep import __version__
from fivestep.data.files import expanded
from fivestep.errors import FivestepError, UsageError, suggestion, visible
from fivestep.flags import (
    Recipes,
    Verbs,
    complete_data,
    complete_file,
    complete_run,
    complete_source,
    given,
    starting,
    with_options,
)
from fivestep.run import strict_json
from fivestep.run.busy import Moment, busy_note, moment
from fivestep.run.config import DEFAULT_RECIPE, FIXED, MAY_CHANGE, Config, load_config, options, to_toml
from fivestep.run.names import CONFIG, shell_word
from fivestep.run.report import made_from_python

EXIT_UNEXPECTED, EXIT_INTERRUPTED = 1, 130
FIRST = """fivestep trains PyTorch models: your model, your data, nothing hidden. First:

  fivestep train                      a small GPT on Python's own manual, in a minute or two
  fivestep sample runs/gpt-chars-1    text from what it learned
  fivestep train --help               the other recipes, your own data, every option

All commands: fivestep --help"""
SHELLS = ("bash", "zsh", "fish")
REHEARSED = [  # options of a recipe that the doctor takes as they are
    option.name
    for option in options()
    if option.name not in ("run_dir", "checkpoint_every", "keep_last", "keep_every")
    and not option.name.startswith("sample_")
]
EJECTED = [  # options of train that say what is trained, not what is kept of it
    option.name
    for option in options()
    if option.name not in ("run_dir", "log_every", "checkpoint_every", "keep_last", "keep_every")
    and not option.name.startswith("sample_")
]
EXPLAINED = [  # options of a recipe that its steps depend on
    option.name
    for option in options()
    if option.name not in MAY_CHANGE or option.name in ("max_iters", "epochs", "device", "threads")
]
WEIGHTS, SPLITS = ("best", "last"), ("val", "test", "train", "all")
KINDS = ("chars", "bytes", "words", "bpe")


def echo(text: str = "", nl: bool = True, err: bool = False) -> None:
    """Print `text` with its control characters escaped."""
    click.echo(visible(text), nl=nl, err=err)


with_weights = click.option(
    "--weights",
    default="best",
    metavar="best|last",
    help="Which checkpoint.  [best]",
    shell_complete=starting(WEIGHTS),
)
with_adopt_changes = click.option(
    "--adopt-changes",
    is_flag=True,
    help="When resuming, accept settings and data that differ from the first start.",
)
with_threads = click.option(
    "--threads", type=click.IntRange(1, 1024), metavar="N", help="CPU threads; the run's own, or torch's choice."
)


@click.group(cls=Verbs, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 80})
@click.version_option(__version__, prog_name="fivestep")
def cli() -> None:
    """Train PyTorch models: your model, your data, five steps, nothing hidden.

    \b
    fivestep train                       a small GPT on Python's own manual
    fivestep train bigram --data my.txt  a bigram on your text
    fivestep sample runs/gpt-chars-1     text from a trained run
    fivestep resume runs/gpt-chars-1     go on after a Ctrl-C, a kill or the end
    fivestep eval runs/gpt-chars-1       its loss on a whole split
    fivestep runs                        all runs, how they ended, what is next
    """


@cli.command(cls=Recipes)
@click.argument("source", metavar="[RECIPE|FILE.toml]", required=False, shell_complete=complete_source)
@with_options
@click.option("--show-config", is_flag=True, help="Print every option as it would be used, and stop.")
@click.option("--dry-run", is_flag=True, help="Print parameters, memory, FLOPs and time; try three steps, and stop.")
@click.option(
    "--simulate-world",
    type=click.IntRange(2, 1_000_000),
    metavar="N",
    help="With --dry-run: memory, traffic and time of a step on N devices, of which none is needed.",
)
@click.option(
    "--hardware",
    metavar="h100|a100|cpu",
    help="With --simulate-world: what the devices are.  [h100]",
    shell_complete=starting(("h100", "a100", "cpu")),
)
@click.option("--resume", is_flag=True, help="Go on with the run in --run-dir, if there is one; else begin it.")
@with_adopt_changes
@click.option("--sync-budget", is_flag=True, help="For development: name each line that reads a value in a step.")
@click.option("--debug", is_flag=True, help="Show the traceback of an error.")
def train(
    source: str | None,
    show_config: bool,
    dry_run: bool,
    simulate_world: int | None,
    hardware: str | None,
    resume: bool,
    adopt_changes: bool,
    sync_budget: bool,
    debug: bool,
    **flags: Any,
) -> None:
    """Train a recipe, or what a TOML file describes.

    Without one: gpt-chars. Flags beat the file, the file beats the recipe, and
    the recipe beats the defaults, which are shown in brackets.

    An AMOUNT, of training or between two events, is a number of steps (250,
    10k), epochs (1ep), samples (50ksmp), tokens (10Mtok) or time (30s, 5min, 2h).

    On a terminal there is a bar; elsewhere a line after 10 seconds and then every
    30. Ctrl-C ends after the step in hand and keeps its weights.

    \b
    fivestep train gpt-chars --data book.txt --max-iters 5000
    fivestep train rnn-words --data folder/ --epochs 10
    fivestep train runs/gpt-chars-1/config.toml    the same run again
    """
    config = load_config(source or DEFAULT_RECIPE, given(flags))
    if show_config:
        echo(to_toml(config), nl=False)
        return
    if simulate_world is not None and not dry_run:
        raise UsageError("--simulate-world is a part of the dry run: add --dry-run")
    if hardware is not None and simulate_world is None:
        raise UsageError("--hardware says what --simulate-world N simulates: add it, or leave --hardware out")
    if simulate_world is not None:
        with importing():
            from fivestep.run.simulate import print_simulation

        print_simulation(config, simulate_world, hardware or "h100")
        return
    if dry_run:
        with importing():
            from fivestep.run.dry_run import print_dry_run

        print_dry_run(config)
        return

    start = moment()
    with importing():
        from fivestep.run.training import train_run
    say_if_busy(config, start)
    train_run(
        config,
        resume=resume,
        sync_budget=sync_budget,
        tell_graph=flags["graph"] == "auto",
        wished=None if adopt_changes else (),
    )


@cli.command()
@click.argument("run", metavar="RUN", type=click.Path(path_type=Path), shell_complete=complete_run)
@partial(with_options, names=[option.name for option in options() if option.name not in (*FIXED, "run_dir")])
@with_adopt_changes
@click.option("--debug", is_flag=True, help="Show the traceback of an error.")
def resume(run: Path, adopt_changes: bool, debug: bool, **flags: Any) -> None:
    """Go on with a run that was interrupted, terminated or killed, or train it on.

    It ends, bit for bit, where the uninterrupted run would have (on the same
    machine, with the same versions and threads). Give a new --max-iters, --epochs
    or --until to train on after the end. A damaged checkpoint is named, and the
    newest that is sound is used.

    A setting given as a flag takes effect from this step on; a change of the
    training, such as the learning rate, is recorded in metrics.jsonl. Other
    differences (an edited config.toml, changed data) are refused unless you give
    --adopt-changes. If the data has moved, give its new path with --data.

    \b
    fivestep resume runs/gpt-chars-1
    fivestep resume runs/gpt-chars-1 --max-iters 4000
    fivestep resume runs/gpt-chars-1 --learning-rate 1e-4
    """
    if made_from_python(expanded(run)):
        raise UsageError(
            f"{run} was made from Python (fs.Run), and only its script knows the model: run that script again"
        )
    if not (run / CONFIG).is_file():
        raise UsageError(
            f"{run} is not a run of fivestep train that can go on: it has no {CONFIG}; "
            f"begin it with fivestep train RECIPE --run-dir {shell_word(run)} --resume"
        )
    config = load_config(str(run / CONFIG), {**given(flags), "run_dir": str(run)})
    start = moment()
    with importing():
        from fivestep.run.training import train_run
    say_if_busy(config, start)
    train_run(config, resume=True, wished=None if adopt_changes else tuple(given(flags)))


def say_if_busy(config: Config, start: Moment | None) -> None:
    """A sentence, where other processes kept the cores busy since `start` and several threads are to train there."""
    from fivestep.run.build import torchs_threads

    if config.threads is None and (note := busy_note(start, moment(), torchs_threads(config.device))):
        echo(note)


@cli.command()
@click.argument("run", metavar="RUN", type=click.Path(path_type=Path), shell_complete=complete_run)
@click.option("--prompt", default=None, help="Text to go on from.  [a new line]")
@click.option("--max-new-tokens", default=500, type=click.IntRange(min=1), help="Length, in tokens.  [500]")
@click.option("--temperature", default=1.0, type=click.FloatRange(min=0), help="0: always the likeliest.  [1.0]")
@click.option("--top-k", default=None, type=click.IntRange(min=1), help="Only the k likeliest tokens.")
@click.option("--top-p", default=None, type=click.FloatRange(0, 1), help="Only the likeliest that hold p together.")
@click.option("--min-p", default=None, type=click.FloatRange(0, 1), help="Only those p times as likely as the best.")
@click.option("--repetition-penalty", default=1.0, type=float, help="Above 1: what was there is less likely.  [1.0]")
@click.option("--stop", multiple=True, metavar="TEXT", help="End before this text. Give it once for each.")
@click.option("--seed", default=0, type=click.IntRange(0, 2**63 - 1), help="Of the draws.  [0]")
@click.option("--num-samples", default=1, type=click.IntRange(min=1), help="Texts, with seeds seed, seed+1, ...  [1]")
@with_weights
@with_threads
@click.option("--debug", is_flag=True, help="Show the traceback of an error.")
def sample(
    run: Path,
    prompt: str | None,
    debug: bool,
    weights: str,
    seed: int,
    num_samples: int,
    threads: int | None,
    **how: Any,
) -> None:
    """Write text from a trained run.

    \b
    fivestep sample runs/gpt-chars-1 --prompt "The " --temperature 0.8
    fivestep sample runs/gpt-chars-1 --top-p 0.9 --num-samples 3
    """
    with importing():
        from fivestep.run.build import use_threads
        from fivestep.run.loaded import load

    loaded = load(run, weights)
    use_threads(threads or loaded.config.threads)
    show = echo if sys.stdout.isatty() else click.echo  # through a pipe goes the text as it is
    for number in range(num_samples):
        pieces = loaded.stream(prompt, seed=seed + number, **how)
        if num_samples > 1:
            echo(f"--- seed {seed + number}")
        for piece in pieces:
            show(piece, nl=False)  # flushes: text shows as it comes
        echo()


@cli.command("eval")
@click.argument("run", metavar="RUN", type=click.Path(path_type=Path), shell_complete=complete_run)
@with_weights
@click.option(
    "--split", metavar="|".join(SPLITS), help="Which part of the data.  [val]", shell_complete=starting(SPLITS)
)
@click.option(
    "--data",
    multiple=True,
    help="Other data in place of the run's; once for each file.  All of it is scored.",
    shell_complete=complete_data,
)
@click.option("--batch-size", type=click.IntRange(1, 1_000_000), metavar="N", help="As in training if not given.")
@click.option("--device", help="auto, cpu, cuda, cuda:1, mps; the run's own if not given.")
@with_threads
@click.option("--json", "as_json", is_flag=True, help="One JSON object.")
@click.option("--debug", is_flag=True, help="Show the traceback of an error.")
def evaluate(run: Path, as_json: bool, debug: bool, weights: str, batch_size: int | None, **what: Any) -> None:
    """Score the weights of a run on a whole split.

    With the run's own configuration, tokenizer and data: the best weights on val
    give the figure that training recorded.

    \b
    fivestep eval runs/gpt-chars-1
    fivestep eval runs/gpt-chars-1 --weights last --split test
    fivestep eval runs/gpt-chars-1 --data other.txt --json
    """
    with importing():
        from fivestep import processes
        from fivestep.run.evaluation import evaluate_run, in_lines

    result = evaluate_run(run, weights, batch_size=batch_size, **what)
    if processes.is_first():  # of several (torchrun) one speaks
        echo(strict_json.dumps(result) if as_json else in_lines(result))


@cli.command()
@click.argument("run", metavar="RUN", type=click.Path(path_type=Path), shell_complete=complete_run)
@with_weights
@click.option(
    "--out", required=True, metavar="DIR", type=click.Path(path_type=Path), help="The folder to write, new."
)
@click.option("--debug", is_flag=True, help="Show the traceback of an error.")
def export(run: Path, weights: str, out: Path, debug: bool) -> None:
    """Write the weights of a run as one plain file, to use without the run.

    DIR gets model.safetensors, whole also where several processes wrote parts of
    it, and beside it the run's configuration and tokenizer. Any reader of
    safetensors reads it, and fs.load(DIR) and fivestep sample DIR take it as it is.

    \b
    fivestep export runs/gpt-chars-1 --out my-model
    fivestep export runs/gpt-chars-1 --weights last --out my-model
    """
    with importing():
        from fivestep.run.export import export as write
        from fivestep.run.export import which_weights

    made = write(run, out, weights, partial(echo, err=True))
    size = made.files["model.safetensors"][0]
    named = ", ".join(made.files)
    echo(
        f"{out}: the {which_weights(expanded(out), weights)} weights, of step {made.step:,} ({size:,} bytes): {named}"
    )


@cli.command()
@click.argument("folder", metavar="[DIR]", default="runs", type=click.Path(path_type=Path, file_okay=False))
@click.option("--json", "as_json", is_flag=True, help="One JSON object a run, a line each.")
def runs(folder: Path, as_json: bool) -> None:
    """List all runs, how they ended, and the command for each.

    Those in DIR, or in runs/ if it is not given. Columns that do not fit the
    terminal are left out; through a pipe, and with --json, there are all.
    """
    from fivestep.run.report import find_runs, report

    if str(folder) == "runs" and not folder.exists():
        found = []
    else:
        found = find_runs(folder)
    if as_json:
        echo("".join(strict_json.dumps(run.as_json()) + "\n" for run in found), nl=False)
    else:
        echo(report(found, folder, terminal_width()))


def terminal_width() -> int | None:
    """Columns of the terminal; None where the output is none: a file or a pipe has room."""
    return shutil.get_terminal_size().columns if sys.stdout is not None and sys.stdout.isatty() else None


@cli.command(cls=Recipes)
@click.argument(
    "source", metavar="[RECIPE|RUN|FILE.toml|FILE.py:function]", required=False, shell_complete=complete_source
)
@click.option("--find-lr", is_flag=True, help="Try learning rates on short trainings, in a process of its own.")
@click.option("--find-batch", is_flag=True, help="Double the batch until memory or speed ends, in the same way.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object.")
@click.option("--resume", is_flag=True, help="Kill the job at random instants, and compare where it ends.")
@click.option("--kills", default=5, type=click.IntRange(min=1), metavar="N", help="With --resume: how often.  [5]")
@click.option(
    "--kill-seed", default=0, type=click.IntRange(min=0), metavar="N", help="With --resume: of the instants.  [0]"
)
@click.option(
    "--checkpoint-every", "every", default="7", metavar="AMOUNT", help="With --resume: save the state so often.  [7]"
)
@click.option(
    "--keep",
    metavar="DIR",
    type=click.Path(path_type=Path),
    help="With --resume: keep the three runs there.  [they are removed]",
)
@click.option("--debug", is_flag=True, help="Show the traceback of an error.")
@partial(with_options, names=REHEARSED)
def doctor(
    source: str | None,
    find_lr: bool,
    find_batch: bool,
    as_json: bool,
    resume: bool,
    kills: int,
    kill_seed: int,
    every: str,
    debug: bool,
    **how: Any,
) -> None:
    """Check a job before it is paid for, or try out whether it can be killed.

    Some dozen short trials on copies of the model: its first loss, its inputs, one
    batch by heart, gradients, leaks between examples and from later tokens, modes,
    accumulation, repetition, a save and a load, the data, the learning rate and its
    schedule, speed, memory and disk. Each has a figure, a verdict and a remedy.
    Exit code 0 where no check failed, 1 where one did.

    FILE.py:function is a function of no argument that returns model, loader,
    criterion, optimizer, and a validation loader where there is one. The file is
    your code, and it is run, in this process; nothing of yours is changed.

    --find-lr and --find-batch return a value that was tried.

    With --resume: the job is trained twice uninterrupted, and once killed
    (SIGKILL) at random instants, in a save too, each time going on in a fresh
    process. Batches, losses, rows, weights, optimizer and random states must be
    the same, bit for bit; else the first difference is named, with its likeliest
    cause. A recipe, or a run's configuration, is cut to 60 steps, and validated and
    saved often. FILE.py:function is then a function of an fs.Run inside its `with` block:

    \b
    def job(run):
        ...
        fs.fit(model, loader, criterion, optimizer, epochs=3, run=run)

    \b
    fivestep doctor gpt-chars --data my.txt
    fivestep doctor my_training.py:job
    fivestep doctor rnn-words --find-lr
    fivestep doctor --resume my_training.py:job --kills 10 --max-iters 100
    """
    keep, asked = how.pop("keep"), [find_lr, find_batch, resume]
    if sum(asked) > 1:
        raise UsageError("give one of --find-lr, --find-batch and --resume")
    if resume:
        with importing():
            from fivestep.run.doctor import examine

        healthy = examine(source, given(how), kills=kills, every=every, seed=kill_seed, keep=keep, say=echo)
    elif find_lr or find_batch:
        with importing():
            from fivestep.learn.preflight_search import search

        healthy = search("lr" if find_lr else "batch", source, given(how), as_json, echo)
    else:
        with importing():
            from fivestep.learn.preflight import preflight

        healthy = preflight(source, given(how), as_json)
    if not healthy:
        sys.exit(EXIT_UNEXPECTED)


@cli.command(cls=Recipes)
@click.argument("source", metavar="[RECIPE|RUN|FILE.toml]", required=False, shell_complete=complete_source)
@click.option(
    "--out",
    default="train.py",
    metavar="FILE",
    type=click.Path(path_type=Path),
    help="The file to write.  [train.py]",
    shell_complete=complete_file,
)
@click.option("--force", is_flag=True, help="Overwrite what is there.")
@click.option("--debug", is_flag=True, help="Show the traceback of an error.")
@partial(with_options, names=EJECTED)
def eject(source: str | None, out: Path, force: bool, debug: bool, **flags: Any) -> None:
    """Write a job as one plain PyTorch file, and go on without this package.

    The file has the job's model, data, optimizer and schedule around the five
    steps, and imports torch, NumPy and the standard library alone. In eager
    float32 it ends with the weights of fivestep train, bit for bit (on the same
    machine, with the same versions and threads). What takes more than a few lines
    to read (byte pairs, packed text, the digits) is written beside it as .npy.

    \b
    fivestep eject gpt-chars --out train.py
    fivestep eject rnn-words --data my.txt --cell gru
    fivestep eject runs/gpt-chars-1
    """
    with importing():
        from fivestep.learn.eject import eject as write
        from fivestep.run.doctor import configuration

    instead = "eject needs a configuration: give a recipe, a TOML file or a run of fivestep train"
    config = load_config(configuration(source, instead), given(flags))
    written = write(config, out, force)
    for note in written.notes:
        echo(note, err=True)
    beside = "".join(f", and {path}" for path in written.beside)
    run_it = f"python {shell_word(out)}"
    echo(f"{out}: {written.lines} lines{beside}; run it: {run_it} (it writes its weights to {written.weights})")


@cli.command(cls=Recipes)
@click.argument("source", metavar="[RECIPE|RUN|FILE.toml]", required=False, shell_complete=complete_source)
@click.option(
    "--step", type=click.IntRange(min=0), metavar="N", help="Train so many steps before.  [0; a run's last]"
)
@click.option("--html", metavar="FILE", type=click.Path(path_type=Path), help="Write it as a page too.")
@click.option("--debug", is_flag=True, help="Show the traceback of an error.")
@partial(with_options, names=EXPLAINED)
def explain(source: str | None, step: int | None, html: Path | None, debug: bool, **flags: Any) -> None:
    """Show one real iteration of a job, with its own numbers.

    In nine stages: parameters, optimizer, the loop, a batch, the forward pass, the
    loss, the gradients, the update, the reset. What a softmax says, which weight
    moves how far and why: each figure is the training's own, and gradients and
    updates are checked beside it by plain arithmetic. Nothing is kept.

    Of a recipe: its first step, or the one after --step N. Of a run: the step after
    its last checkpoint, or after the one at or before N. --html writes the same as
    one page with pictures, which needs no network.

    \b
    fivestep explain bigram
    fivestep explain gpt-chars --data my.txt --step 100 --html step.html
    fivestep explain runs/gpt-chars-1
    """
    with importing():
        from fivestep.learn.explain import explain as explain_job

    explain_job(source, given(flags), step, html)


@cli.command()
@click.argument(
    "runs", metavar="RUN...", nargs=-1, type=click.Path(path_type=Path), required=True, shell_complete=complete_run
)
@click.option("--exact", is_flag=True, help="Of two runs: find the first step at which they part, and what differs.")
@click.option(
    "--out", metavar="FILE", help="Write a page (.html) or the curves (.png).", shell_complete=complete_file
)
@click.option("--json", "as_json", is_flag=True, help="One JSON object.")
@click.option("--debug", is_flag=True, help="Show the traceback of an error.")
def compare(runs: tuple[Path, ...], exact: bool, out: str | None, as_json: bool, debug: bool) -> None:
    """Show what differs between runs: configuration, versions, data, losses.

    Losses are compared at the last step, token and second of training that all
    have reached; between two rows a loss is read off the line that joins them.

    With --exact, for two runs that should be the same: from their rows,
    checkpoints and traces the interval in which they part, and, by training both
    again within it, the step, and whether batch, random state, loss, gradients
    or update differ first. Exit code 0 where they do not part, 1 where they do.

    \b
    fivestep compare runs/gpt-chars-1 runs/gpt-chars-2
    fivestep compare runs/* --out curves.html
    fivestep compare --exact runs/gpt-chars-1 runs/gpt-chars-2
    """
    from fivestep.learn import compare as comparing
    from fivestep.learn import curves

    place = None if out is None else curves.check_out(out)
    if exact and len(runs) != 2:
        raise UsageError(f"--exact compares two runs; {len(runs)} are given")
    found = comparing.compare(runs)
    if place is not None:
        curves.write(found, place)
    if not as_json:
        width = terminal_width()
        lines = comparing.in_lines(found, width)
        drawn = curves.in_terminal(found.sides, min(width or 80, 120), colour=width is not None)
        echo("\n".join([*lines, "", *drawn] if drawn else lines))
    parts = None
    if exact:
        with importing():
            from fivestep.learn import parting

        parts = parting.parting(runs[0], runs[1], say=partial(echo, err=True))
    if as_json:
        echo(strict_json.dumps(found.as_json() | ({"exact": parts.as_json()} if parts else {})))
    elif parts is not None:
        echo("\n".join(["", *parting.in_lines(parts)]))
    if parts is not None and parts.parted:
        sys.exit(EXIT_UNEXPECTED)


@cli.command()
@click.argument("shell", metavar="|".join(SHELLS), shell_complete=starting(SHELLS))
def completion(shell: str) -> None:
    """Print a script that completes verbs, flags, recipes, runs and files.

    \b
    bash   eval "$(fivestep completion bash)"      in ~/.bashrc
    zsh    eval "$(fivestep completion zsh)"       in ~/.zshrc, after compinit
    fish   fivestep completion fish | source      in ~/.config/fish/config.fish
    """
    from click.shell_completion import get_completion_class

    kind = get_completion_class(shell) if shell in SHELLS else None
    if kind is None:
        raise UsageError(f"'{shell}' is not one of {', '.join(SHELLS)}{suggestion(shell, SHELLS)}")
    click.echo(kind(cli, {}, "fivestep", "_FIVESTEP_COMPLETE").source())


@cli.group(cls=Verbs)
def data() -> None:
    """Make, inspect and verify token files, also in shards.

    Training on a text makes its token file by itself, once, in a cache. Make one beforehand where the text is large,
    where several runs or machines share it, or to look at it.

    \b
    fivestep data make corpus/*.jsonl.gz --tokenizer bpe --out corpus.safetensors
    fivestep data inspect corpus.safetensors
    fivestep train gpt-chars --data corpus.safetensors
    """


@data.command("make")
@click.argument("sources", metavar="SOURCE...", nargs=-1, required=True, shell_complete=complete_data)
@click.option(
    "--out",
    metavar="FILE",
    default=None,
    help="A name that ends in .safetensors; a new folder for shards.  [in the cache]",
    shell_complete=complete_file,
)
@click.option(
    "--tokenizer",
    default=None,
    metavar="|".join(KINDS),
    help="What a token is.  [chars]",
    shell_complete=starting(KINDS),
)
@click.option(
    "--tokenizer-file",
    metavar="FILE",
    default=None,
    help="A tokenizer.json: ours, or Hugging Face's like GPT-2's.",
    shell_complete=complete_file,
)
@click.option("--min-count", type=int, default=None, help="Tokens seen less often become <unk>.  [1]")
@click.option("--max-vocabulary", type=int, default=None, help="Keep at most so many tokens.  [bpe: 50257; else all]")
@click.option("--val-fraction", type=float, default=0.1, help="Last part of the text, for validation.  [0.1]")
@click.option("--test-fraction", type=float, default=0.0, help="Part after that, for the test.  [0]")
@click.option("--text-field", default="text", help="The field of JSON lines that holds the text.  [text]")
@click.option(
    "--shard-size",
    metavar="SIZE",
    default=None,
    help="Write shards of so many bytes or tokens into the folder --out: 256MB, 100Mtok.  [one file]",
)
@click.option(
    "--workers", type=int, default=None, help="Processes for words and bpe.  [one a core, 4 at most; 1 below 8 MB]"
)
@click.option("--debug", is_flag=True, help="Show the traceback of an error.")
def data_make(sources: tuple[str, ...], debug: bool, **how: Any) -> None:
    """Make a token file from SOURCE..., and print what it holds and, last, its path.

    A source is a file (.txt, .jsonl, each also as .gz or .zst), a folder of them, - for standard input,
    python-manual or python-stdlib. A folder with train.txt and valid.txt (.jsonl, .txt.gz, ...; perhaps test.txt)
    keeps its splits; any other text is joined and cut by characters. A JSON line's text is followed by a newline. The
    text may be larger than memory. The file holds the tokenizer too, so that it is all that training needs.

    \b
    fivestep data make book.txt                      characters, into the cache
    fivestep data make wiki/ --tokenizer words --max-vocabulary 50000 --out wiki.safetensors
    zcat logs.gz | fivestep data make - --tokenizer bytes --out logs.safetensors
    fivestep data make crawl/ --tokenizer bpe --shard-size 256MB --out crawl-tokens
    """
    from fivestep.run.preparation import make

    for line in make(list(sources), **how):
        echo(line)


@data.command("inspect")
@click.argument("file", metavar="FILE", shell_complete=complete_file)
@click.option("--debug", is_flag=True, help="Show the traceback of an error.")
def data_inspect(file: str, debug: bool) -> None:
    """Show what a token file holds: splits, tokenizer, the head of its text, its most frequent tokens.

    FILE may also be a folder of shards, or a URL of either.

    \b
    fivestep data inspect corpus.safetensors
    """
    from fivestep.run.preparation import inspect

    for line in inspect(file):
        echo(line)


@data.command("verify")
@click.argument("file", metavar="FILE", shell_complete=complete_file)
@click.option("--debug", is_flag=True, help="Show the traceback of an error.")
def data_verify(file: str, debug: bool) -> None:
    """Read a token file whole, and say whether it is what was written; exit code 2 and the first fault if not.

    FILE may also be a folder of shards, or a URL of either: then every shard is read.

    Checks the header, the sizes, the tokenizer, the digest over every bit, and that all ids are in the vocabulary.

    \b
    fivestep data verify corpus.safetensors
    """
    from fivestep.run.preparation import verify

    for line in verify(file):
        echo(line)


@contextmanager
def importing() -> Iterator[None]:
    """Inside, a Ctrl-C ends the process at once: torch, while it loads, would abort on one.

    Nor is garbage collected: what is imported lives as long as the process, and going through it again and again took
    a third of the time. Afterwards it is set aside (gc.freeze), so that collections while training do not either.
    """
    before = signal.getsignal(signal.SIGINT)
    usual = before is signal.default_int_handler and threading.current_thread() is threading.main_thread()
    first = gc.isenabled() and "torch" not in sys.modules  # else this is not our process alone
    if usual:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    if first:
        gc.disable()
    try:
        yield
    finally:
        if first:
            gc.freeze()
            gc.enable()
        if usual:
            signal.signal(signal.SIGINT, before)


def speaks(error: Exception) -> bool:
    """Whether this process is to tell it: of several on a host one, where all have it or it was told already."""
    known = sys.modules.get("fivestep.processes")  # which imports torch
    if known is None or not known.joined():  # what is not of the flags alone may be this one's
        return not isinstance(error, click.ClickException) or os.environ.get("LOCAL_RANK", "0") == "0"
    return os.environ.get("LOCAL_RANK", "0") == "0" and not known.was_told(error)


def check_output(arguments: list[str]) -> None:
    """Raise OSError where standard output could not be written, and nobody has said so yet.

    The result of `train` and `resume` is the run's directory: they outlive a reader that has left.
    """
    sys.stdout.flush()
    screen = sys.modules.get("fivestep.watch.screen")  # a verb that shows figures has imported it
    for error in screen.lost_output if screen else []:
        trains = arguments[0] in ("train", "resume") and "--dry-run" not in arguments
        if not (isinstance(error, BrokenPipeError) and trains):
            raise OSError(error.errno, f"standard output cannot be written: {error.strerror or error}")


def give_up_output() -> bool:
    """Drop what standard output still holds, where it cannot be written: the interpreter would try again.

    Return whether it could not be written.
    """
    try:
        sys.stdout.flush()
    except OSError:
        with suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return True
    return False


def main(args: list[str] | None = None) -> None:
    """Run the command line and exit with the documented code."""
    arguments = sys.argv[1:] if args is None else args
    trains = arguments[:1] and arguments[0] in ("train", "resume", "eval") and "--dry-run" not in arguments
    if (
        args is None
        and os.environ.get("WORLD_SIZE", "1") != "1"
        and os.environ.get("RANK", "0") != "0"
        and not trains
    ):
        return  # under torchrun one does what is not shared out
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):  # a text in any alphabet must not fail on a terminal that has one
            with suppress(OSError):  # one that was replaced beneath us is left as it is
                stream.reconfigure(errors="backslashreplace")
    if sys.stdout is None:
        echo("fivestep: standard output is closed: redirect it to a file, or to /dev/null", err=True)
        sys.exit(EXIT_UNEXPECTED)
    try:
        cli.main(args=arguments, prog_name="fivestep", standalone_mode=False)
        check_output(arguments)
    except click.exceptions.NoArgsIsHelpError as error:
        echo(FIRST if error.ctx is not None and error.ctx.parent is None else error.format_message())
        sys.exit(UsageError.exit_code)
    except click.ClickException as error:
        hint = "; give --data once for each file" if "unexpected extra argument" in error.format_message() else ""
        if speaks(error):
            echo(f"fivestep: {error.format_message()}{hint}", err=True)
        sys.exit(UsageError.exit_code)
    except FivestepError as error:
        if "--debug" in arguments:
            raise
        if speaks(error):
            echo(f"fivestep: {error}", err=True)
        sys.exit(error.exit_code)
    except (KeyboardInterrupt, click.Abort):
        echo("fivestep: interrupted", err=True)
        sys.exit(EXIT_INTERRUPTED)
    except BrokenPipeError:
        give_up_output()
        sys.exit(EXIT_UNEXPECTED)
    except OSError as error:
        if "--debug" in arguments:
            raise
        text = str(error)
        if error.filename is None and error.strerror:
            text = error.strerror
        if give_up_output() and error.filename is None:
            text = f"standard output cannot be written: {text}"
        echo(f"fivestep: {text}", err=True)
        sys.exit(EXIT_UNEXPECTED)


if __name__ == "__main__":
    main()
