"""The key-value cache of the decoders: what attention has computed once is not computed again.

    prompt [batch, time] -> keys, values of every layer -> one more column for each new token

Owns the storage, its life when the block is full, and attention from new queries to all keys so far. Knows no
model: a decoder passes one `LayerCache` to each of its blocks.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from fivestep.models.contract import append_recent


class LayerCache:
    """One layer's keys and values, `[batch, n_head, time, head_size]` each, in storage of `block_size` columns.

    Written in place: beside concatenation that saves a copy of all of it for every token (measured: a fifth of
    attention's time at GPT-2's smallest size, nothing at four layers of 128).
    """

    def __init__(self, block_size: int) -> None:
        self.block_size = block_size
        self.time = 0
        self.keys = self.values = torch.empty(0)

    def extend(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """All keys and values so far, these new ones last."""
        if self.time == 0:
            batch, n_head, _, head_size = keys.shape
            self.keys = keys.new_empty(batch, n_head, self.block_size, head_size)
            self.values = torch.empty_like(self.keys)
        start, self.time = self.time, self.time + keys.shape[2]
        self.keys[:, :, start : self.time] = keys
        self.values[:, :, start : self.time] = values
        return self.keys[:, :, : self.time], self.values[:, :, : self.time]


@dataclass(frozen=True)
class Memory:
    """What a decoder remembers between two calls of `predict_next`."""

    ids: Tensor  # [batch, time], at most block_size columns
    layers: list[LayerCache]  # their keys and values

    @property
    def time(self) -> int:
        return self.ids.shape[1]


def remember(memory: Memory | None, ids: Tensor, block_size: int, n_layer: int) -> tuple[Memory, Tensor]:
    """The memory with `ids` `[batch, time]` in it, and those of its ids whose keys are not cached yet.

    Where `append_recent` drops old ids the positions of the others change, and with them every key: the cache
    starts anew from what remains.
    """
    recent = append_recent(None if memory is None else memory.ids, ids, block_size)
    if memory is None or recent.shape[1] < memory.time + ids.shape[1]:
        return Memory(recent, [LayerCache(block_size) for _ in range(n_layer)]), recent
    return Memory(recent, memory.layers), ids


SHORT = 512  # positions up to which a CPU attends faster by products in bfloat16


def attend(q: Tensor, k: Tensor, v: Tensor, dropout_p: float) -> Tensor:
    """Causal attention `[batch, n_head, new, head_size]` of the last `new` positions to all `time` of them.

    `q` is `[batch, n_head, new, head_size]`, `k` and `v` are `[batch, n_head, time, head_size]`.
    """
    new, time = q.shape[2], k.shape[2]
    if q.dtype == torch.bfloat16 and q.device.type == "cpu" and time <= SHORT:
        return attend_by_products(q, k, v, dropout_p)
    if new == time:
        return F.scaled_dot_product_attention(q, k, v, dropout_p=dropout_p, is_causal=True)
    # torch's own causal mask starts at the top left corner; the last query has to see the last key.
    mask = None if new == 1 else torch.ones(new, time, dtype=torch.bool, device=q.device).tril(time - new)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout_p)


def attend_by_products(q: Tensor, k: Tensor, v: Tensor, dropout_p: float) -> Tensor:
    """What `attend` gives, as two products with a softmax between, which holds all scores in memory.

    torch's fused attention is slow in bfloat16 on a CPU, backward above all: 6 times these at 64 positions, 1.5
    times at 512, 0.8 times at 1,024 (batch 32 to 2, 4 heads of 32; an AMD EPYC with AVX512-BF16, torch 2.13).
    """
    new, time = q.shape[2], k.shape[2]
    later = torch.full((new, time), -torch.inf, dtype=q.dtype, device=q.device).triu(time - new + 1)
    keys = k.flatten(0, 1).transpose(1, 2)  # [batch * n_head, head_size, time]
    scores = torch.baddbmm(later, q.flatten(0, 1), keys, alpha=q.shape[-1] ** -0.5)
    weights = F.dropout(scores.softmax(dim=-1, dtype=q.dtype), dropout_p)  # [batch * n_head, new, time]
    return torch.bmm(weights, v.flatten(0, 1)).view(q.shape)
