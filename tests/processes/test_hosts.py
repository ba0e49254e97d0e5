"""Two hosts, as network namespaces joined by a wire, train as one process; the cut wire is in tests/torture.

Needs Linux, `ip` and the right to make namespaces; skipped where that is missing.
"""

import json

import pytest

from tests.processes import fails
from tests.processes.hosts import launch, said, wired
from tests.processes.launched import killed

pytestmark = [pytest.mark.multiprocess, pytest.mark.slow]


@pytest.mark.parametrize(
    ("rate", "mode", "steps"),
    [(None, "sound", 30), pytest.param("10mbit", "wide", 8, marks=pytest.mark.torture)],  # full for seconds a step
)
def test_two_hosts_train_as_one_process(tmp_path, tmp_path_factory, rate, mode, steps):
    with wired(rate) as hosts:
        both = [launch(host, rank, tmp_path, steps, mode) for rank, host in enumerate(hosts)]
        try:
            for one in both:
                assert one.wait(120) == 0, said(tmp_path)
        finally:
            for one in both:
                killed(one)
    alone = tmp_path_factory.mktemp("alone")
    fails.main(alone, mode, steps)
    made, wanted = (json.loads((folder / "made.json").read_text()) for folder in (tmp_path, alone))
    for (step, loss, count), (_, theirs, theirs_count) in zip(made, wanted, strict=True):
        assert count == theirs_count
        assert loss == pytest.approx(theirs, rel=1e-12), step
