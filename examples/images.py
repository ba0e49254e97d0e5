"""An image classifier: a convnet on scikit-learn's digits, with augmentation in the dataset of a torch DataLoader."""

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, Dataset, random_split

import fivestep as fs


class Digits(Dataset):
    """Images [1, 8, 8] in [0, 1] with their classes; `shifted` moves each one by up to a pixel, anew every time."""

    def __init__(self, images, labels, shifted=False):
        self.images, self.labels, self.shifted = images, labels, shifted

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, index):
        image = self.images[index]
        if self.shifted:
            down, right = torch.randint(3, (2,)).tolist()
            image = nn.functional.pad(image, (1, 1, 1, 1))[:, down : down + 8, right : right + 8]
        return image, self.labels[index]


torch.manual_seed(0)
source = load_digits()
images = torch.tensor(source.images, dtype=torch.float32).unsqueeze(1) / 16
labels = torch.tensor(source.target)
train, val = (torch.tensor(list(part)) for part in random_split(range(len(labels)), [0.8, 0.2]))
train_loader = DataLoader(Digits(images[train], labels[train], shifted=True), batch_size=64, shuffle=True)
val_loader = DataLoader(Digits(images[val], labels[val]), batch_size=360)

model = nn.Sequential(
    *(nn.Conv2d(1, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.MaxPool2d(2)),  # [16, 4, 4]
    *(nn.Conv2d(16, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(), nn.MaxPool2d(2)),  # [32, 2, 2]
    *(nn.Flatten(), nn.Linear(128, 10)),
)
optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
metrics = {"accuracy": fs.accuracy}
history = fs.fit(model, train_loader, nn.CrossEntropyLoss(), optimizer, epochs=8, val=val_loader, metrics=metrics)
print(f"validation accuracy {history[-1]['accuracy']:.1%} on {history[-1]['count']:.0f} images")
