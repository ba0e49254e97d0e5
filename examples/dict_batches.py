"""Dict batches, and a model that returns an object with `.loss`: the interface of Hugging Face's models."""

from types import SimpleNamespace

import torch
from torch import nn
from torch.utils.data import DataLoader

import fivestep as fs


class SequenceTagger(nn.Module):
    """Says of each token whether it has occurred before; padding has the label -100."""

    def __init__(self, vocab_size=12, width=32):
        super().__init__()
        self.embedding = nn.Embedding(vocab_size, width)
        self.rnn = nn.GRU(width, width, batch_first=True)
        self.head = nn.Linear(width, 2)

    def forward(self, input_ids, labels=None):
        logits = self.head(self.rnn(self.embedding(input_ids))[0])
        loss = None if labels is None else nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())
        return SimpleNamespace(loss=loss, logits=logits)


class ModelsOwnLoss:
    """What the model's mean is over, and the mean: all that a step needs to know of a batch."""

    def count(self, batch):
        return (batch["labels"] != -100).sum()

    def loss(self, model, batch, carry):
        return model(**batch).loss, None


def example():
    ids = torch.randint(12, (int(torch.randint(4, 13, ())),))
    seen = torch.tensor([bool((ids[:i] == ids[i]).any()) for i in range(len(ids))])
    return {"input_ids": ids, "labels": seen.long()}


def padded(examples):
    pads = {"input_ids": 0, "labels": -100}
    pad = nn.utils.rnn.pad_sequence
    return {name: pad([one[name] for one in examples], batch_first=True, padding_value=pads[name]) for name in pads}


torch.manual_seed(0)
train = DataLoader([example() for _ in range(2000)], batch_size=32, shuffle=True, collate_fn=padded)
val = DataLoader([example() for _ in range(200)], batch_size=50, collate_fn=padded)
model = SequenceTagger()
fs.fit(model, train, ModelsOwnLoss(), torch.optim.AdamW(model.parameters(), lr=5e-3), epochs=6, val=val)
result = model.eval()(torch.tensor([[3, 5, 3, 3, 7, 5]])).logits.argmax(dim=-1)
print("3 5 3 3 7 5 ->", *("seen" if tag else "new" for tag in result[0]))
