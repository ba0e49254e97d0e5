"""Your own `for` is the loop: a bigram on characters, with the body between two steps in your hands."""

import torch

import fivestep as fs
from fivestep.data.corpus import load_corpus
from fivestep.data.tokenizer import build_tokenizer
from fivestep.data.windows import CoveringWindows, Windows
from fivestep.models.bigram import Bigram

max_iters, learning_rate = 10_000, 3e-4

corpus = load_corpus("python-manual")
tokenizer = build_tokenizer("chars", corpus.splits["train"], other_texts=[corpus.splits["val"]])
train = Windows(tokenizer.encode(corpus.splits["train"]), block_size=8, batch_size=32, replacement=True)
val = CoveringWindows(tokenizer.encode(corpus.splits["val"]), block_size=8, batch_size=512)

model = Bigram(tokenizer.vocab_size)
optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate)

for info in fs.train(model, train, fs.NextToken(), optimizer, max_iters=max_iters):
    if info.step % 2500 == 0:
        looked = fs.evaluate(model, val, fs.NextToken())
        print(f"step {info.step:,}: loss {info.loss.item():.4f}, validation {looked['loss']:.4f}")

print(model.token_embedding_table.weight.grad)  # of the last step: gradients stay readable
