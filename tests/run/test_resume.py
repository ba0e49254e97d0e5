"""A run goes on from any instant and ends, bit for bit, where the uninterrupted one ends."""

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from functools import partial

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import fivestep as fs
from fivestep.data.segments import Segments
from fivestep.data.windows import CoveringWindows, Windows
from fivestep.models.gpt import GPT
from fivestep.models.mlp import MLP
from fivestep.models.rnn import RNN
from fivestep.run import saving
from fivestep.run.difference import difference
from fivestep.run.metrics import read_rows
from fivestep.run.running import hold, release, running

TEXT = np.random.default_rng(0).integers(0, 11, 220).astype(np.uint16)


def rows_job():
    features = torch.randn(41, 3, generator=torch.Generator().manual_seed(1))
    loader = DataLoader(TensorDataset(features, features.sum(1, keepdim=True)), batch_size=6, shuffle=True)
    model = nn.Sequential(MLP([3, 8, 1]), nn.Dropout(0.1))
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    options = {"scheduler": torch.optim.lr_scheduler.StepLR(optimizer, 3, gamma=0.9), "accumulate": 3, "ema": 0.9}
    return (model, loader, nn.MSELoss(), optimizer), options, [(features[:7], features[:7].sum(1, keepdim=True))]


def windows_job():
    model = GPT(11, 8, n_layer=1, n_head=2, n_embd=8, dropout=0.2)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    options = {
        "scheduler": partial(fs.warmup_cosine, max_iters=20, warmup_iters=3),
        "clip_norm": 1.0,
        "accumulate": 2,
    }
    return (model, Windows(TEXT, 8, 4, seed=3), fs.NextToken(), optimizer), options, CoveringWindows(TEXT[:100], 8, 4)


def segments_job(cell):
    model = RNN(11, 6, 8, 2, dropout=0.2, cell=cell)
    optimizer = torch.optim.SGD(model.parameters(), lr=5.0)
    options = {"clip_norm": 0.25, "anneal": 4, "to_best": True, "early_stop": 3}
    val = Segments(TEXT[:90], 7, 3)
    return (model, Segments(TEXT, 7, 5), fs.TruncatedBPTT(), optimizer), options, val


JOBS = {
    "rows": rows_job,
    "windows": windows_job,
    "lstm": partial(segments_job, "lstm"),
    "gru": partial(segments_job, "gru"),
}


def job(name):
    torch.manual_seed(0)
    random.seed(0)
    np.random.seed(0)
    return JOBS[name]()


class Copied(fs.Run):
    """Copies its directory whenever a step is asked for, as a kill there would leave it."""

    def __init__(self, path, copies, **options):
        super().__init__(path, **options)
        self.copies = copies

    def keep(self, state):
        super().keep(state)
        self.saver.wait()
        shutil.copytree(self.path, self.copies / f"{len(list(self.copies.iterdir())):03}")


def fitted(make_run, name):
    arguments, options, val = job(name)
    with make_run() as run:
        return fs.fit(*arguments, **options, epochs=3, val=val, log_every=4, progress=False, run=run)


def quiet(text):
    pass


@pytest.mark.parametrize("name", JOBS)
def test_killed_between_any_two_steps(tmp_path, name):
    copies, whole = tmp_path / "copies", tmp_path / "whole"
    copies.mkdir()
    history = fitted(lambda: Copied(whole, copies, checkpoint_every=2, say=quiet), name)
    stopped = sorted(copies.iterdir())
    assert len(stopped) > 8
    for copy in stopped:
        again = fitted(lambda path=copy: fs.Run(path, checkpoint_every=None, say=quiet), name)
        assert difference(whole, copy) is None, copy.name
        assert [row["loss"] for row in again] == [row["loss"] for row in history]


@pytest.mark.parametrize("name", ["rows", "lstm"])
def test_a_loop_of_ones_own_goes_on(tmp_path, name):
    def looped(path, stop=None):
        arguments, options, _ = job(name)
        options = {key: value for key, value in options.items() if key not in ("anneal", "to_best", "early_stop")}
        seen = []
        with fs.Run(path, checkpoint_every=2, say=quiet) as run:
            for info in fs.train(*arguments, **options, max_iters=17, run=run):
                seen.append((info.step, float(info.loss)))
                if info.step == stop:
                    break
        return seen

    whole = looped(tmp_path / "whole")
    for stop in (1, 2, 3, 9, 16):
        path = tmp_path / f"{stop}"
        assert looped(path, stop) + looped(path) == whole
        assert difference(tmp_path / "whole", path) is None
    assert looped(tmp_path / "whole") == [], "nothing is left to do"


@pytest.mark.parametrize("name", ["rows", "lstm"])
def test_a_loop_without_an_end_is_complete_when_it_is_left(tmp_path, name):
    """Started again it makes no further step, at an epoch's edge and within; a loop that is not left goes on."""

    def looped(path, last):
        arguments, options, _ = job(name)
        options = {key: value for key, value in options.items() if key not in ("anneal", "to_best", "early_stop")}
        seen = []
        with fs.Run(path, checkpoint_every=1, say=quiet) as run:
            for info in fs.train(*arguments, **options, run=run):
                seen.append((info.step, float(info.loss)))
                if info.step == last:
                    if name == "rows":
                        run.save(info.state)
                    break
                assert info.step < 9
        return seen, info.state.state_dict()["model"]

    whole, _ = looped(tmp_path / "whole", 9)
    for stop in (1, 4, 8):
        seen, weights = looped(tmp_path / f"{stop}", stop)
        assert seen == whole[:stop]
        for _ in range(2):
            again, same = looped(tmp_path / f"{stop}", stop)
            assert again == whole[stop - 1 : stop]
            assert all(torch.equal(same[key], weights[key]) for key in weights)
        assert looped(tmp_path / f"{stop}", 9)[0] == whole[stop - 1 :]


def test_interrupted_in_evaluation_it_is_done_again(tmp_path):
    """A signal in a validation: the step is saved, the rows are made when the run goes on."""
    fitted(lambda: fs.Run(tmp_path / "whole", say=quiet), "windows")

    class Striking(fs.NextToken):
        looks = 0

        def forward(self, model, batch, carry=None):
            if not model.training:
                self.looks += 1
                if self.looks == 2:
                    signal.raise_signal(signal.SIGTERM)
            return super().forward(model, batch, carry)

    (model, data, _, optimizer), options, val = job("windows")
    with pytest.raises(SystemExit) as ended, fs.Run(tmp_path / "cut", say=quiet) as run:
        struck = Striking()
        fs.fit(model, data, struck, optimizer, **options, epochs=3, val=val, log_every=4, progress=False, run=run)
    assert ended.value.code == 143
    assert struck.looks == 2, "it is left at once, not at its end"
    assert read_rows(run.metrics)[-1]["event"] == "interrupted"
    fitted(lambda: fs.Run(tmp_path / "cut", say=quiet), "windows")
    assert difference(tmp_path / "whole", tmp_path / "cut") is None


@pytest.mark.parametrize("where", ["forward", "validation", "body"])
@pytest.mark.parametrize("name", ["rows", "windows"])
def test_an_error_anywhere_loses_no_step(tmp_path, where, name):
    """Also what a step that failed had drawn is put back."""
    fitted(lambda: fs.Run(tmp_path / "whole", say=quiet), name)
    (model, data, criterion, optimizer), options, val = job(name)
    left = {"forward": 11, "validation": 3}.get(where, 0)

    def striking(module, inputs):
        nonlocal left
        left -= module.training == (where == "forward")
        if left == 0 and where != "body":
            torch.rand(3)
            raise RuntimeError("planted")

    def body(result, rows):
        if where == "body" and result.step == 4:
            raise RuntimeError("planted")

    handle = model.register_forward_pre_hook(striking)
    options |= {"epochs": 3, "val": val, "log_every": 4, "progress": False, "watchers": [body]}
    with pytest.raises(RuntimeError, match="planted"), fs.Run(tmp_path / "cut", say=quiet) as run:
        fs.fit(model, data, criterion, optimizer, **options, run=run)
    handle.remove()
    fitted(lambda: fs.Run(tmp_path / "cut", say=quiet), name)
    assert difference(tmp_path / "whole", tmp_path / "cut") is None


@pytest.mark.parametrize("stop", [RuntimeError, signal.SIGTERM])
@pytest.mark.parametrize("strikes_at", [4, 10], ids=["in-an-epoch", "at-its-start"])
@pytest.mark.filterwarnings("ignore:Noisy cannot seek")
def test_what_a_broken_draw_used_up_is_put_back(tmp_path, stop, strikes_at):
    class Noisy:
        """Any iterable, which draws from torch's generator, and is struck in the middle of a window."""

        strikes_at, drawn = None, 0

        def __iter__(self):
            for _ in range(9):
                yield torch.rand(4, 3), torch.rand(4, 1)
                self.drawn += 1
                if self.drawn == self.strikes_at:
                    torch.rand(2)
                    if stop is RuntimeError:
                        raise RuntimeError("planted")
                    signal.raise_signal(stop)

    def trained(path, data):
        (model, _, criterion, optimizer), options, _ = job("rows")
        with fs.Run(path, say=quiet) as run:
            fs.fit(model, data, criterion, optimizer, **options, epochs=2, progress=False, run=run)

    trained(tmp_path / "whole", Noisy())
    broken = Noisy()
    broken.strikes_at = strikes_at
    with pytest.raises(RuntimeError if stop is RuntimeError else SystemExit):
        trained(tmp_path / "cut", broken)
    trained(tmp_path / "cut", Noisy())
    assert difference(tmp_path / "whole", tmp_path / "cut") is None


def test_the_best_validation_so_far_is_known_again(tmp_path):
    """Else a worse one would be taken for an improvement, and saved as such."""
    history = fitted(lambda: fs.Run(tmp_path / "mine", say=quiet), "windows")
    arguments, _, _ = job("windows")
    with fs.Run(tmp_path / "mine", say=quiet, adopt_changes=True) as run:
        fs.train(*arguments, max_iters=1, run=run)
        assert run.best == min(row["loss"] for row in history if row["split"] == "val")


def test_a_signal_saves_and_goes_on(tmp_path):
    told = []
    arguments, options, _ = job("rows")
    with fs.Run(tmp_path / "mine", checkpoint_every=None, keep_last=9, say=told.append) as run:
        for info in fs.train(*arguments, **options, max_iters=9, run=run):
            if info.step == 4:
                signal.raise_signal(signal.SIGUSR1)
    assert told == [f"saved step 4 in {run.path}"]
    assert [path.name for path in sorted(run.checkpoints.iterdir())] == ["step-00000004", "step-00000009"]


def test_own_handlers_are_called_and_put_back(tmp_path):
    heard = []

    def own(number, frame):
        heard.append(number)

    before = {number: signal.signal(number, own) for number in (signal.SIGTERM, signal.SIGUSR1)}
    try:
        arguments, options, _ = job("rows")
        with pytest.raises(SystemExit), fs.Run(tmp_path / "mine", say=quiet) as run:
            for info in fs.train(*arguments, **options, max_iters=9, run=run):
                if info.step in (2, 3):
                    signal.raise_signal(signal.SIGUSR1 if info.step == 2 else signal.SIGTERM)
        assert heard == [signal.SIGUSR1, signal.SIGTERM]
        assert signal.getsignal(signal.SIGTERM) is own
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def test_a_damaged_checkpoint_is_named_and_the_one_before_is_used(tmp_path):
    fitted(lambda: fs.Run(tmp_path / "whole", say=quiet), "rows")
    told = []
    arguments, options, _ = job("rows")
    with fs.Run(tmp_path / "cut", checkpoint_every=1, keep_last=3, say=quiet) as run:
        for info in fs.train(*arguments, **options, epochs=3, run=run):
            if info.step == 6:
                break
    newest = max(run.checkpoints.iterdir())
    content = bytearray((newest / "state.safetensors").read_bytes())
    content[len(content) // 2] ^= 4
    (newest / "state.safetensors").write_bytes(content)
    arguments, options, _ = job("rows")
    with fs.Run(tmp_path / "cut", say=told.append) as run:
        seen = [info.step for info in fs.train(*arguments, **options, epochs=3, run=run)]
    assert seen[0] == 6
    assert "step-00000006/state.safetensors is damaged" in told[0]
    for path in run.checkpoints.iterdir():
        (path / "manifest.json").unlink()
    with (
        pytest.raises(fs.UsageError, match="no checkpoint of .* is sound; nothing was changed"),
        fs.Run(run.path) as run,
    ):
        fs.train(*arguments, **options, epochs=3, run=run)


def test_another_model_is_refused(tmp_path):
    arguments, options, val = job("rows")
    with fs.Run(tmp_path / "mine", say=quiet) as run:
        fs.fit(*arguments, **options, epochs=1, val=val, progress=False, run=run)
    before = {path: path.read_bytes() for path in run.path.rglob("*") if path.is_file()}
    (_, data, criterion, _), options, val = job("rows")
    other = nn.Linear(3, 1)
    with pytest.raises(fs.UsageError, match="does not fit this training"), fs.Run(run.path, say=quiet) as run:
        fs.fit(other, data, criterion, torch.optim.SGD(other.parameters(), lr=1.0), epochs=2, progress=False, run=run)
    after = {path: path.read_bytes() for path in run.path.rglob("*") if path.is_file()}
    assert {path: content for path, content in after.items() if path.name != "metrics.jsonl"} == {
        path: content for path, content in before.items() if path.name != "metrics.jsonl"
    }


def test_a_disk_without_room_is_told_before_the_first_step(tmp_path, monkeypatch):
    arguments, options, _ = job("rows")
    monkeypatch.setattr(saving.shutil, "disk_usage", lambda path: type("Usage", (), {"free": 1000}))
    refusal = pytest.raises(
        fs.UsageError, match="need room for 4 .* are free; make room, train into another --run-dir"
    )
    with refusal, fs.Run(tmp_path / "mine", say=quiet) as run:
        fs.train(*arguments, **options, epochs=1, run=run)


@pytest.mark.parametrize("name", JOBS)
def test_the_room_of_a_checkpoint_is_forecast(tmp_path, name):
    arguments, options, val = job(name)
    with fs.Run(tmp_path / "mine", say=quiet) as run:
        fs.fit(*arguments, **options, epochs=1, val=val, progress=False, run=run)
    size = sum(file.stat().st_size for file in max(run.checkpoints.iterdir()).glob("state.safetensors"))
    size += sum(file.stat().st_size for file in max(run.checkpoints.iterdir()).glob("model.safetensors"))
    forecast = saving.checkpoint_bytes(run.state)
    assert forecast < size < forecast + 40_000, "headers and random states"


def test_one_trainer_a_run(tmp_path):
    with (
        fs.Run(tmp_path / "mine", say=quiet),
        pytest.raises(fs.UsageError, match=r"is being trained by process \d+ on"),
    ):
        fs.Run(tmp_path / "mine").__enter__()
    with fs.Run(tmp_path / "mine", say=quiet):
        pass


def test_a_lock_does_not_outlive_its_process_in_a_forked_child(tmp_path):
    """A loader's worker inherits open files; the run must be free when its trainer is killed."""
    code = (
        "import os, sys, time, signal; from pathlib import Path; from fivestep.run.running import hold\n"
        "hold(Path(sys.argv[1]))\n"
        "child = os.fork()\n"
        "if child: print(child, flush=True)\n"
        "time.sleep(60)\n"
    )
    process = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    child = int(process.stdout.readline())
    try:
        assert running(tmp_path) == "running"
        process.kill()
        process.wait()
        end = time.monotonic() + 120
        while running(tmp_path) == "running":  # the child may not have come to it yet
            assert time.monotonic() < end
            time.sleep(0.01)
        assert running(tmp_path) == "killed"
        release(tmp_path, hold(tmp_path))
    finally:
        os.kill(child, signal.SIGKILL)


@pytest.mark.parametrize("often", [1, 99])
def test_a_save_that_fails_is_told_and_tried_once_more(tmp_path, monkeypatch, often):
    fitted(lambda: fs.Run(tmp_path / "whole", say=quiet), "rows")
    told, left = [], [often]
    save = saving.save_checkpoint

    def failing(*arguments):
        left[0] -= 1
        if left[0] >= 0:
            raise fs.FivestepError("cannot save: No space left on device")
        return save(*arguments)

    monkeypatch.setattr(saving, "save_checkpoint", failing)
    if often == 1:
        fitted(lambda: fs.Run(tmp_path / "cut", say=told.append), "rows")
    else:
        with pytest.raises(fs.FivestepError, match="No space left"):
            fitted(lambda: fs.Run(tmp_path / "cut", say=told.append), "rows")
        monkeypatch.setattr(saving, "save_checkpoint", save)
        fitted(lambda: fs.Run(tmp_path / "cut", say=quiet), "rows")
    assert "cannot save: No space left on device; trying again" in told
    assert difference(tmp_path / "whole", tmp_path / "cut") is None


def test_rows_without_a_checkpoint_are_put_aside(tmp_path):
    fitted(lambda: fs.Run(tmp_path / "mine", say=quiet), "rows")
    shutil.rmtree(tmp_path / "mine" / "checkpoints")
    before = (tmp_path / "mine" / "metrics.jsonl").read_bytes()
    told = []
    fitted(lambda: fs.Run(tmp_path / "mine", say=told.append), "rows")
    assert (tmp_path / "mine" / "metrics.earlier.jsonl").read_bytes() == before
    assert "begins anew" in told[0]


def test_a_signal_in_the_last_save_still_ends(tmp_path):
    arguments, options, _ = job("rows")
    with pytest.raises(SystemExit) as ended, fs.Run(tmp_path / "mine", say=quiet) as run:
        for _ in fs.train(*arguments, **options, max_iters=3, run=run):
            pass
        signal.raise_signal(signal.SIGTERM)
    assert ended.value.code == 143


def test_what_cannot_be_saved_is_refused_after_the_first_step(tmp_path):
    class Odd(torch.optim.SGD):
        def step(self, closure=None):
            super().step(closure)
            self.state[self.param_groups[0]["params"][0]]["made by"] = self

    (model, data, criterion, _), _, _ = job("rows")
    refusal = pytest.raises(
        fs.UsageError, match=r"'optimizers\.0\.state\.0\.made by' is a Odd, which cannot be saved"
    )
    with refusal, fs.Run(tmp_path / "mine", say=quiet) as run:
        for info in fs.train(model, data, criterion, Odd(model.parameters(), lr=0.1), epochs=1, run=run):
            assert info.step == 1  # the second is never made
