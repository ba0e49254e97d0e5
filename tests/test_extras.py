"""The hint on a missing extra is a command that installs it: of a checkout, or by the package's name."""

import json
import sys
from importlib import metadata
from types import SimpleNamespace

import pytest

from fivestep.extras import installing


@pytest.fixture
def came_from(monkeypatch, tmp_path):
    """`came_from(origin)`: the package was installed from there, into .venv of an empty current directory."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / ".venv" / "bin").mkdir(parents=True)
    (tmp_path / ".venv" / "bin" / "pip").touch()
    monkeypatch.setattr(sys, "executable", str(tmp_path / ".venv" / "bin" / "python"))
    monkeypatch.setattr(sys, "prefix", str(tmp_path / ".venv"))
    monkeypatch.setattr(sys, "base_prefix", "/usr")

    def come(origin):
        text = None if origin is None else json.dumps(origin)
        monkeypatch.setattr(metadata, "distribution", lambda name: SimpleNamespace(read_text=lambda file: text))

    return come


def test_a_checkout(came_from, tmp_path, monkeypatch):
    (tmp_path / "pyproject.toml").touch()
    came_from({"url": tmp_path.as_uri(), "dir_info": {"editable": True}})
    assert installing("plot") == ".venv/bin/pip install -e '.[plot]'"
    (tmp_path / "else where").mkdir()
    monkeypatch.chdir(tmp_path / "else where")
    assert installing("plot") == f"{tmp_path}/.venv/bin/pip install -e '{tmp_path}[plot]'"


def test_installed_from_a_folder_but_not_editable(came_from, tmp_path, monkeypatch):
    (tmp_path / "a clone").mkdir()
    (tmp_path / "a clone" / "pyproject.toml").touch()
    came_from({"url": (tmp_path / "a clone").as_uri(), "dir_info": {}})
    assert installing("bpe") == ".venv/bin/pip install 'a clone[bpe]'"
    monkeypatch.setattr(sys, "prefix", "/usr")
    assert installing("bpe") == "pip install 'a clone[bpe]'", "outside of a virtual environment"


@pytest.mark.parametrize("origin", [None, {"url": "file:///gone", "dir_info": {"editable": True}}, {"url": "x"}])
def test_by_its_name(came_from, origin):
    came_from(origin)
    assert installing("plot") == ".venv/bin/pip install 'fivestep[plot]'"


def test_not_installed_at_all(monkeypatch):
    def missing(name):
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "distribution", missing)
    assert installing("plot").endswith("pip install 'fivestep[plot]'")
