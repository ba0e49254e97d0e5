"""A process that has imported torch and forks a child for each training: a life costs its training, not its imports.

    {"target": "command", "arguments": {...}, "home": ..., "log": ..., "fault": ...}  ->  {"pid": 123}
    {"wait": 123, "seconds": 10}                                                     ->  {"status": -9}

No thread runs when it forks (that is checked each time), so a child is what a new process would be after its imports.
It is a process of its own that is really killed; only `wait` reaps it, so its id is not used again before.
With one request as its argument this serves that alone, in a new interpreter.
"""

import atexit
import gc
import importlib
import json
import os
import signal
import sys
import threading
import time
import traceback
from pathlib import Path

SIGNALS = {signal.SIGTERM, signal.SIGINT, signal.SIGUSR1}
# What a first training imports late.
LATE = ("fivestep.run.training", "torch._dynamo", "torch.utils.data", "multiprocessing.popen_fork")


def live(request):
    """The life of one child: its own folder, its own output, then what was asked for."""
    home = Path(request["home"])
    os.chdir(home)
    os.environ["FIVESTEP_CACHE"] = str(home / "cache")
    for target, path, how in ((0, os.devnull, os.O_RDONLY), (1, request["log"], None), (2, request["log"], None)):
        opened = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND if how is None else how, 0o666)
        os.dup2(opened, target)
        os.close(opened)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    from tests.torture import lives

    if request.get("fault"):
        lives.plant(home / "run", request["fault"])
    return getattr(lives, request["target"])(**request["arguments"])


def end(request):
    """Live, and end as an interpreter does, but for the clearing of memory, which costs a fork a second."""
    code = 1
    try:
        code = live(request)
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    except KeyboardInterrupt:  # as Python has it: ended by the signal
        traceback.print_exc()
        code = -signal.SIGINT
    except BaseException:
        traceback.print_exc()
    threading._shutdown()
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    if code == -signal.SIGINT:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGINT)
    os._exit(code or 0)


def await_end(pid, seconds):
    """The status of a child as subprocess has it: -9 for SIGKILL; None where it still lives."""
    end = time.monotonic() + seconds
    while True:
        found, status = os.waitpid(pid, os.WNOHANG)
        if found:
            return os.waitstatus_to_exitcode(status)
        if time.monotonic() > end:
            return None
        time.sleep(0.001)


def serve():
    """Answer requests until standard input ends; in a child, live."""
    import torch

    torch.set_num_threads(1)
    for name in (*LATE, "tests.torture.lives"):
        importlib.import_module(name)
    gc.freeze()  # a collection in a child would copy every page
    print(json.dumps({"ready": True}), flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        if "wait" in request:
            print(json.dumps({"status": await_end(request["wait"], request["seconds"])}), flush=True)
            continue
        assert len([*Path("/proc/self/task").glob("*")]) <= 1, (
            "a child of a process with threads is not what a new process is"
        )
        signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)  # until the child can take them
        pid = os.fork()
        if pid == 0:
            end(request)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
        print(json.dumps({"pid": pid}), flush=True)


if __name__ == "__main__":
    sys.exit(live(json.loads(sys.argv[1])) if len(sys.argv) > 1 else serve())
