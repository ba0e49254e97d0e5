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
@click.option("--seed", default=0, type=click.IntRange(0, 2**63 - 1), help="Of the draws.  [0]")
@click.option("--weights", default="best", metavar="best|last", help="Which checkpoint.  [best]")
@click.option("--debug", is_flag=True, help="Show the traceback of an error.")
def sample(run: Path, prompt: str | None, debug: bool, weights: str, **how: Any) -> None:
    """Write text from a trained run.

    \b
    fivestep sample runs/gpt-chars-1 --prompt "The " --temperature 0.8
    """
    from fivestep.run.run import load

    loaded = load(run, weights)
    click.echo(loaded.generate(prompt, **how))


@cli.group(cls=Verbs)
def data() -> None:
    """Make, inspect and verify token files.

    Training on a text makes its token file by itself, once, in a cache. Make one beforehand where the text is large,
    where several runs or machines share it, or to look at it.

    \b
    fivestep data make corpus/*.jsonl.gz --tokenizer bpe --out corpus.safetensors
    fivestep data inspect corpus.safetensors
    fivestep train gpt-chars --data corpus.safetensors
    """


@data.command("make")
@click.argument("sources", metavar="SOURCE...", nargs=-1, required=True)
@click.option("--out", metavar="FILE", default=None, help="A name that ends in .safetensors.  [in the cache]")
@click.option("--tokenizer", default="chars", metavar="chars|bytes|words|bpe", help="What a token is.  [chars]")
@click.option(
    "--tokenizer-file", metavar="FILE", default=None, help="A tokenizer.json: ours, or Hugging Face's like GPT-2's."
)
@click.option("--min-count", type=int, default=1, help="Tokens seen less often become <unk>.  [1]")
@click.option("--max-vocabulary", type=int, default=None, help="Keep at most so many tokens.  [bpe: 50257; else all]")
@click.option("--val-fraction", type=float, default=0.1, help="Last part of the text, for validation.  [0.1]")
@click.option("--test-fraction", type=float, default=0.0, help="Part after that, for the test.  [0]")
@click.option("--text-field", default="text", help="The field of JSON lines that holds the text.  [text]")
@click.option("--workers", type=int, default=None, help="Processes.  [one a core, 4 at most; 1 below 8 MB]")
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
    """
    from fivestep.run.preparation import make

    for line in make(list(sources), **how):
        click.echo(line)


@data.command("inspect")
@click.argument("file", metavar="FILE", type=click.Path(path_type=Path))
@click.option("--debug", is_flag=True, help="Show the traceback of an error.")
def data_inspect(file: Path, debug: bool) -> None:
    """Show what a token file holds: splits, tokenizer, the head of its text, its most frequent tokens.

    \b
    fivestep data inspect corpus.safetensors
    """
    from fivestep.run.preparation import inspect

    for line in inspect(file):
        click.echo(line)


@data.command("verify")
@click.argument("file", metavar="FILE", type=click.Path(path_type=Path))
@click.option("--debug", is_flag=True, help="Show the traceback of an error.")
def data_verify(file: Path, debug: bool) -> None:
    """Read a token file whole, and say whether it is what was written; exit code 2 and the first fault if not.

    Checks the header, the sizes, the tokenizer, the digest over every bit, and that all ids are in the vocabulary.

    \b
    fivestep data verify corpus.safetensors
    """
    from fivestep.run.preparation import verify

    for line in verify(file):
        click.echo(line)


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
