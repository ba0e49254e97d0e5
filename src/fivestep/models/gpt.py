"""A modern decoder for characters or tokens: rotary positions, QK-norm, squared ReLU, no biases, no gains.

Beside its id, a position may look up the n-grams that end there (`NGrams`): what a small model would spend its
first thousand steps to learn. Owns the blocks, the tables and the initial weights. Every parameter is a matrix: an
optimizer for matrices (Muon) may take all of `blocks`.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fivestep.errors import UsageError
from fivestep.models.cache import LayerCache, Memory, attend, remember
from fivestep.models.contract import (
    require_divisible,
    require_dropout,
    require_positive,
    require_within_block,
)

INIT_STD = 0.02
NGRAM_ROWS = 32_768
HASH_BASE, HASH_LAST = 1_540_483_477, 1_327_217_885  # odd, below 2**31, of no regular pattern
HASH_MASK = 2**31 - 1


class GPT(nn.Module):
    """A decoder-only Transformer of `n_layer` pre-norm blocks, `n_embd` wide, over `block_size` positions.

    Parameters: `n_layer * 12 * n_embd**2 + 2 * vocab_size * n_embd`; the 2 is a 1 when `tied`. With `ngrams` above 1
    the n-grams of 2 to `ngrams` ids have embeddings too, `ngram_rows * n_embd` parameters more. The first loss is
    ln(vocab_size) within a few percent. Dropout falls on the embeddings, the attention weights and what each block
    adds. Raises `UsageError` for bad sizes.
    """

    rotary_cos: Tensor
    rotary_sin: Tensor

    def __init__(
        self,
        vocab_size: int,
        block_size: int = 64,
        n_layer: int = 4,
        n_head: int = 4,
        n_embd: int = 128,
        dropout: float = 0.0,
        tied: bool = False,
        ngrams: int = 1,
        ngram_rows: int = NGRAM_ROWS,
    ) -> None:
        super().__init__()
        require_positive(vocab_size=vocab_size, block_size=block_size)
        require_positive(n_layer=n_layer, n_head=n_head, n_embd=n_embd)
        require_positive(ngrams=ngrams)
        require_dropout(dropout)
        head_size = _head_size(n_embd, n_head)
        self.block_size = block_size
        self.dropout = nn.Dropout(dropout)
        self.token_embedding_table = nn.Embedding(vocab_size, n_embd)
        self.ngrams = NGrams(ngrams, ngram_rows, n_embd) if ngrams > 1 else None
        self.blocks = nn.ModuleList(Block(n_embd, n_head, dropout) for _ in range(n_layer))
        self.lm_head = nn.Linear(n_embd, vocab_size, bias=False)
        if tied:
            self.lm_head.weight = self.token_embedding_table.weight
        cos, sin = rotary_tables(block_size, head_size)
        self.register_buffer("rotary_cos", cos, persistent=False)
        self.register_buffer("rotary_sin", sin, persistent=False)
        self._init_weights()

    def _init_weights(self) -> None:
        for parameter in self.parameters():
            nn.init.normal_(parameter, std=INIT_STD)
        if self.lm_head.weight is self.token_embedding_table.weight:
            # A normalised row times itself is std * n_embd: at 0.02 a wide model would be sure to repeat.
            nn.init.normal_(self.lm_head.weight, std=0.5 / self.lm_head.in_features)
        # Blocks that add nothing at first leave the residual stream, and so the gradient, undisturbed.
        for module in self.modules():
            if isinstance(module, Attention | SquaredReluMLP):
                nn.init.zeros_(module.output.weight)
            if isinstance(module, NGrams):
                nn.init.zeros_(module.table.weight)

    def forward(self, xb: Tensor) -> Tensor:
        """Ids `[batch, time]` to logits `[batch, time, vocab_size]`.

        Raises `UsageError` where time exceeds `block_size`.
        """
        require_within_block(xb.shape[1], self.block_size)
        logits: Tensor = self.lm_head(norm(self._blocks(xb)))
        return logits

    def _blocks(self, ids: Tensor, layers: list[LayerCache] | None = None) -> Tensor:
        """The residual stream `[batch, new, n_embd]` after the last block, of those `ids` that `layers` lack."""
        start, end = layers[0].time if layers else 0, ids.shape[1]
        cos, sin = self.rotary_cos[start:end], self.rotary_sin[start:end]  # [new, head_size / 2]
        x: Tensor = self.token_embedding_table(ids[:, start:])  # [batch, new, n_embd]
        if self.ngrams is not None:
            x = x + self.ngrams(ids, start)
        # Normalised, rows learn their direction; their initial scale is then free to suit a tied head.
        x = self.dropout(norm(x))
        for depth, block in enumerate(self.blocks):
            x = block(x, cos, sin, layers[depth] if layers else None)
        return x

    @torch.no_grad()
    def predict_next(self, ids: Tensor, memory: Memory | None = None) -> tuple[Tensor, Memory]:
        """Logits `[batch, vocab_size]` after `ids` `[batch, time]`, without gradients; see `LanguageModel`."""
        memory, _ = remember(memory, ids, self.block_size, len(self.blocks))
        last = self._blocks(memory.ids, memory.layers)[:, -1]  # [batch, n_embd]
        return self.lm_head(norm(last)), memory


class NGrams(nn.Module):
    """One table for the n-grams of 2 to `longest` ids that end at a position, their rows found by a hash and summed.

    Source: Pagnoni et al. 2024 ("Byte Latent Transformer", section 3.2.1), who have a table for each length. Those
    that meet in a row share it. Before the window's first id stands a 0, which no id hashes as.
    """

    def __init__(self, longest: int, rows: int, n_embd: int) -> None:
        super().__init__()
        self.longest = longest
        self.table = nn.Embedding(rows, n_embd)

    def forward(self, ids: Tensor, start: int = 0) -> Tensor:
        """Ids `[batch, time]` to the sums of their n-grams' rows, `[batch, time - start, n_embd]`."""
        rows = self.rows(ids)[:, start:]  # [batch, new, longest - 1]
        sums = F.embedding_bag(rows.flatten(0, 1), self.table.weight, mode="sum")
        return sums.view(*rows.shape[:2], -1)

    def rows(self, ids: Tensor) -> Tensor:
        """The rows of the n-grams that end at each position, `[batch, time, longest - 1]`, shortest first.

        In whole numbers below 2**62: the same on every device. One id more, further back, is one round more of a
        polynomial modulo 2**31; its upper bits, after a last product (Knuth, 6.4), choose the row.
        """
        ids = ids + 1
        key, rows = ids, []
        for back in range(1, self.longest):
            older = F.pad(ids, (back, 0))[:, : ids.shape[1]]
            key = (key * HASH_BASE + older) & HASH_MASK
            rows.append(((key * HASH_LAST & HASH_MASK) * self.table.num_embeddings) >> 31)
        return torch.stack(rows, dim=-1)


class Block(nn.Module):
    """Attention, then the MLP, each added to the residual stream from a normalised copy of it."""

    def __init__(self, n_embd: int, n_head: int, dropout: float) -> None:
        super().__init__()
        self.attention = Attention(n_embd, n_head, dropout)
        self.mlp = SquaredReluMLP(n_embd)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, cache: LayerCache | None = None) -> Tensor:
        """`[batch, time, n_embd]` to the same; `cos` and `sin` are `[time, head_size / 2]`."""
        x = x + self.dropout(self.attention(norm(x), cos, sin, cache))
        x = x + self.dropout(self.mlp(norm(x)))
        return x


class Attention(nn.Module):
    """Causal self-attention with rotary positions and normalised queries and keys (Henry et al. 2020)."""

    def __init__(self, n_embd: int, n_head: int, dropout: float) -> None:
        super().__init__()
        self.n_head = n_head
        self.dropout_p = dropout
        # Three matrices, not one of three: Muon orthogonalises each for itself.
        self.query = nn.Linear(n_embd, n_embd, bias=False)
        self.key = nn.Linear(n_embd, n_embd, bias=False)
        self.value = nn.Linear(n_embd, n_embd, bias=False)
        self.output = nn.Linear(n_embd, n_embd, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, cache: LayerCache | None = None) -> Tensor:
        """`[batch, time, n_embd]` to the same; positions in the `cache` are looked back on."""
        q = rotate(norm(self._split_heads(self.query(x))), cos, sin)  # [batch, n_head, time, head_size]
        k = rotate(norm(self._split_heads(self.key(x))), cos, sin)
        v = self._split_heads(self.value(x))
        if cache is not None:
            k, v = cache.extend(k, v)
        mixed = attend(q, k, v, self.dropout_p if self.training else 0.0)
        output: Tensor = self.output(mixed.transpose(1, 2).flatten(2))
        return output

    def _split_heads(self, x: Tensor) -> Tensor:
        batch, time, n_embd = x.shape
        return x.view(batch, time, self.n_head, n_embd // self.n_head).transpose(1, 2)


class SquaredReluMLP(nn.Module):
    """Two matrices, four times as wide between, with relu(x)^2 (So et al. 2021, "Primer")."""

    def __init__(self, n_embd: int) -> None:
        super().__init__()
        self.input = nn.Linear(n_embd, 4 * n_embd, bias=False)
        self.output = nn.Linear(4 * n_embd, n_embd, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """`[..., n_embd]` to the same."""
        output: Tensor = self.output(F.relu(self.input(x)).square())
        return output


def norm(x: Tensor) -> Tensor:
    """`x` less its mean, over its standard deviation, in the last dimension (Ba et al. 2016); no gain, no bias.

    torch has one kernel for it on a CPU; its RMS norm is a chain of several there, and slower.
    """
    return F.layer_norm(x, (x.shape[-1],))


def rotary_tables(block_size: int, head_size: int, base: float = 10_000.0) -> tuple[Tensor, Tensor]:
    """Cosines and sines `[block_size, head_size / 2]` of position * base^(-2i / head_size), in radians.

    Source: Su et al. 2021, equation 15. Row 0 is all ones and all zeros.
    """
    exponents = torch.arange(0, head_size, 2, dtype=torch.float64) / head_size
    angles = torch.outer(torch.arange(block_size, dtype=torch.float64), base**-exponents)
    return angles.cos().float(), angles.sin().float()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn each pair (x[i], x[i + head_size / 2]) of `[..., time, head_size]` by its position's angle.

    A product of two rotated vectors then depends on their distance alone (Su et al. 2021). The paper pairs
    neighbours; halves are the same up to a fixed order of columns, and slice without a stride.
    """
    cos, sin = cos.to(x.dtype), sin.to(x.dtype)
    first, second = x.chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, first * sin + second * cos], dim=-1)


def _head_size(n_embd: int, n_head: int) -> int:
    require_divisible(n_embd, n_head)
    head_size = n_embd // n_head
    if head_size % 2 != 0:
        raise UsageError(
            f"n_embd is {n_embd} and n_head is {n_head}, so a head is {head_size} wide; rotary "
            "positions need an even width: change --n-embd or --n-head."
        )
    return head_size
