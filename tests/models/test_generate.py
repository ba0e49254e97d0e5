import pytest
import torch
from torch import Tensor, nn

from fivestep.errors import UsageError
from fivestep.models.bigram import Bigram
from fivestep.models.generate import choose, generate, stream_tokens
from fivestep.models.gpt import GPT
from fivestep.models.mlp import MLP
from fivestep.models.rnn import RNN
from fivestep.models.transformer import Transformer

NAMES = ["bigram", "rnn", "transformer", "gpt"]
PROMPT = torch.tensor([[1, 2, 3], [4, 5, 6]])


def build(name: str) -> Bigram | RNN | Transformer | GPT:
    torch.manual_seed(0)
    if name == "bigram":
        return Bigram(20)
    if name == "rnn":
        return RNN(20, n_embd=8, n_hidden=8, dropout=0.5)
    if name == "transformer":
        return Transformer(20, n_embd=8, n_hidden=8, dropout=0.5, block_size=4)
    return GPT(20, block_size=4, n_layer=1, n_head=2, n_embd=8, dropout=0.5)


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
    model = build("rnn")
    assert isinstance(model, RNN)
    kept: list[Tensor] = []
    model.rnn.register_forward_hook(lambda module, args, result: kept.extend(result[1]))
    generate(model, PROMPT, 2)
    assert len(kept) == 4
    assert not any(hidden.is_inference() or hidden.requires_grad for hidden in kept)


def test_the_stream_is_what_generate_drains() -> None:
    model = build("rnn")
    columns = torch.stack(list(stream_tokens(model, PROMPT, 6, seed=3)), dim=1)
    assert torch.equal(generate(model, PROMPT, 6, seed=3)[:, 3:], columns)


def test_draws_follow_the_softmax_of_scaled_logits() -> None:
    logits = torch.tensor([[0.0, 1.0, 3.0, 2.0]]).double().expand(20_000, 4)
    drawn = choose(logits, 2.0, 3, torch.Generator().manual_seed(0))
    frequencies = drawn.bincount(minlength=4) / 20_000
    expected = torch.tensor([-torch.inf, 0.5, 1.5, 1.0]).softmax(dim=0)
    torch.testing.assert_close(frequencies, expected, atol=0.015, rtol=0)


def test_a_tiny_temperature_does_not_overflow() -> None:
    logits = torch.tensor([[1e30, 2e30, -1e30]]).double()
    assert choose(logits, 1e-300, None, torch.Generator()).tolist() == [1]


def test_logits_that_are_not_finite_are_refused_and_modes_restored() -> None:
    model = Broken(20).train()
    with pytest.raises(UsageError, match="not finite"):
        generate(model, PROMPT, 1)
    assert model.training


def test_an_error_in_the_model_restores_modes() -> None:
    model = build("gpt").train()
    with pytest.raises(IndexError):
        generate(model, torch.tensor([99]), 1)
    assert all(modes(model))


@pytest.mark.parametrize(
    ("ids", "max_new_tokens", "temperature", "top_k", "message"),
    [
        (PROMPT[:, :0], 1, 1.0, None, "--prompt"),
        (PROMPT.float(), 1, 1.0, None, "--prompt"),
        (PROMPT[None], 1, 1.0, None, "--prompt"),
        (PROMPT, -1, 1.0, None, "--max-new-tokens"),
        (PROMPT, 1, -0.5, None, "--temperature"),
        (PROMPT, 1, float("nan"), None, "--temperature"),
        (PROMPT, 1, 1.0, 0, "--top-k"),
    ],
)
def test_bad_arguments_are_refused_at_once(
    ids: Tensor, max_new_tokens: int, temperature: float, top_k: int | None, message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        stream_tokens(build("bigram"), ids, max_new_tokens, temperature=temperature, top_k=top_k)


def test_a_model_without_predict_next_is_refused() -> None:
    with pytest.raises(UsageError, match="MLP has no predict_next"):
        generate(MLP([4, 1]), PROMPT, 1)  # type: ignore[arg-type]
