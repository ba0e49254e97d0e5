"""nanoGPT's CPU settings for characters, in a loop by hand: `python benchmarks/plain/gpt.py TEXT [ITERATIONS]`.

4 layers, 4 heads, 128 wide, context 64, batches of 12, LayerNorm, GELU, learned positions, tied output layer, no
biases, no dropout; AdamW at 1e-3 with betas 0.9 and 0.99, decay 0.1 on matrices, warm-up of 100 iterations, cosine to
1e-4, clipping at 1; 2,000 iterations. Neither validation nor logging takes time on the way. Prints, as JSON, the
seconds of all iterations, and the loss on the whole last tenth at their end, in windows of 64 that do not overlap.
"""

import json
import math
import sys
from pathlib import Path
from time import perf_counter

import torch
import torch.nn.functional as F
from torch import nn

max_iters, warmup_iters, learning_rate, min_lr = 2000, 100, 1e-3, 1e-4
batch_size, block_size, n_layer, n_head, n_embd = 12, 64, 4, 4, 128


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.ln_1, self.ln_2 = nn.LayerNorm(n_embd, bias=False), nn.LayerNorm(n_embd, bias=False)
        self.c_attn = nn.Linear(n_embd, 3 * n_embd, bias=False)
        self.c_proj = nn.Linear(n_embd, n_embd, bias=False)
        self.mlp_fc = nn.Linear(n_embd, 4 * n_embd, bias=False)
        self.mlp_proj = nn.Linear(4 * n_embd, n_embd, bias=False)

    def forward(self, x):
        batch, time, width = x.shape
        heads = [
            part.view(batch, time, n_head, -1).transpose(1, 2) for part in self.c_attn(self.ln_1(x)).split(width, 2)
        ]
        attended = F.scaled_dot_product_attention(*heads, is_causal=True)
        x = x + self.c_proj(attended.transpose(1, 2).reshape(batch, time, width))
        return x + self.mlp_proj(F.gelu(self.mlp_fc(self.ln_2(x))))


class GPT(nn.Module):
    def __init__(self, vocab_size):
        super().__init__()
        self.wte, self.wpe = nn.Embedding(vocab_size, n_embd), nn.Embedding(block_size, n_embd)
        self.blocks = nn.ModuleList(Block() for _ in range(n_layer))
        self.ln_f, self.lm_head = nn.LayerNorm(n_embd, bias=False), nn.Linear(n_embd, vocab_size, bias=False)
        self.wte.weight = self.lm_head.weight
        for name, parameter in self.named_parameters():
            if parameter.dim() == 2:
                residual = name.endswith(("c_proj.weight", "mlp_proj.weight"))
                nn.init.normal_(parameter, std=0.02 / math.sqrt(2 * n_layer) if residual else 0.02)

    def forward(self, xb):
        x = self.wte(xb) + self.wpe.weight[: xb.shape[1]]
        for block in self.blocks:
            x = block(x)
        return self.lm_head(self.ln_f(x))


def get_batch(tokens):
    starts = torch.randint(len(tokens) - block_size, (batch_size,)).tolist()
    xb = torch.stack([tokens[i : i + block_size] for i in starts])
    yb = torch.stack([tokens[i + 1 : i + 1 + block_size] for i in starts])
    return xb, yb


def get_lr(iteration, iterations):
    if iteration < warmup_iters:
        return learning_rate * (iteration + 1) / (warmup_iters + 1)
    done = (iteration - warmup_iters) / max(1, iterations - warmup_iters)
    return min_lr + 0.5 * (1 + math.cos(math.pi * done)) * (learning_rate - min_lr)


def loss_of(model, xb, yb, reduction="mean"):
    return F.cross_entropy(model(xb).flatten(0, 1), yb.flatten(), reduction=reduction)


@torch.no_grad()
def whole_loss(model, tokens, block_size=block_size, rows=256):
    """Mean nats over every target of `tokens`, in windows that do not overlap; the last one is shorter."""
    model.eval()
    windows = (len(tokens) - 1) // block_size
    inputs = tokens[: windows * block_size].view(windows, block_size)
    targets = tokens[1 : windows * block_size + 1].view(windows, block_size)
    pieces = list(zip(inputs.split(rows), targets.split(rows), strict=True))
    if rest := (len(tokens) - 1) % block_size:
        pieces.append((tokens[-rest - 1 : -1][None], tokens[-rest:][None]))
    total = sum(loss_of(model, xb, yb, "sum").item() for xb, yb in pieces)
    return total / (len(tokens) - 1)


def encoded(path):
    """The ids of the text's characters: the first 90 %, and the rest, for validation."""
    text = Path(path).read_text("utf-8")
    ids = {character: i for i, character in enumerate(sorted(set(text)))}
    tokens = torch.tensor([ids[character] for character in text])
    cut = int(0.9 * len(tokens))
    return tokens[:cut], tokens[cut:], len(ids)


def main(path, iterations):
    torch.manual_seed(1337)
    train, val, vocab_size = encoded(path)
    model = GPT(vocab_size)
    matrices = [p for p in model.parameters() if p.dim() >= 2]
    vectors = [p for p in model.parameters() if p.dim() < 2]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=learning_rate, betas=(0.9, 0.99))
    begun = perf_counter()
    for iteration in range(iterations):
        for group in optimizer.param_groups:
            group["lr"] = get_lr(iteration, iterations)
        loss = loss_of(model, *get_batch(train))
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    seconds = perf_counter() - begun
    print(json.dumps({"seconds": seconds, "val_loss": whole_loss(model, val)}))


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]) if len(sys.argv) > 2 else max_iters)
