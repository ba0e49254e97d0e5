"""Row 9: SIGTERM is heard in every phase, the state is saved, and the exit tells."""

import os
import signal
import threading
import time

import pytest
import torch
from torch import nn

import fivestep as fs
from fivestep.run.difference import difference
from fivestep.run.metrics import read_rows

PHASES = ("forward", "data", "validation", "save", "watcher")


class Striking:
    """Sends SIGTERM the first time that a phase of a step is reached."""

    def __init__(self, phase):
        self.phase = phase

    def __call__(self, phase):
        if phase == self.phase:
            self.phase = None
            signal.raise_signal(signal.SIGTERM)


def trained(path, strike):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Dropout(0.5), nn.Linear(4, 1))
    model.register_forward_pre_hook(lambda *_: strike("forward" if model.training else "validation"))

    class Data:
        def __len__(self):
            return 6

        def epoch(self, epoch, start=0):
            for position in range(start, 6):
                if position == 3:
                    strike("data")
                rows = torch.randn(4, 4, generator=torch.Generator().manual_seed(100 * epoch + position))
                yield rows[:, :3], rows[:, 3:]

    def watcher(result, rows):
        if result.step == 4:
            strike("watcher")

    run = fs.Run(path, checkpoint_every=2, say=lambda text: None)
    save = run.saver.save
    run.saver.save = lambda *what: (save(*what), strike("save"))
    with run:
        return fs.fit(
            model,
            Data(),
            nn.MSELoss(),
            torch.optim.AdamW(model.parameters(), lr=0.01),
            epochs=2,
            val=[(torch.ones(4, 3), torch.ones(4, 1))] * 2,
            progress=False,
            watchers=[watcher],
            run=run,
        )


@pytest.mark.parametrize("phase", PHASES)
def test_terminated_in_each_phase(tmp_path, phase):
    history = trained(tmp_path / "whole", Striking(None))
    with pytest.raises(SystemExit) as ended:
        trained(tmp_path / "cut", Striking(phase))
    assert ended.value.code == 143
    assert read_rows(tmp_path / "cut" / "metrics.jsonl")[-1]["event"] == "interrupted"
    again = trained(tmp_path / "cut", Striking(None))
    assert [row["loss"] for row in again] == [row["loss"] for row in history]
    assert difference(tmp_path / "whole", tmp_path / "cut") is None


def test_a_wait_for_data_is_left_at_once(tmp_path):
    class Stuck:
        def __len__(self):
            return 9

        def epoch(self, epoch, start=0):
            for position in range(start, 9):
                if position == 2:
                    timer.start()
                    time.sleep(600)
                yield torch.ones(2, 3), torch.ones(2, 1)

    model = nn.Linear(3, 1)
    begun = time.monotonic()
    timer = threading.Timer(0.3, os.kill, [os.getpid(), signal.SIGTERM])
    with pytest.raises(SystemExit) as ended, fs.Run(tmp_path / "mine", say=lambda text: None) as run:
        for _ in fs.train(model, Stuck(), nn.MSELoss(), torch.optim.SGD(model.parameters(), lr=0.1), run=run):
            pass
    assert ended.value.code == 143
    assert time.monotonic() - begun < 300
    assert fs.load_weights(run.path, nn.Linear(3, 1), "last") == 2
