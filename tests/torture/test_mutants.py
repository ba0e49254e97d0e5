"""The tests can fail: with each single safety taken out of a copy of the source, one of them must."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import fivestep
from tests.torture import harness
from tests.torture.mutants import MUTANTS

SOURCE = Path(fivestep.__file__).parent


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: f"{mutant[0]}: {mutant[1].strip()[:50]}")
def test_the_list_is_up_to_date(mutant):
    file, text, instead, _ = mutant
    content = (SOURCE / file).read_text()
    assert content.count(text) == 1
    compile(content.replace(text, instead), file, "exec")


@pytest.mark.torture
@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: f"{mutant[0]}: {mutant[1].strip()[:50]}")
def test_full_a_test_fails(mutant, tmp_path):
    file, text, instead, tests = mutant
    shutil.copytree(SOURCE, tmp_path / "src" / "fivestep", ignore=shutil.ignore_patterns("__pycache__"))
    changed = tmp_path / "src" / "fivestep" / file
    changed.write_text(changed.read_text().replace(text, instead))
    paths = [str(tmp_path / "src"), str(harness.ROOT), os.environ.get("PYTHONPATH", "")]
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-x", "-q", "--basetemp", str(tmp_path / "temp"), *tests.split()],
        cwd=harness.ROOT,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
        capture_output=True,
        text=True,
        timeout=600,
    )
    harness.COUNTS["mutants"] += 1
    assert run.returncode == 1, f"no test fails without it:\n{run.stdout[-1500:]}{run.stderr[-500:]}"
    assert " failed" in run.stdout or "FAILED" in run.stdout or "ERROR" in run.stdout, run.stdout[-1500:]
