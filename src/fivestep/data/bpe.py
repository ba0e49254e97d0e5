"""Byte pairs as GPT-2 has them, learned and read through Hugging Face's `tokenizers`.

    text -> words by GPT-2's pattern -> bytes -> pairs merged, the most frequent first

Owns what is asked of that library, which of its files are accepted, and where a text may be cut without cutting a
token. The tokenizer with two directions is `tokenizer.py`'s. The library is imported once byte pairs are used.
"""

import json
import re
from collections.abc import Iterable, Iterator
from typing import Any

from fivestep.errors import UsageError
from fivestep.extras import installing

GPT2_VOCABULARY = 50_257
PIECE = 1 << 16  # characters handed over at a time: the library holds up to 256 such pieces
LONGEST = 100_000  # characters of a word that pairs are learned from: the time grows with the square
# How GPT-2, Llama 3 (and GPT-4's cl100k), Qwen and GPT-4o (o200k) cut words: all part at a border.
_PATTERNS = frozenset(
    {
        r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",
        r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s",
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
        r"|\s+(?!\S)|\s+",
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
        r"|\s+(?!\S)|\s+",
        r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
        r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
        r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    }
)
_PROBE = "It's a  test,\n\n 12345 \tof x_y:\r\n é🙂 中文。\x00\x7f isn't WE'LL ... end \n "
_BORDER = re.compile(r"(?<=\S)(?= \w)|(?<=\S\n)(?=\w)")
_WORD = re.compile(r"\w+|[^\w\s]+|\s+")  # holds every word of those patterns, but for a space or two


def border(text: str, end: int) -> int:
    """The last place in `text` before `end` where tokens of words and byte pairs always part; 0 where there is none.

    It is before a space or after a newline that stands alone: a character that is no whitespace before it, a letter,
    digit or underscore after it. There the patterns of GPT-2 and its successors begin anew, and words end.
    """
    width = 1 << 10
    while True:
        start = max(0, end - width)
        places = [found.start() for found in _BORDER.finditer(text, start, end)]
        if places or start == 0:
            return places[-1] if places else 0
        width *= 8


def pieces(text: str) -> Iterator[str]:
    """`text` in pieces of about `PIECE` characters that cut no token."""
    at = 0
    while at < len(text):
        window = text[at : at + PIECE]
        end = border(window, PIECE) if at + PIECE < len(text) else 0
        if not end and at + PIECE < len(text):  # rare: a token longer than a piece
            window = text[at:]
            found = _BORDER.search(window, 1)
            end = found.start() if found else 0
        yield window[:end] if end else window
        at += end or len(window)


def learnable(texts: Iterable[str]) -> Iterator[str]:
    """`texts` as they are. Raises UsageError at a word of more than `LONGEST` characters."""
    for text in texts:
        for piece in pieces(text):  # a word lies in one piece
            if len(piece) > LONGEST and any(word.end() - word.start() > LONGEST for word in _WORD.finditer(piece)):
                raise UsageError(endless(LONGEST))
        yield text


def endless(characters: int) -> str:
    """What is said of a text in which no word ends."""
    return (
        f"--data has {characters:,} characters in which no word ends; use --tokenizer chars or bytes for such a text"
    )


def learned(texts: Iterator[str], max_vocabulary: int, min_count: int) -> dict[str, Any]:
    """Byte pairs learned from `texts` (which cut no token), as the library describes them in JSON.

    The 256 bytes come first, then one id a merge, the most frequent pair first (Sennrich et al. 2016, on bytes as in
    Radford et al. 2019); pairs seen fewer than `min_count` times are not merged.
    """
    library = imported()
    tokenizer = library.Tokenizer(library.models.BPE())
    tokenizer.pre_tokenizer = library.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = library.decoders.ByteLevel()
    trainer = library.trainers.BpeTrainer(
        vocab_size=max_vocabulary,
        min_frequency=min_count,
        initial_alphabet=sorted(library.pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator((piece for text in texts for piece in pieces(text)), trainer)
    content: dict[str, Any] = json.loads(tokenizer.to_str())
    return content


def built(content: Any) -> Any:
    """The library's tokenizer that `content` describes. Raises UsageError for one that is not like GPT-2's."""
    library = imported()
    reason = _unlike_gpt2(content)
    if reason is None:
        try:
            tokenizer = library.Tokenizer.from_str(json.dumps(content))
            texts = [_PROBE, *(token["content"] for token in content.get("added_tokens") or [])]
            for text in texts:
                ids = tokenizer.encode(text, add_special_tokens=False).ids
                if tokenizer.decode(ids, skip_special_tokens=False) != text:
                    reason = f"it does not give a text back as it was ({text[:40]!a})"
                    break
            else:
                return tokenizer
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException as error:  # the library raises bare Exceptions, and its panics are no Exceptions
            reason = (str(error).splitlines() or [type(error).__name__])[0][:120]
    raise UsageError(
        f"this is no byte-level BPE as GPT-2's, the only kind of Hugging Face's that is read here: {reason}"
    )


def _unlike_gpt2(content: Any) -> str | None:
    """Why a description would not give a text whole and in blocks the same ids, or not the same text back."""
    try:
        if content.get("normalizer") is not None:
            return "it changes the text before it cuts it (normalizer)"
        if content.get("truncation") is not None or content.get("padding") is not None:
            return "it truncates or pads"
        reason = _unlike_model(content["model"]) or _unlike_words(content["pre_tokenizer"])
        if reason is not None:
            return reason
        if content["decoder"]["type"] != "ByteLevel":
            return f"its decoder is {content['decoder']['type']}, not ByteLevel"
        return _unlike_ids(content["model"]["vocab"], content.get("added_tokens") or [])
    except (KeyError, TypeError, IndexError, AttributeError) as error:
        return f"its JSON lacks {error}"


def _unlike_model(model: Any) -> str | None:
    """Why a model would not merge the same bytes into the same tokens each time."""
    if model["type"] != "BPE" or not isinstance(model["vocab"], dict):
        return f"its model is {model['type']}"
    for option in ("dropout", "continuing_subword_prefix", "end_of_word_suffix", "byte_fallback"):
        if model.get(option):
            return f"its model has {option}"
    missing = set(imported().pre_tokenizers.ByteLevel.alphabet()) - set(model["vocab"])
    return f"its vocabulary lacks {len(missing)} of the 256 bytes" if missing else None


def _unlike_words(before: Any) -> str | None:
    """Why a pre_tokenizer would not cut words where `border` does."""
    parts = before["pretokenizers"] if before["type"] == "Sequence" else [before]
    *splits, last = parts
    if last["type"] != "ByteLevel" or len(splits) > 1 or any(split["type"] != "Split" for split in splits):
        return "its pre_tokenizer is not ByteLevel, after a Split perhaps"
    if last.get("add_prefix_space"):
        return "it adds a space at the front (add_prefix_space)"
    if not splits and not last.get("use_regex", True):
        return "it does not cut words (use_regex is false)"
    for split in splits:
        if split["behavior"] != "Isolated" or split.get("invert"):
            return "its Split is not Isolated, or inverted"
        if split["pattern"].get("Regex") not in _PATTERNS:
            return "its Split has a pattern other than those of GPT-2, GPT-4 (cl100k, o200k), Llama 3 and Qwen"
    return None


def _unlike_ids(vocab: dict[str, Any], added: list[Any]) -> str | None:
    """Why ids would not name one token each."""
    ids = dict(vocab)
    for token in added:
        text = token["content"]
        if token["lstrip"] or token["rstrip"] or text.split() != [text]:
            return f"its added token {text!a} takes whitespace in"
        if ids.setdefault(text, token["id"]) != token["id"]:
            return f"its added token {text!a} has two ids"
    values = list(ids.values())
    if any(type(id_) is not int or not 0 <= id_ < 2 * len(ids) for id_ in values):
        return f"an id is not a whole number from 0 to {2 * len(ids) - 1}, twice its tokens"
    return "two of its tokens have the same id" if len(set(values)) < len(values) else None


def imported() -> Any:
    """The library. Raises UsageError where it is not installed."""
    try:
        import tokenizers
    except ImportError:
        sentence = "byte pairs (--tokenizer bpe) need Hugging Face's tokenizers"
        raise UsageError(f"{sentence}: {installing('bpe')}") from None
    return tokenizers
