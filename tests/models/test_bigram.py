import math

import pytest
import torch
import torch.nn.functional as F

from fivestep.errors import UsageError
from fivestep.models.bigram import Bigram


def test_logits_are_rows_of_the_table() -> None:
    model = Bigram(65)
    xb = torch.randint(65, (4, 8))
    assert model(xb).shape == (4, 8, 65)
    assert torch.equal(model(xb), model.token_embedding_table.weight[xb])
    assert sum(p.numel() for p in model.parameters()) == 65**2


def test_first_loss_is_half_a_nat_above_uniform() -> None:
    torch.manual_seed(0)
    loss = F.cross_entropy(Bigram(65)(torch.arange(65)), torch.arange(65).flip(0))
    assert abs(loss.item() - (math.log(65) + 0.5)) < 0.5


def test_predict_next_looks_at_the_last_id_only() -> None:
    model = Bigram(10)
    logits, memory = model.predict_next(torch.tensor([[1, 2, 3], [4, 5, 6]]))
    assert memory is None
    assert torch.equal(logits, model.token_embedding_table.weight[[3, 6]])


@pytest.mark.parametrize("vocab_size", [0, -1, 1.5, True])
def test_bad_vocabulary_is_refused(vocab_size: int) -> None:
    with pytest.raises(UsageError, match="vocab_size"):
        Bigram(vocab_size)
