"""Random generators: the global ones, and those that a loader and its parts keep for themselves.

Owns reading their states as plain leaves (to be saved), reading and putting back the three of the host quickly
(to look whether something drew), and seeding them. Does not know who draws.
"""

import random
import sys
from _random import Random as Twister
from collections.abc import Iterator
from contextlib import contextmanager
from ctypes import string_at
from hashlib import blake2b
from operator import index as whole_number
from typing import Any

import numpy as np
import torch

WORD_BYTES = 624 * 4  # the words of a Mersenne twister; Python's has its position before them, NumPy's behind


def random_state() -> dict[str, Any]:
    """The states of every global generator: Python's, NumPy's, torch's, and each device's that is in use."""
    return {
        "python": state_of(random),
        "numpy": state_of(np.random),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        "mps": torch.mps.get_rng_state() if torch.backends.mps.is_available() else None,
    }


def restore_random_state(saved: dict[str, Any]) -> None:
    """Put back what `random_state` returned."""
    restore(random, saved["python"])
    restore(np.random, saved["numpy"])
    torch.set_rng_state(saved["torch"])
    if saved["cuda"]:
        torch.cuda.set_rng_state_all(saved["cuda"])
    if saved["mps"] is not None:
        torch.mps.set_rng_state(saved["mps"])


@contextmanager
def random_state_kept(inside: dict[str, Any] | None = None) -> Iterator[None]:
    """Afterwards every global generator is as before; inside they go on, or begin with the state `inside`."""
    before = random_state()
    try:
        if inside is not None:
            restore_random_state(inside)
        yield
    finally:
        restore_random_state(before)


def is_generator(value: Any) -> bool:
    """Whether `value` is an object that random numbers are drawn from: torch's, NumPy's (both kinds) or Python's."""
    return isinstance(value, torch.Generator | np.random.Generator | np.random.RandomState | random.Random)


def state_of(generator: Any) -> Any:
    """A generator's state as plain leaves; `random` and `numpy.random` themselves stand for the global ones."""
    if isinstance(generator, torch.Generator):
        return generator.get_state()
    if isinstance(generator, np.random.Generator):
        return _plain(generator.bit_generator.state)
    if hasattr(generator, "get_state"):
        return _plain(generator.get_state(legacy=False))
    version, words, gauss = generator.getstate()
    return {"version": version, "words": list(words), "gauss": gauss}


def restore(generator: Any, saved: Any) -> None:
    """Put back what `state_of` returned."""
    if isinstance(generator, torch.Generator):
        generator.set_state(saved)
    elif isinstance(generator, np.random.Generator):
        _check_places(saved)
        generator.bit_generator.state = _numpy(saved)
    elif hasattr(generator, "set_state"):
        _check_places(saved)
        generator.set_state(_numpy(saved))
    else:
        generator.setstate((saved["version"], tuple(saved["words"]), saved["gauss"]))


def _check_places(saved: Any) -> None:
    """NumPy reads wherever a state says that its next word is, beyond its words too. Raises ValueError."""
    inner = saved.get("state")
    places = {"pos": 624, "buffer_pos": 4}  # of a Mersenne twister, of Philox
    for table in (saved, inner if isinstance(inner, dict) else {}):
        for name, last in places.items():
            if name in table and not (type(table[name]) is int and 0 <= table[name] <= last):
                raise ValueError(f"{name} = {str(table[name])[:20]} is no place in a generator's state")


def _plain(state: Any) -> Any:
    """NumPy's nested state, its arrays of unsigned words as tensors of the same bits."""
    if isinstance(state, np.ndarray):
        return torch.from_numpy(state.view(np.int32 if state.itemsize == 4 else np.int64).copy())
    return {key: _plain(value) for key, value in state.items()} if isinstance(state, dict) else state


def _numpy(saved: Any) -> Any:
    if isinstance(saved, torch.Tensor):
        words = saved.numpy()
        return words.view(np.uint32 if words.itemsize == 4 else np.uint64).copy()
    return {key: _numpy(value) for key, value in saved.items()} if isinstance(saved, dict) else saved


class HostState:
    """The states of the three generators of the host, read in a few µs (`random_state` takes 60).

    Looking whether a fetch drew must cost next to nothing, and Python's and NumPy's own answers take 8 and 35 µs:
    their twisters' words are read where they stand in memory instead (`_python_words`, `_numpy_words`). What is not
    in the words are the normal numbers that both may hold back: Python's is an attribute; NumPy is asked where the
    words have changed, or one was held back.
    """

    _numpy_seen: tuple[bytes, dict[str, Any]] = (b"", {"has_gauss": 1})  # words, and what is not in them

    def __init__(self) -> None:
        self.python, self.numpy, self.torch = self._python(), self._numpy(), torch.get_rng_state()

    @staticmethod
    def _python() -> tuple[Any, float | None]:
        if _PYTHON_AT is None:
            _, words, gauss = random.getstate()
            return words, gauss
        return string_at(_PYTHON_AT, WORD_BYTES + 4), _PYTHON.gauss_next  # type: ignore[attr-defined]

    @staticmethod
    def _numpy() -> tuple[bytes, dict[str, Any]]:
        source = np.random.get_bit_generator()  # type: ignore[attr-defined]
        if not isinstance(source, np.random.MT19937):  # somebody has called numpy.random.set_bit_generator
            return b"", np.random.get_state(legacy=False)
        words, seen = string_at(source.ctypes.state_address, WORD_BYTES + 4), HostState._numpy_seen
        if words != seen[0] or seen[1]["has_gauss"]:
            state: dict[str, Any] = np.random.get_state(legacy=False)
            HostState._numpy_seen = words, {name: state[name] for name in ("has_gauss", "gauss")}
        return HostState._numpy_seen

    def is_now(self) -> bool:
        """Whether nothing has been drawn since."""
        return (
            self.python == self._python()
            and self.torch.numpy().tobytes() == torch.get_rng_state().numpy().tobytes()
            and _equal(self.numpy, self._numpy())
        )

    def restore(self) -> None:
        """Put all three back."""
        torch.set_rng_state(self.torch)
        if self.python != self._python():
            words, gauss = self.python
            if _PYTHON_AT is not None:  # the position stands first
                position = int.from_bytes(words[:4], sys.byteorder)
                words = (*np.frombuffer(words, np.uint32, offset=4).tolist(), position)
            random.setstate((random.Random.VERSION, words, gauss))
        if not _equal(self.numpy, self._numpy()):
            words, rest = self.numpy
            if not words:
                np.random.set_state(rest)
                return
            key, position = np.frombuffer(words, np.uint32, 624), int.from_bytes(words[WORD_BYTES:], sys.byteorder)
            np.random.set_state(("MT19937", key, position, rest["has_gauss"], rest["gauss"]))
            HostState._numpy_seen = self.numpy

    def state_dict(self) -> dict[str, Any]:
        """As plain leaves."""
        now = HostState()
        self.restore()
        saved = {"python": state_of(random), "numpy": state_of(np.random), "torch": self.torch}
        now.restore()
        return saved

    @classmethod
    def of(cls, saved: dict[str, Any]) -> "HostState":
        """The states that `state_dict` returned; the generators stay as they are."""
        with undisturbed():
            restore(random, saved["python"])
            restore(np.random, saved["numpy"])
            torch.set_rng_state(saved["torch"])
            return cls()

    @classmethod
    def seeded(cls, seed: int) -> "HostState":
        """What `seed_host(seed)` makes; the generators stay as they are."""
        with undisturbed():
            seed_host(seed)
            return cls()


def _equal(left: tuple[bytes, dict[str, Any]], right: tuple[bytes, dict[str, Any]]) -> bool:
    return left is right or (left[0] == right[0] and repr(left[1]) == repr(right[1]))


def _python_twister() -> tuple[random.Random, int | None]:
    """Python's global generator, and the address of its twister where that can be read; else None."""
    generator: random.Random = random.getstate.__self__  # type: ignore[attr-defined]
    address = id(generator) + object.__basicsize__
    if sys.implementation.name != "cpython" or Twister.__basicsize__ < object.__basicsize__ + WORD_BYTES + 4:
        return generator, None
    _, (*words, position), _ = generator.getstate()
    expected = np.array([position, *words], np.uint32).tobytes()
    return generator, address if string_at(address, WORD_BYTES + 4) == expected else None


_PYTHON, _PYTHON_AT = _python_twister()


@contextmanager
def undisturbed() -> Iterator[None]:
    """What is drawn inside from the generators of the host leaves no trace."""
    before = HostState()
    try:
        yield
    finally:
        before.restore()


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Inside, the host's global generators start from `seed`; afterwards they are as before.

    NumPy's generator is replaced and put back, because reading and writing its state takes 100 µs.
    """
    python, torchs, numpys = random.getstate(), torch.get_rng_state(), np.random.get_bit_generator()  # type: ignore[attr-defined]
    held = HostState._numpy()[1]  # a normal number that NumPy holds back is lost when its generator is replaced
    try:
        np.random.set_bit_generator(_ITEMS)  # type: ignore[attr-defined]
        random.seed(seed)
        np.random.seed(seed >> 32)  # a list of both halves takes 8 times as long; torch uses the lower half
        torch.default_generator.manual_seed(seed)
        yield
    finally:
        np.random.set_bit_generator(numpys)  # type: ignore[attr-defined]
        if held["has_gauss"]:
            np.random.set_state({**np.random.get_state(legacy=False), "has_gauss": 1, "gauss": held["gauss"]})
        random.setstate(python)
        torch.set_rng_state(torchs)


_ITEMS = np.random.MT19937(0)  # NumPy's global generator inside `seeded`


def seed_host(seed: int) -> None:
    """Seed Python's, NumPy's and torch's global generator of the host with one of 64 bits; devices stay."""
    random.seed(seed)
    np.random.seed([seed & 0xFFFFFFFF, seed >> 32])
    torch.default_generator.manual_seed(seed)


def mixed(seed: int, *keys: Any) -> int:
    """64 bits from a seed and keys, the same in every process; numbers of any kind count by their value."""
    text = repr((seed, *map(_plain_key, keys)))
    return int.from_bytes(blake2b(text.encode(), digest_size=8).digest(), "little")


def _plain_key(key: Any) -> Any:
    try:
        return whole_number(key)
    except (TypeError, RuntimeError, ValueError):  # no number, or a tensor of several
        return tuple(map(_plain_key, key)) if isinstance(key, list | tuple) else key


def owned_generators(place: Any, name: str, followed: frozenset[str], seen: set[int]) -> dict[str, Any]:
    """The generators that `place` has as attributes, by their path; attributes named in `followed` are searched too.

    `seen` holds the ids of what has been searched or found: each object counts once.
    """
    found: dict[str, Any] = {}
    if place is None or id(place) in seen:
        return found
    seen.add(id(place))
    if is_generator(place):
        return {name: place}
    if isinstance(place, list | tuple):
        attributes = [(str(number), part) for number, part in enumerate(place)] if len(place) < 100 else []
    else:
        attributes = list(getattr(place, "__dict__", {}).items())
    for attribute, value in attributes:
        if (
            is_generator(value)
            or attribute in followed
            or isinstance(place, list | tuple)
            or isinstance(value, torch.utils.data.Sampler)
        ):
            found |= owned_generators(value, f"{name}.{attribute}", followed, seen)
    return found
