"""GPT-2 as published (Radford et al. 2019): learned positions, LayerNorm, GELU, biases, a tied head.

Owns the blocks and the initial weights, so that a run at the paper's sizes trains the paper's model. The modern
decoder for small budgets is `gpt.py`.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fivestep.models.cache import LayerCache, Memory, attend, remember
from fivestep.models.contract import (
    require_divisible,
    require_dropout,
    require_positive,
    require_within_block,
)

INIT_STD = 0.02


class GPT2(nn.Module):
    """A decoder-only Transformer of `n_layer` pre-norm blocks, `n_embd` wide, over `block_size` positions.

    The defaults are the paper's smallest size: 124,439,808 parameters. In general:
    `n_layer * (12 * n_embd**2 + 13 * n_embd) + (vocab_size + block_size + 2) * n_embd`, and `vocab_size * n_embd`
    more unless `tied`. The first loss is ln(vocab_size) within a few percent. Dropout falls on the embeddings, the
    attention weights and what each block adds. Raises `UsageError` for bad sizes.
    """

    def __init__(
        self,
        vocab_size: int = 50_257,
        block_size: int = 1024,
        n_layer: int = 12,
        n_head: int = 12,
        n_embd: int = 768,
        dropout: float = 0.1,
        tied: bool = True,
    ) -> None:
        super().__init__()
        require_positive(vocab_size=vocab_size, block_size=block_size)
        require_positive(n_layer=n_layer, n_head=n_head, n_embd=n_embd)
        require_dropout(dropout)
        require_divisible(n_embd, n_head)
        self.block_size = block_size
        self.token_embedding_table = nn.Embedding(vocab_size, n_embd)
        self.position_embedding_table = nn.Embedding(block_size, n_embd)
        self.dropout = nn.Dropout(dropout)
        self.blocks = nn.ModuleList(Block(n_embd, n_head, dropout) for _ in range(n_layer))
        self.norm = nn.LayerNorm(n_embd)
        self.lm_head = nn.Linear(n_embd, vocab_size, bias=False)
        if tied:
            self.lm_head.weight = self.token_embedding_table.weight
        self._init_weights()

    def _init_weights(self) -> None:
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.normal_(module.weight, std=INIT_STD)
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)
        # The residual stream sums 2 * n_layer of these: scaled so, its variance does not grow with depth.
        for module in self.modules():
            if isinstance(module, Attention | MLP):
                nn.init.normal_(module.output.weight, std=INIT_STD / math.sqrt(2 * len(self.blocks)))

    def forward(self, xb: Tensor) -> Tensor:
        """Ids `[batch, time]` to logits `[batch, time, vocab_size]`.

        Raises `UsageError` where time exceeds `block_size`.
        """
        require_within_block(xb.shape[1], self.block_size)
        logits: Tensor = self.lm_head(self.norm(self._blocks(xb)))
        return logits

    def _blocks(self, xb: Tensor, layers: list[LayerCache] | None = None) -> Tensor:
        """The residual stream `[batch, time, n_embd]` after the last block; positions go on where `layers` end."""
        start = layers[0].time if layers else 0
        positions = self.position_embedding_table.weight[start : start + xb.shape[1]]  # [time, n_embd]
        x: Tensor = self.dropout(self.token_embedding_table(xb) + positions)  # [batch, time, n_embd]
        for depth, block in enumerate(self.blocks):
            x = block(x, layers[depth] if layers else None)
        return x

    @torch.no_grad()
    def predict_next(self, ids: Tensor, memory: Memory | None = None) -> tuple[Tensor, Memory]:
        """Logits `[batch, vocab_size]` after `ids` `[batch, time]`, without gradients; see `LanguageModel`."""
        memory, unseen = remember(memory, ids, self.block_size, len(self.blocks))
        last = self._blocks(unseen, memory.layers)[:, -1]  # [batch, n_embd]
        return self.lm_head(self.norm(last)), memory


class Block(nn.Module):
    """Attention, then the MLP, each added to the residual stream from a normalised copy of it."""

    def __init__(self, n_embd: int, n_head: int, dropout: float) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(n_embd)
        self.attention = Attention(n_embd, n_head, dropout)
        self.mlp_norm = nn.LayerNorm(n_embd)
        self.mlp = MLP(n_embd)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, cache: LayerCache | None = None) -> Tensor:
        """`[batch, time, n_embd]` to the same."""
        x = x + self.dropout(self.attention(self.attention_norm(x), cache))
        x = x + self.dropout(self.mlp(self.mlp_norm(x)))
        return x


class Attention(nn.Module):
    """Causal self-attention; queries, keys and values come from one matrix, as in the published code."""

    def __init__(self, n_embd: int, n_head: int, dropout: float) -> None:
        super().__init__()
        self.n_head = n_head
        self.dropout_p = dropout
        self.qkv = nn.Linear(n_embd, 3 * n_embd)
        self.output = nn.Linear(n_embd, n_embd)

    def forward(self, x: Tensor, cache: LayerCache | None = None) -> Tensor:
        """`[batch, time, n_embd]` to the same; positions in the `cache` are looked back on."""
        # [batch, time, 3 * n_embd] -> three of [batch, n_head, time, head_size]
        q, k, v = self.qkv(x).unflatten(2, (3, self.n_head, -1)).permute(2, 0, 3, 1, 4)
        if cache is not None:
            k, v = cache.extend(k, v)
        mixed = attend(q, k, v, self.dropout_p if self.training else 0.0)
        output: Tensor = self.output(mixed.transpose(1, 2).flatten(2))
        return output


class MLP(nn.Module):
    """Two layers, four times as wide between, with GELU in its tanh form (Hendrycks and Gimpel 2016)."""

    def __init__(self, n_embd: int) -> None:
        super().__init__()
        self.input = nn.Linear(n_embd, 4 * n_embd)
        self.output = nn.Linear(4 * n_embd, n_embd)

    def forward(self, x: Tensor) -> Tensor:
        """`[..., n_embd]` to the same."""
        output: Tensor = self.output(F.gelu(self.input(x), approximate="tanh"))
        return output
