"""Servers to fork lives from, the full forms left out unless asked for, and the counts at the end."""

import pytest

from tests.torture import harness


def pytest_collection_modifyitems(config, items):
    """The full forms run only with `-m torture`, whatever other expression is given."""
    if "torture" in config.option.markexpr:
        return
    full = [item for item in items if item.get_closest_marker("torture")]
    if full:
        config.hook.pytest_deselected(items=full)
        items[:] = [item for item in items if not item.get_closest_marker("torture")]


def pytest_terminal_summary(terminalreporter, config):
    if harness.COUNTS and config.option.markexpr == "torture":
        terminalreporter.section("trials")
        for name, count in sorted(harness.COUNTS.items()):
            terminalreporter.write_line(f"{count:>8,}  {name}")


@pytest.fixture(scope="session")
def pool():
    """Several servers at once, one for each thread of an executor."""
    pool = harness.Pool()
    yield pool
    pool.close()


@pytest.fixture(scope="session")
def wholes(pool, tmp_path_factory):
    """`wholes(name, size)`: the uninterrupted life of a job, lived once."""
    known = {}

    def whole(name, size=1):
        if (name, size) not in known:
            home = tmp_path_factory.mktemp("whole") / f"{name}-{size}"
            known[name, size] = harness.Whole(pool.one(), harness.jobs(size)[name], home)
        return known[name, size]

    return whole
