"""A function of tensors as one compiled program, kept in a folder between processes.

    recorded(function, inputs)   run once: its operations and their digest, the outside tensors it reads, its outputs
    compile(...)                 traced, compiled ahead of time (torch's AOTInductor) -> KEY.so in the cache folder
    load(recording)              the program that was compiled, by this process or an earlier one
    Program.run(inputs)          one call; inputs are changed in place where the function does so

A program that is in the folder already is loaded without any compiler: neither torch's tracer nor Inductor is
imported then. The key is a digest of the operations that a run performed, with every shape, stride, number and
constant, and of versions, processor and threads: another model, setting or machine gets another program. Owns what
can be recorded, the folder and the compiling; what the function means is its caller's.
"""

import hashlib
import os
import platform
import shlex
import shutil
import stat
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from time import sleep
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from fivestep.data.files import cache_folder, locked, written_whole
from fivestep.errors import FivestepError
from fivestep.loop.watched import Watch

Function = Callable[..., list[Tensor]]
COMPILERS = ("g++", "clang++", "c++")
SMALL = 200_000  # numbers that a step works on: up to here a second thread, and its atomics, cost twice the time
FEW = 1 << 15  # products: a matrix product of so few, one of whose sides is 1, is cheaper beside its neighbours
VERSION = 5  # of what is compiled from a recording: another number, other programs


class NoProgramError(FivestepError):
    """The function cannot be one program; the message says why."""


@dataclass(slots=True)
class Recording:
    """What a run of a function did."""

    digest: str
    operations: int
    outside: list[Tensor]  # tensors that it read and that are none of its inputs, in the order of their first use
    outputs: list[Tensor]


class Recorder(Watch):
    """Notes every operation: its name, the storages it reads and writes, shapes, strides, types and numbers."""

    def __init__(self, inputs: Sequence[Tensor]):
        super().__init__()
        self.lines = hashlib.sha256()
        self.operations = 0
        self.outside: list[Tensor] = []
        self.known: dict[int, int] = {}  # storage -> number, in the order they came up
        self.pins: list[StorageWeakRef] = []  # an address is not used again while one of these lives
        for tensor in inputs:
            self._add(tensor)
        self.note([self.described(tensor) for tensor in inputs])

    def note(self, line: Any) -> None:
        """Take a line into the digest."""
        self.lines.update(repr(line).encode())

    def described(self, value: Any) -> Any:
        """`value` without an identity of its own: the same in every process that does the same."""
        if isinstance(value, Tensor):
            number = self.known[value.untyped_storage()._cdata]
            form = (tuple(value.shape), value.stride(), value.storage_offset(), str(value.dtype), value.device.type)
            return number, form, value.requires_grad
        if isinstance(value, list | tuple):
            return [self.described(one) for one in value]
        if isinstance(value, torch.Generator):
            raise NoProgramError("it draws from a generator of its own")
        return repr(value)

    def _add(self, tensor: Tensor) -> None:
        if tensor.layout is not torch.strided:
            raise NoProgramError(f"it holds a tensor of layout {str(tensor.layout).removeprefix('torch.')}")
        storage = tensor.untyped_storage()
        if storage._cdata not in self.known:
            self.known[storage._cdata] = len(self.known)
            self.pins.append(StorageWeakRef(storage))  # type: ignore[no-untyped-call]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        reading = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape} & set(func.tags)
        if reading or func is torch.ops.aten._local_scalar_dense.default:
            raise NoProgramError(f"it reads a value on the host, or makes a shape of one ({func})")
        for tensor in tensors_in([args, kwargs]):
            if tensor.untyped_storage()._cdata not in self.known:
                self._add(tensor)
                if func is torch.ops.aten.lift_fresh.default:  # a number written in the code: part of the program
                    self.note(tensor.tolist())
                else:
                    self.outside.append(tensor)
        written = written_by(func, args, kwargs)
        if any(
            one.untyped_storage()._cdata == mine.untyped_storage()._cdata for one in self.outside for mine in written
        ):
            raise NoProgramError(f"it changes a tensor that is neither parameter nor buffer ({func})")
        result = func(*args, **kwargs)
        made = tensors_in([result])
        for tensor in made:
            self._add(tensor)
        self.operations += 1
        names = sorted(kwargs)
        self.note([str(func), self.described(args), names, self.described([kwargs[name] for name in names])])
        self.note(self.described(made))
        return result


def tensors_in(value: Any) -> list[Tensor]:
    """Every tensor in nested lists, tuples and tables."""
    if isinstance(value, Tensor):
        return [value]
    inside = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else ()
    return [tensor for one in inside for tensor in tensors_in(one)]


def written_by(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Tensor]:
    """The arguments that an operation changes."""
    given = zip(func._schema.arguments, args, strict=False)
    named = [(one, kwargs[one.name]) for one in func._schema.arguments if one.name in kwargs]
    changed = [value for one, value in [*given, *named] if one.alias_info is not None and one.alias_info.is_write]
    return tensors_in(changed)


@contextmanager
def compiling() -> Iterator[None]:
    """Inside, torch's optimizers take the branches that read nothing on the host, and a recurrent layer is operations
    that the compiler knows, not one of oneDNN's."""
    before = torch.compiler._is_compiling_flag
    torch.compiler._is_compiling_flag = True
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of other hardware's settings
            with torch.backends.mkldnn.flags(enabled=False):
                yield
    finally:
        torch.compiler._is_compiling_flag = before


def recorded(function: Function, inputs: Sequence[Tensor]) -> Recording:
    """Run `function` on `inputs`, which it may change. Raises NoProgramError for what no program can do."""
    recorder = Recorder(inputs)
    with compiling(), recorder:
        outputs = function(*inputs)
    recorder.note(recorder.described(outputs))
    recorder.note(surroundings())
    return Recording(recorder.lines.hexdigest()[:32], recorder.operations, recorder.outside, outputs)


def surroundings() -> list[Any]:
    """What a compiled program depends on besides its operations."""
    model = ""
    if platform.system() == "Linux":
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        model = next((line for line in lines if line.startswith("model name")), "")
        model += next((line for line in lines if line.startswith("flags")), "")
    return [
        VERSION,
        torch.__version__,
        torch.get_num_threads(),
        platform.machine(),
        model or platform.processor(),
        torch.backends.cpu.get_cpu_capability(),
        torch.are_deterministic_algorithms_enabled(),
    ]


class Program:
    """A compiled function: `run(inputs)` takes what it was recorded with, tensor by tensor, and the outside ones."""

    def __init__(self, path: Path, outside: list[Tensor]):
        self.digest = path.stem
        self.runner = torch._C._aoti.AOTIModelContainerRunnerCpu(str(path), 1)
        self.outside = outside

    def run(self, inputs: list[Tensor]) -> list[Tensor]:
        """The outputs of one run; new tensors."""
        outputs: list[Tensor] = self.runner.run([*inputs, *self.outside] if self.outside else inputs)
        return outputs


def library_of(recording: Recording) -> Path:
    """Where the program of a recording is kept."""
    return cache_folder("programs") / f"{recording.digest}.so"


def is_kept(recording: Recording) -> bool:
    """Whether its program is there, whole: a library that was cut short would end the process."""
    path = library_of(recording)
    try:
        told = path.with_suffix(".sha256").read_text("ascii").strip()
        return told == digest_of(path)
    except (OSError, ValueError):
        return False


def digest_of(path: Path) -> str:
    """The SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def load(recording: Recording) -> Program:
    """The program of a recording, compiled before. Raises NoProgramError where it cannot be loaded."""
    path = library_of(recording)
    owner, writable = path.stat().st_uid, path.stat().st_mode & (stat.S_IWGRP | stat.S_IWOTH)
    if hasattr(os, "getuid") and (owner not in (os.getuid(), 0) or writable):
        raise NoProgramError(f"{path} could have been written by another user; remove it")
    try:
        return Program(path, recording.outside)
    except RuntimeError as error:
        raise NoProgramError(f"{path} cannot be loaded ({str(error).splitlines()[0]}); remove it") from error


def compile(function: Function, inputs: Sequence[Tensor], recording: Recording) -> None:
    """Compile it where it is not kept yet; of processes that want the same program one does, and the others wait."""
    path = library_of(recording)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.with_suffix(".lock").open("a") as file:
            while True:
                try:
                    locked(file)
                    break
                except BlockingIOError:
                    sleep(0.1)
            if not is_kept(recording):
                build(function, inputs, recording)
    except OSError as error:
        raise NoProgramError(
            f"{path.parent} cannot be written ({error.strerror or error}); set FIVESTEP_CACHE to a folder "
            "that you can write to"
        ) from error


def build(function: Function, inputs: Sequence[Tensor], recording: Recording) -> None:
    """Trace `function`, compile it, and keep it in the folder. Raises NoProgramError where that fails, or OSError."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of torch, about torch
        import torch._inductor
        from torch.func import functionalize
        from torch.fx.experimental.proxy_tensor import make_fx

        try:
            with compiling():
                graph = make_fx(function, decompositions(), tracing_mode="fake", _allow_non_fake_inputs=True)(*inputs)
                # Again, with values that never change: what is written is written at the end.
                graph = make_fx(functionalize(graph), tracing_mode="fake", _allow_non_fake_inputs=True)(*inputs)
            lift(graph, recording.outside)
            settle(graph)
            options: dict[str, Any] = {"fallback_random": True}  # torch's own generator, as the eager step uses it
            small = sum(one.numel() for one in inputs) <= SMALL
            # Whole numbers may be indices: one out of range ends the process where loops are shared among threads.
            whole = any(not (one.is_floating_point() or one.dtype == torch.bool) for one in inputs)
            if (small or whole) and hasattr(torch._inductor.config.cpp, "threads"):
                options["cpp.threads"] = 1
            with quoted_library_path():
                library = torch._inductor.aot_compile(graph, (*inputs, *recording.outside), options=options)
        except FivestepError:
            raise
        except Exception as error:  # a compiler may raise anything
            raise NoProgramError(f"torch could not compile it: {type(error).__name__}: {str(error)[:300]}") from error
    keep(Path(str(library)), library_of(recording))


@contextmanager
def quoted_library_path() -> Iterator[None]:
    """Let torch's linker find a torch whose path has a space in it: torch writes `-L PATH` without quotes."""
    from torch.utils import cpp_extension

    path = cpp_extension.TORCH_LIB_PATH
    cpp_extension.TORCH_LIB_PATH = shlex.quote(path)
    try:
        yield
    finally:
        cpp_extension.TORCH_LIB_PATH = path


def decompositions() -> dict[Any, Callable[..., Any]]:
    """Operations as the compiler should see them.

    Of a product of matrices: a bias is added by what follows; a small one with a vector, or of two, is arithmetic of
    the loop around it, no call of BLAS. Of a cross-entropy: its gradient, -1 in one column of each row, is not summed
    over the columns to find that out.
    """
    aten = torch.ops.aten
    of_targets: list[tuple[Tensor, Tensor]] = []  # gradients that stand in one column, and what stands there, negated

    def mm(a: Tensor, b: Tensor) -> Any:
        (m, k), n = a.shape, b.shape[1]
        if m * k * n > FEW or a.is_complex() or 1 not in (m, k, n) or 0 in (m, k, n):
            return NotImplemented
        if k == 1:
            return a * b
        if a.dtype not in (torch.float32, torch.float64):
            return NotImplemented
        return (a * b.t()).sum(1, keepdim=True) if n == 1 else (a.t() * b).sum(0, keepdim=True)

    def addmm(bias: Tensor, a: Tensor, b: Tensor, beta: float = 1, alpha: float = 1) -> Any:
        if beta != 1 or alpha != 1 or a.dtype not in (torch.float32, torch.float64):
            return NotImplemented
        return aten.mm.default(a, b) + bias

    def nll_loss_backward(
        grad: Tensor, logs: Tensor, target: Tensor, weight: Any, reduction: int, ignored: int, total: Tensor
    ) -> Any:
        if weight is not None or logs.ndim != 2:
            return NotImplemented
        kept = (target != ignored).unsqueeze(1)
        each = grad.unsqueeze(1) if reduction == 0 else grad / total if reduction == 1 else grad
        row = torch.where(kept, each, 0.0)
        column = torch.where(kept, target.unsqueeze(1), 0)
        made = torch.where(torch.arange(logs.shape[1], device=logs.device) == column, -row, 0.0)
        of_targets.append((made, row))
        return made

    def log_softmax_backward(grad: Tensor, logs: Tensor, dim: int, dtype: torch.dtype) -> Any:
        row = next((row for made, row in of_targets if made is grad), None)
        if row is None or dim % logs.ndim != 1 or dtype != logs.dtype:
            return NotImplemented
        return grad + logs.exp() * row

    return {
        aten.mm.default: mm,
        aten.addmm.default: addmm,
        aten.nll_loss_backward.default: nll_loss_backward,
        aten._log_softmax_backward_data.default: log_softmax_backward,
    }


def require_compiler() -> None:
    """Raise NoProgramError where there is no C++ compiler."""
    if not compiler():
        raise NoProgramError(
            f"it needs a C++ compiler, and none of {', '.join(COMPILERS)} is on the path (CXX names one)"
        )


def compiler() -> str | None:
    """The C++ compiler that torch would call."""
    return next(
        (found for name in (os.environ.get("CXX"), *COMPILERS) if name and (found := shutil.which(name))), None
    )


def lift(graph: Any, outside: list[Tensor]) -> None:
    """Make inputs, after the others, of the tensors that a traced graph holds as its own and that live elsewhere."""
    places = {place(tensor): number for number, tensor in enumerate(outside)}
    last = [node for node in graph.graph.nodes if node.op == "placeholder"][-1]
    inputs: list[Any] = []
    with graph.graph.inserting_after(last):
        for number in reversed(range(len(outside))):
            inputs.insert(0, graph.graph.placeholder(f"outside_{number}"))
    for node in list(graph.graph.nodes):
        held = getattr(graph, node.target, None) if node.op == "get_attr" else None
        found = places.get(place(held)) if isinstance(held, Tensor) else None
        if found is not None:
            inputs[found].meta = node.meta
            node.replace_all_uses_with(inputs[found])
            graph.graph.erase_node(node)
    graph.recompile()


def settle(graph: Any) -> None:
    """Have what a program computes of single numbers (a bias correction, a clipping factor) computed once.

    The compiler would write it into the loops that use it: a power for every sixteen weights. The largest of sixteen
    equal numbers is such a number, and is found in a loop of its own.
    """
    of: dict[Any, Any] = {}
    for node in list(graph.graph.nodes):
        if node.op != "call_function" or not is_large(node.meta.get("val")):
            continue
        with graph.graph.inserting_before(node):

            def settled(one: Any) -> Any:
                value = one.meta.get("val")
                if one.op != "call_function" or not isinstance(value, Tensor) or value.ndim:
                    return one
                if not value.is_floating_point() or one.target is torch.ops.aten.amax.default:
                    return one
                if one not in of:
                    row = graph.graph.call_function(torch.ops.aten.expand.default, (one, [16]))
                    of[one] = graph.graph.call_function(torch.ops.aten.amax.default, (row, [0]))
                    row.meta["val"], of[one].meta["val"] = value.expand(16), value
                return of[one]

            node.args = torch.fx.node.map_arg(node.args, settled)
            node.kwargs = torch.fx.node.map_arg(node.kwargs, settled)
    graph.graph.lint()
    graph.recompile()


def is_large(value: Any) -> bool:
    """Whether tensors of more than a few numbers are made."""
    return any(one.numel() > 64 for one in tensors_in(value))


def place(tensor: Tensor) -> tuple[Any, ...]:
    """Where a tensor lies, and how."""
    return (
        tensor.untyped_storage()._cdata,
        tensor.storage_offset(),
        tuple(tensor.shape),
        tensor.stride(),
        tensor.dtype,
    )


def keep(library: Path, path: Path) -> None:
    """Put a compiled library, and the table beside it where there is one, into their place: whole, or not at all."""
    for made, kept in ((library.with_suffix(".json"), path.with_suffix(".json")), (library, path)):
        if made.exists():
            with made.open("rb") as source, written_whole(kept) as file:
                if hasattr(os, "fchmod"):
                    os.fchmod(file.fileno(), 0o600)  # what others can write is not loaded
                shutil.copyfileobj(source, file)
    with written_whole(path.with_suffix(".sha256")) as file:  # last: with it the library is whole
        file.write(digest_of(path).encode("ascii"))
