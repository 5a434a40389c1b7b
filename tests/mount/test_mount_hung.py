"""A daemon that hangs: whoever ends the mount must not hang with it."""

import os
import signal
import subprocess
import sys
import time

import pytest

from fragfs.library.add import AddOptions
from fragfs.library.library import FragmentLibrary
from fragfs.mount.table import find_mount
from tests.models import make_model
from tests.mount.support import wait_until

pytestmark = [pytest.mark.mount, pytest.mark.slow]


def test_umount_force_ends_a_mount_whose_daemon_is_stopped(mounts, tmp_path):
    with FragmentLibrary.create(tmp_path / "library") as library:
        library.add([make_model(tmp_path / "a", rows=10)], AddOptions())
        report = mounts(tmp_path / "library")
        # A change makes the kernel forget the root's attributes: looking at it now asks the daemon.
        library.add([make_model(tmp_path / "b", rows=10)], AddOptions())
        wait_until(lambda: (report.mountpoint / "b").exists(), 5)
        library.remove("b")
        time.sleep(1)
    os.kill(report.pid, signal.SIGSTOP)
    try:
        done = subprocess.run(
            [sys.executable, "-m", "fragfs", "umount", "--force", report.mountpoint],
            capture_output=True,
            text=True,
            timeout=30,
        )
        assert (done.returncode, done.stderr) == (0, "")
        assert find_mount(report.mountpoint) is None
    finally:
        if os.path.exists(f"/proc/{report.pid}"):
            os.kill(report.pid, signal.SIGCONT)
