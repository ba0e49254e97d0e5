"""A run of the command line that goes on with changed settings: flags, edited files, data that moved or changed."""

import json
from pathlib import Path

import pytest

from fivestep.data.tokens import open_tokens
from fivestep.run.difference import difference
from fivestep.run.metrics import read_rows
from tests.run.cli import fivestep  # noqa: F401  (a fixture)

TEXT = "".join("abcdefgh ijkl\n"[(i * i + i // 7) % 14] for i in range(4000))
SMALL = ["--batch-size", 4, "--block-size", 16, "--sample-tokens", 0, "--threads", 1]


@pytest.fixture
def begun(fivestep):  # noqa: F811
    """A run of 6 steps in `r`, on my.txt."""
    Path("my.txt").write_text(TEXT)
    done = fivestep("train", "bigram", "--data", "my.txt", *SMALL, "--max-iters", 6, "--run-dir", "r")
    assert done.code == 0, done.err
    return fivestep


def files():
    return {path: path.read_bytes() for path in Path("r").rglob("*") if path.is_file() and path.name != ".running"}


def changed():
    return [row["changes"] for row in read_rows(Path("r/metrics.jsonl")) if row.get("event") == "changed"]


def test_a_flag_of_resume_is_a_wish(begun):
    done = begun("resume", "r", "--learning-rate", "1e-2", "--batch-size", 6, "--max-iters", 9)
    assert done.code == 0, done.err
    (event,) = changed()
    assert event["lr"] == [3e-4, 1e-2]
    assert event["batch_size"] == [4, 6]
    assert read_rows(Path("r/metrics.jsonl"))[-2]["lr"] == 1e-2
    assert "learning_rate = 0.01\n" in Path("r/config.toml").read_text()
    assert begun("resume", "r", "--max-iters", 12).code == 0
    assert len(changed()) == 1
    done = begun("resume", "r")
    assert "already ended at step 12, so nothing was trained" in done.out + done.err


@pytest.mark.parametrize("option", ["learning_rate", "batch_size", "dropout", "label_smoothing"])
def test_an_edited_configuration_is_named_and_taken_by_a_wish(begun, option):
    config = Path("r/config.toml")
    old = next(line for line in config.read_text().splitlines() if line.startswith(f"{option} = "))
    new = f"{option} = 2" if option == "batch_size" else f"{option} = 0.25"
    config.write_text(config.read_text().replace(old, new))
    before = files()
    done = begun("resume", "r", "--max-iters", 9)
    assert done.code == 2
    first = old.split(" = ")[1]
    assert f"{new}, but the run in r started with {first}. Set it back to {first} (--" in done.err
    assert "--adopt-changes to continue with " in done.err and "--run-dir" not in done.err
    assert files() == before
    assert begun("resume", "r", "--max-iters", 9, "--adopt-changes").code == 0
    assert {"learning_rate": "lr"}.get(option, option) in changed()[0]
    assert begun("resume", "r", "--max-iters", 10).code == 0


def test_an_edit_that_would_make_another_model_is_refused_by_all_verbs(begun):
    done = begun("train", "gpt-chars", "--data", "my.txt", *SMALL, "--max-iters", 2, "--n-layer", 1, "--n-embd", 8,
                 "--n-head", 2, "--run-dir", "g")  # fmt: skip
    assert done.code == 0, done.err
    config = Path("g/config.toml")
    config.write_text(config.read_text().replace("n_head = 2", "n_head = 4"))  # of the same shapes
    for verb in (["sample", "g"], ["resume", "g", "--adopt-changes"], ["eval", "g"]):
        done = begun(*verb)
        assert done.code == 2, verb
        assert "n_head = 4" in done.err
        if verb[0] == "resume":  # which has neither --n-head nor --run-dir
            assert "Set it back to 2 (in config.toml, or --n-head with `fivestep train`)" in done.err
            assert "--run-dir" not in done.err


def test_a_resume_with_another_recipe_names_no_flag(begun):
    done = begun("train", "gpt-chars", "--data", "my.txt", *SMALL, "--max-iters", 9, "--run-dir", "r", "--resume")
    assert done.code == 2
    assert "started with 'bigram', and a resume cannot change it. Set it back to 'bigram'" in done.err
    assert "--recipe" not in done.err


def test_train_resume_with_other_flags_needs_a_wish(begun):
    job = ["train", "bigram", "--data", "my.txt", *SMALL, "--max-iters", 9, "--run-dir", "r", "--resume"]
    done = begun(*job, "--weight-decay", 0.5)
    assert done.code == 2
    assert "weight_decay = 0.5" in done.err
    assert begun(*job, "--weight-decay", 0.5, "--adopt-changes").code == 0
    assert changed()[0] == {"weight_decay": [0.01, 0.5]}


def test_data_that_moved_goes_on(begun):
    whole = begun("train", "bigram", "--data", "my.txt", *SMALL, "--max-iters", 12, "--run-dir", "whole")
    assert whole.code == 0
    Path("b").mkdir()
    Path("my.txt").rename("b/my.txt")
    done = begun("resume", "r", "--max-iters", 12)
    assert done.code == 2
    assert "--data" in done.err
    done = begun("resume", "r", "--max-iters", 12, "--data", "b/my.txt")
    assert done.code == 0, done.err
    assert "the data has moved" in done.out + done.err
    assert "step 12: weights" not in (difference(Path("whole"), Path("r")) or "")
    weights = [sorted(Path(run).glob("checkpoints/step-00000012*/model.safetensors"))[-1] for run in ("whole", "r")]
    assert weights[0].read_bytes() == weights[1].read_bytes()
    assert begun("resume", "r", "--max-iters", 13).code == 0  # the new place is remembered


def test_other_text_is_refused_or_taken_with_the_runs_tokenizer(begun):
    Path("my.txt").write_text(TEXT.replace("h", "g"))
    done = begun("resume", "r", "--max-iters", 9)
    assert done.code == 2
    assert "--tokenizer-file r/tokenizer.json" in done.err
    again = ["resume", "r", "--max-iters", 9, "--tokenizer-file", "r/tokenizer.json"]
    done = begun(*again)
    assert done.code == 2
    assert "--adopt-changes" in done.err
    done = begun(*again, "--adopt-changes")
    assert done.code == 0, done.err
    assert "content" in changed()[0]


@pytest.mark.parametrize("kind", ["file", "shards", "cache"])
def test_a_token_file_that_is_written_over_is_named(fivestep, monkeypatch, kind):  # noqa: F811
    monkeypatch.setenv("FIVESTEP_CACHE", str(Path("cache").absolute()))
    Path("my.txt").write_text(TEXT)
    source = {"file": "t.safetensors", "shards": "t", "cache": "my.txt"}[kind]
    if kind != "cache":
        size = ["--shard-size", "1000tok"] if kind == "shards" else []
        assert fivestep("data", "make", "my.txt", "--out", source, *size).code == 0
    done = fivestep("train", "bigram", "--data", source, *SMALL, "--max-iters", 6, "--run-dir", "r")
    assert done.code == 0, done.err
    file = sorted(
        Path().glob({"file": source, "shards": "t/*.safetensors", "cache": "cache/**/*.safetensors"}[kind])
    )[0]
    content = file.read_bytes()
    assert len(open_tokens(file).splits) >= 1
    with file.open("r+b") as over:
        over.seek(len(content) - 200)
        over.write(b"\1\0" * 100)
    done = fivestep("resume", "r", "--max-iters", 9)
    assert done.code == 2
    assert f"{file.name} is damaged" in done.err
    file.write_bytes(content)  # sound again, at another time
    assert fivestep("resume", "r", "--max-iters", 9).code == 0


def test_an_edited_tokenizer_is_named(begun):
    file = Path("r/tokenizer.json")
    text = file.read_text()
    file.write_text(text.replace('"a"', '"?"').replace('"e"', '"a"').replace('"?"', '"e"'))
    for verb in (["sample", "r"], ["eval", "r"], ["resume", "r", "--max-iters", 9]):
        done = begun(*verb)
        assert done.code == 2, verb
        assert "tokenizer.json is not the tokenizer that the run was trained with" in done.err


def test_a_run_of_an_earlier_version_goes_on(begun):
    path = Path("r/environment.json")
    facts = json.loads(path.read_text())
    path.write_text(json.dumps({name: facts[name] for name in facts if name not in ("settings", "token_files")}))
    assert begun("resume", "r", "--max-iters", 9).code == 0
    assert json.loads(path.read_text()).keys() == facts.keys()


@pytest.mark.parametrize("flags", [("--learning-rate", 0.5), ("--max-iters", 6, "--learning-rate", 0.5)])
def test_a_resume_that_trains_nothing_keeps_the_record(begun, flags):
    before = files()
    done = begun("resume", "r", *flags)
    assert (done.code, "nothing was trained" in done.out + done.err) == (0, True), done.err
    assert files() == before
    assert begun("resume", "r", "--max-iters", 7, "--learning-rate", 0.5).code == 0
    assert changed()[0]["lr"] == [3e-4, 0.5] and "learning_rate = 0.5\n" in Path("r/config.toml").read_text()


@pytest.mark.parametrize("limit", [("--max-iters", "2"), ("--until", "3"), ("--until", "8smp")])
def test_a_limit_below_the_step_that_was_reached_is_refused(begun, limit):
    before = files()
    done = begun("resume", "r", *limit)
    assert done.code == 2 and done.err.count("\n") == 1, done.out + done.err
    assert "is below " in done.err and limit[0] in done.err
    assert files() == before
