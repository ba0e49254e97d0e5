"""The bigram model: the next token depends on the last one alone.

Owns one table. Its memory is always None, because it remembers nothing.
"""

from torch import Tensor, nn

from fivestep.models.contract import require_positive


class Bigram(nn.Module):
    """A table whose row i holds the logits of what follows token i: `vocab_size ** 2` parameters.

    The table starts as N(0, 1), torch's default, so the first loss is about ln(vocab_size) + 0.5 nats.
    """

    def __init__(self, vocab_size: int) -> None:
        super().__init__()
        require_positive(vocab_size=vocab_size)
        self.token_embedding_table = nn.Embedding(vocab_size, vocab_size)

    def forward(self, xb: Tensor) -> Tensor:
        """Ids `[batch, time]` to logits `[batch, time, vocab_size]`."""
        logits: Tensor = self.token_embedding_table(xb)
        return logits

    def predict_next(self, ids: Tensor, memory: None = None) -> tuple[Tensor, None]:
        """Logits `[batch, vocab_size]` of the token after `ids` `[batch, time]`; see `LanguageModel`."""
        return self.forward(ids[:, -1]), None
