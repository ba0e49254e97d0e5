"""A checkpoint is whole, whoever wrote it: any number of processes goes on from it, in any layout."""

import json
import shutil

import pytest

from tests.processes import goes_on, jobs
from tests.processes.launched import torchrun

pytestmark = pytest.mark.multiprocess
LAYOUTS = [(1, "auto"), (2, "ddp"), (2, "fsdp"), (4, "ddp"), (4, "fsdp"), (1, "fsdp"), (1, "ddp")]


def walked(folder, name, layouts, each=7):
    """The steps of a run that goes on in one layout after another."""
    made = []
    for number, (size, kind) in enumerate(layouts, 1):
        out = folder / "made.json"
        out.unlink(missing_ok=True)
        done = torchrun(size, goes_on.__file__, out, folder / "run", kind, each * number, name)
        assert done.returncode == 0, (size, kind, done.stderr)
        found = json.loads(out.read_text())
        assert found["size"] == size or kind == "auto"
        made += found["steps"]
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
        ("segments", [(2, "ddp"), (4, "fsdp"), (1, "auto")]),
        ("muon", [(1, "auto"), (2, "fsdp"), (2, "ddp")]),
        ("loader", [(4, "ddp"), (1, "fsdp")]),
    ],
)
def test_it_goes_on_in_another_layout(tmp_path, name, layouts):
    theirs = jobs.trained(name, "auto", 7 * len(layouts))["steps"]
    assert_alike(walked(tmp_path, name, layouts), theirs, 1e-5)


@pytest.mark.torture
@pytest.mark.parametrize("name", ["segments", "windows", "digits"])
def test_every_pair_of_layouts(tmp_path, name):
    pairs = [(one, other) for one in LAYOUTS for other in LAYOUTS]
    theirs = jobs.trained(name, "auto", 14)["steps"]
    for pair in pairs:
        assert_alike(walked(tmp_path, name, pair), theirs, 1e-5)
        shutil.rmtree(tmp_path / "run")
