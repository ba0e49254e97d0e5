"""Row 1: a resume within an epoch repeats, skips and reorders nothing, and loses no random state."""

from itertools import chain

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset

import fivestep as fs
from fivestep.run.difference import difference


class Noted(Dataset):
    """Twenty rows, with random augmentation; notes which are read."""

    def __init__(self):
        self.read = []

    def __len__(self):
        return 20

    def __getitem__(self, index):
        self.read.append(index)
        return torch.tensor([float(index)]), torch.tensor([float(index)]) + torch.rand(1)


class Ids(fs.Supervised):
    """Notes the ids of every batch that is learned from."""

    def __init__(self):
        super().__init__(nn.MSELoss())
        self.seen = []

    def loss(self, model, batch, carry=None):
        self.seen.append(batch[0][:, 0].int().tolist())
        return super().loss(model, batch, carry)


def trained(path, stop=None, workers=0):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(1, 8), nn.Dropout(0.3), nn.Linear(8, 1))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    ids, data = Ids(), Noted()
    loader = DataLoader(data, batch_size=3, shuffle=True, num_workers=workers)
    losses = []
    with fs.Run(path, say=lambda text: None) as run:
        for info in fs.train(model, loader, ids, optimizer, epochs=2, run=run):
            losses.append(float(info.loss))
            if info.step == stop:
                break
    return ids.seen, losses, data.read


def test_stopped_after_every_step(tmp_path):
    ids, losses, _ = trained(tmp_path / "whole")
    assert sorted(chain(*ids[:7])) == sorted(chain(*ids[7:])) == list(range(20))
    for stop in range(1, 14):
        path = tmp_path / str(stop)
        first, second = trained(path, stop), trained(path)
        assert first[0] + second[0] == ids
        assert first[1] + second[1] == losses
        assert difference(tmp_path / "whole", path) is None
        assert second[2] == list(chain(*second[0])), "nothing is read twice, or again"


@pytest.mark.multiprocess
def test_the_number_of_workers_changes_nothing(tmp_path):
    whole = trained(tmp_path / "whole")
    for workers, then in ((2, 0), (0, 2), (1, 3)):
        path = tmp_path / f"{workers}-{then}"
        first, second = trained(path, 5, workers), trained(path, None, then)
        assert (first[0] + second[0], first[1] + second[1]) == whole[:2]
