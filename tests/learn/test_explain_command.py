"""`fivestep explain` as a command: recipes and runs, what it refuses, what it leaves behind, and its page."""

import hashlib
import io
import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch

from fivestep.errors import NonFiniteError
from fivestep.extras import installing
from fivestep.learn.explain import explain
from fivestep.learn.explain_page import page
from fivestep.learn.explain_text import STAGES, lines
from fivestep.run.checkpoint import find, load_checkpoint, read_manifest
from fivestep.run.loaded import load
from fivestep.watch.screen import Console
from tests.run.cli import fivestep  # noqa: F401  (a fixture)

TEXT = "the fox & the hen said <b> \"no\" and 'so' to </script> on a <!-- day -->\n" * 40
BIGRAM = ["--data", "text.txt", "--max-iters", "20"]
VOID = {"meta", "br", "img", "hr", "link"}


@pytest.fixture(autouse=True)
def text(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.txt").write_text(TEXT)


def refused(outcome, *words):
    assert outcome.code == 2, outcome.out + outcome.err
    assert outcome.err.startswith("fivestep: ") and outcome.err.count("\n") == 1
    for word in words:
        assert word in outcome.err


def files(folder):
    return {path: hashlib.sha256(path.read_bytes()).hexdigest() for path in Path(folder).rglob("*") if path.is_file()}


@pytest.fixture
def run(fivestep):  # noqa: F811
    """A run of 20 steps with checkpoints of 5, 10, 15 and 20."""
    outcome = fivestep(
        *("train", "rnn-words", *BIGRAM, "--graph", "off", "--bptt", "5", "--batch-size", "4", "--n-embd", "8"),
        *("--n-hidden", "8", "--n-layer", "1", "--run-dir", "mine", "--checkpoint-every", "5", "--keep-every", "5"),
        *("--eval-every", "20", "--sample-tokens", "0", "--optimizer", "adamw", "--learning-rate", "0.01"),
    )
    assert outcome.code == 0, outcome.err
    return Path("mine")


def test_a_recipe(fivestep):  # noqa: F811
    outcome = fivestep("explain", "bigram", *BIGRAM)
    assert outcome.code == 0, outcome.err
    assert outcome.out.startswith("One iteration of bigram: step 1 of 20\n")
    assert [f"{i}  {name} " in outcome.out for i, name in enumerate(STAGES, 1)] == [True] * 9
    assert "\x1b" not in outcome.out and max(map(len, outcome.out.splitlines())) <= 80
    assert sorted(path.name for path in Path().iterdir()) == ["text.txt"]  # nothing is left behind


def test_what_it_prints_is_what_its_facts_say(fivestep, capsys):  # noqa: F811
    facts = explain("bigram", {"data": ["text.txt"], "max_iters": 20})
    assert capsys.readouterr().out == "".join(f"{line}\n" for line, _ in lines(facts, 80))


def test_on_the_way_to_a_later_step_there_is_a_bar(monkeypatch):
    """And none of it stays, also where the training breaks off."""
    monkeypatch.setattr("fivestep.learn.explain.perf_counter", iter(range(0, 10**6, 2)).__next__)
    screen = io.StringIO()
    console = Console(file=screen, force_terminal=True, width=80, height=40, legacy_windows=False)
    explain("regression", {}, 30, console=console)
    assert "trained 29 of 30 steps" in screen.getvalue()
    shown = screen.getvalue().rpartition("trained 29 of 30 steps")[2]
    assert "One iteration of regression: step 31 of 500" in shown and "\x1b[2K" in shown  # the bar's line is erased
    assert "\x1b[?25h" in shown  # and the cursor is back
    with pytest.raises(NonFiniteError):
        explain("regression", {"optimizer": "sgd", "learning_rate": 1e6}, 40, console=console)
    assert screen.getvalue().endswith("\x1b[?25h") or "\x1b[?25h" in screen.getvalue()[-40:]


def test_long_words_fit_the_line(fivestep):  # noqa: F811
    Path("text.txt").write_text(f"{'long' * 40} word {'x' * 79} {'-' * 300}\n" * 30)
    outcome = fivestep("explain", "rnn-words", "--data", "text.txt", "--bptt", "5", "--batch-size", "2")
    assert outcome.code == 0 and max(map(len, outcome.out.splitlines())) <= 80, outcome.err


def test_a_run_from_its_last_checkpoint(run, fivestep):  # noqa: F811
    before = files(run)
    outcome = fivestep("explain", run)
    assert outcome.code == 0, outcome.err
    assert outcome.out.startswith("One iteration of mine: step 21, after the planned 20\n")
    assert files(run) == before  # it is only read


@pytest.mark.parametrize(("step", "taken"), [(5, 5), (12, 10), (19, 15), (1000, 20)])
def test_a_run_from_the_checkpoint_at_or_before_a_step(run, fivestep, capsys, step, taken):  # noqa: F811
    facts = explain("mine", {}, step)
    said = f"of step {step:,} there is no checkpoint: this is the one at {taken:,}"
    assert (said in facts.notes) == (step != taken)
    assert facts.loop.before == taken
    model = load("mine").model
    [checkpoint] = [one for one in (run / "checkpoints").iterdir() if one.name.endswith(f"{taken:08}")]
    load_checkpoint(read_manifest(checkpoint), model)
    for layer in facts.parameters.layers:
        weight = dict(model.named_parameters())[layer.name]
        assert layer.weight_norm == float(weight.detach().double().norm())
    [arithmetic] = facts.update.arithmetic
    assert arithmetic.updates == taken and arithmetic.inputs["m"] != 0 and arithmetic.equal  # its own averages
    assert not facts.batch.carry.fresh and all(slope.agrees for slope in facts.gradients.slopes)


def test_a_run_s_step_is_the_one_that_the_recipe_makes(run):
    """From a checkpoint, and trained up to there: the same step, every number of it."""
    flags = {"data": ["text.txt"], "max_iters": 20, "graph": "off", "bptt": 5, "batch_size": 4, "n_embd": 8}
    flags |= {"n_hidden": 8, "n_layer": 1, "optimizer": "adamw", "learning_rate": 0.01}
    one, other = explain("mine", {}, 10), explain("rnn-words", flags, 10)
    assert other.batch.carry.ended_with == one.batch.text[0].sees[0]
    carry = replace(other.batch.carry, ended_with=None)  # a checkpoint holds no segment of before
    assert one == replace(other, title="mine", batch=replace(other.batch, carry=carry), notes=[])


def test_a_damaged_checkpoint_is_named_and_gone_around(run, fivestep):  # noqa: F811
    path = find(run / "checkpoints", "last").path / "state.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    outcome = fivestep("explain", run)
    assert outcome.code == 0 and "is damaged" in outcome.out and "step 16 of 20" in outcome.out


def test_a_run_is_explained_on_its_own_data_and_options(run, fivestep):  # noqa: F811
    refused(fivestep("explain", run, "--seed", "3"), "--seed", "as it was trained")
    Path("text.txt").write_text(TEXT.replace("fox", "cat"))
    refused(fivestep("explain", run), "has changed")


def test_what_cannot_be_explained(fivestep, tmp_path):  # noqa: F811
    refused(fivestep("explain", "bigrm"), "did you mean 'bigram'?")
    refused(fivestep("explain", "bigram", *BIGRAM, "--step", "20"), "step = 20", "ends after 20", "--max-iters")
    refused(fivestep("explain", "bigram", *BIGRAM, "--html", "."), "is a directory", "--html")
    refused(fivestep("explain", "bigram", *BIGRAM, "--html", "no/such.html"), "does not exist", "--html")
    (tmp_path / "empty").mkdir()
    refused(fivestep("explain", "empty"), "empty", "not a run")
    assert sorted(path.name for path in Path().iterdir()) == ["empty", "text.txt"]


def test_before_its_first_checkpoint_a_run_cannot_be_explained(run, fivestep):  # noqa: F811
    refused(fivestep("explain", run, "--step", "3"), "no checkpoint at or before step 3", "its first is of 5")
    for one in (run / "checkpoints").iterdir():
        for file in one.iterdir():
            file.unlink()
        one.rmdir()
    refused(fivestep("explain", run), "holds no checkpoint")


def test_a_step_that_is_not_finite_stops_with_its_code(fivestep):  # noqa: F811
    outcome = fivestep("explain", "regression", "--optimizer", "sgd", "--learning-rate", "1e6", "--step", "40")
    assert outcome.code == 3 and "Traceback" not in outcome.err


# --- the page ---


class Checked(HTMLParser):
    """Follows a page tag by tag: what is left open, what closes nothing, what refers elsewhere."""

    def __init__(self):
        super().__init__()
        self.open, self.faults, self.text, self.ids = [], [], [], []

    def handle_starttag(self, tag, attributes):
        if tag not in VOID:
            self.open.append(tag)
        for name, value in attributes:
            address = value or ""
            if name == "id":
                self.ids.append(address)
            if tag in ("script", "link", "iframe", "img", "object") or name.startswith("on"):
                self.faults.append((tag, name, value))
            if name in ("src", "href", "action", "data", "xlink:href") and not address.startswith("#"):
                self.faults.append((tag, name, value))

    def handle_startendtag(self, tag, attributes):
        self.handle_starttag(tag, attributes)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag):
        if not self.open or self.open.pop() != tag:
            self.faults.append(("closes", tag, self.getpos()))

    def handle_data(self, data):
        self.text.append(data)


def checked(content):
    parser = Checked()
    parser.feed(content)
    parser.close()
    assert parser.open == [], parser.open
    return parser


@pytest.mark.parametrize("recipe", ["bigram", "rnn-words", "regression", "gpt-chars"])
def test_the_page_is_whole_and_asks_for_nothing(recipe, capsys):
    small = {"n_embd": 8, "n_hidden": 8, "n_layer": 1, "ngrams": 1, "batch_size": 4}
    facts = explain(
        recipe, small | ({} if recipe == "regression" else {"data": ["text.txt"]}), html=Path("step.html")
    )
    assert capsys.readouterr().out.endswith("as a page: step.html\n")
    content = Path("step.html").read_text("utf-8")
    parser = checked(content)
    assert parser.faults == []
    assert parser.ids == [f"stage-{i}" for i in range(1, 10)]
    assert not re.search(r"url\(|@import|https?:|<script|javascript:", content)
    assert "default-src 'none'" in content
    said = "".join(parser.text)
    for line, _ in lines(facts, 88):
        assert line.strip() in said or line[3:].strip("─ ") in STAGES, line


def test_the_page_shows_the_facts_in_its_pictures(fivestep):  # noqa: F811
    facts = explain("bigram", {"data": ["text.txt"], "max_iters": 20})
    content = page(facts)
    for row in facts.batch.text:
        for token, value in zip(row.predicts, row.losses, strict=True):
            assert f': {value:.4f}">' in content, (token, value)
    logits = facts.forward.heat.logits
    digits = 1 if max(abs(value) for row in logits for value in row) >= 3 else 2
    assert all(f">{value:.{digits}f}</td>" in content for row in logits for value in row)
    assert content.count('class="heat wanted"') == len(facts.forward.heat.targets)
    top = max(max(row.losses) for row in facts.batch.text)
    darkest = [value for row in facts.batch.text for value in row.losses if value == top]
    assert content.count("--s: 85%") >= len(darkest)


def test_text_of_a_user_is_text_on_the_page(fivestep):  # noqa: F811
    hostile = "<script>alert(1)</script> <img src=x onerror=alert(2)> &amp; \"' </pre></section>\n" * 30
    Path("text.txt").write_text(hostile)
    for recipe, sizes in (("rnn-words", {"bptt": 5, "batch_size": 4}), ("bigram", {"block_size": 30})):
        facts = explain(recipe, {"data": ["text.txt"], **sizes})
        parser = checked(page(facts))
        assert parser.faults == [] and len(parser.ids) == 9
        assert "onerror" in "".join(parser.text).replace(" ", "")  # it is there, as text


def looked_at(file):
    """What Chromium finds on a page; skips where it cannot be had."""
    command = [sys.executable, str(Path(__file__).with_name("browser.py")), str(file)]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=300, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    if done.returncode == 3:
        pytest.skip(f"no Chromium here ({done.stdout.strip()}): {installing('browser')}")
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.browser
def test_the_page_in_a_browser_without_a_network(fivestep):  # noqa: F811
    assert fivestep("explain", "bigram", *BIGRAM, "--html", "step.html").code == 0
    found = looked_at("step.html")
    assert found["loaded"] and found["console"] == [] and found["asked"] == []
    assert list(found["stages"]) == [f"stage-{i}" for i in range(1, 10)]
    assert all(height > 100 for height in found["stages"].values()), found["stages"]
    assert found["clipped"] == [] and found["wide"] == 0


@pytest.mark.browser
def test_the_browser_would_have_seen_a_fault():
    Path("bad.html").write_text(
        "<img src='http://192.0.2.1/x.png'><section id=stage-1><h2>1</h2><p>a</p></section>"
        "<section id=stage-2 style='display: none'><h2>2</h2></section><script>missing()</script>"
    )
    found = looked_at("bad.html")
    assert found["asked"] == ["http://192.0.2.1/x.png"]
    assert any("missing" in message for message in found["console"])
    assert found["stages"]["stage-1"] > 0 and found["stages"]["stage-2"] == 0


@pytest.mark.parametrize("recipe", ["digits", "transformer-words"])
def test_other_recipes_with_their_own_data(recipe, fivestep):  # noqa: F811
    if recipe == "digits":
        pytest.importorskip("sklearn", reason="the digits come with scikit-learn")
    small = ["--data", "text.txt", "--n-embd", "8", "--n-hidden", "8"] if recipe != "digits" else []
    outcome = fivestep("explain", recipe, *small, "--html", "step.html")
    assert outcome.code == 0 and "THEY DIFFER" not in outcome.out, outcome.err
    assert checked(Path("step.html").read_text("utf-8")).faults == []
    assert torch.get_num_threads() == 1
