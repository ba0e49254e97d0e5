"""word_language_model's kind of loop, and the same with fivestep: contiguous segments, the hidden state carried.

Both train an LSTM on words by hand-written SGD with a clipped norm, cut the rate by 4 where validation gets no
better, and end with the same weights, bit for bit.
"""

import math

import torch
from torch import nn

import fivestep as fs
from fivestep.data.corpus import load_corpus
from fivestep.data.segments import CoveringSegments, Segments
from fivestep.data.tokenizer import build_tokenizer

epochs, batch_size, eval_batch_size, bptt, clip, first_lr = 4, 20, 10, 35, 0.25, 40.0

text = load_corpus("python-manual").splits["train"]
tokenizer = build_tokenizer("words", text[:60_000], min_count=2)
train_ids, val_ids = (tokenizer.encode(part) for part in (text[:60_000], text[60_000:75_000]))


class RNNModel(nn.Module):
    def __init__(self, ntokens, width=32):
        super().__init__()
        self.width = width
        self.encoder, self.decoder = nn.Embedding(ntokens, width), nn.Linear(width, ntokens)
        self.rnn = nn.LSTM(width, width)

    def init_hidden(self, columns):
        return torch.zeros(1, columns, self.width), torch.zeros(1, columns, self.width)

    def forward(self, data, hidden):
        output, hidden = self.rnn(self.encoder(data), hidden)
        return self.decoder(output), hidden  # [seq_len, batch_size, ntokens]


def start():
    torch.manual_seed(1111)
    return RNNModel(tokenizer.vocab_size)


def batchify(ids, columns):
    rows = len(ids) // columns
    return torch.from_numpy(ids.astype("int64"))[: rows * columns].view(columns, rows).t().contiguous()


def segments(source):
    for i in range(0, len(source) - 1, bptt):
        seq_len = min(bptt, len(source) - 1 - i)
        yield source[i : i + seq_len], source[i + 1 : i + 1 + seq_len].reshape(-1)


def evaluate_plainly(model, source):
    model.eval()
    total, hidden = 0.0, model.init_hidden(eval_batch_size)
    with torch.no_grad():
        for data, targets in segments(source):
            output, hidden = model(data, hidden)
            total += len(data) * criterion(output.flatten(0, 1), targets).item()
    return total / (len(source) - 1)


# --- the plain loop ---
plain, criterion, lr, best = start(), nn.CrossEntropyLoss(), first_lr, math.inf
for epoch in range(1, epochs + 1):
    plain.train()
    hidden = plain.init_hidden(batch_size)
    for data, targets in segments(batchify(train_ids, batch_size)):
        plain.zero_grad()
        hidden = tuple(state.detach() for state in hidden)
        output, hidden = plain(data, hidden)
        criterion(output.flatten(0, 1), targets).backward()
        nn.utils.clip_grad_norm_(plain.parameters(), clip)
        with torch.no_grad():
            for parameter in plain.parameters():
                parameter.add_(parameter.grad, alpha=-lr)
    val_loss = evaluate_plainly(plain, batchify(val_ids, eval_batch_size))
    print(f"plain loop: epoch {epoch}, lr {lr:5.2f}, validation {val_loss:.4f}")
    if val_loss < best:
        best = val_loss
    else:
        lr /= 4.0

# --- the same with fivestep ---
ours = start()
optimizer = torch.optim.SGD(ours.parameters(), lr=first_lr)
train, val = Segments(train_ids, batch_size, bptt), CoveringSegments(val_ids, eval_batch_size, bptt)
options = {"clip_norm": clip, "anneal": 4, "progress": False}
history = fs.fit(ours, train, fs.TruncatedBPTT(), optimizer, epochs=epochs, val=val, **options)
for row in history:
    if row["split"] == "train":
        rate = row["lr"]
    else:
        print(f"fivestep:   epoch {row['epoch']}, lr {rate:5.2f}, validation {row['loss']:.4f}")
figures = history[-1]

scored = (len(val_ids) // eval_batch_size - 1) * eval_batch_size
print(
    f"validation targets scored: {scored} by the plain loop, {figures['count']:.0f} of {len(val_ids) - 1} by fivestep"
)
same = all(torch.equal(a, b) for a, b in zip(plain.parameters(), ours.parameters(), strict=True))
print("weights: the same, bit for bit" if same else "weights: they differ")
assert same
