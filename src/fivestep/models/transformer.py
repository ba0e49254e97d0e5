"""The encoder-style Transformer word model: sinusoidal positions, torch's own encoder, time first.

Owns the position table, the causal mask and their shapes; the layers are torch's. The modern decoder is
`gpt.py`.
"""

import math

import torch
from torch import Tensor, nn

from fivestep.errors import UsageError
from fivestep.models.contract import append_recent, require_divisible, require_dropout, require_positive


class Transformer(nn.Module):
    """A causal encoder of `n_layer` layers, after word_language_model's in pytorch/examples.

    `n_hidden` is the width of the feed-forward layers, `max_len` the longest sequence that `forward` takes,
    `block_size` the most ids that `predict_next` looks back on (`append_recent`). With `tied` the
    decoder's matrix is the encoder's. Raises `UsageError` for bad sizes.
    """

    position_table: Tensor

    def __init__(
        self,
        vocab_size: int,
        n_embd: int = 200,
        n_head: int = 2,
        n_hidden: int = 200,
        n_layer: int = 2,
        dropout: float = 0.2,
        max_len: int = 5000,
        tied: bool = False,
        block_size: int = 35,
    ) -> None:
        super().__init__()
        require_positive(vocab_size=vocab_size, n_embd=n_embd, n_head=n_head, n_hidden=n_hidden)
        require_positive(n_layer=n_layer, max_len=max_len, block_size=block_size)
        require_divisible(n_embd, n_head)
        require_dropout(dropout)
        if block_size > max_len:
            raise UsageError(
                f"block_size is {block_size} and max_len is {max_len}; block_size may be at most max_len: "
                "change --block-size or --max-len."
            )
        self.block_size = block_size
        self.dropout = nn.Dropout(dropout)
        self.encoder = nn.Embedding(vocab_size, n_embd)
        self.register_buffer("position_table", sinusoids(max_len, n_embd), persistent=False)
        # Time first keeps torch off its inference fast path, so evaluation computes what training computes.
        layer = nn.TransformerEncoderLayer(n_embd, n_head, n_hidden, dropout, batch_first=False)
        # torch copies the layer: as in the original, all layers start from the same weights.
        self.layers = nn.TransformerEncoder(layer, n_layer, enable_nested_tensor=False)
        self.decoder = nn.Linear(n_embd, vocab_size)
        if tied:
            self.decoder.weight = self.encoder.weight
        nn.init.uniform_(self.encoder.weight, -0.1, 0.1)
        nn.init.zeros_(self.decoder.bias)
        if not tied:
            nn.init.uniform_(self.decoder.weight, -0.1, 0.1)

    def forward(self, data: Tensor) -> Tensor:
        """Ids `[seq_len, batch]` to logits `[seq_len, batch, vocab_size]`.

        Raises `UsageError` where seq_len exceeds `max_len`.
        """
        output: Tensor = self.decoder(self.features(data))
        return output

    def features(self, data: Tensor) -> Tensor:
        """What `forward` gives to the decoder, `[seq_len, batch, n_embd]`."""
        seq_len, (max_len, n_embd) = data.shape[0], self.position_table.shape
        if seq_len > max_len:
            raise UsageError(
                f"A sequence of {seq_len} tokens was given; this model takes at most max_len = {max_len}: "
                "shorten it (--bptt) or raise --max-len."
            )
        scaled = self.encoder(data) * math.sqrt(n_embd)  # [seq_len, batch, n_embd]
        embedded = self.dropout(scaled + self.position_table[:seq_len, None])
        # Built anew each call: it costs nothing beside a layer, and torch asks for it even with `is_causal`.
        mask = nn.Transformer.generate_square_subsequent_mask(seq_len, data.device, embedded.dtype)
        features: Tensor = self.layers(embedded, mask=mask, is_causal=True)
        return features

    def predict_next(self, ids: Tensor, memory: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Logits `[batch, vocab_size]` after `ids` `[batch, time]`; the memory: the recent ids."""
        recent = append_recent(memory, ids, self.block_size)
        return self.forward(recent.t())[-1], recent


def sinusoids(max_len: int, n_embd: int) -> Tensor:
    """The position table `[max_len, n_embd]` of Vaswani et al. 2017, section 3.5.

    Column 2i is sin(position / 10000^(2i / n_embd)), column 2i + 1 its cosine; an odd width ends on a sine.
    Row 0 is 0, 1, 0, 1, ...
    """
    exponents = torch.arange(0, n_embd, 2, dtype=torch.float64) / n_embd  # [ceil(n_embd / 2)]
    angles = torch.outer(torch.arange(max_len, dtype=torch.float64), 10_000.0**-exponents)
    table = torch.empty(max_len, n_embd)
    table[:, 0::2] = angles.sin()
    table[:, 1::2] = angles[:, : n_embd // 2].cos()
    return table
