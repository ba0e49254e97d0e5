"""The words of a text: what they are, and telling them apart fast.

    text -> bytes, one kind of space -> where words begin and end -> 16 bytes a word -> equal ones, by sorting

Owns the reading of words. Which of them are known, and their ids, is `tokenizer.py`'s.
"""

import re
from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

END_OF_LINE = "<eos>"
PIECE = 1 << 20  # characters: more at a time is slower, as less of it lies in the cache
_ANY_SPACE = re.compile(r"\s")
# Python's whitespace: the space and ten more in ASCII, of which the newline is a word of its own, and these.
_OTHER_SPACES = re.compile("[\x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000]")
_SPACES = bytes.maketrans(b"\t\v\f\r\x1c\x1d\x1e\x1f", b" " * 8)
_ASCII = bytes(range(128))
_FIRST_BYTES = np.array([(1 << 8 * n) - 1 for n in range(9)], np.uint64)  # keeps n of eight
_MIX = np.uint64(0x9E3779B97F4A7C15)  # odd: 2^64 over the golden ratio

Numbers = npt.NDArray[np.uint64]
Places = npt.NDArray[np.int64]


def plain_words(text: str) -> tuple[list[str], Places]:
    """The words between whitespace, each once, in the order of first appearance; which of them stands at each place.

    A line's end is the word `<eos>`; the last line is left open. The definition that `distinct_words` is held to.
    """
    words = text.replace("\n", f" {END_OF_LINE} ").split()
    number = {word: n for n, word in enumerate(dict.fromkeys(words))}
    return list(number), np.array([number[word] for word in words], np.int64)


def word_pieces(text: str) -> Iterator[str]:
    """`text` in pieces of about `PIECE` characters that cut no word, so that little memory is needed beside it."""
    at = 0
    while at < len(text):
        space = _ANY_SPACE.search(text, at + PIECE)
        end = space.end() if space else len(text)
        yield text[at:end]
        at = end


def distinct_words(text: str) -> tuple[list[str], Places]:
    """`plain_words`, about twice as fast: only a word that is new becomes an object of Python's."""
    data = _spaced(text)
    space = np.frombuffer(data, np.uint8) == ord(" ")
    edges = np.flatnonzero(space[1:] != space[:-1]) + 1
    starts, stops = edges[::2], edges[1::2]
    low, high = _keys(data, starts, stops)
    hashed = low * _MIX
    hashed = ((hashed ^ (hashed >> np.uint64(32))) + high) * _MIX
    _, places = np.unique(hashed, return_inverse=True)
    first = np.empty(int(places.max(initial=-1)) + 1, np.int64)  # the first place of each
    first[places[::-1]] = np.arange(len(places) - 1, -1, -1)  # of several writes the last one stays
    same = first[places]
    if not (np.array_equal(low[same], low) and np.array_equal(high[same], high)):
        return plain_words(text)  # two words share a hash: in a megabyte, once in 10^10 or so
    order = np.argsort(first)
    first = first[order]
    spans = zip(starts[first].tolist(), stops[first].tolist(), strict=True)
    joined = b" ".join([data[start:stop] for start, stop in spans]).decode("utf-8", "surrogatepass")
    return joined.split(" ") if joined else [], np.argsort(order)[places]


def _spaced(text: str) -> bytes:
    """UTF-8 with no whitespace but spaces: at least one in front, and 16 behind, so that a key is never cut short."""
    data = text.encode("utf-8", "surrogatepass")  # a prompt typed on a terminal may hold lone surrogates
    if not text.isascii() and _OTHER_SPACES.search(data.translate(None, _ASCII).decode("utf-8", "surrogatepass")):
        data = _OTHER_SPACES.sub(" ", text).encode("utf-8", "surrogatepass")
    return b" " + data.replace(b"\n", f" {END_OF_LINE} ".encode()).translate(_SPACES) + b" " * 16


def _keys(data: bytes, starts: Places, stops: Places) -> tuple[Numbers, Numbers]:
    """Two numbers a word, equal exactly where the words are: its bytes, up to 15, and in the last byte their number.

    Of a longer word the first number is which of the longer ones it is, the second all ones.
    """
    lengths = stops - starts
    eight_bytes = np.ndarray(len(data) - 7, "<u8", data, strides=(1,))  # from each byte on
    low = eight_bytes[starts] & _FIRST_BYTES[np.minimum(lengths, 8)]
    high = eight_bytes[starts + 8] & _FIRST_BYTES[np.clip(lengths - 8, 0, 7)]
    high |= lengths.astype(np.uint64) << np.uint64(56)
    longer = np.flatnonzero(lengths > 15)
    numbers: dict[bytes, int] = {}
    spans = zip(starts[longer].tolist(), stops[longer].tolist(), strict=True)
    low[longer] = [numbers.setdefault(data[start:stop], len(numbers)) for start, stop in spans]
    high[longer] = np.iinfo(np.uint64).max
    return low, high
