import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fivestep.errors import UsageError
from fivestep.models.rnn import CELLS, RNN, Hidden

GATES = {"rnn_tanh": 1, "rnn_relu": 1, "gru": 3, "lstm": 4}


def small(cell: str = "lstm", **sizes: object) -> RNN:
    torch.manual_seed(0)
    return RNN(30, **{"n_embd": 12, "n_hidden": 16, "cell": cell, **sizes})  # type: ignore[arg-type]


def parts(hidden: Hidden) -> tuple[Tensor, ...]:
    return hidden if isinstance(hidden, tuple) else (hidden,)


@pytest.mark.parametrize("cell", CELLS)
def test_shapes_and_parameter_count(cell: str) -> None:
    model = small(cell)
    output, hidden = model(torch.randint(30, (7, 3)))
    assert output.shape == (7, 3, 30)
    assert [h.shape for h in parts(hidden)] == [(2, 3, 16)] * (2 if cell == "lstm" else 1)
    recurrent = GATES[cell] * 16 * (12 + 16 + 2) + GATES[cell] * 16 * (16 + 16 + 2)
    assert sum(p.numel() for p in model.parameters()) == 30 * 12 + recurrent + 30 * 16 + 30


@pytest.mark.parametrize("cell", CELLS)
def test_carried_hidden_state_equals_one_long_pass(cell: str) -> None:
    model = small(cell).eval()
    data = torch.randint(30, (9, 3))
    whole, hidden_whole = model(data)
    first, hidden = model(data[:4])
    second, hidden = model(data[4:], hidden)
    torch.testing.assert_close(torch.cat([first, second]), whole)
    for carried, expected in zip(parts(hidden), parts(hidden_whole), strict=True):
        torch.testing.assert_close(carried, expected)


@pytest.mark.parametrize("cell", CELLS)
def test_no_hidden_state_means_zeros(cell: str) -> None:
    model = small(cell).double().eval()
    data = torch.randint(30, (5, 3))
    zeros = model.init_hidden(3)
    assert isinstance(zeros, tuple) == (cell == "lstm")
    assert all(z.dtype == torch.float64 and not z.any() for z in parts(zeros))
    assert torch.equal(model(data)[0], model(data, zeros)[0])


@pytest.mark.parametrize("cell", CELLS)
def test_a_later_token_changes_no_earlier_logits(cell: str) -> None:
    model = small(cell).eval()
    data = torch.randint(30, (8, 2))
    changed = data.clone()
    changed[5] = (changed[5] + 1) % 30
    before, after = model(data)[0], model(changed)[0]
    assert torch.equal(before[:5], after[:5])
    assert not torch.equal(before[5], after[5])


@pytest.mark.parametrize("n_hidden", [12, 16])
def test_tied_weights_are_one_tensor_and_train(n_hidden: int) -> None:
    model = small(tied=True, n_hidden=n_hidden)
    assert model.decoder.weight is model.encoder.weight
    assert ("projection.weight" in model.state_dict()) == (n_hidden != 12)
    before = model.encoder.weight.detach().clone()
    data, target = torch.randint(30, (7, 3)), torch.randint(30, (21,))
    F.cross_entropy(model(data)[0].flatten(0, 1), target).backward()
    torch.optim.SGD(model.parameters(), lr=1.0).step()
    assert not torch.equal(before, model.encoder.weight)
    assert model.decoder.weight.data_ptr() == model.encoder.weight.data_ptr()


def test_initial_weights() -> None:
    model = small()
    for weight in (model.encoder.weight, model.decoder.weight):
        assert 0.09 < weight.abs().max() <= 0.1
    assert not model.decoder.bias.any()


@pytest.mark.parametrize("cell", CELLS)
def test_predict_next_step_by_step_equals_the_whole(cell: str) -> None:
    model = small(cell).eval()
    ids = torch.randint(30, (3, 6))  # [batch, time]
    whole, _ = model(ids.t())
    memory = None
    for t in range(6):
        logits, memory = model.predict_next(ids[:, t : t + 1], memory)
        torch.testing.assert_close(logits, whole[t])


def test_one_layer_gives_no_warning(recwarn: pytest.WarningsRecorder) -> None:
    small(n_layer=1, dropout=0.5)
    assert not recwarn.list


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ({"cell": "ltsm"}, "--cell; did you mean 'lstm'"),
        ({"n_embd": 0}, "--n-embd"),
        ({"n_layer": 0}, "--n-layer"),
        ({"dropout": 1.0}, "--dropout"),
    ],
)
def test_bad_arguments_are_refused(argument: dict[str, object], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        small(**argument)  # type: ignore[arg-type]
