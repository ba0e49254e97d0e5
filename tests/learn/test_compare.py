"""`fivestep compare`: what differs is told, losses are paired at equal places, and --exact names the step."""

import json
import re
import sys
import xml.etree.ElementTree as ElementTree
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from torch import nn

import fivestep as fs
from fivestep.errors import UsageError
from fivestep.extras import installing
from fivestep.learn import parting
from fivestep.learn.compare import compare, flat, in_lines, interpolated, read_side
from fivestep.learn.curves import Scale, page, path_of
from fivestep.run.config import load_config
from fivestep.run.trace import TRACE
from tests.run.cli import fivestep  # noqa: F401

TINY = ("bigram", "--batch-size", 4, "--n-embd", 8, "--sample-tokens", 0, "--graph", "off", "--threads", 1)


def write_run(folder, rows, config=None, facts=None):
    """A run's directory with these files."""
    folder.mkdir()
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    (folder / "metrics.jsonl").write_text("".join(f"{line}\n" for line in lines))
    if config is not None:
        (folder / "config.toml").write_text(
            "".join(f"{name} = {json.dumps(value)}\n" for name, value in config.items())
        )
    if facts is not None:
        (folder / "environment.json").write_text(json.dumps(facts))
    return folder


def row(step, loss, split="train", seconds=None, **more):
    return {"step": step, "epoch": 1, "split": split, "loss": loss, "elapsed_seconds": seconds or step / 10, **more}


def both(tmp_path, left, right, **files):
    return write_run(tmp_path / "a", left, **files), write_run(tmp_path / "b", right, **files)


# --- losses at equal places ---


def test_losses_are_paired_at_the_last_place_that_all_reached(tmp_path):
    """Worked out by hand: step 150 is half way between b's rows of 100 and 200; seconds and tokens alike."""
    a = [row(50, 4.0, tokens=500, steps=50), row(150, 3.0, tokens=1500, steps=100, seconds=30.0)]
    b = [row(100, 2.0, tokens=2000, steps=100, seconds=10.0), row(200, 1.0, tokens=4000, steps=100, seconds=40.0)]
    found = compare(both(tmp_path, a, b))
    assert {(pair.split, pair.axis): (pair.at, pair.losses) for pair in found.pairs} == {
        ("train", "step"): (150.0, [3.0, 1.5]),
        ("train", "seconds"): (30.0, [3.0, pytest.approx(4 / 3)]),
    }  # no tokens in common: a ends at 1,500 and b begins at 2,000, and nothing is extrapolated
    assert found.pairs[0].differences == [0.0, -1.5]


def test_a_validation_knows_its_tokens_from_the_row_beside_it(tmp_path):
    a = [
        row(10, 3.0, tokens=100, steps=10),
        row(10, 2.5, "val"),
        row(20, 2.0, tokens=200, steps=10),
        row(20, 1.5, "val"),
    ]
    b = [row(5, 3.0, tokens=150, steps=5), row(5, 2.0, "val")]
    pairs = {(pair.split, pair.axis): (pair.at, pair.losses) for pair in compare(both(tmp_path, a, b)).pairs}
    assert pairs["val", "tokens"] == (150.0, [2.0, 2.0])
    assert ("val", "step") not in pairs  # b has step 5 alone, and a begins at 10


def test_an_epochs_own_mean_is_no_point_of_the_curve(tmp_path):
    """A real training that logs within its epochs: the epoch's row tells steps again that were told."""
    torch.manual_seed(0)
    model, data = nn.Linear(2, 1), [(torch.randn(4, 2), torch.randn(4, 1)) for _ in range(5)]
    with fs.Run(tmp_path / "a") as run:
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        history = fs.fit(model, data, nn.MSELoss(), optimizer, epochs=2, log_every=2, run=run, progress=False)
    steps = [point.at["step"] for point in read_side("A", tmp_path / "a").curves["train"]]
    assert steps == [2, 4, 6, 8, 10] and len(history) > len(steps)
    assert read_side("A", tmp_path / "a").curves["train"][0].at["samples"] == 8  # the rows tell


def test_not_finite(tmp_path):
    """A diverged run is shown as it is, its best is of its finite losses, and JSON stays JSON."""
    a = [row(1, 3.0, "val"), row(2, float("nan"), "val")]
    b = [row(1, 2.0, "val"), row(2, 1.0, "val")]
    found = compare(both(tmp_path, a, b))
    assert found.sides[0].best.loss == 3.0
    assert "nan" in "\n".join(in_lines(found, None))
    paired = json.loads(json.dumps(found.as_json(), allow_nan=False))["paired"]
    assert paired[0]["losses"] == [None, 1.0] and paired[0]["differences"] == [None, None]
    assert "NaN" not in page(found) and "nan" not in page(found).split("</pre>")[1]


def test_interpolation():
    curve = [(0.0, 4.0), (10.0, 2.0), (20.0, 3.0)]
    assert [interpolated(curve, at) for at in (0, 2.5, 10, 15, 20)] == [4.0, 3.5, 2.0, 2.5, 3.0]


# --- configurations and machines ---


def test_only_what_differs(tmp_path):
    one, other = tmp_path / "a", tmp_path / "b"
    facts = {"threads": 2, "platform": "x", "versions": {"torch": "2.12", "numpy": "2.4"}, "data_sha256": "ab" * 32}
    write_run(one, [row(1, 3.0)], {"seed": 1, "n_layer": 2, "data": ["my.txt"]}, facts)
    changed = {**facts, "platform": "y", "versions": {"torch": "2.13", "numpy": "2.4"}, "data_sha256": "cd" * 32}
    write_run(other, [row(1, 3.0)], {"seed": 1, "n_layer": 4, "data": ["my.txt"], "ema": 0.9}, changed)
    found = compare([one, other])
    assert found.config == {"n_layer": [2, 4], "ema": [None, 0.9]}
    assert found.facts == {"versions.torch": ["2.12", "2.13"], "data_sha256": ["ab" * 32, "cd" * 32]}
    text = "\n".join(in_lines(found, None))
    assert re.search(r"n_layer +2  4\nema +-  0.9\n", text)
    assert "abababababab..." in text and "ab" * 32 not in text
    assert "the data differ" in text and "equal bits are not to be expected" in text


def test_three_runs_and_a_narrow_terminal(tmp_path):
    runs = [
        write_run(tmp_path / f"a-run-with-a-long-name-{n}", [row(5, n / 2, "val")], {"seed": n}) for n in range(3)
    ]
    found = compare(runs)
    assert found.config == {"seed": [0, 1, 2]}
    assert found.pairs[0].differences == [0.0, 0.5, 1.0]
    lines = in_lines(found, 60)
    assert max(map(len, lines)) <= 60 and any("B - A" in line and "C - A" in line for line in lines)


def test_equal_losses_are_called_equal(tmp_path):
    found = compare(both(tmp_path, [row(1, 0.1)], [row(1, 0.1)]))
    assert "0, equal" in "\n".join(in_lines(found, None))
    assert flat({"a": {"b": {"c": 1}}, "d": 2}) == {"a.b.c": 1, "d": 2}


def test_runs_that_differ_in_time_alone_are_called_equal(tmp_path):
    """At equal seconds the slower run's loss is another one, which says nothing of what was trained."""
    told = [(step, 4.0 - step / 10) for step in (10, 20)]
    fast = [row(step, loss, seconds=step / 10, tokens_per_second=2.0, lr=0.1) for step, loss in told]
    slow = [row(step, loss, seconds=step / 5, tokens_per_second=1.0, lr=0.1) for step, loss in told]
    fast, slow = ([*rows, row(20, float("nan"), "val", seconds=5.0)] for rows in (fast, slow))
    found = compare(both(tmp_path, fast, slow))
    text = "\n".join(in_lines(found, None))
    assert found.equal and found.as_json()["equal"]
    assert "all figures of all rows are equal (3); only time differs: A 5 s, B 5 s" in text
    assert any(pair.axis == "seconds" for pair in found.pairs) and " s  " not in text.split("\nloss")[1]
    (tmp_path / "b" / "metrics.jsonl").write_text(
        "".join(json.dumps({**one, "lr": 0.2} if "lr" in one else one) + "\n" for one in slow)
    )
    other = compare([tmp_path / "a", tmp_path / "b"])
    assert not other.equal and "train after 2 s" in "\n".join(in_lines(other, None))


# --- damaged and foreign directories ---


def test_damaged_files_are_noted_and_gone_around(tmp_path):
    one = write_run(
        tmp_path / "a", ["{broken", row(1, 3.0), '{"step": true}', '{"step": 2, "split": "train", "loss": "x"}']
    )
    other = write_run(tmp_path / "b", [])
    (one / "config.toml").write_text("seed = ")
    (one / "environment.json").write_text("[1]")
    found = compare([one, other])
    assert [len(side.curves["train"]) for side in found.sides] == [1, 0]
    assert found.pairs == []
    for note in (
        "A: its config.toml is damaged",
        "A: its environment.json holds no table",
        "A: it was never validated",
        "B: it has no config.toml: a script made it",
        "B: it has no loss yet",
    ):
        assert any(text.startswith(note) for text in found.notes), note
    assert "losses cannot be compared" in "\n".join(in_lines(found, 80))
    assert "<svg" in page(found)


def test_refused(tmp_path, fivestep):  # noqa: F811
    a, b = both(tmp_path, [row(1, 3.0)], [row(1, 2.0)])
    (tmp_path / "empty").mkdir()
    for arguments, sentence in (
        ((a,), "two runs or more"),
        ((a, a), "given twice"),
        ((a, tmp_path / "c"), "does not exist"),
        ((a, a / "metrics.jsonl"), "is a file, and no run's directory"),
        ((a, tmp_path / "empty"), "is no run's directory"),
        ((a, tmp_path), "is no run but holds some; give them: fivestep compare"),
        ((a, b, "--out", "x.pdf"), "must end in .html"),
        ((a, b, "--out", "none/x.html"), "there is no directory none"),
        ((a, b, tmp_path / "c", "--exact"), "--exact compares two runs"),
    ):
        done = fivestep("compare", *arguments)
        assert done.code == 2 and sentence in done.err and done.out == "", (arguments, done)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b", "empty"]


def test_nothing_of_a_run_is_changed(tmp_path, fivestep):  # noqa: F811
    runs = both(tmp_path, [row(1, 3.0), row(2, 2.0)], [row(1, 2.0), row(2, 2.0)])
    before = {path: (path.read_bytes(), path.stat().st_mtime_ns) for run in runs for path in run.iterdir()}
    fivestep("compare", *runs, "--exact", "--out", "page.html")
    assert {path: (path.read_bytes(), path.stat().st_mtime_ns) for run in runs for path in run.iterdir()} == before


# --- pictures ---


def test_the_page_stands_alone(tmp_path, fivestep):  # noqa: F811
    """Well-formed SVG, a chart for each axis, a path for each curve; not one thing from outside, no script."""
    a = [
        row(10, 4.0, tokens=100, steps=10),
        row(10, 3.9, "val"),
        row(20, 2.0, tokens=200, steps=10),
        row(20, 1.9, "val"),
    ]
    runs = both(tmp_path, a, [{**one, "loss": one["loss"] + 1} for one in a])
    assert fivestep("compare", *runs, "--out", "page.html").code == 0
    text = Path("page.html").read_text("utf-8")
    assert not re.search(r"<script|<link|<img|https?:|url\((?!#)|@import", text)
    charts = re.findall(r"<svg.*?</svg>", text, re.DOTALL)
    assert len(charts) == 3  # steps, tokens, seconds
    for chart in charts:
        root = ElementTree.fromstring(chart)
        titles = [title.text for title in root.iter("title")]
        assert titles == ["A val", "A train", "B val", "B train"]
        assert all("nan" not in path.get("d") and path.get("d").startswith("M") for path in root.iter("path"))
    assert "1.9000" in text and "+1" in text


def test_a_run_names_cannot_write_into_the_page(tmp_path):
    one = write_run(tmp_path / "<b>&x", [row(1, 3.0)])
    other = write_run(tmp_path / "b", [row(1, 3.0)])
    assert "<b>" not in page(compare([one, other])).replace("<body>", "")


def test_scale_and_path():
    scale = Scale(0.0, 1000.0, 0.0, 100.0)
    assert [scale(value) for value in (0, 500, 1000)] == [0.0, 50.0, 100.0]
    assert scale.ticks(5) == [0, 200, 400, 600, 800, 1000]
    assert Scale(2.0, 2.0, 0.0, 1.0).ticks(5)  # one value alone has a scale too
    assert path_of([(0, 1), (1, float("nan")), (2, 3), (3, 4)]) == "M0.0 1.0h0M2.0 3.0h0L3.0 4.0"


def test_curves_in_the_terminal(tmp_path, fivestep):  # noqa: F811
    pytest.importorskip("plotext", reason="curves in a terminal need the extra plot")
    rows = [row(step, 4 - step / 10, "val") for step in range(1, 20)]
    runs = both(tmp_path, rows, [{**one, "loss": one["loss"] - 1} for one in rows])
    done = fivestep("compare", *runs)
    assert done.code == 0 and "val loss over steps" in done.out and "\x1b" not in done.out
    assert len(re.findall("A", done.out.split("val loss over steps")[1])) > 10
    assert max(map(len, done.out[done.out.index("val loss over steps") :].splitlines())) <= 80


def test_without_the_extra(tmp_path, fivestep, monkeypatch):  # noqa: F811
    monkeypatch.setitem(sys.modules, "plotext", None)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    runs = both(tmp_path, [row(1, 3.0), row(2, 2.0)], [row(1, 3.0), row(2, 2.5)])
    done = fivestep("compare", *runs)
    assert done.code == 0 and installing("plot") in done.out and "train at step 2" in done.out
    done = fivestep("compare", *runs, "--out", "x.png")
    assert done.code == 2 and installing("plot") in done.err and not Path("x.png").exists()


@pytest.mark.skipif(find_spec("matplotlib") is None, reason="PNG needs the extra plot")
def test_png(tmp_path, fivestep):  # noqa: F811
    runs = both(tmp_path, [row(1, 3.0, "val"), row(2, 2.0, "val")], [row(1, 3.0), row(2, float("inf"))])
    assert fivestep("compare", *runs, "--out", "x.png").code == 0
    assert Path("x.png").read_bytes().startswith(b"\x89PNG\r\n")


# --- the step at which two runs part ---


def train(fivestep, name, *flags):  # noqa: F811
    done = fivestep("train", *TINY, "--run-dir", name, *flags)
    assert done.code == 0, done.err
    return Path(name).absolute()


AT = 200  # the character that is changed; a window of step 13 is the first that holds it


@pytest.fixture
def twins(fivestep, tmp_path):  # noqa: F811
    """Two bigrams of 24 steps on texts that differ in one character, which one batch reads; rows every 8 steps."""
    text = ("the quick brown fox jumps over the lazy dog. " * 40)[:1500]
    (tmp_path / "one.txt").write_text(text)
    (tmp_path / "other.txt").write_text(text[:AT] + ("z" if text[AT] != "z" else "q") + text[AT + 1 :])
    same = ("--max-iters", 24, "--log-every", 8, "--eval-every", 8, "--block-size", 8, "--keep-last", 5)
    return [
        train(fivestep, name, "--data", f"{name}.txt", *same, "--checkpoint-every", 8) for name in ("one", "other")
    ]


def parting_step(path, until=24):
    """The first step whose batch is another one, by drawing the windows as the runs did."""
    from fivestep.run.build import build_job

    config = load_config(str(path / "config.toml"), {})
    other = load_config(str(path.parent / "other" / "config.toml"), {})
    batches = [iter(build_job(one).data.train.epoch(0, 0)) for one in (config, other)]
    for step in range(1, until + 1):
        (xa, ya), (xb, yb) = next(batches[0]), next(batches[1])
        if not (torch.equal(xa, xb) and torch.equal(ya, yb)):
            return step
    return None


def test_exact_finds_the_one_changed_batch(twins, fivestep):  # noqa: F811
    one, other = twins
    step = parting_step(one)
    assert step == 13  # neither at a row nor at a checkpoint
    done = fivestep("compare", "--exact", one, other)
    assert done.code == 1
    assert f"they part at step {step}\n" in done.out
    assert re.search(rf"step {step}: the same items, [\d, .]+, with other contents", done.out)
    assert "both are trained again from step" in done.err
    found = json.loads(fivestep("compare", "--exact", "--json", one, other).out)["exact"]
    assert (found["parted"], found["step"], found["after"], found["what"]) == (True, step, step - 1, "batch")


def test_exact_goes_on_from_the_last_equal_checkpoint(twins, monkeypatch):
    one, other = twins
    step, began = parting_step(one), []
    again = parting.again
    monkeypatch.setattr(parting, "again", lambda *how: (began.append(how[3:]), again(*how)))
    parting.parting(one, other, say=lambda text: None)
    assert began == [((step // 8) * 8, (step // 8 + 1) * 8)] * 2


@pytest.mark.parametrize(
    "flags, step, what, text",
    [
        (("--seed", 2), 0, "start", "they begin from others; the configurations differ in seed"),
        (
            ("--weight-decay", 0.5),
            1,
            "update",
            "the update is another one; the configurations differ in weight_decay",
        ),
        (("--warmup-iters", 3), 1, "update", "the learning rate of the update is"),
        (("--schedule", "wsd", "--decay-iters", 5), 9, "update", "the learning rate"),
        (("--label-smoothing", 0.1), 1, "loss", "the configurations differ in label_smoothing"),
        (("--ema", 0.9), 12, "update", "the weights after it are equal; average is in one state only"),
    ],
)
def test_exact_tells_what_parts(fivestep, tmp_path, flags, step, what, text):  # noqa: F811
    same = ("--max-iters", 12, "--data", "python-manual")
    one, other = train(fivestep, "a", *same), train(fivestep, "b", *same, *flags)
    found = parting.parting(one, other, say=lambda text: None)
    assert (found.step, found.what) == (step, what)
    assert text in found.texts[-1]


def test_a_program_is_named_where_only_rounding_parts():
    on, off = (load_config("bigram", {"graph": graph}) for graph in ("on", "off"))
    assert parting.unlike_options(on, off) == (
        "the configurations differ in graph (a step by program equals an eager one to rounding)"
    )
    assert parting.unlike_options(on, on) == ""
    found = parting.First(3, "update", "step 3: another update", "a setting")
    assert found.told(parting.unlike_options(on, off)).startswith("step 3: another update; the configurations")
    assert found.told() == "step 3: another update: a setting"


def test_runs_that_do_not_part(fivestep, tmp_path):  # noqa: F811
    """One was interrupted and rows are spaced otherwise; nothing that was trained differs."""
    one = train(fivestep, "a", "--max-iters", 12, "--eval-every", 4, "--log-every", 2)
    other = train(fivestep, "b", "--max-iters", 12, "--eval-every", 6, "--log-every", 2)
    done = fivestep("compare", "--exact", one, other)
    assert done.code == 0 and "they do not part: equal up to step 12" in done.out


def by_script(path, changed, **how):
    """A training that no command can repeat; `changed` is the batch with a number of its own."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Dropout(0.1), nn.Linear(4, 1))
    data = [(torch.randn(8, 3), torch.randn(8, 1)) for _ in range(20)]
    if changed is not None:
        data[changed][0][0, 0] += 1e-3
    with fs.Run(path, **how) as run:
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
        fs.fit(model, data, nn.MSELoss(), optimizer, epochs=1, log_every=5, run=run, progress=False)
    return path


def test_a_script_with_a_trace(tmp_path):
    one, other = by_script(tmp_path / "a", None, trace=True), by_script(tmp_path / "b", 12, trace=True)
    found = parting.parting(one, other, say=pytest.fail)  # nothing is trained again
    assert (found.parted, found.step, found.what) == (True, 13, "batch")


def test_a_script_without_a_trace_gives_the_interval(tmp_path):
    one, other = by_script(tmp_path / "a", None), by_script(tmp_path / "b", 12)
    found = parting.parting(one, other, say=pytest.fail)
    assert (found.parted, found.after, found.by, found.step) == (True, 10, 15, None)
    lines = parting.in_lines(found)
    assert lines[0] == "they part after step 10, at step 15 at the latest"
    assert "trace=True" in lines[-1]


def test_dropout_drawn_otherwise(tmp_path):
    """Other random states alone are nothing; where a loss differs with them, they are named."""
    one, other = by_script(tmp_path / "a", None, trace=True), tmp_path / "b"
    lines = [json.loads(line) for line in (one / TRACE).read_text().splitlines()]
    other.mkdir()
    for line in lines:
        line["random"] = "0" * 64
    assert parting.first_difference([*map(json.loads, (one / TRACE).read_text().splitlines())], lines) is None
    lines[6]["loss"] = (1.5).hex()
    found = parting.first_difference([*map(json.loads, (one / TRACE).read_text().splitlines())], lines)
    assert (found.step, found.what) == (7, "random state")


def test_what_is_trained_again_must_be_the_run_itself(twins):
    """A run whose own rows do not come again: the interval is told, and no step is claimed."""
    one, other = twins
    rows = [json.loads(line) for line in (one / "metrics.jsonl").read_text().splitlines()]
    step = parting_step(one)
    for this in rows:
        if this["step"] > step:
            this["loss"] += 1e-9
    (one / "metrics.jsonl").write_text("".join(json.dumps(this) + "\n" for this in rows))
    found = parting.parting(one, other, say=lambda text: None)
    assert found.parted and found.step is None
    assert "one does not give its own figures" in found.texts[-1]


def test_data_that_is_gone(twins):
    one, other = twins
    (one.parent / "other.txt").unlink()
    found = parting.parting(one, other, say=lambda text: None)
    assert found.step is None and "training other again fails" in found.texts[-1]


def test_a_damaged_checkpoint_is_passed_over(twins):
    one, other = twins
    for folder in sorted((one / "checkpoints").iterdir())[1:]:
        file = folder / "state.safetensors"
        file.write_bytes(b"x" + file.read_bytes()[1:])
    found = parting.parting(one, other, say=lambda text: None)
    assert found.parted and found.step == parting_step(one)


def test_a_checkpoint_that_is_pruned_meanwhile_is_said_to_be_gone(twins, tmp_path):
    one, _ = twins
    with pytest.raises(parting.AgainError, match="the checkpoint of step 7 of one is gone"):
        parting.again(one, parting.configuration(one), tmp_path / "A", 7, 9)


def test_another_batch_says_how_many_items_it_has():
    line = {"step": 1, "weights": "a", "items": [[1, 2, 3, 4, 5]], "batches": "b"}
    other = {**line, "items": [[1, 2, 3, 4, 5, 6]], "batches": "c"}
    assert "1, 2, 3, 4, ... (5) and 1, 2, 3, 4, ... (6)" in parting.first_difference([line], [other]).text


def test_no_run(tmp_path):
    with pytest.raises(UsageError, match="is no run"):
        (tmp_path / "a").mkdir()
        compare([tmp_path / "a", tmp_path / "a"])
