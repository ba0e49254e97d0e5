"""An ejected file is a plain loop that ends with the weights of `fivestep train`, bit for bit."""

import ast
import json
import os
import subprocess
import sys
from pathlib import Path
from pydoc_data.topics import topics

import numpy as np
import pytest
from safetensors.numpy import load_file

from fivestep.learn.eject import FACTS, check_written_out, eject, script
from fivestep.run.config import load_config, recipes
from tests.run.cli import fivestep as fivestep  # a fixture

ROOT = Path(__file__).parents[2]
SMALL_WORDS = "--n-embd 16 --n-hidden 16 --batch-size 8 --bptt 9"
EXACT = "--graph off --loss plain --threads 1 --sample-tokens 0"
# What makes each recipe small; 200 steps of it, also across epochs, in one or two seconds.
RECIPES = {
    "bigram": "--data text.txt --max-iters 200 --eval-every 100",
    "gpt-chars": "--data text.txt --n-embd 16 --block-size 12 --batch-size 6 --max-iters 200 --eval-every 90",
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
    runpy.run_path(path, run_name="__main__")
assert not [name for name in sys.modules if name.startswith(("fivestep", "sklearn", "safetensors"))]
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A directory with small texts, in which jobs are trained and ejected."""
    place = tmp_path_factory.mktemp("eject")
    text = "\n".join(topics[topic] for topic in sorted(topics))[20_000:29_000]
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
    """Of each job, the weights that training ends with, and those of its ejected file."""
    from fivestep.cli import main

    before = Path.cwd()
    os.chdir(place)
    os.environ["FIVESTEP_CACHE"] = str(place / "cache")
    try:
        for name, (recipe, flags) in jobs().items():
            flags = f"{flags} {EXACT}".split()
            main_ends_well(main, ["train", recipe, *flags, "--run-dir", f"runs/{name}"])
            flags = flags[:-2]  # nothing is sampled
            main_ends_well(main, ["eject", recipe, *flags, "--out", f"{name}.py"])
    finally:
        os.chdir(before)
    files = [str(place / f"{name}.py") for name in jobs()]
    # Isolated: no PYTHONPATH, not the current directory.
    done = subprocess.run([sys.executable, "-I", "-c", DRIVER, *files], capture_output=True, text=True, cwd=place)
    assert done.returncode == 0, done.stderr
    return {name: (last_weights(place / "runs" / name), dict(np.load(place / f"{name}.npz"))) for name in jobs()}


def main_ends_well(main, arguments):
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
    ours, theirs = weights[name]
    names = {mine: mine for mine in ours}  # what is tied is there twice
    if "layers.0.weight" in ours and "encoder.weight" not in ours:  # without dropout there is no layer of it to count
        names = dict(zip(sorted(ours), sorted(theirs), strict=True))
    assert ours and set(names.values()) <= set(theirs)
    for mine, other in names.items():
        assert ours[mine].shape == theirs[other].shape
        assert ours[mine].tobytes() == theirs[other].tobytes(), mine
