"""States of random generators: whole, plain, put back to the bit, and read quickly."""

import copy
import random

import numpy as np
import pytest
import torch

import fivestep.data.generators as module
from fivestep.data.generators import (
    HostState,
    mixed,
    random_state,
    restore,
    restore_random_state,
    seeded,
    state_of,
    undisturbed,
)

DRAWS = [
    random.random,
    lambda: random.gauss(0, 1),
    np.random.rand,
    np.random.randn,
    lambda: torch.rand(()),
    lambda: torch.randn(()),
    lambda: [random.getrandbits(32) for _ in range(624)],  # a whole turn: the position is where it was
    lambda: np.random.bytes(4 * 624),
]


@pytest.fixture(params=["memory", "asked"])
def how(request, monkeypatch):
    """Python's state read from memory, as CPython allows, and as it is read elsewhere."""
    if request.param == "asked":
        monkeypatch.setattr(module, "_PYTHON_AT", None)
    else:
        assert module._PYTHON_AT is not None


@pytest.mark.parametrize("draw", range(len(DRAWS)))
def test_a_draw_is_seen_and_undone(how, draw):
    for _ in range(3):  # the second normal number is one that was held back
        before, whole = HostState(), str(random_state())
        assert before.is_now()
        DRAWS[draw]()
        assert not before.is_now()
        after = str(random_state())
        before.restore()
        assert str(random_state()) == whole and before.is_now()
        with undisturbed():
            DRAWS[draw]()
        assert str(random_state()) == whole
        DRAWS[draw]()
        assert str(random_state()) == after


def test_a_number_held_back_is_part_of_the_state():
    np.random.randn()
    state = HostState()
    held = np.random.randn()
    assert not state.is_now(), "no word has moved, and yet it was drawn"
    saved = copy.deepcopy(state.state_dict())
    np.random.seed(1), np.random.randn()
    before = str(random_state())
    again = HostState.of(saved)
    assert str(random_state()) == before
    again.restore()
    assert np.random.randn() == held


@pytest.mark.parametrize("kind", [np.random.MT19937, np.random.PCG64])
@pytest.mark.parametrize("held", [False, True])
def test_seeded_leaves_no_trace(kind, held):
    own = np.random.get_bit_generator()
    try:
        np.random.set_bit_generator(kind(3))
        if held:
            np.random.randn()
        before, numbers = str(random_state()), []
        for seed in (5, 5, 5 + 2**32):
            with seeded(seed):
                numbers.append([draw() for draw in (random.random, np.random.randn, lambda: torch.rand(()).item())])
            assert str(random_state()) == before
        assert numbers[0] == numbers[1] != numbers[2]
        with pytest.raises(KeyError), seeded(5):
            raise KeyError
        assert str(random_state()) == before
    finally:
        np.random.set_bit_generator(own)


def test_another_bit_generator():
    own = np.random.get_bit_generator()
    try:
        np.random.set_bit_generator(np.random.PCG64(3))
        state = HostState()
        first = np.random.rand()
        assert not state.is_now()
        state.restore()
        assert np.random.rand() == first
    finally:
        np.random.set_bit_generator(own)


@pytest.mark.parametrize(
    "make, draw",
    [
        (lambda: torch.Generator().manual_seed(1), lambda g: torch.rand((), generator=g).item()),
        *(
            (lambda kind=kind: np.random.Generator(kind(1)), lambda g: g.integers(2**16, dtype=np.uint16))
            for kind in (np.random.PCG64, np.random.PCG64DXSM, np.random.MT19937, np.random.Philox, np.random.SFC64)
        ),
        (lambda: np.random.RandomState(1), lambda g: g.randn()),
        (lambda: random.Random(1), lambda g: g.gauss(0, 1)),
    ],
)
def test_every_kind_of_generator(make, draw):
    generator = make()
    draw(generator)
    saved = copy.deepcopy(state_of(generator))
    numbers = [draw(generator) for _ in range(5)]
    new = make()
    restore(new, saved)
    assert [draw(new) for _ in range(5)] == numbers


def test_all_global_generators():
    for draw in DRAWS:
        draw()
    saved = copy.deepcopy(random_state())
    drawn = (random.gauss(0, 1), np.random.randn(), torch.randn(()).item())
    random.seed(0), np.random.seed(0), torch.manual_seed(0)
    restore_random_state(saved)
    assert (random.gauss(0, 1), np.random.randn(), torch.randn(()).item()) == drawn


def test_keys():
    assert mixed(1, 2) == mixed(1, np.int64(2)) == mixed(1, torch.tensor(2))
    assert mixed(1, [2, np.int32(3)]) == mixed(1, (2, 3))
    assert mixed(1, "a") != mixed(1, "b")
    assert len({mixed(seed, key) for seed in range(30) for key in range(30)}) == 900


@pytest.mark.parametrize("kind", [np.random.MT19937, np.random.Philox])
@pytest.mark.parametrize("place", [-1, 625, 2**40, "3", True])
def test_a_place_beyond_the_words_is_refused(kind, place):
    """NumPy would read there, outside of its memory."""
    generator = np.random.Generator(kind(1))
    saved = state_of(generator)
    table, name = (saved["state"], "pos") if kind is np.random.MT19937 else (saved, "buffer_pos")
    assert type(table[name]) is int
    table[name] = place
    with pytest.raises(ValueError, match="is no place in a generator's state"):
        restore(generator, saved)
