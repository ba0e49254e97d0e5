"""Regression in ten lines: features and labels in a DataLoader, mean squared error, validation each epoch."""

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset, random_split

import fivestep as fs

x = torch.linspace(-1, 1, 1000).unsqueeze(1)
y = 2 * x + 1 + 0.1 * torch.randn_like(x)
train, val = random_split(TensorDataset(x, y), [0.8, 0.2])
model = nn.Sequential(nn.Linear(1, 64), nn.ReLU(), nn.Linear(64, 1))
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
train_loader = DataLoader(train, batch_size=32, shuffle=True)
val_loader = DataLoader(val, batch_size=200)
history = fs.fit(model, train_loader, nn.MSELoss(), optimizer, epochs=10, val=val_loader)
print(f"validation loss {history[-1]['loss']:.4f}; the noise alone is 0.01")
