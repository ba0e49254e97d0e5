"""A step is made whole or not at all: whatever raises between the update and the data position, a resume is exact."""

import gc
import os
import random
import signal
import subprocess
import sys
import textwrap
import threading
import weakref
from pathlib import Path

import pytest
import torch
from torch import nn

import fivestep as fs
from fivestep.loop.average import Average
from fivestep.loop.clock import Clock
from fivestep.run import checkpoint
from tests.same import assert_same_bits

SOURCES = [Path("loop", name).as_posix() for name in ("step.py", "train.py", "state.py", "average.py", "schedule.py")]


class PlantedError(Exception):
    """What a test raises."""


def quiet(text):
    """Print nothing."""


def build_job(every=1):
    """Return a model with dropout, its data, and the options of a training with every part that moves."""
    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(3, 8), nn.Dropout(0.2), nn.Linear(8, 1))
    draw = torch.Generator().manual_seed(1)
    data = [(torch.randn(4, 3, generator=draw), torch.randn(4, 1, generator=draw)) for _ in range(6)]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 2, 0.9)
    return (model, data, nn.MSELoss(), optimizer), {"scheduler": scheduler, "scheduler_every": every, "ema": 0.9}


def train_in(folder, plant=lambda arguments: None, every=1, **more):
    """Train the job in `folder`, for two epochs, from where it was left."""
    arguments, options = build_job(every)
    plant(arguments)
    with fs.Run(folder, say=quiet, checkpoint_every=2) as run:
        fs.fit(*arguments, **options, epochs=2, run=run, progress=False, **more)
    return arguments[0], arguments[3]


def raise_at(monkeypatch, owner, name, at):
    """Let the method `name` of the class `owner` raise at its call number `at`, after it has done its work."""
    method, calls = getattr(owner, name), []

    def planted(*arguments, **options):
        result = method(*arguments, **options)
        calls.append(1)
        if len(calls) == at:
            raise PlantedError
        return result

    monkeypatch.setattr(owner, name, planted)


STRIKES = [
    (torch.optim.lr_scheduler.StepLR, "step", 4, 1),
    (torch.optim.lr_scheduler.StepLR, "step", 2, "1ep"),
    (torch.optim.SGD, "step", 5, 1),
    (Average, "update", 7, 1),
    (Clock, "__setattr__", 41, 1),
]


@pytest.mark.parametrize(("owner", "name", "at", "every"), STRIKES)
def test_an_error_between_update_and_position_costs_no_exactness(tmp_path, monkeypatch, owner, name, at, every):
    uncut, _ = train_in(tmp_path / "uncut", every=every)
    with monkeypatch.context() as planted, pytest.raises(PlantedError):
        raise_at(planted, owner, name, at)
        train_in(tmp_path / "cut", every=every)
    resumed, _ = train_in(tmp_path / "cut", every=every)
    assert_same_bits(resumed, uncut)


def test_a_watcher_that_raises_costs_no_exactness(tmp_path):
    uncut, _ = train_in(tmp_path / "uncut")

    def watch(result, rows):
        if result.step == 5:
            raise PlantedError

    with pytest.raises(PlantedError):
        train_in(tmp_path / "cut", watchers=[watch])
    resumed, _ = train_in(tmp_path / "cut")
    assert_same_bits(resumed, uncut)


def strike_at(line_number):
    """Return a tracer that raises at the line with this number among those of the step, once."""
    seen = [0]

    def trace(frame, event, argument):
        if not frame.f_code.co_filename.replace(os.sep, "/").endswith(tuple(f"fivestep/{name}" for name in SOURCES)):
            return None
        if event == "line":
            seen[0] += 1
            if seen[0] == line_number:
                sys.settrace(None)
                raise PlantedError
        return trace

    return trace


def count_unequal(folder, seeds):
    """Return how many trainings end otherwise than the uncut one, each struck at a random line and resumed."""
    uncut, _ = train_in(folder / "uncut")
    unequal = 0
    for seed in seeds:
        tracer = strike_at(random.Random(seed).randrange(60, 1400))
        try:
            sys.settrace(tracer)
            train_in(folder / str(seed))
        except PlantedError:
            pass
        finally:
            sys.settrace(None)
            # Python does not call __exit__ where the error is planted between a `with` block's end and that call.
            torch.set_grad_enabled(True)
        resumed, _ = train_in(folder / str(seed))
        unequal += any(
            not torch.equal(one, other) for one, other in zip(resumed.parameters(), uncut.parameters(), strict=True)
        )
    return unequal


def test_errors_at_random_lines_of_a_step(tmp_path):
    assert count_unequal(tmp_path, range(12)) == 0


@pytest.mark.torture
def test_errors_at_two_hundred_random_lines_of_a_step(tmp_path):
    assert count_unequal(tmp_path, range(100, 300)) == 0


def test_training_on_from_a_broken_update_is_refused(monkeypatch):
    arguments, options = build_job()
    with monkeypatch.context() as planted, pytest.raises(PlantedError):
        raise_at(planted, Average, "update", 5)
        for info in fs.train(*arguments, **options, epochs=2):
            state = info.state
    options = {**options, "state": state}
    with pytest.raises(fs.UsageError, match="an error broke off the update after step 4"):
        next(fs.train(*arguments, **options, epochs=2))


@pytest.mark.skipif(not hasattr(signal, "SIGALRM"), reason="this system has no SIGALRM")
def test_what_a_handler_raises_waits_for_the_end_of_the_update(tmp_path):
    def raise_now(number, frame):
        raise PlantedError

    before = signal.signal(signal.SIGALRM, raise_now)
    try:
        uncut, _ = train_in(tmp_path / "uncut")

        def plant(arguments):
            calls = []

            def strike(*rest):
                calls.append(1)
                if len(calls) == 5:
                    os.kill(os.getpid(), signal.SIGALRM)

            arguments[3].register_step_pre_hook(strike)

        with pytest.raises(PlantedError):
            train_in(tmp_path / "cut", plant)
        assert max((tmp_path / "cut" / "checkpoints").glob("step-*")).name == "step-00000005"
        assert signal.getsignal(signal.SIGALRM) is raise_now
        resumed, _ = train_in(tmp_path / "cut")
        assert_same_bits(resumed, uncut)
    finally:
        signal.signal(signal.SIGALRM, before)


def test_a_last_save_that_fails_is_tried_again(tmp_path, monkeypatch):
    write, calls = checkpoint.write_through, []

    def failing(path, parts):
        calls.append(path)
        if len(calls) == 1:
            raise OSError("planted")
        return write(path, parts)

    monkeypatch.setattr(checkpoint, "write_through", failing)
    arguments, options = build_job()
    with fs.Run(tmp_path / "run", say=quiet, checkpoint_every=None) as run:
        fs.fit(*arguments, **options, epochs=1, run=run, progress=False)
    assert [path.name for path in run.checkpoints.glob("step-*")] == ["step-00000006"]


def test_without_a_thread_the_caller_saves(tmp_path, monkeypatch):
    start = threading.Thread.start

    def refuse(self):
        if self.name == "fivestep-save":
            raise RuntimeError("can't start new thread")
        start(self)

    monkeypatch.setattr(threading.Thread, "start", refuse)
    train_in(tmp_path / "run")
    other = build_job()[0][0]
    assert fs.load_weights(tmp_path / "run", other, "last") == 12


@pytest.mark.parametrize("kind", ["fit", "fit with a run", "train", "train left by break", "train with a run"])
def test_the_last_reference_frees_the_model(tmp_path, kind):
    def once(number):
        arguments, options = build_job()
        if kind == "fit":
            fs.fit(*arguments, **options, epochs=1, val=arguments[1], lens=2, progress=False)
        elif kind == "fit with a run":
            with fs.Run(tmp_path / str(number), say=quiet) as run:
                fs.fit(*arguments, **options, epochs=1, val=arguments[1], run=run, progress=False)
        elif kind == "train with a run":
            with fs.Run(tmp_path / str(number), say=quiet) as run:
                for _ in fs.train(*arguments, **options, epochs=1, run=run):
                    pass
        else:
            for info in fs.train(*arguments, **options, epochs=1):
                if info.step == 3 and kind == "train left by break":
                    break
        return weakref.ref(arguments[0])

    once(0)  # what the first training imports and caches is not looked for
    gc.collect()
    gc.disable()
    try:
        assert once(1)() is None
    finally:
        gc.enable()


GROUP = """
    import os, sys, time, torch
    from pathlib import Path
    from torch import nn
    from torch.utils.data import DataLoader, Dataset
    import fivestep as fs

    class Slow(Dataset):
        def __len__(self):
            return 4000

        def __getitem__(self, i):
            time.sleep(0.002)
            return torch.ones(1000) * (i % 7), torch.ones(1)

    if __name__ == "__main__":
        folder, workers = Path(sys.argv[1]), int(sys.argv[2])
        model = nn.Sequential(nn.Linear(1000, 800), nn.ReLU(), nn.Linear(800, 1))
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
        loader = DataLoader(Slow(), batch_size=4, num_workers=workers)
        with fs.Run(folder / "run", checkpoint_every=10**6, say=lambda text: None) as run:
            for info in fs.train(model, loader, nn.MSELoss(), optimizer, epochs=1, run=run):
                (folder / "last").write_text(str(info.step))
                if info.step == 3:
                    print("under way", flush=True)
"""


def signal_group(folder, number, workers, delay):
    """Return exit code, last step made and last step saved of a training whose process group got a signal."""
    folder.mkdir()
    script = folder / "script.py"
    script.write_text(textwrap.dedent(GROUP), encoding="utf-8")
    command = [sys.executable, str(script), str(folder), str(workers)]
    child = subprocess.Popen(
        command,
        start_new_session=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    try:
        assert child.stdout.readline() == "under way\n"
        threading.Event().wait(delay)
        os.killpg(child.pid, number)
        child.communicate(timeout=120)
    finally:
        child.kill()
        child.wait()
    made = int((folder / "last").read_text())
    saved = max((int(one.name.split("-")[1]) for one in (folder / "run" / "checkpoints").glob("step-*")), default=0)
    return child.returncode, made, saved


def is_saved(number, outcome):
    """Tell whether the process ended as the signal asks, with its last step saved."""
    code, made, saved = outcome
    # Python ends a process by SIGINT itself where KeyboardInterrupt is not caught.
    return (
        code in {signal.SIGTERM: (143,), signal.SIGINT: (130, -signal.SIGINT)}[number] and made <= saved <= made + 1
    )


@pytest.mark.skipif(not hasattr(os, "killpg"), reason="this system has no process groups")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_to_the_group_keeps_the_last_step(tmp_path, number):
    assert is_saved(number, outcome := signal_group(tmp_path / "one", number, 2, 0.2)), outcome


@pytest.mark.torture
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_hundred_signals_to_groups(tmp_path, number):
    draw, outcomes = random.Random(int(number)), []
    for trial in range(100):
        outcomes.append(signal_group(tmp_path / str(trial), number, trial % 4, draw.random()))
    assert [one for one in outcomes if not is_saved(number, one)] == []
