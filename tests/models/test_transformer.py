import math
import warnings

import pytest
import torch
import torch.nn.functional as F

from fivestep.errors import UsageError
from fivestep.models.transformer import Transformer, sinusoids


def small(**sizes: object) -> Transformer:
    torch.manual_seed(0)
    return Transformer(30, **{"n_embd": 12, "n_hidden": 16, "block_size": 6, **sizes})  # type: ignore[arg-type]


def test_shapes_and_parameter_count() -> None:
    model = small()
    assert model(torch.randint(30, (7, 3))).shape == (7, 3, 30)
    attention, feed_forward, norms = 4 * (12 * 12 + 12), 2 * 12 * 16 + 16 + 12, 4 * 12
    layers = 2 * (attention + feed_forward + norms)
    assert sum(p.numel() for p in model.parameters()) == 30 * 12 + layers + 30 * 12 + 30


def test_a_later_token_changes_no_earlier_logits() -> None:
    model = small().eval()
    data = torch.randint(30, (8, 2))
    changed = data.clone()
    changed[5] = (changed[5] + 1) % 30
    before, after = model(data), model(changed)
    assert torch.equal(before[:5], after[:5])
    assert not torch.equal(before[5], after[5])


def test_evaluation_computes_what_training_computes() -> None:
    model = small(dropout=0.0)
    data = torch.randint(30, (8, 2))
    training = model.train()(data)
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("error")
        evaluation = model.eval()(data)
    assert torch.equal(training, evaluation)


def test_a_forward_under_no_grad_leaves_training_unharmed() -> None:
    model = small()
    data = torch.randint(30, (8, 2))
    with torch.inference_mode():
        model(data)
    model(data).sum().backward()
    assert all(p.grad is not None for p in model.parameters())


def test_state_dict_holds_weights_only() -> None:
    model = small()
    assert set(model.state_dict()) == {name for name, _ in model.named_parameters()}


def test_tied_weights_are_one_tensor_and_train() -> None:
    model = small(tied=True)
    before = model.encoder.weight.detach().clone()
    F.cross_entropy(model(torch.randint(30, (7, 3))).flatten(0, 1), torch.randint(30, (21,))).backward()
    torch.optim.SGD(model.parameters(), lr=1.0).step()
    assert model.decoder.weight is model.encoder.weight
    assert not torch.equal(before, model.encoder.weight)


def test_initial_weights() -> None:
    model = small()
    for weight in (model.encoder.weight, model.decoder.weight):
        assert 0.09 < weight.abs().max() <= 0.1
    assert not model.decoder.bias.any()


@pytest.mark.parametrize("n_embd", [8, 9])
def test_sinusoids_at_known_points(n_embd: int) -> None:
    table = sinusoids(50, n_embd)
    assert table.shape == (50, n_embd)
    assert torch.equal(table[0], (torch.arange(n_embd) % 2).float())
    for position, column in [(1, 0), (1, 1), (37, 4), (37, 5)]:
        angle = position / 10_000 ** ((column - column % 2) / n_embd)
        expected = math.cos(angle) if column % 2 else math.sin(angle)
        assert table[position, column].item() == pytest.approx(expected, abs=1e-6)


def test_an_odd_width_works() -> None:
    assert small(n_embd=15, n_head=3)(torch.randint(30, (4, 2))).shape == (4, 2, 30)


def test_predict_next_step_by_step_equals_the_whole_of_what_it_looks_back_on() -> None:
    model = small().eval()
    ids = torch.randint(30, (3, 12))  # [batch, time]; block_size is 6, and 5 ids stay where a seventh comes
    memory = None
    for t, start in enumerate([0, 0, 0, 0, 0, 0, 2, 2, 4, 4, 6, 6]):
        logits, memory = model.predict_next(ids[:, t : t + 1], memory)
        window = ids[:, start : t + 1]
        torch.testing.assert_close(logits, model(window.t())[-1])
        assert torch.equal(memory, window)


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ({"n_embd": 13}, "--n-embd or --n-head"),
        ({"n_head": 0}, "--n-head"),
        ({"max_len": 5}, "--block-size or --max-len"),
        ({"dropout": -0.1}, "--dropout"),
    ],
)
def test_bad_arguments_are_refused(argument: dict[str, object], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        small(**argument)


def test_a_sequence_beyond_max_len_is_refused() -> None:
    with pytest.raises(UsageError, match="max_len = 6"):
        small(max_len=6)(torch.zeros(7, 1, dtype=torch.long))
