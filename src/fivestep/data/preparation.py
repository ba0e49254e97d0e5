"""From a corpus to a token file, in passes over the text and within bounded memory.

    corpus ──count, in blocks──> tokenizer ──encode, in blocks──> token file (written whole or not at all)

Owns the passes, their cache and the choice of workers. Characters, bytes and any small text are worked on in this
process, while a thread reads ahead; words and byte pairs of a larger text in processes beside it (`worker.py`). What
is made depends neither on their number nor on the size of a block.
"""

import hashlib
import json
import tempfile
from collections.abc import Iterator
from contextlib import AbstractContextManager, closing, suppress
from dataclasses import replace
from pathlib import Path

import numpy as np

from fivestep.data import worker
from fivestep.data.corpus import Corpus, Report, unreported
from fivestep.data.files import cache_folder, written_whole
from fivestep.data.shards import ShardWriter, open_token_source, shard_writer
from fivestep.data.tokenizer import (
    Ids,
    Tokenizer,
    add_characters,
    add_counts,
    check_options,
    from_counts,
    from_json,
    leaves_line_open,
)
from fivestep.data.tokens import SUFFIX, TokenFile, TokenWriter, open_tokens, token_writer
from fivestep.errors import UsageError

BESIDE = 200_000  # bytes of text from which byte pairs are learned in a process that can be interrupted
LARGE = 8 << 20  # bytes of text from which workers, and keeping a fitted tokenizer, are worth their start


def fitted(
    corpus: Corpus,
    kind: str,
    min_count: int = 1,
    max_vocabulary: int | None = None,
    cache_dir: Path | None = None,
    report: Report = unreported,
    workers: int | None = None,
) -> Tokenizer:
    """`build_tokenizer` for a corpus of any size: its vocabulary from the training split, gone through in blocks.

    A large corpus's is kept in the cache, by the corpus's digest and the options. workers: processes; if not given,
    one a core, up to four, for a large text, else none. Raises UsageError.
    """
    check_options(kind, min_count, max_vocabulary)
    if kind == "bytes":
        return from_counts(kind, {})
    options = hashlib.sha256(json.dumps([2, kind, min_count, max_vocabulary]).encode()).hexdigest()
    kept = (cache_dir or cache_folder("tokens")) / f"{corpus.digest[:16]}-{options[:16]}.tokenizer.json"
    if (tokenizer := _kept(kept, corpus.digest)) is not None:
        return tokenizer
    number = _workers(corpus, kind, workers)
    if kind == "bpe":
        tokenizer = worker.learned(
            _training(corpus, report, "learning byte pairs"),
            min_count,
            max_vocabulary,
            beside=number > 1 or corpus.size >= BESIDE,
        )
    else:
        tokenizer = _counted(corpus, kind, min_count, max_vocabulary, report, number)
    if kind == "bpe" or corpus.size >= LARGE:
        _keep(kept, corpus.digest, tokenizer)
    return tokenizer


def tokenized(
    corpus: Corpus,
    tokenizer: Tokenizer,
    cache_dir: Path | None = None,
    report: Report = unreported,
    workers: int | None = None,
    must_keep: bool = False,
) -> TokenFile:
    """The corpus as ids, from the cache where they are, else made and kept there.

    The file is named by the corpus's digest and the tokenizer's fingerprint; a damaged one is made again.
    `cache_dir` defaults to `tokens/` in $FIVESTEP_CACHE or in the user's cache folder. Where that folder cannot be
    written, the ids are kept in a temporary file for this process alone, and `metadata["uncached"]` says why; with
    `must_keep`, that is a UsageError.
    """
    folder = cache_folder("tokens") if cache_dir is None else cache_dir
    path = folder / f"{corpus.digest[:16]}-{tokenizer.fingerprint[:16]}{SUFFIX}"
    try:
        tokens = open_tokens(path)
        wanted = {"source": corpus.digest, "tokenizer": tokenizer.fingerprint}.items()
        if wanted <= tokens.metadata.items() and set(tokens.splits) == set(corpus.spans):
            return replace(tokens, metadata={**tokens.metadata, "name": corpus.name})  # a copy's text is the same
    except UsageError:
        pass  # missing or damaged: made below
    try:
        return write_corpus(path, corpus, tokenizer, report, workers)
    except OSError as error:
        problem = f"the token cache {path} cannot be written ({error.strerror or error})"
        if must_keep:
            raise UsageError(f"{problem}. Set FIVESTEP_CACHE to a folder that you can write to") from error
    try:
        with tempfile.TemporaryDirectory(prefix="fivestep-", ignore_cleanup_errors=True) as beside:
            tokens = write_corpus(Path(beside, path.name), corpus, tokenizer, report, workers)
    except OSError as error:
        raise UsageError(
            f"{problem}, and neither can a temporary file ({error.strerror or error}). Set FIVESTEP_CACHE to a "
            "folder that you can write to"
        ) from error
    return replace(tokens, metadata={**tokens.metadata, "uncached": problem})


def write_corpus(
    path: Path,
    corpus: Corpus,
    tokenizer: Tokenizer,
    report: Report = unreported,
    workers: int | None = None,
    shard_tokens: int | None = None,
) -> TokenFile:
    """Write the corpus as ids, and the tokenizer, to `path`, whole or not at all; opens it. Raises OSError.

    shard_tokens: then `path` is a folder of shards, of at most so many ids each.
    """
    metadata = {
        "source": corpus.digest,
        "name": corpus.name,
        "tokenizer": tokenizer.fingerprint,
        "tokenizer_json": json.dumps(tokenizer.to_json(), separators=(",", ":")),
    }
    number = _workers(corpus, tokenizer.kind, workers)
    asked: list[tuple[str, bool | None]] = []  # each block's split, and whether it leaves its last line open

    def blocks() -> Iterator[str]:
        for split, block in corpus.blocks(report, "encoding", whole=tokenizer.kind in ("words", "bpe")):
            asked.append((split, leaves_line_open(block) or (None if "\n" not in block else False)))
            yield block

    splits = tuple(corpus.spans)
    writing: AbstractContextManager[TokenWriter | ShardWriter] = (
        token_writer(path, splits, tokenizer.dtype, metadata)
        if shard_tokens is None
        else shard_writer(path, splits, tokenizer.dtype, metadata, shard_tokens)
    )
    with writing as writer:
        before, line_open = "", False

        def add(split: str, ids: Ids) -> None:
            for part in writer.parts(ids):
                writer.add(split, part, tokenizer.count_unknown(part))

        def end_split() -> None:
            if line_open and tokenizer.end is not None:
                add(before, np.array([tokenizer.end], tokenizer.dtype))

        with closing(worker.encoded(tokenizer, blocks(), number)) as answers:
            for ids in answers:
                split, leaves_open = asked.pop(0)
                if split != before:
                    end_split()
                    before, line_open = split, False
                line_open = line_open if leaves_open is None else leaves_open
                add(split, ids)
        end_split()
        if empty := [split for split, length in writer.lengths.items() if not length]:
            raise UsageError(
                f"--data {corpus.name} has no token in {' and '.join(empty)}, where nothing can be trained or "
                "scored; see --val-fraction, --test-fraction and --tokenizer"
            )
    return open_tokens(path) if shard_tokens is None else open_token_source(str(path))


def _training(corpus: Corpus, report: Report, stage: str) -> Iterator[str]:
    return (block for split, block in corpus.blocks(report, stage, whole=True) if split == "train")


def _counted(
    corpus: Corpus, kind: str, min_count: int, max_vocabulary: int | None, report: Report, number: int
) -> Tokenizer:
    """The tokenizer of characters or words: the blocks' counts added up, in order of first appearance."""
    counts: dict[str, int] = {}
    others: dict[str, int] = {}
    if kind == "chars":
        for split, block in corpus.blocks(report, "counting"):
            add_characters(counts if split == "train" else others, block)
    else:
        with closing(worker.counted(_training(corpus, report, "counting"), number)) as answers:
            for of_block in answers:
                add_counts(counts, of_block)
    return from_counts(kind, counts, min_count, max_vocabulary, others)


def _workers(corpus: Corpus, kind: str, workers: int | None) -> int:
    if workers is not None and workers < 1:
        raise UsageError(f"--workers must be 1 or more; got {workers}")
    if kind in ("chars", "bytes"):
        return 1  # they are looked up faster than they could be sent
    return workers or (worker.default_workers() if corpus.size >= LARGE else 1)


def _kept(path: Path, source: str) -> Tokenizer | None:
    """The tokenizer kept at `path` for the corpus of digest `source`; None where it is missing or damaged."""
    try:
        content = json.loads(path.read_bytes())
        tokenizer = from_json(content["tokenizer"])
        return tokenizer if (content["source"], content["fingerprint"]) == (source, tokenizer.fingerprint) else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _keep(path: Path, source: str, tokenizer: Tokenizer) -> None:
    content = {"source": source, "fingerprint": tokenizer.fingerprint, "tokenizer": tokenizer.to_json()}
    with suppress(OSError), written_whole(path) as file:  # it only saves time
        file.write(json.dumps(content, separators=(",", ":")).encode())
