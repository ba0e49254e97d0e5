"""Each example runs as it stands, in a process of its own."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = sorted((Path(__file__).parents[1] / "examples").glob("*.py"))


@pytest.mark.slow
@pytest.mark.multiprocess
@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.stem)
def test_example(example, tmp_path):
    if example.stem == "digits":
        pytest.importorskip("sklearn", reason="the digits come with scikit-learn")
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, example], capture_output=True, text=True, cwd=tmp_path, env=environment, timeout=120
    )
    assert done.returncode == 0, done.stderr
    last = {
        "regression": "validation loss 0.0",
        "digits": "accuracy",
        "own_loop": "tensor(",
        "words": "validation perplexity",
    }[example.stem]
    assert last in done.stdout
    if example.stem == "digits":
        assert float(re.findall(r"'accuracy': ([\d.]+)", done.stdout)[-1]) >= 0.97
