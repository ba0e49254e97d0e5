"""Text in pieces: joined they are the whole text, and nothing shows that a later token could change."""

import pytest
import torch
from torch import Tensor, nn

import fivestep as fs
from fivestep.data.tokenizer import ByteTokenizer, CharTokenizer, Tokenizer, WordTokenizer, build_tokenizer
from fivestep.models.bigram import Bigram
from fivestep.run.writing import decoded, until_stop, write
from tests.run.cli import fivestep  # noqa: F401  (a fixture)

# ruff: noqa: F811

TEXT = "so it goes\nand on it goes, é and so — 😀 on\n\nit goes"
UNSEEN = "Ж"


class Script(nn.Module):
    """A model that says its lines, whatever it is asked; `asked` counts the predictions."""

    def __init__(self, tokenizer: Tokenizer, ids: list[int], rows: int | None = None) -> None:
        super().__init__()
        self.anchor = nn.Parameter(torch.zeros(1))
        self.ids, self.rows, self.asked = ids, rows or tokenizer.vocab_size, 0

    def predict_next(self, ids: Tensor, memory: None) -> tuple[Tensor, None]:
        logits = torch.zeros(len(ids), self.rows)
        logits[:, self.ids[self.asked]] = 50.0
        self.asked += 1
        return logits, None


def tokenizers() -> dict[str, Tokenizer]:
    return {kind: build_tokenizer(kind, TEXT, other_texts=[UNSEEN]) for kind in ("chars", "bytes", "words")}


def said(tokenizer: Tokenizer, prompt: str, text: str, **how: object) -> tuple[list[str], Script]:
    """The pieces of a text that continues a prompt, and the model that wrote it."""
    ids = tokenizer.encode_prompt(text).tolist()
    model = Script(tokenizer, ids)
    pieces = write(model, tokenizer, prompt, max_new_tokens=len(ids), temperature=0.0, **how)  # type: ignore[arg-type]
    return list(pieces), model


@pytest.mark.parametrize("kind", ["chars", "bytes", "words"])
def test_joined_the_pieces_are_the_whole_text(kind: str) -> None:
    tokenizer = tokenizers()[kind]
    pieces, _ = said(tokenizer, "so it", TEXT)
    ids = [*tokenizer.encode_prompt("so it").tolist(), *tokenizer.encode_prompt(TEXT).tolist()]
    assert "".join(pieces) == tokenizer.decode(ids)
    assert pieces[0] == "so it"
    assert all(pieces)
    assert len(pieces) > len(TEXT.split())  # one a token, not all at the end


@pytest.mark.parametrize("kind", ["chars", "bytes", "words"])
def test_any_ids_in_any_order_join_to_what_decode_says(kind: str) -> None:
    """Random ids: for bytes mostly no UTF-8 at all."""
    tokenizer = tokenizers()[kind]
    for seed in range(60):
        generator = torch.Generator().manual_seed(seed)
        ids = torch.randint(tokenizer.vocab_size, (40,), generator=generator).tolist()
        if kind == "bytes" and seed % 2:  # many lead and continuation bytes
            ids = [id_ | 0x80 for id_ in ids]
        for cut in (1, 7):
            prompt, rest = ids[:cut], ids[cut:]
            pieces = list(decoded(tokenizer, prompt, rest))
            head = tokenizer.decode(prompt)
            if kind != "bytes" or "\ufffd" not in head:
                assert head + "".join(pieces) == tokenizer.decode(ids)


def test_an_incomplete_character_is_held_back_until_it_is_whole() -> None:
    tokenizer = ByteTokenizer()
    pieces, _ = said(tokenizer, "a", "é—😀b")
    assert pieces == ["a", "é", "—", "😀", "b"]
    ids = tokenizer.encode("x😀").tolist()
    assert list(decoded(tokenizer, ids[:1], ids[1:4])) == ["\ufffd"]  # cut short: as the whole text has it
    assert tokenizer.decode(ids[:4]) == "x\ufffd"


def test_an_unknown_token_is_shown() -> None:
    tokenizer = tokenizers()["chars"]
    pieces, _ = said(tokenizer, "so" + UNSEEN, UNSEEN + UNSEEN + "it" + UNSEEN)
    assert "".join(pieces) == "so\ufffd\ufffd\ufffdit\ufffd"


STOPS = [
    (["\n\n"], "so it goes\nand on it goes, é and so — 😀 on"),
    (["and"], "so it goes\n"),
    (["😀", "— "], "so it goes\nand on it goes, é and so "),
    (["goes,", "and on"], "so it goes\n"),
    (["never"], TEXT),
    (["so"], ""),
]


@pytest.mark.parametrize(("stops", "left"), STOPS)
@pytest.mark.parametrize("kind", ["chars", "bytes"])
def test_stop_strings_end_the_text_before_them(kind: str, stops: list[str], left: str) -> None:
    pieces, model = said(tokenizers()[kind], "so it goes, ", TEXT, stop=stops)
    assert "".join(pieces) == "so it goes, " + left  # the prompt itself stops nothing
    if left != TEXT:
        assert model.asked < len(model.ids)  # and nothing is computed that nobody reads


def test_stop_strings_may_span_words() -> None:
    tokenizer = tokenizers()["words"]
    pieces, model = said(tokenizer, "so it", "goes and on it goes so", stop=["n it"])
    assert "".join(pieces) == "so it goes and o"
    assert model.asked == 4
    assert "".join(said(tokenizer, "so it", "goes and on it goes so", stop=" on ")[0]) == "so it goes and"


@pytest.mark.parametrize("size", [1, 2, 3, 5, 100])
@pytest.mark.parametrize(
    ("text", "stops", "left"),
    [
        ("aabaabaac", ["aabaac"], "aab"),
        ("abcabd", ["abd", "cx"], "abc"),
        ("abc", ["abc", "b"], "a"),  # "b" is complete first
        ("xabc", ["c", "abc"], "x"),  # both at once: the longer
        ("abab", ["abc", "bb"], "abab"),
        ("aaa", [], "aaa"),
    ],
)
def test_stops_do_not_depend_on_the_pieces(size: int, text: str, stops: list[str], left: str) -> None:
    pieces = [text[at : at + size] for at in range(0, len(text), size)]
    assert "".join(until_stop(pieces, stops)) == left


def test_what_cannot_become_a_stop_string_is_not_held_back() -> None:
    assert list(until_stop("ab\ncd\n\nef", ["\n\n"])) == ["a", "b", "\nc", "d"]


def test_tokens_that_the_tokenizer_lacks_are_never_drawn() -> None:
    tokenizer = CharTokenizer(list("abc"))
    for seed in range(5):
        text = "".join(write(Bigram(50), tokenizer, "a", max_new_tokens=40, seed=seed))
        assert len(text) == 41
        assert set(text) <= set("abc")


@pytest.mark.parametrize(
    ("tokenizer", "first"),
    [
        (CharTokenizer(["\n", "a"]), "\n"),
        (CharTokenizer(["a", "b"]), "a"),
        (ByteTokenizer(), "\n"),
        (WordTokenizer(["<unk>", "<eos>", "so"]), "\n"),
    ],
)
def test_without_a_prompt_text_begins_on_a_new_line(tokenizer: Tokenizer, first: str) -> None:
    pieces = write(Bigram(tokenizer.vocab_size), tokenizer, max_new_tokens=3)
    assert next(pieces) == first


@pytest.mark.parametrize(
    ("prompt", "how", "match"),
    [
        ("", {}, "--prompt"),
        ("xyz", {}, "'x'"),
        ("a", {"stop": ["b", ""]}, "--stop"),
        ("a", {"stop": ""}, "--stop"),
        ("a", {"top_p": 2.0}, "--top-p"),
        ("a", {"min_p": -1.0}, "--min-p"),
        ("a", {"repetition_penalty": 0.0}, "--repetition-penalty"),
        ("a", {"max_new_tokens": -1}, "--max-new-tokens"),
    ],
)
def test_bad_arguments_are_refused_at_once(prompt: str, how: dict[str, object], match: str) -> None:
    with pytest.raises(fs.UsageError, match=match):
        write(Bigram(2), CharTokenizer(["a", "b"]), prompt, **how)  # type: ignore[arg-type]


# --- a run, from the command line to the text ---


@pytest.fixture
def run(fivestep, tmp_path):
    (tmp_path / "text.txt").write_text("the cat sat on the mat and looked at the moon\n" * 40)
    tiny = ["--model", "gpt2", "--block-size", 16, "--n-layer", 1, "--n-head", 2, "--n-embd", 16, "--vocab-size", 300]
    done = fivestep("train", "gpt-chars", "--data", "text.txt", "--max-iters", 2, "--tied", *tiny, "--device", "cpu")
    assert done.code == 0, done.err
    return "runs/gpt-chars-1"


def test_a_loaded_run_writes_streams_and_samples(fivestep, run):
    loaded = fs.load(run, device="cpu")
    assert loaded.model.token_embedding_table.num_embeddings == 300
    how = {"max_new_tokens": 40, "temperature": 0.9, "top_p": 0.95, "min_p": 0.001, "repetition_penalty": 1.1}
    text = loaded.generate("the ", **how, seed=3)
    assert text.startswith("the ")
    assert len(text) == 44  # never one of the 270 rows without a character, each as likely as the others here
    assert (
        text == "".join(loaded.stream("the ", **how, seed=3)) == loaded.generate("the ", **how, seed=3, cache=False)
    )
    assert text != loaded.generate("the ", **how, seed=4)
    flags = [f"--{name.replace('_', '-')}={value}" for name, value in how.items()]
    done = fivestep("sample", run, "--prompt", "the ", "--seed", 3, *flags)
    assert (done.code, done.out) == (0, text + "\n")
    two = fivestep("sample", run, "--prompt", "the ", "--seed", 3, "--num-samples", 2, *flags)
    assert two.out == f"--- seed 3\n{text}\n--- seed 4\n{loaded.generate('the ', **how, seed=4)}\n"
    stop = text[20:23]
    stopped = fivestep("sample", run, "--prompt", "the ", "--seed", 3, "--stop", stop, "--stop", "\x00", *flags)
    assert stopped.out == text[: text.index(stop, 4)] + "\n"


@pytest.mark.parametrize(
    "flag", ["--top-p=1.5", "--min-p=-1", "--repetition-penalty=0", "--stop=", "--num-samples=0"]
)
def test_bad_flags_are_refused_and_nothing_is_printed(fivestep, run, flag):
    done = fivestep("sample", run, "--prompt", "the ", "--num-samples", 2, flag)
    assert (done.code, done.out) == (2, "")
    assert flag.partition("=")[0] in done.err
