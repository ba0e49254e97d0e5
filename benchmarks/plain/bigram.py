"""The bigram of seed 002 as a script written by hand: `python benchmarks/plain/bigram.py TEXT [ITERATIONS]`.

Characters, a table of token embeddings, 10,000 iterations of 32 random windows of 8, AdamW at 3e-4; no validation
on the way. Prints, as JSON, the seconds of a step after the first quarter, and the loss on the last tenth at the end.
"""

import json
import sys
from pathlib import Path
from time import perf_counter

import torch
import torch.nn.functional as F
from torch import nn

max_iters, learning_rate, batch_size, block_size = 10_000, 3e-4, 32, 8


class Bigram(nn.Module):
    def __init__(self, vocab_size):
        super().__init__()
        self.token_embedding_table = nn.Embedding(vocab_size, vocab_size)

    def forward(self, xb):
        return self.token_embedding_table(xb)


def get_batch(tokens):
    starts = torch.randint(len(tokens) - block_size, (batch_size,)).tolist()
    xb = torch.stack([tokens[i : i + block_size] for i in starts])
    yb = torch.stack([tokens[i + 1 : i + 1 + block_size] for i in starts])
    return xb, yb


def main(path, iterations):
    torch.manual_seed(1337)
    text = Path(path).read_text("utf-8")
    characters = sorted(set(text))
    ids = {character: i for i, character in enumerate(characters)}
    tokens = torch.tensor([ids[character] for character in text])
    train, val = tokens[: int(0.9 * len(tokens))], tokens[int(0.9 * len(tokens)) :]

    model = Bigram(len(characters))
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate)
    for iteration in range(iterations):
        if iteration == iterations // 4:
            begun = perf_counter()
        xb, yb = get_batch(train)
        logits = model(xb)
        batch, time, vocabulary = logits.shape
        loss = F.cross_entropy(logits.view(batch * time, vocabulary), yb.view(batch * time))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    seconds = (perf_counter() - begun) / (iterations - iterations // 4)

    with torch.no_grad():
        loss = F.cross_entropy(model(val[:-1]), val[1:])
    print(json.dumps({"seconds_per_step": seconds, "val_loss": loss.item()}))


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]) if len(sys.argv) > 2 else max_iters)
