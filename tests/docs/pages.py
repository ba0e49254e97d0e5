"""Reads the pages and runs what stands on them.

A page's fenced blocks are taken in order, in one empty directory a page:

    ```sh      each line is run: `fivestep ...` and `python examples/...` in this process, `cat`, `ls` and `a | b` by
               ourselves
    ```python  is run, in one namespace a page
    ```text    is what the block before it shows: compared line by line. Figures, white space and the processor's name
               may differ
    ```toml    under `test: file NAME` is written to NAME

A comment before a block, which no reader sees, says what stands in for patience:

    <!-- test: add --max-iters 4 -->                         flags for every `fivestep train` of the block
    <!-- test: with 10_000 -> 8; % 500 -> % 4 -->            other numbers in the block
    <!-- test: instead fivestep train --max-iters 4 -->      run beside what is listed as not run
    <!-- test: free "best weights" to "run:" -->             lines of the shown output that may say anything
    <!-- test: file my.toml -->                              the block is this file
    <!-- test: exit 1 -->                                    every `fivestep` of the block ends with this exit code

Several directions are parted by ` | `. What cannot be run is listed, with the reason, in `test_pages.py`.
"""

import io
import re
import runpy
import shlex
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from unittest.mock import patch

import torch

from fivestep.cli import main

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
PAGES = [page for page in PAGES if "_build" not in page.parts]
HEX = re.compile(r"\b[0-9a-f]{64}\b")
PROCESSOR = re.compile(r"(?<=\bon )(cpu|cuda|mps)(\S*) \(.*\)(?=, threads: )")
NUMBER = re.compile(r"[-+]?\d(?:[\d,.:]*\d)?(?:e[-+]?\d+)?%?")


@dataclass(frozen=True)
class Block:
    """One fenced block of a page."""

    page: Path
    line: int  # of the fence, from 1
    language: str
    directions: tuple[str, ...]
    text: str

    def __str__(self):
        return f"{self.page.relative_to(ROOT)}:{self.line}"

    def direction(self, verb):
        """What the direction `verb ...` says; None where there is none."""
        said = [one.removeprefix(verb).strip() for one in self.directions if one.split(" ")[0] == verb]
        return said[0] if said else None

    def shortened(self):
        """The text with the stand-in numbers of `with A -> B; C -> D`."""
        text = self.text
        for change in filter(None, (self.direction("with") or "").split("; ")):
            old, new = change.split(" -> ")
            assert old in text, f"{self}: there is no '{old}' to replace"
            text = text.replace(old, new)
        return text


def blocks(page):
    """The fenced blocks of a page, in order."""
    found, lines, at = [], page.read_text("utf-8").splitlines(), 0
    while at < len(lines):
        fence = re.match(r"(`{3,})(.*)$", lines[at])
        if not fence:
            at += 1
            continue
        end = next(i for i in range(at + 1, len(lines)) if lines[i].strip() == fence[1])
        comment = re.fullmatch(r"<!-- test: (.*) -->", lines[at - 1]) if at else None
        directions = tuple(comment[1].split(" | ")) if comment else ()
        text = "".join(line + "\n" for line in lines[at + 1 : end])
        found.append(Block(page, at + 1, fence[2].strip(), directions, text))
        at = end + 1
    return found


def commands(block):
    """The command lines of an sh block, continued lines joined and comments dropped."""
    joined = block.shortened().replace("\\\n", " ")
    stripped = (re.sub(r"\s+#\s.*$", "", line).strip() for line in joined.splitlines())
    return [line for line in stripped if line and not line.startswith("#")]


def run_command(line, block):
    """Run one command line; returns what it writes. Raises for an exit code that is not 0."""
    first, _, rest = line.partition(" | ")
    if rest:  # the first one's output is the second one's standard input
        written = io.BytesIO(run_command(first, block).encode())
        with patch("sys.stdin", io.TextIOWrapper(written, "utf-8")):
            return run_command(rest, block)
    words = shlex.split(line)
    if words[0] == "fivestep":
        if words[1] == "train" and "--help" not in words:
            words += shlex.split(block.direction("add") or "")
        return run_fivestep(words[1:], int(block.direction("exit") or 0))
    if words[0] == "python" and words[1].startswith("examples/"):
        return run_example(ROOT / words[1])
    if words[0] == "cat":
        return "".join(Path(name).read_text("utf-8") for name in words[1:])
    if words[0] == "ls":
        return "".join(f"{one.name}\n" for one in sorted(Path(words[1]).iterdir()))
    raise AssertionError(f"{block}: '{line}' is neither run nor listed as not run")


def run_fivestep(arguments, expected=0):
    """What `fivestep` writes, both streams together; it must end with the exit code that is expected."""
    written = io.StringIO()
    code = 0
    with redirect_stdout(written), redirect_stderr(written):
        try:
            main(arguments)
        except SystemExit as stop:
            code = stop.code or 0
    assert code == expected, f"fivestep {shlex.join(arguments)}: exit code {code}: {written.getvalue()}"
    return written.getvalue()


@lru_cache
def run_example(path):
    """What an example prints, run once from its file as it stands."""
    written = io.StringIO()
    torch.manual_seed(0)
    with patch.dict("os.environ"), redirect_stdout(written):
        runpy.run_path(str(path), run_name="__main__")
    return written.getvalue()


def run_python(block, names):
    """What a Python block prints; it reads and leaves its names in `names`."""
    written = io.StringIO()
    # Padded, so that a traceback names the page's own line.
    code = compile("\n" * block.line + block.shortened(), str(block), "exec")
    with redirect_stdout(written):
        exec(code, names)  # noqa: S102  (our own page)
    return written.getvalue()


def compare(shown, written):
    """Assert that a text block shows what was written. Figures, white space and marked lines may differ.

    So may the processor's name.
    """
    free = shown.direction("free")
    expected, actual = masked(shown.text, free, str(shown)), masked(written, free, str(shown))
    assert expected == actual, f"{shown} shows\n{expected}\nbut this was written:\n{actual}"


def masked(text, free, where):
    """Return the lines of `text` that are compared: figures as #, no processor's name, no blank and no free lines."""
    lines = [PROCESSOR.sub(r"\1 (its name)", line) for line in text.splitlines()]
    lines = [re.sub(r"\s+", " ", NUMBER.sub("#", HEX.sub("#", line))).strip() for line in lines]
    lines = [line for line in lines if not line.startswith("#/# epoch # ")]  # progress, which a busy machine adds
    if free:
        first, last = re.fullmatch(r'"(.*)" to "(.*)"', free).groups()
        begins = [i for i, line in enumerate(lines) if line.startswith(first)]
        assert begins, f"{where}: no line begins with '{first}' in\n{text}"
        begin = begins[-1]
        rest = (i for i in range(begin + 1, len(lines)) if last and lines[i].startswith(last))
        lines[begin + 1 : next(rest, len(lines))] = ["(free)"]
    return "\n".join(line for line in lines if line)
