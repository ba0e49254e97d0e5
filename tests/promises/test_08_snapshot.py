"""Row 8: a save holds one step, however slow the disk is and whatever training does meanwhile."""

import os
import threading

import torch
from torch import nn

import fivestep as fs
from fivestep.run.checkpoint import load_state, read_manifest


def test_a_slow_disk_gets_the_snapshot(tmp_path, monkeypatch):
    """The writer is held until training is four steps further; the file holds the step that it is named by."""
    go = threading.Event()
    write = os.write

    def slow(descriptor, content):
        if threading.current_thread().name == "fivestep-save":
            assert go.wait(60)
        return write(descriptor, content)

    monkeypatch.setattr(os, "write", slow)
    model = nn.Linear(3, 1)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
    data = [(torch.randn(4, 3), torch.randn(4, 1)) for _ in range(9)]
    kept = {}
    with fs.Run(tmp_path / "mine", checkpoint_every=4, keep_last=9, say=lambda text: None) as run:
        for info in fs.train(model, data, nn.MSELoss(), optimizer, epochs=1, run=run):
            kept[info.step] = info.state.state_dict()
            if info.step == 8:
                assert not list(run.checkpoints.glob("step-*")), "nothing is there before it is whole"
                go.set()
    saved = [load_state(read_manifest(path)) for path in sorted(run.checkpoints.iterdir())]
    assert [state["clock"]["step"] for state in saved] == [4, 8, 9]
    for state in saved:
        was = kept[state["clock"]["step"]]
        for name, value in was["model"].items():
            assert torch.equal(state["model"][name], value)
        moments = [optimizer["optimizers"][0]["state"][0]["exp_avg"] for optimizer in (state, was)]
        assert torch.equal(*moments)
        assert torch.equal(state["random"]["torch"], was["random"]["torch"])


def test_never_more_than_one_deep(tmp_path, monkeypatch):
    """The next save waits for the last: two are never written at once."""
    from fivestep.run import saving

    inside, most = [], []
    save = saving.save_checkpoint

    def counting(*arguments):
        inside.append(1)
        most.append(len(inside))
        try:
            return save(*arguments)
        finally:
            inside.pop()

    monkeypatch.setattr(saving, "save_checkpoint", counting)
    model = nn.Linear(3, 1)
    data = [(torch.randn(4, 3), torch.randn(4, 1)) for _ in range(9)]
    with fs.Run(tmp_path / "mine", checkpoint_every=1, say=lambda text: None) as run:
        for _ in fs.train(model, data, nn.MSELoss(), torch.optim.SGD(model.parameters(), lr=0.1), epochs=1, run=run):
            pass
    assert set(most) == {1}
