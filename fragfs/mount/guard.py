"""The guard: a child of the pusher that frees readers if pusher and daemon die together.

A pusher that waits for the kernel waits uninterruptibly, even if it is killed, and holds the device
until it ends; with the daemon dead nobody ends its wait. It may also be stopped. So a process with
nothing to wait for but the end of the two watches both, and aborts the connection when the daemon
has gone and the pusher has not.

The daemon's end is the end of a pipe into which only the daemon could write; the pusher's, that of
another one. Whoever ends in order lets the pusher end first, and then nothing is aborted.
"""

from __future__ import annotations

import os
import select
import signal

from fragfs.mount.abort import abort_connection, open_abort
from fragfs.mount.table import MountEntry

__all__ = ["Guard", "start_guard"]

_DESCRIPTORS_MAX = 1 << 20


class Guard:
    """The guard of this process, which lives no longer than it."""

    def __init__(self, pid: int, pipe: int) -> None:
        self._pid = pid
        self._pipe = pipe

    def end(self) -> None:
        """End it, when this process has given up the device."""
        os.close(self._pipe)
        os.waitpid(self._pid, 0)


def start_guard(entry: MountEntry, device: int, lifeline: int) -> Guard | None:
    """Fork the guard; None if the mount is gone already.

    Call it before there is any thread, lock or library that does not survive a fork.

    Args:
        entry: The mount.
        device: The device it is served through.
        lifeline: A pipe to read from that ends with the daemon; closed here.

    Raises:
        OSError: The system has no room for a process: do not store without one.
    """
    control = open_abort(entry)
    if not _is_connected(device):
        # The number may have passed to another mount by the time the file was opened.
        return None
    pusher_out, pusher_in = os.pipe()
    pusher = os.getpid()
    pid = os.fork()
    if not pid:
        try:
            _guard(entry, control, lifeline, pusher_out, pusher)
        finally:
            os._exit(0)
    for descriptor in (pusher_out, lifeline, control):
        if descriptor is not None:
            os.close(descriptor)
    return Guard(pid, pusher_in)


def _guard(entry: MountEntry, control: int | None, lifeline: int, pipe: int, pusher: int) -> None:
    os.setsid()  # a kill of the process group would be one of all three
    _keep_only({lifeline, pipe} | ({control} if control is not None else set()))
    poll = select.poll()
    poll.register(lifeline, 0)
    poll.register(pipe, 0)
    ended = {descriptor for descriptor, _ in poll.poll()}
    if pipe in ended:
        return
    abort_connection(entry, control)
    # It may be stopped, and would hold the device of a dead connection for ever.
    if os.getppid() == pusher:
        os.kill(pusher, signal.SIGKILL)


def _keep_only(kept: set[int]) -> None:
    """Close all other descriptors: held here, they would hide that their owner has ended."""
    nothing = os.open(os.devnull, os.O_RDWR)
    for standard in range(3):
        os.dup2(nothing, standard)
    below = 3
    for descriptor in sorted(kept):
        os.closerange(below, descriptor)
        below = descriptor + 1
    os.closerange(below, _DESCRIPTORS_MAX)


def _is_connected(device: int) -> bool:
    """Whether the connection has not ended; source: Linux `fs/fuse/dev.c`, `fuse_dev_poll`."""
    poll = select.poll()
    poll.register(device, 0)
    return not poll.poll(0)
