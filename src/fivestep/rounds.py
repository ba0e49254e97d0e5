"""The rounds of a launch: torchrun starts its processes anew, after a failure or with more or fewer of them.

    launcher()    who started this process, told apart from every other start
    connected()   a connection of our own to the store where the processes meet
    met()         the name of this round, which all of its processes agree on

torchrun keeps one store over all rounds, with what the processes of earlier ones wrote. Its count of restarts tells
no rounds apart: a change of members leaves it as it was, and two launchers may count differently. So process 0 draws
a name, and everything of the round is kept under it. Owns no group and no thread.
"""

import json
import os
import secrets
import socket
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from time import monotonic, sleep
from typing import Any

from fivestep.errors import FivestepError

ANSWERS = timedelta(seconds=30)  # for a store that is there already: torchrun's own
REFUSED = 5.0  # seconds in which a port that nobody listens at is tried again
LOOK = 0.03  # seconds between two looks, up to 64 processes; proportionally longer for more


def name() -> str:
    """A name that none has had."""
    return secrets.token_hex(8)


def launcher() -> str | None:
    """The torchrun that started this process, and starts it anew; None where there is none.

    By host, start of the host, process and its start: a number of a process alone is given out again.
    """
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return None
    parent, booted, began = os.getppid(), "", ""
    with suppress(OSError):  # Linux alone has these
        booted = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        began = Path(f"/proc/{parent}/stat").read_text().rsplit(")", 1)[1].split()[19]
    return f"{os.environ['TORCHELASTIC_RUN_ID']} {socket.gethostname()} {booted} {parent} {began}"


def connected(timeout: timedelta) -> Any:
    """A connection to the store that the environment names: a thread's wait on it holds up nobody else.

    It is there already. None where none is named. Raises FivestepError where there is no answer in `timeout`, or
    nobody listens any more: torch itself would try again for up to twice as long.
    """
    from torch._C._distributed_c10d import TCPStore

    host, port = os.environ.get("MASTER_ADDR"), os.environ.get("MASTER_PORT")
    if not host or not port:
        return None
    try:
        _tried(host, int(port), timeout.total_seconds())
        return TCPStore(host, int(port), is_master=False, timeout=timeout, wait_for_workers=False)
    except (RuntimeError, OSError) as error:
        raise FivestepError(
            f"the store of the group at {host}:{port} does not answer: the launcher that holds it may be gone. Where "
            "launchers may come and go (--nnodes MIN:MAX), start each with TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1"
        ) from error


def _tried(host: str, port: int, most: float) -> None:
    """Raise OSError where nobody listens there."""
    began = monotonic()
    while True:
        try:
            socket.create_connection((host, port), timeout=most).close()
            return
        except ConnectionRefusedError:
            if monotonic() - began > min(REFUSED, most):
                raise
            sleep(0.2)


def met(store: Any, rank: int, size: int, most: timedelta) -> str:
    """The name of this round: the same for all its processes, and of no other round.

    Each of the others asks with a word of its own, process 0 answers each, and says go when all have repeated the
    name. What an earlier round left behind answers nobody: no word is used twice. Raises FivestepError after `most`.
    """
    until, look = monotonic() + most.total_seconds(), LOOK * max(1.0, size / 64)
    own = name()
    step = _calling(store, own, size) if rank == 0 else _asking(store, own, rank, size)
    while True:
        found: str | None = step()
        if found is not None:
            return found
        if monotonic() > until:
            raise FivestepError(f"not all of the {size} processes were there after {most}")
        sleep(look)


def _calling(store: Any, own: str, size: int) -> Any:
    """Process 0's part: a function to be called until it gives the name."""
    missing, answered = set(range(1, size)), set[str]()
    store.set("called", own)

    def step() -> str | None:
        if store.get("called").decode() != own:
            raise FivestepError("another start of this training has begun meanwhile: this one ends")
        for rank in sorted(missing):
            asked = json.loads(store.get(f"ask/{rank}")) if store.check([f"ask/{rank}"]) else None
            if asked and asked["size"] == size and asked["word"] not in answered:
                store.set(f"answer/{asked['word']}", own)
                answered.add(asked["word"])
            if store.check([f"repeat/{own}/{rank}"]):
                missing.discard(rank)
        if missing:
            return None
        store.set(f"go/{own}", "")
        return own

    return step


def _asking(store: Any, word: str, rank: int, size: int) -> Any:
    """The part of each of the others."""
    store.set(f"ask/{rank}", json.dumps({"word": word, "size": size}))

    def step() -> str | None:
        if not store.check([f"answer/{word}"]):
            return None
        named = str(store.get(f"answer/{word}").decode())
        store.set(f"repeat/{named}/{rank}", "")
        return named if store.check([f"go/{named}"]) else None

    return step
