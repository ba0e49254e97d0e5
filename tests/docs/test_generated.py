"""What the pages say of commands, recipes, files and keys is what the code has."""

import json
import re
from runpy import run_path

import click
import pytest
from torch.distributed.run import get_args_parser

import fivestep as fs
from fivestep.cli import cli
from fivestep.run.config import options, recipes
from tests.docs.pages import PAGES, ROOT, blocks, commands, run_fivestep

generate = run_path(str(ROOT / "docs" / "generate.py"))


def test_generated_parts_are_up_to_date():
    stale = [page.name for page in generate["stale"]()]
    assert not stale, f"{', '.join(stale)}: run `python docs/generate.py`"


def test_every_verb_and_recipe_has_its_place():
    page = (ROOT / "docs" / "command-line.md").read_text()
    for verb in generate["every_command"]():
        assert f"### fivestep {verb}\n" in page
    page = (ROOT / "docs" / "recipes.md").read_text()
    for recipe in recipes():
        assert f"| `{recipe}` |" in page


def test_a_stale_part_is_noticed():
    regenerated = generate["regenerated"]
    page = (ROOT / "docs" / "recipes.md").read_text()
    assert regenerated(page.replace("adamw at 0.0003", "adamw at 0.3")) == page
    assert "adamw at 0.0003" in page


def test_flags_on_the_pages_exist():
    """Flags in running text, and in commands."""
    commands = generate["every_command"]().values()
    known = {option.flag for option in options()} | {one for c in commands for p in c.params for one in p.opts}
    known |= {"--help", "--version"}
    scripts = "".join(path.read_text() for path in (ROOT / "benchmarks").glob("*.py"))
    known |= set(re.findall(r'add_argument\(\s*"(--[a-z-]+)"', scripts))
    known |= {"--emsize", "--nhid"}  # word_language_model's
    known |= {"--time", "--signal", "--requeue", "--open-mode"}  # SLURM's
    known |= {"--nodes", "--ntasks-per-node", "--gpus-per-node", "--cpus-per-task"}
    known |= {flag for action in get_args_parser()._actions for flag in action.option_strings}  # torchrun's
    for page in PAGES:
        for flag in re.findall(r"(?<![\w-])--[a-z][a-z0-9-]+", page.read_text()):
            assert flag in known, f"{page.name}: {flag} is no flag of fivestep"


def test_verbs_on_the_pages_exist():
    for page in PAGES:
        for block in blocks(page):
            for line in commands(block) if block.language == "sh" else []:
                words = line.split()
                if words[0] == "fivestep" and not words[1].startswith("-"):
                    verb = words[1:3] if isinstance(cli.commands.get(words[1]), click.Group) else words[1:2]
                    assert " ".join(verb) in generate["every_command"](), line


def test_every_public_name_is_in_the_reference():
    page = (ROOT / "docs" / "reference.md").read_text()
    for name in fs.__all__:
        assert f":: fivestep.{name}\n" in page, f"{name} is missing in docs/reference.md"


@pytest.mark.slow
def test_the_run_directory_page_names_every_file_and_every_key(tmp_path, monkeypatch):
    """Runs of all three workloads; whatever they leave must be in the page's tables."""
    monkeypatch.chdir(tmp_path)
    page = (ROOT / "docs" / "run-directory.md").read_text()
    documented = set(re.findall(r"^\| `([^`]+)`", page, re.MULTILINE))
    (tmp_path / "my.txt").write_text((ROOT / "LICENSE").read_text())
    small = ["--n-embd", "8", "--n-hidden", "8", "--n-layer", "1", "--threads", "1", "--sample-tokens", "5"]
    text = ["--data", "my.txt", "--max-iters", "2", "--log-every", "1", *small]
    run_fivestep(["train", "gpt-chars", "--n-head", "2", *text])
    often = ["--eval-every", "1", "--anneal-patience", "0", "--early-stop", "1", "--learning-rate", "1e-12"]
    run_fivestep(["train", "rnn-words", "--test-fraction", "0.1", *text, *often])
    run_fivestep(["train", "regression", "--epochs", "1"])
    rows, files, facts = [], set(), set()
    for run in sorted((tmp_path / "runs").iterdir()):
        rows += [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        facts |= json.loads((run / "environment.json").read_text()).keys()
        for path in run.rglob("*"):
            name = re.sub(r"\d{8}", "00000250", str(path.relative_to(run)))
            files.add(name + "/" if path.is_dir() else name)
    keys = {key for row in rows for key in row}
    assert {"step", "loss", "perplexity", "bits_per_char", "tokens_per_second", "samples_per_second"} <= keys
    for found in (keys, files, facts):
        assert found <= documented, f"not on the page: {sorted(found - documented)}"
