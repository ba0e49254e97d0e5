"""From logits to the next token: what may be drawn, and the draw.

    repetition penalty -> temperature -> top_k -> top_p -> min_p -> softmax -> draw

Owns the settings, their ranges, and each rule as a function of logits alone. The order and the arithmetic, ties
included, are those of transformers' logits processors, so equal settings mean equal distributions.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from fivestep.errors import UsageError, named
from fivestep.models.contract import flag


@dataclass(frozen=True)
class Sampling:
    """How the next token is drawn; what is left out changes nothing. Raises `UsageError` for what is out of range.

    temperature: logits are divided by it; 0 takes the likeliest token (of equal ones the lowest id).
    top_k, top_p, min_p: which tokens may be drawn: `keep_top_k`, `keep_top_p`, `keep_min_p`.
    repetition_penalty: above 1 makes tokens that were there before less likely, `penalize_repetition`.
    """

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float = 1.0

    def __post_init__(self) -> None:
        for name in ("temperature", "top_k", "top_p", "min_p", "repetition_penalty"):
            value, whole = getattr(self, name), name == "top_k"
            optional = name in ("top_k", "top_p", "min_p") and value is None
            if not optional and (isinstance(value, bool) or not isinstance(value, int if whole else int | float)):
                kind = "a whole number" if whole else "a number"
                raise UsageError(f"{name} is {named(value)}; it must be {kind}: change {flag(name)}.")
        if not 0.0 <= self.temperature < math.inf:
            raise UsageError(
                f"temperature is {self.temperature}; it must be a finite number of at least 0: change --temperature."
            )
        if self.top_k is not None and self.top_k < 1:
            raise UsageError(f"top_k is {self.top_k}; it must be at least 1, or absent: change --top-k.")
        for name, share in (("top_p", self.top_p), ("min_p", self.min_p)):
            if share is not None and not 0.0 <= share <= 1.0:
                raise UsageError(f"{name} is {share}; it must be from 0 to 1, or absent: change {flag(name)}.")
        if not 0.01 <= self.repetition_penalty <= 100:
            raise UsageError(
                f"repetition_penalty is {self.repetition_penalty}; it must be from 0.01 to 100 (1 changes nothing): "
                "change --repetition-penalty."
            )


def choose(logits: Tensor, sampling: Sampling, generator: torch.Generator, seen: Tensor | None = None) -> Tensor:
    """One index a row of `logits` `[batch, vocab_size]`: `[batch]`; `seen` is as in `penalize_repetition`.

    Raises `UsageError` where a logit is not finite.
    """
    if not logits.isfinite().all():
        raise UsageError("The model's logits are not finite (NaN or infinite), so no token can be drawn.")
    if seen is not None:
        logits = penalize_repetition(logits, seen, sampling.repetition_penalty)
    if sampling.temperature == 0.0:
        return logits.argmax(dim=-1)
    drawn = torch.multinomial(allowed(logits, sampling).softmax(dim=-1), num_samples=1, generator=generator)
    return drawn[:, 0]


def allowed(logits: Tensor, sampling: Sampling) -> Tensor:
    """`logits` `[batch, vocab_size]` over the temperature, -inf where a token may not be drawn."""
    # The largest becomes 0 before the division, which then cannot overflow upwards; no probability changes.
    logits = (logits - logits.amax(dim=-1, keepdim=True)) / sampling.temperature
    if sampling.top_k is not None:
        logits = keep_top_k(logits, sampling.top_k)
    if sampling.top_p is not None:
        logits = keep_top_p(logits, sampling.top_p)
    if sampling.min_p is not None:
        logits = keep_min_p(logits, sampling.min_p)
    return logits


def penalize_repetition(logits: Tensor, seen: Tensor, penalty: float) -> Tensor:
    """Where `seen` (bool, the shape of `logits`) holds: positive logits over `penalty`, negative ones times it.

    Source: Keskar et al. 2019 (CTRL), section 4.1, which divides; for a negative logit that would be a reward, so
    it is multiplied. Seen are the tokens of the prompt and those drawn since.
    """
    return torch.where(seen, torch.where(logits < 0, logits * penalty, logits / penalty), logits)


def keep_top_k(logits: Tensor, k: int) -> Tensor:
    """-inf below the k-th largest of each row (Fan et al. 2018); tokens equal to the k-th all stay."""
    kth = logits.topk(min(k, logits.shape[-1]), dim=-1).values[:, -1:]
    return logits.masked_fill(logits < kth, -torch.inf)


def keep_top_p(logits: Tensor, p: float) -> Tensor:
    """-inf outside the nucleus: the likeliest tokens whose probabilities reach `p` (Holtzman et al. 2020).

    At least one token stays. Of equal tokens at the edge, which ones stay is up to torch's sort.
    """
    ascending, order = logits.sort(dim=-1)  # not stable: as in transformers, so that ties fall alike
    # Counted from the unlikely end: a token goes while it and all below it hold at most 1 - p.
    outside = ascending.softmax(dim=-1).cumsum(dim=-1) <= 1.0 - p
    outside[:, -1] = False
    return logits.masked_fill(torch.zeros_like(outside).scatter(-1, order, outside), -torch.inf)


def keep_min_p(logits: Tensor, p: float) -> Tensor:
    """-inf where a token is less than `p` times as likely as the likeliest (Nguyen et al. 2024)."""
    probabilities = logits.softmax(dim=-1)
    return logits.masked_fill(probabilities < p * probabilities.amax(dim=-1, keepdim=True), -torch.inf)
