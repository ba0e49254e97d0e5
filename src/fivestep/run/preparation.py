"""The `data` verb: make a token file, look into one, verify one.

Owns what is made and said; parsing is `cli.py`'s, the passes are `data/preparation.py`'s. Does not import torch.
"""

from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np

from fivestep.data import tokenizer as tokenizers
from fivestep.data.corpus import Corpus, Report, load_corpus
from fivestep.data.files import expanded
from fivestep.data.preparation import fitted, tokenized, write_corpus
from fivestep.data.sources import folder_note
from fivestep.data.tokenizer import MOST_TOKENS, Tokenizer
from fivestep.data.tokens import CHUNK, SUFFIX, TokenFile, check_ids, open_tokens, shown, verify_tokens
from fivestep.errors import UsageError
from fivestep.watch.preparation import preparation_shown, size
from fivestep.watch.screen import Console

HEAD_TOKENS, COMMON_TOKENS = 60, 10


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
) -> list[str]:
    """Make a token file, at `out` or in the cache; returns lines that say what it holds, its path last.

    tokenizer, min_count: "chars" and 1 if not given; like max_vocabulary they are refused beside a tokenizer_file.
    """
    path = None if out is None else checked_out(out)
    if tokenizer_file is not None and (tokenizer, min_count, max_vocabulary) != (None, None, None):
        raise UsageError(
            "--tokenizer-file brings its own vocabulary: leave out --tokenizer, --min-count and --max-vocabulary"
        )
    kind, least = tokenizer or "chars", 1 if min_count is None else min_count
    if tokenizer_file is None:  # before the text is read, which can take long
        tokenizers.check_options(kind, least, max_vocabulary)
    start, replaced = perf_counter(), path is not None and path.exists()
    with preparation_shown(Console(stderr=True)) as report:
        corpus = load_corpus(sources, val_fraction, test_fraction, text_field=text_field, report=report)
        if tokenizer_file is not None:
            fit: Tokenizer = tokenizers.load(expanded(tokenizer_file))
        else:
            fit = fitted(corpus, kind, least, max_vocabulary, report=report, workers=workers)
        tokens = _written(path, corpus, fit, report, workers)
    seconds = perf_counter() - start
    return [
        *[note for source in sources if (note := folder_note(source)) is not None],
        *described(tokens),
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


def _written(
    path: Path | None, corpus: Corpus, tokenizer: Tokenizer, report: Report, workers: int | None
) -> TokenFile:
    if path is None:
        return tokenized(corpus, tokenizer, report=report, workers=workers)
    try:
        return write_corpus(path, corpus, tokenizer, report, workers)
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


def inspect(path: Path) -> list[str]:
    """What a token file holds: its description, the head of its text, its most frequent training tokens."""
    tokens = open_tokens(path)
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


def verify(path: Path) -> list[str]:
    """A line that says what was verified. Raises UsageError that names the first fault."""
    with preparation_shown(Console(stderr=True)) as report:
        tokens = verify_tokens(path, report)
    count = sum(map(len, tokens.splits.values()))
    known = "tokenizer, " if "tokenizer_json" in tokens.metadata else ""
    return [f"{path} is sound: header, sizes, {known}digest, and all of its {count:,} ids"]
