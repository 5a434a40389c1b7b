"""The decoder processes of one reader: started, fed, replaced when they die.

Decodes that somebody waits for go first; a process holds two requests at most, so that what is
urgent waits for two decodes and never for a window of them.
"""

from __future__ import annotations

import contextlib
import logging
import math
import socket
import subprocess
import sys
from collections import deque
from collections.abc import Callable
from os import getpid

import trio

from fragfs.reader.decoder import REPLY, DecoderOptions, Reply, Request, Status
from fragfs.types import FragmentIdentity

__all__ = ["Decode", "DecoderPool", "DecoderProcess", "start_decoder"]

log = logging.getLogger(__name__)

_REQUESTS_PER_DECODER = 2
_ATTEMPTS = 2
"""A record whose decode killed two processes is decoded in this one, which has better checks on."""

_RESTARTS_MAX = 8
"""Deaths in a row, without a reply in between, after which no process is started any more."""

_RESTART_S = 0.05
_START_S_MAX = 30.0
_REPLY_S_MAX = 5.0
"""A decode takes milliseconds: a process that says nothing for so long was stopped, or waits for a
disk that does not answer. It is killed, which frees its claims."""

_PATIENCE_S = 0.5
_END_S_MAX = 1.0
_BASES_MAX = 64


class Decode:
    """A fragment that is to be decoded, by whom and how soon only the pool knows."""

    __slots__ = ("attempts", "finish", "fragment", "is_taken", "with_bases")

    def __init__(
        self, fragment: FragmentIdentity, finish: Callable[[Reply], None], *, with_bases: bool
    ) -> None:
        self.fragment = fragment
        self.finish = finish
        self.with_bases = with_bases
        self.is_taken = False
        self.attempts = 0

    def fail(self) -> None:
        """Have whoever asked decode it otherwise."""
        self.finish(Reply(self.fragment.number, Status.FAILED))


class DecoderProcess:
    """One decoder and the jobs it has, in the order of their replies."""

    def __init__(self, process: subprocess.Popen[bytes], channel: socket.socket) -> None:
        self.process = process
        self.channel = channel
        self.jobs: deque[Decode] = deque()
        self.patience = trio.CancelScope()
        self.started_by = 0.0

    def expect_reply(self) -> None:
        """Give it time for the next job that it has."""
        by = max(trio.current_time() + _REPLY_S_MAX, self.started_by) if self.jobs else math.inf
        # A deadline that moved with every reply would cost more than the reply.
        if by == math.inf or not 0 <= by - self.patience.deadline < _PATIENCE_S:
            self.patience.deadline = by


class DecoderPool:
    """Decodes fragments into the shared cache, in processes of its own.

    All methods belong to the event loop's thread.

    Args:
        options: What each process is told.
        nursery: Where the pool's tasks run; when it is cancelled the processes end.
        count: How many processes; at least 1.
        start: Starts one.
    """

    def __init__(
        self,
        options: DecoderOptions,
        nursery: trio.Nursery,
        count: int,
        start: Callable[[DecoderOptions], DecoderProcess] | None = None,
    ) -> None:
        self._options = options
        self._start = start or start_decoder
        self._nursery = nursery
        self._urgent: deque[Decode] = deque()
        self._ahead: deque[Decode] = deque()
        self._processes: list[DecoderProcess] = []
        self._restarts = 0
        self._count = count
        self.decodes = 0
        self.decoded_bytes = 0
        self.decode_ns = 0
        self.evictions = 0

    def start(self) -> None:
        """Start the processes; what is asked before they are ready waits for them."""
        for _ in range(self._count):
            self._nursery.start_soon(self._run)

    @property
    def pids(self) -> list[int]:
        """The processes that run now."""
        return [process.process.pid for process in self._processes]

    @property
    def is_alive(self) -> bool:
        """Whether anything will be decoded at all: false when processes keep dying."""
        return self._restarts <= _RESTARTS_MAX

    def submit(
        self,
        fragment: FragmentIdentity,
        on_reply: Callable[[Reply], None],
        *,
        urgent: bool,
        with_bases: bool = False,
    ) -> Decode:
        """Have a fragment decoded.

        Args:
            fragment: The fragment; a process does not ask the catalog whether that is still so.
            on_reply: Gets the reply, once; `FAILED` if no process lives to give one, or when the
                pool ends. A function and no task: most decodes are waited for by nobody.
            urgent: Somebody waits for it.
            with_bases: Decode missing bases as well.
        """
        job = Decode(fragment, on_reply, with_bases=with_bases)
        (self._urgent if urgent else self._ahead).append(job)
        if self.is_alive:
            self._feed()
        else:
            self._fail_queued()
        return job

    def hurry(self, job: Decode) -> None:
        """Somebody waits for a job that was submitted to be ready early."""
        if not job.is_taken:
            self._urgent.append(job)
            self._feed()

    # --- the processes

    def _feed(self) -> None:
        while True:
            free = min(self._processes, key=lambda process: len(process.jobs), default=None)
            if free is None or not self._feed_one(free):
                return

    def _feed_one(self, process: DecoderProcess) -> bool:
        """Give a process the next job, if it has room and there is one."""
        if len(process.jobs) >= _REQUESTS_PER_DECODER or (job := self._next()) is None:
            return False
        self._send(process, job)
        return True

    def _next(self) -> Decode | None:
        for queue in (self._urgent, self._ahead):
            while queue:
                job = queue.popleft()
                if not job.is_taken:  # else it stands in both queues and was served by the other
                    job.is_taken = True
                    return job
        return None

    def _send(self, process: DecoderProcess, job: Decode) -> None:
        job.attempts += 1
        process.jobs.append(job)
        if len(process.jobs) == 1:
            process.expect_reply()
        # Two short messages never fill a socket's buffer. A dead process is noticed by its reader,
        # which takes the job back.
        with contextlib.suppress(OSError):
            process.channel.send(Request(job.fragment, job.with_bases).pack())

    async def _run(self) -> None:
        try:
            await self._keep_one()
        except trio.Cancelled:
            self._restarts = _RESTARTS_MAX + 1  # the others end as well
            raise
        finally:
            if not self._processes:
                self._fail_queued()

    async def _keep_one(self) -> None:
        """Run a process, and another one when it has died, until that is no use."""
        while self.is_alive:
            try:
                process = self._start(self._options)
            except OSError as error:
                log.error("cannot start a decoder process: %s", error)
                self._restarts = _RESTARTS_MAX + 1
                break
            process.started_by = trio.current_time() + _START_S_MAX
            self._processes.append(process)
            self._feed()
            try:
                with process.patience:
                    await self._receive(process)
                if process.patience.cancelled_caught:
                    log.warning("a decoder process (%d) does not answer", process.process.pid)
            except BaseException:
                for job in process.jobs:
                    job.fail()
                raise
            finally:
                self._processes.remove(process)
                process.channel.close()
                process.process.kill()
                with contextlib.suppress(subprocess.TimeoutExpired):  # its disk does not answer
                    process.process.wait(_END_S_MAX)
            self._restarts += 1
            log.warning("a decoder process (%d) has ended", process.process.pid)
            self._take_back(process)
            await trio.sleep(_RESTART_S * self._restarts)
        log.error("decoder processes keep ending: decoding in the daemon itself")

    def _fail_queued(self) -> None:
        while (job := self._next()) is not None:
            job.fail()

    async def _receive(self, process: DecoderProcess) -> None:
        size = REPLY.size + 8 * _BASES_MAX
        while True:
            try:
                data = process.channel.recv(size)
            except BlockingIOError:
                await trio.lowlevel.wait_readable(process.channel)
                continue
            except OSError:
                return
            if not data:
                return
            reply = Reply.parse(data)
            job = process.jobs.popleft()
            self._restarts = 0
            self.decodes += reply.decoded
            self.decoded_bytes += reply.decoded_bytes
            self.decode_ns += reply.decode_ns
            self.evictions += reply.evicted
            job.finish(reply)
            process.started_by = 0.0
            self._feed_one(process)
            process.expect_reply()

    def _take_back(self, process: DecoderProcess) -> None:
        for job in process.jobs:
            if job.attempts < _ATTEMPTS:
                job.is_taken = False
                self._urgent.append(job)
            else:
                job.fail()
        process.jobs.clear()
        self._feed()


def start_decoder(options: DecoderOptions) -> DecoderProcess:
    """Start a decoder: a new program, so that it inherits no lock, thread or SQLite connection.

    Raises:
        OSError: The system refused.
    """
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with theirs:
        process = subprocess.Popen(
            [
                sys.executable,
                "-P",
                "-m",
                "fragfs.reader.decoder",
                str(theirs.fileno()),
                str(getpid()),
            ],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            pass_fds=(theirs.fileno(),),
            cwd="/",
        )
    assert process.stdin is not None
    with contextlib.suppress(BrokenPipeError), process.stdin as pipe:
        pipe.write(options.to_json().encode())
    ours.setblocking(False)
    return DecoderProcess(process, ours)
