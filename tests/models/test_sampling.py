"""The rules of sampling: by their definitions, and against transformers' processors where it is installed."""

import itertools
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from fivestep.errors import UsageError
from fivestep.models.sampling import (
    Sampling,
    allowed,
    choose,
    keep_min_p,
    keep_top_k,
    keep_top_p,
    penalize_repetition,
)

LOG = torch.tensor([[0.5, 0.25, 0.125, 0.125]]).double().log()


def kept(logits: Tensor) -> list[list[int]]:
    return [row.nonzero()[:, 0].tolist() for row in logits.isfinite()]


def test_top_k_keeps_the_k_likeliest_and_all_that_equal_the_last() -> None:
    logits = torch.tensor([[1.0, 4.0, 3.0, 2.0], [2.0, 1.0, 2.0, 2.0]])
    assert kept(keep_top_k(logits, 2)) == [[1, 2], [0, 2, 3]]
    assert kept(keep_top_k(logits, 99)) == [[0, 1, 2, 3]] * 2
    assert keep_top_k(logits, 2)[0, 1] == 4.0


@pytest.mark.parametrize(
    ("p", "ids"), [(0.0, [0]), (0.4, [0]), (0.6, [0, 1]), (0.8, [0, 1, 3]), (0.9, [0, 1, 2, 3]), (1.0, [0, 1, 2, 3])]
)
def test_top_p_keeps_the_smallest_nucleus_that_reaches_p(p: float, ids: list[int]) -> None:
    assert kept(keep_top_p(LOG, p)) == [ids]
    shuffled = keep_top_p(LOG[:, [3, 1, 0, 2]], p)
    assert len(kept(shuffled)[0]) == len(ids)
    assert shuffled[0, 2].isfinite()


@pytest.mark.parametrize(
    ("p", "ids"), [(0.0, [0, 1, 2, 3]), (0.2, [0, 1, 2, 3]), (0.3, [0, 1]), (0.6, [0]), (1.0, [0])]
)
def test_min_p_keeps_what_is_near_the_likeliest(p: float, ids: list[int]) -> None:
    assert kept(keep_min_p(LOG, p)) == [ids]


def test_a_penalty_lowers_positive_and_negative_logits() -> None:
    logits, seen = torch.tensor([[2.0, -2.0, 2.0, 0.0]]), torch.tensor([[True, True, False, True]])
    assert penalize_repetition(logits, seen, 4.0).tolist() == [[0.5, -8.0, 2.0, 0.0]]


def test_draws_follow_the_softmax_of_what_is_allowed() -> None:
    logits = torch.tensor([[0.0, 1.0, 3.0, 2.0]]).double().expand(20_000, 4)
    drawn = choose(logits, Sampling(temperature=2.0, top_k=3), torch.Generator().manual_seed(0))
    frequencies = drawn.bincount(minlength=4) / 20_000
    expected = torch.tensor([-torch.inf, 0.5, 1.5, 1.0]).softmax(dim=0)
    torch.testing.assert_close(frequencies, expected, atol=0.015, rtol=0)
    assert frequencies[0] == 0


def test_the_rules_work_in_their_order() -> None:
    """Of 0.5, 0.25, 0.125, 0.125 at temperature 0.5 (squares: 16, 4, 1, 1 of 22), min_p 0.2 keeps two."""
    assert kept(allowed(LOG, Sampling(min_p=0.2))) == [[0, 1, 2, 3]]
    assert kept(allowed(LOG, Sampling(temperature=0.5, min_p=0.2))) == [[0, 1]]
    # After top_k two are left, 2/3 and 1/3: 0.6 keeps one; before top_k it would keep two.
    assert kept(allowed(LOG, Sampling(top_k=2, top_p=0.6))) == [[0]]
    # The penalty comes before the temperature: greedy sees it too.
    seen = torch.tensor([[True, False, False, False]])
    assert choose(LOG + 2, Sampling(0.0, repetition_penalty=9.0), torch.Generator(), seen).tolist() == [1]


def test_a_tiny_temperature_does_not_overflow() -> None:
    logits = torch.tensor([[1e30, 2e30, -1e30]]).double()
    assert choose(logits, Sampling(temperature=1e-300), torch.Generator()).tolist() == [1]


def test_of_equal_logits_greedy_takes_the_first() -> None:
    assert choose(torch.tensor([[0.0, 3.0, 3.0]]), Sampling(temperature=0.0), torch.Generator()).tolist() == [1]


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_logits_that_are_not_finite_are_refused(bad: float) -> None:
    with pytest.raises(UsageError, match="not finite"):
        choose(torch.tensor([[0.0, bad]]), Sampling(temperature=0.0), torch.Generator())


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        *itertools.product(["temperature"], [-0.5, math.nan, math.inf]),
        *itertools.product(["top_k"], [0, -1]),
        *itertools.product(["top_p", "min_p"], [-0.1, 1.1, math.nan]),
        *itertools.product(["repetition_penalty"], [0.0, -1.0, math.nan, math.inf]),
    ],
)
def test_values_out_of_range_are_refused_by_flag(setting: str, value: float) -> None:
    with pytest.raises(UsageError, match=f"{setting} is {value}.*--{setting.replace('_', '-')}"):
        Sampling(**{setting: value})  # type: ignore[arg-type]


# --- against transformers ---

PEER = "transformers is not installed; it is a check of this project, not a dependency: pip install transformers"


@pytest.fixture(scope="module")
def peer() -> Any:
    return pytest.importorskip("transformers.generation.logits_process", reason=PEER)


def random_logits(case: int) -> tuple[Tensor, Tensor]:
    """Logits `[4, 50]`, every other case with many ties, and ids `[4, 9]` with repetitions."""
    generator = torch.Generator().manual_seed(case)
    logits = 3 * torch.randn(4, 50, generator=generator, dtype=torch.float64)
    return logits.round() if case % 2 else logits, torch.randint(50, (4, 9), generator=generator)


def seen_of(ids: Tensor) -> Tensor:
    return torch.zeros(len(ids), 50, dtype=torch.bool).scatter_(1, ids, True)


@pytest.mark.parametrize("case", range(10))
def test_each_rule_is_the_peers(peer: Any, case: int) -> None:
    logits, ids = random_logits(case)
    for penalty in (0.5, 1.0, 1.2, 5.0):
        theirs = peer.RepetitionPenaltyLogitsProcessor(penalty)(ids, logits)
        assert torch.equal(penalize_repetition(logits, seen_of(ids), penalty), theirs)
    for k in (1, 2, 7, 49, 50, 80):
        assert torch.equal(keep_top_k(logits, k), peer.TopKLogitsWarper(k)(ids, logits))
    for p in (0.0, 0.1, 0.5, 0.9, 0.999, 1.0):
        assert torch.equal(keep_top_p(logits, p), peer.TopPLogitsWarper(p)(ids, logits))
        assert torch.equal(keep_min_p(logits, p), peer.MinPLogitsWarper(p)(ids, logits))


@pytest.mark.parametrize("case", range(10))
def test_all_rules_together_give_the_peers_distribution(peer: Any, case: int) -> None:
    logits, ids = random_logits(case)
    for temperature, k, p, m, penalty in [
        (0.7, 20, 0.9, 0.05, 1.2),
        (1.5, 40, 0.95, 0.1, 1.5),
        (1.0, 5, 0.5, 0.0, 0.8),
    ]:
        theirs = logits
        for processor in (
            peer.RepetitionPenaltyLogitsProcessor(penalty),
            peer.TemperatureLogitsWarper(temperature),
            peer.TopKLogitsWarper(k),
            peer.TopPLogitsWarper(p),
            peer.MinPLogitsWarper(m),
        ):
            theirs = processor(ids, theirs)
        ours = allowed(penalize_repetition(logits, seen_of(ids), penalty), Sampling(temperature, k, p, m))
        assert kept(ours) == kept(theirs)
        torch.testing.assert_close(ours.softmax(dim=-1), theirs.softmax(dim=-1), rtol=1e-12, atol=1e-15)


def test_the_order_is_the_peers(peer: Any) -> None:
    """What transformers builds from a configuration, rule by rule."""
    from transformers import GenerationConfig, GPT2Config, GPT2LMHeadModel

    model = GPT2LMHeadModel(GPT2Config(n_layer=1, n_head=1, n_embd=8, vocab_size=50, n_positions=8))
    config = GenerationConfig(
        do_sample=True, temperature=0.7, top_k=20, top_p=0.9, min_p=0.05, repetition_penalty=1.2, eos_token_id=49
    )
    processors = model._get_logits_processor(config, input_ids_seq_length=3)
    assert [type(processor).__name__ for processor in processors] == [
        "RepetitionPenaltyLogitsProcessor",
        "TemperatureLogitsWarper",
        "TopKLogitsWarper",
        "TopPLogitsWarper",
        "MinPLogitsWarper",
    ]
