"""`fivestep` alone, `eval`, `runs`, `completion`, the help of `train`, and what a person reads at a run's end."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from click.shell_completion import BashComplete

import fivestep as fs
from fivestep.cli import cli
from fivestep.run import running as running_module
from fivestep.run.checkpoint import sealed
from fivestep.run.config import HEADINGS, description, options, recipes
from fivestep.run.report import find_runs, report, table
from fivestep.run.running import hold, release, running
from fivestep.watch.samples import on_screen
from tests.run.cli import fivestep  # noqa: F401  (a fixture)
from tests.same import assert_same_bits

TEXT = "".join(f"{i} and {i * 7 % 13} make {i + i * 7 % 13}, said the {('cat', 'fox')[i % 2]}.\n" for i in range(400))
BIGRAM = ["train", "bigram", "--data", "text.txt", "--max-iters", "20", "--eval-every", "10"]


@pytest.fixture
def text(tmp_path):
    (tmp_path / "text.txt").write_text(TEXT)


def refused(outcome, *words):
    assert outcome.code == 2, outcome.out + outcome.err
    assert outcome.err.startswith("fivestep: ")
    assert outcome.err.count("\n") == 1
    for word in words:
        assert word in outcome.err


def importable():
    """The environment in which another process finds this package."""
    return {**os.environ, "PYTHONPATH": str(Path(fs.__file__).parents[1])}


# --- what to do ---


def test_alone_it_says_what_to_do_first(fivestep):  # noqa: F811
    out = fivestep().out
    commands = [line.split("  ")[1] for line in out.splitlines() if line.startswith("  fivestep")]
    assert len(commands) == 3
    assert all(command.split()[1] in cli.commands for command in commands)
    assert len(out.splitlines()) < 10


def test_the_help_of_train_teaches(fivestep):  # noqa: F811
    out = fivestep("train", "--help").out
    assert all(len(line) <= 80 for line in out.splitlines())
    headings = [line.rstrip(":") for line in out.splitlines() if line.endswith(":") and not line.startswith(" ")]
    assert headings == ["Recipes", *HEADINGS.values()]
    for name in recipes():
        assert description(name), "a recipe's file begins with a comment that says what it is"
        assert f"  {name}" in out
    for option in options():
        assert f"\n  {option.flag} " in out
    assert "[0.0003]" in out
    assert "\n  fivestep train gpt-chars --data book.txt" in out


def test_headings_name_options_in_their_order():
    names = [option.name for option in options()]
    positions = [names.index(name) for name in HEADINGS]
    assert positions[0] == 0
    assert positions == sorted(positions)


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["evla", "runs/a"], ["did you mean 'eval'"]),
        (["eval"], ["RUN"]),
        (["eval", "run/bigram-1"], ["did you mean 'runs/bigram-1'"]),
        (["eval", "runs/bigram-1", "--split", "vla"], ["'vla'", "--split", "did you mean 'val'"]),
        (["eval", "runs/bigram-1", "--weights", "lats"], ["did you mean 'last'", "--weights"]),
        (["eval", "runs/bigram-1", "--wieghts", "last"], ["--wieghts", "--weights"]),
        (["eval", "runs/bigram-1", "--split", "test"], ["no test split", "train, val"]),
        (["eval", "runs/bigram-1", "--data", "txet.txt"], ["did you mean 'text.txt'"]),
        (["eval", "runs/bigram-1", "--batch-size", "0"], ["--batch-size"]),
        (["eval", "runs/bigram-1", "--device", "cuba"], ["cuba", "--device"]),
        (["runs", "rnus"], ["did you mean 'runs'"]),
        (["runs", "text.txt"], ["text.txt"]),
        (["completion", "bsh"], ["bash, zsh, fish", "did you mean 'bash'"]),
        (["train", "bigram", "--sample-every", "5parsecs"], ["5parsecs", "--sample-every"]),
        (["train", "bigram", "--sample-every", "5", "--sample-tokens", "0"], ["sample_tokens is 0"]),
        (["train", "regression", "--sample-every", "5"], ["writes no text", "--sample-every"]),
        (["train", "bigram", "--data", "text.txt", "--sample-prompt", ""], ["--sample-prompt"]),
        (["train", "bigram", "--data", "text.txt", "--sample-prompt", "Ω"], ["Ω"]),
    ],
)
def test_refused(fivestep, text, tmp_path, arguments, words):  # noqa: F811
    shutil.copytree(trained(), tmp_path / "runs")
    refused(fivestep(*arguments), *words)
    assert len(list(Path("runs").iterdir())) == 1, "nothing half-made is left"


_kept: list[Path] = []


def trained():
    """The runs/ of one small training, made once."""
    return _kept[0]


@pytest.fixture(autouse=True, scope="module")
def kept(tmp_path_factory):
    folder = tmp_path_factory.mktemp("kept")
    (folder / "text.txt").write_text(TEXT)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("FIVESTEP_CACHE", str(folder / "cache"))
        cli.main(BIGRAM, standalone_mode=False)
    _kept.append(folder / "runs")
    yield
    _kept.clear()


# --- eval ---


def test_eval(fivestep, tmp_path):  # noqa: F811
    run = trained() / "bigram-1"
    out = fivestep("eval", run).out
    told = json.loads(fivestep("eval", run, "--json").out)
    assert told["count"] == len(TEXT) - int(0.9 * len(TEXT)) - 1
    assert f"targets     {told['count']:,.0f}" in out
    assert f"loss        {told['loss']:.4f}" in out
    assert f"perplexity  {told['perplexity']:.2f}" in out
    assert f"bits/char   {told['bits_per_char']:.4f}" in out
    whole = {split: json.loads(fivestep("eval", run, "--split", split, "--json").out) for split in ("train", "all")}
    assert whole["train"]["count"] == int(0.9 * len(TEXT)) - 1
    assert whole["all"]["count"] == whole["train"]["count"] + told["count"]
    total = whole["train"]["loss"] * whole["train"]["count"] + told["loss"] * told["count"]
    assert whole["all"]["loss"] == pytest.approx(total / whole["all"]["count"])


def test_eval_on_other_data(fivestep, tmp_path):  # noqa: F811
    run = trained() / "bigram-1"
    (tmp_path / "same.txt").write_text(TEXT)
    told_own = json.loads(fivestep("eval", run, "--json").out)["count"]
    told = json.loads(fivestep("eval", run, "--data", "same.txt", "--json").out)
    own = json.loads(fivestep("eval", run, "--split", "all", "--json").out)
    assert (told["split"], told["loss"], told["count"]) == ("all", own["loss"], own["count"])
    assert "recorded" not in told
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "train.txt").write_text("the cat said the fox")
    (folder / "valid.txt").write_text("the fox and the cat.")
    told = json.loads(fivestep("eval", run, "--data", "folder", "--json").out)
    assert (told["split"], told["count"]) == ("val", 19)
    assert json.loads(fivestep("eval", run, "--batch-size", "7", "--json").out)["count"] == told_own


def test_eval_says_when_the_text_has_changed(fivestep, text):  # noqa: F811
    assert fivestep(*BIGRAM).code == 0
    assert "no longer" not in fivestep("eval", "runs/bigram-1").out
    Path("text.txt").write_text(TEXT[:-100])
    out = fivestep("eval", "runs/bigram-1").out
    assert "text.txt is no longer the text that this run was trained on" in out
    assert "(the same)" not in out
    Path("text.txt").unlink()
    refused(fivestep("eval", "runs/bigram-1"), "does not exist")


# --- runs ---


def test_runs(fivestep, text, monkeypatch):  # noqa: F811
    assert "no runs in runs yet" in fivestep("runs").out
    assert fivestep(*BIGRAM).code == 0
    assert fivestep("train", "regression", "--epochs", "2").code == 0
    out = fivestep("runs").out.splitlines()
    assert len(out) == 3
    assert out[0].split()[:5] == ["run", "recipe", "model", "params", "step"]
    assert "fivestep sample runs/bigram-1" in out[1]
    assert "fivestep eval runs/regression-1" in out[2]
    rows = [json.loads(line) for line in fivestep("runs", "--json").out.splitlines()]
    assert [(row["path"], row["state"], row["step"]) for row in rows] == [
        ("runs/bigram-1", "finished", 20),
        ("runs/regression-1", "finished", rows[1]["step"]),
    ]
    assert rows[0]["parameters"] == sum(p.numel() for p in fs.load("runs/bigram-1").model.parameters())
    assert rows[0]["best_step"] == fs.load("runs/bigram-1").step
    assert fivestep("runs", "runs/bigram-1").out.count("bigram-1") >= 1, "a run's own directory is a list of one"


@pytest.mark.parametrize("width", [40, 80, 120, 200])
def test_the_table_of_runs_fits(width):
    found = find_runs(trained())
    text = report(found, trained(), width)
    lines = text.splitlines()
    assert all(len(line) <= width for line in lines[: len(found) + 1])
    assert "fivestep sample" in text, "the command is there, in the table or below it"
    assert max(map(len, table(found, None).splitlines())) > 80


def test_damaged_and_foreign_directories(fivestep, tmp_path):  # noqa: F811
    shutil.copytree(trained(), tmp_path / "runs")
    runs = Path("runs")
    (runs / "thesis").mkdir()
    (runs / "thesis" / "metrics.txt").write_text("mine")
    (runs / "file").write_text("x")
    (runs / "loop").symlink_to("loop")
    damages = {
        "torn": ("metrics.jsonl", b'{"step": 20, "epoch": 1, "split": "val", "loss": 1.5}\n{"step": 21, "ep'),
        "binary": ("metrics.jsonl", b"\xff\xfe\x00[1]\nnull\n" + b"[" * 100_000 + b'\n{"step": "x", "loss": []}\n'),
        "nan": ("metrics.jsonl", b'{"step": 20, "epoch": 1, "split": "val", "loss": NaN}\n'),
        "toml": ("config.toml", b"model = "),
        "json": ("environment.json", b"[1]"),
        "strange": ("config.toml", b'model = 5\nrecipe = "a\\nb"\n'),
    }
    for name, (file, content) in damages.items():
        shutil.copytree(runs / "bigram-1", runs / name)
        (runs / name / file).write_bytes(content)
    (runs / "bare").mkdir()
    (runs / "bare" / "metrics.jsonl").touch()
    done = fivestep("runs", "--json")
    assert done.code == 0, done.err
    found = {Path(row["path"]).name: row for row in map(json.loads, done.out.splitlines())}
    assert set(found) == {"bigram-1", "bare", *damages}
    assert found["torn"]["step"] == 20
    assert found["torn"]["best_val_loss"] == 1.5
    assert found["nan"]["best_val_loss"] is None
    assert found["binary"]["step"] == 20, "that of its newest checkpoint"
    assert {name for name, row in found.items() if row["state"] == "damaged"} == {"toml", "json"}
    assert fivestep("runs").code == 0


def test_a_running_and_a_killed_run(tmp_path):
    run = tmp_path / "runs" / "bigram-1"
    shutil.copytree(trained() / "bigram-1", run)
    assert running(run) is None
    lock = hold(run)
    assert running(run) == "running"
    assert find_runs(run)[0].state == "running"
    lock.close()  # as the system does for a process that is killed
    assert running(run) == "killed"
    assert find_runs(run)[0].state == "killed"
    left = (run / ".running").read_text()
    release(run, hold(run), untouched=True)  # it was refused before it trained
    assert (run / ".running").read_text() == left
    assert find_runs(run)[0].state == "killed"
    release(run, None)
    assert find_runs(run)[0].state == "finished"


def test_a_lock_that_cannot_be_asked_is_not_an_end(tmp_path, monkeypatch):
    run = tmp_path / "runs" / "bigram-1"
    shutil.copytree(trained() / "bigram-1", run)
    (run / ".running").touch()
    with monkeypatch.context() as patch:
        patch.setattr(running_module, "locked", lambda file, shared=False: False)  # a file system without locks
        assert find_runs(run)[0].state == "unknown"

    def refuse(*arguments, **options):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(running_module, "opened", refuse)
    assert running(run) == "unknown"


def digest(folder):
    """Every name under `folder`, with its content and the time of its last change."""
    return {
        str(path.relative_to(folder)): (path.stat().st_mtime_ns, path.is_file() and path.read_bytes())
        for path in [folder, *sorted(folder.rglob("*"))]
    }


VERBS = [
    ["runs", "runs"],
    ["eval", "runs/one"],
    ["sample", "runs/one", "--max-new-tokens", "3"],
    ["compare", "runs/one", "runs/two"],
    ["resume", "runs/one"],
    ["train", "bigram", "--run-dir", "runs/one"],
    ["train", "bigram", "--run-dir", "runs/one", "--resume"],
    ["explain", "runs/one"],
    ["eject", "runs/one", "--out", "runs/one"],
]


def test_no_command_changes_a_run_of_a_script(fivestep, tmp_path):  # noqa: F811
    model = torch.nn.Linear(2, 1)
    data = [(torch.ones(2, 2), torch.ones(2, 1))] * 3
    with fs.Run("runs/one", say=lambda text: None) as run:
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        fs.fit(model, data, torch.nn.MSELoss(), optimizer, epochs=1, run=run, progress=False)
    shutil.copytree("runs/one", "runs/two")
    before = digest(tmp_path / "runs")
    for verb in VERBS:
        done = fivestep(*verb)
        assert digest(tmp_path / "runs") == before, verb
        assert done.code == (0 if verb[0] in ("runs", "compare") else 2), (verb, done.err)
    for verb in VERBS[4:7]:
        assert "run that script again" in fivestep(*verb).err
    assert "give a recipe, a TOML file or a run of fivestep train" in fivestep("eject", "runs/one").err


def test_readers_change_nothing_while_it_trains_and_after_a_kill(fivestep, text, tmp_path):  # noqa: F811
    shutil.copytree(trained() / "bigram-1", tmp_path / "runs" / "one")
    config = tmp_path / "runs" / "one" / "config.toml"
    config.write_text(config.read_text().replace(str(trained().parent), str(tmp_path)))
    shutil.copytree(tmp_path / "runs" / "one", tmp_path / "runs" / "two")
    lock = hold(tmp_path / "runs" / "one")
    for state in ("running", "killed"):
        before = digest(tmp_path / "runs")
        for verb in VERBS[:4]:
            done = fivestep(*verb)
            assert done.code == 0, done.err
            assert digest(tmp_path / "runs") == before, verb
        assert json.loads(fivestep("runs", "runs/one", "--json").out)["state"] == state
        lock.close()
    assert fivestep("resume", "runs/one", "--max-iters", "1ep").code == 2
    assert digest(tmp_path / "runs") == before


def test_updates_that_were_left_out_are_no_steps(tmp_path):
    run = tmp_path / "runs" / "bigram-1"
    shutil.copytree(trained() / "bigram-1", run)
    row = {"event": "skipped", "message": "left out", "epoch": 9, "step": 21}
    (run / "metrics.jsonl").open("a").write(json.dumps(row) + "\n")
    found = find_runs(run)[0]
    assert (found.step, found.epoch) == (20, find_runs(trained())[0].epoch)


@pytest.mark.parametrize("name", ["-x", "a b", "quiet\x1b]0;owned\x07", "it's", "\u202etxt", "line\nbreak"])
def test_suggested_commands_work_and_show_no_control_character(fivestep, text, name):  # noqa: F811
    Path("runs").mkdir()
    done = fivestep(*BIGRAM, "--run-dir", name, "--sample-tokens", "0")
    assert done.code == 0, done.err
    (line,) = [line for line in done.out.splitlines() if line.startswith("evaluate:")]
    for shown in (done, fivestep("runs", name), fivestep("eval", f"./{name}"), fivestep("eval", f"./{name}/nothing")):
        assert not set(shown.out + shown.err) & set("\x1b\x07\u202e")
    command = line.partition("fivestep ")[2]
    words = subprocess.run(["bash", "-c", f"printf '%s\\0' {command}"], capture_output=True, check=True).stdout
    assert fivestep(*words.decode().split("\0")[:-1]).code == 0


@pytest.mark.multiprocess
def test_runs_imports_no_torch(tmp_path):
    code = "import sys, fivestep.cli as c\ntry: c.main(['runs'])\nexcept SystemExit: pass\n"
    code += "assert 'torch' not in sys.modules and 'numpy' not in sys.modules"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, env=importable()
    )
    assert done.returncode == 0, done.stderr


# --- completion ---


def completed(words, incomplete):
    return [item.value for item in BashComplete(cli, {}, "fivestep", "_X").get_completions(words, incomplete)]


def test_completion_of_recipes_runs_and_values(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(trained(), tmp_path / "runs")
    assert completed([], "ev") == ["eval"]
    (tmp_path / "gpt-mine.toml").touch()
    assert completed(["train"], "gpt-") == ["gpt-chars", "gpt-mine.toml"]
    assert completed(["train"], "other/x") == ["other/x"], "left to the shell, as a file"
    assert completed(["train", "--cell"], "l") == ["lstm"]
    assert completed(["train"], "--max-i") == ["--max-iters"]
    for verb in ("eval", "sample"):
        assert completed([verb], "") == ["runs/bigram-1"]
        assert completed([verb], "runs/b") == ["runs/bigram-1"]
        assert completed([verb], "nowhere/") == ["nowhere/"]
    assert completed(["eval", "runs/bigram-1", "--weights"], "") == ["best", "last"]


def completed_as(words, incomplete):
    """What the shell is told: (kind, value) pairs; `file` and `dir` are left to it."""
    items = BashComplete(cli, {}, "fivestep", "_X").get_completions(words, incomplete)
    return [(item.type, item.value) for item in items]


DATA = (["train", "--data"], ["train", "bigram", "--data"], ["eval", "runs/x", "--data"], ["data", "make"])


@pytest.mark.parametrize("words", [*DATA, ["data", "make", "a.txt"]], ids=" ".join)
def test_completion_of_texts(tmp_path, monkeypatch, words):
    monkeypatch.chdir(tmp_path)
    builtins = [("plain", "python-manual"), ("plain", "python-stdlib")]
    assert completed_as(words, "") == builtins
    for incomplete in ("mi", "folder/mi", "~/mi"):
        assert completed_as(words, incomplete) == [("file", incomplete)], "left to the shell"
    (tmp_path / "python-mine.txt").touch(), (tmp_path / "pages").mkdir(), (tmp_path / ".hidden").touch()
    assert completed_as(words, "python-m") == [builtins[0], ("plain", "python-mine.txt")]
    assert completed_as(words, "p") == [*builtins, ("plain", "pages/"), ("plain", "python-mine.txt")]
    assert completed_as(words, "") == completed_as(words, "p")


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("file", ["train", "--tokenizer-file"]),
        ("file", ["data", "make", "x.txt", "--tokenizer-file"]),
        ("file", ["data", "make", "--out"]),
        ("file", ["data", "inspect"]),
        ("dir", ["train", "--run-dir"]),
        ("dir", ["runs"]),
    ],
    ids=lambda value: value if isinstance(value, str) else " ".join(value),
)
def test_completion_of_files_and_directories_is_left_to_the_shell(kind, words):
    for incomplete in ("", "a", "a/b"):
        assert completed_as(words, incomplete) == [(kind, incomplete)]


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_scripts(fivestep, shell, tmp_path):  # noqa: F811
    done = fivestep("completion", shell)
    assert done.code == 0, done.err
    assert f"_FIVESTEP_COMPLETE={shell}_complete" in done.out
    if shell == "bash" and shutil.which("bash"):
        asked = "COMP_WORDS=(fivestep train digi); COMP_CWORD=2; _fivestep_completion fivestep; echo ${COMPREPLY[@]}"
        command = tmp_path / "bin" / "fivestep"  # the script asks the command itself, wherever PATH has it
        command.parent.mkdir()
        command.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m fivestep "$@"\n')
        command.chmod(0o755)
        environment = importable()
        environment["PATH"] = f"{command.parent}{os.pathsep}{environment['PATH']}"
        answer = subprocess.run(
            ["bash", "-c", f"{done.out}\n{asked}"], text=True, capture_output=True, env=environment
        )
        assert answer.stdout.strip() == "digits", answer.stderr


def test_the_shell_is_answered(fivestep, monkeypatch):  # noqa: F811
    for name, value in (("_FIVESTEP_COMPLETE", "bash_complete"), ("COMP_WORDS", "fivestep tr"), ("COMP_CWORD", "1")):
        monkeypatch.setenv(name, value)
    assert fivestep().out == "plain,train\n"


# --- samples along the way, and the end ---


def test_samples_along_the_way(fivestep, text):  # noqa: F811
    options = ["--sample-every", "6", "--sample-prompt", "the ", "--sample-tokens", "30"]
    arguments = [*BIGRAM, "--eval-every", "20", "--learning-rate", "0.5"]
    assert fivestep(*arguments, *options).code == 0
    assert fivestep(*arguments).code == 0
    names = sorted(path.name for path in Path("runs/bigram-1/samples").iterdir())
    assert names == [f"step-{step:08}.txt" for step in (6, 12, 18, 20)]
    samples = [Path("runs/bigram-1/samples", name).read_text() for name in names]
    assert all(sample.startswith("the ") and len(sample) == 34 for sample in samples)
    assert len(set(samples)) > 1
    watched, quiet = (fs.load(f"runs/bigram-{n}", "last").model for n in (1, 2))
    assert_same_bits(watched, quiet)


def test_samples_do_not_disturb_dropout(fivestep, text):  # noqa: F811
    options = ["--n-layer", "1", "--n-embd", "8", "--n-head", "2", "--dropout", "0.3", "--max-iters", "6"]
    arguments = ["train", "gpt-chars", "--data", "text.txt", *options]
    assert fivestep(*arguments, "--sample-every", "1", "--sample-tokens", "5").code == 0
    assert fivestep(*arguments).code == 0
    assert_same_bits(*(fs.load(f"runs/gpt-chars-{n}", "last").model for n in (1, 2)))


def test_a_long_sample_is_short_on_the_screen(fivestep, tmp_path):  # noqa: F811
    (tmp_path / "text.txt").write_text("ab\n\n\n\n" * 400)
    done = fivestep(*BIGRAM, "--max-iters", "300", "--learning-rate", "0.5", "--sample-tokens", "500")
    (kept,) = Path("runs/bigram-1/samples").iterdir()
    shown = done.out.split("best weights", 1)[1].split("\nrun: ", 1)[0].split("\n\n", 1)[1]
    assert "\n\n\n" in kept.read_text() and "\n\n\n" not in shown
    assert kept.read_text().count("a") > 60, "the file is whole"
    *lines, last = shown.strip("\n").splitlines()
    assert last == f"... (whole in {kept})" and len(lines) == 20


def test_a_short_sample_is_shown_whole():
    assert on_screen("\n one\n\n \n\ntwo\n" + "x\n" * 17, Path("kept")) == "one\n\ntwo" + "\nx" * 17
    assert on_screen("x\n" * 21, Path("kept")) == "x\n" * 20 + "... (whole in kept)"


# --- what is no trained run ---


@pytest.mark.parametrize("verb", ["sample", "eval"])
def test_what_is_no_trained_run_is_told_apart(fivestep, tmp_path, verb):  # noqa: F811
    nothing = fivestep(verb, "elsewhere/quite")
    assert (nothing.code, nothing.err) == (2, "fivestep: elsewhere/quite does not exist\n")
    shutil.copytree(trained(), tmp_path / "runs")
    assert fivestep(verb, "quite-another").err == "fivestep: quite-another does not exist; there is runs/bigram-1\n"
    shutil.copytree("runs/bigram-1", "runs/two")
    shutil.copytree("runs/bigram-1", "runs/without", ignore=shutil.ignore_patterns("checkpoints"))
    (tmp_path / "folder").mkdir()
    here = fivestep(verb, "folder")
    assert here.err == (
        "fivestep: folder is not a run of fivestep train: it has no config.toml; there are runs/bigram-1, runs/two\n"
    ), "each once, and only those with weights"
    near = fivestep(verb, "runs/bigram-2")
    assert near.err == "fivestep: runs/bigram-2 does not exist; did you mean 'runs/bigram-1'?\n"
    with fs.Run("runs/mine"):
        pass
    mine = fivestep(verb, "runs/mine")
    assert mine.code == 2
    assert mine.err == ("fivestep: runs/mine was made from Python (fs.Run): load its weights with fs.load_weights\n")


@pytest.mark.parametrize("verb", ["sample", "eval"])
def test_threads(fivestep, text, verb, monkeypatch):  # noqa: F811
    used = []
    monkeypatch.setattr("torch.set_num_threads", used.append)
    assert fivestep(*BIGRAM, "--threads", "3").code == 0
    assert fivestep(verb, "runs/bigram-1").code == 0
    assert fivestep(verb, "runs/bigram-1", "--threads", "2").code == 0
    assert used == [3, 3, 2], "the run's own, if not given"
    assert fivestep(verb, "runs/bigram-1", "--threads", "0").code == 2


def test_the_end_says_how_to_go_on(fivestep, text):  # noqa: F811
    out = fivestep(*BIGRAM, "--test-fraction", "0.1").out
    assert "best weights: those of step 20" in out
    assert "with these: test " in out
    for command in ("fivestep sample runs/bigram-1", "fivestep eval runs/bigram-1", "fivestep runs"):
        assert command in out
        assert fivestep(*command.split()[1:]).code == 0


@pytest.fixture
def pressed(monkeypatch):
    """Ctrl-C at step 7."""
    from fivestep.run.run import Run

    keep = Run.keep

    def pressing(self, state):
        if state.clock.step == 7:
            signal.raise_signal(signal.SIGINT)
        keep(self, state)

    monkeypatch.setattr(Run, "keep", pressing)


def test_after_ctrl_c_the_commands_are_printed(fivestep, text, pressed):  # noqa: F811
    done = fivestep(*BIGRAM)
    assert done.code == 130
    assert "the state of step 7 is saved in runs/bigram-1\ngo on:     fivestep resume runs/bigram-1\n" in done.out
    assert "fivestep eval runs/bigram-1 --weights last" in done.out
    assert "[y/N]" not in done.out, "no terminal, no question"
    told = fivestep("eval", "runs/bigram-1", "--weights", "last")
    assert "(step 7)" in told.out
    assert fivestep("sample", "runs/bigram-1").code == 0
    listed = json.loads(fivestep("runs", "--json").out)
    assert (listed["state"], listed["next"]) == ("interrupted", "fivestep resume runs/bigram-1")


@pytest.mark.parametrize("answer", ["y", "", KeyboardInterrupt, EOFError])
def test_after_ctrl_c_on_a_terminal_the_evaluation_is_offered(fivestep, text, pressed, monkeypatch, answer):  # noqa: F811
    asked = []

    def answering(question):
        asked.append(question)
        if not isinstance(answer, str):
            raise answer
        return answer

    monkeypatch.setattr("builtins.input", answering)
    monkeypatch.setattr(sys.stdin, "isatty", lambda: True, raising=False)
    monkeypatch.setenv("TTY_INTERACTIVE", "1")
    monkeypatch.setenv("FORCE_COLOR", "1")  # rich takes the output for a terminal
    done = fivestep(*BIGRAM)
    assert done.code == 130
    assert len(asked) == 1
    assert "[y/N]" in asked[0]
    shown = [line for line in done.out.splitlines() if line.startswith("val ")]
    assert len(shown) == (answer == "y")
    assert ("\n\ngo on: " in done.out) == (not isinstance(answer, str)), "the line with ^C on it is ended"
    if answer == "y":
        figures = fs.load("runs/bigram-1", "last")
        assert figures.step == 7
        monkeypatch.delenv("FORCE_COLOR")
        loss = json.loads(fivestep("eval", "runs/bigram-1", "--weights", "last", "--json").out)["loss"]
        assert shown[0].startswith(f"val {loss:.4f}, perplexity ")


def test_what_was_just_validated_is_not_offered(fivestep, text, pressed, monkeypatch):  # noqa: F811
    monkeypatch.setattr("builtins.input", lambda question: pytest.fail(question))
    monkeypatch.setattr(sys.stdin, "isatty", lambda: True, raising=False)
    monkeypatch.setenv("TTY_INTERACTIVE", "1")
    monkeypatch.setenv("FORCE_COLOR", "1")
    done = fivestep(*BIGRAM, "--eval-every", "7")
    assert done.code == 130 and "the state of step 7 is saved" in done.out


@pytest.mark.multiprocess
@pytest.mark.skipif(not shutil.which("bash"), reason="the pipe is the shell's")
def test_a_broken_pipe_is_quiet():
    command = f'"{sys.executable}" -m fivestep runs "{trained()}" | true; exit ${{PIPESTATUS[0]}}'
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, env=importable())
    assert (done.returncode, done.stderr) == (1, "")


# --- what a run's state is ---


@pytest.mark.parametrize(("left", "words"), [("running", "still training"), ("killed", "killed"), (None, "it ended")])
def test_without_a_checkpoint_the_reason_is_the_true_one(fivestep, tmp_path, left, words):  # noqa: F811
    run = tmp_path / "one"
    shutil.copytree(trained() / "bigram-1", run, ignore=shutil.ignore_patterns("step-*"))
    lock = hold(run) if left else None
    if left == "killed":
        lock.close()
    for verb in (["eval", "one"], ["sample", "one"], ["export", "one", "--out", "new"]):
        refused(fivestep(*verb), "holds no checkpoint", words)
    if left == "running":
        release(run, lock)


def test_what_was_never_validated_is_not_called_best(fivestep, text):  # noqa: F811
    run = ["train", "bigram", "--data", "text.txt", "--max-iters", "4", "--eval-every", "2", "--run-dir", "one"]
    assert fivestep(*run).code == 0
    for path in Path("one/checkpoints").glob("*/manifest.json"):
        manifest = {name: value for name, value in json.loads(path.read_text()).items() if name != "seal"}
        path.write_bytes(sealed({**manifest, "val_loss": None}))
    assert "one, last weights" in fivestep("eval", "one").out
    assert "new: the last weights" in fivestep("export", "one", "--out", "new").out
    assert "new, last weights" in fivestep("eval", "new").out


@pytest.mark.parametrize("file", ["environment.json", "config.toml"])
def test_a_run_that_lacks_a_file_is_damaged(fivestep, tmp_path, file):  # noqa: F811
    run = tmp_path / "one"
    shutil.copytree(trained() / "bigram-1", run)
    if file == "config.toml":
        (run / file).write_text("")
    else:
        (run / file).unlink()
    hold(run).close()  # killed, too
    assert (find_runs(run)[0].state, find_runs(run)[0].next) == ("damaged", "")


def test_a_missing_tokenizer_is_named(fivestep, tmp_path):  # noqa: F811
    shutil.copytree(trained() / "bigram-1", tmp_path / "one")
    (tmp_path / "one/tokenizer.json").unlink()
    for verb in ("eval", "sample"):
        refused(fivestep(verb, "one"), "one/tokenizer.json is missing")


def test_a_directory_that_cannot_be_written_is_refused(fivestep, tmp_path, monkeypatch):  # noqa: F811
    run = tmp_path / "one"
    shutil.copytree(trained() / "bigram-1", run)

    def denied(path):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("fivestep.run.run.hold", denied)
    refused(
        fivestep("resume", "one", "--data", trained().parent / "text.txt"), "cannot write in one: Permission denied"
    )
