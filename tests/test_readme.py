"""What the README shows is so: its Python runs, its commands exist, its names are the package's."""

import re
from pathlib import Path

import torch
from torch import nn

import fivestep as fs
from fivestep.cli import cli
from fivestep.run.config import options, recipes

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


def test_python_blocks_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model = nn.Linear(3, 1)
    loader = [(torch.randn(8, 3), torch.randn(8, 1)) for _ in range(4)]
    names = {
        "model": model,
        "train_loader": loader,
        "val_loader": loader,
        "stream": loader,
        "batch": loader[0],
        "criterion": nn.MSELoss(),
        "optimizer": torch.optim.SGD(model.parameters(), lr=0.01),
    }
    assert blocks("python")
    for block in blocks("python"):
        code = block.replace("max_iters=10_000", "max_iters=8").replace("% 500", "% 4")
        exec(compile(code, "README.md", "exec"), names)  # noqa: S102  (our own page)


def test_commands_exist():
    flags = {option.flag for option in options()} | {p.opts[0] for c in cli.commands.values() for p in c.params}
    lines = [line for block in blocks("sh") for line in block.splitlines() if line.startswith("fivestep ")]
    assert lines
    for line in lines:
        words = line.split("#")[0].split()
        assert words[1] in cli.commands, line
        assert set(re.findall(r"--[a-z-]+", line)) <= flags, line
        if words[1] == "train" and len(words) > 2 and not words[2].startswith("-"):
            assert words[2] in recipes() or words[2].endswith(".toml"), line


def test_every_public_name_is_there():
    for name in fs.__all__:
        assert getattr(fs, name) is not None
        assert name in README or name.endswith("Error") or name in ("State", "warmup_linear"), name
