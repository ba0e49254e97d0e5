"""What several tests share: small text, small models, and no trace in the user's cache or temporary folder."""

import os
import shutil
import signal
import tempfile
import time
from multiprocessing.util import Finalize
from pathlib import Path

# Before torch is imported, for this process and all that it starts: the tensors here are tiny, and the threads of
# several processes that share two cores would only wait for each other.
os.environ["OMP_NUM_THREADS"] = "1"

import numpy as np
import pytest
import torch

# A terminal, a proxy or a cluster's job may have set these.
UNSET = (
    *(
        "COLUMNS",
        "LINES",
        "NO_COLOR",
        "FORCE_COLOR",
        "CLICOLOR",
        "CLICOLOR_FORCE",
        "TTY_COMPATIBLE",
        "TTY_INTERACTIVE",
    ),
    *("http_proxy", "https_proxy", "all_proxy", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"),
    *("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"),
)
SESSION = f"{os.getpid()}-{time.time_ns()}"  # marks the processes that these tests start
ENDS_WITH_PYTHON = (b"torch._inductor", b"multiprocessing.resource_tracker", b"multiprocessing.forkserver")


@pytest.fixture(autouse=True, scope="session")
def own_folders(tmp_path_factory):
    """Keep caches and temporary files in folders of the tests' own, and let no variable change what is tested.

    Fail where a process that the tests started is still alive at the end. Processes that a test kills cannot remove
    their temporary files, and torchrun never removes its own: the folder goes when this process ends.
    """
    folder = tempfile.mkdtemp(prefix="fivestep-")
    # After multiprocessing's own removal of this process's files in it, which needs them to be there.
    Finalize(None, shutil.rmtree, args=(folder,), kwargs={"ignore_errors": True}, exitpriority=-200)
    with pytest.MonkeyPatch.context() as patch:
        for name in UNSET:
            patch.delenv(name, raising=False)
        patch.setenv("FIVESTEP_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))
        patch.setenv("FIVESTEP_TEST_SESSION", SESSION)
        patch.setenv("TMPDIR", folder)  # short: the path of a socket may have about 100 characters
        patch.setattr(tempfile, "tempdir", folder)
        yield
        deadline = time.monotonic() + 30  # the loader workers of a killed process notice it within seconds
        while (alive := started_and_alive()) and time.monotonic() < deadline:
            time.sleep(0.1)
    assert not alive, f"processes that the tests started are still alive: {alive}"


def started_and_alive():
    """Return the command lines of living processes that the tests started, by process id. Empty without /proc."""
    alive = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            marked = f"FIVESTEP_TEST_SESSION={SESSION}".encode() in (folder / "environ").read_bytes()
            parent = int((folder / "stat").read_text("utf-8", "replace").rpartition(")")[2].split()[1])
            command = (folder / "cmdline").read_bytes()  # empty for a process that has ended
        except (OSError, ValueError, IndexError):  # it belongs to another user, or has just ended
            continue
        ours = (marked or parent == os.getpid()) and int(folder.name) != os.getpid()
        if ours and command and not any(name in command for name in ENDS_WITH_PYTHON):
            alive[int(folder.name)] = command.replace(b"\0", b" ").decode("utf-8", "replace").strip()
    return alive


@pytest.fixture(autouse=True, scope="session")
def interruptible():
    """A shell starts its background jobs with SIGINT ignored, and children inherit that."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.fixture
def tokens():
    """2,003 token ids of a vocabulary of 29, with structure to learn: each depends on the one before."""
    random = np.random.default_rng(0)
    ids = [0]
    for step in random.integers(0, 4, 2002):
        ids.append((ids[-1] * 5 + int(step)) % 29)
    return np.array(ids, dtype=np.uint8)
