"""The `data` verb, and training on what it makes."""

import gzip
import json
import os
import sys
from pathlib import Path

import pytest

from fivestep.data.tokens import open_tokens
from fivestep.extras import installing
from tests.run.cli import fivestep  # noqa: F401

QUICK = ("--max-iters", "3", "--sample-tokens", "5", "--device", "cpu", "--eval-every", "3")
LINES = "one line of words\nand another, with é\n" * 60


@pytest.fixture
def text(tmp_path):
    (tmp_path / "text.txt").write_text(LINES, encoding="utf-8")
    return "text.txt"


@pytest.fixture
def made(fivestep, text):  # noqa: F811
    shown = fivestep("data", "make", text, "--tokenizer", "words", "--out", "my.safetensors")
    assert shown.code == 0, shown.err
    return shown


def test_make_says_what_it_made_and_prints_the_path_last(made):
    lines = made.out.splitlines()
    assert lines[-1] == "my.safetensors" and lines[0].startswith("text: text.txt, SHA-256 ")
    assert "tokenizer: words, vocabulary 10" in lines
    train = len(open_tokens(Path("my.safetensors")).splits["train"])
    assert f"train: {train:,} tokens" in lines and any("MB/s" in line for line in lines)


def test_a_file_that_is_replaced_is_named(fivestep, text, made):  # noqa: F811
    assert "replaced" not in made.out
    again = fivestep("data", "make", text, "--tokenizer", "chars", "--out", "my.safetensors")
    assert "replaced: the token file that was my.safetensors before" in again.out.splitlines()
    assert again.out.splitlines()[-1] == "my.safetensors"


@pytest.mark.parametrize("command", [("data", "make", "folder"), ("train", "bigram", "--data", "folder", *QUICK)])
def test_a_folder_says_what_was_read_of_it(fivestep, tmp_path, command):  # noqa: F811
    (tmp_path / "folder" / "sub").mkdir(parents=True)
    (tmp_path / "folder" / "a.txt").write_text(LINES)
    shown = fivestep(*command)
    assert "folder: 1 file\n" in shown.out, shown.err
    (tmp_path / "folder" / "sub" / "b.TXT").write_text(LINES)
    (tmp_path / "folder" / "notes.docx").write_text("no text of ours")
    (tmp_path / "folder" / "sub" / "picture.png").write_bytes(b"\x89")
    shown = fivestep(*command)
    assert "folder: 2 files (2 of another kind left out)\n" in shown.out, shown.err


GPT2 = ("train", "gpt2-124m", "--data", "text.txt")


@pytest.mark.parametrize(
    "command",
    [
        ("data", "make", "text.txt", "--tokenizer", "bpe"),
        ("train", "bigram", "--data", "text.txt", "--tokenizer", "bpe"),
        GPT2,
        (*GPT2, "--dry-run"),
    ],
    ids=" ".join,
)
def test_byte_pairs_without_their_library(fivestep, text, monkeypatch, command):  # noqa: F811
    """Refused in a sentence, before the text is read or a worker starts."""
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    monkeypatch.setattr("fivestep.data.corpus._measured", lambda *_: pytest.fail("the text was read"))
    shown = fivestep(*command)
    sentence = f"byte pairs (--tokenizer bpe) need Hugging Face's tokenizers: {installing('bpe')}"
    assert (shown.code, shown.err, shown.out) == (2, f"fivestep: {sentence}\n", "")
    assert not Path("runs").exists()


@pytest.mark.parametrize(
    ("letters", "flags", "sentence"),
    [
        (3, (), "the training split has 2 tokens, but a window of --block-size 8 needs 9: lower --block-size, or"),
        (
            10,
            (),
            "the val split has 1 token, and needs 2 to have a target: give more text (--data), or change --val-",
        ),
        (20, ("--val-fraction", "0.2", "--test-fraction", "0.05"), "the test split has 1 token, and needs 2"),
        (1, (), "1 characters, too few to cut: train would be empty (--val-fraction, --test-fraction)"),
    ],
)
def test_a_split_that_is_too_short_is_named(fivestep, tmp_path, letters, flags, sentence):  # noqa: F811
    (tmp_path / "short.txt").write_text(("abc" * 20)[:letters])
    shown = fivestep("train", "bigram", "--data", "short.txt", *flags, *QUICK)
    assert shown.code == 2 and sentence in shown.err, shown.err


def test_without_out_it_goes_to_the_cache(fivestep, text):  # noqa: F811
    shown = fivestep("data", "make", text)
    path = Path(shown.out.splitlines()[-1])
    assert path.is_file() and str(path).startswith(os.environ["FIVESTEP_CACHE"])


def test_inspect_shows_the_text_again(fivestep, made):  # noqa: F811
    shown = fivestep("data", "inspect", "my.safetensors")
    assert shown.code == 0
    assert r"head of train: 'one line of words\nand another, with é\none" in shown.out
    assert r"  '\n' (1): 20.0%" in shown.out and "ids: uint8, 600 B" in shown.out


def test_verify_and_a_flipped_bit(fivestep, made):  # noqa: F811
    shown = fivestep("data", "verify", "my.safetensors")
    assert (shown.code, shown.err) == (0, "") and "is sound" in shown.out and "600 ids" in shown.out
    data = bytearray(Path("my.safetensors").read_bytes())
    data[-7] ^= 1
    Path("my.safetensors").write_bytes(data)
    shown = fivestep("data", "verify", "my.safetensors")
    assert shown.code == 2 and shown.out == "" and "is damaged" in shown.err
    shown = fivestep("data", "verify", "missing.safetensors")
    assert shown.code == 2 and "No such file" in shown.err


def test_training_takes_the_file_and_ends_as_on_the_text(fivestep, text, made):  # noqa: F811
    for number, data in enumerate((text, "my.safetensors")):
        shown = fivestep("train", "bigram", "--data", data, "--tokenizer", "words", *QUICK, "--run-dir", f"r{number}")
        assert shown.code == 0, shown.err
    rows = [
        [json.loads(line)["loss"] for line in Path(f"r{n}/metrics.jsonl").read_text().splitlines()] for n in (0, 1)
    ]
    assert rows[0] == rows[1]
    assert Path("r0/tokenizer.json").read_bytes() == Path("r1/tokenizer.json").read_bytes()
    facts = [json.loads(Path(f"r{n}/environment.json").read_text()) for n in (0, 1)]
    assert facts[0]["data_sha256"] == facts[1]["data_sha256"] and facts[1]["data"] == "text.txt"


def test_the_files_own_tokenizer_counts_not_the_flags(fivestep, made):  # noqa: F811
    shown = fivestep("train", "bigram", "--data", "my.safetensors", *QUICK, "--run-dir", "r")
    assert shown.code == 0 and "words, vocabulary 10" in shown.out and "bits/char" not in shown.out
    again = fivestep("train", "r/config.toml", "--run-dir", "again", *QUICK)
    assert again.code == 0, again.err


def test_a_token_file_comes_alone(fivestep, text, made):  # noqa: F811
    shown = fivestep("train", "bigram", "--data", "my.safetensors", "--data", text, *QUICK)
    assert shown.code == 2 and "given alone" in shown.err
    Path("bad.safetensors").write_bytes(b"1234567890")
    shown = fivestep("train", "bigram", "--data", "bad.safetensors", *QUICK)
    assert shown.code == 2 and "bad.safetensors is no token file" in shown.err


def test_a_tokenizer_brought_along(fivestep, text, made):  # noqa: F811
    shown = fivestep("train", "bigram", "--data", text, "--tokenizer", "words", *QUICK, "--run-dir", "first")
    own = "first/tokenizer.json"
    shown = fivestep("train", "bigram", "--data", text, "--tokenizer-file", own, *QUICK, "--run-dir", "second")
    assert shown.code == 0 and "words, vocabulary 10" in shown.out
    assert f'tokenizer_file = "{Path(own).resolve()}"' in Path("second/config.toml").read_text()
    shown = fivestep("data", "make", text, "--tokenizer-file", own, "--out", "again.safetensors")
    assert Path("again.safetensors").read_bytes() == Path("my.safetensors").read_bytes()
    shown = fivestep("data", "make", text, "--tokenizer-file", "no.json")
    assert shown.code == 2 and "no.json cannot be read" in shown.err


def test_training_on_byte_pairs(fivestep, text):  # noqa: F811
    pytest.importorskip("tokenizers", reason="Hugging Face's tokenizers are not installed")
    arguments = ("--tokenizer", "bpe", "--max-vocabulary", "280", *QUICK, "--run-dir", "r")
    shown = fivestep("train", "bigram", "--data", text, *arguments)
    assert shown.code == 0 and "bpe, vocabulary 280" in shown.out, shown.err
    shown = fivestep("sample", "r", "--prompt", "one é", "--max-new-tokens", "5")
    assert shown.code == 0 and shown.out.startswith("one é")


def test_json_lines_with_a_field_of_their_own(fivestep):  # noqa: F811
    records = "".join(json.dumps({"body": f"record {n}"}) + "\n" for n in range(90))
    Path("r.jsonl.gz").write_bytes(gzip.compress(records.encode()))
    shown = fivestep("data", "make", "r.jsonl.gz", "--out", "r.safetensors")
    assert shown.code == 2 and "line 1: it has no text field 'text'" in shown.err and "--text-field" in shown.err
    assert not Path("r.safetensors").exists()
    shown = fivestep("data", "make", "r.jsonl.gz", "--text-field", "body", "--out", "r.safetensors")
    assert shown.code == 0, shown.err
    shown = fivestep("train", "bigram", "--data", "r.jsonl.gz", "--text-field", "body", *QUICK)
    assert shown.code == 0, shown.err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--out", "x.bin"), "--out x.bin must be the name of a .safetensors file"),
        (("--tokenizer", "word"), "did you mean 'words'"),
        (("--workers", "0"), "--workers must be 1 or more"),
        (("--val-fraction", "2"), "val_fraction"),
        (("--tokenizer", "words", "--max-vocabulary", "1"), "--max-vocabulary"),
        (("--out", "text.txt/x.safetensors"), "cannot be written"),
    ],
)
def test_bad_usage_gets_a_sentence(fivestep, text, arguments, message):  # noqa: F811
    shown = fivestep("data", "make", text, *arguments)
    assert shown.code == 2 and message in shown.err and len(shown.err.splitlines()) == 1


def test_an_unknown_verb_gets_a_suggestion(fivestep):  # noqa: F811
    shown = fivestep("data", "verfy", "x")
    assert shown.code == 2 and "did you mean 'verify'" in shown.err
    for verb in ("make", "inspect", "verify"):
        assert "fivestep data" in fivestep("data", verb, "--help").out


def test_training_and_resume_go_on_without_a_cache(fivestep, text, tmp_path, monkeypatch):  # noqa: F811
    (tmp_path / "taken").write_text("a file where the folder of the cache should be")
    weights = []
    for cache, run in (("cache", "runs/with"), ("taken", "runs/without")):
        monkeypatch.setenv("FIVESTEP_CACHE", str(tmp_path / cache))
        done = fivestep("train", "bigram", "--data", text, *QUICK, "--run-dir", run)
        assert done.code == 0, done.err
        assert ("nothing is cached" in done.out + done.err) == (cache == "taken")
        done = fivestep("resume", run, "--max-iters", "6")
        assert done.code == 0, done.err
        weights.append(next(tmp_path.glob(f"{run}/checkpoints/step-00000006*/model.safetensors")).read_bytes())
    assert weights[0] == weights[1]
