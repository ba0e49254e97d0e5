"""Power cuts on a real ext4: an image is mounted, shut down under a training by FS_IOC_SHUTDOWN, and mounted again.

What was not written through the journal is gone, as after a power cut; mounting replays the journal. Needs root, a
loop device and mkfs.ext4; else it is skipped, with the reason. `noauto_da_alloc` takes away ext4's own help for those
who rename without an fsync.
"""

import contextlib
import fcntl
import os
import random
import shutil
import signal
import struct
import subprocess
import time

import pytest

from tests.torture import harness

SHUTDOWN, NOT_EVEN_THE_LOG = 0x8004587D, 2  # FS_IOC_SHUTDOWN: _IOR('X', 125, __u32); GOING_FLAGS_NOLOGFLUSH
MEGABYTES = 24
OPTIONS = ("defaults", "noauto_da_alloc")


def tried(*command):
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise OSError(f"{' '.join(command)}: {(done.stderr or done.stdout).strip()[-200:]}")


def detach(place):
    """Unmount, now or once the last process has left it."""
    for _ in range(50):
        if subprocess.run(["umount", place], capture_output=True).returncode == 0:
            return
        time.sleep(0.1)
    tried("umount", "-l", place)


class Image:
    """An ext4 in a file."""

    def __init__(self, folder, options):
        self.file, self.place, self.options = folder / "image", folder / "place", options
        self.place.mkdir()
        with self.file.open("wb") as file:
            file.truncate(MEGABYTES << 20)
        tried("mkfs.ext4", "-q", "-F", str(self.file))

    @contextlib.contextmanager
    def mounted(self):
        tried("mount", "-o", f"loop,{self.options}", str(self.file), str(self.place))
        try:
            yield self.place
        finally:
            detach(str(self.place))

    def cut(self):
        """The power of a mounted image."""
        folder = os.open(self.place, os.O_RDONLY)
        try:
            fcntl.ioctl(folder, SHUTDOWN, struct.pack("I", NOT_EVEN_THE_LOG))
        finally:
            os.close(folder)


@pytest.fixture(scope="module", params=OPTIONS)
def options(request, tmp_path_factory):
    if os.name != "posix" or os.geteuid() != 0:
        pytest.skip("only root can mount an image")
    if not all(map(shutil.which, ("mkfs.ext4", "mount", "umount"))):
        pytest.skip("there is no mkfs.ext4, mount or umount")
    try:
        image = Image(tmp_path_factory.mktemp("try"), request.param)
        with image.mounted():
            image.cut()
    except OSError as error:
        pytest.skip(f"an ext4 image cannot be mounted and shut down here: {error}")
    return request.param


def powered(whole, folder, options):
    """A trial: a life on the image, the power cut at a random time, mounted again, and on."""

    def trial(server, number):
        drawn = random.Random(f"{options} {number}")
        place = folder / f"{number}"
        place.mkdir()
        image, seconds = Image(place, options), drawn.uniform(0, 1.05 * whole.seconds)
        note = f"ext4 ({options}), power cut after {seconds:.4f} s"
        with image.mounted() as mounted:
            home = harness.new_home(mounted / "home")
            os.sync()
            pid = server.start(whole.job, home)
            server.wait(pid, seconds)
            image.cut()
            if server.wait(pid, 0) is None:
                os.kill(pid, signal.SIGKILL)
                server.wait(pid)
        with image.mounted() as mounted:
            home = mounted / "home"
            (home / "log").unlink(missing_ok=True)
            harness.finish(server, whole, home, note)
        shutil.rmtree(place)

    return trial


def test_power_cut_on_ext4(pool, wholes, tmp_path, options):
    pool.each(f"power cuts on ext4 ({options})", powered(wholes("regression"), tmp_path, options), [1])


@pytest.mark.torture
@pytest.mark.parametrize("name", ["bigram", "lstm", "script"])
def test_full_power_cuts_on_ext4(pool, wholes, tmp_path, options, name):
    pool.each(f"power cuts on ext4 ({options})", powered(wholes(name, 3), tmp_path, options), range(20))
