"""Peak memory and time of making a token file from a large text.

    python -m benchmarks.corpus_memory

Writes 1 GB of text into a temporary folder (words of a fixed vocabulary drawn by Zipf's law, in lines; the same 50 MB
again and again), and makes a token file of it with `fivestep data make` for each tokenizer, in whole processes.
Memory is the sum of the resident memory (RSS; shared pages count in each process) of the whole process tree, read
from /proc every 20 ms, so this runs on Linux. The system's file cache is not part of it.
"""

import os
import subprocess
import tempfile
import time
from pathlib import Path

import numpy as np

from benchmarks.measure import add_options, child, figure, fivestep, parsed, report

DISTINCT, LINE, PIECE = 300_000, 15, 50e6  # words of the vocabulary, words of a line, bytes that are repeated
PAGE = os.sysconf("SC_PAGE_SIZE")


def write_text(path: Path, megabytes: float, seed: int = 0) -> None:
    """Lines of words drawn by Zipf's law; a few letters are not ASCII, so that characters are not bytes.

    Beyond 50 MB the text repeats itself: no tokenizer looks back that far.
    """
    random = np.random.default_rng(seed)
    letters = np.array(list("eeeettaaooiinnsshhrrddllcumwfgypbvkäé"))
    words = ["".join(random.choice(letters, 1 + n)) for n in random.poisson(5, DISTINCT)]
    weights = np.cumsum(1 / np.arange(1, DISTINCT + 1))
    piece, size = [], 0
    while size < min(PIECE, megabytes * 1e6):
        drawn = np.searchsorted(weights, random.random(200 * LINE) * weights[-1])
        lines = [" ".join(words[i] for i in row) for row in drawn.reshape(-1, LINE).tolist()]
        piece.append((".\n".join(lines) + ".\n").encode())
        size += len(piece[-1])
    with path.open("wb") as file:
        for _ in range(max(1, round(megabytes * 1e6 / size))):
            file.writelines(piece)


def tree_memory(root: int) -> int:
    """Bytes of resident memory of a process and all that descend from it."""
    parents, resident = {}, {}
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            try:
                parents[int(folder.name)] = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
                resident[int(folder.name)] = int((folder / "statm").read_text().split()[1]) * PAGE
            except (OSError, IndexError):
                continue  # it ended just now
    tree = {root}
    while more := {child for child, parent in parents.items() if parent in tree} - tree:
        tree |= more
    return sum(resident.get(process, 0) for process in tree)


def measure(arguments: list[str], environment: dict[str, str]) -> tuple[int, float]:
    """Peak bytes of the command's process tree, and its seconds. Raises CalledProcessError where it fails."""
    command = fivestep(*arguments)
    start, peak = time.perf_counter(), 0
    process = subprocess.Popen(command, env=child(environment), stdout=subprocess.DEVNULL)
    while process.poll() is None:
        peak = max(peak, tree_memory(process.pid))
        time.sleep(0.02)
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, command)
    return peak, time.perf_counter() - start


def main() -> None:
    """Measure, and print."""
    parser = add_options(__doc__, repeats=1, quick=1)
    parser.add_argument("--size", type=float, default=None, help="MB of text (1,000,000 bytes each)  [1000]")
    parser.add_argument("--tokenizers", nargs="+", default=["bytes", "chars", "words"])
    parser.add_argument("--workers", type=int, default=None, help="processes  [as the command chooses]")
    options = parsed(parser)
    kinds = options.tokenizers[:1] if options.quick else options.tokenizers
    figures = []
    with tempfile.TemporaryDirectory() as folder:
        text = Path(folder) / "text.txt"
        write_text(text, options.size or (0.1 if options.quick else 1000))
        megabytes = text.stat().st_size / 1e6
        for tokenizer in kinds:
            out = Path(folder) / f"{tokenizer}.safetensors"
            workers = [] if options.workers is None else ["--workers", str(options.workers)]
            arguments = ["data", "make", str(text), "--tokenizer", tokenizer, "--out", str(out), *workers]
            peaks, rates = [], []
            for repeat in range(options.repeats):
                peak, seconds = measure(arguments, {"FIVESTEP_CACHE": f"{folder}/cache-{repeat}"})
                out.unlink()
                peaks.append(peak / 1e6)
                rates.append(megabytes / seconds)
            figures.append(figure(f"{tokenizer}: peak memory, {megabytes:,.0f} MB of text", peaks, "MB", target=600))
            figures.append(figure(f"{tokenizer}: all cores, start-up included", rates, "MB/s"))
    report(options, figures)


if __name__ == "__main__":
    main()
