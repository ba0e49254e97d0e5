"""Peak memory and time of making a token file from a large text: `python benchmarks/corpus_memory.py --size 1000`.

Writes a text of `--size` MB into a temporary folder (words of a fixed vocabulary drawn by Zipf's law, in lines),
makes a token file of it with `fivestep data make` for each tokenizer, and prints what was measured. Memory is the sum
of the resident memory (RSS; shared pages count in each process) of the whole process tree, read from /proc every
20 ms, so this runs on Linux. The system's file cache is not part of it.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

DISTINCT, LINE = 300_000, 15  # words of the vocabulary, words of a line
PAGE = os.sysconf("SC_PAGE_SIZE")


def write_text(path: Path, megabytes: float, seed: int = 0) -> None:
    """Lines of words drawn by Zipf's law; a few letters are not ASCII, so that characters are not bytes."""
    random = np.random.default_rng(seed)
    letters = np.array(list("eeeettaaooiinnsshhrrddllcumwfgypbvkäé"))
    words = ["".join(random.choice(letters, 1 + n)) for n in random.poisson(5, DISTINCT)]
    weights = np.cumsum(1 / np.arange(1, DISTINCT + 1))
    written = 0
    with path.open("w", encoding="utf-8", newline="") as file:
        while written < megabytes * 1e6:
            drawn = np.searchsorted(weights, random.random(200 * LINE) * weights[-1])
            lines = [" ".join(words[i] for i in row) for row in drawn.reshape(-1, LINE).tolist()]
            text = ".\n".join(lines) + ".\n"
            written += len(text.encode())
            file.write(text)


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
    command = [sys.executable, "-m", "fivestep", *arguments]
    start, peak = time.perf_counter(), 0
    process = subprocess.Popen(command, env={**os.environ, **environment}, stdout=subprocess.DEVNULL)
    while process.poll() is None:
        peak = max(peak, tree_memory(process.pid))
        time.sleep(0.02)
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, command)
    return peak, time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=float, default=1000, help="MB of text (1,000,000 bytes each)  [1000]")
    parser.add_argument("--tokenizers", nargs="+", default=["bytes", "chars", "words"])
    parser.add_argument("--workers", type=int, default=None, help="processes  [as the command chooses]")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        text = Path(folder) / "text.txt"
        write_text(text, options.size)
        megabytes = text.stat().st_size / 1e6
        print(f"{megabytes:,.0f} MB of text, {len(os.sched_getaffinity(0))} cores")
        for tokenizer in options.tokenizers:
            out = Path(folder) / f"{tokenizer}.safetensors"
            workers = [] if options.workers is None else ["--workers", str(options.workers)]
            arguments = ["data", "make", str(text), "--tokenizer", tokenizer, "--out", str(out), *workers]
            peak, seconds = measure(arguments, {"FIVESTEP_CACHE": f"{folder}/cache"})
            print(
                f"{tokenizer}: peak {peak / 1e6:,.0f} MB, {seconds:,.1f} s, {megabytes / seconds:,.1f} MB/s",
                flush=True,
            )
            out.unlink()


if __name__ == "__main__":
    main()
