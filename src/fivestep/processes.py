"""Which of how many processes this is, and what they agree on. Alone, it does nothing.

    join(device)            into the group that torchrun, or whoever set RANK and WORLD_SIZE, announces
    total(x), totals(...)   sums over all processes
    highest(...)            the largest of each number: how ends, signals and clocks are agreed on
    from_first(text)        what process 0 says, to all; from_all(text): what each says
    together()              inside, who fails is named by all before they leave

Owns the process group, and the watch over the others (`watchdog.py` beside it has the threads, `rounds.py` what tells
one start of theirs from the next). The engine is torch.distributed. Knows no model, no data and no loop.
"""

import atexit
import faulthandler
import json
import os
import signal
import socket
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from time import sleep
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from fivestep import rounds
from fivestep.errors import NonFiniteError, ProcessError, UsageError, brief
from fivestep.interrupts import is_agreed
from fivestep.watchdog import Watchdog, addresses, looks_broken, watched_links

ALONE = 1 << 22  # numbers in a tensor: above, a sum costs more than a wait, and a copy too much memory
WAIT = timedelta(minutes=30)  # for a collective; who is frozen, gone or cut off is found out long before


@dataclass
class Group:
    """The processes that train together, seen from one of them."""

    rank: int
    size: int
    watchdog: Watchdog
    began: bool  # the group is ours: nobody had initialised torch.distributed before
    device: torch.device  # that it was joined for
    round: str = ""  # a name that all have in common, and no other start of them
    launchers: tuple[str, ...] = ()  # what started them, and starts them anew; none without torchrun


_group: Group | None = None
_told: BaseException | None = None  # the error that this process has told
_failed: BaseException | None = None  # the one that it has failed with, whoever told
_alone = rounds.name()  # the round of a process that trains alone


# --- who ---


def joined() -> bool:
    """Whether there is a group."""
    return _group is not None


def rank() -> int:
    """The number of this process, from 0; as it is announced, before it has joined."""
    return (int(os.environ["RANK"]) if announced() > 1 else 0) if _group is None else _group.rank


def size() -> int:
    """How many processes train together."""
    return 1 if _group is None else _group.size


def is_first() -> bool:
    """Whether this is the one that writes files and speaks."""
    return rank() == 0


def host() -> str:
    """This process, for a sentence: `rank 1 on node-7`."""
    return f"rank {rank()} on {socket.gethostname()}"


def announced() -> int:
    """How many processes the environment announces, as torchrun does; 1 where nobody did."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_world_size()
    told = os.environ.get("WORLD_SIZE", "1")
    if not told.isdecimal():
        raise UsageError(f"WORLD_SIZE = {told[:20]!r} in the environment must be a whole number")
    own = os.environ.get("RANK")
    if own is None and int(told) > 1:
        raise UsageError(
            f"WORLD_SIZE = {told} in the environment needs RANK too: torchrun sets both; alone, unset it"
        )
    if own is not None and not (own.isdecimal() and int(own) < int(told)):
        raise UsageError(f"RANK = {own[:20]!r} in the environment must be below WORLD_SIZE, which is {told}")
    return int(told) if own is not None else 1


def this_round() -> str:
    """A name that these processes have in common, and that no other start of them has."""
    return _alone if _group is None else _group.round


def launchers() -> tuple[str, ...]:
    """What started these processes, and starts them anew when one is lost: each told apart from all others.

    Of a later round at least one is among those of the round before. None without torchrun.
    """
    own = rounds.launcher()
    return _group.launchers if _group is not None else () if own is None else (own,)


def local_device(device: torch.device) -> torch.device:
    """Of several GPUs on this host the one of this process."""
    own = int(os.environ.get("LOCAL_RANK", "0"))
    return torch.device("cuda", own) if device == torch.device("cuda") else device


def join(device: torch.device, alone_too: bool = False) -> None:
    """Join the announced group, once. `alone_too`: a group of one process is one, for who asks for it by name."""
    global _group
    if _group is not None or (announced() < 2 and not alone_too):
        return
    began = not dist.is_initialized()
    own = int(os.environ.get("RANK", "0")) if began else dist.get_rank()
    watchdog = Watchdog(own, announced())  # before, for the others may never come
    if not faulthandler.is_enabled():  # where processes call different things gloo aborts one: it says where it stood
        with suppress(AttributeError, OSError, ValueError, RuntimeError):  # a stderr that is none
            faulthandler.enable()
    if began:
        with watched_links(), _may_be_ended():
            _begin(own, device)
    _group = Group(own, dist.get_world_size(), watchdog, began, device)
    atexit.register(leave)
    # With this all are in: who fails from here on fails nobody else's joining.
    told = from_all([rounds.name(), rounds.launcher(), addresses()])
    _group.round, _group.launchers = told[0][0], tuple(sorted({one for _, one, _ in told if one is not None}))
    watchdog.begin(_group.round, {address for *_, own in told for address in own}, asks=began)
    watchdog.meets = all(from_all(watchdog.store is not None))


@contextmanager
def _may_be_ended() -> Iterator[None]:
    """Inside, SIGTERM and Ctrl-C end the process at once: torch's wait for the others takes no signal, and nothing is
    there to be saved. Raises UsageError where torch cannot let them meet."""
    main = threading.current_thread() is threading.main_thread()
    before = {one: signal.getsignal(one) for one in (signal.SIGINT, signal.SIGTERM)} if main else {}
    ours = {number: handler for number, handler in before.items() if handler not in (signal.SIG_IGN, None)}
    for number in ours:
        signal.signal(number, signal.SIG_DFL)
    try:
        yield
    except (ValueError, RuntimeError) as error:
        raise UsageError(
            f"the processes cannot meet at MASTER_ADDR = {os.environ.get('MASTER_ADDR')}, MASTER_PORT = "
            f"{os.environ.get('MASTER_PORT')}: {brief(error)}"
        ) from error
    finally:
        for number, handler in ours.items():
            signal.signal(number, handler)


def _begin(own: int, device: torch.device) -> None:
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        # torchrun keeps one store over its restarts, with the addresses of processes that are gone.
        store, size = _store_of_this_round(own, announced()), announced()
        dist.init_process_group(backend, store=store, rank=own, world_size=size, timeout=WAIT)
    elif "RANK" in os.environ:
        dist.init_process_group(backend, timeout=WAIT)
    else:
        dist.init_process_group(backend, rank=0, world_size=1, store=torch._C._distributed_c10d.HashStore())


def _store_of_this_round(own: int, size: int) -> Any:
    """The part of torchrun's store that only the processes of this round know."""
    from torch._C._distributed_c10d import PrefixStore

    store = rounds.connected(rounds.ANSWERS)
    name = rounds.met(PrefixStore("fivestep/meeting", store), own, size, WAIT)
    store.set_timeout(WAIT)
    return PrefixStore(f"fivestep/{name}/group", store)


def here() -> torch.device:
    """The device that there is: this process's GPU of the host, else the CPU."""
    return local_device(torch.device("cuda" if torch.cuda.is_available() else "cpu"))


def join_here() -> None:
    """Join with that device."""
    join(here())


def device() -> torch.device:
    """The device that the group was joined for."""
    return here() if _group is None else _group.device


def leave() -> None:
    """At the end of the process, or of a test: tell the others that nothing is wrong."""
    global _group
    if _group is not None:  # an error that ends the process outside of all that is ours is told, too
        tell(getattr(sys, "last_exc", None) or getattr(sys, "last_value", None))
    group, _group = _group, None
    if group is not None:
        group.watchdog.end()
        sleep(0.1)  # a thread of torch's that is just letting go of Python would be aborted by the interpreter's end
        if group.began and dist.is_initialized():
            dist.destroy_process_group()


# --- what they agree on ---


def total(value: Tensor) -> Tensor:
    """The sum of `value`, of equal shape in all processes; `value` itself where this is the only one."""
    if _group is None:
        return value
    result = value.detach().clone()
    dist.all_reduce(result)
    return result


def _expanded(stride: int, size: int) -> bool:
    """Whether numbers share their place: such a tensor is a constant."""
    return stride == 0 and size > 1


def same_as_first(tensors: list[Tensor]) -> None:
    """Give all processes process 0's values of tensors of equal shapes and types: running statistics, for example."""
    by_device: dict[torch.device, list[Tensor]] = {}
    for one in tensors if _group is not None else ():
        constant = one.layout is not torch.strided or any(map(_expanded, one.stride(), one.shape))
        if one.numel() and not constant:
            by_device.setdefault(one.device, []).append(one.detach())
    for ones in by_device.values():
        parts = [one.contiguous().flatten().view(torch.uint8) for one in ones]
        whole = torch.cat(parts)
        dist.broadcast(whole, 0)
        for one, part in zip(ones, torch.split(whole, [len(part) for part in parts]), strict=True):
            if rank():
                one.copy_(part.clone().view(one.dtype).view(one.shape))


def sum_together(tensors: list[Tensor]) -> None:
    """Make each tensor the sum of those of all processes. What is small, and of one type, travels as one."""
    joined: dict[Any, list[Tensor]] = {}
    for number, one in enumerate(tensors):
        alone = one.numel() > ALONE or not one.is_contiguous()
        joined.setdefault(number if alone else (one.device, one.dtype), []).append(one)
    for ones in joined.values():
        if len(ones) == 1:
            dist.all_reduce(ones[0])
            continue
        flat = torch.cat([one.flatten() for one in ones])
        dist.all_reduce(flat)
        for one, part in zip(ones, torch.split(flat, [one.numel() for one in ones]), strict=True):
            one.copy_(part.view_as(one))


def totals(*numbers: float) -> list[float]:
    """The sum of each number over all processes, in float64."""
    if _group is None:
        return list(numbers)
    sums: list[float] = total(torch.tensor(numbers, dtype=torch.float64)).tolist()
    return sums


def highest(*numbers: float) -> list[float]:
    """The largest of each number over all processes."""
    if _group is None:
        return list(numbers)
    values = torch.tensor(numbers, dtype=torch.float64)
    dist.all_reduce(values, dist.ReduceOp.MAX)
    most: list[float] = values.tolist()
    return most


def from_first(value: Any) -> Any:
    """What process 0 gives, as JSON has it, to all."""
    return value if _group is None else from_all(value)[0]


def from_all(value: Any, group: Any = None) -> list[Any]:
    """What each process gives, as JSON has it, by rank. As text over the wire, never as pickled objects.

    group: as `side_group` gives it, for what a thread asks.
    """
    if _group is None:
        return [value]
    text = json.dumps(value).encode()
    longest = torch.tensor(len(text))
    dist.all_reduce(longest, dist.ReduceOp.MAX, group=group)
    own = torch.frombuffer(bytearray(text.ljust(int(longest))), dtype=torch.uint8)
    every = [torch.empty_like(own) for _ in range(_group.size)]
    dist.all_gather(every, own, group=group)
    return [json.loads(bytes(one.tolist())) for one in every]


def first_difference(own: dict[str, str]) -> tuple[str, str, int, str] | None:
    """Of texts by name, the first that is not process 0's in all: its name, process 0's, a rank and what it has."""
    first, *others = from_all(own)
    for rank, other in enumerate(others, 1):
        for name, text in other.items():
            if text != first[name]:
                return name, first[name], rank, text
    return None


def all_equal(*numbers: int) -> bool:
    """Whether each number is the same in all processes."""
    most = highest(*numbers, *(-number for number in numbers))
    return not any(high + low for high, low in zip(most[: len(numbers)], most[len(numbers) :], strict=True))


def side_group() -> Any:
    """The same processes once more, on the host: what a thread asks them there never meets what the training asks."""
    if _group is None:
        return None
    with watched_links():
        return dist.new_group(backend="gloo", timeout=WAIT)


def tensors_of_all(value: Tensor) -> list[Tensor]:
    """`value`, of equal shape and type in all processes, of each, by rank."""
    if _group is None:
        return [value]
    every = [torch.empty_like(value, memory_format=torch.contiguous_format) for _ in range(_group.size)]
    dist.all_gather(every, value.contiguous())
    return every


def exchanged(value: Tensor, there: list[int], here: list[int]) -> Tensor:
    """Of a row of numbers the first `there[0]` go to process 0, and so on; `here[0]` come from it, and so on."""
    if _group is None:
        return value
    size, came = value.element_size(), value.new_empty(sum(here))
    to, of = [n * size for n in there], [n * size for n in here]
    dist.all_to_all_single(came.view(torch.uint8), value.contiguous().view(torch.uint8), of, to)
    return came


# --- when one fails ---


def at(place: str) -> None:
    """Note where this process stands, for the others' watch. All come to the same places in the same order."""
    if _group is not None:
        _group.watchdog.at(place)


def at_alone(place: str) -> None:
    """The same, where the others need not come."""
    if _group is not None:
        _group.watchdog.at_alone(place)


def meet(place: str) -> None:
    """Come to where all must come, and wait until they have. Raises UsageError where one has gone elsewhere.

    A collective that one process asks for alone would abort it, or wait for ever. ProcessError: one has failed.
    """
    elsewhere = None if _group is None else _group.watchdog.meet(place)
    if elsewhere is not None:
        raise UsageError(
            f"{elsewhere}, and {host()} at {place}: all processes must make the same calls in the same order, and "
            "leave the loop at the same step; none of it may stand under `if rank == 0`"
        )


@contextmanager
def together() -> Iterator[None]:
    """Inside, an error of one process is told by all: ProcessError names the first, its host and what it raised."""
    if _group is None:
        yield
        return
    try:
        yield
    except BaseException as error:
        if looks_broken(error):
            found = _group.watchdog.culprit()
            if found is not None:
                raise ProcessError(found) from error
        tell(error)
        raise


def tell(error: BaseException | None) -> None:
    """Tell the others that this process failed, and why. They know of an end that all agree on."""
    global _told, _failed
    agreed = isinstance(error, GeneratorExit | ProcessError | NonFiniteError) or is_agreed(error)
    if _group is None or error is None or error is _failed or agreed or looks_broken(error):
        return
    _failed = error
    if _group.watchdog.fail(f"failed: {type(error).__name__}: {brief(error)}"):
        _told = error
        print(f"fivestep: {host()} failed first: {brief(error)}", file=sys.stderr, flush=True)


def was_told(error: BaseException) -> bool:
    """Whether this process has told the others of it, and said so."""
    return error is _told


def all_say(what: str) -> bool:
    """Whether all processes say the same within seconds; a talk beside all others, which may not come to an end."""
    return _group is not None and _group.watchdog.all_say(what)
