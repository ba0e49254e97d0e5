"""The `data` verb: make a token file, or a folder of shards, look into one, verify one.

Owns what is made and said; parsing is `cli.py`'s, the passes are `data/preparation.py`'s. Does not import torch.
"""

import re
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np

from fivestep.data import tokenizer as tokenizers
from fivestep.data.corpus import Corpus, Report, load_corpus
from fivestep.data.files import expanded
from fivestep.data.preparation import fitted, tokenized, write_corpus
from fivestep.data.remote import is_url
from fivestep.data.shards import LIST, is_token_source, open_token_source, verify_token_source
from fivestep.data.sources import source_notes
from fivestep.data.tokenizer import MOST_TOKENS, Tokenizer
from fivestep.data.tokens import CHUNK, SUFFIX, TokenFile, check_ids, open_tokens, shown, verify_tokens
from fivestep.errors import UsageError
from fivestep.watch.preparation import preparation_shown, size
from fivestep.watch.screen import Console

HEAD_TOKENS, COMMON_TOKENS = 60, 10
UNITS = {"": 1, "k": 10**3, "M": 10**6, "G": 10**9}


def make(
    sources: list[str],
    out: str | None = None,
    tokenizer: str | None = None,
    tokenizer_file: str | None = None,
    min_count: int | None = None,
    max_vocabulary: int | None = None,
    val_fraction: float = 0.1,
    test_fraction: float = 0.0,
    text_field: str = "text",
    workers: int | None = None,
    shard_size: str | None = None,
) -> list[str]:
    """Make a token file, at `out` or in the cache; returns lines that say what it holds, its path last.

    shard_size: then `out` is a folder of shards of at most so many bytes of ids, or tokens: 256MB, 100Mtok.

    tokenizer, min_count: "chars" and 1 if not given; like max_vocabulary they are refused beside a tokenizer_file.
    """
    most = None if shard_size is None else parsed_size(shard_size)
    if most is not None and out is None:
        raise UsageError("--shard-size needs the name of a new folder: --out FOLDER")
    path = None if out is None else checked_out(out) if most is None else checked_folder(out)
    if tokenizer_file is not None and (tokenizer, min_count, max_vocabulary) != (None, None, None):
        raise UsageError(
            "--tokenizer-file brings its own vocabulary: leave out --tokenizer, --min-count and --max-vocabulary"
        )
    kind, least = tokenizer or "chars", 1 if min_count is None else min_count
    if tokenizer_file is None:  # before the text is read, which can take long
        tokenizers.check_options(kind, least, max_vocabulary)
    start, replaced = perf_counter(), path is not None and path.is_file()
    with preparation_shown(Console(stderr=True)) as report:
        corpus = load_corpus(sources, val_fraction, test_fraction, text_field=text_field, report=report)
        if tokenizer_file is not None:
            fit: Tokenizer = tokenizers.load(expanded(tokenizer_file))
        else:
            fit = fitted(corpus, kind, least, max_vocabulary, report=report, workers=workers)
        tokens = _written(path, corpus, fit, report, workers, most)
    seconds = perf_counter() - start
    return [
        *[note for source in sources for note in source_notes(source)],
        *described(tokens),
        *([f"shards: {len(list(Path(tokens.path).glob(f'*{SUFFIX}'))):,}, and their list {LIST}"] if most else []),
        f"time: {seconds:.1f} s, {corpus.size / 1e6 / seconds:,.1f} MB/s",
        *([f"replaced: the token file that was {tokens.path} before"] if replaced else []),
        f"train with it: --data {tokens.path}",
        str(tokens.path),
    ]


def checked_out(out: str) -> Path:
    """The path that `--out` names. Raises UsageError for what would not be found again, or is another's file."""
    path = expanded(out)
    if path.suffix != SUFFIX or path.is_dir():
        raise UsageError(f"--out {out} must be the name of a {SUFFIX} file: `--data` knows a token file by it")
    if path.exists():
        try:
            open_tokens(path)
        except UsageError:
            raise UsageError(
                f"--out {out} exists and is no token file (the weights of a model, perhaps): "
                "give another name, or remove it"
            ) from None
    return path


def checked_folder(out: str) -> Path:
    """The folder that `--out` names for shards. Raises UsageError for one that holds anything."""
    path = expanded(out)
    if path.suffix == SUFFIX:
        raise UsageError(f"--out {out} names a file, but shards are a folder: leave out {SUFFIX}, or --shard-size")
    if path.exists() and not (path.is_dir() and next(path.iterdir(), None) is None):
        raise UsageError(f"--out {out} is there already: give the name of a new folder, or remove it")
    return path


def parsed_size(text: str) -> tuple[int, bool]:
    """`256MB` -> (256_000_000, False), `100Mtok` -> (100_000_000, True): how many, and whether of tokens.

    Raises UsageError for anything else, and for 0.
    """
    found = re.fullmatch(r"(\d+(?:\.\d+)?) ?([kMG]?)(B|tok)", text)
    count = int(float(found[1]) * UNITS[found[2]]) if found else 0
    if not found or not count:
        raise UsageError(f"--shard-size {text} is no size: give bytes or tokens, as in 256MB, 1GB, 100Mtok")
    return count, found[3] == "tok"


def _written(
    path: Path | None,
    corpus: Corpus,
    tokenizer: Tokenizer,
    report: Report,
    workers: int | None,
    most: tuple[int, bool] | None,
) -> TokenFile:
    if path is None:
        return tokenized(corpus, tokenizer, report=report, workers=workers, must_keep=True)
    try:
        count, of_tokens = most or (None, True)
        shard_tokens = count if of_tokens or count is None else max(1, count // tokenizer.dtype.itemsize)
        return write_corpus(path, corpus, tokenizer, report, workers, shard_tokens)
    except OSError as error:
        raise UsageError(f"--out {path} cannot be written ({error.strerror or error})") from error


def described(tokens: TokenFile) -> list[str]:
    """Source, tokenizer and splits of a token file, a line each."""
    metadata, unknown = tokens.metadata, tokens.unknown
    lines = [f"text: {tokens.name}, SHA-256 {shown(metadata.get('source', 'unknown'))}"]
    if "tokenizer_json" in metadata:
        lines.append(f"tokenizer: {tokens.tokenizer.kind}, vocabulary {tokens.tokenizer.vocab_size:,}")
    for split, ids in tokens.splits.items():
        missing = f", {unknown[split]:,} of them <unk>" if unknown.get(split) else ""
        lines.append(f"{split}: {len(ids):,} tokens{missing}")
    lines.append(f"ids: {tokens.dtype.name}, {size(sum(ids.nbytes for ids in tokens.splits.values()))}")
    return lines


def inspect(source: str) -> list[str]:
    """What token files hold: their description, the head of the text, its most frequent training tokens."""
    path = lone_file(source)
    tokens = open_token_source(source) if path is None else open_tokens(path)
    lines = described(tokens)
    check_ids(tokens, tokens.tokenizer.vocab_size if "tokenizer_json" in tokens.metadata else MOST_TOKENS)
    first = next(iter(tokens.splits))
    ids = tokens.splits[first]
    counts = np.zeros(0, np.int64)
    for at in range(0, len(ids), CHUNK):
        part = np.bincount(ids[at : at + CHUNK], minlength=len(counts))
        part[: len(counts)] += counts
        counts = part
    decode: Any = tokens.tokenizer.decode if "tokenizer_json" in tokens.metadata else str
    lines.append(f"head of {first}: {decode(ids[:HEAD_TOKENS].tolist())!r}")
    common = np.argsort(-counts, kind="stable")[: min(COMMON_TOKENS, np.count_nonzero(counts))]
    shown = [f"  {decode([int(id_)])!r} ({id_}): {counts[id_] / max(1, len(ids)):.1%}" for id_ in common]
    return [*lines, f"most frequent in {first}:", *shown]


def lone_file(source: str) -> Path | None:
    """The path of one file, be it a whole token file, a shard of several, or none; None for all that is more."""
    if is_url(source):
        return None
    path = expanded(source)
    several = path.name == LIST or (not path.is_file() and is_token_source(source))
    return None if several else path


def verify(source: str) -> list[str]:
    """A line that says what was verified. Raises UsageError that names the first fault."""
    with preparation_shown(Console(stderr=True)) as report:
        path = lone_file(source)
        tokens = verify_token_source(source, report) if path is None else verify_tokens(path, report)
    count = sum(map(len, tokens.splits.values()))
    known = "tokenizer, " if "tokenizer_json" in tokens.metadata else ""
    return [f"{source} is sound: header, sizes, {known}digest, and all of its {count:,} ids"]
