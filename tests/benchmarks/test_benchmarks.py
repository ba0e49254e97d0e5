"""Each benchmark runs (at sizes that mean nothing), and the page says what the files of results say."""

import json
import logging
import math
import runpy
import sys
from pathlib import Path

import pytest

from benchmarks import __main__ as benchmarks
from benchmarks.measure import ROOT, alternate, figure, met, per_step, process_seconds, table
from fivestep.data.corpus import load_corpus

KEYS = {"name", "value", "unit", "baseline", "ratio", "repeats", "spread", "target"}
OTHERS = {"__init__", "__main__", "measure", "jobs"}


def test_every_script_is_on_the_page():
    scripts = {path.stem for path in (ROOT / "benchmarks").glob("*.py")} - OTHERS
    assert scripts == set(benchmarks.there())


def test_the_page_is_what_was_measured():
    """No figure is typed by hand."""
    shown = (ROOT / "docs" / "benchmarks.md").read_text("utf-8")
    assert shown == benchmarks.page(), "run `python -m benchmarks --page`"


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    folder = tmp_path_factory.mktemp("texts")
    (folder / "tinyshakespeare").mkdir()
    (folder / "tinyshakespeare" / "input.txt").write_text(load_corpus("python-manual").splits["train"][:3000])
    return folder


@pytest.mark.slow
@pytest.mark.multiprocess
@pytest.mark.parametrize("name", benchmarks.there())
def test_script(name, texts, monkeypatch, capsys):
    """In this process, for torch is imported here already; what it measures may be processes of its own."""
    monkeypatch.setenv("FIVESTEP_TEXTS", str(texts))
    monkeypatch.setattr(sys, "argv", [name, "--quick", "--json"])
    level = logging.root.manager.disable
    try:
        runpy.run_module(f"benchmarks.{name}", run_name="__main__")
    finally:
        logging.disable(level)
    figures = json.loads(capsys.readouterr().out)
    measured = [one for one in figures if "skipped" not in one]
    assert measured
    for one in figures:
        assert one["name"] and (one.get("skipped") or set(one) >= KEYS), one
    for one in measured:
        least, most = one["spread"]
        middle = one["value"] if one["ratio"] is None else one["ratio"]
        assert math.isfinite(one["value"]) and least <= middle <= most, one
    assert len(table(figures)) == len(figures) + 2


def test_turns_begin_with_another_each_time():
    order = []
    contestants = {name: (lambda name=name: order.append(name) or len(order)) for name in "abc"}
    found = alternate(contestants, 3)
    assert "".join(order) == "abcbcacab"
    assert found == {"a": [1, 6, 8], "b": [2, 4, 9], "c": [3, 5, 7]}


def test_a_ratio_is_taken_within_a_turn():
    """The machine grew four times slower after the first turn: the ratio does not know."""
    one = figure("what", [1.0, 4.0, 4.4], "ms", against=[2.0, 8.0, 8.0], target=0.5, scale=1000)
    assert (one["value"], one["baseline"], one["ratio"]) == (4000, 8000, 0.5)
    assert one["spread"] == [0.5, 0.55]
    assert met(one)
    assert not met(one | {"target": 0.49})


def test_targets_without_a_ratio():
    """A rate is to be at least, anything else at most its target."""
    rate, amount = figure("a", [200.0], "MB/s", target=190), figure("b", [500.0], "MB", target=600)
    assert met(rate)
    assert met(amount)
    assert not met(rate | {"target": 210})
    assert not met(amount | {"target": 400})
    assert met(figure("c", [1.0], "s")) is None


def test_steps_are_timed_from_stamp_to_stamp():
    assert per_step([0.0, 9.0, 10.0, 12.0, 13.0, 99.0], warm=1, steps=5) == pytest.approx(4 / 3)


@pytest.mark.multiprocess
def test_a_process_that_fails_is_no_figure(tmp_path):
    with pytest.raises(Exception, match="exit status 3"):
        process_seconds([sys.executable, "-c", "raise SystemExit(3)"])
    assert process_seconds([sys.executable, "-c", "print(1)"], written=tmp_path / "told") > 0
    assert Path(tmp_path / "told").read_text() == "1\n"


def test_a_section_names_machine_versions_and_what_is_missing(tmp_path, monkeypatch):
    facts = {"date": "2026-01-02", "seconds": 7, "processor": "Abacus", "cores": 2, "threads": "2", "system": "Linux"}
    facts |= {"python": "3.11", "packages": {"torch": "2.13"}, "fivestep": "0.1.0 abc", "gpu": None}
    facts["figures"] = [figure("a wait", [1.0, 2.0, 3.0], "s", against=[2.0, 2.0, 2.0], target=1.2)]
    (tmp_path / "startup.json").write_text(json.dumps(facts))
    monkeypatch.setattr(benchmarks, "RESULTS", tmp_path)
    text = benchmarks.section("startup")
    for told in ("Abacus", "no GPU was at hand", "torch 2.13", "2026-01-02", "`python -m benchmarks.startup`"):
        assert told in text
    assert "| a wait | 2.00 s   | 2.00 s   | 1.00× | 0.500 to 1.50 | 3    | at most 1.20× | met |" in text
    assert "Not measured yet." in benchmarks.section("peers")
