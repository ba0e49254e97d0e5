"""Handwritten digits in ten lines: cross-entropy, accuracy, a test at the end. Needs scikit-learn."""

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import fivestep as fs
from fivestep.data.examples import digits

splits = {split: TensorDataset(*rows) for split, rows in digits().items()}
loader = DataLoader(splits["train"], batch_size=32, shuffle=True)
model = nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Dropout(0.2), nn.Linear(256, 10))
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
val, test = (DataLoader(splits[split], batch_size=256) for split in ("val", "test"))
accuracy = {"accuracy": fs.accuracy}
fs.fit(model, loader, nn.CrossEntropyLoss(), optimizer, epochs=30, val=val, metrics=accuracy)
print("test", fs.evaluate(model, test, nn.CrossEntropyLoss(), metrics=accuracy))
