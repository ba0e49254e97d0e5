"""PAINS row 24: a checkpoint from a stranger runs no code, touches nothing but its run, and is refused in a sentence.

Everywhere digests and seals are right: what is refused is refused for what it is.
"""

import json
import os
import random
import shutil
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import fivestep as fs
from fivestep.data.segments import Segments
from fivestep.loop.train import train
from fivestep.models.rnn import RNN
from tests.promises.hostile import (
    MANIFEST,
    ODD,
    TENSORS,
    TREE,
    WEIGHTS,
    bombs,
    bounded,
    changed,
    checkpoint_of,
    copy_run,
    headers,
    left_alone,
    made_now,
    marked,
    pickled,
    places,
    raw,
    reseal,
    tree,
    watch,
)
from tests.run.cli import fivestep  # noqa: F401  (a fixture)

TEXT = "".join(f"{i} and {i * 7 % 13} make {i + i * 7 % 13}.\n" for i in range(200))
IN_A_CHECKPOINT = (WEIGHTS, TENSORS, TREE, MANIFEST)
BESIDE_IT = ("config.toml", "environment.json", "tokenizer.json", "metrics.jsonl", "skipped.jsonl", ".running")
VERBS = {
    "resume": ("resume", "mine", "--max-iters", "7"),
    "eval": ("eval", "mine", "--json"),
    "sample": ("sample", "mine", "--max-new-tokens", "3"),
    "runs": ("runs", "."),
}


@pytest.fixture(autouse=True, scope="module")
def quiet():
    with left_alone():
        yield


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    """A run of the command line with one checkpoint, to be copied."""
    from fivestep.cli import main

    place = tmp_path_factory.mktemp("sound")
    (place / "text.txt").write_text(TEXT)
    before = Path.cwd()
    os.chdir(place)
    try:
        options = ["--max-iters", "6", "--eval-every", "6", "--keep-last", "1", "--sample-tokens", "0"]
        main(["train", "bigram", "--data", "text.txt", "--batch-size", "4", *options, "--run-dir", "mine"])
        shutil.copytree("mine", "warm")
        for verb in VERBS.values():  # what they import and compile is there from here on
            main([part.replace("mine", "warm") for part in verb])
        shutil.rmtree("warm")
    except SystemExit as stop:
        assert not stop.code
    finally:
        os.chdir(before)
    checkpoint_of(place / "mine")
    return place / "mine"


@pytest.fixture
def mine(sound, tmp_path, fivestep):  # noqa: F811
    """A copy of it, with something beside that nobody may touch, and a call that is watched."""
    return Hostile(sound, tmp_path, fivestep)


class Hostile:
    def __init__(self, sound, place, fivestep):  # noqa: F811
        self.sound, self.place, self.fivestep = sound, place, fivestep
        self.path, self.beside = place / "mine", place / "beside"
        self.beside.mkdir()
        (self.beside / "kept.txt").write_text("this stays\n")
        self.fresh()

    def fresh(self):
        shutil.rmtree(self.path, ignore_errors=True)
        if self.path.is_symlink() or self.path.exists():
            self.path.unlink()
        copy_run(self.sound, self.path)
        self.checkpoint = checkpoint_of(self.path)

    def call(self, verb):
        """Run a verb on it; it is quick, small, harmless, and ends well or with a sentence."""
        before = tree(self.beside)
        allowed = (self.path, os.environ["FIVESTEP_CACHE"])
        with bounded(), watch().over(*allowed) as seen:
            told = self.fivestep(*VERBS[verb])
        assert not seen, seen
        assert tree(self.beside) == before
        assert told.code in (0, 2), (verb, told)
        assert "Traceback" not in told.err
        if told.code:
            assert told.err.startswith("fivestep: ") and len(told.err) < 2500, told.err
            assert "\x1b" not in told.err and "\x07" not in told.err
        return told

    def refused(self, *verbs):
        for verb in verbs:
            rows = (self.path / "metrics.jsonl").read_bytes()
            told = self.call(verb)
            assert told.code == 2, (verb, told)
            assert (self.path / "metrics.jsonl").read_bytes() == rows, "nothing was trained"

    def harmless(self):
        for verb in VERBS:
            self.call(verb)


def test_the_sound_run_goes_on(mine):
    """Else a refusal would prove nothing. Also: what these verbs import and compile is there from here on."""
    for verb in ("eval", "sample", "runs", "resume"):
        assert mine.fivestep(*VERBS[verb]).code == 0
    mine.fresh()
    reseal(mine.checkpoint)
    for verb in ("eval", "sample", "runs", "resume"):
        assert mine.call(verb).code == 0


def test_the_watch_sees(mine):
    with watch().over(mine.path) as seen:
        exec("1")  # noqa: S102
        (mine.beside / "new.txt").write_text("x")
        os.truncate(mine.beside / "new.txt", 0)
        os.system("true")  # noqa: S605
        (mine.path / "fine.txt").write_text("x")
    assert [event for event, _ in seen] == ["compile", "exec", "open", "os.truncate", "os.system"]


@pytest.mark.parametrize("protocol", range(6))
def test_pickles(mine, protocol):
    poison = pickled(mine.beside, protocol)
    for name in IN_A_CHECKPOINT:
        mine.fresh()
        (mine.checkpoint / name).write_bytes(poison)
        if name != MANIFEST:
            reseal(mine.checkpoint)
        mine.refused(*(["resume"] if name == TENSORS else ["resume", "eval"]))
    for name in BESIDE_IT:
        mine.fresh()
        (mine.path / name).write_bytes(poison)
        mine.harmless()


def test_torchs_own_files(mine):
    """A zip with a pickle in it, as torch.save writes it, under each name."""
    for name in (WEIGHTS, TENSORS, TREE):
        mine.fresh()
        torch.save({"w": torch.zeros(2)}, mine.checkpoint / name)
        reseal(mine.checkpoint)
        mine.refused("resume")


@pytest.mark.parametrize("name", headers())
def test_absurd_headers(mine, name):
    for file in (WEIGHTS, TENSORS):
        mine.fresh()
        (mine.checkpoint / file).write_bytes(made_now(headers()[name]))
        reseal(mine.checkpoint)
        mine.refused(*(["resume", "eval"] if file == WEIGHTS else ["resume"]))


@pytest.mark.parametrize("name", bombs())
def test_bombs(mine, name):
    (mine.checkpoint / TREE).write_bytes(made_now(bombs()[name]))
    reseal(mine.checkpoint)
    mine.refused("resume", "eval")
    mine.fresh()
    (mine.checkpoint / MANIFEST).write_bytes(made_now(bombs()[name]))
    mine.refused("resume", "sample")


@pytest.mark.parametrize(
    "file", ["config.toml", "environment.json", "tokenizer.json", "metrics.jsonl", "skipped.jsonl"]
)
def test_bombs_beside_the_checkpoints(mine, file):
    for content in [
        *map(made_now, bombs().values()),
        b"a = " + b"[" * 100_000,
        b"a.b" * 80_000,
        b"x = " + b"9" * 9_000,
    ]:
        if len(content) < 1 << 25:
            mine.fresh()
            (mine.path / file).write_bytes(content)
            mine.harmless()


MANIFESTS = {
    "climbs": {"files": {"../../../beside/kept.txt": [11, "0"], TENSORS: [0, ""], TREE: [0, ""]}},
    "absolute": {"files": {"/etc/passwd": [0, ""], TENSORS: [0, ""], TREE: [0, ""]}},
    "one more": {"files": {WEIGHTS: [0, ""], TENSORS: [0, ""], TREE: [0, ""], "/dev/zero": [0, ""]}},
    "no files": {"files": {}},
    "a list of files": {"files": [WEIGHTS, TENSORS, TREE]},
    "sizes of a kind": {"files": {WEIGHTS: ["9" * 5000, ""], TENSORS: [None, ""], TREE: [[], ""]}},
    "infinite sizes": {"files": {WEIGHTS: [float("inf"), ""], TENSORS: [float("nan"), ""], TREE: [-1, ""]}},
    "loss of 10**400": {"val_loss": 10**400},
    "loss of text": {"val_loss": "nan?"},
    "another step": {"step": 2},
    "step as text": {"step": "6"},
    "another name": {"name": "../../beside"},
    "another version": {"version": [[["\x1b[2J" * 1000]]]},
    "another format": {"format": "pickle"},
}


@pytest.mark.parametrize("name", MANIFESTS)
def test_manifests(mine, name):
    reseal(mine.checkpoint, **MANIFESTS[name])
    mine.refused("resume", "eval", "sample")
    assert mine.call("runs").code == 0


def kinds_of_links(mine, target):
    """Name -> a function that puts something that is no file of the run's own at a path."""
    return {
        "a file": lambda path: path.symlink_to(target),
        "a folder": lambda path: path.symlink_to(mine.beside),
        "nothing": lambda path: path.symlink_to(mine.beside / "nothing"),
        "itself": lambda path: path.symlink_to(path),
        "/dev/zero": lambda path: path.symlink_to("/dev/zero"),
        "a pipe": lambda path: os.mkfifo(path),
        "a link to a pipe": lambda path: (os.mkfifo(f"{path}.pipe"), path.symlink_to(f"{path}.pipe")),
        "a folder of its own": lambda path: path.mkdir(),
        "another name": lambda path: os.link(target, path),
    }


def test_links_in_a_checkpoint(mine):
    for name in IN_A_CHECKPOINT:
        for kind in kinds_of_links(mine, mine.beside):
            if kind == "another name":
                continue  # reading a file of two names harms none
            mine.fresh()
            content = (mine.checkpoint / name).read_bytes()
            elsewhere = mine.beside / name
            elsewhere.write_bytes(content)  # even where it is the right file
            (mine.checkpoint / name).unlink()
            kinds_of_links(mine, elsewhere)[kind](mine.checkpoint / name)
            mine.refused(*(["resume"] if name == TENSORS else ["resume", "eval"]))


@pytest.mark.parametrize("name", BESIDE_IT)
def test_links_beside_the_checkpoints(mine, name):
    for kind in kinds_of_links(mine, mine.beside):
        mine.fresh()
        elsewhere = mine.beside / "elsewhere"
        elsewhere.write_bytes((mine.path / name).read_bytes() if (mine.path / name).exists() else b"")
        (mine.path / name).unlink(missing_ok=True)
        kinds_of_links(mine, elsewhere)[kind](mine.path / name)
        mine.harmless()
        if name in ("metrics.jsonl", "skipped.jsonl", ".running"):
            assert mine.call("resume").code == 2, kind


@pytest.mark.parametrize("where", ["beside", "another run"])
def test_folders_that_are_links(mine, where):
    """The checkpoints, one of them, the samples: pruning and saving would be done elsewhere."""
    other = copy_run(mine.sound, mine.beside / "other")
    (other / "checkpoints" / ".step-00000001.part").mkdir()
    shutil.rmtree(mine.path / "checkpoints")
    (mine.path / "checkpoints").symlink_to(other / "checkpoints" if where == "another run" else mine.beside)
    mine.refused("resume", "eval", "sample")
    mine.fresh()
    shutil.rmtree(mine.checkpoint)
    mine.checkpoint.symlink_to(checkpoint_of(other) if where == "another run" else mine.beside)
    mine.refused("resume", "eval", "sample")
    mine.fresh()
    (mine.path / "samples").symlink_to(mine.beside)
    mine.refused("resume")


def test_names_of_folders(mine):
    """Names that no step has are named, and never taken for a beginning."""
    for name in ("step-99999999999999999999", "step-1", "step--0000006", "step-00000006-1", "step-00000006 ", "best"):
        mine.fresh()
        mine.checkpoint.rename(mine.checkpoint.with_name(name))
        mine.refused("resume", "eval")
        told = mine.call("resume")
        assert name in told.out + told.err
    mine.fresh()
    for number in range(2000):
        (mine.path / "checkpoints" / f"step-{10**17 + number}").mkdir()
    told = mine.call("eval")
    assert told.code == 0 or len(told.err) > 2500


def test_leftovers_that_are_traps(mine):
    """What a killed save left is removed: but no more than that."""
    trap = mine.path / "checkpoints" / ".step-00000009.part"
    trap.symlink_to(mine.beside)
    assert mine.call("resume").code == 0
    assert not trap.is_symlink()
    mine.fresh()
    trap.mkdir()
    (trap / "model.safetensors").symlink_to(mine.beside / "kept.txt")
    (trap / "deep").symlink_to(mine.beside)
    assert mine.call("resume").code == 0
    assert not trap.exists()


def test_models_that_are_too_large(mine):
    """Sizes that would take all memory, or for ever."""
    config = (mine.path / "config.toml").read_text()
    for model in ("gpt", "rnn", "mlp", "transformer", "bigram"):
        for name in ("n_layer", "n_embd", "block_size", "n_hidden", "vocab_size"):
            mine.fresh()
            kept = [line for line in config.splitlines() if line.split(" ")[0] not in ("model", name)]
            (mine.path / "config.toml").write_text("\n".join([f'model = "{model}"', f"{name} = {10**12}", *kept]))
            mine.harmless()
    for size in (10**6, 10**12, 10**30, -1, "1e400", None, [1]):
        mine.fresh()
        facts = json.loads((mine.path / "environment.json").read_text())
        (mine.path / "environment.json").write_text(json.dumps({**facts, "inputs": size, "outputs": size}))
        mine.refused("eval", "sample")


# --- states of the right form and wrong content ---


def recurrent():
    text = torch.arange(120).numpy() % 7
    model = RNN(7, 3, 4, 1, dropout=0.1)
    return (model, Segments(text, 4, 5), fs.TruncatedBPTT(), torch.optim.SGD(model.parameters(), lr=0.1)), {}


def rows():
    features = torch.arange(60.0).view(20, 3) / 60
    loader = DataLoader(TensorDataset(features, features.sum(1, keepdim=True)), batch_size=4, shuffle=True)
    model = nn.Linear(3, 1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    options = {"scheduler": torch.optim.lr_scheduler.StepLR(optimizer, 3, gamma=0.9), "ema": 0.9, "accumulate": 2}
    return (model, loader, nn.MSELoss(), optimizer), options


JOBS = {"recurrent": recurrent, "rows": rows}


def go_on(run, job, max_iters=10):
    """One or two steps of a training that goes on in `run`."""
    torch.manual_seed(0)
    parts, options = JOBS[job]()
    with fs.Run(run, say=lambda text: None) as entered:
        for _ in train(*parts, max_iters=max_iters, run=entered, **options):
            pass


def made(folder, job):
    go_on(folder, job, 8)
    return folder


def mutations(run):
    """(path, new) for every part of the saved state, and every odd value in its place."""
    content = json.loads((checkpoint_of(run) / TREE).read_text())
    names = marked(content["state"])
    for path in places(content):
        for new in (..., *ODD, {"$tensor": names[0]}, {"$tensor": names[-1]}):
            yield content, path, new


def try_state(run, work, job, content, path, new):
    """A FivestepError, or a training that goes on; nothing else, and not a checkpoint more after an error."""
    shutil.rmtree(work, ignore_errors=True)
    copy_run(run, work)
    checkpoint = checkpoint_of(work)
    (checkpoint / TREE).write_text(json.dumps(changed(content, path, new)))
    reseal(checkpoint)
    try:
        go_on(work, job)
        return True
    except fs.NonFiniteError:
        return False
    except fs.FivestepError:
        assert list((work / "checkpoints").iterdir()) == [checkpoint], "what is half loaded is never saved"
        return False
    except Exception as error:
        raise AssertionError(f"{job}: {path} = {new!r}: {type(error).__name__}: {error}") from error


@pytest.mark.parametrize("job", JOBS)
def test_states_of_wrong_content(tmp_path, job):
    run = made(tmp_path / "run", job)
    cases = list(mutations(run))
    refused = 0
    for case in random.Random(7).sample(cases, 100):
        if case[1][:2] != ("state", "carry"):
            refused += not try_state(run, tmp_path / "work", job, *case)
    assert refused > 50


def test_tensors_of_wrong_shape_and_dtype(tmp_path):
    run = made(tmp_path / "run", "rows")
    original = checkpoint_of(run)
    content = (original / TENSORS).read_bytes()
    n = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + n])
    for name, about in header.items():
        if name == "__metadata__" or about["data_offsets"][0] == about["data_offsets"][1]:
            continue
        size = about["data_offsets"][1] - about["data_offsets"][0]
        for dtype, shape in (("U8", [size]), ("U8", [size, 1]), ("I8", [1, size])):
            if (dtype, shape) == (about["dtype"], about["shape"]):
                continue
            new = {**header, name: {**about, "dtype": dtype, "shape": shape}}
            work = tmp_path / "work"
            shutil.rmtree(work, ignore_errors=True)
            copy_run(run, work)
            (checkpoint_of(work) / TENSORS).write_bytes(raw(new, content[8 + n :]))
            reseal(checkpoint_of(work))
            try:
                go_on(work, "rows")
                assert size == 1 or "random" in name or "generators" in name, (name, dtype, shape)
            except fs.FivestepError:
                pass


def test_a_name_twice(mine):
    """The last of two would be taken: who looked at the first was deceived."""
    text = (mine.checkpoint / TREE).read_text()
    assert text.count('"position":') == 1
    (mine.checkpoint / TREE).write_text(text.replace('"position":', '"position":2,"position":'))
    reseal(mine.checkpoint)
    mine.refused("resume")


def test_the_length_of_a_header_is_looked_at_first(mine):
    (mine.checkpoint / WEIGHTS).write_bytes(made_now(headers()["a header of 100 MB"]))
    reseal(mine.checkpoint)
    told = mine.call("eval")
    assert "its header is larger than any of its kind" in told.err
