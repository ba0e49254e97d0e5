"""A job trained once, in a process of its own that may be killed.

    python -m fivestep.run.rehearsal JOB RUN STEPS EVERY

JOB is a TOML file, or FILE.py:function, a function of one entered fs.Run. RUN is its directory, where it goes on;
STEPS how many steps a function's job makes at most, EVERY how often its state is saved. Leaves `kept.json` in RUN:
what model, data and optimizers hold beside the saved state. Knows no other rehearsal; `doctor.py` compares.
"""

import importlib.util
import inspect
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor, nn

from fivestep.data.files import expanded
from fivestep.data.generators import is_generator, state_of
from fivestep.errors import FivestepError, UsageError, suggestion
from fivestep.loop.state import State
from fivestep.run import strict_json
from fivestep.run.config import load_config
from fivestep.run.run import Run
from fivestep.run.trace import digest
from fivestep.run.training import train_run

KEPT = "kept.json"
OWNED = {*vars(nn.Module())}  # what every module has


class Enough(BaseException):
    """The rehearsal is as long as it should be."""


class Rehearsed(Run):
    """A run that leaves a training after so many steps."""

    def __init__(self, path: Path, steps: int, every: str):
        super().__init__(path, checkpoint_every=int(every) if every.isdecimal() else every, trace=True)
        self.steps = steps

    def keep(self, state: State) -> None:
        """As `Run.keep`; raises Enough where that was the last step."""
        super().keep(state)
        if state.clock.step >= self.steps:
            raise Enough


def rehearse(job: str, folder: Path, steps: int, every: str) -> None:
    """Train `job` from where `folder` was left to its end. Raises UsageError for a job that is none."""
    if job.endswith(".toml"):
        run = train_run(load_config(job, {"run_dir": str(folder)}), resume=True, trace=True)
    else:
        function = imported(job)
        run = Rehearsed(folder, steps, every)
        try:
            with run:
                function(run)
        except Enough:
            pass
    if run.state is None:
        raise UsageError(f"{job} trained nothing in the run that it was given: pass it on, fs.fit(..., run=run)")
    (folder / KEPT).write_text(strict_json.dumps(dict(kept(run.state))), "utf-8")


def is_function(source: str | None) -> bool:
    """Whether `source` is of the form FILE.py:function, or a Python file whose function was left out."""
    file = (source or "").rpartition(":")[0]
    return file.endswith(".py") or (source or "").endswith(".py")


def named_function(source: str) -> str:
    """`FILE.py:function` with the file's place. Raises UsageError where there is no such file, or no name."""
    file, _, function = (source, "", "") if source.endswith(".py") else source.rpartition(":")
    if not expanded(file).is_file():
        raise UsageError(f"there is no file {file}")
    if not function:
        raise UsageError(f"name the function too: {file}:job, where the file has def job(...): ...")
    if not function.isidentifier():
        raise UsageError(f"'{function}' in {source} cannot be a function's name: give FILE.py:function")
    return f"{expanded(file)}:{function}"


def imported(job: str) -> Any:
    """The function that `FILE.py:function` names; the file is run as a module, and imports from its folder."""
    file, _, name = job.rpartition(":")
    path = Path(file).resolve()
    spec = importlib.util.spec_from_file_location(path.stem, path)
    if spec is None or spec.loader is None or not path.is_file():
        raise UsageError(f"{file} does not exist, or is no Python file")
    sys.path.insert(0, str(path.parent))
    module = sys.modules[path.stem] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    function = getattr(module, name, None)
    if not callable(function):
        names = [one for one, value in vars(module).items() if inspect.isfunction(value)]
        raise UsageError(f"{file} has no function '{name}'{suggestion(name, names)}")
    return function


def kept(state: State) -> Iterator[tuple[str, str]]:
    """What is held in Python beside the saved state, by name: attributes, generators in closures and modules."""
    for name, module in state.model.named_modules():
        yield from attributes(f"model.{name}" if name else "model", module, OWNED)
    for number, optimizer in enumerate(state.optimizers):
        yield from attributes(f"optimizers.{number}", optimizer, {"state", "defaults", "param_groups"})
    data = state.reader.data if state.reader else None
    for part in ("", "dataset", "sampler", "batch_sampler", "collate_fn"):
        value = getattr(data, part, None) if part else data
        if value is not None and not isinstance(value, list | tuple | Tensor):
            yield from attributes(f"data.{part}" if part else "data", value, set())
            yield from drawn_from(f"data.{part}" if part else "data", value)


def attributes(name: str, value: Any, owned: set[str]) -> Iterator[tuple[str, str]]:
    """The attributes of `value` that can be told in a few words."""
    for attribute, held in getattr(value, "__dict__", {}).items():
        if attribute not in owned and (text := told(held)) is not None:
            yield f"{name}.{attribute}", text


def drawn_from(name: str, value: Any) -> Iterator[tuple[str, str]]:
    """The variables that the functions behind `value` reach around it, where they can change."""
    for method in ("__getitem__", "__getitems__", "__iter__", "__call__"):
        function = inspect.unwrap(value) if inspect.isfunction(value) else getattr(type(value), method, None)
        if inspect.isfunction(function):
            reached = inspect.getclosurevars(function)
            for variable, held in {**reached.globals, **reached.nonlocals}.items():
                if (is_generator(held) or variable in reached.nonlocals) and (text := told(held)) is not None:
                    yield f"{variable} (in {function.__qualname__} of {name})", text


def told(value: Any, depth: int = 2) -> str | None:
    """`value` as text that is the same where it is; None for what is no plain value."""
    if isinstance(value, bool | int | float | str | None):
        return repr(value)[:100]
    if isinstance(value, Tensor | np.ndarray) or is_generator(value):
        return digest(value if isinstance(value, Tensor | np.ndarray) else state_of(value))
    if isinstance(value, list | tuple | dict) and depth and len(value) <= 100:
        inside = value.items() if isinstance(value, dict) else enumerate(value)
        return repr({str(key): told(part, depth - 1) for key, part in inside})
    return None


if __name__ == "__main__":
    try:
        rehearse(sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]), sys.argv[4])
    except FivestepError as error:
        print(f"fivestep: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
