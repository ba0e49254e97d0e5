"""Batches of windows from 64 shards, from a URL and from a mixture, beside those from a single token file.

    python -m benchmarks.shards

All in one process, in turns, with the ids in the page cache: what is compared is the reading, not the disk. A batch
is 32 windows of 64 tokens, or 16 of 1,024, gathered as in training, in shuffled order over the whole text.
`memory://` is fsspec's own file system in memory, so that the network's part is nothing: what remains is the copying
into the cache and its check by digest, once a shard. The order of 10^9 windows is beside that of 10^6.
"""

import os
import tempfile
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np

from benchmarks.measure import Figure, add_options, alternate, figure, parsed, report, skipped
from fivestep.data.mixture import Mixture
from fivestep.data.order import read
from fivestep.data.shards import open_token_source, shard_writer
from fivestep.data.tokens import write_tokens
from fivestep.data.windows import Windows

SHAPES = ((32, 64), (16, 1024))  # windows a batch, tokens a window
SHARDS = 64
MANY, FEW = 10**9, 10**6  # windows


def written(folder: Path, ids: np.ndarray) -> None:
    """The ids as one file, and in shards."""
    write_tokens(folder / "one.safetensors", {"train": ids}, {"source": "", "name": "one"})
    with shard_writer(folder / "many", ("train",), ids.dtype, {"source": ""}, -(-len(ids) // SHARDS)) as writer:
        for part in writer.parts(ids):
            writer.add("train", part)


def streams(folder: Path, url: str | None) -> dict[str, Callable[[int, int], Any]]:
    """How each contestant makes a stream of (windows a batch, tokens a window)."""
    one, many = (open_token_source(str(folder / name)).splits["train"] for name in ("one.safetensors", "many"))
    found: dict[str, Callable[[int, int], Any]] = {
        "one file": lambda rows, block: Windows(one, block, rows),
        "64 shards": lambda rows, block: Windows(many, block, rows),
        "mixture of two": lambda rows, block: Mixture({"a": one, "b": many}, [0.7, 0.3], block, rows),
    }
    if url is not None:
        far = open_token_source(url).splits["train"]
        found["by memory://"] = lambda rows, block: Windows(far, block, rows)
    return found


def seconds_a_batch(stream: Any, batches: int) -> float:
    """Of `batches` of them, after ten that open what there is to open."""
    source = stream.epoch(0)
    for _ in islice(source, 10):
        pass
    begun = perf_counter()
    count = sum(1 for _ in islice(source, batches))
    return (perf_counter() - begun) / count


def gathered(folder: Path, url: str | None, repeats: int, batches: int) -> list[Figure]:
    """Seconds a batch, each against the single file in the same turn."""
    figures = []
    for rows, block in SHAPES:
        made = {name: make(rows, block) for name, make in streams(folder, url).items()}
        turns = {name: lambda one=one: seconds_a_batch(one, batches) for name, one in made.items()}
        found = alternate(turns, repeats)
        for name, seconds in found.items():
            if name != "one file":
                what = f"{name}: a batch of {rows} windows of {block:,}"
                figures.append(figure(what, seconds, "µs", against=found["one file"], scale=1e6))
    return figures


def first_touch(folder: Path, url: str | None, repeats: int) -> list[Figure]:
    """Opening a folder of shards, and reading an id of every one, which looks at each; brought from a URL first."""
    opening, touching, bringing = [], [], []
    size = sum(path.stat().st_size for path in (folder / "many").glob("*.safetensors"))
    for repeat in range(repeats):
        begun = perf_counter()
        ids = open_token_source(str(folder / "many")).splits["train"]
        opening.append(perf_counter() - begun)
        places = np.arange(0, len(ids), -(-len(ids) // SHARDS))
        begun = perf_counter()
        ids.take(places)
        touching.append(perf_counter() - begun)
        if url is not None:
            os.environ["FIVESTEP_CACHE"] = str(folder / f"cache-{repeat}")
            begun = perf_counter()
            open_token_source(url).splits["train"].take(places)
            bringing.append(size / 1e6 / (perf_counter() - begun))
    figures = [
        figure("opening a folder of 64 shards", opening, "ms", scale=1e3),
        figure("the first touch of all 64", touching, "ms", scale=1e3),
    ]
    if url is None:
        return figures
    return [*figures, figure("bringing them from memory://, checked by digest", bringing, "MB/s")]


def ordered(repeats: int) -> list[Figure]:
    """4,096 places of a permutation, taken in its middle."""

    def seconds(n: int) -> float:
        begun = perf_counter()
        for _ in islice(read(n, 4096, 0, 0, start=n // 2), 20):
            pass
        return (perf_counter() - begun) / 20

    found = alternate({"many": lambda: seconds(MANY), "few": lambda: seconds(FEW)}, repeats)
    return [figure("4,096 places of the order of 10^9 windows", found["many"], "µs", against=found["few"], scale=1e6)]


def main() -> None:
    """Measure, and print."""
    options = parsed(add_options(__doc__, repeats=7, quick=1))
    tokens, batches = (300_000, 5) if options.quick else (64_000_000, 300)
    before = os.environ.get("FIVESTEP_CACHE")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        os.environ["FIVESTEP_CACHE"] = str(folder / "cache")
        try:
            written(folder, np.random.default_rng(0).integers(0, 50_000, tokens).astype(np.uint16))
            try:
                import fsspec
            except ImportError:
                url = None
            else:
                url = "memory://benchmark/many"
                files = fsspec.filesystem("memory")
                files.put(str(folder / "many"), "/benchmark/many", recursive=True)
            figures = [*gathered(folder, url, options.repeats, batches), *ordered(options.repeats)]
            figures += first_touch(folder, url, min(3, options.repeats))
            if url is None:
                figures.append(skipped("by memory://", "fsspec is not installed (the extra remote)"))
            else:
                files.rm("/benchmark", recursive=True)
        finally:
            os.environ.pop("FIVESTEP_CACHE")
            if before is not None:
                os.environ["FIVESTEP_CACHE"] = before
    report(options, figures)


if __name__ == "__main__":
    main()
