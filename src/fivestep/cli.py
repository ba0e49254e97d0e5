"""The command line: verbs and flags.

The flags of `train` are the fields of the configuration. Owns parsing, exit codes and the sentence on an error;
imports torch only once a verb needs it.
"""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from fivestep import __version__
from fivestep.errors import FivestepError, UsageError, suggestion
from fivestep.run.config import DEFAULT_RECIPE, Option, load_config, options, recipes, to_toml

EXIT_UNEXPECTED, EXIT_INTERRUPTED = 1, 130


class Verbs(click.Group):
    """The group of verbs; an unknown one fails with a suggestion."""

    def resolve_command(self, ctx: click.Context, args: list[str]) -> Any:
        if args and self.get_command(ctx, args[0]) is None and not args[0].startswith("-"):
            hint = suggestion(args[0], self.commands)
            raise click.UsageError(f"no such command '{args[0]}'; the commands are {', '.join(self.commands)}{hint}")
        return super().resolve_command(ctx, args)


@click.group(cls=Verbs, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 80})
@click.version_option(__version__, prog_name="fivestep")
def cli() -> None:
    """Train PyTorch models: your model, your data, five steps, nothing hidden.

    \b
    fivestep train                       a small GPT on Python's own manual
    fivestep train bigram --data my.txt  a bigram on your text
    fivestep sample runs/gpt-chars-1     text from a trained run
    """


def with_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add a flag for every option of the configuration; one that is not given is None."""
    for option in reversed(options()):
        command = click.option(option.flag, option.name, **_click_kind(option))(command)
    return command


def _click_kind(option: Option) -> dict[str, Any]:
    shown = " ".join(option.default) if isinstance(option.default, list) else option.default
    help = option.help + ("" if shown in (None, "") else f"  [{shown}]")
    common = {"default": None, "help": help}
    if option.kind is bool:
        return {**common, "type": bool, "is_flag": False, "flag_value": True, "metavar": "[true|false]"}
    if isinstance(option.kind, tuple):
        return {**common, "type": str, "metavar": "|".join(option.kind)}  # checked with the file's values
    if option.kind is list:
        return {**common, "type": str, "multiple": True}
    return {**common, "type": option.kind}


@cli.command(epilog=f"Recipes: {', '.join(recipes())}. What a recipe sets wins over the defaults shown in brackets.")
@click.argument("source", metavar="[RECIPE|FILE.toml]", required=False)
@with_options
@click.option("--show-config", is_flag=True, help="Print every option as it would be used, and stop.")
@click.option("--debug", is_flag=True, help="Show the traceback of an error.")
def train(source: str | None, show_config: bool, debug: bool, **flags: Any) -> None:
    """Train a recipe, or what a TOML file describes.

    Flags beat the file, the file beats the recipe. Lengths and intervals: 250 (steps), 1ep, 10Mtok, 5min.

    \b
    fivestep train gpt-chars --data book.txt --max-iters 5000
    fivestep train rnn-words --data folder/ --cell gru --epochs 10
    fivestep train runs/gpt-chars-1/config.toml    the same run again
    """
    given = {name: list(value) if isinstance(value, tuple) else value for name, value in flags.items()}
    given = {name: value for name, value in given.items() if value not in (None, [])}
    config = load_config(source or DEFAULT_RECIPE, given)
    if show_config:
        click.echo(to_toml(config), nl=False)
        return

    from fivestep.run.run import train_run

    train_run(config)


@cli.command()
@click.argument("run", metavar="RUN", type=click.Path(path_type=Path))
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
@click.option("--weights", default="best", metavar="best|last", help="Which checkpoint.  [best]")
@click.option("--debug", is_flag=True, help="Show the traceback of an error.")
def sample(run: Path, prompt: str | None, debug: bool, weights: str, seed: int, num_samples: int, **how: Any) -> None:
    """Write text from a trained run.

    \b
    fivestep sample runs/gpt-chars-1 --prompt "The " --temperature 0.8
    fivestep sample runs/gpt-chars-1 --top-p 0.9 --num-samples 3
    """
    from fivestep.run.run import load

    loaded = load(run, weights)
    for number in range(num_samples):
        pieces = loaded.stream(prompt, seed=seed + number, **how)
        if num_samples > 1:
            click.echo(f"--- seed {seed + number}")
        for piece in pieces:
            click.echo(piece, nl=False)  # flushes: text shows as it comes
        click.echo()


def main(args: list[str] | None = None) -> None:
    """Run the command line and exit with the documented code."""
    arguments = sys.argv[1:] if args is None else args
    try:
        cli.main(args=arguments, prog_name="fivestep", standalone_mode=False)
    except click.exceptions.NoArgsIsHelpError as error:
        click.echo(error.format_message())
        sys.exit(UsageError.exit_code)
    except click.ClickException as error:
        hint = "; give --data once for each file" if "unexpected extra argument" in error.format_message() else ""
        click.echo(f"fivestep: {error.format_message()}{hint}", err=True)
        sys.exit(UsageError.exit_code)
    except FivestepError as error:
        if "--debug" in arguments:
            raise
        click.echo(f"fivestep: {error}", err=True)
        sys.exit(error.exit_code)
    except (KeyboardInterrupt, click.Abort):
        click.echo("fivestep: interrupted", err=True)
        sys.exit(EXIT_INTERRUPTED)
    except BrokenPipeError:
        sys.exit(EXIT_UNEXPECTED)


if __name__ == "__main__":
    main()
