"""A checkpoint is whole, whoever wrote it: any number of processes goes on from it, in any layout."""

import itertools
import json
import shutil

import pytest

from tests.processes import goes_on, jobs
from tests.processes.launched import started

pytestmark = pytest.mark.multiprocess
LAYOUTS = [(1, "auto"), (1, "fsdp"), (1, "ddp"), (2, "ddp"), (2, "fsdp"), (4, "ddp"), (4, "fsdp")]


def made_by(size, name, steps, tasks):
    """What the tasks of one launch have made: the steps of each, by where they were written."""
    told = json.dumps([[str(out), str(run), kind] for out, run, kind in tasks])
    done = started(size, goes_on.__file__, name, steps, told, timeout=600)
    assert done.returncode == 0, (size, tasks, done.stderr)
    found = {out: json.loads(out.read_text()) for out, _, _ in tasks}
    assert all(one["size"] == size for one in found.values())
    return {out: one["steps"] for out, one in found.items()}


def walked(folder, name, layouts, each=7):
    """The steps of a run that goes on in one layout after another."""
    made = []
    for number, (size, kind) in enumerate(layouts, 1):
        out = folder / f"made-{number}"
        made += made_by(size, name, each * number, [(out, folder / "run", kind)])[out]
    return made


def assert_alike(made, theirs, most):
    unique = {one[3]: one for one in made}  # by samples: an epoch's end is told twice
    wanted = {one[3]: one for one in theirs}
    assert unique.keys() == wanted.keys()
    for samples, one in wanted.items():
        assert unique[samples][1] == one[1]
        assert unique[samples][0] == pytest.approx(one[0], rel=most)
        assert unique[samples][2] == pytest.approx(one[2], rel=10 * most)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "layouts"),
    [
        pytest.param("segments", [(2, "ddp"), (4, "fsdp"), (1, "auto")], marks=pytest.mark.torture),
        pytest.param("muon", [(1, "auto"), (2, "fsdp"), (2, "ddp")], marks=pytest.mark.torture),
        ("loader", [(2, "ddp"), (1, "fsdp")]),
    ],
)
def test_it_goes_on_in_another_layout(tmp_path, name, layouts):
    theirs = jobs.trained(name, "auto", 7 * len(layouts))["steps"]
    assert_alike(walked(tmp_path, name, layouts), theirs, 1e-5)


@pytest.mark.torture
@pytest.mark.parametrize("name", ["segments", "windows", "digits"])
def test_every_pair_of_layouts(tmp_path, name):
    """A launch makes all that its number of processes makes: 49 pairs in six launches."""
    theirs, first = jobs.trained(name, "auto", 14)["steps"], {}
    for size in (1, 2, 4):  # "auto" is the first: alone it makes no group, and those after it do
        made = made_by(size, name, 7, [(tmp_path / f"{n}-{k}", tmp_path / f"run-{n}-{k}", k) for n, k in of(size)])
        first |= {out.name: steps for out, steps in made.items()}
    for one, size in itertools.product(first, (1, 2, 4)):
        for n, kind in of(size):
            shutil.copytree(tmp_path / f"run-{one}", tmp_path / f"run-{one}-{n}-{kind}")
    for size in (1, 2, 4):
        tasks = [
            (tmp_path / f"{one}-{n}-{kind}", tmp_path / f"run-{one}-{n}-{kind}", kind)
            for n, kind in of(size)
            for one in first
        ]
        for out, steps in made_by(size, name, 14, tasks).items():
            one = next(one for one in first if out.name.startswith(f"{one}-"))
            assert steps[0][3] > first[one][-1][3], f"{out.name} went on"
            assert_alike(first[one] + steps, theirs, 1e-5)


def of(size):
    """The layouts of so many processes."""
    return [one for one in LAYOUTS if one[0] == size]
