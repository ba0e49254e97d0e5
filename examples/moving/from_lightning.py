"""A LightningModule and its Trainer, and the same with fivestep: the module's methods become your own objects.

Both train a classifier on rows with shuffling, clipping and a validation each epoch, and end with the same weights,
bit for bit. Needs `lightning`.
"""

import logging
import warnings

import lightning
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import fivestep as fs

logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
warnings.filterwarnings("ignore", module="lightning")

epochs, learning_rate, clip = 5, 1e-2, 0.5
rows = torch.randn(1000, 10, generator=torch.Generator().manual_seed(0))
labels = (rows[:, 0] * rows[:, 1] > 0).long()  # whether two features have the same sign
train_set, val_set = TensorDataset(rows[:800], labels[:800]), TensorDataset(rows[800:], labels[800:])


def start():
    """The same weights and the same order of the rows for both; 800 rows in batches of 64: the last one is short."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(10, 64), nn.ReLU(), nn.Linear(64, 2))
    order = torch.Generator().manual_seed(7)
    return model, DataLoader(train_set, batch_size=64, shuffle=True, generator=order), DataLoader(val_set, 64)


# --- with Lightning ---
class Classifier(lightning.LightningModule):
    def __init__(self, model):
        super().__init__()
        self.model, self.criterion = model, nn.CrossEntropyLoss()

    def training_step(self, batch, batch_idx):
        features, labels = batch
        return self.criterion(self.model(features), labels)

    def validation_step(self, batch, batch_idx):
        features, labels = batch
        outputs = self.model(features)
        self.log("val_loss", self.criterion(outputs, labels))
        self.log("val_accuracy", (outputs.argmax(dim=1) == labels).float().mean())

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=learning_rate)


theirs, train_loader, val_loader = start()
trainer = lightning.Trainer(
    max_epochs=epochs,
    gradient_clip_val=clip,
    accelerator="cpu",
    logger=False,
    enable_checkpointing=False,
    enable_progress_bar=False,
    enable_model_summary=False,
)
trainer.fit(Classifier(theirs), train_loader, val_loader)
their_figures = {name: value.item() for name, value in trainer.callback_metrics.items()}
print(f"Lightning: loss {their_figures['val_loss']:.6f}, accuracy {their_figures['val_accuracy']:.4f}")

# --- the same with fivestep ---
ours, train_loader, val_loader = start()
optimizer = torch.optim.AdamW(ours.parameters(), lr=learning_rate)
history = fs.fit(
    ours,
    train_loader,
    nn.CrossEntropyLoss(),
    optimizer,
    epochs=epochs,
    val=val_loader,
    metrics={"accuracy": fs.accuracy},
    clip_norm=clip,
    progress=False,
)
our_figures = history[-1]
print(f"fivestep:  loss {our_figures['loss']:.6f}, accuracy {our_figures['accuracy']:.4f}")

same = all(torch.equal(a, b) for a, b in zip(theirs.parameters(), ours.parameters(), strict=True))
print("weights: the same, bit for bit" if same else "weights: they differ")
assert same
assert abs(their_figures["val_loss"] - our_figures["loss"]) < 1e-6  # one sum, in two orders
assert abs(their_figures["val_accuracy"] - our_figures["accuracy"]) < 1e-6
