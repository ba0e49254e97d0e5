"""Handwritten digits in ten lines: cross-entropy, accuracy, a test at the end. Needs scikit-learn."""

from functools import partial

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import fivestep as fs
from fivestep.data.examples import digits

splits = {split: TensorDataset(*rows) for split, rows in digits().items()}
loader = DataLoader(splits["train"], batch_size=32, shuffle=True)
model = nn.Sequential(nn.Linear(64, 512), nn.ReLU(), nn.Dropout(0.2), nn.Linear(512, 10))
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
val, test = (DataLoader(splits[split], batch_size=256) for split in ("val", "test"))
accuracy = {"accuracy": fs.accuracy}
cosine = partial(fs.warmup_cosine, max_iters=30 * len(loader))
fs.fit(model, loader, nn.CrossEntropyLoss(), optimizer, epochs=30, val=val, metrics=accuracy, scheduler=cosine)
print("test", fs.evaluate(model, test, nn.CrossEntropyLoss(), metrics=accuracy))
