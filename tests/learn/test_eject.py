"""An ejected file is a plain loop that ends with the weights of `fivestep train`, bit for bit."""

import ast
import json
import random
import re
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from fivestep.cli import main
from fivestep.learn.eject import plain_paths
from fivestep.run.config import recipes
from tests.run.cli import fivestep as fivestep  # a fixture

ROOT = Path(__file__).parents[2]
SMALL_WORDS = "--n-embd 16 --n-hidden 16 --batch-size 8 --bptt 9"
EXACT = "--graph off --loss plain --threads 1 --sample-tokens 0"
# What makes each recipe small; 200 steps of it, also across epochs, in one or two seconds.
RECIPES = {
    "bigram": "--data text.txt --max-iters 200 --eval-every 100",
    "gpt-chars": "--data text.txt --n-embd 8 --block-size 12 --batch-size 6 --max-iters 200 --eval-every 90",
    "gpt2-124m": "--data text.txt --max-vocabulary 400 --vocab-size 420 --n-layer 2 --n-head 2 --n-embd 16 "
    "--block-size 12 --max-len 16 --batch-size 8 --accumulate 2 --eval-batch-size 9 --warmup-iters 20 "
    "--precision fp32 --max-iters 200 --eval-every 110",
    "rnn-words": f"--data text.txt {SMALL_WORDS} --max-iters 200 --learning-rate 8",
    "transformer-words": f"--data text.txt {SMALL_WORDS} --max-iters 200 --learning-rate 1",
    "regression": "--epochs 8",  # 25 steps each
    "digits": "--epochs 5 --n-hidden 32",  # 45 steps each
}
# What else a configuration may use: (recipe, flags).
OTHERS = {
    "gpt": (
        "gpt-chars",
        "--data text.txt --n-embd 16 --block-size 12 --batch-size 6 --eval-batch-size 7 --ngrams 1 --tied true "
        "--dropout 0.1 --schedule wsd --min-learning-rate 0.001 --muon-learning-rate 0.02 --no-decay lm_head* "
        "--no-decay *query* --ema 0.9 --clip-norm 0 --clip-value 0.05 --max-iters 30 --eval-every 1ep "
        "--tokenizer bytes --fused false",
    ),
    "rnn": (
        "rnn-words",
        f"--data text.txt {SMALL_WORDS} --n-embd 12 --tied true --cell gru --n-layer 1 --epochs 2 --anneal 3 "
        "--anneal-patience 1 --early-stop 4 --eval-every 1ep --max-vocabulary 300 --min-count 2 --accumulate 3 "
        "--label-smoothing 0.1 --momentum 0.5 --learning-rate 30 --test-fraction 0.05 --epochs 6",
    ),
    "relu": (
        "rnn-words",
        f"--data folder {SMALL_WORDS} --cell rnn_relu --dropout 0 --max-iters 60 --eval-every 7 --anneal 2 "
        "--learning-rate 50 --warmup-iters 10 --freeze encoder*",
    ),
    "mlp": (
        "digits",
        "--n-layer 3 --n-hidden 9 --dropout 0 --epochs 2 --accumulate 2 --batch-size 30 --optimizer muon "
        "--schedule cosine --warmup-iters 5 --min-learning-rate 0.0001 --label-smoothing 0.1",
    ),
    "adam": ("regression", "--optimizer adam --weight-decay 0.1 --beta1 0.8 --epochs 4 --eval-every 3ep --seed 3"),
    "jsonl": ("bigram", "--data text.jsonl --max-iters 20 --replacement false --epochs 1"),
}
# Runs each file, and says what it imported that is not torch, NumPy or the standard library.
DRIVER = """
import runpy, sys
for path in sys.argv[1:]:
    print("file", path, flush=True)
    runpy.run_path(path, run_name="__main__")
assert not [name for name in sys.modules if name.startswith(("fivestep", "sklearn", "safetensors"))]
"""


def prose(length):
    """Return sentences of made-up words: some words are frequent, some rare. They are the same everywhere."""
    drawn = random.Random(0)
    syllables = [first + last for first in "bcdfglmnprstvwx" for last in ("a", "e", "in", "o", "ur", "y")]
    words = ["".join(drawn.choices(syllables, k=drawn.randint(1, 4))) for _ in range(600)]
    weights = [1 / rank for rank in range(1, 601)]
    lines = []
    while sum(map(len, lines)) < length:
        sentence = drawn.choices(words, weights, k=drawn.randint(4, 12))
        lines.append(
            f"{sentence[0].title()} {' '.join(sentence[1:])}{drawn.choice('.,:;?')} ({drawn.randint(0, 99)})\n"
        )
    return "".join(lines)[:length]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A directory with small texts, in which jobs are trained and ejected."""
    place = tmp_path_factory.mktemp("eject")
    text = prose(9_000)
    (place / "text.txt").write_text("\ufeff" + text.replace("x", "é") + " \u2603 Zürich ends", "utf-8")
    (place / "text.jsonl").write_text(json.dumps({"text": text}) + "\n")
    (place / "folder").mkdir()
    (place / "folder" / "train.txt").write_text(text[:8000])
    (place / "folder" / "valid.txt").write_text(text[8000:])
    return place


def jobs():
    """Every job by name: (recipe, flags)."""
    return {**{name: (name, flags) for name, flags in RECIPES.items()}, **OTHERS}


@pytest.fixture(scope="module")
def weights(place):
    """Of each job, the weights that training ends with, those of its ejected file, and what the file printed."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        patch.setenv("FIVESTEP_CACHE", str(place / "cache"))
        for name, (recipe, flags) in jobs().items():
            flags = f"{flags} {EXACT}".split()
            ends_well(["train", recipe, *flags, "--run-dir", f"runs/{name}"])
            flags = flags[:-2]  # nothing is sampled
            ends_well(["eject", recipe, *flags, "--out", f"{name}.py"])
    files = [str(place / f"{name}.py") for name in jobs()]
    # Isolated: no PYTHONPATH, not the current directory.
    done = subprocess.run([sys.executable, "-I", "-c", DRIVER, *files], capture_output=True, text=True, cwd=place)
    assert done.returncode == 0, done.stderr
    printed = dict(zip(jobs(), done.stdout.split("file ")[1:], strict=True))
    return {
        name: (last_weights(place / "runs" / name), dict(np.load(place / f"{name}.npz")), printed[name])
        for name in jobs()
    }


def ends_well(arguments):
    try:
        main(arguments)
    except SystemExit as stop:
        assert not stop.code, arguments


def last_weights(run):
    checkpoint = max((run / "checkpoints").iterdir())
    return load_file(checkpoint / "model.safetensors")


def test_every_recipe_is_here():
    assert set(RECIPES) == set(recipes())


@pytest.mark.parametrize("name", jobs())
def test_ends_with_the_weights_of_fivestep_train_bit_for_bit(name, weights):
    ours, theirs, _ = weights[name]
    assert ours and ours.keys() == theirs.keys()
    for mine in ours:
        assert ours[mine].shape == theirs[mine].shape
        assert ours[mine].tobytes() == theirs[mine].tobytes(), mine


@pytest.mark.parametrize("name", jobs())
def test_says_the_validation_losses_of_the_run(name, weights, place):
    said = re.findall(r"(?:val|accuracy) (\d+\.\d{4})", weights[name][2])
    rows = map(json.loads, (place / "runs" / name / "metrics.jsonl").read_text().splitlines())
    figures = [row[key] for row in rows if row["split"] == "val" for key in ("loss", "accuracy") if key in row]
    assert said == [f"{figure:.4f}" for figure in figures]


def test_annealing_was_put_to_the_test(weights, place):
    """Else the jobs above would prove nothing of it."""
    for name in ("rnn", "relu"):
        assert '"annealed"' in (place / "runs" / name / "metrics.jsonl").read_text()


def test_files_are_linted_and_formatted(weights, place):
    pytest.importorskip("ruff")
    files = [str(place / f"{name}.py") for name in jobs()]
    for verb in (["check"], ["format", "--check"]):
        command = [
            sys.executable,
            "-m",
            "ruff",
            *verb,
            "--no-cache",
            "--config",
            str(ROOT / "pyproject.toml"),
            *files,
        ]
        done = subprocess.run(command, capture_output=True, text=True, cwd=place)
        assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("name", jobs())
def test_files_hold_nothing_of_ours_and_nothing_dead(name, weights, place):
    text = (place / f"{name}.py").read_text()
    assert "fivestep" not in text and "@if" not in text and "$" not in text
    for step in ("# 1. Zero", "# 2. Forward", "# 3. Loss", "# 4. Backward", "# 5. Update"):
        assert text.count(step) == 1
    tree = ast.parse(text)
    names = [node for node in ast.walk(tree) if isinstance(node, ast.Name)]
    read = {node.id for node in names if isinstance(node.ctx, ast.Load)}
    made = {node.id for node in names if isinstance(node.ctx, ast.Store)}
    made |= {node.name for node in ast.walk(tree) if isinstance(node, ast.ClassDef)}
    assert made - read <= {"epoch", "name", "_"}  # of a loop, or of a comprehension
    imported = {(node.module if isinstance(node, ast.ImportFrom) else node.names[0].name).split(".")[0]
                for node in ast.walk(tree) if isinstance(node, ast.Import | ast.ImportFrom)}  # fmt: skip
    assert imported <= {"torch", "numpy", *sys.stdlib_module_names}


def test_gpt_chars_fits_a_few_screens(fivestep):
    outcome = fivestep("eject", "gpt-chars")
    lines = [line for line in Path("train.py").read_text().splitlines() if line.strip()]
    assert len(lines) < 190
    assert outcome.code == 0 and "run it: python train.py" in outcome.out and outcome.err == ""
    assert "dropout" not in "".join(lines) and "autocast" not in "".join(lines)


@pytest.mark.parametrize(
    ("recipe", "read"), [("regression", ""), ("digits", "It reads mine-digits.npz, beside it.\n")]
)
def test_says_what_the_file_writes(fivestep, recipe, read):
    if recipe == "digits":
        pytest.importorskip("sklearn")
    outcome = fivestep("eject", recipe, "--out", "mine.py")
    assert outcome.code == 0 and outcome.out.endswith("python mine.py (it writes its weights to mine.npz)\n")
    head = ast.get_docstring(ast.parse(Path("mine.py").read_text()))
    assert head.endswith(
        f"split.\n{read}It writes the weights that it ends with to mine.npz, beside it, over what is there."
    )


def test_a_run_is_ejected_as_it_was_trained(fivestep):
    Path("text.txt").write_text("some text to learn from. " * 40)
    small = ["--data", "text.txt", "--max-iters", 3, "--block-size", 5, "--sample-tokens", 0]
    assert fivestep("train", "bigram", *small, "--run-dir", "mine").code == 0
    outcome = fivestep("eject", "mine", "--out", "mine.py", "--batch-size", 7)
    assert outcome.code == 0, outcome.err
    text = Path("mine.py").read_text()
    assert "max_iters = 3" in text and "batch_size = 7" in text and str(Path("text.txt").resolve()) in text


def test_nothing_is_overwritten(fivestep):
    Path("train.py").write_text("mine")
    outcome = fivestep("eject", "bigram")
    assert outcome.code == 2 and "train.py is there already; give --force" in outcome.err
    assert Path("train.py").read_text() == "mine"
    assert fivestep("eject", "bigram", "--force").code == 0
    assert "class Bigram" in Path("train.py").read_text()
    Path("digits-digits.npz").write_text("mine")
    outcome = fivestep("eject", "digits", "--out", "digits.py")
    assert outcome.code == 2 and "digits-digits.npz is there already" in outcome.err
    assert not Path("digits.py").exists() and Path("digits-digits.npz").read_text() == "mine"


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["bigrams"], "did you mean 'bigram'?"),
        (["."], ". has no config.toml: a run made from Python is known to its script alone"),
        (["bigram", "--out", "nowhere/train.py"], "there is no folder nowhere"),
        (["bigram", "--out", "."], "is a directory"),
        (["bigram", "--out", "mine.npz"], "mine.npz is where the file would keep its weights"),
        (["bigram", "--eval-every", "5min"], "eval_every = '5min' is not written out as a plain loop: give a number"),
        (["bigram", "--until", "1Mtok"], "until = '1Mtok' is not written out"),
        (["bigram", "--data", "none.txt"], "none.txt does not exist"),
        (["bigram", "--optimizer", "muon"], "muon needs hidden matrices"),
        (["rnn-words", "--variable-bptt", "true"], "give --variable-bptt false"),
        (["rnn-words", "--freeze", "nothing*"], "matches no parameter"),
        (["gpt-chars", "--n-head", "5"], "n_embd must be a multiple of n_head"),
        (["gpt-chars", "--run-dir", "x"], "No such option"),
    ],
)
def test_refuses_in_a_sentence(arguments, sentence, fivestep):
    outcome = fivestep("eject", *arguments)
    assert outcome.code == 2 and sentence in outcome.err
    assert list(Path().iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["bigram", "--graph", "on"], "graph: the steps are eager ones"),
        (["rnn-words"], "loss: the plain one"),
        (["gpt-chars", "--precision", "bf16"], "precision: attention is torch's own"),
        (["gpt-chars", "--on-nonfinite", "skip"], "on_nonfinite: a loss that is not finite is not skipped"),
        (["gpt-chars", "--test-fraction", "0.1"], "the test split is left out"),
    ],
)
def test_says_what_the_file_does_otherwise(arguments, sentence, fivestep):
    outcome = fivestep("eject", *arguments)
    assert outcome.code == 0 and outcome.err.startswith(sentence) and outcome.err.count("\n") == 1


def test_a_file_that_cannot_be_written_is_named(fivestep, monkeypatch, tmp_path):
    @contextmanager
    def denied(path):
        raise PermissionError(13, "Permission denied", f"{path}.part")
        yield

    monkeypatch.setattr("fivestep.learn.eject.written_whole", denied)
    (tmp_path / "my.txt").write_text("one and two\n" * 200)
    done = fivestep("eject", "bigram", "--data", "my.txt", "--out", "mine.py")
    assert (done.code, done.err) == (
        2,
        "fivestep: mine.py cannot be written: Permission denied; give another --out\n",
    )


@pytest.mark.parametrize("name, plain", [("a.txt", True), ("a.ndjson", False), ("a.jsonl.gz", False)])
def test_json_lines_are_not_read_as_plain_text(tmp_path, name, plain):
    (tmp_path / name).write_text("{}")
    assert plain_paths([str(tmp_path / name)]) == ([tmp_path / name] if plain else None)
