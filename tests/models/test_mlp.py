import pytest
import torch
from torch import nn

from fivestep.errors import UsageError
from fivestep.models.mlp import ACTIVATIONS, MLP


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_shapes_layers_and_parameter_count(activation: str) -> None:
    model = MLP([16, 64, 32, 3], activation)
    assert model(torch.randn(5, 16)).shape == (5, 3)
    assert sum(p.numel() for p in model.parameters()) == 16 * 64 + 64 + 64 * 32 + 32 + 32 * 3 + 3
    assert isinstance(model.layers[-1], nn.Linear)
    assert sum(isinstance(layer, ACTIVATIONS[activation]) for layer in model.layers) == 2


def test_equals_the_formula() -> None:
    model, features = MLP((4, 8, 1)), torch.randn(6, 4)
    first, last = (layer for layer in model.layers if isinstance(layer, nn.Linear))
    assert torch.equal(model(features), last(first(features).relu()))


def test_two_sizes_are_a_linear_model() -> None:
    assert len(MLP([4, 1], dropout=0.5).layers) == 1


@pytest.mark.parametrize(
    ("sizes", "activation", "message"),
    [([4], "relu", "at least two"), ([4, 0], "relu", "--sizes"), ([4, 1], "rleu", "did you mean 'relu'")],
)
def test_bad_arguments_are_refused(sizes: list[int], activation: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        MLP(sizes, activation)
