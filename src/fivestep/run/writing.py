"""Text from a trained model, piece by piece.

    prompt -> ids -> tokens as they are drawn -> text that is certain -> text before a stop string

Owns what of the text can already be shown: a character whose bytes are not all there, and what may yet become a
stop string, are held back, so that the pieces joined are the whole text. Draws nothing itself (`models/generate.py`)
and prints nothing.
"""

from collections.abc import Iterable, Iterator, Sequence
from typing import cast

import torch
from torch import nn

from fivestep.data.tokenizer import Tokenizer
from fivestep.errors import UsageError
from fivestep.models.contract import LanguageModel
from fivestep.models.generate import stream_tokens

INCOMPLETE = "\ufffd"  # how decoders show bytes that are not, or not yet, a character


def write(
    model: nn.Module,
    tokenizer: Tokenizer,
    prompt: str | None = None,
    *,
    max_new_tokens: int = 500,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    repetition_penalty: float = 1.0,
    stop: str | Sequence[str] = (),
    seed: int = 0,
    cache: bool = True,
) -> Iterator[str]:
    """Yield `prompt`, as the tokenizer knows it, and what the model writes after it, as it comes.

    Joined, the pieces are the text of prompt and tokens, up to the first of the `stop` strings after the prompt: the
    one that is complete first, and it is left out. Without a prompt the text begins on a new line where the training
    text has lines, else with the first character of the vocabulary. The other arguments are those of
    `models.generate.generate`; tokens that the tokenizer lacks are never drawn.

    Raises `UsageError` at once for bad arguments or a prompt without a token.
    """
    stops = [stop] if isinstance(stop, str) else list(stop)
    if "" in stops:
        raise UsageError("a stop string is empty; give --stop at least one character, or leave it out")
    if prompt is None:
        prompt = "\n" if "\n" in tokenizer.vocabulary or tokenizer.kind != "chars" else tokenizer.vocabulary[0]
    ids = prompt_ids(tokenizer, prompt)
    columns = stream_tokens(
        cast(LanguageModel, model),
        torch.tensor(ids, device=next(model.parameters()).device),
        max_new_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        repetition_penalty=repetition_penalty,
        seed=seed,
        vocab_size=tokenizer.vocab_size,
        cache=cache,
    )
    return _pieces(tokenizer, ids, (int(column) for column in columns), stops)


def prompt_ids(tokenizer: Tokenizer, prompt: str) -> list[int]:
    """The ids of a prompt. Raises UsageError where it holds no token, or one that is not known."""
    ids = [int(id_) for id_ in tokenizer.encode_prompt(prompt)]
    if not ids:
        raise UsageError("the prompt has no token in it; give --prompt (in training --sample-prompt) some text")
    return ids


def _pieces(tokenizer: Tokenizer, prompt: list[int], drawn: Iterator[int], stops: list[str]) -> Iterator[str]:
    yield tokenizer.decode(prompt)
    yield from until_stop(decoded(tokenizer, prompt, drawn), stops)


def decoded(tokenizer: Tokenizer, prompt: list[int], ids: Iterable[int]) -> Iterator[str]:
    """The text that each of `ids` adds after `prompt`, once later ids cannot change it.

    Decoding starts from the last token before which all is certain, so a long text costs no more a token than a
    short one. Relies on what every tokenizer here has: text depends on the token before at most (the space between
    words), and an incomplete character shows as one final U+FFFD.
    """
    window = prompt[-1:]  # ids whose text is not all shown, after one whose text is
    shown = len(tokenizer.decode(window))  # characters of the window's text
    for id_ in ids:
        window.append(id_)
        text = tokenizer.decode(window)
        certain = text.removesuffix(INCOMPLETE)
        if len(certain) > shown:
            yield certain[shown:]
            shown = len(certain)
        if certain == text:
            window = [id_]
            shown = len(tokenizer.decode(window))
    if rest := tokenizer.decode(window)[shown:]:
        yield rest


def until_stop(pieces: Iterable[str], stops: Sequence[str]) -> Iterator[str]:
    """The text of `pieces` before the stop string that is complete first; of two at once, the longer.

    What could be the beginning of one is held back until it is decided. Nothing is asked of `pieces` after a stop.
    """
    held = ""
    for piece in pieces:
        held += piece
        found = [(at + len(stop), at) for stop in stops if (at := held.find(stop)) >= 0]
        if found:
            _, at = min(found)
            if at:
                yield held[:at]
            return
        certain = len(held) - _undecided(held, stops)
        if certain:
            yield held[:certain]
            held = held[certain:]
    if held:
        yield held


def _undecided(text: str, stops: Sequence[str]) -> int:
    """How many of the last characters of `text` a stop string could begin with."""
    longest = max((len(stop) for stop in stops), default=1) - 1
    for length in range(min(longest, len(text)), 0, -1):
        if any(stop.startswith(text[-length:]) for stop in stops):
            return length
    return 0
