"""What starting costs: the help of the command line, and `import fivestep`, beside `import torch`.

    python -m benchmarks.startup

Whole processes, in turns. What an import adds is taken inside a process that has imported torch.
"""

import subprocess
import sys
from functools import partial

from benchmarks.measure import (
    Figure,
    add_options,
    alternate,
    child,
    figure,
    fivestep,
    parsed,
    process_seconds,
    report,
)

ADDED = """
from time import perf_counter
import torch
begun = perf_counter()
{statement}
print(perf_counter() - begun)
"""


def added(statement: str) -> float:
    """Seconds that `statement` takes in a fresh process that has imported torch."""
    command = [sys.executable, "-c", ADDED.format(statement=statement)]
    return float(subprocess.run(command, capture_output=True, text=True, check=True, env=child()).stdout)


def measure(repeats: int) -> list[Figure]:
    """The figures of this file."""
    found = alternate(
        {
            "torch": partial(process_seconds, [sys.executable, "-c", "import torch"]),
            "help": partial(process_seconds, fivestep("--help")),
            "train help": partial(process_seconds, fivestep("train", "--help")),
            "import": partial(added, "import fivestep"),
            "every name": partial(added, "from fivestep import *"),
        },
        repeats,
    )
    torch = found["torch"]
    return [
        figure("`fivestep --help` against `import torch`", found["help"], "s", against=torch, target=0.25),
        figure("`fivestep train --help` against `import torch`", found["train help"], "s", against=torch),
        figure("`import fivestep` adds to `import torch`", found["import"], "s", target=0.1),
        figure("`from fivestep import *` adds to `import torch`", found["every name"], "s"),
    ]


def main() -> None:
    """Measure, and print."""
    options = parsed(add_options(__doc__, repeats=5, quick=1))
    report(options, measure(options.repeats))


if __name__ == "__main__":
    main()
