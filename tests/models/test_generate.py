from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fivestep.errors import UsageError
from fivestep.models.bigram import Bigram
from fivestep.models.generate import generate, stream_tokens
from fivestep.models.gpt import GPT
from fivestep.models.gpt2 import GPT2
from fivestep.models.mlp import MLP
from fivestep.models.rnn import CELLS, RNN
from fivestep.models.transformer import Transformer

NAMES = ["bigram", "rnn_tanh", "rnn_relu", "lstm", "gru", "transformer", "gpt", "gpt2"]
PROMPT = torch.tensor([[1, 2, 3], [4, 5, 6]])


BLOCK = 8


def build(name: str, std: float = 0.3) -> Bigram | RNN | Transformer | GPT | GPT2:
    """A small model whose every matrix is random, so that each token depends on all of the context."""
    torch.manual_seed(0)
    model: Bigram | RNN | Transformer | GPT | GPT2
    if name == "bigram":
        model = Bigram(20)
    elif name == "transformer":
        model = Transformer(20, n_embd=8, n_hidden=8, dropout=0.5, block_size=BLOCK)
    elif name in CELLS:
        model = RNN(20, n_embd=8, n_hidden=8, dropout=0.5, cell=name)
    else:
        decoder = GPT if name == "gpt" else GPT2
        model = decoder(20, block_size=BLOCK, n_layer=2, n_head=2, n_embd=8, dropout=0.5, tied=False)
    for parameter in model.parameters():
        if parameter.dim() == 2:
            nn.init.normal_(parameter, std=std)
    return model


def modes(model: nn.Module) -> list[bool]:
    return [module.training for module in model.modules()]


class Broken(Bigram):
    def predict_next(self, ids: Tensor, memory: None = None) -> tuple[Tensor, None]:
        logits, _ = super().predict_next(ids)
        return logits * float("nan"), None


@pytest.mark.parametrize("name", NAMES)
def test_continues_the_prompt(name: str) -> None:
    model = build(name)
    out = generate(model, PROMPT, 9)
    assert out.shape == (2, 12)
    assert out.dtype == PROMPT.dtype
    assert torch.equal(out[:, :3], PROMPT)
    assert torch.equal(generate(model, PROMPT[0], 0), PROMPT[:1])


@pytest.mark.parametrize("name", NAMES)
def test_one_seed_gives_one_text(name: str) -> None:
    model = build(name)
    assert torch.equal(generate(model, PROMPT, 30, seed=5), generate(model, PROMPT, 30, seed=5))
    assert not torch.equal(generate(model, PROMPT, 30, seed=5), generate(model, PROMPT, 30, seed=6))


@pytest.mark.parametrize("name", NAMES)
def test_temperature_zero_and_top_1_are_greedy(name: str) -> None:
    model = build(name)
    greedy = generate(model, PROMPT, 8, temperature=0.0, seed=1)
    assert torch.equal(greedy, generate(model, PROMPT, 8, top_k=1, seed=2))
    expected, _ = model.eval().predict_next(PROMPT, None)
    assert torch.equal(greedy[:, 3], expected.argmax(dim=-1))


HOW: list[dict[str, Any]] = [
    {"temperature": 0.0, "repetition_penalty": 2.0},  # without the penalty a random model soon repeats itself
    {"seed": 1},
    {"seed": 2, "temperature": 0.7, "top_k": 5},
    {"seed": 3, "top_p": 0.8, "repetition_penalty": 1.3},
]


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("prompt_length", [1, BLOCK, 3 * BLOCK + 1])
@pytest.mark.parametrize("name", NAMES)
def test_the_cache_changes_no_token(name: str, prompt_length: int, how: dict[str, Any]) -> None:
    model = build(name)
    ids = torch.randint(20, (3, prompt_length))
    cached = generate(model, ids, 4 * BLOCK, **how)
    assert torch.equal(cached, generate(model, ids, 4 * BLOCK, cache=False, **how))
    assert len(cached[:, prompt_length:].unique()) > 2  # no text that any two models would agree on


@pytest.mark.parametrize("name", ["gpt", "gpt2"])
def test_with_the_cache_a_token_costs_one_position(name: str) -> None:
    model = build(name)
    positions: list[int] = []
    model.blocks[0].register_forward_hook(lambda module, args, output: positions.append(output.shape[1]))
    generate(model, PROMPT, 12)
    # 3 of the prompt; at 9 ids the newest 6 of them anew, and again 3 tokens later.
    assert positions == [3, 1, 1, 1, 1, 1, 6, 1, 1, 6, 1, 1]
    positions.clear()
    generate(model, PROMPT, 12, cache=False)
    assert positions == [3, 4, 5, 6, 7, 8, 6, 7, 8, 6, 7, 8]


@pytest.mark.parametrize("name", NAMES)
def test_ids_beyond_the_vocabulary_are_never_drawn(name: str) -> None:
    model = build(name, std=0.01)
    everything = generate(model, PROMPT, 200)
    assert everything[:, 3:].max() >= 7  # without the limit they are
    limited = generate(model, PROMPT, 200, vocab_size=7, repetition_penalty=1.1)
    assert limited[:, 3:].max() == 6
    greedy = generate(model, PROMPT, 5, vocab_size=7, temperature=0.0)
    logits, _ = model.eval().predict_next(PROMPT, None)
    assert torch.equal(greedy[:, 3], logits[:, :7].argmax(dim=-1))


def test_a_repetition_penalty_counts_prompt_and_continuation() -> None:
    """A table with equal rows: with a huge penalty greedy goes through all tokens, the prompt's come last."""
    model = Bigram(6)
    with torch.no_grad():
        model.token_embedding_table.weight.copy_(torch.tensor([6.0, 5.0, 4.0, 3.0, 2.0, 1.0]).expand(6, 6))
    out = generate(model, torch.tensor([[0, 2], [5, 4]]), 4, temperature=0.0, repetition_penalty=100.0)
    assert out[:, 2:].tolist() == [[1, 3, 4, 5], [0, 1, 2, 3]]


def test_rows_of_a_batch_are_samples_of_their_own() -> None:
    out = generate(build("gpt"), torch.tensor([[1, 2]] * 4), 20)
    assert len({tuple(row) for row in out.tolist()}) == 4


@pytest.mark.parametrize("name", NAMES)
def test_leaves_no_trace(name: str) -> None:
    model = build(name).train()
    next(reversed(list(model.modules()))).eval()  # a part that the user froze
    before, random_state = modes(model), torch.get_rng_state()
    generate(model, PROMPT, 5)
    assert modes(model) == before
    assert torch.equal(torch.get_rng_state(), random_state)


def test_between_tokens_the_caller_finds_everything_as_it_was() -> None:
    model = build("gpt").train()
    stream = stream_tokens(model, PROMPT, 100)
    for _, column in zip(range(3), stream, strict=False):
        assert column.shape == (2,)
        assert all(modes(model))
        assert torch.is_grad_enabled()
    assert all(modes(model))


def test_memory_may_enter_a_training_step() -> None:
    model = build("lstm")
    assert isinstance(model, RNN)
    kept: list[Tensor] = []
    model.rnn.register_forward_hook(lambda module, args, result: kept.extend(result[1]))
    generate(model, PROMPT, 2)
    assert len(kept) == 4
    assert not any(hidden.is_inference() or hidden.requires_grad for hidden in kept)


def test_the_stream_is_what_generate_drains() -> None:
    model = build("lstm")
    columns = torch.stack(list(stream_tokens(model, PROMPT, 6, seed=3)), dim=1)
    assert torch.equal(generate(model, PROMPT, 6, seed=3)[:, 3:], columns)


def test_logits_that_are_not_finite_are_refused_and_modes_restored() -> None:
    model = Broken(20).train()
    with pytest.raises(UsageError, match="not finite"):
        generate(model, PROMPT, 1)
    assert model.training


def test_an_error_in_the_model_restores_modes() -> None:
    model = build("gpt").train()
    model.lm_head.register_forward_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        generate(model, PROMPT, 1)
    assert all(modes(model))


@pytest.mark.parametrize(
    ("ids", "max_new_tokens", "how", "message"),
    [
        (PROMPT[:, :0], 1, {}, "--prompt"),
        (PROMPT.float(), 1, {}, "--prompt"),
        (PROMPT[None], 1, {}, "--prompt"),
        (PROMPT, -1, {}, "--max-new-tokens"),
        (PROMPT, 2.5, {}, "--max-new-tokens"),
        (PROMPT + 99, 1, {}, "the model knows"),
        (PROMPT - 99, 1, {}, "the model knows"),
        (PROMPT.bool(), 1, {}, "--prompt"),
        ([1, 2], 1, {}, "--prompt"),
        (PROMPT, 1, {"seed": 2**64}, "--seed"),
        (PROMPT, 1, {"top_k": 2.5}, "--top-k"),
        (PROMPT, 1, {"top_k": True}, "--top-k"),
        (PROMPT, 1, {"temperature": "a"}, "--temperature"),
        (PROMPT, 1, {"repetition_penalty": 1e-320}, "--repetition-penalty"),
        (PROMPT, 1, {"vocab_size": 0}, "--vocab-size"),
        (PROMPT, 1, {"temperature": -0.5}, "--temperature"),
    ],
)
def test_bad_arguments_are_refused_at_once(
    ids: Tensor, max_new_tokens: int, how: dict[str, Any], message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        stream_tokens(build("bigram"), ids, max_new_tokens, **how)


def test_a_model_without_predict_next_is_refused() -> None:
    with pytest.raises(UsageError, match="MLP has no predict_next"):
        generate(MLP([4, 1]), PROMPT, 1)  # type: ignore[arg-type]
