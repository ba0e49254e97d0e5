"""Text to ids and back: characters, bytes, words or byte pairs, fitted on the training text alone.

    text -> counts of its tokens (added up over its blocks) -> vocabulary -> ids of each block, one after another

Owns the vocabularies, their JSON and their fingerprint. Does not know splits, caches (`tokens.py`) or how a long
text is gone through (`preparation.py`); byte pairs are learned by `bpe.py`.
"""

import hashlib
import json
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from itertools import chain, repeat
from operator import add
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

from fivestep.data import bpe
from fivestep.data.files import read_bounded, written_whole
from fivestep.data.words import END_OF_LINE, distinct_words, word_pieces
from fivestep.errors import UsageError, suggestion

Ids = npt.NDArray[np.integer]

FORMAT, VERSION = "fivestep-tokenizer", 1
UNKNOWN = "<unk>"
MOST_BYTES = 1 << 28  # of a tokenizer's file
MOST_TOKENS = 10_000_000  # a vocabulary limit beyond it means nothing: a token file could not hold so many
MOST_COUNT = 2**63 - 1
_REPLACEMENT = "\ufffd"
_PIECE = 1 << 20  # characters encoded at a time, so that a long text needs little beside its ids


class Tokenizer(ABC):
    """What all have in common: a vocabulary, its two directions, and its name.

    vocabulary: the token of each id. unknown: the id for what is not in the vocabulary, or None. end: the id that
    closes a last line without a newline, or None.
    """

    kind: ClassVar[str]
    unknown: int | None = None
    end: int | None = None

    def __init__(self, vocabulary: Sequence[str]) -> None:
        self.vocabulary = list(vocabulary)

    @property
    def vocab_size(self) -> int:
        return len(self.vocabulary)

    @property
    def dtype(self) -> np.dtype[Any]:
        """The smallest of uint8, uint16 and int32 that holds every id."""
        return _smallest(self.vocab_size)

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256, in hexadecimal, of the canonical JSON: equal exactly when text becomes equal ids."""
        canonical = json.dumps(self.to_json(), sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(canonical.encode()).hexdigest()

    def to_json(self) -> dict[str, Any]:
        return {"format": FORMAT, "version": VERSION, "kind": self.kind, "vocabulary": self.vocabulary}

    def count_unknown(self, ids: Ids) -> int:
        """How many of `ids` are the unknown token (in words, the text's own `<unk>` too)."""
        return 0 if self.unknown is None else int(np.count_nonzero(ids == self.unknown))

    @abstractmethod
    def encode(self, text: str) -> Ids:
        """The ids of a text: 1-D, of `dtype`."""

    def encode_prompt(self, text: str) -> Ids:
        """The ids of a text that goes on, a prompt or a block: like `encode`, but the last line is left open."""
        return self.encode(text)

    @abstractmethod
    def decode(self, ids: Any) -> str:
        """The text of ids (any array or sequence of integers). Raises UsageError for an id out of range."""

    def _checked(self, ids: Any) -> npt.NDArray[np.int64]:
        array = np.asarray(ids, dtype=np.int64).ravel()
        if array.size and (array.min() < 0 or array.max() >= self.vocab_size):
            raise UsageError(f"token ids must lie in [0, {self.vocab_size}); got {array.min()} to {array.max()}")
        return array


class CharTokenizer(Tokenizer):
    """One id a character, in the order of code points; where there is an `<unk>` it is the last, decoded as U+FFFD.

    Without `<unk>` a text with a character of another kind cannot be encoded (UsageError).
    """

    kind = "chars"

    def __init__(self, vocabulary: Sequence[str]) -> None:
        self.unknown = len(vocabulary) - 1 if vocabulary and vocabulary[-1] == UNKNOWN else None
        characters = vocabulary[: self.unknown]
        if not vocabulary or any(len(c) != 1 for c in characters):
            raise UsageError(f"a vocabulary of chars is single characters and then, perhaps, '{UNKNOWN}'")
        super().__init__(vocabulary)
        points = _code_points("".join(characters))
        self._code_points = _code_points("".join(characters) + _REPLACEMENT)
        # The id of each code point, `vocab_size` where it has none; the last entry stands for every higher one.
        none = self.vocab_size if self.unknown is None else self.unknown
        self._id_of = np.full(int(points.max(initial=0)) + 2, none, _smallest(none + 1))
        self._id_of[points] = np.arange(len(points))

    def encode(self, text: str) -> Ids:
        ids = np.empty(len(text), self.dtype)
        for at in range(0, len(text), _PIECE):
            found = self._id_of.take(_code_points(text[at : at + _PIECE]), mode="clip")
            if found.max() == self.vocab_size:
                raise UsageError(self._refused(text[at + int(np.argmax(found))]))
            ids[at : at + _PIECE] = found
        return ids

    def _refused(self, character: str) -> str:
        return (
            f"the text holds {character!r} (U+{ord(character):04X}), which is not among the {self.vocab_size} "
            "characters of the training text"
        )

    def decode(self, ids: Any) -> str:
        return self._code_points[self._checked(ids)].tobytes().decode("utf-32-le", "surrogatepass")


class ByteTokenizer(Tokenizer):
    """The 256 bytes of UTF-8: nothing is unknown; ids that are no UTF-8 decode as U+FFFD."""

    kind = "bytes"

    def __init__(self, vocabulary: Sequence[str] | None = None) -> None:
        every_byte = [f"<0x{byte:02X}>" for byte in range(256)]
        if vocabulary is not None and list(vocabulary) != every_byte:
            raise UsageError("a vocabulary of bytes is '<0x00>' to '<0xFF>', in order")
        super().__init__(every_byte)

    def encode(self, text: str) -> Ids:
        return np.frombuffer(text.encode("utf-8", "surrogatepass"), np.uint8)

    def decode(self, ids: Any) -> str:
        return self._checked(ids).astype(np.uint8).tobytes().decode("utf-8", "replace")


class WordTokenizer(Tokenizer):
    """One id a word between whitespace, and `<eos>` for a line's end, as in PyTorch's word_language_model.

    Id 0 is `<unk>`, 1 is `<eos>`, then the words by falling count, equal counts by first appearance. A last
    line without a newline ends in `<eos>` too if it has words. The text's own `<unk>` and `<eos>` get those
    ids.
    """

    kind = "words"
    unknown = 0
    end = 1

    def __init__(self, vocabulary: Sequence[str]) -> None:
        words = list(vocabulary[2:])
        if list(vocabulary[:2]) != [UNKNOWN, END_OF_LINE] or " ".join(words).split() != words:
            raise UsageError(f"a vocabulary of words is '{UNKNOWN}', '{END_OF_LINE}', then words without whitespace")
        super().__init__(vocabulary)
        self._id_of = _KnownWords((word, id_) for id_, word in enumerate(vocabulary))

    def encode(self, text: str) -> Ids:
        ids = self.encode_prompt(text)
        return np.append(ids, ids.dtype.type(1)) if leaves_line_open(text) else ids

    def encode_prompt(self, text: str) -> Ids:
        ids = [np.empty(0, self.dtype)]
        for words, places in map(distinct_words, word_pieces(text)):
            ids.append(np.fromiter(map(self._id_of.__getitem__, words), self.dtype, len(words))[places])
        return np.concatenate(ids)

    def decode(self, ids: Any) -> str:
        words = ["\n" if id_ == 1 else self.vocabulary[id_] for id_ in self._checked(ids).tolist()]
        return " ".join(words).replace(" \n", "\n").replace("\n ", "\n")


class _KnownWords(dict[str, int]):
    """Ids by word, 0 for any other."""

    def __missing__(self, word: str) -> int:
        return 0


class BPETokenizer(Tokenizer):
    """Byte pairs as GPT-2 has them: nothing is unknown; ids that are no UTF-8 decode as U+FFFD.

    content: Hugging Face's description, as in its tokenizer.json. Its special tokens in a text get their ids.
    """

    kind = "bpe"

    def __init__(self, content: Any) -> None:
        self.content = content
        self._pairs = bpe.built(content)
        ids = self._pairs.get_vocab(with_added_tokens=True)
        vocabulary = [""] * (max(ids.values(), default=-1) + 1)
        for token, id_ in ids.items():
            vocabulary[id_] = token
        super().__init__(vocabulary)

    def to_json(self) -> dict[str, Any]:
        return {"format": FORMAT, "version": VERSION, "kind": self.kind, "content": self.content}

    def encode(self, text: str) -> Ids:
        if not text.isascii():  # a prompt typed on a terminal may hold lone surrogates, which are no text
            text = text.encode("utf-8", "surrogatepass").decode("utf-8", "replace")
        parts = (self._pairs.encode(piece, add_special_tokens=False).ids for piece in bpe.pieces(text))
        return np.fromiter(chain.from_iterable(parts), self.dtype)

    def decode(self, ids: Any) -> str:
        return str(self._pairs.decode(self._checked(ids).tolist(), skip_special_tokens=False))


KINDS: dict[str, type[CharTokenizer] | type[ByteTokenizer] | type[WordTokenizer] | type[BPETokenizer]] = {
    tokenizer.kind: tokenizer for tokenizer in (CharTokenizer, ByteTokenizer, WordTokenizer, BPETokenizer)
}


def build_tokenizer(
    kind: str,
    train_text: str,
    min_count: int = 1,
    max_vocabulary: int | None = None,
    other_texts: Iterable[str] = (),
) -> Tokenizer:
    """A tokenizer of a kind ("chars", "bytes", "words", "bpe"), its vocabulary taken from the training text alone.

    Words always have an `<unk>`. Characters have one where something was left out, or where one of `other_texts`
    (validation, test) holds a character that the training text does not: an id that is never seen would cost loss.

    Tokens seen fewer than `min_count` times are unknown; of the rest the most frequent are kept, so that the
    vocabulary, specials included, has at most `max_vocabulary`. Byte pairs are merged while they are seen `min_count`
    times, and twice at least, up to `max_vocabulary` ids (50,257, as GPT-2 has, if not given). Bytes take neither.
    Raises UsageError. For a text larger than memory see `preparation.fitted`.
    """
    check_options(kind, min_count, max_vocabulary)
    if kind == "bpe":
        return learn_pairs([train_text], min_count, max_vocabulary)
    others = {character for text in other_texts for character in set(text)} if kind == "chars" else ()
    counts = count_words(train_text) if kind == "words" else {}
    if kind == "chars":
        add_characters(counts, train_text)
    return from_counts(kind, counts, min_count, max_vocabulary, others)


def check_options(kind: str, min_count: int, max_vocabulary: int | None) -> None:
    """Raises UsageError for an unknown kind, one whose library is missing, or options that do not fit it."""
    _check_kind(kind)
    if kind == "bpe":
        bpe.imported()
    least = {"chars": 2, "words": 3, "bpe": 256}.get(kind, 1)
    if min_count < 1 or (max_vocabulary is not None and max_vocabulary < least):
        raise UsageError(
            f"--tokenizer {kind} needs a minimum count of 1 or more and a vocabulary limit of {least} or more; "
            f"got {min_count} and {max_vocabulary} (--min-count, --max-vocabulary)"
        )
    if min_count > MOST_COUNT or (max_vocabulary or 0) > MOST_TOKENS:
        raise UsageError(
            f"the minimum count is at most {MOST_COUNT}, the vocabulary limit {MOST_TOKENS:,}; "
            f"got {min_count} and {max_vocabulary} (--min-count, --max-vocabulary)"
        )
    if kind == "bytes" and (min_count, max_vocabulary) != (1, None):
        raise UsageError("--tokenizer bytes always has 256 ids; leave out the minimum count and the limit")


def count_words(text: str) -> dict[str, int]:
    """How often each word and `<eos>` stands in `text`, in the order of first appearance."""
    counts: dict[str, int] = {}
    for words, places in map(distinct_words, word_pieces(text)):
        of_piece = dict(zip(words, np.bincount(places).tolist(), strict=True))
        if counts:
            add_counts(counts, of_piece)
        else:
            counts = of_piece
    return counts


def add_counts(counts: dict[str, int], more: Mapping[str, int]) -> None:
    """Add the counts of a text that goes on, new tokens in their order there."""
    before = map(counts.get, more, repeat(0))
    counts.update(zip(more, map(add, more.values(), before), strict=True))


def add_characters(counts: dict[str, int], text: str) -> None:
    """Add the characters of a text that goes on to their counts, new ones in the order of first appearance."""
    found = np.bincount(_code_points(text))
    present = {chr(code): int(found[code]) for code in np.flatnonzero(found)}
    for character in sorted(present.keys() - counts.keys(), key=text.find):
        counts[character] = 0
    for character, count in present.items():
        counts[character] += count


def from_counts(
    kind: str,
    counts: Mapping[str, int],
    min_count: int = 1,
    max_vocabulary: int | None = None,
    others: Iterable[str] = (),
) -> Tokenizer:
    """The tokenizer of "chars", "bytes" or "words" for the training text's counts; `others`: characters elsewhere."""
    if kind == "bytes":
        return ByteTokenizer()
    if not counts:
        raise UsageError(f"--tokenizer {kind} is fitted on the training text, which is empty; see --data")
    if kind == "chars":
        kept = _frequent(counts, min_count, max_vocabulary)
        needed = len(kept) < len(counts) or any(character not in counts for character in others)
        if needed and max_vocabulary is not None:
            kept = kept[: max_vocabulary - 1]  # <unk> takes an id
        _check_kept(kept, min_count)
        return CharTokenizer([*sorted(kept), *([UNKNOWN] if needed else [])])
    words = {word: count for word, count in counts.items() if word not in (UNKNOWN, END_OF_LINE)}
    limit = None if max_vocabulary is None else max_vocabulary - 2
    kept = _frequent(words, min_count, limit)
    if words or END_OF_LINE not in counts:
        _check_kept(kept, min_count)
    return WordTokenizer([UNKNOWN, END_OF_LINE, *kept])


def _check_kept(kept: list[str], min_count: int) -> None:
    if not kept:
        raise UsageError(
            f"no token stands {min_count:,} times in the training text, so that there is nothing to learn; "
            "lower --min-count, or see --data"
        )


def learn_pairs(texts: Iterable[str], min_count: int = 1, max_vocabulary: int | None = None) -> BPETokenizer:
    """The byte pairs of a text given in blocks that cut no token."""
    limit = bpe.GPT2_VOCABULARY if max_vocabulary is None else max_vocabulary
    return BPETokenizer(bpe.learned(bpe.learnable(texts), limit, max(2, min_count)))


def leaves_line_open(text: str) -> bool:
    """Whether there are words after the last newline."""
    return bool(text[text.rfind("\n") + 1 :].strip())


def from_json(content: Any) -> Tokenizer:
    """The tokenizer that `to_json` described. Raises UsageError for anything else."""
    content = content if isinstance(content, dict) else {}
    if content.get("format") != FORMAT:
        raise UsageError(f"this is no tokenizer: its format must be '{FORMAT}'; got {content.get('format')!r}")
    if content.get("version") != VERSION:
        raise UsageError(
            f"the tokenizer's version must be {VERSION}; got {content.get('version')!r}: update fivestep"
        )
    kind, vocabulary = content.get("kind"), content.get("vocabulary")
    _check_kind(kind)
    if kind == "bpe":
        return BPETokenizer(content.get("content"))
    if not isinstance(vocabulary, list) or not all(isinstance(token, str) for token in vocabulary):
        raise UsageError("the tokenizer's vocabulary must be a list of strings")
    twice = [token for token, count in Counter(vocabulary).items() if count > 1]
    if twice:
        raise UsageError(f"the tokenizer's vocabulary holds {twice[0]!r} more than once")
    return KINDS[kind](vocabulary)


def save(tokenizer: Tokenizer, path: Path) -> None:
    """Write a tokenizer as JSON, whole or not at all. Raises OSError."""
    with written_whole(path) as file:
        file.write(as_text(tokenizer).encode())


def as_text(tokenizer: Tokenizer) -> str:
    """A tokenizer as the text of its file."""
    return json.dumps(tokenizer.to_json(), indent=1) + "\n"


def load(path: Path) -> Tokenizer:
    """Read what `save` wrote, or a tokenizer.json of Hugging Face's with byte pairs as GPT-2 has them.

    Raises UsageError, naming the path, for a missing, damaged or other file.
    """
    try:
        content = json.loads(read_bounded(path, MOST_BYTES))
        theirs = isinstance(content, dict) and "format" not in content and "model" in content
        return BPETokenizer(content) if theirs else from_json(content)
    except OSError as error:
        raise UsageError(f"the tokenizer {path} cannot be read ({error.strerror or error})") from error
    except UsageError as error:
        raise UsageError(f"{path}: {error}") from None
    except (ValueError, RecursionError) as error:
        raise UsageError(f"the tokenizer {path} is damaged: it is no JSON ({error})") from None


def _check_kind(kind: Any) -> None:
    if not isinstance(kind, str) or kind not in KINDS:
        raise UsageError(f"--tokenizer must be one of {', '.join(KINDS)}; got {kind!r}{suggestion(str(kind), KINDS)}")


def _frequent(counts: Mapping[str, int], min_count: int, limit: int | None) -> list[str]:
    """Tokens by falling count, equal counts by first appearance (sorting is stable)."""
    kept = [token for token, count in counts.items() if count >= min_count]
    return sorted(kept, key=counts.__getitem__, reverse=True)[:limit]


def _smallest(size: int) -> np.dtype[Any]:
    return np.dtype(np.uint8 if size <= 1 << 8 else np.uint16 if size <= 1 << 16 else np.int32)


def _code_points(text: str) -> npt.NDArray[np.uint32]:
    # "surrogatepass": a prompt typed on a terminal may hold lone surrogates; they are merely unknown.
    return np.frombuffer(text.encode("utf-32-le", "surrogatepass"), "<u4")
