"""The site builds: every reference between the pages and into the docstrings resolves, and nothing warns."""

import shutil
import subprocess
import sys

import pytest

from tests.docs.pages import ROOT

pytest.importorskip("sphinx", reason="the site needs the extra docs")
pytest.importorskip("myst_parser", reason="the site needs the extra docs")
pytest.importorskip("furo", reason="the site needs the extra docs")


def build(source, out):
    command = [sys.executable, "-m", "sphinx", "-q", "-W", "--keep-going", "-n", source, out]
    return subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=300)


@pytest.mark.slow
@pytest.mark.multiprocess
def test_the_site_builds_without_a_warning(tmp_path):
    done = build(ROOT / "docs", tmp_path / "site")
    assert done.returncode == 0, done.stderr
    site = tmp_path / "site"
    assert "zero_grad" in (site / "loop.html").read_text()
    assert 'id="fivestep.fit"' in (site / "reference.html").read_text()


@pytest.mark.slow
@pytest.mark.multiprocess
def test_dead_references_fail_the_build(tmp_path):
    """A page, an anchor and a Python name that are not there: each is an error."""
    shutil.copy(ROOT / "docs" / "conf.py", tmp_path / "conf.py")
    (tmp_path / "index.md").write_text(
        "# Page\n[a](missing.md) [b](#nowhere)\n\n```{eval-rst}\n:py:func:`fivestep.nothing`\n```\n"
    )
    done = build(tmp_path, tmp_path / "site")
    assert done.returncode == 1
    for dead in ("missing.md", "nowhere", "fivestep.nothing"):
        assert dead in done.stderr
