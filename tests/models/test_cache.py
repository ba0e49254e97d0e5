import pytest
import torch

from fivestep.models.cache import LayerCache, attend, attend_by_products, remember
from fivestep.models.contract import append_recent
from fivestep.models.gpt import GPT
from fivestep.models.gpt2 import GPT2

BLOCK = 8  # one id more, and the newest 6 stay


class NGramGPT(GPT):
    """A GPT whose positions look up n-grams: with a cache these reach back beyond the new ids."""

    def __init__(self, *sizes: int, **options: float) -> None:
        super().__init__(*sizes, **options, ngrams=4, ngram_rows=1000)  # type: ignore[arg-type]


def build(kind: type[GPT] | type[GPT2]) -> GPT | GPT2:
    torch.manual_seed(0)
    model = kind(30, block_size=BLOCK, n_layer=2, n_head=2, n_embd=16, dropout=0.0)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model.eval()


@pytest.mark.parametrize(
    ("block_size", "kept"), [(1, 1), (2, 2), (3, 3), (4, 3), (8, 6), (9, 7), (64, 48), (1024, 768)]
)
def test_a_full_block_drops_its_oldest_quarter(block_size: int, kept: int) -> None:
    ids = torch.arange(3 * block_size)[None]
    assert torch.equal(append_recent(None, ids[:, :block_size], block_size), ids[:, :block_size])
    assert torch.equal(append_recent(None, ids, block_size), ids[:, -kept:])
    one_more = append_recent(ids[:, :block_size], ids[:, block_size : block_size + 1], block_size)
    assert torch.equal(one_more, ids[:, block_size + 1 - kept : block_size + 1])
    assert torch.equal(append_recent(ids, ids, None), torch.cat([ids, ids], dim=1))


@pytest.mark.parametrize("kind", [GPT, NGramGPT, GPT2])
@pytest.mark.parametrize("pieces", [[1] * 20, [3, 1, 4, 1, 5, 1, 1], [8, 1, 7, 2], [1, 7, 1], [20, 1, 1, 1]])
def test_predict_next_piece_by_piece_equals_forward_over_what_it_looks_back_on(
    kind: type[GPT] | type[GPT2], pieces: list[int]
) -> None:
    model = build(kind)
    ids = torch.randint(30, (3, sum(pieces)))
    memory, context, end = None, None, 0
    for piece in pieces:
        start, end = end, end + piece
        logits, memory = model.predict_next(ids[:, start:end], memory)
        context = append_recent(context, ids[:, start:end], BLOCK)
        torch.testing.assert_close(logits, model(context)[:, -1], atol=2e-5, rtol=1e-4)
        assert torch.equal(memory.ids, context)
        assert [layer.time for layer in memory.layers] == [context.shape[1]] * 2


@pytest.mark.parametrize("kind", [GPT, NGramGPT, GPT2])
def test_the_context_is_all_that_counts(kind: type[GPT] | type[GPT2]) -> None:
    """The oldest id within the context changes the prediction, one before it does not."""
    model, ids = build(kind), torch.randint(30, (1, 12))
    inside, outside = ids.clone(), ids.clone()
    inside[0, -6] = (inside[0, -6] + 1) % 30
    outside[0, -7] = (outside[0, -7] + 1) % 30
    expected = model.predict_next(ids)[0]
    assert torch.equal(model.predict_next(outside)[0], expected)
    assert not torch.allclose(model.predict_next(inside)[0], expected)


@pytest.mark.parametrize("kind", [GPT, GPT2])
def test_bfloat16_weights_have_a_cache_of_their_kind(kind: type[GPT] | type[GPT2]) -> None:
    model = build(kind).bfloat16()
    _, memory = model.predict_next(torch.randint(30, (2, 5)))
    logits, memory = model.predict_next(torch.randint(30, (2, 1)), memory)
    assert logits.dtype == memory.layers[0].keys.dtype == torch.bfloat16


def test_a_prediction_leaves_nothing_for_backward() -> None:
    model = build(GPT)
    logits, memory = model.predict_next(torch.randint(30, (2, 5)))
    assert not logits.requires_grad
    assert not memory.layers[0].keys.requires_grad


def test_new_ids_extend_the_storage_in_place() -> None:
    first, unseen = remember(None, torch.zeros(2, 5, dtype=torch.long), BLOCK, 1)
    assert unseen.shape == (2, 5)
    for layer in first.layers:
        layer.extend(torch.randn(2, 3, 5, 4), torch.randn(2, 3, 5, 4))
    second, unseen = remember(first, torch.ones(2, 3, dtype=torch.long), BLOCK, 1)
    assert unseen.shape == (2, 3)
    storage = first.layers[0].keys
    new = torch.randn(2, 3, 3, 4)
    keys, values = second.layers[0].extend(new, 2 * new)
    assert keys.data_ptr() == storage.data_ptr()
    assert keys.shape == values.shape == (2, 3, 8, 4)
    assert torch.equal(keys[:, :, 5:], new)
    assert torch.equal(values[:, :, 5:], 2 * new)
    third, unseen = remember(second, torch.ones(2, 1, dtype=torch.long), BLOCK, 1)
    assert unseen.shape == third.ids.shape == (2, 6)
    assert third.layers[0].time == 0


@pytest.mark.parametrize("new", [1, 3, 7])
def test_the_last_queries_attend_as_they_do_among_all(new: int) -> None:
    q, k, v = torch.randn(3, 2, 2, 7, 4)
    whole = attend(q, k, v, 0.0)
    torch.testing.assert_close(attend(q[:, :, -new:], k, v, 0.0), whole[:, :, -new:])
    scores = (q @ k.transpose(2, 3) / 2).masked_fill(torch.ones(7, 7).triu(1).bool(), -torch.inf)
    torch.testing.assert_close(whole, scores.softmax(dim=-1) @ v)


@pytest.mark.parametrize("new", [1, 3, 7])
def test_products_attend_as_the_fused_kernel_does(new: int) -> None:
    """In float32, where rounding hides nothing; `attend` takes products in bfloat16 and for short windows alone."""
    q, k, v = (torch.randn(2, 3, 7, 4).requires_grad_() for _ in range(3))
    ours, theirs = (f(q[:, :, -new:], k, v, 0.0) for f in (attend_by_products, attend))
    torch.testing.assert_close(ours, theirs)
    weights = torch.randn_like(ours)
    for one, other in zip(
        *(torch.autograd.grad((y * weights).sum(), (q, k, v)) for y in (ours, theirs)), strict=True
    ):
        torch.testing.assert_close(one, other)
    half = [x.detach().bfloat16() for x in (q[:, :, -new:], k, v)]
    assert torch.equal(attend(*half, 0.0), attend_by_products(*half, 0.0))
    torch.testing.assert_close(attend(*half, 0.0).float(), ours.detach(), atol=0.03, rtol=0.03)


def test_products_drop_weights_as_asked() -> None:
    q, k, v = torch.zeros(3, 1, 1, 200, 4)
    v = v + 1  # what arrives is the share that is kept, over 1 - p
    shares = attend_by_products(q, k, v, 0.5)[0, 0, -50:, 0]
    assert shares.mean() == pytest.approx(1.0, abs=0.1)
    assert shares.std() > 0.03


def test_an_unused_cache_has_no_storage() -> None:
    assert LayerCache(1 << 30).keys.numel() == 0
