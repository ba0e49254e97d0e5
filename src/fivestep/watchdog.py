"""The watch of one process over the others that it trains with.

    a thread beats in the store of the group, once a second, and reads the others' beats
    a thread judges, from what was read last: it needs no answer from anybody

    a host has not answered for CUT seconds             gone, or the link cut: the connections to it break, the end
    another's beats have stopped for SILENT seconds     frozen, or killed: named, the end
    the store has not answered for SILENT seconds       the same of the host where it lives
    nobody has moved for LATE, for STUCK seconds        a line that says who stands where; then the end, with stacks
    one has failed, and is waited for ASIDE seconds     it caught its error and went on: named, the end
    one waits where all come, another is elsewhere      an error there, which names both
    the launcher is gone                                as after SIGTERM: saved, and left

Of a host the kernel knows whether it answers, however busy the processes are; a process may be too busy to beat. A
collective waits inside torch, where no exception reaches it, so the end is the process's own: exit code 1, which
the launcher sees. Nothing is lost but what the last checkpoint does not hold. Owns the threads and the words.
"""

import json
import os
import signal
import socket
import struct
import sys
import threading
import traceback
from collections import Counter
from collections.abc import Container, Iterator
from contextlib import contextmanager, nullcontext, suppress
from datetime import timedelta
from pathlib import Path
from time import monotonic, sleep
from typing import Any

from fivestep import rounds
from fivestep.errors import FivestepError, ProcessError

BEAT = 1.0  # seconds, up to 64 processes; proportionally longer for more
CUT, SILENT, LATE, STUCK = 6.0, 15.0, 30.0, 600.0
ASIDE = 5.0  # seconds in which the process that failed first has told so
JOINING = "waits for the others to begin"
_watched: set[str] = set()  # connections
# Of Linux's struct tcp_info: the state, how often it has asked for no answer, the doublings of the time to the next
# try, the segments under way, and the milliseconds since data and an acknowledgement last came.
TCP_INFO, ESTABLISHED, CLOSED_THERE = "=B2xBB19xI24xII", 1, 8
HANGUP = getattr(signal, "SIGHUP", signal.SIGTERM)  # nohup has it ignored; Windows has none
BROKEN = ("gloo", "nccl", "connection", "peer", "socket", "timed out", "broken pipe")


def looks_broken(error: BaseException) -> bool:
    """Whether an error is of the talk between processes, as when another is gone: torch raises RuntimeErrors."""
    text = str(error).lower()
    return isinstance(error, RuntimeError) and any(word in text for word in BROKEN)


def links() -> dict[str, int]:
    """The sockets of this process, and a file number of each; none where the system does not tell."""
    found = {}
    with suppress(OSError):
        for path in Path("/proc/self/fd").iterdir():
            with suppress(OSError):  # closed meanwhile
                name = os.fspath(path.readlink())
                if name.startswith("socket:"):
                    found[name] = int(path.name)
    return found


@contextmanager
def borrowed(number: int) -> Iterator[socket.socket]:
    """A socket of torch's, to ask it. Python would make it, for all who hold it, what `setdefaulttimeout` says."""
    usual = socket.getdefaulttimeout()
    socket.setdefaulttimeout(None)
    try:
        one = socket.socket(fileno=os.dup(number))
    finally:
        socket.setdefaulttimeout(usual)
    with one:
        yield one


@contextmanager
def watched_links() -> Iterator[None]:
    """The connections that are made inside are watched: whether the other end's host answers.

    Where nothing is under way the kernel asks once a second, so that `unanswered` hears of every host all the time.
    """
    before = links()
    yield
    for name, number in links().items():
        with suppress(OSError, AttributeError):  # closed meanwhile; options of Linux
            if name not in before:
                with borrowed(number) as one:
                    if one.family in (socket.AF_INET, socket.AF_INET6) and one.type == socket.SOCK_STREAM:
                        one.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
                        one.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 1)
                        one.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 1)
                        _watched.add(name)


def addresses() -> list[str]:
    """This host's, as the others on watched connections know it."""
    found = set()
    for name, number in links().items():
        with suppress(OSError):
            if name in _watched:
                with borrowed(number) as one:
                    found.add(one.getsockname()[0].removeprefix("::ffff:"))
    return sorted(found)


def unanswered(hosts: Container[str]) -> str | None:
    """Of `hosts` the address of one from which nothing has come for CUT seconds on a watched connection, if any.

    Its kernel answers for a process that is too busy to read, or frozen. Where that process leaves no room for more,
    ours asks ever more seldom, and the silence means nothing. To other hosts another thread's connection may go.
    """
    for name, number in links().items() if _watched else ():
        with suppress(OSError, AttributeError, struct.error):
            if name in _watched:
                with borrowed(number) as one:
                    told = struct.unpack(TCP_INFO, one.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 60))
                    state, asked, backoff, unacknowledged, data, acknowledgement = told
                    asks = one.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)  # else another's, of the same name
                    full = backoff and not unacknowledged and asked < 2
                    if state == ESTABLISHED and asks and not full and min(data, acknowledgement) > 1000 * CUT:
                        host = str(one.getpeername()[0]).removeprefix("::ffff:")
                        if host in hosts:
                            return host
    return None


def open_links() -> set[str]:
    """The watched connections that are open at both ends, as far as is known: the end of a process closes its."""
    found = set()
    for name, number in links().items() if _watched else ():
        with suppress(OSError, AttributeError):
            if name in _watched:
                with borrowed(number) as one:
                    if one.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 1)[0] != CLOSED_THERE:
                        found.add(name)
    return found


def place_of(beat: dict[str, Any]) -> str:
    """Where one stood as it told so."""
    place: str = beat.get("stands", [0, ""])[1]
    return place


class Watchdog:
    """Watches; `place` is where the main thread stands, `fail` and `culprit` name who failed first."""

    def __init__(self, rank: int, size: int):
        self.rank, self.size, self.host = rank, size, socket.gethostname()
        self.parent, self.begun, self.ended = os.getppid(), threading.Event(), threading.Event()
        self.every = BEAT * max(1.0, size / 64)
        self.silent = max(SILENT, 4 * self.every)
        self.stands, self.number = (0, JOINING), 0  # how many places this process has come to, and the last one
        self.moved, self.seen = monotonic(), (0, "")  # when the main thread was last seen somewhere else
        self.answered = monotonic()  # when the store last did
        self.beats: dict[int, tuple[int, float, dict[str, Any]]] = {}  # rank -> number, when it changed, all of it
        self.store: Any = None  # of our own; none before all are in, or where the group has no address
        self.meets, self.met = False, ""  # whether all have a store; where all last have met: the key
        self.linked: set[str] = set()  # the connections to the others, as long as they are there
        self.closed = False  # by its own end: it was in a process that has ended
        self.failures = 0  # that this process has told; where all fail alike, and go on, it is as many in all
        self.heard: tuple[int, float, str] | None = None  # another's: failures here, when, who and what
        self.hosts: Container[str] = ()  # whose silence counts
        # Who is to outlive the shell that started it: only torchrun starts ranks that must not outlive it.
        self.stays = "TORCHELASTIC_RUN_ID" not in os.environ and signal.getsignal(HANGUP) == signal.SIG_IGN
        self.main = threading.main_thread().ident
        works = (self._beat, self._judge) if size > 1 else ()
        self.threads = [
            threading.Thread(target=work, name=f"fivestep-{work.__name__}", daemon=True) for work in works
        ]
        for thread in self.threads:
            thread.start()

    def begin(self, name: str, hosts: Container[str], asks: bool = True) -> None:
        """All are in: from here on each is watched. name: of this start of them, which keeps its words apart.

        hosts: the addresses of all. asks: whether there must be a store; a group that the user has begun may have met
        without one. Raises FivestepError where there must, and none answers.
        """
        store = None
        with watched_links(), nullcontext() if asks else suppress(FivestepError):
            store = rounds.connected(timedelta(seconds=self.silent)) if self.threads else None
        self.hosts, self.linked = hosts, open_links()
        if store is not None:
            from torch._C._distributed_c10d import PrefixStore

            self.store, self.answered = PrefixStore(f"fivestep/{name}/watch", store), monotonic()
        self.at_alone("begins")
        self.begun.set()

    # --- where this process stands ---

    @property
    def place(self) -> str:
        """Where the main thread is."""
        return self.stands[1]

    def at(self, place: str) -> None:
        """Come to a place that all come to, in the same order."""
        self.stands = self.stands[0] + 1, place  # at once, for a thread reads it

    def at_alone(self, place: str) -> None:
        """Be at a place that the others need not come to."""
        self.stands = self.stands[0], place

    def meet(self, place: str) -> str | None:
        """Come to `place`, and wait until all have; else who has gone where. Raises ProcessError."""
        self.at(place)
        begun = monotonic()
        key, looked = f"met/{self.stands[0]}/{place}", begun
        with suppress(RuntimeError):  # the store is gone: all go on without
            if not self.meets or self.closed:
                return None
            self.store.add(key, 1)
            while not self._have_met(key):
                now = monotonic()
                if found := self._failed():
                    raise ProcessError(found)
                elsewhere = self._elsewhere(now - begun)
                if elsewhere is not None and not self._have_met(key):  # else it has come, and gone on
                    return elsewhere
                if now - looked > self.every / 4:
                    looked, still = now, open_links()
                    if self.linked - still:
                        if found := self.culprit():
                            raise ProcessError(found)
                        self.linked &= still  # that was no process's end
                sleep(min(max(0.0005, (now - begun) / 10), self.every / 20))
            if self.rank == 0:
                self.store.delete_key(self.met)  # which all have left
            self.met = key
        return None

    def _have_met(self, key: str) -> bool:
        come: int = self.store.add(key, 0)
        others = [beat.get("stands") for rank, _, _, beat in self._told() if rank != self.rank]
        return come >= self.size or (len(others) == self.size - 1 and all(one == [*self.stands] for one in others))

    def _elsewhere(self, waited: float) -> str | None:
        """Who of the others will not come to this place, its number of all: one has ended, or come to another.

        Or all who are missing have been in a talk for long, which is none of this process's.
        """
        missing = [(rank, beat) for rank, _, _, beat in self._told() if beat.get("stands") != [*self.stands]]
        for rank, beat in missing:
            places, other = beat.get("stands", [0, ""])
            if beat.get("left"):
                return f"rank {rank} on {beat['host']} has ended"
            if places >= self.stands[0]:
                return f"rank {rank} on {beat['host']} is at {other}"
        talk = waited > 2 * LATE and all(beat["talks"] and beat["still"] > LATE for rank, beat in missing)
        if talk and missing:
            rank, beat = missing[0]
            return f"rank {rank} on {beat['host']} is at {place_of(beat)}, and waits for a collective"
        return None

    # --- who failed ---

    def fail(self, what: str) -> bool:
        """Tell that this process failed, if none has before. Whether it is the first, as far as is known."""
        told = json.dumps({"rank": self.rank, "host": self.host, "what": what})
        key, self.failures = f"failed/{self.failures}", self.failures + 1
        with suppress(RuntimeError):
            return self.store is None or self.store.compare_set(key, "", told).decode() == told
        return True

    def all_say(self, what: str) -> bool:
        """Whether all say the same within seconds."""
        deadline, keys = monotonic() + ASIDE, [f"{what}/{rank}" for rank in range(self.size)]
        with suppress(RuntimeError):
            if self.store is not None:
                self.store.set(f"{what}/{self.rank}", "")
            while self.store is not None and monotonic() < deadline:
                if self.store.check(keys):
                    return True
                sleep(0.1)
        return False

    def culprit(self) -> str | None:
        """Who of the others failed first, is gone, or has ended alone; None where none is found in seconds."""
        deadline = monotonic() + ASIDE
        while monotonic() < deadline and self.store is not None:
            with suppress(RuntimeError):
                if found := self._failed():
                    return found
            silent = 2.5 * self.every
            if self.closed:
                held = "the process that held the store of the group (rank 0, or its launcher) has ended"
                return f"{held}; this one was at {self.place}"
            if monotonic() - self.answered > silent:
                return "the store of the group does not answer: its host is gone, or the link to it cut"
            heard = {rank: when for rank, number, when, _ in self._told() if number >= 0}
            gone = min(heard, key=heard.__getitem__, default=self.rank)  # who has been silent for longest
            if gone != self.rank and monotonic() - heard[gone] > silent:
                return f"rank {gone} on {self.beats[gone][2]['host']} is gone: killed, or the link to it cut"
            sleep(0.1)
        for rank, number, _, beat in self._told():
            if number < 0:
                ended = f"rank {rank} on {beat['host']} has ended, and this one was at {self.place}"
                return f"{ended}: all processes must leave the loop at one step"
        return None

    def _failed(self) -> str | None:
        """Who of the others has failed, and how, if one has and this process has not."""
        key = f"failed/{self.failures}"
        if not self.store.check([key]):
            return None
        found = json.loads(self.store.get(key))
        return None if found["rank"] == self.rank else f"rank {found['rank']} on {found['host']} {found['what']}"

    def end(self) -> None:
        """Nothing is watched any more; the others are told that this process has left.

        The threads are waited for: one that the interpreter's end meets inside torch aborts the process.
        """
        self.ended.set()
        self.begun.set()
        for thread in self.threads:
            thread.join(2 * ASIDE)
        with suppress(RuntimeError):
            if self.store is not None:
                self.store.set(f"beat/{self.rank}", json.dumps({"left": True, "host": self.host, "n": -1}))

    # --- the threads ---

    def _beat(self) -> None:
        others = [f"beat/{rank}" for rank in range(self.size)]
        self.begun.wait()
        while not self.ended.is_set() and self.store is not None and not self.closed:
            self.number += 1
            now = monotonic()
            stands = self.stands
            if stands != self.seen:
                self.seen, self.moved = stands, now
            told = {"n": self.number, "host": self.host, "stands": stands, "still": now - self.moved}
            told["talks"] = self._talks()
            if now - self.moved > LATE / 3:
                told["stack"] = self._stack()
            with suppress(RuntimeError), self._open():
                if not self.ended.is_set():
                    self.store.set(f"beat/{self.rank}", json.dumps(told))
                known = [key for key in others if self.store.check([key])] if len(self.beats) < self.size else others
                for key, text in zip(known, self.store.multi_get(known), strict=True):
                    rank, beat = int(key.split("/")[1]), json.loads(text)
                    if rank not in self.beats or self.beats[rank][0] != beat["n"]:
                        self.beats[rank] = beat["n"], monotonic(), beat
                self.answered, failures = monotonic(), self.failures
                if (self.heard is None or self.heard[0] != failures) and (found := self._failed()):
                    self.heard = failures, self.answered, found
            self.ended.wait(self.every)

    @contextmanager
    def _open(self) -> Iterator[None]:
        """Note where the store's process has ended: that is no silence, and who waits for it hears by itself."""
        from torch.distributed import DistNetworkError

        try:
            yield
        except DistNetworkError as error:
            self.closed = "timed out" not in str(error).lower()
            raise

    def _judge(self) -> None:
        warned, ticked, orphaned, cut = False, monotonic(), 0.0, None
        while not self.ended.wait(0.5):
            now = monotonic()
            if now - ticked > 5:  # this process itself was stopped for a while: the others' beats are to be read anew
                self.answered = now
                self.beats = {rank: (n, now, beat) for rank, n, _, beat in self._told()}
            ticked = now
            if os.getppid() != self.parent and not orphaned and not self.stays:
                orphaned = now
                self._say("the launcher is gone: ending as after SIGTERM")
                os.kill(os.getpid(), signal.SIGTERM)
            # Inside torch no signal is taken.
            patience = ASIDE if self.place == JOINING else 2 * LATE
            if orphaned and now - max(orphaned, self.moved) > patience:
                os._exit(128 + signal.SIGTERM)
            cut, before = unanswered(self.hosts), cut
            if cut is not None and cut == before:  # once may be this machine's own standstill
                self._stop(f"the host at {cut} has not answered for {CUT:.0f} s: it is gone, or the link to it cut")
            silent = {rank: beat for rank, n, when, beat in self._told() if n >= 0 and now - when > self.silent}
            if self.closed:
                silent = {}
            elif self.store is not None and now - self.answered > self.silent:
                self._stop(
                    f"the store of the group has not answered for {now - self.answered:.0f} s: its host is gone"
                )
            if silent:
                rank, beat = min(silent.items())
                self._stop(
                    f"rank {rank} on {beat['host']} has not answered for {self.silent:.0f} s: frozen, killed, or its "
                    f"link cut; it stood at: {place_of(beat)}"
                )
            if self.heard is not None and self.heard[0] == self.failures and self._talks():
                _, when, what = self.heard
                if now - max(when, self.moved) > ASIDE:
                    self._stop(what)
            still = now - self.moved
            if still > STUCK and self._is_late():
                self._stop(f"nothing has moved for {STUCK:.0f} s; {self._who_is_late()}")
            elif still > LATE and not warned and self.rank == 0 and self._is_late():
                warned = True
                self._say(f"waiting for {LATE:.0f} s; {self._who_is_late()}")
            elif still < LATE:
                warned = False

    def _told(self) -> list[tuple[int, int, float, dict[str, Any]]]:
        """Of each process its rank, and its last beat as `beats` has it: a copy, for a thread adds to them."""
        return [(rank, *beat) for rank, beat in sorted(self.beats.items())]

    def _is_late(self) -> bool:
        """Whether others stand elsewhere: all at one place are at work, or about to go on."""
        return len({place_of(beat) for _, n, _, beat in self._told() if n >= 0}) > 1

    def _who_is_late(self) -> str:
        """Of those who are behind, where fewest stand, who has been there for longest, with its stack."""
        behind = min(beat["stands"][0] for _, n, _, beat in self._told() if n >= 0)
        beats = [(rank, beat) for rank, n, _, beat in self._told() if n >= 0 and beat["stands"][0] == behind]
        counts = Counter(place_of(beat) for _, beat in beats)
        odd = min(counts, key=counts.__getitem__)
        rank, beat = max((one for one in beats if place_of(one[1]) == odd), key=lambda one: one[1]["still"])
        stack = f"\n{beat['stack']}" if beat.get("stack") else ""
        return f"rank {rank} on {beat['host']} stands at: {odd}{stack}"

    def _stack(self) -> str:
        """Where the main thread is, in the caller's code and ours."""
        frame = sys._current_frames().get(self.main or 0)
        torchs = f"{Path(sys.modules['torch'].__file__ or '').parent}{os.sep}"
        shown = [one for one in traceback.extract_stack(frame) if not one.filename.startswith(torchs)]
        return "".join(traceback.format_list(shown[-8:])) if frame else ""

    def _talks(self) -> bool:
        """Whether the main thread is inside torch.distributed."""
        frame = sys._current_frames().get(self.main or 0)
        while frame is not None:
            name = str(frame.f_globals.get("__name__", ""))
            if name.startswith(("torch.distributed.", "fivestep.")):
                return name.startswith("torch")
            frame = frame.f_back
        return False

    def _say(self, text: str) -> None:
        with suppress(OSError, ValueError):  # whoever read it may be gone
            print(f"fivestep: rank {self.rank} on {self.host}: {text}", file=sys.stderr, flush=True)

    def _stop(self, text: str) -> None:
        self._say(f"stopped: {text}")
        os._exit(1)
