"""Signals that ask for an end, noted when they come and taken where it is safe.

    Ctrl-C (SIGINT), SIGTERM   end after the step in hand: `poll` raises KeyboardInterrupt, or Terminated (exit 143)
    SIGUSR1                    save and go on
    a second Ctrl-C            ends at once

Training polls between two steps, evaluation and sampling between two batches and tokens; a wait for data is left at
once. Of several processes that train together none leaves alone: what one was asked waits until all have agreed on it
(`asked`, `agree`). Handlers are there only inside `noticed`, which calls those of the user's too and puts them back.
What another handler raises while training must not be broken off (an update, the last save) is held until `poll`:
torch's handler of SIGCHLD, for one, raises where a worker of a DataLoader has died. Knows neither runs nor files.
"""

import os
import signal
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any, TypeVar

T = TypeVar("T")
SAVE = getattr(signal, "SIGUSR1", None)  # Windows has none
NOTED = (signal.SIGINT, signal.SIGTERM, SAVE)
CHILD = getattr(signal, "SIGCHLD", None)
GRACE_SECONDS = 0.2
_pending: int | None = None
_save_wanted = False
_leaving_allowed = False  # inside a wait that may be left
_together = False  # several processes: what is asked of this one is pending for none before all agree
_asked, _save_asked = 0, False  # of this process, when together
_held: list[tuple[int, BaseException]] = []  # what other handlers raised where training must not be broken off
_wrap: Callable[[int], None] | None = None  # takes over the handler that a signal has now; None outside `noticed`
_agreed: deque[BaseException] = deque(maxlen=2)  # the last ends that were raised


class Terminated(SystemExit):
    """SIGTERM, where it could be taken: the process ends with 143."""

    def __init__(self) -> None:
        super().__init__(128 + signal.SIGTERM)

    def __str__(self) -> str:
        return "terminated (SIGTERM)"


def save_wanted() -> bool:
    """Whether a save was asked for since this was last called."""
    global _save_wanted
    wanted, _save_wanted = _save_wanted, False
    return wanted


def poll() -> None:
    """Raise KeyboardInterrupt or Terminated where an end was asked for, or what was held. Free where neither is."""
    if _held and _pending is None:
        time.sleep(GRACE_SECONDS)  # a signal to the whole process group may reach the workers first
    if _pending is not None:
        raise _end(_pending)
    if _held:
        raise _held.pop(0)[1]


def take_over() -> None:
    """Inside `noticed`, hold what the handler of SIGCHLD raises: torch sets it when the first worker starts."""
    if _wrap is not None and CHILD is not None:
        _wrap(CHILD)


def asked() -> tuple[int, bool]:
    """The signal that asks this process for an end (0: none), and whether a save is asked for; none is acted on.

    From here on whatever comes, or has come and was not taken, waits for `agree`.
    """
    global _together, _pending, _asked, _save_wanted, _save_asked
    if not _together:
        _together, _asked, _pending = True, _pending or 0, None
        _save_asked, _save_wanted = _save_wanted, False
    return _asked or _pending or 0, _save_asked


def agree(number: float, save: float) -> None:
    """What all processes have agreed on: the end that a signal asks for, and a save; 0 for none."""
    global _pending, _asked, _save_wanted, _save_asked
    if number:  # else what was asked since `asked` is told the next time
        _pending, _asked = int(number), 0
    if save:
        _save_wanted, _save_asked = True, False


def _end(number: int) -> BaseException:
    error = KeyboardInterrupt() if number == signal.SIGINT else Terminated()
    _agreed.append(error)
    return error


def is_agreed(error: BaseException | None) -> bool:
    """Whether it is the end that a signal asked for, which several processes come to together."""
    return any(error is one for one in _agreed)


def left_at_once(wait: Callable[..., T], *arguments: Any) -> T:
    """The result of `wait(*arguments)`, which an end that is asked for meanwhile breaks off."""
    global _leaving_allowed
    _leaving_allowed = True
    try:
        poll()  # it may have come just before
        return wait(*arguments)
    except Exception:  # workers that die with this process make a loader raise anything
        if _wrap is not None and _pending is None:
            time.sleep(GRACE_SECONDS)
        if _pending is not None:
            raise _end(_pending) from None
        raise
    finally:
        _leaving_allowed = False


def never() -> bool:
    """Return False."""
    return False


@contextmanager
def noticed(critical: Callable[[], bool] = never) -> Iterator[None]:
    """Inside, the signals are noted. Handlers belong to the main thread; a signal that is ignored stays ignored.

    critical: whether training is at a point where nothing may break it off. What the user's handlers, and torch's of
    SIGCHLD, raise there is raised by the next `poll`, or after the block.
    """
    global _pending, _save_wanted, _asked, _save_asked, _together, _wrap
    before: dict[int, Any] = {}
    process = os.getpid()

    def note(number: int, frame: FrameType | None) -> None:
        global _pending, _save_wanted, _asked, _save_asked
        own = before[number]
        if os.getpid() != process:  # a forked child: the signal is to it what it was before
            signal.signal(number, own)
            os.kill(os.getpid(), number)
            return
        if number not in NOTED:
            call(own, number, frame)
            return
        if number == SAVE:
            _save_wanted, _save_asked = _save_wanted or not _together, _save_asked or _together
        elif number == signal.SIGINT and signal.SIGINT in (_pending, _asked):
            raise KeyboardInterrupt
        elif _together:
            _asked = _asked or number
        else:
            _pending = _pending or number
        if callable(own) and own is not signal.default_int_handler and not hasattr(own, "of_the_command_line"):
            call(own, number, frame)
        if _leaving_allowed:
            poll()

    def call(own: Any, number: int, frame: FrameType | None) -> None:
        try:
            own(number, frame)
        except BaseException as error:
            if number == CHILD and (_pending or _asked):
                return  # the workers end as this process does
            if not critical() and (number != CHILD or _leaving_allowed):
                raise
            _held.append((number, error))

    def wrap(number: int) -> None:
        own = signal.getsignal(number)
        if callable(own) and own is not note:
            before[number] = own
            signal.signal(number, note)

    _pending, _save_wanted = None, False
    _asked, _save_asked, _together = 0, False, False
    try:
        if threading.current_thread() is threading.main_thread():
            for number in NOTED:
                # None: a handler that is not Python's own, and could not be put back.
                if number is not None and signal.getsignal(number) not in (signal.SIG_IGN, None):
                    before[number] = signal.getsignal(number)
                    signal.signal(number, note)
            for number in signal.valid_signals():
                wrap(number)
            _wrap = wrap
        yield
    finally:
        _wrap = None
        for number, handler in before.items():
            signal.signal(number, handler)
        late, held = _pending or _asked, [error for number, error in _held if number != CHILD]
        _held.clear()
        _pending, _save_wanted, _asked, _save_asked, _together = None, False, 0, False, False
    if late:  # too late for anything but to end
        raise _end(late)
    if held:
        raise held[0]
