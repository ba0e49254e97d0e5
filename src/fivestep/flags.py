"""The options of the configuration as flags of the command line, their help, and what a shell may complete.

Owns how an option looks and reads; what it means is `run/config.py`'s. Imports no torch.
"""

import os
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

import click
from click.shell_completion import CompletionItem

from fivestep.data.sources import BUILTINS
from fivestep.errors import suggestion
from fivestep.run.config import HEADINGS, STEPS, Option, description, options, recipes
from fivestep.run.report import find_runs

METAVARS = {int: "N", float: "X"}
AMOUNTS = ("until", "eval_every", "log_every", "sample_every", "checkpoint_every")  # 250, 1ep, 10Mtok, 5min


class Verbs(click.Group):
    """The group of verbs; an unknown one fails with a suggestion."""

    def resolve_command(self, ctx: click.Context, args: list[str]) -> Any:
        if args and self.get_command(ctx, args[0]) is None and not args[0].startswith("-"):
            hint = suggestion(args[0], self.commands)
            raise click.UsageError(f"no such command '{args[0]}'; the commands are {', '.join(self.commands)}{hint}")
        return super().resolve_command(ctx, args)

    def list_commands(self, ctx: click.Context) -> list[str]:
        """In the order of the code, which is that of their use."""
        return list(self.commands)


class Recipes(click.Command):
    """A command with the configuration's options, in its help under their headings, and the recipes described."""

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Recipes"):
            formatter.write_dl([(name, description(name)) for name in recipes()])
        heading = "Options"
        grouped: dict[str, list[tuple[str, str]]] = {}
        for param in [param for param in self.get_params(ctx) if isinstance(param, click.Option)]:
            heading = HEADINGS.get(param.name or "", heading)
            record = param.get_help_record(ctx)
            if record is not None:
                grouped.setdefault(heading, []).append(record)
        for heading, records in grouped.items():
            with formatter.section(heading):
                formatter.write_dl(records)


Command = Callable[..., Any]


def with_options(command: Command, names: Iterable[str] | None = None) -> Command:
    """Add a flag for every option of the configuration, or for those named; one that is not given is None."""
    for option in reversed(options()):
        if names is None or option.name in names:
            command = click.option(option.flag, option.name, **_click_kind(option))(command)
    return command


def given(flags: dict[str, Any]) -> dict[str, Any]:
    """The flags that were given, as the configuration takes them."""
    lists = {name: list(value) if isinstance(value, tuple) else value for name, value in flags.items()}
    return {name: value for name, value in lists.items() if value not in (None, [])}


def _click_kind(option: Option) -> dict[str, Any]:
    shown = " ".join(option.default) if isinstance(option.default, list) else option.default
    if isinstance(shown, bool):
        shown = str(shown).lower()
    help = option.help + ("" if shown in (None, "") else f"  [{shown}]")
    common: dict[str, Any] = {"default": None, "help": help}
    if option.name in PLACES:
        common["shell_complete"] = PLACES[option.name]
    if option.kind is bool:
        return {**common, "type": bool, "is_flag": False, "flag_value": True, "metavar": "[true|false]"}
    if isinstance(option.kind, tuple):
        choices = list(option.kind)
        # Checked with the file's values, so that both get the same sentence.
        return {**common, "type": str, "metavar": "|".join(choices), "shell_complete": starting(choices)}
    if option.kind is list:
        return {**common, "type": str, "multiple": True}
    metavar = "AMOUNT" if option.name in AMOUNTS else METAVARS.get(option.kind)
    if option.name in STEPS:  # 250, 10k: checked with the file's values
        return {**common, "type": str, "metavar": metavar}
    return {**common, "type": option.kind, "metavar": metavar}


Completion = Callable[[click.Context, click.Parameter, str], list[CompletionItem]]


def starting(words: Iterable[str]) -> Completion:
    """Completes to those of `words` that begin with what is typed."""

    def complete(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
        return [CompletionItem(word) for word in words if word.startswith(incomplete)]

    return complete


def complete_file(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """Left to the shell, as a file."""
    return [CompletionItem(incomplete, type="file")]


def complete_folder(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """Left to the shell, as a directory."""
    return [CompletionItem(incomplete, type="dir")]


def complete_data(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """The texts that come with Python, and files: the shell's own, where none of those fits."""
    named = [name for name in BUILTINS if name.startswith(incomplete)]
    if not named:
        return complete_file(ctx, param, incomplete)
    with suppress(OSError):
        for entry in sorted(Path().iterdir()):
            hidden = entry.name.startswith(".") and not incomplete
            if entry.name.startswith(incomplete) and not hidden:
                named.append(entry.name + (os.sep if entry.is_dir() else ""))
    return [CompletionItem(name) for name in named]  # bash takes either words or files


def complete_source(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """The names of recipes, and the TOML files here; the shell's own files where none of these fit."""
    named = [CompletionItem(name, help=description(name)) for name in recipes() if name.startswith(incomplete)]
    named += [CompletionItem(str(path)) for path in sorted(Path().glob("*.toml")) if path.name.startswith(incomplete)]
    return named or [CompletionItem(incomplete, type="file")]  # bash takes either words or files


def complete_run(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """The directories of runs, where there are such; any directory otherwise."""
    folder = incomplete.rpartition("/")[0] or "runs"
    try:
        runs = [run for run in find_runs(folder) if run.path.startswith(incomplete)]
    except Exception:  # a completion that fails must not write into what is being typed
        runs = []
    return [CompletionItem(run.path, help=run.state) for run in runs] or [CompletionItem(incomplete, type="dir")]


PLACES = {"data": complete_data, "tokenizer_file": complete_file, "run_dir": complete_folder}  # of options of train
