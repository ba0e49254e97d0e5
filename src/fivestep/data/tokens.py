"""Token ids on disk: made once, memory-mapped by every run after.

    8 bytes       the header's length, little-endian
    header        JSON: one tensor a split (dtype U8, U16 or I32), and `__metadata__`; padded to 64 bytes
    data          the splits, one after another

The metadata hold the tokenizer, so that the file stands alone, and a digest over every other bit of the header and
the ids, which `verify_tokens` compares; opening a file reads its header only.

A valid safetensors file, so that other tools read it. Owns the file; what the ids mean is the tokenizer's, how they
are made `preparation.py`'s. Does not import torch: batches are cut by `windows.py` and `segments.py`.
"""

import hashlib
import json
import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO, Protocol

import numpy as np
import numpy.typing as npt

from fivestep.data.corpus import Report, unreported
from fivestep.data.files import written_whole
from fivestep.data.tokenizer import Ids, Tokenizer, from_json
from fivestep.errors import UsageError

FORMAT, VERSION = "fivestep-tokens", "1"
SUFFIX = ".safetensors"
DTYPES: dict[str, np.dtype[Any]] = {"U8": np.dtype("<u1"), "U16": np.dtype("<u2"), "I32": np.dtype("<i4")}
SPLITS = ("train", "val", "test")
ALIGNMENT = 64  # bytes: the data begin on a cache line
MAX_HEADER = 100_000_000  # bytes: safetensors' own limit; ours hold the vocabulary
CHUNK = 1 << 22  # ids read at a time where a whole file is gone through
_NO_DIGEST = "0" * 64


class JoinedIds(Protocol):
    """Ids that lie in several places (`shards.py`), read as one 1-D array: [i:j], and runs of them."""

    @property
    def dtype(self) -> np.dtype[Any]: ...

    @property
    def nbytes(self) -> int: ...

    def __len__(self) -> int: ...

    def __getitem__(self, key: slice) -> Ids: ...

    def runs(self, begins: npt.NDArray[np.int64], length: int) -> Ids: ...


def readable(tokens: Ids | JoinedIds) -> Ids | JoinedIds:
    """What `runs` reads fastest: a plain view, as indexing np.memmap itself is several times slower."""
    return tokens if hasattr(tokens, "runs") else np.asarray(tokens)


def runs(tokens: Ids | JoinedIds, begins: npt.NDArray[np.int64], length: int) -> Ids:
    """`length` ids from each of `begins`, as a copy: [len(begins), length]. Past the end stands any id."""
    if isinstance(tokens, np.ndarray):
        return tokens.take(begins[:, None] + np.arange(length), mode="clip")
    return tokens.runs(begins, length)


@dataclass(frozen=True)
class TokenFile:
    """A token file, open, or several that are one (`shards.py`), whose path may be a URL.

    splits: ids [length] by split, read-only, mapped. metadata: as written, strings.
    """

    path: Path | str
    splits: dict[str, Any]  # Ids, or JoinedIds
    dtype: np.dtype[Any]
    metadata: dict[str, str]

    @property
    def unknown(self) -> dict[str, int]:
        """How many tokens of each split are unknown."""
        return dict(json.loads(self.metadata.get("unknown", "{}")))

    @property
    def name(self) -> str:
        """What the text was called, for people: a line that can be shown on any terminal."""
        return shown(self.metadata.get("name", "unknown"))

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer that stands in the file. Raises UsageError where there is none, or a damaged one."""
        try:
            tokenizer = from_json(json.loads(self.metadata["tokenizer_json"]))
        except KeyError:
            raise UsageError(f"{self.path} holds no tokenizer: make it with `fivestep data make`") from None
        except (ValueError, RecursionError) as error:  # UsageError among them
            raise UsageError(f"{self.path}: its tokenizer cannot be read ({error})") from error
        if tokenizer.fingerprint != self.metadata.get("tokenizer"):
            raise UsageError(f"{self.path} is damaged: its tokenizer is not the one that it names")
        return tokenizer


class TokenWriter:
    """A token file that is being written, split after split, whose lengths are not known before."""

    def __init__(
        self, file: BinaryIO, splits: tuple[str, ...], dtype: np.dtype[Any], metadata: dict[str, str]
    ) -> None:
        self.file, self.dtype, self.metadata = file, dtype, metadata
        self.lengths, self.unknown = dict.fromkeys(splits, 0), dict.fromkeys(splits, 0)
        self._digest = hashlib.sha256()
        longest = _header(dict.fromkeys(splits, 10**18), dtype, self._described(10**18))
        self._header_bytes = len(longest) + -(8 + len(longest)) % ALIGNMENT
        if self._header_bytes > MAX_HEADER:
            raise UsageError(
                f"the vocabulary takes {len(longest):,} bytes, a token file holds {MAX_HEADER:,}: "
                "lower --max-vocabulary"
            )
        file.write(bytes(8 + self._header_bytes))

    def parts(self, ids: Ids) -> Iterator[Ids]:
        """`ids` as they are to be added: here, in one part."""
        yield ids

    def add(self, split: str, ids: Ids, unknown: int = 0) -> None:
        """Append ids to a split; splits come in the order that was given. Raises OSError."""
        data = np.ascontiguousarray(ids, self.dtype).data
        self.file.write(data)
        self._digest.update(data)
        self.lengths[split] += len(ids)
        self.unknown[split] += unknown

    def finish(self) -> str:
        """Write the header into the room left for it; returns the digest."""
        header = _header(self.lengths, self.dtype, self._described()).ljust(self._header_bytes)
        digest = hashlib.sha256(self._digest.digest() + header).hexdigest()
        header = header.replace(_NO_DIGEST.encode(), digest.encode(), 1)
        self.file.seek(0)
        self.file.write(len(header).to_bytes(8, "little") + header)
        return digest

    def _described(self, most: int | None = None) -> dict[str, str]:
        unknown = self.unknown if most is None else dict.fromkeys(self.unknown, most)
        own = {"format": FORMAT, "version": VERSION, "digest": _NO_DIGEST, "unknown": json.dumps(unknown)}
        return {**own, **self.metadata}


def _header(lengths: dict[str, int], dtype: np.dtype[Any], metadata: dict[str, str]) -> bytes:
    name = next(name for name, one in DTYPES.items() if one == dtype)
    header: dict[str, Any] = {"__metadata__": metadata}
    offset = 0
    for split, length in lengths.items():
        stop = offset + length * dtype.itemsize
        header[split] = {"dtype": name, "shape": [length], "data_offsets": [offset, stop]}
        offset = stop
    return json.dumps(header, separators=(",", ":")).encode()


@contextmanager
def token_writer(
    path: Path, splits: tuple[str, ...], dtype: np.dtype[Any], metadata: dict[str, str]
) -> Iterator[TokenWriter]:
    """A token file to fill that becomes `path` when the block ends well, and vanishes when it does not.

    Raises UsageError for a dtype other than uint8, uint16 and int32 or other splits than `SPLITS`; OSError.
    """
    if dtype not in DTYPES.values() or not splits or not set(splits) <= set(SPLITS):
        raise UsageError(
            f"token splits must be 1-D, all of uint8, uint16 or int32, named {', '.join(SPLITS)}; "
            f"got {dtype} for {', '.join(splits) or 'none'}"
        )
    with written_whole(path) as file:
        writer = TokenWriter(file, splits, dtype, metadata)
        yield writer
        writer.finish()


def write_tokens(path: Path, splits: dict[str, Ids], metadata: dict[str, str]) -> None:
    """Write ids, whole or not at all. splits: 1-D, of one dtype (uint8, uint16 or int32). Raises OSError."""
    dtypes = {ids.dtype for ids in splits.values()}
    if len(dtypes) != 1 or any(ids.ndim != 1 for ids in splits.values()):
        given = ", ".join(f"{split}: {ids.dtype}{list(ids.shape)}" for split, ids in splits.items())
        raise UsageError(f"token splits must be 1-D, all of one dtype; got {given or 'none'}")
    with token_writer(path, tuple(splits), dtypes.pop(), metadata) as writer:
        for split, ids in splits.items():
            writer.add(split, ids)


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


def shown(text: str) -> str:
    """At most 200 characters of a text, those that move a cursor or end a line spelt out."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text[:200])


def check_ids(tokens: TokenFile, size: int, report: Report = unreported) -> None:
    """Raises UsageError naming the first id outside a vocabulary of `size`: a model would end in an IndexError."""
    if np.iinfo(tokens.dtype).min == 0 and np.iinfo(tokens.dtype).max < size:
        return
    total, done = sum(ids.nbytes for ids in tokens.splits.values()), 0
    for split, ids in tokens.splits.items():
        for at in range(0, len(ids), CHUNK):
            _check_chunk(tokens.path, split, at, ids[at : at + CHUNK], size)
            done += ids[at : at + CHUNK].nbytes
            report("checking", done, total)


def _check_chunk(path: Path | str, split: str, at: int, chunk: Ids, size: int) -> None:
    if not 0 <= chunk.min() <= chunk.max() < size:
        bad = int(np.argmax((chunk < 0) | (chunk >= size)))
        raise UsageError(
            f"{path} is damaged: token {at + bad:,} of {split} is {chunk[bad]}, but the vocabulary has {size:,} "
            f"(`fivestep data verify` reads it whole); make it again"
        )


def is_token_file(path: Path) -> bool:
    """Whether `path` is a file with a token file's name."""
    return path.name.endswith(SUFFIX) and path.is_file()


def verify_tokens(path: Path, report: Report = unreported) -> TokenFile:
    """Open a token file and read it whole: header, sizes, tokenizer, digest, ids below the vocabulary's size.

    Raises UsageError that names the first fault.
    """
    tokens = open_tokens(path)
    size = tokens.tokenizer.vocab_size if "tokenizer_json" in tokens.metadata else None
    if "digest" not in tokens.metadata:
        raise UsageError(f"{path} has no digest, so that damage to its ids would not be seen: make it again")
    total = sum(ids.nbytes for ids in tokens.splits.values())
    digest, done = hashlib.sha256(), 0
    for split, ids in tokens.splits.items():
        for at in range(0, len(ids), CHUNK):
            chunk = np.array(ids[at : at + CHUNK])
            if size is not None:
                _check_chunk(path, split, at, chunk, size)
            digest.update(chunk.data)
            done += chunk.nbytes
            report("verifying", done, total)
    with path.open("rb") as file:
        header = file.read(int.from_bytes(file.read(8), "little"))
    recorded = tokens.metadata["digest"]
    blank = header.replace(recorded.encode(), _NO_DIGEST.encode(), 1)
    if hashlib.sha256(digest.digest() + blank).hexdigest() != recorded:
        raise UsageError(f"{path} is damaged: its header or its ids are not those that were written (digest)")
    return tokens


def _described(header: Any, data_bytes: int) -> tuple[np.dtype[Any], dict[str, tuple[int, int]], dict[str, str]]:
    """The dtype, each split's span in tokens, the metadata. Raises ValueError, KeyError or TypeError."""
    metadata = header.get("__metadata__") if isinstance(header, dict) else None
    if not isinstance(metadata, dict) or (metadata.get("format"), metadata.get("version")) != (
        FORMAT,
        VERSION,
    ):
        raise ValueError(f"its format is not {FORMAT} {VERSION}")
    if not all(isinstance(value, str) for value in metadata.values()):
        raise ValueError("its metadata are not all text")
    unknown = json.loads(metadata.get("unknown", "{}"))
    if not isinstance(unknown, dict) or not all(type(count) is int for count in unknown.values()):
        raise ValueError("its counts of unknown tokens are no numbers")
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
