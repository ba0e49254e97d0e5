"""Each example runs as it stands, and prints a result that shows that it worked."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.docs.pages import ROOT, run_example

EXAMPLES = sorted((ROOT / "examples").rglob("*.py"))
# What an example needs beside the package, and why it is skipped without.
NEEDED = {
    "digits": ("sklearn", "the digits come with scikit-learn"),
    "images": ("sklearn", "the digits come with scikit-learn"),
    "from_lightning": ("lightning", "moving from Lightning needs lightning: the extra peers"),
    "from_transformers": ("accelerate", "moving from the Trainer needs transformers: the extra peers"),
}


def figure(text, before):
    """The last number that stands after `before`."""
    return float(re.findall(rf"{re.escape(before)}\D*?(-?[\d.]+\d)", text)[-1])


def worked(name, printed):
    """Whether the result that an example prints is the one that it promises."""
    return {
        "regression": lambda: figure(printed, "validation loss") < 0.02,
        "digits": lambda: figure(printed, "'accuracy':") >= 0.96,
        "own_loop": lambda: figure(printed, "validation") < 3.2 and "tensor(" in printed,
        "words": lambda: figure(printed, "validation perplexity") < 150,
        "gan": lambda: abs(figure(printed, "mean") - 4) < 0.5 and 0.2 < figure(printed, "deviation") < 0.8,
        "images": lambda: figure(printed, "validation accuracy") >= 95,
        "dict_batches": lambda: printed.endswith("new new seen seen new seen\n"),
        "own_objective": lambda: "weight 0: y = 2.0" in printed and figure(printed, "error") < 0.12,
        "from_nanogpt": lambda: "the same, bit for bit" in printed,
        "from_word_language_model": lambda: "the same, bit for bit" in printed,
        "from_lightning": lambda: "the same, bit for bit" in printed,
        "from_transformers": lambda: figure(printed, "weights: at most") < 10,  # e-06 or less: it asserts so itself
    }[name]()


@pytest.mark.slow
@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.stem)
def test_example(example, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    if example.stem in NEEDED:
        module, reason = NEEDED[example.stem]
        pytest.importorskip(module, reason=reason)
    assert worked(example.stem, run_example(example)), run_example(example)


@pytest.mark.multiprocess
def test_an_example_runs_by_its_path(tmp_path):
    """As a reader would start it, in a process of its own."""
    done = subprocess.run(
        [sys.executable, ROOT / "examples" / "regression.py"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert "validation loss 0.0" in done.stdout


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.stem)
def test_an_example_says_what_it_shows_and_stays_short(example):
    text = Path(example).read_text()
    assert ast.get_docstring(ast.parse(text))
    longest = 110 if example.parent.name == "moving" else 55
    assert len(text.splitlines()) <= longest
