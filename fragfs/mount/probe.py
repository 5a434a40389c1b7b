"""Does a mount answer? Asked in a child process, because a mount that hangs would hang who asks."""

from __future__ import annotations

import contextlib
import enum
import errno
import subprocess
import sys
from pathlib import Path

__all__ = ["MountState", "probe_mount"]


_PROGRAM = """
import os, sys
try:
    os.statvfs(sys.argv[1])
    os.stat(sys.argv[1])
except OSError as error:
    sys.exit(min(error.errno or 1, 255))
"""

_KILL_WAIT_S = 1.0


class MountState(enum.Enum):
    """How a mount reacts."""

    ANSWERS = "answers"
    DEAD = "dead"  # its daemon is gone: every access fails at once
    FAILS = "fails"  # answers, with an error
    HANGS = "hangs"


def probe_mount(mountpoint: Path, timeout_s: float) -> MountState:
    """Find out whether a mount answers; blocks for `timeout_s` and little more."""
    child = subprocess.Popen(
        [sys.executable, "-I", "-S", "-c", _PROGRAM, mountpoint],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        code = child.wait(timeout_s)
    except subprocess.TimeoutExpired:
        child.kill()
        # A process inside a request that nobody answers cannot even be killed; it is left behind.
        with contextlib.suppress(subprocess.TimeoutExpired):
            child.wait(_KILL_WAIT_S)
        return MountState.HANGS
    if code == 0:
        return MountState.ANSWERS
    return MountState.DEAD if code in (errno.ENOTCONN, errno.ECONNABORTED) else MountState.FAILS
