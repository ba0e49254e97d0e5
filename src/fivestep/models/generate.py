"""Tokens from a language model, one after another.

Owns the choice of the next token and the promise to leave no trace: the draws come from a generator of
their own, and the model's modes are switched for the length of one prediction only, so the code between two
tokens finds the model as it left it. Knows no tokenizer and prints nothing.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from fivestep.errors import UsageError
from fivestep.models.contract import LanguageModel


def generate(
    model: LanguageModel,
    ids: Tensor,
    max_new_tokens: int,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    seed: int = 0,
) -> Tensor:
    """`ids` continued by `max_new_tokens`: `[batch, time + max_new_tokens]`, on the device of `ids`.

    `ids` is `[time]` or `[batch, time]`. Temperature 0 takes the likeliest token; `top_k` draws from the k
    likeliest only. Equal seeds give equal tokens. Raises `UsageError` as `stream_tokens` does.
    """
    columns = stream_tokens(model, ids, max_new_tokens, temperature=temperature, top_k=top_k, seed=seed)
    return torch.cat([_rows(ids), *(column[:, None] for column in columns)], dim=1)


def stream_tokens(
    model: LanguageModel,
    ids: Tensor,
    max_new_tokens: int,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    seed: int = 0,
) -> Iterator[Tensor]:
    """Yield the columns `[batch]` that continue `ids`, as they come; the arguments are those of `generate`.

    Raises `UsageError` at once for bad arguments, and on the way where the model's logits are not finite.
    """
    _check(model, ids, max_new_tokens, temperature, top_k)
    return _stream(model, _rows(ids), max_new_tokens, temperature, top_k, seed)


def _stream(
    model: LanguageModel, ids: Tensor, max_new_tokens: int, temperature: float, top_k: int | None, seed: int
) -> Iterator[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    unseen, memory = ids, None  # [batch, time], later [batch, 1]
    for _ in range(max_new_tokens):
        logits, memory = _predict(model, unseen, memory)
        # HOST READ, one a token: drawing on the CPU gives one seed one meaning on every device.
        column = choose(logits.double().cpu(), temperature, top_k, generator).to(ids)  # [batch]
        yield column
        unseen = column[:, None]


def _rows(ids: Tensor) -> Tensor:
    return ids[None] if ids.dim() == 1 else ids


def choose(logits: Tensor, temperature: float, top_k: int | None, generator: torch.Generator) -> Tensor:
    """One index a row of `logits` `[batch, vocab_size]`, drawn from softmax(logits / temperature): `[batch]`.

    Raises `UsageError` where a logit is not finite.
    """
    if not logits.isfinite().all():
        raise UsageError("The model's logits are not finite (NaN or infinite), so no token can be drawn.")
    if temperature == 0.0 or top_k == 1:
        return logits.argmax(dim=-1)
    kept = logits.shape[-1] if top_k is None else min(top_k, logits.shape[-1])
    likeliest, indices = logits.topk(kept, dim=-1)  # [batch, kept], sorted
    # The largest becomes 0 before the division, which then cannot overflow upwards.
    probabilities = ((likeliest - likeliest[:, :1]) / temperature).softmax(dim=-1)
    drawn = torch.multinomial(probabilities, num_samples=1, generator=generator)  # [batch, 1]
    return indices.gather(1, drawn)[:, 0]


def _predict(model: LanguageModel, unseen: Tensor, memory: Any) -> tuple[Tensor, Any]:
    weight = next(iter(model.parameters()), unseen)
    # no_grad, not inference_mode: a memory made under the latter could never enter a training step.
    with torch.no_grad(), _evaluating(model):
        logits, memory = model.predict_next(unseen.to(weight.device), memory)
    return logits, memory


@contextmanager
def _evaluating(model: LanguageModel) -> Iterator[None]:
    """Every module in evaluation mode, and afterwards in the mode it had, frozen ones too."""
    modes = [(module, module.training) for module in model.modules()]
    try:
        for module, _ in modes:
            module.training = False
        yield
    finally:
        for module, training in modes:
            module.training = training


def _check(model: LanguageModel, ids: Tensor, max_new_tokens: int, temperature: float, top_k: int | None) -> None:
    if not hasattr(model, "predict_next"):
        name = type(model).__name__
        raise UsageError(f"{name} has no predict_next(ids, memory); only a language model can generate.")
    if ids.dim() not in (1, 2) or ids.numel() == 0 or ids.is_floating_point():
        given = f"{tuple(ids.shape)} of {ids.dtype}"
        raise UsageError(f"ids are {given}; give integers, [time] or [batch, time], at least one (--prompt).")
    if max_new_tokens < 0:
        raise UsageError(f"max_new_tokens is {max_new_tokens}; it must be at least 0: change --max-new-tokens.")
    if not 0.0 <= temperature < math.inf:
        raise UsageError(
            f"temperature is {temperature}; it must be a finite number of at least 0: change --temperature."
        )
    if top_k is not None and top_k < 1:
        raise UsageError(f"top_k is {top_k}; it must be at least 1, or absent: change --top-k.")
