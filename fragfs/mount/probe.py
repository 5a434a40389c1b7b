"""Does a mount answer, and what does it say? Asked in child processes.

A mount that hangs would hang who asks. The children only call the kernel; several mounts are asked
at once.
"""

from __future__ import annotations

import contextlib
import enum
import errno
import json
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

__all__ = ["MountAnswer", "MountState", "ask_mount", "ask_mounts", "probe_mount"]


_PROGRAM = """
import os, sys
try:
    os.statvfs(sys.argv[1])
    os.stat(sys.argv[1])
except OSError as error:
    sys.exit(min(error.errno or 1, 255))
try:
    sys.stdout.buffer.write(os.getxattr(sys.argv[1], "user.fragfs.status"))
except OSError:
    pass
"""

_KILL_WAIT_S = 1.0

_left_behind: list[subprocess.Popen[bytes]] = []
"""Killed, but inside a request that nobody answers; reaped once they have ended."""


class MountState(enum.Enum):
    """How a mount reacts."""

    ANSWERS = "answers"
    DEAD = "dead"  # its daemon is gone: every access fails at once
    FAILS = "fails"  # answers, with an error
    HANGS = "hangs"


@dataclass(frozen=True, slots=True)
class MountAnswer:
    """What a mount said.

    Attributes:
        state: How it reacts.
        error: The errno it failed with; 0 if it did not.
        status: Its counters (`user.fragfs.status`); None if it did not tell.
    """

    state: MountState
    error: int = 0
    status: dict[str, Any] | None = None


def probe_mount(mountpoint: Path, timeout_s: float) -> MountState:
    """Find out whether a mount answers; blocks for `timeout_s` and little more."""
    return ask_mount(mountpoint, timeout_s).state


def ask_mount(mountpoint: Path, timeout_s: float) -> MountAnswer:
    """Ask a mount for its counters; blocks for `timeout_s` and little more."""
    return ask_mounts([mountpoint], timeout_s)[0]


def ask_mounts(mountpoints: Sequence[Path], timeout_s: float) -> list[MountAnswer]:
    """Ask several mounts at once; blocks for `timeout_s` and little more, however many hang."""
    _left_behind[:] = [child for child in _left_behind if child.poll() is None]
    deadline = time.monotonic() + timeout_s
    children = [
        subprocess.Popen(
            [sys.executable, "-I", "-S", "-c", _PROGRAM, mountpoint],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
        )
        for mountpoint in mountpoints
    ]
    for child in children:
        try:
            child.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            child.kill()
    # A process inside a request that nobody answers cannot even be killed.
    kill_deadline = time.monotonic() + _KILL_WAIT_S
    return [_answer(child, kill_deadline) for child in children]


def _answer(child: subprocess.Popen[bytes], kill_deadline: float) -> MountAnswer:
    assert child.stdout is not None
    with child.stdout as pipe:
        with contextlib.suppress(subprocess.TimeoutExpired):
            child.wait(max(0.0, kill_deadline - time.monotonic()))
        code = child.returncode
        if code is None:
            _left_behind.append(child)
        if code is None or code < 0:
            return MountAnswer(MountState.HANGS)
        if code == 0:
            # The child has ended, and the kernel limits an attribute to what a pipe holds.
            return MountAnswer(MountState.ANSWERS, status=_parse(pipe.read()))
    if code in (errno.ENOTCONN, errno.ECONNABORTED):
        return MountAnswer(MountState.DEAD, code)
    return MountAnswer(MountState.FAILS, code)


def _parse(data: bytes) -> dict[str, Any] | None:
    try:
        status = json.loads(data)
    except ValueError:
        return None
    return status if isinstance(status, dict) else None
