"""Encoding text: characters, bytes and words, of ASCII and of other text, against plain Python.

    python -m benchmarks.encode [--size 10] [--json [PATH]]

*A core*: MB of UTF-8 divided by the CPU seconds, user and system, of all threads, so that a second core cannot help.
*Encoding* goes from text in memory to ids in memory. *From file to file* is the whole preparation in one process: the
text read, checked, hashed and measured; the vocabulary counted; the ids made, hashed and written through to the disk.
A ratio is how many times as fast as the plain way, which does the same at once: the whole text in memory, a dict of
ids, `map` over characters or words, one SHA-256 of text and of ids.

The texts are words of a vocabulary of 30,000 drawn by Zipf's law, in lines; in the second, one letter in ten is not
ASCII. The last rows are whole commands, `fivestep data make` on all cores with its start-up: memory of all processes
(Linux), and MB by the wall clock; at `--size 1000` they hold the project to its bound.
"""

import argparse
import hashlib
import json
import os
import tempfile
from collections import Counter
from collections.abc import Callable
from operator import itemgetter
from pathlib import Path
from time import process_time

import numpy as np

from benchmarks import corpus_memory
from benchmarks.measure import Figure, alternate, environment, figure, report
from fivestep.data.corpus import load_corpus
from fivestep.data.preparation import fitted, write_corpus
from fivestep.data.tokenizer import build_tokenizer

KINDS = {"chars": 200.0, "bytes": 200.0, "words": 20.0}  # MB/s a core, at least
MOST_MEMORY = 600.0  # MB, for 1 GB of text
LETTERS = {
    "ASCII": "etaoinshrdlcumwfgypbvk" * 9 + "xjqz",
    "other": "etaoinshrdlcumwfgy" * 9 + "äéñøšžабвгдежзик中文字",
}
DISTINCT, LINE = 30_000, 15  # words of the vocabulary, words of a line


def text_of(letters: str, megabytes: float) -> str:
    """Lines of words drawn by Zipf's law, `megabytes` of UTF-8."""
    random = np.random.default_rng(0)
    words = ["".join(random.choice(list(letters), 1 + n)) for n in random.poisson(4, DISTINCT)]
    weights = np.cumsum(1 / np.arange(1, DISTINCT + 1))
    lines, size = [], 0
    while size < megabytes * 1e6:
        drawn = np.searchsorted(weights, random.random(LINE) * weights[-1])
        lines.append(" ".join([words[i] for i in drawn]) + ".\n")
        size += len(lines[-1].encode())
    return "".join(lines)


def plain_tokens(kind: str, text: str) -> list[str] | str:
    """The tokens of a text that ends in a newline, as word_language_model and nanoGPT read them."""
    return [word for line in text.splitlines() for word in [*line.split(), "<eos>"]] if kind == "words" else text


def plain_ids(kind: str, text: str, id_of: dict[str, int], dtype: np.dtype) -> np.ndarray:
    """The ids of a text, by a dict."""
    if kind == "bytes":
        return np.frombuffer(text.encode(), np.uint8)
    tokens = plain_tokens(kind, text)
    return np.fromiter(map(id_of.__getitem__, tokens), dtype, len(tokens))


def plain_preparation(kind: str, path: Path, out: Path, id_of: dict[str, int], dtype: np.dtype) -> None:
    """From a text file to a file of ids; the words' order is the tokenizer's (`id_of`), their count is taken."""
    data = path.read_bytes()
    hashlib.sha256(data).hexdigest()
    text = data.decode()
    if kind != "bytes":
        train = text[: text.rindex("\n", 0, int(0.9 * len(text))) + 1]
        counts = Counter(plain_tokens(kind, train))
        assert counts.keys() <= id_of.keys()
    ids = plain_ids(kind, text, id_of, dtype)
    with out.open("wb") as file:
        file.write(ids.data)
        file.flush()
        os.fsync(file.fileno())
    hashlib.sha256(ids.data).hexdigest()


def cpu_seconds(work: Callable[[], object]) -> float:
    """What `work` takes, of all threads of this process."""
    begun = process_time()
    work()
    return process_time() - begun


def compared(kind: str, name: str, path: Path, folder: Path, repeats: int) -> list[Figure]:
    """Encoding alone and from file to file, each beside the plain way, in turns."""
    text = path.read_text("utf-8")
    tokenizer = build_tokenizer(kind, text)
    id_of = {token: id_ for id_, token in enumerate(tokenizer.vocabulary)}
    assert np.array_equal(tokenizer.encode(text), plain_ids(kind, text, id_of, tokenizer.dtype))
    out = folder / "ours.safetensors"

    def prepare() -> None:
        corpus = load_corpus(str(path))
        write_corpus(out, corpus, fitted(corpus, kind, cache_dir=folder / "cache", workers=1), workers=1)
        for kept in (folder / "cache").glob("*"):
            kept.unlink()

    works: dict[str, Callable[[], object]] = {
        "ours": lambda: tokenizer.encode(text),
        "plain": lambda: plain_ids(kind, text, id_of, tokenizer.dtype),
        "file": prepare,
        "plain file": lambda: plain_preparation(kind, path, folder / "plain.bin", id_of, tokenizer.dtype),
    }
    seconds = alternate({name: lambda work=work: cpu_seconds(work) for name, work in works.items()}, repeats)
    megabytes = path.stat().st_size / 1e6
    rates = {name: [megabytes / one for one in ones] for name, ones in seconds.items()}
    return [
        figure(f"{kind}, {name}: encoding, a core", rates["ours"], "MB/s", against=rates["plain"]),
        figure(f"{kind}, {name}: from file to file, a core", rates["file"], "MB/s", against=rates["plain file"]),
    ]


def slower(kind: str, figures: list[Figure], what: str) -> Figure:
    """The figure of the text that is encoded slower, without its baseline: what is held to the target."""
    one = min(
        (one for one in figures if one["name"].startswith(kind) and what in one["name"]), key=itemgetter("value")
    )
    return figure(f"{kind}: {what}, the slower text", [one["value"]], "MB/s", target=KINDS[kind])


def lengthen(path: Path, megabytes: float) -> None:
    """Repeat a text until it is as long: no tokenizer looks back far enough to notice."""
    text = path.read_bytes()
    with path.open("ab") as file:
        for _ in range(round(megabytes * 1e6 / len(text)) - 1):
            file.write(text)


def commands(path: Path, kinds: list[str], folder: Path) -> list[Figure]:
    """`fivestep data make` as a process: the memory of its tree, and its speed by the wall clock."""
    megabytes, figures = path.stat().st_size / 1e6, []
    bound = MOST_MEMORY if megabytes >= 1000 else None
    for kind in kinds:
        out = folder / f"{kind}.safetensors"
        arguments = ["data", "make", str(path), "--tokenizer", kind, "--out", str(out)]
        peak, seconds = corpus_memory.measure(arguments, {"FIVESTEP_CACHE": str(folder / f"of-{kind}")})
        out.unlink()
        figures.append(figure(f"{kind}: peak memory, {megabytes:,.0f} MB of text", [peak / 1e6], "MB", target=bound))
        figures.append(figure(f"{kind}: the command, wall clock", [megabytes / seconds], "MB/s"))
    return figures


def main() -> None:
    """Measure, and print a table or JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=float, default=10, help="MB of each text (1,000,000 bytes each)  [10]")
    parser.add_argument("--repeats", type=int, default=5, help="alternating repeats  [5]")
    parser.add_argument("--quick", action="store_true", help="a smoke test: tiny sizes, figures that mean nothing")
    parser.add_argument("--tokenizers", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument(
        "--json",
        nargs="?",
        const="-",
        metavar="PATH",
        help="print the figures as JSON and nothing else; or write them",
    )
    options = parser.parse_args()
    if options.quick:
        options.size, options.repeats = 0.1, 1
    figures: list[Figure] = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for text, letters in LETTERS.items():
            path = folder / f"{text}.txt"
            path.write_text(text_of(letters, min(options.size, 50)), encoding="utf-8", newline="")
            for kind in options.tokenizers:
                figures += compared(kind, text, path, folder, options.repeats)
        figures += [slower(kind, figures, "encoding, a core") for kind in options.tokenizers]
        if Path("/proc/self/statm").exists():
            lengthen(path, options.size)
            figures += commands(path, options.tokenizers, folder)
    if options.json and options.json != "-":
        Path(options.json).write_text(json.dumps({**environment(), "figures": figures}, indent=1) + "\n")
        options.json = None
    report(options, figures)


if __name__ == "__main__":
    main()
