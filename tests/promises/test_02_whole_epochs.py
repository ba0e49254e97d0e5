"""Row 2: after a resume no later epoch is cut short."""

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import fivestep as fs
from fivestep.data.windows import Windows
from fivestep.models.bigram import Bigram


class Seen(fs.Supervised):
    def __init__(self):
        super().__init__(nn.MSELoss())
        self.ids = []

    def loss(self, model, batch, carry=None):
        self.ids += batch[0][:, 0].int().tolist()
        return super().loss(model, batch, carry)


@pytest.mark.parametrize("stop", [9, 10, 19, 20], ids=["90 %", "the edge", "90 % of the next", "its edge"])
def test_each_id_once_in_the_epochs_after(tmp_path, stop):
    def trained(stop=None):
        torch.manual_seed(0)
        model, ids = nn.Linear(1, 1), Seen()
        rows = torch.arange(20.0)[:, None]
        loader = DataLoader(TensorDataset(rows, rows), batch_size=2, shuffle=True)
        with fs.Run(tmp_path / "mine", say=lambda text: None) as run:
            optimizer = torch.optim.SGD(model.parameters(), lr=1e-5)
            for info in fs.train(model, loader, ids, optimizer, epochs=4, run=run):
                if info.step == stop:
                    break
        return ids.ids

    before, after = trained(stop), trained()
    for epoch in range(4):
        assert sorted((before + after)[20 * epoch : 20 * epoch + 20]) == list(range(20))


@pytest.mark.parametrize("share", [0.9, 1.0])
def test_each_window_once_in_the_epochs_after(tmp_path, share):
    text = np.random.default_rng(0).integers(0, 7, 410)

    class Offsets(Windows):
        seen: list

        def epoch(self, epoch, start=0):
            for position, batch in enumerate(super().epoch(epoch, start), start):
                self.seen += [(epoch, int(offset)) for offset in self.offsets(epoch, position)]
                yield batch

    def trained(stop=None):
        torch.manual_seed(0)
        model, windows = Bigram(7), Offsets(text, 8, 5, seed=1)
        windows.seen = []
        with fs.Run(tmp_path / "mine", say=lambda text: None) as run:
            optimizer = torch.optim.SGD(model.parameters(), lr=1e-5)
            for info in fs.train(model, windows, fs.NextToken(), optimizer, epochs=3, run=run):
                if info.step == stop:
                    break
        return windows.seen, len(windows), windows.windows

    per_epoch = len(Windows(text, 8, 5))
    before, after = trained(int(per_epoch * share)), trained()
    seen = before[0] + after[0]
    for epoch in range(3):
        offsets = [offset for of, offset in seen if of == epoch]
        assert len(offsets) == len(set(offsets)) == before[2]
