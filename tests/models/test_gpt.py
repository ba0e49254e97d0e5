import math

import pytest
import torch
import torch.nn.functional as F

from fivestep.errors import UsageError
from fivestep.models.gpt import GPT, rotary_tables, rotate


def small(**sizes: object) -> GPT:
    """A GPT whose every weight is random: at its true start the blocks add nothing and would hide errors."""
    torch.manual_seed(0)
    model = GPT(30, **{"block_size": 8, "n_layer": 2, "n_head": 2, "n_embd": 16, **sizes})  # type: ignore[arg-type]
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model


@pytest.mark.parametrize("tied", [False, True])
def test_shapes_and_parameter_count(tied: bool) -> None:
    model = small(tied=tied)
    assert model(torch.randint(30, (3, 5))).shape == (3, 5, 30)
    assert sum(p.numel() for p in model.parameters()) == 2 * 12 * 16**2 + (2 - tied) * 30 * 16


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("n_embd", [32, 128, 512])
def test_first_loss_is_that_of_a_uniform_guess(n_embd: int, tied: bool) -> None:
    torch.manual_seed(0)
    model = GPT(65, n_layer=1, n_embd=n_embd, tied=tied)
    xb, yb = torch.randint(65, (2, 12, 64))
    loss = F.cross_entropy(model(xb).flatten(0, 1), yb.flatten())
    assert loss.item() == pytest.approx(math.log(65), rel=0.05)


def test_ngrams_are_looked_up_with_all_that_precedes_them() -> None:
    """A row depends on its own n ids in their order, on no other, and on where the window begins."""
    torch.manual_seed(0)
    table = GPT(30, n_embd=16, n_head=2, ngrams=4, ngram_rows=1 << 20).ngrams
    assert table is not None
    ids = torch.tensor([[5, 6, 7, 8, 9], [4, 6, 7, 8, 9], [5, 7, 6, 8, 9]])
    rows = table.rows(ids)  # [3, 5, 3]: 2-, 3- and 4-grams
    assert rows.shape == (3, 5, 3)
    same = rows[0] == rows[1]
    assert same.tolist() == [[False] * 3, [False] * 3, [True, False, False], [True, True, False], [True] * 3]
    assert not (rows[0, 2:4] == rows[2, 2:4]).any()
    assert not torch.equal(table.rows(ids[:, 1:])[0, 0], rows[0, 1])
    assert len(set(rows[0].flatten().tolist())) == 15
    everything = GPT(256, n_embd=16, n_head=2, ngrams=2, ngram_rows=1000).ngrams.rows(torch.randint(256, (64, 64)))
    assert everything.min() >= 0
    assert everything.max() < 1000
    counts = everything.flatten().bincount(minlength=1000)  # 4.1 a row on average; drawn, 17 rows would stay empty
    assert (counts > 0).sum() > 960
    assert counts.max() < 16


def test_ngrams_are_summed_below_the_first_block() -> None:
    model, xb = small(ngrams=3, ngram_rows=50), torch.randint(30, (3, 8))
    rows = model.ngrams.rows(xb)
    expected = model.token_embedding_table(xb) + model.ngrams.table.weight[rows].sum(dim=2)
    torch.testing.assert_close(model.ngrams(xb) + model.token_embedding_table(xb), expected)
    model.ngrams.table.weight.data.zero_()
    plain = small()
    plain.load_state_dict(model.state_dict(), strict=False)
    torch.testing.assert_close(model(xb), plain(xb))


def test_a_model_with_ngrams_begins_as_one_without() -> None:
    torch.manual_seed(0)
    model = GPT(30, ngrams=5, ngram_rows=100)
    assert sum(p.numel() for p in model.parameters()) == 4 * 12 * 128**2 + 2 * 30 * 128 + 100 * 128
    assert not model.ngrams.table.weight.any()
    F.cross_entropy(model(torch.randint(30, (3, 8))).flatten(0, 1), torch.randint(30, (24,))).backward()
    assert model.ngrams.table.weight.grad.any()


def test_blocks_add_nothing_at_first_and_the_head_is_not_zero() -> None:
    model = GPT(30)
    x = torch.randn(1, 64, 128)
    assert torch.equal(model.blocks[0](x, *rotary_tables(64, 32)), x)
    for name, weight in model.named_parameters():
        assert weight.any() == (not name.endswith("output.weight")), name


@pytest.mark.parametrize("ngrams", [1, 4])
def test_a_later_token_changes_no_earlier_logits(ngrams: int) -> None:
    model = small(ngrams=ngrams, ngram_rows=100).eval()
    xb = torch.randint(30, (2, 8))
    changed = xb.clone()
    changed[:, 5] = (changed[:, 5] + 1) % 30
    before, after = model(xb), model(changed)
    assert torch.equal(before[:, :5], after[:, :5])
    for t in (5, 6, 7):
        assert not torch.equal(before[:, t], after[:, t])


def test_order_matters_before_the_last_token() -> None:
    model = small(n_layer=1).eval()
    one, other = torch.tensor([[1, 2, 3]]), torch.tensor([[2, 1, 3]])
    assert not torch.allclose(model(one)[:, -1], model(other)[:, -1])


def test_rotary_scores_depend_on_distance_only() -> None:
    cos, sin = rotary_tables(64, 32)
    query, key = torch.randn(2, 1, 32).double()
    turned_queries, turned_keys = rotate(query.expand(64, 32), cos, sin), rotate(key.expand(64, 32), cos, sin)
    scores = turned_queries @ turned_keys.t()  # [64, 64]
    for distance in (0, 1, 7, 40):
        along = scores.diagonal(-distance)
        torch.testing.assert_close(along, along[:1].expand_as(along), atol=1e-5, rtol=0)
    assert scores.diagonal(-1)[0] != scores.diagonal(-7)[0]
    torch.testing.assert_close(turned_keys.norm(dim=1), key.norm().expand(64), atol=1e-5, rtol=0)


def test_state_dict_holds_weights_only() -> None:
    model = small()
    assert set(model.state_dict()) == {name for name, _ in model.named_parameters()}
    assert all(p.dim() == 2 for p in model.parameters())


def test_tied_weights_are_one_tensor_and_train() -> None:
    model = small(tied=True)
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
    [
        ({"n_embd": 15}, "--n-embd or --n-head"),
        ({"n_embd": 6}, "even width"),
        ({"block_size": 0}, "--block-size"),
        ({"ngrams": 0}, "--ngrams"),
        ({"dropout": 1.5}, "--dropout"),
    ],
)
def test_bad_arguments_are_refused(argument: dict[str, object], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        small(**argument)


def test_a_sequence_beyond_block_size_is_refused() -> None:
    with pytest.raises(UsageError, match="block_size = 8"):
        small()(torch.zeros(1, 9, dtype=torch.long))
