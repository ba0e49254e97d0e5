"""1, 2 and 4 processes, replicated or in shards, make the same training."""

import json

import pytest

from tests.processes import jobs
from tests.processes.launched import started

pytestmark = pytest.mark.multiprocess
NAMES = [*jobs.JOBS]
EXACT = ("digits", "loader", "masked", "tables", "fused")  # in float64, by SGD


@pytest.fixture(scope="module")
def alone():
    return {name: jobs.trained(name, "auto") for name in NAMES}


@pytest.fixture(scope="module")
def evaluated_alone():
    return jobs.evaluated("auto")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("size", "kind", "names"),
    [
        (2, "ddp", NAMES),
        (2, "fsdp", ["digits", "muon", "segments", "fused"]),
        pytest.param(2, "fsdp", NAMES, marks=pytest.mark.torture),
        pytest.param(4, "ddp", NAMES, marks=pytest.mark.torture),
        pytest.param(4, "fsdp", NAMES, marks=pytest.mark.torture),
    ],
)
def test_the_same_numbers(size, kind, names, alone, evaluated_alone, tmp_path):
    out = tmp_path / "made.json"
    done = started(size, jobs.__file__, out, kind, *names)
    assert done.returncode == 0, done.stderr
    made = json.loads(out.read_text())
    assert made["size"] == size
    for name in names:
        most = 1e-12 if name in EXACT else 1e-5
        ours, theirs = made["jobs"][name], alone[name]
        assert len(ours["steps"]) == len(theirs["steps"]) >= jobs.STEPS  # an epoch's end is told too
        for mine, one in zip(ours["steps"], theirs["steps"], strict=True):
            assert mine[1] == one[1] and mine[3] == one[3], (name, mine, one)
            assert mine[0] == pytest.approx(one[0], rel=most), name
            assert mine[2] == pytest.approx(one[2], rel=10 * most), name
        assert ours["val"].keys() == theirs["val"].keys()
        for key, value in theirs["val"].items():
            wanted = pytest.approx(value, rel=10 * most) if isinstance(value, float) else value
            assert ours["val"][key] == wanted, (name, key)
    for name, wanted in evaluated_alone.items():
        figures = made["evaluated"][name]
        assert figures.keys() == wanted.keys()
        for key, value in wanted.items():
            exact = key in ("count", "accuracy", "of_torch")
            assert figures[key] == (value if exact else pytest.approx(value, rel=1e-12)), (name, key)
