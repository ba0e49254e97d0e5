import json

import numpy as np
import pytest

from fivestep.data import tokenizer as module
from fivestep.data.tokenizer import (
    ByteTokenizer,
    CharTokenizer,
    WordTokenizer,
    build_tokenizer,
    from_json,
    load,
    save,
)
from fivestep.data.words import word_pieces
from fivestep.errors import UsageError

LINES = "the cat sat\n\nthe  <unk>\tdog sat\nthe end"


def test_chars_round_trip_and_unseen_ones_are_unknown():
    chars = build_tokenizer("chars", "hello wörld 🙂", other_texts=["help"])  # `p` is unseen in training
    assert chars.vocabulary == [*sorted(set("hello wörld 🙂")), "<unk>"]
    assert chars.unknown == chars.vocab_size - 1
    text = "low 🙂 hör"
    assert chars.encode(text).tolist() == [chars.vocabulary.index(c) for c in text]
    assert chars.decode(chars.encode(text)) == text
    ids = chars.encode("hexo\U0010ffff\ud800")
    assert chars.decode(ids) == "he\ufffdo\ufffd\ufffd"
    assert chars.count_unknown(ids) == 3


def test_chars_have_no_unknown_where_training_covers_the_other_texts():
    chars = build_tokenizer("chars", "hello wörld 🙂", other_texts=["hold", ""])
    assert chars.vocabulary == sorted(set("hello wörld 🙂"))
    assert chars.unknown is None
    assert chars.count_unknown(chars.encode("wörld")) == 0
    assert chars.decode(chars.encode("low 🙂 hör")) == "low 🙂 hör"
    assert from_json(chars.to_json()).fingerprint == chars.fingerprint
    for text, named in (("hex", "U\\+0078"), ("\U0010ffff", "U\\+10FFFF"), ("\x00", "U\\+0000")):
        with pytest.raises(UsageError, match=named):
            chars.encode(text)


def test_long_text_is_encoded_in_pieces(monkeypatch):
    chars, text = build_tokenizer("chars", LINES), LINES * 3
    whole = chars.encode(text)
    monkeypatch.setattr(module, "_PIECE", 7)
    assert np.array_equal(chars.encode(text), whole)
    assert chars.encode("").shape == (0,)


def test_long_text_has_the_words_of_the_whole(monkeypatch):
    text = LINES * 3 + "\x1clonger than a piece\u3000" + "x" * 99
    whole = build_tokenizer("words", text, min_count=2)
    ids = whole.encode(text)
    for piece in (1, 5, 30):
        monkeypatch.setattr("fivestep.data.words.PIECE", piece)
        assert build_tokenizer("words", text, min_count=2).vocabulary == whole.vocabulary
        assert np.array_equal(whole.encode(text), ids)
        assert "".join(word_pieces(text)) == text and len(list(word_pieces(text))) > 3
    assert whole.encode("").shape == (0,) and whole.encode("").dtype == ids.dtype


def test_bytes_know_everything():
    tokens = build_tokenizer("bytes", "")
    assert tokens.vocab_size == 256 and tokens.unknown is None and len(set(tokens.vocabulary)) == 256
    ids = tokens.encode("né🙂")
    assert ids.dtype == np.uint8 and ids.tolist() == list("né🙂".encode())
    assert tokens.decode(ids) == "né🙂" and tokens.decode(ids[:-1]) == "né\ufffd"
    assert tokens.count_unknown(ids) == 0


def plain_words(text):
    """word_language_model's own reading, line by line."""
    lines = text.split("\n")
    last = lines.pop()
    words = [word for line in lines for word in [*line.split(), "<eos>"]]
    return words + ([*last.split(), "<eos>"] if last.split() else [])


@pytest.mark.parametrize("text", [LINES, LINES + "\n", "\n", "a", " a \n  ", "\n\na\r\nb <eos> c\n"])
def test_words_are_read_line_by_line(text):
    words = build_tokenizer("words", text)
    assert [words.vocabulary[i] for i in words.encode(text)] == plain_words(text)


def test_words_are_ordered_by_count_then_first_appearance():
    words = build_tokenizer("words", LINES)
    assert words.vocabulary == ["<unk>", "<eos>", "the", "sat", "cat", "dog", "end"]
    assert words.encode("the bird <unk> sat").tolist() == [2, 0, 0, 3, 1]
    assert words.decode([2, 4, 3, 1, 1, 1, 2, 0]) == "the cat sat\n\n\nthe <unk>"
    assert words.decode(words.encode("\nthe cat\n\nsat\n")) == "\nthe cat\n\nsat\n"
    assert words.count_unknown(words.encode(LINES)) == 1


def test_rare_tokens_and_small_vocabularies():
    assert build_tokenizer("words", LINES, min_count=2).vocabulary == ["<unk>", "<eos>", "the", "sat"]
    assert build_tokenizer("words", LINES, max_vocabulary=3).vocabulary == ["<unk>", "<eos>", "the"]
    assert build_tokenizer("words", LINES, max_vocabulary=7).vocab_size == 7
    assert build_tokenizer("chars", "aabbbc", min_count=2).vocabulary == ["a", "b", "<unk>"]
    assert build_tokenizer("chars", "aabbbc", max_vocabulary=2).vocabulary == ["b", "<unk>"]


def test_wikitext_has_the_words_of_the_plain_reading(wikitext):
    text = (wikitext / "train.txt").read_text(encoding="utf-8")
    words = build_tokenizer("words", text)
    plain = plain_words(text)
    assert words.vocab_size == len({*plain, "<unk>"}) == 13_777
    assert [words.vocabulary[i] for i in words.encode(text)] == plain


@pytest.mark.parametrize(("size", "dtype"), [(256, "uint8"), (257, "uint16"), (65536, "uint16"), (65537, "int32")])
def test_ids_take_the_smallest_type_that_holds_them(size, dtype):
    words = WordTokenizer(["<unk>", "<eos>", *(f"w{i}" for i in range(size - 2))])
    ids = words.encode(f"w{size - 3}")
    assert ids.dtype == dtype and ids[0] == size - 1


@pytest.mark.parametrize("kind", ["chars", "bytes", "words"])
def test_files_round_trip(tmp_path, kind):
    built = build_tokenizer(kind, LINES)
    save(built, tmp_path / "tokenizer.json")
    read = load(tmp_path / "tokenizer.json")
    assert type(read) is type(built) and read.vocabulary == built.vocabulary and read.kind == kind
    assert read.fingerprint == built.fingerprint and np.array_equal(read.encode(LINES), built.encode(LINES))
    assert [entry.name for entry in tmp_path.iterdir()] == ["tokenizer.json"]
    assert json.loads((tmp_path / "tokenizer.json").read_text())["format"] == "fivestep-tokenizer"


def test_fingerprints_differ():
    built = [build_tokenizer(kind, text) for kind in ("chars", "words") for text in (LINES, LINES + " more!")]
    assert len({tokenizer.fingerprint for tokenizer in [*built, ByteTokenizer()]}) == 5


GOOD = {"format": "fivestep-tokenizer", "version": 1, "kind": "chars", "vocabulary": ["a", "b", "<unk>"]}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": "other"}, "format"),
        ({"version": 2}, "version"),
        ({"kind": "char"}, "did you mean 'chars'"),
        ({"kind": ["chars"]}, "--tokenizer"),
        ({"vocabulary": "ab"}, "list of strings"),
        ({"vocabulary": ["a", 1, "<unk>"]}, "list of strings"),
        ({"vocabulary": ["a", "a", "<unk>"]}, "more than once"),
        ({"vocabulary": ["<unk>", "b"]}, "single characters"),
        ({"vocabulary": []}, "single characters"),
        ({"vocabulary": ["ab", "<unk>"]}, "single characters"),
        ({"kind": "bytes"}, "0x00"),
        ({"kind": "words"}, "without whitespace"),
        ({"kind": "words", "vocabulary": ["<unk>", "<eos>", "a b"]}, "without whitespace"),
    ],
)
def test_a_damaged_description_is_refused(change, message):
    assert isinstance(from_json(GOOD), CharTokenizer)
    with pytest.raises(UsageError, match=message):
        from_json({**GOOD, **change})


@pytest.mark.parametrize("content", [b"", b"{", b"[1]", b"\xff", b'{"format": "x"}'])
def test_a_damaged_file_is_named(tmp_path, content):
    (tmp_path / "tokenizer.json").write_bytes(content)
    with pytest.raises(UsageError, match=r"tokenizer\.json"):
        load(tmp_path / "tokenizer.json")
    with pytest.raises(UsageError, match=r"missing\.json"):
        load(tmp_path / "missing.json")


def test_bad_input_is_refused():
    for arguments in [("word", "a"), ("words", ""), ("chars", "")]:
        with pytest.raises(UsageError, match="--tokenizer"):
            build_tokenizer(*arguments)
    for options in [{"min_count": 0}, {"max_vocabulary": 2}]:
        with pytest.raises(UsageError, match="--tokenizer words"):
            build_tokenizer("words", LINES, **options)
    with pytest.raises(UsageError, match="256"):
        build_tokenizer("bytes", LINES, max_vocabulary=100)
    for kind in ("chars", "words"):
        tokenizer = build_tokenizer(kind, LINES)
        assert tokenizer.decode([]) == ""
        for bad in (-1, tokenizer.vocab_size):
            with pytest.raises(UsageError, match="ids"):
                tokenizer.decode([bad])
