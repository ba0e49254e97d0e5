"""Token ids on disk: made once, memory-mapped by every run after.

    8 bytes       the header's length, little-endian
    header        JSON: one tensor a split (dtype U8, U16 or I32), and `__metadata__`; padded to 64 bytes
    data          the splits, one after another

A valid safetensors file, so that other tools read it. Owns the file and its cache; what the ids mean is the
tokenizer's. Does not import torch: batches are cut by `windows.py` and `segments.py`.
"""

import json
import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import platformdirs

from fivestep.data.corpus import Corpus
from fivestep.data.files import written_whole
from fivestep.data.tokenizer import Ids, Tokenizer
from fivestep.errors import UsageError

FORMAT, VERSION = "fivestep-tokens", "1"
DTYPES: dict[str, np.dtype[Any]] = {"U8": np.dtype("<u1"), "U16": np.dtype("<u2"), "I32": np.dtype("<i4")}
SPLITS = ("train", "val", "test")
ALIGNMENT = 64  # bytes: the data begin on a cache line
MAX_HEADER = 1 << 20  # bytes: ours have a few hundred


@dataclass(frozen=True)
class TokenFile:
    """A token file, open. splits: ids [length] by split, read-only, mapped. metadata: as written, strings."""

    path: Path
    splits: dict[str, Ids]
    dtype: np.dtype[Any]
    metadata: dict[str, str]

    @property
    def unknown(self) -> dict[str, int]:
        """How many tokens of each split are unknown."""
        return {str(split): int(count) for split, count in json.loads(self.metadata.get("unknown", "{}")).items()}


def write_tokens(path: Path, splits: dict[str, Ids], metadata: dict[str, str]) -> None:
    """Write ids, whole or not at all. splits: 1-D, of one dtype (uint8, uint16 or int32). Raises OSError."""
    dtypes = {ids.dtype for ids in splits.values()}
    names = [name for name, dtype in DTYPES.items() if dtypes == {dtype}]
    if not names or any(ids.ndim != 1 for ids in splits.values()) or not set(splits) <= set(SPLITS):
        given = ", ".join(f"{split}: {ids.dtype}{list(ids.shape)}" for split, ids in splits.items())
        raise UsageError(
            f"token splits must be 1-D, all of uint8, uint16 or int32, named {', '.join(SPLITS)}; "
            f"got {given or 'none'}"
        )
    header: dict[str, Any] = {"__metadata__": {"format": FORMAT, "version": VERSION, **metadata}}
    offset = 0
    for split, ids in splits.items():
        header[split] = {
            "dtype": names[0],
            "shape": [len(ids)],
            "data_offsets": [offset, offset + ids.nbytes],
        }
        offset += ids.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % ALIGNMENT)
    with written_whole(path) as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for ids in splits.values():
            file.write(np.ascontiguousarray(ids, DTYPES[names[0]]).data)


def open_tokens(path: Path) -> TokenFile:
    """Map a token file. Raises UsageError, naming the path, for a missing, damaged or other file."""
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(length)) if 0 < length <= MAX_HEADER else None
            size = os.fstat(file.fileno()).st_size
        dtype, spans, metadata = _described(header, size - 8 - length)
        total = sum(stop - start for start, stop in spans.values())
        data: Ids = np.memmap(path, dtype, "r", 8 + length, (total,)) if total else np.empty(0, dtype)
    except OSError as error:
        raise UsageError(f"the token file {path} cannot be read ({error.strerror or error})") from error
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UsageError(
            f"{path} is no token file, or a damaged one ({error}); one in the cache may be removed: it is made again"
        ) from error
    return TokenFile(path, {split: data[start:stop] for split, (start, stop) in spans.items()}, dtype, metadata)


def tokenized(corpus: Corpus, tokenizer: Tokenizer, cache_dir: Path | None = None) -> TokenFile:
    """The corpus as ids, from the cache where they are, else made and kept there.

    The file is named by the corpus's digest and the tokenizer's fingerprint; a damaged one is made again.
    `cache_dir` defaults to `tokens/` in $FIVESTEP_CACHE or in the user's cache folder. Raises UsageError
    where that folder cannot be written.
    """
    folder = default_cache() if cache_dir is None else cache_dir
    path = folder / f"{corpus.digest[:16]}-{tokenizer.fingerprint[:16]}.safetensors"
    wanted = {"source": corpus.digest, "tokenizer": tokenizer.fingerprint}
    try:
        tokens = open_tokens(path)
        if wanted.items() <= tokens.metadata.items() and set(tokens.splits) == set(corpus.splits):
            return tokens
    except UsageError:
        pass  # missing or damaged: made below
    splits = {split: tokenizer.encode(text) for split, text in corpus.splits.items()}
    unknown = {split: tokenizer.count_unknown(ids) for split, ids in splits.items()}
    try:
        write_tokens(path, splits, {**wanted, "unknown": json.dumps(unknown)})
    except OSError as error:
        raise UsageError(
            f"the token cache {path} cannot be written ({error.strerror or error}); "
            f"set FIVESTEP_CACHE to a folder that can"
        ) from error
    return open_tokens(path)


def default_cache() -> Path:
    return Path(os.environ.get("FIVESTEP_CACHE") or platformdirs.user_cache_dir("fivestep")) / "tokens"


def _described(header: Any, data_bytes: int) -> tuple[np.dtype[Any], dict[str, tuple[int, int]], dict[str, str]]:
    """The dtype, each split's span in tokens, the metadata. Raises ValueError, KeyError or TypeError."""
    metadata = header.get("__metadata__") if isinstance(header, dict) else None
    if not isinstance(metadata, dict) or (metadata.get("format"), metadata.get("version")) != (
        FORMAT,
        VERSION,
    ):
        raise ValueError(f"its format is not {FORMAT} {VERSION}")
    tensors = {split: header[split] for split in SPLITS if split in header}
    if not tensors or set(header) != {"__metadata__", *tensors}:
        raise ValueError(f"its tensors are not {', '.join(SPLITS)}")
    (name,) = {tensor["dtype"] for tensor in tensors.values()}
    dtype, reached = DTYPES[name], 0
    spans: dict[str, tuple[int, int]] = {}
    for split, tensor in sorted(tensors.items(), key=lambda item: item[1]["data_offsets"]):
        start, stop = tensor["data_offsets"]
        if start != reached or stop - start != math.prod(tensor["shape"]) * dtype.itemsize or stop < start:
            raise ValueError(f"the span of {split} does not fit its shape")
        spans[split] = (start // dtype.itemsize, stop // dtype.itemsize)
        reached = stop
    if reached != data_bytes:
        raise ValueError(f"it should hold {reached} bytes of ids, but holds {data_bytes}")
    return dtype, spans, metadata
