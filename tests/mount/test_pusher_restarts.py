"""The pusher's process as the daemon sees it: replies, deaths, starts; nothing is mounted here."""

import io
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import trio

from fragfs.cache.place import CachePlace
from fragfs.mount.prefill import Pusher, PusherProcess
from fragfs.mount.pusher import PusherOptions
from fragfs.mount.table import MountEntry

OPTIONS = PusherOptions(
    CachePlace(Path("/nowhere"), True, 1, 1),
    MountEntry(1, "0:1", Path("/nowhere"), (), "fuse.fragfs", "fragfs"),
)
ANSWERING = """
import socket, struct, sys
channel = socket.socket(fileno=int(sys.argv[1]))
for _ in range(int(sys.argv[2])):
    if channel.recv(1000) in (b"", b"end"):
        break
    channel.send(struct.pack("<QiQ", 4096, 0, 7))  # PUSHED
"""


class Starts:
    """Starts processes that answer some stores and end then."""

    def __init__(self, *answers):
        self._answers = list(answers)
        self.processes = []

    def __call__(self, options):
        assert options is OPTIONS
        if not self._answers:
            raise OSError("no more processes")
        answers = self._answers.pop(0)
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            process = subprocess.Popen(
                [sys.executable, "-S", "-c", ANSWERING, str(theirs.fileno()), str(answers)],
                pass_fds=(theirs.fileno(),),
            )
        ours.setblocking(False)
        lifeline_out, lifeline_in = os.pipe()
        os.close(lifeline_out)
        self.processes.append(process)
        return PusherProcess(process, ours, io.FileIO(lifeline_in, "w"))


@pytest.mark.slow
async def test_one_that_keeps_ending_is_given_up(nursery):
    starts = Starts(*[0] * 20)
    pusher = Pusher(OPTIONS, starts)
    with trio.fail_after(60):
        await pusher.run()
        assert not pusher.is_alive
        await pusher.store(1, 0, [])
    assert len(starts.processes) == 9
    assert all(process.returncode is not None for process in starts.processes)
    pusher.close()


@pytest.mark.slow
async def test_one_that_stores_in_between_is_started_again_and_again(nursery):
    starts = Starts(*[1] * 12)
    pusher = Pusher(OPTIONS, starts)
    nursery.start_soon(pusher.run)
    with trio.fail_after(60):
        while pusher.is_alive:
            await pusher.store(1, 0, [])
            await trio.sleep(0.005)
    assert len(starts.processes) == 12
    # A process that ends with a message unread takes the reply to the one before along.
    assert pusher.bytes >= 4 * 4096
    assert pusher.push_ns == pusher.bytes // 4096 * 7
    assert pusher.pid == starts.processes[-1].pid


async def test_nobody_waits_for_one_that_is_being_started_again(nursery):
    starts = Starts(0)
    pusher = Pusher(OPTIONS, starts)
    nursery.start_soon(pusher.run)
    with trio.fail_after(20):
        while pusher.is_alive:
            await pusher.store(1, 0, [])
            await trio.sleep(0.01)


async def test_one_that_cannot_be_started_is_an_error():
    with pytest.raises(OSError, match="no more processes"):
        Pusher(OPTIONS, Starts())


async def test_closing_ends_it(nursery):
    starts = Starts(5)
    pusher = Pusher(OPTIONS, starts)
    nursery.start_soon(pusher.run)
    await trio.lowlevel.checkpoint()
    pusher.close()
    nursery.cancel_scope.cancel()
    assert starts.processes[0].wait(20) == 0
