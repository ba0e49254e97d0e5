import random
import sys

import numpy as np
import pytest

from fivestep.data import words as module
from fivestep.data.words import distinct_words, plain_words

SPACES = [c for c in map(chr, range(sys.maxunicode + 1)) if c.isspace()]
WORDS = ["a", "a\0", "\0", "é", "中文", "🙂", "\ud800", "\ufeff", "<unk>", "<eos>", "\x7f", "\u200b", "\u180e", "ÿ"]
WORDS += ["x" * n for n in (7, 8, 9, 14, 15, 16, 17, 300)] + ["x" * 15 + c for c in "yz"] + ["é" * n for n in (7, 8)]
WORDS += ["x" * 14 + "\0", "x" * 7 + "\0", "x" * 7 + "\0\0", "\xff" * 4, "\U0010ffff" * 3, "\U0010ffff" * 4]


def same(text):
    (words, places), (plain, where) = distinct_words(text), plain_words(text)
    return words == plain and places.dtype == where.dtype and np.array_equal(places, where)


def test_words_are_those_of_the_plain_definition():
    draw = random.Random(0)
    for length in [0, 1, 2, 3, 10, 1000] * 5:
        parts = [draw.choice(WORDS) + draw.choice(["", *SPACES, " ", "\n", "\r\n", "\n\n"]) for _ in range(length)]
        text = "".join(parts)
        assert same(text), ascii(text)
        assert same(text.encode("ascii", "ignore").decode()), ascii(text)


@pytest.mark.parametrize("space", SPACES, ids=ascii)
def test_every_space_of_python_parts_words(space):
    assert same(f"one{space}two{space}{space}one é{space}")
    assert distinct_words(f"one{space}two")[0][-1] == "two"


@pytest.mark.parametrize(
    "text", ["", " ", "\n", "\n\n", " \n ", "a", "a\n", "\na", "\r\n", "a\r\nb", "\x85", "\u3000a"]
)
def test_edges(text):
    assert same(text)


def test_words_with_the_same_hash_are_told_apart(monkeypatch):
    monkeypatch.setattr(module, "_MIX", np.uint64(0))  # all have
    text = "one two one three\n"
    assert np.unique(module._keys(b" one two" + b" " * 16, np.array([1, 5]), np.array([4, 8]))[0]).size == 2
    assert same(text) and distinct_words(text)[0] == ["one", "two", "three", "<eos>"]


def test_random_bytes_as_text():
    random_bytes = np.random.default_rng(0).integers(0, 256, 100_000, np.uint8).tobytes()
    assert same(random_bytes.decode("latin-1"))
    assert same(random_bytes.decode("utf-8", "replace"))
    assert same("".join(map(chr, np.random.default_rng(1).integers(0, 0x3100, 100_000))))
