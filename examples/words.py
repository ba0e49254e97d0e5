"""Truncated BPTT with a model of your own: contiguous segments, the hidden state carried from one to the next."""

import torch
from torch import nn

import fivestep as fs
from fivestep.data.corpus import load_corpus
from fivestep.data.segments import CoveringSegments, Segments
from fivestep.data.tokenizer import build_tokenizer


class WordGRU(nn.Module):
    """Anything that returns (output, hidden) and takes the hidden state back is carried."""

    def __init__(self, ntokens: int, width: int = 64):
        super().__init__()
        self.embedding = nn.Embedding(ntokens, width)
        self.rnn = nn.GRU(width, width)
        self.decoder = nn.Linear(width, ntokens)

    def forward(self, data, hidden=None):  # data [seq_len, batch_size]
        states, hidden = self.rnn(self.embedding(data), hidden)
        return self.decoder(states), hidden  # output [seq_len, batch_size, ntokens]


corpus = load_corpus("python-manual")  # or a file, or a directory
tokenizer = build_tokenizer("words", corpus.splits["train"], min_count=5)
train = Segments(tokenizer.encode(corpus.splits["train"]), batch_size=20, bptt=35)
val = CoveringSegments(tokenizer.encode(corpus.splits["val"]), batch_size=10, bptt=35)

model = WordGRU(tokenizer.vocab_size)
optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
history = fs.fit(model, train, fs.TruncatedBPTT(), optimizer, epochs=2, val=val, clip_norm=1.0)
print(f"validation perplexity {history[-1]['perplexity']:.1f}, over {history[-1]['count']:,.0f} words")
