"""Byte pairs as GPT-2 has them, learned and read through Hugging Face's `tokenizers`.

    text -> words by GPT-2's pattern -> bytes -> pairs merged, the most frequent first

Owns what is asked of that library, which of its files are accepted, and where a text may be cut without cutting a
token. The tokenizer with two directions is `tokenizer.py`'s. The library is imported once byte pairs are used.
"""

import json
import re
from collections.abc import Iterator
from typing import Any

from fivestep.errors import UsageError

GPT2_VOCABULARY = 50_257
PIECE = 1 << 16  # characters handed over at a time: the library holds up to 256 such pieces
_BORDER = re.compile(r"(?<=\S)(?= \w)|(?<=\S\n)(?=\w)")


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


def learned(texts: Iterator[str], max_vocabulary: int, min_count: int) -> dict[str, Any]:
    """Byte pairs learned from `texts` (which cut no token), as the library describes them in JSON.

    The 256 bytes come first, then one id a merge, the most frequent pair first (Sennrich et al. 2016, on bytes as in
    Radford et al. 2019); pairs seen fewer than `min_count` times are not merged.
    """
    library = _library()
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
    library = _library()
    reason = _unlike_gpt2(content)
    if reason is None:
        try:
            return library.Tokenizer.from_str(json.dumps(content))
        except Exception as error:  # the library raises bare Exceptions
            reason = str(error).splitlines()[0][:120]
    raise UsageError(
        f"this is no byte-level BPE as GPT-2's, the only kind of Hugging Face's that is read here: {reason}"
    )


def _unlike_gpt2(content: Any) -> str | None:
    """Why a description would not give a text whole and in blocks the same ids, or not the same text back."""
    try:
        model, before = content["model"]["type"], content["pre_tokenizer"]
        parts = before["pretokenizers"] if before["type"] == "Sequence" else [before]
        if model != "BPE" or not isinstance(content["model"]["vocab"], dict):
            return f"its model is {model}"
        if content.get("normalizer") is not None:
            return "it changes the text before it cuts it (normalizer)"
        if {part["type"] for part in parts} - {"ByteLevel", "Split"} or parts[-1]["type"] != "ByteLevel":
            return "its pre_tokenizer is not ByteLevel, after a Split perhaps"
        if any(part.get("add_prefix_space") for part in parts):
            return "it adds a space at the front (add_prefix_space)"
        for token in content.get("added_tokens") or []:
            if token["lstrip"] or token["rstrip"] or token["content"].split() != [token["content"]]:
                return f"its added token {token['content']!r} takes whitespace in"
        if content.get("truncation") is not None or content.get("padding") is not None:
            return "it truncates or pads"
        return None
    except (KeyError, TypeError, IndexError, AttributeError) as error:
        return f"its JSON lacks {error}"


def _library() -> Any:
    try:
        import tokenizers
    except ImportError:
        raise UsageError("--tokenizer bpe needs Hugging Face's tokenizers: pip install 'fivestep[bpe]'") from None
    return tokenizers
