import math

import pytest
import torch
import torch.nn.functional as F

from fivestep.errors import UsageError
from fivestep.models.gpt2 import GPT2


def small(**sizes: object) -> GPT2:
    torch.manual_seed(0)
    given = {"block_size": 8, "n_layer": 2, "n_head": 2, "n_embd": 16, "dropout": 0.0, **sizes}
    return GPT2(30, **given)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("n_layer", "n_head", "n_embd", "parameters"),
    [
        (12, 12, 768, 124_439_808),
        (24, 16, 1024, 354_823_168),
        (36, 20, 1280, 774_030_080),
        (48, 25, 1600, 1_557_611_200),
    ],
)
def test_the_published_sizes(n_layer: int, n_head: int, n_embd: int, parameters: int) -> None:
    with torch.device("meta"):
        model = GPT2(50_257, 1024, n_layer, n_head, n_embd)
        untied = GPT2(50_257, 1024, n_layer, n_head, n_embd, tied=False)
    formula = n_layer * (12 * n_embd**2 + 13 * n_embd) + (50_257 + 1024 + 2) * n_embd
    assert sum(p.numel() for p in model.parameters()) == parameters == formula
    assert sum(p.numel() for p in untied.parameters()) == parameters + 50_257 * n_embd


def test_the_defaults_are_the_smallest_published_size() -> None:
    with torch.device("meta"):
        assert sum(p.numel() for p in GPT2().parameters()) == 124_439_808


def test_initial_weights() -> None:
    model = small(n_layer=8, n_embd=64)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            assert not parameter.any(), name
        elif "norm" in name:
            assert (parameter == 1).all(), name
        else:
            std = 0.02 / math.sqrt(2 * 8) if name.endswith("output.weight") else 0.02
            assert parameter.std().item() == pytest.approx(std, rel=0.1), name


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("n_embd", [32, 128, 768])
def test_first_loss_is_that_of_a_uniform_guess(n_embd: int, tied: bool) -> None:
    torch.manual_seed(0)
    model = GPT2(65, 64, n_layer=2, n_head=4, n_embd=n_embd, dropout=0.0, tied=tied)
    xb, yb = torch.randint(65, (2, 12, 64))
    assert model(xb).shape == (12, 64, 65)
    loss = F.cross_entropy(model(xb).flatten(0, 1), yb.flatten())
    assert loss.item() == pytest.approx(math.log(65), rel=0.06)


def test_equals_the_formulas_of_the_paper() -> None:
    """Attention with an explicit mask and softmax, and GELU from its formula, in float64."""
    model = small(n_layer=1).double().eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    xb = torch.randint(30, (3, 7))
    block = model.blocks[0]
    x = model.token_embedding_table.weight[xb] + model.position_embedding_table.weight[:7]
    q, k, v = block.attention.qkv(block.attention_norm(x)).split(16, dim=2)
    heads = []
    for columns in (slice(0, 8), slice(8, 16)):
        scores = q[..., columns] @ k[..., columns].transpose(1, 2) / math.sqrt(8)
        scores = scores.masked_fill(torch.ones(7, 7).triu(1).bool(), -torch.inf)
        heads.append(scores.softmax(dim=-1) @ v[..., columns])
    x = x + block.attention.output(torch.cat(heads, dim=-1))
    z = block.mlp.input(block.mlp_norm(x))
    gelu = 0.5 * z * (1 + torch.tanh(math.sqrt(2 / math.pi) * (z + 0.044715 * z**3)))
    x = x + block.mlp.output(gelu)
    expected = model.norm(x) @ model.token_embedding_table.weight.T
    torch.testing.assert_close(model(xb), expected)


def test_a_later_token_changes_no_earlier_logits() -> None:
    model = small().eval()
    xb = torch.randint(30, (2, 8))
    changed = xb.clone()
    changed[:, 5] = (changed[:, 5] + 1) % 30
    before, after = model(xb), model(changed)
    assert torch.equal(before[:, :5], after[:, :5])
    for t in (5, 6, 7):
        assert not torch.equal(before[:, t], after[:, t])


def test_tied_weights_are_one_tensor_and_train() -> None:
    model = small()
    before = model.lm_head.weight.detach().clone()
    F.cross_entropy(model(torch.randint(30, (3, 8))).flatten(0, 1), torch.randint(30, (24,))).backward()
    torch.optim.SGD(model.parameters(), lr=1.0).step()
    assert model.lm_head.weight is model.token_embedding_table.weight
    assert not torch.equal(before, model.lm_head.weight)


def test_dropout_acts_in_training_only() -> None:
    model, xb = small(dropout=0.5), torch.randint(30, (3, 8))
    plain = small()
    assert not torch.equal(model(xb), model(xb))
    assert torch.equal(model.eval()(xb), plain(xb))


def test_bfloat16_autocast_and_weights() -> None:
    model, xb = small(), torch.randint(30, (3, 8))
    exact = model(xb)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert F.cosine_similarity(model(xb).float(), exact, dim=-1).min() > 0.99
    assert model.bfloat16()(xb).dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("argument", "message"),
    [({"n_embd": 15}, "--n-embd or --n-head"), ({"block_size": 0}, "--block-size"), ({"dropout": 1.5}, "--dropout")],
)
def test_bad_arguments_are_refused(argument: dict[str, object], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        small(**argument)


def test_a_sequence_beyond_block_size_is_refused() -> None:
    with pytest.raises(UsageError, match="block_size = 8"):
        small()(torch.zeros(1, 9, dtype=torch.long))
