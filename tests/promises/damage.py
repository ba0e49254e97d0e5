"""Random damage to the checkpoints of a run, and what must come of it.

A checkpoint is sound while every byte of its four files, and its name, are as they were written. One that is not must
be named, with the file, and never be loaded; the newest that is sound is, whole.
"""

import shutil
from pathlib import Path

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import fivestep as fs
from fivestep.loop.step import TrainStep
from fivestep.models.mlp import MLP
from fivestep.run.run import load_weights
from tests.same import assert_same_tree

READ_BY_EVAL = ("model.safetensors", "state.json", "manifest.json")


def job():
    features = torch.arange(60.0).view(20, 3) / 60
    loader = DataLoader(TensorDataset(features, features.sum(1, keepdim=True)), batch_size=2, shuffle=True)
    model = nn.Sequential(MLP([3, 4, 1]), nn.Dropout(0.1))
    return model, loader, nn.MSELoss(), torch.optim.Adam(model.parameters(), lr=1e-2)


class Original:
    """A run with three checkpoints (steps 4, 8, 12), in memory, and the state that each of them holds."""

    def __init__(self, folder):
        torch.manual_seed(1)
        *parts, optimizer = job()
        said = []
        with fs.Run(folder, checkpoint_every=4, keep_last=3, say=said.append) as run:
            options = {"max_iters": 12, "eval_every": 100, "log_every": 2, "progress": False}
            fs.fit(*parts, optimizer, **options, run=run)
        self.files = {}
        for path in sorted(folder.rglob("*")):
            if path.is_file():
                self.files[path.relative_to(folder).as_posix()] = path.read_bytes()
        self.names = sorted({name.split("/")[1] for name in self.files if name.startswith("checkpoints/")})
        assert len(self.names) == 3
        self.states = {}
        for name in self.names:
            other = folder.with_name(f"only-{name}")
            self.write(other, [name])
            self.states[name] = attached(other, [])
            shutil.rmtree(other)

    def write(self, folder, names=None):
        shutil.rmtree(folder, ignore_errors=True)
        for name, content in self.files.items():
            part = name.split("/")
            if part[0] != "checkpoints" or names is None or part[1] in names:
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                (folder / name).write_bytes(content)

    def damaged_files(self, folder, name):
        """The files of a checkpoint that are not as they were; None where it is not there under its name."""
        if not (folder / "checkpoints" / name).is_dir():
            return None
        files = [one for one in self.files if one.startswith(f"checkpoints/{name}/")]
        return [Path(one).name for one in files if not _is(folder / one, self.files[one])]


def _is(path, content):
    try:
        return path.read_bytes() == content
    except OSError:
        return False


def attached(folder, said):
    """The state that a training gets which goes on in `folder`."""
    model, _, criterion, optimizer = job()
    step = TrainStep(model, criterion, optimizer)
    with fs.Run(folder, say=said.append) as run:
        run.attach(step.state)
        return step.state.state_dict()


# --- damage ---


def flip(random, path):
    content = bytearray(path.read_bytes())
    at = place(random, content)
    content[at] ^= 1 << random.randrange(8)
    path.write_bytes(content)


def place(random, content):
    """Anywhere; as often within the first bytes, where a safetensors file keeps the length of its header."""
    return random.randrange(len(content)) if random.random() < 0.7 else random.randrange(min(16, len(content)))


def block(random, path):
    content = bytearray(path.read_bytes())
    at, n = random.randrange(len(content)), random.choice([1, 4, 16, 512, 4096])
    n = min(n, len(content) - at)
    content[at : at + n] = random.choice([bytes(n), b"\xff" * n, random.randbytes(n)])
    path.write_bytes(content)


def truncate(random, path):
    path.write_bytes(path.read_bytes()[: random.choice([0, 1, 8, random.randrange(path.stat().st_size)])])


def extend(random, path):
    extra = random.choice([b"\n", b"\0", b" " * 8, random.randbytes(random.randrange(1, 600))])
    path.write_bytes(path.read_bytes() + extra)


def move_bytes(random, path):
    """Two pieces change places: every byte is there."""
    content = path.read_bytes()
    a, b, c = sorted(random.randrange(len(content)) for _ in range(3))
    path.write_bytes(content[:a] + content[b:c] + content[a:b] + content[c:])


def remove(random, path):
    path.unlink()


def a_folder(random, path):
    path.unlink()
    path.mkdir()


def a_link(random, path):
    path.rename(path.with_name("elsewhere"))
    path.symlink_to("elsewhere")


IN_A_FILE = (flip, flip, flip, block, block, truncate, extend, move_bytes, remove, a_folder, a_link)


def swap(one, other):
    beside = one.with_name("swapped")
    one.rename(beside)
    other.rename(one)
    beside.rename(other)


def swap_files(random, folder, checkpoints):
    """Between two checkpoints, or within one."""
    one = random.choice(sorted(random.choice(checkpoints).iterdir()))
    other = random.choice([path for each in checkpoints for path in sorted(each.iterdir()) if path != one])
    swap(one, other)


def copy_file(random, folder, checkpoints):
    one, other = random.sample([path for each in checkpoints for path in sorted(each.iterdir())], 2)
    shutil.copy(one, other)


def rename_folder(random, folder, checkpoints):
    one = random.choice(checkpoints)
    names = [f"{one.name}-1", "step-00000099", "step-99999999999999999999", f"{one.name}.bak", "step-12", "old"]
    one.rename(one.with_name(random.choice(names)))


def swap_folders(random, folder, checkpoints):
    swap(*random.sample(checkpoints, 2))


def empty_folder(random, folder, checkpoints):
    for path in random.choice(checkpoints).iterdir():
        path.unlink()


AMONG = (swap_files, swap_files, copy_file, rename_folder, swap_folders, empty_folder)


def damage(random, folder):
    """One to four damages, the newest checkpoint more often than the others; what was done."""
    done = []
    for _ in range(random.choice([1, 1, 1, 2, 4])):
        checkpoints = sorted(path for path in (folder / "checkpoints").glob("step-*") if path.is_dir())
        whole = [path for path in checkpoints if sum(one.is_file() for one in path.iterdir()) == 4]
        if random.random() < 0.75 and whole:
            one = whole[-1] if random.random() < 0.7 else random.choice(whole)
            path, kind = random.choice(sorted(one.iterdir())), random.choice(IN_A_FILE)
            if path.is_file() and path.stat().st_size:
                kind(random, path)
                done.append(f"{kind.__name__} {one.name}/{path.name}")
        elif len(whole) > 1:
            kind = random.choice(AMONG)
            kind(random, folder, whole)
            done.append(kind.__name__)
    return done


# --- what must come of it ---


def check(original, folder, done, capsys):
    """Go on in the damaged run, and take its weights; whether it was damaged at all. Leaves `folder` changed."""
    found = {name: original.damaged_files(folder, name) for name in original.names}
    links = [name for name in original.names if (folder / "checkpoints" / name).is_dir()]
    for name in links:
        own = [one.name for one in (folder / "checkpoints" / name).iterdir() if one.is_symlink()]
        found[name] = sorted({*(found[name] or []), *(one for one in own if one != "elsewhere")})
    strange = [p.name for p in (folder / "checkpoints").iterdir() if p.name not in original.names]
    if not strange and not any(files is None or files for files in found.values()):
        return False
    sound = [name for name in original.names if found[name] == []]
    check_attach(original, folder, done, found, strange, sound)
    check_weights(original, folder, done, found, capsys)
    return True


def check_attach(original, folder, done, found, strange, sound):
    said = []
    if sound:
        assert_same_tree(attached(folder, said), original.states[sound[-1]])
        assert any(f"goes on after step {int(sound[-1][5:])} " in text for text in said), done
    else:
        try:
            attached(folder, said)
            raise AssertionError(f"a training began anew, or from damage: {done}")
        except fs.UsageError as error:
            assert "no checkpoint of" in str(error) and "is sound; nothing was changed" in str(error)
        assert (folder / "metrics.jsonl").read_bytes() == original.files["metrics.jsonl"]
    told = "\n".join(said)
    for name, files in found.items():
        if not sound or name > sound[-1]:
            named(told, folder, name, files, done)
    for name in strange:
        if not sound or name > sound[-1]:
            assert name in told, (done, told)


def named(told, folder, name, files, done):
    """One of the damaged files is named; nothing can be said of a checkpoint that is gone under its name."""
    if files:
        assert any(f"{name}/{file}" in told for file in files), (done, told)


def check_weights(original, folder, done, found, capsys):
    """As `fivestep eval` and `sample` take them: state.safetensors has no part in it."""
    model = job()[0]
    usable = [n for n, files in found.items() if files is not None and not set(files) & set(READ_BY_EVAL)]
    capsys.readouterr()
    try:
        step = load_weights(folder, model, "last")
    except fs.UsageError as error:
        assert not usable and "checkpoint" in str(error), (done, error)
        return
    name = f"step-{step:08}"
    assert usable and name == usable[-1], done
    assert_same_tree(dict(model.state_dict()), dict(original.states[name]["model"]))
    told = capsys.readouterr().err
    for other, files in found.items():
        if other > name:
            named(told, folder, other, [one for one in files or [] if one in READ_BY_EVAL], done)
