"""Token files in many shards, read as one: each opened when first touched, a bounded number mapped at a time.

    wiki/shards.json                 what the whole is: every shard's digest, its ids of each split, the tokenizer
    wiki/shard-00000.safetensors     token files (`tokens.py`), each with its place in the whole
    wiki/shard-00001.safetensors

    shard-00000    | train 0 .. 999      |
    shard-00001    | train 1000 .. 1799  | val 0 .. 199 |     a split goes on from shard to shard
    shard-00002    | val 200 .. 560      |

Owns the list, the joined ids, and what `--data` may name: a token file, a folder of shards, its list, a pattern, a
URL of any of these but a pattern. A folder is written whole or not at all; where its list is lost, the shards' own
places say what it was. Does not import torch.
"""

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from glob import glob
from itertools import accumulate, pairwise
from pathlib import Path
from threading import Lock
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from fivestep.data.corpus import Report, unreported
from fivestep.data.files import expanded, folder_written_whole, read_bounded, write_durably
from fivestep.data.remote import Remote, check_room, is_url, local_path
from fivestep.data.tokenizer import Ids
from fivestep.data.tokens import (
    DTYPES,
    MAX_HEADER,
    SPLITS,
    SUFFIX,
    TokenFile,
    TokenWriter,
    is_token_file,
    open_tokens,
    verify_tokens,
)
from fivestep.errors import UsageError, brief

FORMAT, VERSION = "fivestep-shards", "1"
LIST, NAME = "shards.json", "shard-{:05}" + SUFFIX
MOST_SHARDS = 100_000  # as many as five digits name
MOST_OPEN = 128  # shards mapped at a time, each with a file descriptor
AT_ONCE = 8  # shards brought from elsewhere at a time
PLACE = "shard"  # the key of a shard's metadata: its place in the whole


@dataclass(frozen=True)
class Shard:
    """One file of the whole. file: name or path. size: bytes. lengths: ids of each split, in the file's order."""

    file: str
    size: int
    digest: str
    lengths: dict[str, int]


@dataclass(frozen=True)
class Whole:
    """What the list says. metadata: as a token file's."""

    dtype: np.dtype[Any]
    metadata: dict[str, str]
    shards: tuple[Shard, ...]


class Maps:
    """The maps of a whole's shards: made when a shard is first touched, those touched longest ago given up.

    locate: the path of a shard, which it may have to be brought to first.
    """

    def __init__(self, name: str, whole: Whole, locate: Callable[[Shard], Path], most_open: int = MOST_OPEN) -> None:
        self.name, self.whole, self.most_open = name, whole, most_open
        self._locate = locate
        self._open: dict[int, dict[str, Ids]] = {}  # by number, the one touched last at the end
        self._paths: dict[int, Path] = {}  # of those that were looked at once
        self._lock = Lock()

    def ids(self, number: int, split: str) -> Ids:
        """The ids of a split in a shard. Raises UsageError where it is not the shard that the list names."""
        with self._lock:
            splits = self._open.pop(number, None) or self._map(number)
            self._open[number] = splits
            while len(self._open) > self.most_open:
                del self._open[next(iter(self._open))]
        return splits[split]

    def path(self, number: int) -> Path:
        """Where a shard lies, brought there and looked at."""
        if number not in self._paths:
            self._paths[number] = self._looked_at(number)
        return self._paths[number]

    def fetch(self, numbers: Iterable[int]) -> None:
        """Have shards at hand, several brought at a time where they come from elsewhere."""
        new = [number for number in numbers if number not in self._paths]
        if len(new) > 1:
            with ThreadPoolExecutor(AT_ONCE) as threads:
                self._paths |= zip(new, threads.map(self._looked_at, new), strict=True)

    @property
    def at_hand(self) -> bool:
        """Whether every shard was looked at."""
        return len(self._paths) == len(self.whole.shards)

    def _map(self, number: int) -> dict[str, Ids]:
        path, shard, dtype = self.path(number), self.whole.shards[number], self.whole.dtype
        total = sum(shard.lengths.values())
        try:
            ids: Ids = np.memmap(path, dtype, "r", shard.size - total * dtype.itemsize, (total,))
        except FileNotFoundError:  # another process made room in the cache
            del self._paths[number]
            return self._map(number)
        except (OSError, ValueError) as error:
            raise UsageError(f"the shard {path} can no longer be read ({error})") from error
        ends = list(accumulate(shard.lengths.values(), initial=0))
        plain = np.asarray(ids)  # indexing np.memmap itself is several times slower
        return {split: plain[i:j] for split, (i, j) in zip(shard.lengths, pairwise(ends), strict=True)}

    def _looked_at(self, number: int) -> Path:
        """Where a shard is, once its header has shown that it is the one of the list."""
        shard = self.whole.shards[number]
        path = self._locate(shard)
        tokens = open_tokens(path)
        if _shard_of(tokens, shard.file) != shard or tokens.dtype != self.whole.dtype:
            raise UsageError(
                f"{path} is not shard {number} of --data {self.name}: it was exchanged, renamed, or made anew; "
                "`fivestep data verify` looks at all of them"
            )
        return path


class ShardedIds:
    """The ids of a split, over all shards as one 1-D array: [i], [i:j], and runs of them; always copies.

    An id that the vocabulary does not have is refused where it is read.
    """

    def __init__(self, maps: Maps, split: str, vocab_size: int | None) -> None:
        self.split, self.maps = split, maps
        lengths = [shard.lengths[split] for shard in maps.whole.shards]
        self._numbers = [number for number, length in enumerate(lengths) if length]
        ends = list(accumulate((length for length in lengths if length), initial=0))
        self._begins, self._ends = ends[:-1], np.array(ends[1:], np.int64)
        self._length = ends[-1]
        self._limit = vocab_size if vocab_size and vocab_size <= np.iinfo(self.dtype).max else None

    @property
    def dtype(self) -> np.dtype[Any]:
        """Of the ids."""
        return self.maps.whole.dtype

    @property
    def shards(self) -> int:
        """How many shards hold some of them."""
        return len(self._numbers)

    @property
    def nbytes(self) -> int:
        """Of all ids, on the disk."""
        return self._length * self.dtype.itemsize

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, key: int | slice) -> Any:
        """An id, or a copy of a slice."""
        if isinstance(key, slice):
            start, stop, step = key.indices(self._length)
            if step < 0:
                raise IndexError(f"the ids of shards are read forwards; got {key}")
            return self.runs(np.array([start]), max(0, stop - start))[0, ::step]
        at = range(self._length)[key]  # raises IndexError
        return self.runs(np.array([at]), 1)[0, 0]

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> Ids:
        """All of them, in memory."""
        if copy is False:
            raise ValueError("the ids of shards cannot be given without a copy")
        return np.asarray(self[:], dtype)

    def runs(self, begins: npt.NDArray[np.int64], length: int) -> Ids:
        """`length` ids from each of `begins`: [len(begins), length]; past the end 0. Raises UsageError."""
        found = np.zeros((len(begins), length), self.dtype)
        first = np.searchsorted(self._ends, begins, side="right")
        if self._numbers and not self.maps.at_hand:
            last = np.searchsorted(self._ends, np.minimum(begins + length, self._length) - 1, side="right")
            touched = {place for i, j in zip(first, last, strict=True) for place in range(i, j + 1)}
            self.maps.fetch(self._numbers[place] for place in sorted(touched))
        for row, begin, place in zip(found, begins.tolist(), first.tolist(), strict=True):
            self._fill(row, begin, place)
        if self._limit is not None and found.size:
            self._check(found, begins)
        return found

    def take(self, at: npt.NDArray[np.integer]) -> Ids:
        """The ids at `at`, of any shape, each in [0, len). Raises IndexError outside."""
        if at.size and not 0 <= at.min() <= at.max() < self._length:
            raise IndexError(f"indices must lie in [0, {self._length}); got {at.min()} to {at.max()}")
        return self.runs(at.astype(np.int64).ravel(), 1).reshape(at.shape)

    def _fill(self, row: Ids, at: int, place: int) -> None:
        filled = 0
        while filled < len(row) and place < len(self._numbers):
            skipped = at + filled - self._begins[place]
            ids = self.maps.ids(self._numbers[place], self.split)[skipped : skipped + len(row) - filled]
            row[filled : filled + len(ids)] = ids
            filled += len(ids)
            place += 1

    def _check(self, found: Ids, begins: npt.NDArray[np.int64]) -> None:
        unsigned = found.view(f"u{found.itemsize}")  # a negative id becomes a large one
        if unsigned.max() >= self._limit:
            row, column = np.unravel_index(int(unsigned.argmax()), found.shape)
            at = int(begins[row]) + int(column)
            shard = self.maps.whole.shards[self._numbers[int(np.searchsorted(self._ends, at, side="right"))]]
            raise UsageError(
                f"{shard.file} of --data {self.maps.name} is damaged: token {at:,} of {self.split} is "
                f"{found[row, column]}, but the vocabulary has {self._limit:,} (`fivestep data verify` reads all)"
            )


# --- opening ---


def is_token_source(source: str) -> bool:
    """Whether `--data source` names token files: one, a folder of shards, its list, a pattern, or a URL."""
    if is_url(source):
        return True
    path = expanded(source)
    if path.is_dir():
        return (path / LIST).is_file() or next(path.glob(_pattern()), None) is not None
    return is_token_file(path) or (path.name == LIST and path.is_file()) or _is_pattern(source)


def open_token_source(source: str) -> TokenFile:
    """Open what `is_token_source` knows. Raises UsageError that names the first fault."""
    if is_url(source):
        path = local_path(source)
        if path is None:
            return _open_remote(source)
        source = str(path)
    path = expanded(source)
    if path.is_file() and path.name != LIST:
        return _whole_file(open_tokens(path))
    whole, folder = _described(source)
    _check_present(source, whole, {one.name: one.stat().st_size for one in _files(whole, folder)})
    return _opened(source, whole, lambda shard: folder / shard.file)


def local_files(tokens: TokenFile) -> list[Path]:
    """Return the files here that hold the ids of `tokens`; none for a URL, whose shards are verified when fetched."""
    if is_url(str(tokens.path)):
        return []
    ids = next(iter(tokens.splits.values()))
    if not isinstance(ids, ShardedIds):
        return [Path(tokens.path)]
    return [ids.maps.path(number) for number in range(len(ids.maps.whole.shards))]


def verify_token_source(source: str, report: Report = unreported) -> TokenFile:
    """Open token files and read every one whole. Raises UsageError that names the first fault."""
    tokens = open_token_source(source)
    ids = next(iter(tokens.splits.values()))
    if not isinstance(ids, ShardedIds):
        return verify_tokens(Path(tokens.path), report)
    for number in range(len(ids.maps.whole.shards)):
        verify_tokens(ids.maps.path(number), report)
    return tokens


def _described(source: str) -> tuple[Whole, Path]:
    """What a folder, its list or a pattern says of the whole, and where the shards' names begin."""
    path = expanded(source)
    listed = path if path.name == LIST else path / LIST
    if listed.is_file():
        try:
            return read_list(read_bounded(listed, MAX_HEADER), str(listed)), listed.parent
        except OSError as error:
            raise UsageError(f"the list {listed} cannot be read ({error.strerror or error})") from error
    pattern = str(path / _pattern()) if path.is_dir() else str(path)
    files = sorted(map(Path, glob(pattern)))  # noqa: PTH207  (a pattern may be absolute)
    if not files:
        raise UsageError(f"--data {source} is no file, and no file's name fits it")
    return collected([_whole_file(open_tokens(file), lone=False) for file in files], source), Path()


def _opened(name: str, whole: Whole, locate: Callable[[Shard], Path]) -> TokenFile:
    maps = Maps(name, whole, locate)
    tokens = TokenFile(name if is_url(name) else expanded(name), {}, whole.dtype, whole.metadata)
    size = tokens.tokenizer.vocab_size if "tokenizer_json" in whole.metadata else None
    present = [split for split in SPLITS if split in whole.shards[0].lengths]
    return replace(tokens, splits={split: ShardedIds(maps, split, size) for split in present})


def _open_remote(url: str) -> TokenFile:
    whole, single, remote = _remote_parts(url)
    if whole is None:
        assert single is not None
        path = remote.fetch(single.file, single.size, single.digest, _digest)
        return _whole_file(open_tokens(path))
    check_room(remote.name, (shard.size for shard in whole.shards))
    if listed := remote.sizes():
        _check_present(remote.name, whole, listed)
    return _opened(remote.name, whole, lambda shard: remote.fetch(shard.file, shard.size, shard.digest, _digest))


def _remote_parts(url: str) -> tuple[Whole | None, Shard | None, Remote]:
    """The list of a folder elsewhere, or the one token file, and the folder it is in."""
    folder, _, name = url.rstrip("/").rpartition("/")
    if name.endswith(SUFFIX):
        remote = Remote(folder)
        return None, _remote_file(remote, name), remote
    remote = Remote(folder if name == LIST else url)
    content = remote.read(LIST, MAX_HEADER)
    return read_list(content, f"{remote.name}/{LIST}"), None, remote


def _remote_file(remote: Remote, name: str) -> Shard:
    """A token file elsewhere, by its header."""
    size = remote.size(name)
    try:
        length = int.from_bytes(remote.piece(name, 0, 8), "little") if size > 8 else 0
        header = json.loads(remote.piece(name, 8, 8 + length)) if 0 < length <= min(size - 8, MAX_HEADER) else {}
        digest = header["__metadata__"]["digest"]
        if not _is_digest(digest):
            raise ValueError("its digest is none")
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        if isinstance(error, UsageError):
            raise
        raise UsageError(
            f"--data {remote.name}/{name} is no token file, or a damaged one ({brief(error)})"
        ) from error
    check_room(f"{remote.name}/{name}", [size])
    return Shard(name, size, digest, {})


def _whole_file(tokens: TokenFile, lone: bool = True) -> TokenFile:
    """A token file that is what it is asked to be: a text by itself, or (not `lone`) one shard of several."""
    if lone == (PLACE in tokens.metadata):
        if lone:
            raise UsageError(f"--data {tokens.path} is one shard of several: give the folder that it is in")
        raise UsageError(
            f"{tokens.path} is a whole token file, no shard: give it alone, or several with weights (--data A:0.7 "
            "--data B:0.3)"
        )
    return tokens


def _digest(path: Path) -> str:
    return verify_tokens(path).metadata["digest"]


def _files(whole: Whole, folder: Path) -> list[Path]:
    return [path for shard in whole.shards if (path := folder / shard.file).is_file()]


def _check_present(name: str, whole: Whole, sizes: dict[str, int]) -> None:
    """Raises UsageError naming shards that are not there, or have another size. sizes: bytes by file name."""
    if missing := [shard.file for shard in whole.shards if Path(shard.file).name not in sizes]:
        more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
        raise UsageError(
            f"--data {name} lacks {', '.join(missing[:3])}{more}, of {len(whole.shards)} shards: bring them back, or "
            "make it again"
        )
    for shard in whole.shards:
        if (found := sizes[Path(shard.file).name]) != shard.size:
            raise UsageError(
                f"{shard.file} of --data {name} has {found:,} bytes instead of {shard.size:,}: bring it back, or "
                "make it again"
            )


def _is_pattern(source: str) -> bool:
    return any(mark in source for mark in "*?[") and source.endswith(SUFFIX) and not expanded(source).exists()


def _pattern() -> str:
    return NAME.format(0).replace("00000", "*")


# --- the list ---


def read_list(content: bytes, name: str) -> Whole:
    """The list of a whole's shards. Raises UsageError for a damaged or other one: it may come from anywhere."""
    try:
        found = json.loads(content)
        if (found["format"], found["version"]) != (FORMAT, VERSION):
            raise ValueError(f"its format is not {FORMAT} {VERSION}")
        if found["digest"] != _list_digest(found):
            raise ValueError("its digest is not that of what it says")
        shards = tuple(_checked_shard(one) for one in found["shards"])
        metadata = found["metadata"]
        if not shards or not all(isinstance(value, str) for value in metadata.values()):
            raise ValueError("it has no shards, or its metadata are not all text")
        if len({tuple(shard.lengths) for shard in shards}) > 1:
            raise ValueError("its shards have not the same splits")
        return Whole(DTYPES[found["dtype"]], metadata, shards)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UsageError(f"{name} is no list of shards, or a damaged one ({brief(error)}): make it again") from error


def _checked_shard(one: Any) -> Shard:
    shard = Shard(one["file"], one["bytes"], one["digest"], one["splits"])
    if Path(shard.file).name != shard.file or not shard.file.endswith(SUFFIX) or not _is_digest(shard.digest):
        raise ValueError(f"{shard.file!a} with the digest {shard.digest!a} is no shard")
    counts = [shard.size, *shard.lengths.values()]
    if not set(shard.lengths) <= set(SPLITS) or not all(type(count) is int and count >= 0 for count in counts):
        raise ValueError(f"the sizes of {shard.file} are no numbers")
    return shard


def _is_digest(text: Any) -> bool:
    return isinstance(text, str) and len(text) == 64 and set(text) <= set("0123456789abcdef")


def _list_digest(content: dict[str, Any]) -> str:
    rest = {key: value for key, value in content.items() if key != "digest"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def _shard_of(tokens: TokenFile, file: str) -> Shard:
    """An open shard as a list names it."""
    lengths = {split: len(ids) for split, ids in tokens.splits.items()}
    size = Path(tokens.path).stat().st_size
    return Shard(file, size, tokens.metadata.get("digest", ""), lengths)


def collected(files: Sequence[TokenFile], name: str) -> Whole:
    """The whole that open shards make, by the place that each one names. Raises UsageError where they make none."""
    found: dict[int, tuple[TokenFile, dict[str, Any]]] = {}
    for tokens in files:
        place = _place(tokens)
        first = next(iter(found.values()), (tokens, place))
        if place["whole"] != first[1]["whole"]:
            raise UsageError(f"{tokens.path} and {first[0].path} are shards of different wholes: keep them apart")
        if place["number"] in found:
            raise UsageError(f"{tokens.path} and {found[place['number']][0].path} are the same shard: keep one")
        found[place["number"]] = tokens, place
    last = max(found)
    missing = sorted(set(range(last + 1)) - set(found)) + ([] if found[last][1]["last"] else [last + 1])
    if missing:
        shown = ", ".join(NAME.format(number) for number in missing[:3])
        raise UsageError(f"--data {name} is not whole: {shown}{' and more' if len(missing) > 3 else ''} missing")
    ordered = [found[number] for number in range(last + 1)]
    shards = tuple(_shard_of(tokens, str(tokens.path)) for tokens, _ in ordered)
    begins = dict.fromkeys(shards[0].lengths, 0)
    unknown = dict.fromkeys(begins, 0)
    for shard, (tokens, place) in zip(shards, ordered, strict=True):
        if place["begins"] != begins:
            raise UsageError(f"{tokens.path} does not go on where the shard before it ends: make them again")
        begins = {split: begin + shard.lengths[split] for split, begin in begins.items()}
        unknown = {split: count + tokens.unknown.get(split, 0) for split, count in unknown.items()}
    metadata = {key: value for key, value in ordered[0][0].metadata.items() if key not in (PLACE, "digest")}
    return Whole(ordered[0][0].dtype, {**metadata, "unknown": json.dumps(unknown)}, shards)


def _place(tokens: TokenFile) -> dict[str, Any]:
    try:
        place: dict[str, Any] = json.loads(tokens.metadata[PLACE])
        kinds = {"whole": str, "number": int, "begins": dict, "last": bool}
        if {key: type(value) for key, value in place.items()} != kinds:
            raise ValueError("it has no such place")
        return place
    except (ValueError, KeyError, AttributeError, RecursionError) as error:
        raise UsageError(f"{tokens.path} is a shard that does not say which ({brief(error)})") from error


# --- writing ---


class ShardWriter:
    """Shards that are being written, one after the other; filled as a `TokenWriter` is, part by part."""

    def __init__(
        self, folder: Path, splits: tuple[str, ...], dtype: np.dtype[Any], metadata: dict[str, str], most: int
    ) -> None:
        self.folder, self.dtype, self.metadata, self.most = folder, dtype, metadata, most
        self.lengths, self.unknown = dict.fromkeys(splits, 0), dict.fromkeys(splits, 0)
        named = json.dumps([sorted(metadata.items()), splits, dtype.str, most])
        self._whole = hashlib.sha256(named.encode()).hexdigest()
        self._written: list[dict[str, Any]] = []
        self._file: BinaryIO
        self._writer: TokenWriter | None = None

    def parts(self, ids: Ids) -> Iterator[Ids]:
        """`ids`, cut where a shard is full; each part is to be added before the next is asked for."""
        while len(ids):
            room = self.most - (sum(self._writer.lengths.values()) if self._writer else 0)
            if room:
                yield ids[:room]
            else:
                self._close(last=False)
            ids = ids[room:]

    def add(self, split: str, ids: Ids, unknown: int = 0) -> None:
        """Append a part to a split; splits come in the order that was given. Raises OSError."""
        if self._writer is None:
            self._open()
        assert self._writer is not None
        self._writer.add(split, ids, unknown)
        self.lengths[split] += len(ids)
        self.unknown[split] += unknown

    def finish(self) -> None:
        """Close the last shard and write the list, which makes a whole of them."""
        if self._writer is not None:
            self._close(last=True)
        name = next(name for name, dtype in DTYPES.items() if dtype == self.dtype)
        metadata = {**self.metadata, "unknown": json.dumps(self.unknown)}
        content = {"format": FORMAT, "version": VERSION, "dtype": name, "metadata": metadata, "shards": self._written}
        write_durably(self.folder / LIST, json.dumps({**content, "digest": _list_digest(content)}, indent=1).encode())

    def _open(self) -> None:
        number = len(self._written)
        if number == MOST_SHARDS:
            raise UsageError(f"there would be more than {MOST_SHARDS:,} shards: give a larger --shard-size")
        place = {"whole": self._whole, "number": number, "begins": self.lengths, "last": False}
        self._file = (self.folder / NAME.format(number)).open("xb")
        metadata = {**self.metadata, PLACE: json.dumps(place)}
        self._writer = TokenWriter(self._file, tuple(self.lengths), self.dtype, metadata)

    def _close(self, last: bool) -> None:
        assert self._writer is not None
        if last:  # a letter less than there is room for
            place = {**json.loads(self._writer.metadata[PLACE]), "last": True}
            self._writer.metadata[PLACE] = json.dumps(place)
        digest = self._writer.finish()
        self._file.flush()
        os.fsync(self._file.fileno())
        size = self._file.seek(0, os.SEEK_END)
        name, lengths = NAME.format(len(self._written)), self._writer.lengths
        self._written.append({"file": name, "bytes": size, "digest": digest, "splits": lengths})
        self.abandon()

    def abandon(self) -> None:
        """Close the file that is open."""
        if self._writer is not None:
            self._file.close()
            self._writer = None


@contextmanager
def shard_writer(
    folder: Path, splits: tuple[str, ...], dtype: np.dtype[Any], metadata: dict[str, str], most: int
) -> Iterator[ShardWriter]:
    """Shards of at most `most` ids each, to fill; `folder` is there once the block ended well. Raises OSError."""
    with folder_written_whole(folder) as filled:
        writer = ShardWriter(filled, splits, dtype, metadata, most)
        try:
            yield writer
            writer.finish()
        finally:
            writer.abandon()
