"""The multi-layer perceptron for supervised work: features in, a prediction or class logits out.

Owns the layers. The loss decides what the last layer means.
"""

from collections.abc import Sequence
from itertools import pairwise

from torch import Tensor, nn

from fivestep.errors import UsageError, suggestion
from fivestep.models.contract import require_dropout, require_positive

ACTIVATIONS: dict[str, type[nn.Module]] = {"relu": nn.ReLU, "tanh": nn.Tanh, "gelu": nn.GELU}


class MLP(nn.Module):
    """Linear layers of the given widths, with an activation, then dropout, after all but the last.

    `sizes` are the widths from the features to the output, at least two; `MLP([16, 64, 1])` has one hidden
    layer. Raises `UsageError` for a bad width, activation or dropout.
    """

    def __init__(self, sizes: Sequence[int], activation: str = "relu", dropout: float = 0.0) -> None:
        super().__init__()
        if len(sizes) < 2:
            raise UsageError(f"sizes is {list(sizes)}; it needs at least two, in and out: change --sizes.")
        for size in sizes:
            require_positive(sizes=size)
        require_dropout(dropout)
        if activation not in ACTIVATIONS:
            raise UsageError(
                f"activation is {activation!r}; it must be one of {', '.join(ACTIVATIONS)}: "
                f"change --activation{suggestion(activation, ACTIVATIONS)}."
            )
        layers: list[nn.Module] = []
        for n_in, n_out in pairwise(sizes):
            layers += [nn.Linear(n_in, n_out), ACTIVATIONS[activation](), nn.Dropout(dropout)]
        self.layers = nn.Sequential(*layers[:-2])

    def forward(self, features: Tensor) -> Tensor:
        """`[batch, sizes[0]]` to `[batch, sizes[-1]]`."""
        outputs: Tensor = self.layers(features)
        return outputs
