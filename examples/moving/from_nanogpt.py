"""nanoGPT's kind of loop, and the same with fivestep: your model, `get_batch` and learning rate stay as they are.

Both train a small causal Transformer on characters with accumulation, a warm-up and cosine schedule, clipping and
decay groups, and end with the same weights, bit for bit.
"""

import math

import torch
from torch import nn

import fivestep as fs
from fivestep.data.corpus import load_corpus
from fivestep.data.tokenizer import build_tokenizer

max_iters, accumulation, batch_size, block_size = 20, 4, 8, 32
learning_rate, min_lr, warmup_iters, grad_clip = 1e-3, 1e-4, 5, 1.0

text = load_corpus("python-manual").splits["train"][:100_000]
tokenizer = build_tokenizer("chars", text)
ids = torch.from_numpy(tokenizer.encode(text).astype("int64"))


class GPT(nn.Module):
    """What matters here is the interface: `model(idx, targets)` gives `(logits, loss)`."""

    def __init__(self, vocab_size, width=32):
        super().__init__()
        self.tokens, self.places = nn.Embedding(vocab_size, width), nn.Embedding(block_size, width)
        self.block = nn.TransformerEncoderLayer(width, 2, 4 * width, 0.0, "gelu", batch_first=True, norm_first=True)
        self.head = nn.Linear(width, vocab_size, bias=False)

    def forward(self, idx, targets=None):
        time = idx.shape[1]
        hidden = self.tokens(idx) + self.places.weight[:time]
        mask = nn.Transformer.generate_square_subsequent_mask(time)
        logits = self.head(self.block(hidden, src_mask=mask, is_causal=True))
        return logits, None if targets is None else nn.functional.cross_entropy(
            logits.flatten(0, 1), targets.flatten()
        )


def get_batch():
    starts = torch.randint(len(ids) - block_size, (batch_size,)).tolist()
    xb, yb = (torch.stack([ids[i + shift : i + shift + block_size] for i in starts]) for shift in (0, 1))
    return xb, yb


def get_lr(it):
    if it < warmup_iters:
        return learning_rate * (it + 1) / (warmup_iters + 1)
    progress = (it - warmup_iters) / (max_iters - warmup_iters)
    return min_lr + 0.5 * (1 + math.cos(math.pi * progress)) * (learning_rate - min_lr)


def start(lr):
    """The same weights, random numbers and decay groups for both."""
    torch.manual_seed(1337)
    model = GPT(tokenizer.vocab_size)
    matrices = [p for p in model.parameters() if p.dim() >= 2]
    vectors = [p for p in model.parameters() if p.dim() < 2]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    return model, torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.99))


# --- the plain loop ---
plain, optimizer = start(learning_rate)
for it in range(max_iters):
    for group in optimizer.param_groups:
        group["lr"] = get_lr(it)
    for _ in range(accumulation):
        logits, loss = plain(*get_batch())
        (loss / accumulation).backward()
    nn.utils.clip_grad_norm_(plain.parameters(), grad_clip)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


# --- the same with fivestep ---
class ModelsOwnLoss:
    """The model computes its own mean loss; `count` says over how many targets, so that batches weigh right."""

    def count(self, batch):
        return batch[1].numel()

    def loss(self, model, batch, carry):
        return model(*batch)[1], None


def batches():
    while True:
        yield get_batch()


ours, optimizer = start(1.0)  # get_lr gives the rate itself, so the factor's base is 1
arguments = {"accumulate": accumulation, "scheduler": get_lr, "clip_norm": grad_clip}
for info in fs.train(ours, batches(), ModelsOwnLoss(), optimizer, max_iters=max_iters, **arguments):
    if info.step % 5 == 0:
        print(f"step {info.step}: loss {info.loss.item():.4f}, lr {info.learning_rate:.2e}")

with torch.no_grad():
    held_out = get_batch()
    print(f"plain loop: {plain(*held_out)[1].item():.6f}")
    print(f"fivestep:   {ours(*held_out)[1].item():.6f}")
same = all(torch.equal(a, b) for a, b in zip(plain.parameters(), ours.parameters(), strict=True))
print("weights: the same, bit for bit" if same else "weights: they differ")
assert same
