"""Every command and every example on the pages runs, and shows what the page shows, figures apart."""

import gzip
import json
import re
from pathlib import Path

import pytest
import torch
from torch import nn

from fivestep.data.corpus import load_corpus
from tests.docs.pages import PAGES, ROOT, blocks, commands, compare, run_command, run_python

# Command lines that are not run here, by how they begin, and why.
NOT_RUN = {
    "make train": "sets up an environment of its own; the command it then runs is run from the other pages",
    "make test": "runs these tests",
    "make torture": "takes an hour; its short forms are tests of their own",
    "make docs": "sets up an environment of its own; test_site.py builds the site",
    ".venv/bin/fivestep explain bigram": "the same without a path is run further down",
    "pip install": "changes the environment",
    "fivestep train gpt-chars --data my.txt --precision fp16": "needs a GPU",
    "torchrun": "starts several processes; test_scale.py parses each line by torchrun's own parser",
    "fivestep train gpt-chars --data s3://": "needs a bucket, and its driver",
    "fivestep train gpt-chars --data https://": "needs a web server; tests/data/test_remote.py has one",
    "fivestep train gpt2-124m": "learns byte pairs from the whole of Python's library: minutes",
}
# What the commands of a page need beside the package; without it the page is skipped.
NEEDED = {
    "bpe": ("tokenizers", "byte pairs need the extra bpe"),
    "fivestep compare": ("plotext", "curves in a terminal need the extra plot"),
    "digits": ("sklearn", "the digits come with scikit-learn"),
    "examples/images.py": ("sklearn", "the digits come with scikit-learn"),
    "from_lightning.py": ("lightning", "needs the extra peers"),
    "from_transformers.py": ("transformers", "needs the extra peers"),
    "moving/from_transformers.py": ("accelerate", "needs the extra peers"),
}


def names(page):
    """What the pages' short Python blocks take for granted: a model, loaders, a criterion, an optimizer."""
    torch.manual_seed(0)
    model = nn.Linear(3, 1)
    loader = [(torch.randn(8, 3), torch.randn(8, 1)) for _ in range(4)]
    return {
        "__name__": "page",
        "model": model,
        "train_loader": loader,
        "val_loader": loader,
        "stream": loader,
        "batch": loader[0],
        "criterion": nn.MSELoss(),
        "optimizer": torch.optim.SGD(model.parameters(), lr=0.01),
    }


@pytest.fixture
def directory(tmp_path, monkeypatch):
    """An empty directory with the texts that the pages name: my.txt, folder/ with splits, and talks.jsonl.gz."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)  # the pages show a CPU's output
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    text = load_corpus("python-manual").splits["train"]
    (tmp_path / "my.txt").write_text(text[:20_000])
    (tmp_path / "folder").mkdir()
    for split, (start, end) in {"train": (0, 15_000), "valid": (15_000, 18_000), "test": (18_000, 21_000)}.items():
        (tmp_path / "folder" / f"{split}.txt").write_text(text[start:end])
    lines = [json.dumps({"text": part}) for part in text[21_000:41_000].split("\n\n")]
    (tmp_path / "talks.jsonl.gz").write_bytes(gzip.compress("\n".join(lines).encode()))
    return tmp_path


def listed(line):
    return next((start for start in NOT_RUN if line.startswith(start)), None)


@pytest.mark.slow
@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_page(page, directory):
    for word, (module, reason) in NEEDED.items():
        if any(word in line for block in blocks(page) if block.language == "sh" for line in commands(block)):
            pytest.importorskip(module, reason=reason)
    namespace, written = names(page), None
    for block in blocks(page):
        if name := block.direction("file"):
            Path(name).write_text(block.shortened())
        elif block.language == "sh":
            lines = commands(block)
            assert lines, f"{block} holds no command"
            instead = block.direction("instead")
            ran = [run_command(line, block) for line in [*lines, *([instead] if instead else [])] if not listed(line)]
            written = "".join(ran) if ran else None
        elif block.language == "python":
            written = run_python(block, namespace)
        elif block.language == "text" and written is not None:
            compare(block, written)
            written = None
        else:
            assert block.language.startswith("{") or is_generated(block), f"{block}: who runs this?"


def test_what_is_not_run_is_still_on_a_page():
    lines = [line for page in PAGES for block in blocks(page) if block.language == "sh" for line in commands(block)]
    for start in NOT_RUN:
        assert any(line.startswith(start) for line in lines), f"no page has '{start}' any more: take it off the list"


def test_shown_output_follows_what_wrote_it():
    """A text block that stands alone would be compared with nothing."""
    for page in PAGES:
        found = blocks(page)
        for before, block in zip([None, *found], found, strict=False):
            if block.language != "text" or is_generated(block):
                continue
            assert before and before.language in ("sh", "python"), f"{block} stands alone"
            ran = before.language == "python" or before.direction("instead") or not all(map(listed, commands(before)))
            assert ran, f"{block} shows the output of what is not run"


def is_generated(block):
    lines = block.page.read_text("utf-8").splitlines()[: block.line - 1]
    marks = [line for line in lines if re.match(r"<!-- (generated: .*|end) -->", line)]
    return bool(marks) and marks[-1] != "<!-- end -->"
