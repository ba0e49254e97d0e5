"""Tokens from a language model, one after another.

Owns the loop from a prompt to its continuation and the promise to leave no trace: the draws come from a generator
of their own, and the model's modes are switched for the length of one prediction only, so the code between two
tokens finds the model as it left it. Which token is drawn is `sampling.py`'s. Knows no tokenizer and prints nothing.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from fivestep.errors import UsageError, named
from fivestep.interrupts import poll
from fivestep.models.contract import LanguageModel, append_recent, flag, require_positive
from fivestep.models.sampling import Sampling, choose

INT32, INT64 = torch.int32, torch.int64


def generate(
    model: LanguageModel,
    ids: Tensor,
    max_new_tokens: int,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    repetition_penalty: float = 1.0,
    seed: int = 0,
    vocab_size: int | None = None,
    cache: bool = True,
) -> Tensor:
    """`ids` continued by `max_new_tokens`: `[batch, time + max_new_tokens]`, on the device of `ids`.

    `ids` is `[time]` or `[batch, time]`: every row is a sample of its own. Temperature 0 takes the likeliest token;
    `top_k`, `top_p` and `min_p` leave out unlikely ones; a `repetition_penalty` above 1 makes tokens that were there
    before less likely (`sampling.py` has the formulas, applied in transformers' order). Ids from `vocab_size` on are
    never drawn: for a model with more rows than the tokenizer has tokens. Equal seeds give equal tokens.

    A model with a `block_size` looks back on at most so many ids. One more than that, in the prompt or on the way,
    and it goes on from the newest three quarters of a block: so it always sees between three quarters and all of
    it, and a token costs the same however long the text becomes. `cache=False` computes the whole context anew for
    each token. Both take the same context, hence the same tokens, except where rounding decides.

    Raises `UsageError` for bad arguments, and where the model's logits are not finite.
    """
    columns = stream_tokens(
        model,
        ids,
        max_new_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        repetition_penalty=repetition_penalty,
        seed=seed,
        vocab_size=vocab_size,
        cache=cache,
    )
    return torch.cat([_rows(ids), *(column[:, None] for column in columns)], dim=1)


def stream_tokens(
    model: LanguageModel,
    ids: Tensor,
    max_new_tokens: int,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    repetition_penalty: float = 1.0,
    seed: int = 0,
    vocab_size: int | None = None,
    cache: bool = True,
) -> Iterator[Tensor]:
    """Yield the columns `[batch]` that continue `ids`, as they come; the arguments are those of `generate`.

    Raises `UsageError` at once for bad arguments, and on the way where the model's logits are not finite.
    """
    sampling = Sampling(temperature, top_k, top_p, min_p, repetition_penalty)
    _check(model, ids, max_new_tokens, seed, vocab_size)
    return _stream(model, _rows(ids), max_new_tokens, sampling, seed, vocab_size, cache)


def _stream(
    model: LanguageModel,
    ids: Tensor,
    max_new_tokens: int,
    sampling: Sampling,
    seed: int,
    vocab_size: int | None,
    cache: bool,
) -> Iterator[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    block_size: int | None = getattr(model, "block_size", None)
    seen: Tensor | None = None  # [batch, vocab_size], only where repetition is penalized
    unseen, memory = ids if cache else append_recent(None, ids, block_size), None  # [batch, time]
    for _ in range(max_new_tokens):
        poll()
        logits, memory = _predict(model, unseen, memory)
        # HOST READ, one a token: drawing on the CPU gives one seed one meaning on every device.
        logits = logits.double().cpu()
        if seen is None and sampling.repetition_penalty != 1.0:
            seen = torch.zeros_like(logits, dtype=torch.bool).scatter_(1, ids.cpu(), True)
        drawn = choose(logits[:, :vocab_size], sampling, generator, None if seen is None else seen[:, :vocab_size])
        if seen is not None:
            seen.scatter_(1, drawn[:, None], True)
        column = drawn.to(ids)  # [batch]
        yield column
        if cache:
            unseen = column[:, None]
        else:
            unseen, memory = append_recent(unseen, column[:, None], block_size), None


def _rows(ids: Tensor) -> Tensor:
    return ids[None] if ids.dim() == 1 else ids


def _predict(model: LanguageModel, unseen: Tensor, memory: Any) -> tuple[Tensor, Any]:
    weight = next(iter(model.parameters()), unseen)
    # no_grad, not inference_mode: a memory made under the latter could never enter a training step.
    with torch.no_grad(), _evaluating(model):
        logits, memory = model.predict_next(unseen.to(weight.device), memory)
    return logits, memory


@contextmanager
def _evaluating(model: LanguageModel) -> Iterator[None]:
    """Every module in evaluation mode, and afterwards in the mode it had, frozen ones too."""
    training = [module for module in model.modules() if module.training]
    try:
        for module in training:
            module.training = False
        yield
    finally:
        for module in training:
            module.training = True


def _check(model: LanguageModel, ids: Tensor, max_new_tokens: int, seed: int, vocab_size: int | None) -> None:
    if not hasattr(model, "predict_next"):
        name = type(model).__name__
        raise UsageError(f"{name} has no predict_next(ids, memory); only a language model can generate.")
    if not isinstance(ids, Tensor) or ids.dim() not in (1, 2) or not ids.numel() or ids.dtype not in (INT32, INT64):
        given = f"{tuple(ids.shape)} of {ids.dtype}" if isinstance(ids, Tensor) else named(ids)
        raise UsageError(f"ids are {given}; give int64, [time] or [batch, time], at least one (--prompt).")
    rows = getattr(getattr(model, "token_embedding_table", None), "num_embeddings", None)
    if int(ids.min()) < 0 or (rows is not None and int(ids.max()) >= rows):
        raise UsageError(
            f"ids are from {int(ids.min())} to {int(ids.max())}; the model knows 0 to {(rows or 0) - 1}."
        )
    for name, number, least, most in (("max_new_tokens", max_new_tokens, 0, None), ("seed", seed, 0, 2**63 - 1)):
        whole = isinstance(number, int) and not isinstance(number, bool)
        if not whole or number < least or (most is not None and number > most):
            upper = "" if most is None else f" and at most {most}"
            raise UsageError(
                f"{name} is {number!r}; it must be a whole number, at least {least}{upper}: change {flag(name)}."
            )
    if vocab_size is not None:
        require_positive(vocab_size=vocab_size)
