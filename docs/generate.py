"""Rewrites the parts of the pages that the code knows better: `python docs/generate.py`.

A part stands between `<!-- generated: NAME -->` and `<!-- end -->`. `tests/docs/test_generated.py` fails where a page
is out of date.
"""

import re
import sys
import tomllib
from importlib import resources
from pathlib import Path
from tempfile import TemporaryDirectory

import click

from fivestep.cli import cli
from fivestep.run.config import LIMITS, Config, options, recipe_values, recipes, validated

DOCS = Path(__file__).parent
PART = re.compile(r"(<!-- generated: (.+?) -->\n).*?(<!-- end -->)", re.DOTALL)


def verbs() -> str:
    """A section for each command, and each below it, with what its `--help` says."""
    sections = []
    for name, command in every_command().items():
        names = cli.context_settings["help_option_names"]
        context = click.Context(command, info_name=f"fivestep {name}", terminal_width=88, help_option_names=names)
        sections.append(f"### fivestep {name}\n\n```text\n{command.get_help(context)}\n```\n")
    return "\n".join(sections)


def every_command() -> dict[str, click.Command]:
    """The commands by name, those of a group after it: `data`, `data make`."""
    found: dict[str, click.Command] = {}
    for name, command in cli.commands.items():
        found[name] = command
        if isinstance(command, click.Group):
            found |= {f"{name} {below}": one for below, one in command.commands.items()}
    return found


def recipe_table() -> str:
    """A row for each recipe: what it says of itself, its model, data, optimizer and length."""
    lines = ["| recipe | what it is | model | data | optimizer | length |", "|---|---|---|---|---|---|"]
    for name in recipes():
        text = (resources.files("fivestep.run") / "recipes" / f"{name}.toml").read_text("utf-8")
        values = tomllib.loads(text)
        comment = [line for line in text.splitlines() if line.startswith("#")]
        first = comment[: comment.index("#")] if "#" in comment else comment  # its first paragraph
        about = " ".join(line.lstrip("# ") for line in first).replace("; see what it takes before:", ".")
        length = ", ".join(f"`{one} = {values[one]}`" for one in LIMITS if one in values)
        config = recipe_config(name)
        model = config.model + (f" ({config.cell})" if config.model == "rnn" else "")
        optimizer = f"{config.optimizer} at {config.learning_rate:g}"
        cells = (f"`{name}`", about, model, ", ".join(config.data), optimizer, length)
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def recipe_config(name: str) -> Config:
    """A recipe with every option resolved; one that leaves the data to the user gets a name to stand for it."""
    values = recipe_values(name)
    return validated({"data": ["your text"], **values})


def recipe_options() -> str:
    """A row for each option that any recipe sets, with its default and each recipe's value."""
    held = {}
    for name in recipes():
        text = (resources.files("fivestep.run") / "recipes" / f"{name}.toml").read_text("utf-8")
        held[name] = tomllib.loads(text)
    lines = [
        "| option | default | " + " | ".join(f"`{name}`" for name in held) + " |",
        "|---|---|" + "---|" * len(held),
    ]
    for option in options():
        if option.name != "data" and any(option.name in values for values in held.values()):
            default = "" if option.default is None else shown(option.default)
            row = [shown(values[option.name]) if option.name in values else "" for values in held.values()]
            lines.append(f"| `{option.name}` | {default} | " + " | ".join(row) + " |")
    return "\n".join(lines) + "\n"


def shown(value: object) -> str:
    """A value as TOML would write it, more or less."""
    return str(value).lower() if isinstance(value, bool) else str(value)


def ejected_loop() -> str:
    """What `fivestep eject gpt-chars` writes, from the model's making on."""
    from fivestep.learn.eject import text_of

    _, mark, rest = text_of(recipe_config("gpt-chars"), Path("train.py")).partition("torch.manual_seed(seed)\n")
    return f"```py\n{mark}{rest}```\n"


def simulated(file: str) -> str:
    """What `--simulate-world` says of a configuration on the page, for both ways and three sizes of the world."""
    from fivestep.run.config import load_config
    from fivestep.run.dry_run import in_bytes, in_units
    from fivestep.run.simulate import in_seconds, job_of, shares, simulate
    from fivestep.run.wire import H100, sent_bytes

    page = (DOCS / "scale-arithmetic.md").read_text("utf-8")
    text = re.search(rf"<!-- test: file {re.escape(file)}[^\n]*\n```toml\n(.*?)```", page, re.DOTALL)
    assert text is not None, f"the page has no {file}"
    jobs, memories, times = {}, [], []
    with TemporaryDirectory() as folder:
        path = Path(folder) / file
        path.write_text(text[1], "utf-8")
        for parallel, world in [(way, size) for way in ("ddp", "fsdp") for size in (8, 64, 1024)]:
            config = load_config(str(path), {"parallel": parallel})
            rows = shares(config, world)[1]
            jobs[rows] = jobs.get(rows) or job_of(config, rows)
            found = simulate(config, world, H100, jobs[rows])
            memory, first = found.memory, f"| {parallel}, {world:,} |"
            parts = (memory.parameters, memory.gradients, memory.optimizer_state, memory.activations)
            parts += (memory.weight_copies, memory.logits_and_loss, memory.communication)
            total = in_bytes(memory.total) if memory.total <= H100.memory_bytes else f"**{in_bytes(memory.total)}**"
            memories.append(" | ".join([first[:-2], *map(in_bytes, parts), total]) + " |")
            sent = in_bytes(sum(sent_bytes(one, world) for one in found.collectives))
            seconds = (found.arithmetic_seconds, found.wire_seconds, found.step_seconds)
            shown = [f"{found.micro_batches} × {found.job.rows}", sent, *map(in_seconds, seconds)]
            shown.append(in_units(config.batch_size * found.job.tokens / found.step_seconds).strip())
            times.append(" | ".join([first[:-2], *shown, f"{found.at_most:.1%}", f"{found.expected:.1%}"]) + " |")
    return "\n".join([*MEMORY_HEAD, *memories, "", *TIME_HEAD, *times]) + "\n"


MEMORY_HEAD = (
    "| GPUs | parameters | gradients | optimizer | activations | copies | logits, loss | communication | together |",
    "|---|---|---|---|---|---|---|---|---|",
)
TIME_HEAD = (
    "| GPUs | micro-batches | sent | arithmetic ≥ | wire ≥ | a step | tokens/s | utilisation ≤ | expected |",
    "|---|---|---|---|---|---|---|---|---|",
)
GENERATORS = {
    "verbs": verbs,
    "recipe table": recipe_table,
    "recipe options": recipe_options,
    "ejected loop": ejected_loop,
    "simulated gpt2.toml": lambda: simulated("gpt2.toml"),
    "simulated gpt2-7b.toml": lambda: simulated("gpt2-7b.toml"),
}


def regenerated(text: str) -> str:
    """A page's text with every generated part written anew."""
    return PART.sub(lambda part: part[1] + "\n" + GENERATORS[part[2]]() + "\n" + part[3], text)


def stale() -> list[Path]:
    """The pages whose generated parts are out of date."""
    pages = sorted(DOCS.glob("*.md"))
    return [page for page in pages if regenerated(page.read_text("utf-8")) != page.read_text("utf-8")]


if __name__ == "__main__":
    for page in stale():
        page.write_text(regenerated(page.read_text("utf-8")), "utf-8")
        sys.stdout.write(f"rewrote {page}\n")
