"""An objective of one's own: batches of three parts, rows with weights, and a mean over the sum of the weights."""

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import fivestep as fs


class WeightedError:
    """Squared error where a row of weight 2 counts as two rows, and one of weight 0 not at all."""

    def count(self, batch):  # what the mean below is over; a step and an evaluation weigh their batches by it
        return batch[2].sum()

    def loss(self, model, batch, carry):  # carry: what one batch hands to the next; nothing here
        features, labels, weights = batch
        errors = (model(features) - labels).square().squeeze(1)
        return (weights * errors).sum() / weights.sum(), None

    def figures(self, mean_loss):  # optional: what else the mean says, beside it in every row
        return {"root_mean_squared_error": mean_loss**0.5}


torch.manual_seed(0)
x = torch.rand(1000, 1) * 2 - 1
y = 2 * x + 1 + 0.1 * torch.randn_like(x)
broken = torch.rand(1000) < 0.3
y[broken] = 5.0  # a sensor that was stuck, and we know when
for name, weights in (("all rows alike", torch.ones(1000)), ("stuck rows at weight 0", (~broken).float())):
    model = nn.Linear(1, 1)
    loader = DataLoader(TensorDataset(x, y, weights), batch_size=50, shuffle=True)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    history = fs.fit(model, loader, WeightedError(), optimizer, epochs=10, progress=False)
    line = f"{model.weight.item():.2f} x + {model.bias.item():.2f}"
    print(f"{name}: y = {line}, error {history[-1]['root_mean_squared_error']:.2f}")
