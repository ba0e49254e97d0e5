"""Every code span in the right column of the tables "there | here" in docs/moving runs.

A span is run as what it is: a command, flags of `fivestep train`, arguments of `fs.fit`, or a Python expression.
"""

import ast
import functools
import inspect
import re
import shlex

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset, default_collate

import fivestep as fs
from fivestep.data.corpus import load_corpus
from fivestep.data.segments import CoveringSegments, Segments
from fivestep.data.tokenizer import build_tokenizer
from fivestep.data.windows import Windows
from tests.docs.pages import ROOT, run_fivestep

PAGES = sorted((ROOT / "docs" / "moving").glob("*.md"))
SPAN = re.compile(r"`([^`]+)`")
ARGUMENTS = re.compile(r"\w+=")
# Names of fields, modules and arguments: nothing to run.
NAMES = {"(features, labels)", "count", "fivestep.data.windows", "torchrun"}
# Arguments that are only looked up, and why they are not run.
LOOKED_UP = {
    "graph=True": "compiling takes half a minute; tests/loop/test_graph.py does it",
    'parallel="fsdp"': "it needs several processes; tests/processes has them",
}


def rows(page):
    """Return the right-hand cells of a page's tables, without links."""
    lines = [line for line in page.read_text("utf-8").splitlines() if line.startswith("| ")]
    cells = [re.split(r"(?<!\\) \| ", line.strip("| "))[-1] for line in lines]
    return [re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", cell) for cell in cells]


CELLS = [(page, cell) for page in PAGES for cell in rows(page) if SPAN.search(cell)]


@pytest.fixture
def namespace(tmp_path, monkeypatch):
    """What the cells take for granted, in a directory with a text, a folder with splits and a run named RUN."""
    monkeypatch.chdir(tmp_path)
    text = "".join(f"{i} is {i * 7 % 13}, said the {i % 5}. " for i in range(400))
    (tmp_path / "my.txt").write_text(text, "utf-8")
    (tmp_path / "folder").mkdir()
    for split in ("train", "valid", "test"):
        (tmp_path / "folder" / f"{split}.txt").write_text(text, "utf-8")
    torch.manual_seed(0)
    model, rows = nn.Linear(3, 4), TensorDataset(torch.randn(32, 3), torch.randint(4, (32,)))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    batch = next(iter(DataLoader(rows, batch_size=8)))
    return {
        "fs": fs,
        "torch": torch,
        "nn": nn,
        "functools": functools,
        "DataLoader": DataLoader,
        "Windows": Windows,
        "Segments": Segments,
        "CoveringSegments": CoveringSegments,
        "load_corpus": load_corpus,
        "build_tokenizer": build_tokenizer,
        "text": text,
        "model": model,
        "optimizer": optimizer,
        "criterion": nn.CrossEntropyLoss(),
        "train_loader": DataLoader(rows, batch_size=8),
        "val_loader": DataLoader(rows, batch_size=8),
        "dataset": rows,
        "collate": default_collate,
        "get_batch": lambda: batch,
        "scheduler": torch.optim.lr_scheduler.StepLR(optimizer, 5),
        "get_lr": lambda step: 0.1 / (1 + step),
        "watcher": lambda result, rows: None,
        "ids": torch.arange(600).numpy() % 29,
        "block_size": 8,
        "batch_size": 4,
        "bptt": 5,
        "lr": 0.1,
    }


def fitted(namespace, code, more=""):
    """Run `fs.fit` with the arguments that `code` gives, for four steps at most."""
    if code in LOOKED_UP:
        assert code.split("=")[0] in inspect.signature(fs.fit).parameters
        return
    given = {keyword.arg for keyword in ast.parse(f"fit({code})").body[0].value.keywords}
    defaults = {"val": "val_loader", "progress": "False", "max_iters": "4"}
    defaults = ", ".join(f"{name}={value}" for name, value in defaults.items() if name not in given)
    call = f"fs.fit(model, train_loader, criterion, optimizer, {', '.join(filter(None, (code, more, defaults)))})"
    if code == 'precision="fp16"':
        with pytest.raises(fs.UsageError, match="needs a GPU"):
            eval(call, namespace)  # noqa: S307  (our own page)
        return
    eval(call, namespace)  # noqa: S307


def tried(namespace, code):
    """Run one code span as what it is."""
    if code in NAMES:
        return
    if code.startswith("fivestep "):
        words = shlex.split(code)[1:]
        run_fivestep([*words, *(["--show-config"] if words[0] == "train" else [])])
    elif code.startswith("--"):
        dry = code == "--dry-run"
        run_fivestep(["train", "bigram", *shlex.split(code), *([] if dry else ["--show-config"]), "--data", "my.txt"])
    elif ARGUMENTS.match(code):
        fitted(namespace, code)
    else:
        eval(code, namespace)  # noqa: S307


@pytest.mark.parametrize(("page", "cell"), CELLS, ids=lambda one: getattr(one, "stem", one))
def test_cell(page, cell, namespace):
    if "RUN" in cell:
        options = ["--max-iters", "2", "--batch-size", "2", "--bptt", "4", "--n-embd", "8", "--n-hidden", "8"]
        run_fivestep(["train", "rnn-words", "--data", "folder", *options, "--sample-tokens", "0", "--run-dir", "RUN"])
    spans = SPAN.findall(cell)
    around = next((code for code in spans if code.startswith("with ")), None)
    for code in spans:
        if around is None or code not in (around, "run=run"):
            tried(namespace, code)
    if around is not None:
        assert "run=run" in spans
        body = "fs.fit(model, train_loader, criterion, optimizer, max_iters=2, progress=False, run=run)"
        exec(f"{around}\n    {body}", namespace)  # noqa: S102


def test_the_tables_are_found():
    assert len(CELLS) > 45 and {page for page, _ in CELLS} == set(PAGES)


@pytest.mark.parametrize("wrong", ["clip=1.0", "fs.Runs", "--clip-nrm 1", "fivestep resumes RUN", "val="])
def test_a_cell_that_is_wrong_is_noticed(wrong, namespace):
    with pytest.raises((AssertionError, AttributeError, TypeError, SyntaxError)):
        tried(namespace, wrong)
