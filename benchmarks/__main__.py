"""All benchmarks, and the page that shows what they found: `make bench`, or `python -m benchmarks [NAME ...]`.

Each script runs as a process of its own, and what it finds is kept in `results/NAME.json`, with the machine, the
versions and the date; `docs/benchmarks.md` is written from these files alone (`--page` writes it without measuring).
"""

import argparse
import ast
import json
import subprocess
import sys
from datetime import date
from functools import cache
from time import perf_counter
from typing import Any

from benchmarks.measure import ROOT, child, environment, table

RESULTS, PAGE = ROOT / "benchmarks" / "results", ROOT / "docs" / "benchmarks.md"
SCRIPTS = {  # in the order of the page, with their headings
    "step_overhead": "What a step costs beyond the loop by hand",
    "peers": "Beside other trainers",
    "bigram": "A bigram, from start to end",
    "gpt_chars": "A small GPT, to a loss and in a time",
    "word_lstm": "A language model on words",
    "encode": "Encoding text",
    "corpus_memory": "Large texts in little memory",
    "startup": "Starting",
    "processes": "Two processes",
    "shards": "Text in many shards, elsewhere, and mixed",
    "resume_loader": "Going on in the middle of an epoch",
    "augmentation": "Random augmentation",
    "save_cost": "What saving costs",
    "lens": "What looking into the layers costs",
}
TOP = """# Benchmarks

<!-- Written by `python -m benchmarks` from benchmarks/results; not by hand. -->

Every figure is measured beside its baseline in the same run, in turns. *Measured* and *baseline* are medians over the
runs; *ratio* is the median of the ratios of each turn, and *least to most* the spread of these (of the values, where
there is no ratio). A *target* is what the project holds itself to. `make bench` measures everything anew; the command
below each heading measures that alone.
"""


def there() -> list[str]:
    """The scripts of this checkout."""
    return [name for name in SCRIPTS if (ROOT / "benchmarks" / f"{name}.py").is_file()]


def command(name: str) -> str:
    """What a reader types for one script."""
    return f"python -m benchmarks.{name}"


def measured(name: str, flags: list[str]) -> dict[str, Any]:
    """What a script found, with when and on what. Raises CalledProcessError where it fails."""
    begun = perf_counter()
    words = [sys.executable, "-m", f"benchmarks.{name}", "--json", *flags]
    done = subprocess.run(words, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True, env=child())
    facts = {"date": date.today().isoformat(), "seconds": round(perf_counter() - begun), **environment(), **gpu()}
    return {**facts, "figures": json.loads(done.stdout)}


@cache
def gpu() -> dict[str, str | None]:
    """The name of the GPU; None where there is none."""
    code = "import torch; print(torch.cuda.get_device_name() if torch.cuda.is_available() else '')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return {"gpu": done.stdout.strip() or None}


def page() -> str:
    """The page, from the files of results."""
    return TOP + "".join(section(name) for name in there())


def section(name: str) -> str:
    """A script's part of the page: what it measures, on what, and its figures."""
    heading = f"\n## {SCRIPTS[name]}\n\n`{command(name)}`\n"
    path = RESULTS / f"{name}.json"
    if not path.is_file():
        return heading + "\nNot measured yet.\n"
    found = json.loads(path.read_text("utf-8"))
    module = ast.parse((ROOT / "benchmarks" / f"{name}.py").read_text("utf-8"))
    about = (ast.get_docstring(module) or "").split("\n\n")
    text = "\n\n".join(part for part in about if not part.startswith("    "))
    return f"{heading}\n{text}\n\n{machine(found)}\n\n" + "\n".join(table(found["figures"])) + "\n"


def machine(found: dict[str, Any]) -> str:
    """One sentence on when, where and with what."""
    packages = ", ".join(f"{name} {number}" for name, number in found["packages"].items())
    device = f"on the CPU and {found['gpu']}" if found["gpu"] else "no GPU was at hand"
    return (
        f"*{found['date']}, {found['seconds']:,} s in all: {found['processor']}, {found['cores']} cores (threads: "
        f"{found['threads']}), {device}; {found['system']}, Python {found['python']}, {packages}; "
        f"fivestep {found['fivestep']}.*"
    )


def main() -> None:
    """Run the scripts, keep what they find, and write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"{', '.join(there())}  [all]")
    parser.add_argument("--quick", action="store_true", help="a smoke test: nothing is kept")
    parser.add_argument("--page", action="store_true", help="write the page from what was kept, and stop")
    options = parser.parse_args()
    if unknown := set(options.names) - set(there()):
        parser.error(f"{', '.join(sorted(unknown))}: the benchmarks are {', '.join(there())}")
    failed = []
    for name in [] if options.page else options.names or there():
        print(f"\n{command(name)}", flush=True)
        try:
            found = measured(name, ["--quick"] if options.quick else [])
        except (subprocess.CalledProcessError, ValueError) as error:  # it failed, or printed something else
            failed.append(name)
            print(error, flush=True)
            continue
        print("\n".join([f"{found['seconds']} s", *table(found["figures"])]), flush=True)
        if not options.quick:
            RESULTS.mkdir(exist_ok=True)
            (RESULTS / f"{name}.json").write_text(json.dumps(found, indent=1) + "\n", "utf-8")
    if not options.quick:
        PAGE.write_text(page(), "utf-8")
    if failed:
        sys.exit(f"these failed, and their figures are the earlier ones: {', '.join(failed)}")


if __name__ == "__main__":
    main()
