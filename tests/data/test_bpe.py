import json
import re
import sys
from itertools import pairwise

import numpy as np
import pytest

from fivestep.data import bpe
from fivestep.data.tokenizer import BPETokenizer, build_tokenizer, from_json, load, save
from fivestep.errors import UsageError
from fivestep.extras import installing

library = pytest.importorskip("tokenizers", reason="Hugging Face's tokenizers are not installed")
TEXT = "the cat sat on the mat, the cat's  hat\n\nit isn't 1234 é🙂 中文\r\n \t x_y\n" * 30


@pytest.fixture(scope="module")
def pairs():
    return build_tokenizer("bpe", TEXT, max_vocabulary=320)


def test_byte_pairs_round_trip_and_know_every_byte(pairs):
    assert pairs.kind == "bpe" and pairs.unknown is None and 256 < pairs.vocab_size <= 320
    for text in (TEXT, "никогда не seen \x00\x7f", " leading", "trailing \n\n ", ""):
        assert pairs.decode(pairs.encode(text)) == text
    assert len(pairs.encode(TEXT)) < len(TEXT.encode()) / 2
    assert pairs.encode(TEXT).dtype == np.uint16
    assert pairs.decode(pairs.encode("a\ud800")) == "a\ufffd\ufffd\ufffd"
    assert pairs.decode(pairs.encode("é")[:1]) in ("é", "\ufffd")
    with pytest.raises(UsageError, match="ids"):
        pairs.decode([pairs.vocab_size])


def plain_merges(text, count):
    """Byte pairs by the book (Sennrich et al. 2016): merge the most frequent pair, equal ones by the smaller ids."""
    words = [[bytes([b]) for b in word.encode()] for word in text.split(" ")]
    merged = []
    for _ in range(count):
        seen = {}
        for word in words:
            for pair in pairwise(word):
                seen[pair] = seen.get(pair, 0) + 1
        best = max(seen.values())
        pair = next(pair for pair, n in seen.items() if n == best)
        assert sum(n == best for n in seen.values()) == 1, (
            "the text is chosen so that no two pairs are equally frequent"
        )
        merged.append(pair[0] + pair[1])
        for word in words:
            at = 0
            while at < len(word) - 1:
                if (word[at], word[at + 1]) == pair:
                    word[at : at + 2] = [pair[0] + pair[1]]
                at += 1
    return merged


def test_the_first_merges_are_those_of_the_book():
    text = "abcab" * 10 + "abc" * 10 + "cc" * 7
    learned = build_tokenizer("bpe", text, max_vocabulary=259).vocabulary[256:]
    assert [token.encode() for token in learned] == plain_merges(text, 3)


def test_pieces_cut_no_token(pairs, monkeypatch):
    whole = pairs._pairs.encode(TEXT, add_special_tokens=False).ids
    for size in (1, 2, 5, 40, 1000):
        monkeypatch.setattr(bpe, "PIECE", size)
        assert "".join(bpe.pieces(TEXT)) == TEXT
        assert pairs.encode(TEXT).tolist() == whole


def test_a_border_is_found_from_the_end():
    assert bpe.border("one two three", 13) == 7 and bpe.border("one two three", 7) == 3
    assert bpe.border("one\ntwo", 7) == 4
    for text in ("", "word", "a  b", "a\n\nb", "a .", "中\u3000文", "a\t b"):
        assert bpe.border(text, len(text)) == 0
    assert bpe.border("a b" + "x" * 10_000, 10_003) == 1


def test_our_file_and_theirs_are_read_without_learning(pairs, tmp_path, monkeypatch):
    monkeypatch.setattr(bpe, "learned", lambda *_: pytest.fail("learned again"))
    save(pairs, tmp_path / "ours.json")
    (tmp_path / "theirs.json").write_text(pairs._pairs.to_str())
    for name in ("ours.json", "theirs.json"):
        read = load(tmp_path / name)
        assert isinstance(read, BPETokenizer) and read.fingerprint == pairs.fingerprint
        assert np.array_equal(read.encode(TEXT), pairs.encode(TEXT))


def test_special_tokens_of_a_file_have_their_ids(pairs, tmp_path):
    content = json.loads(json.dumps(pairs.content))
    tokenizer = library.Tokenizer.from_str(json.dumps(content))
    tokenizer.add_special_tokens(["<|endoftext|>"])
    tokenizer.save(str(tmp_path / "gpt2.json"))
    read = load(tmp_path / "gpt2.json")
    assert read.vocab_size == pairs.vocab_size + 1 and read.vocabulary[-1] == "<|endoftext|>"
    ids = read.encode("a<|endoftext|>b")
    assert pairs.vocab_size in ids.tolist() and read.decode(ids) == "a<|endoftext|>b"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model": {"type": "WordPiece", "vocab": {}}}, "its model is WordPiece"),
        ({"normalizer": {"type": "NFC"}}, "normalizer"),
        ({"pre_tokenizer": {"type": "Whitespace"}}, "not ByteLevel"),
        ({"pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": True}}, "add_prefix_space"),
        ({"pre_tokenizer": None}, "lacks"),
        ({"truncation": {"max_length": 3}}, "truncates"),
        ({"added_tokens": [{"content": "a b", "lstrip": False, "rstrip": False}]}, "takes whitespace"),
        ({"model": {"type": "BPE", "vocab": {}, "merges": [3]}}, "no byte-level BPE"),
    ],
)
def test_what_is_not_like_gpt2_is_refused(pairs, change, message):
    with pytest.raises(UsageError, match=message):
        from_json({**pairs.to_json(), "content": {**pairs.content, **change}})
    with pytest.raises(UsageError, match="lacks"):
        from_json({**pairs.to_json(), "content": None})


def test_rare_pairs_are_not_merged():
    assert build_tokenizer("bpe", "abcdefg hijklm").vocab_size == 256
    few, many = (build_tokenizer("bpe", TEXT, min_count=n).vocab_size for n in (31, 2))
    assert 256 <= few < many
    with pytest.raises(UsageError, match="256 or more; got 1 and 255"):
        build_tokenizer("bpe", TEXT, max_vocabulary=255)


def test_the_missing_library_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(UsageError, match=re.escape(installing("bpe"))):
        build_tokenizer("bpe", TEXT)
