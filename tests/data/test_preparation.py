import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from fivestep.data import corpus as corpora
from fivestep.data import preparation as module
from fivestep.data import worker
from fivestep.data.corpus import load_corpus
from fivestep.data.preparation import fitted, tokenized, write_corpus
from fivestep.data.tokenizer import CharTokenizer, build_tokenizer
from fivestep.data.tokens import open_tokens, verify_tokens
from fivestep.errors import FivestepError, UsageError

LINES = "the cat's  sat\n\nthe <unk>\tdög\u00a0sat 12,345\nthe end é\n  " * 40 + "a last line, rare words: zebra 🙂 "
KINDS = [("chars", {}), ("chars", {"max_vocabulary": 9}), ("bytes", {}), ("words", {}), ("words", {"min_count": 2})]


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_bytes(LINES.encode())
    return str(path)


def made(text, folder, kind, workers=1, **options):
    corpus = load_corpus(text, 0.2, 0.1)
    tokenizer = fitted(corpus, kind, **options, cache_dir=folder, workers=workers)
    return corpus, tokenizer, write_corpus(folder / "t.safetensors", corpus, tokenizer, workers=workers)


@pytest.mark.parametrize("size", [3, 20, 10**6])
@pytest.mark.parametrize(("kind", "options"), [*KINDS, ("bpe", {"max_vocabulary": 300})])
def test_blocks_give_what_the_whole_text_gives(tmp_path, monkeypatch, text, size, kind, options):
    if kind == "bpe":
        pytest.importorskip("tokenizers", reason="Hugging Face's tokenizers are not installed")
    monkeypatch.setattr(corpora, "BLOCK", size)
    monkeypatch.setattr(corpora, "MAX_BLOCK", 10**6)
    corpus, tokenizer, tokens = made(text, tmp_path, kind, **options)
    splits = corpus.splits
    whole = build_tokenizer(kind, splits["train"], **options, other_texts=[splits["val"], splits["test"]])
    assert tokenizer.fingerprint == whole.fingerprint
    for split, part in splits.items():
        assert np.array_equal(tokens.splits[split], whole.encode(part))
        assert tokens.unknown[split] == whole.count_unknown(whole.encode(part))


TRICKY = (
    "a\r\nb\0 \ufeff\u00e9\u0301 \u4e2d\u6587\U0001f642\n\n\x85x\u2028 <eos> <unk>\x1c\u3000\uffff\U0010ffff "
    + "long" * 9
)


def plain(kind, splits):
    """The vocabulary and the ids of each split, in the plainest way; words have `<unk>`, and lines end in `<eos>`."""
    if kind == "bytes":
        return None, {split: list(text.encode()) for split, text in splits.items()}
    if kind == "chars":
        tokens, vocabulary = splits, sorted(set(splits["train"]))
        vocabulary += ["<unk>"] if set("".join(splits.values())) - set(vocabulary) else []
    else:
        tokens = {split: (text + "\n").replace("\n", " <eos> ").split() for split, text in splits.items()}
        tokens = {
            split: words if splits[split].rpartition("\n")[2].split() else words[:-1]
            for split, words in tokens.items()
        }
        common = Counter(word for word in tokens["train"] if word not in ("<unk>", "<eos>")).most_common()
        vocabulary = ["<unk>", "<eos>", *(word for word, _ in common)]
    ids = {token: id_ for id_, token in enumerate(vocabulary)}
    return vocabulary, {split: [ids.get(t, ids.get("<unk>")) for t in part] for split, part in tokens.items()}


@pytest.mark.parametrize("workers", [1, pytest.param(2, marks=pytest.mark.multiprocess)])
@pytest.mark.parametrize("piece", [1, 7, 1000])
@pytest.mark.parametrize("kind", ["chars", "bytes", "words"])
def test_files_hold_what_the_plain_definitions_say(tmp_path, monkeypatch, kind, piece, workers):
    monkeypatch.setattr("fivestep.data.sources.PIECE_BYTES", piece)
    monkeypatch.setattr(corpora, "BLOCK", 50)
    draw = random.Random(0)
    path = tmp_path / "tricky.txt"
    content = "".join("".join(draw.sample(TRICKY, 30)) + " and " + TRICKY for _ in range(30)) + "\nend\n"
    path.write_bytes(b"\xef\xbb\xbf" + content.encode())
    corpus, tokenizer, tokens = made(str(path), tmp_path, kind, workers)
    assert "".join(corpus.splits.values()) == content
    vocabulary, ids = plain(kind, corpus.splits)
    assert vocabulary is None or tokenizer.vocabulary == vocabulary
    assert {split: part.tolist() for split, part in tokens.splits.items()} == ids
    assert verify_tokens(tokens.path).metadata["source"] == corpus.digest


@pytest.mark.multiprocess
@pytest.mark.parametrize(("kind", "options"), [("chars", {}), ("words", {}), ("bpe", {"max_vocabulary": 300})])
def test_workers_give_the_same_file(tmp_path, monkeypatch, text, kind, options):
    if kind == "bpe":
        pytest.importorskip("tokenizers", reason="Hugging Face's tokenizers are not installed")
    monkeypatch.setattr(corpora, "BLOCK", 300)
    files = []
    for workers in (1, 2):
        folder = tmp_path / str(workers)
        files.append(made(text, folder, kind, workers, **options)[2].path.read_bytes())
    assert files[0] == files[1]


def test_small_texts_start_no_process(tmp_path, monkeypatch, text):
    monkeypatch.setattr(subprocess, "Popen", lambda *_, **__: pytest.fail("a process was started"))
    corpus = load_corpus(text)
    for kind in ("chars", "words", "bytes"):
        tokenized(corpus, fitted(corpus, kind, cache_dir=tmp_path / "c"), tmp_path / "c")
    monkeypatch.setattr(module, "LARGE", 10)
    monkeypatch.setattr(worker, "default_workers", lambda: 2)
    with pytest.raises(pytest.fail.Exception):
        fitted(corpus, "words", cache_dir=tmp_path / "d")


@pytest.mark.multiprocess
def test_what_a_worker_refuses_or_dies_of_is_said(text, tmp_path, monkeypatch):
    corpus = load_corpus(text)
    with pytest.raises(UsageError, match="not among the 2 characters"):
        write_corpus(tmp_path / "t.safetensors", corpus, CharTokenizer(["a", "b"]), workers=2)
    assert [entry.name for entry in tmp_path.iterdir()] == ["text.txt"]
    monkeypatch.setattr(worker, "learnable", iter)  # which refuses such words on this side
    for blocks in (["x" * 200_000], ["x" * 200_000] * 20):  # heard at the end, and while more is sent
        with pytest.raises(UsageError, match="in which no word ends"):
            worker.learned(iter(blocks), 1, 300, beside=True)
    monkeypatch.setattr(worker.sys, "executable", "/bin/false")
    with pytest.raises(FivestepError, match="ended early, with code 1"):
        fitted(corpus, "words", cache_dir=tmp_path / "c", workers=2)


def test_a_fitted_tokenizer_of_a_large_text_is_kept(tmp_path, monkeypatch, text):
    monkeypatch.setattr(module, "LARGE", 10)
    corpus, cache = load_corpus(text), tmp_path / "cache"
    first = fitted(corpus, "words", cache_dir=cache, workers=1)
    (kept,) = cache.iterdir()
    with monkeypatch.context() as patch:
        patch.setattr(module, "_counted", lambda *_: pytest.fail("counted again"))
        assert fitted(corpus, "words", cache_dir=cache).fingerprint == first.fingerprint
    sound = kept.read_bytes()
    for damaged in (sound[:-5], b"{}", sound.replace(b'"end"', b'"enb"')):
        kept.write_bytes(damaged)
        assert fitted(corpus, "words", cache_dir=cache, workers=1).fingerprint == first.fingerprint
    assert fitted(corpus, "words", min_count=50, cache_dir=cache, workers=1).vocab_size < first.vocab_size
    Path(text).write_text("one more word\n" + LINES)
    assert "word" in fitted(load_corpus(text), "words", cache_dir=cache, workers=1).vocabulary


def test_progress_is_told_in_bytes(tmp_path, text):
    told = []
    corpus = load_corpus(text, report=lambda *progress: told.append(progress))
    tokenizer = fitted(corpus, "words", cache_dir=tmp_path, report=lambda *progress: told.append(progress))
    write_corpus(tmp_path / "t.safetensors", corpus, tokenizer, report=lambda *progress: told.append(progress))
    size = len(LINES.encode())
    assert {stage: (done, total) for stage, done, total in told} == dict.fromkeys(
        ("reading", "counting", "encoding"), (size, size)
    )


def started(folder, *more):
    """A preparation in a process of its own, once it is in the middle of writing; its part, and its children."""
    command = [sys.executable, "-m", "fivestep", "data", "make", "big.txt", "--tokenizer", "words", *more]
    process = subprocess.Popen([*command, "--out", "t.safetensors"], cwd=folder, stderr=subprocess.DEVNULL)
    end = time.monotonic() + 300
    while time.monotonic() < end and process.poll() is None:
        parts = list(folder.glob(".t.safetensors.*.part"))
        if parts and parts[0].stat().st_size > 100_000:
            children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
            return process, parts[0], [int(pid) for pid in children.read_text().split()] if children.exists() else []
        time.sleep(0.005)
    raise AssertionError("it never came to the middle")


def gone(pid):
    """Whether a process has ended, perhaps without having been waited for."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return True


@pytest.mark.multiprocess
@pytest.mark.parametrize("sent", [signal.SIGKILL, signal.SIGINT])
@pytest.mark.parametrize("workers", ["1", "2"])
def test_an_interrupted_preparation_leaves_the_old_file_and_no_process(tmp_path, sent, workers):
    (tmp_path / "big.txt").write_text("some words and more of them, all alike\n" * 150_000)
    (tmp_path / "small.txt").write_text("a b c d " * 100)
    corpus = load_corpus(str(tmp_path / "small.txt"))
    write_corpus(tmp_path / "t.safetensors", corpus, fitted(corpus, "words"))
    old = (tmp_path / "t.safetensors").read_bytes()
    process, part, children = started(tmp_path, "--workers", workers)
    os.kill(process.pid, sent)
    assert process.wait(300) == (-9 if sent == signal.SIGKILL else 130)
    assert (tmp_path / "t.safetensors").read_bytes() == old
    assert part.exists() == (sent == signal.SIGKILL)
    if sys.platform == "linux":
        assert len(children) == (2 if workers == "2" else 0)
    end = time.monotonic() + 120
    while not all(map(gone, children)):
        assert time.monotonic() < end, "workers outlived the preparation"
        time.sleep(0.01)
    write_corpus(tmp_path / "t.safetensors", corpus, fitted(corpus, "words"))
    assert not part.exists()
    assert open_tokens(tmp_path / "t.safetensors").metadata["source"] == corpus.digest


@pytest.mark.multiprocess
def test_a_part_that_is_being_written_is_left_alone(tmp_path):
    (tmp_path / "big.txt").write_text("some words and more of them, all alike\n" * 150_000)
    process, part, _ = started(tmp_path, "--workers", "1")
    os.kill(process.pid, signal.SIGSTOP)
    try:
        (tmp_path / "small.txt").write_text("a b c d " * 100)
        corpus = load_corpus(str(tmp_path / "small.txt"))
        write_corpus(tmp_path / "t.safetensors", corpus, fitted(corpus, "words"))
        assert part.exists()
    finally:
        os.kill(process.pid, signal.SIGCONT)
        process.kill()
        process.wait()


@pytest.mark.slow
@pytest.mark.multiprocess
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="memory is read from /proc")
def test_memory_does_not_grow_with_the_text(tmp_path):
    """80 MB more of text raise the peak of all processes by less than half of what the text alone would take."""
    sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
    try:
        import corpus_memory
    finally:
        sys.path.pop(0)
    peaks = []
    for megabytes in (16, 96):
        line = "the quick brown fox jumps over the läzy dog, again and again\n"
        path = tmp_path / f"{megabytes}.txt"
        path.write_text(line * int(megabytes * 1e6 / len(line)), encoding="utf-8")
        arguments = ["data", "make", str(path), "--out", str(tmp_path / "t.safetensors"), "--workers", "2"]
        peaks.append(corpus_memory.measure(arguments, {})[0])
    assert peaks[1] - peaks[0] < 40e6, peaks


@pytest.mark.parametrize("kind", ["chars", "bpe"])
def test_without_a_cache_the_tokens_are_the_same(text, tmp_path, kind):
    (tmp_path / "taken").write_text("a file, where a folder should be")
    corpus = load_corpus(text)
    tokenizer = fitted(corpus, kind, max_vocabulary=300, cache_dir=tmp_path / "taken" / "tokens")
    kept = tokenized(corpus, tokenizer, tmp_path / "fine")
    uncached = tokenized(corpus, tokenizer, tmp_path / "taken" / "tokens")
    for split, ids in kept.splits.items():
        assert np.array_equal(ids, uncached.splits[split])
    assert "cannot be written" in uncached.metadata["uncached"]
    with pytest.raises(UsageError, match="FIVESTEP_CACHE"):
        tokenized(corpus, tokenizer, tmp_path / "taken" / "tokens", must_keep=True)


def test_a_disk_that_fills_while_the_cache_is_written(text, tmp_path, monkeypatch):
    corpus, written = load_corpus(text), module.write_corpus

    def full(path, *arguments, **options):
        if path.parent == tmp_path / "cache":
            raise OSError(28, "No space left on device")
        return written(path, *arguments, **options)

    monkeypatch.setattr(module, "write_corpus", full)
    tokens = tokenized(corpus, fitted(corpus, "chars"), tmp_path / "cache")
    assert sum(map(len, tokens.splits.values())) == len(LINES)
    assert not list(tmp_path.glob("cache/*")), "nothing is left"
