"""The decoder pool over scripted processes: who is asked what, when, and what deaths do."""

import contextlib
import os
import signal
import socket
import subprocess
from pathlib import Path

import pytest
import trio
import trio.testing

from fragfs.cache.place import CachePlace
from fragfs.reader.decoder import REQUEST, DecoderOptions, Reply, Request, Status
from fragfs.reader.pool import DecoderPool, DecoderProcess
from fragfs.types import FragmentId, FragmentIdentity

OPTIONS = DecoderOptions(Path("/nowhere"), CachePlace(Path("/nowhere"), True, 1, None))


class Script:
    """Starts processes that only sleep; the test answers for them."""

    def __init__(self):
        self.processes = []
        self.channels = []
        self.refusing = False
        self.dying = False

    def __call__(self, options):
        assert options is OPTIONS
        if self.refusing:
            raise BlockingIOError("too many processes")
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        process = subprocess.Popen(["sleep", "600"])
        ours.setblocking(False)
        theirs.setblocking(False)
        self.processes.append(process)
        self.channels.append(theirs)
        if self.dying:
            theirs.close()
        return DecoderProcess(process, ours)

    def requests(self, index):
        """Numbers a process was asked for since the last call."""
        numbers = []
        with contextlib.suppress(BlockingIOError):
            while data := self.channels[index].recv(REQUEST.size):
                numbers.append(Request.parse(data).fragment.number)
        return numbers

    def answer(self, index, number, status=Status.DONE, **counters):
        self.channels[index].send(Reply(number, status, **counters).pack())

    def close(self):
        for channel in self.channels:
            channel.close()
        for process in self.processes:
            process.kill()
            process.wait()


@pytest.fixture
def script():
    made = Script()
    yield made
    made.close()


def fragment_at(number):
    """What a fragment is that nobody looks at."""
    return FragmentIdentity(number, FragmentId(bytes(32)), 10, has_bases=False, is_base=False)


class Asked:
    """A fragment that was asked for, and the reply."""

    def __init__(self, pool, number, *, urgent):
        self._replies = []
        self._replied = trio.Event()
        self.job = pool.submit(fragment_at(number), self._on_reply, urgent=urgent)

    def _on_reply(self, reply):
        self._replies.append(reply)
        self._replied.set()

    async def reply(self):
        await self._replied.wait()
        assert len(self._replies) == 1
        return self._replies[0]


def pool_of(script, nursery, count=1):
    pool = DecoderPool(OPTIONS, nursery, count, script)
    pool.start()
    return pool


async def settled():
    await trio.testing.wait_all_tasks_blocked(0.01)


async def test_a_job_is_sent_and_answered(script, nursery):
    pool = pool_of(script, nursery)
    job = Asked(pool, 7, urgent=True)
    await settled()
    assert script.requests(0) == [7]
    script.answer(0, 7, decoded=2, decoded_bytes=10, decode_ns=3, evicted=1)
    assert await job.reply() == Reply(7, Status.DONE, 2, 10, 3, 1)
    assert (pool.decodes, pool.decoded_bytes, pool.decode_ns, pool.evictions) == (2, 10, 3, 1)
    assert pool.pids == [script.processes[0].pid]


def test_messages_survive_the_wire():
    reply = Reply(1 << 40, Status.NEEDS, 1, 2, 3, 4, (5, 1 << 41))
    assert Reply.parse(reply.pack()) == reply
    for bits in range(8):
        flags = [bool(bits & 1 << place) for place in range(3)]
        fragment = FragmentIdentity(1 << 40, FragmentId(bytes(range(32))), 1 << 24, *flags[:2])
        assert Request.parse(Request(fragment, flags[2]).pack()) == (fragment, flags[2])
    assert DecoderOptions.from_json(OPTIONS.to_json()) == OPTIONS


async def test_a_process_holds_two_jobs_and_the_urgent_go_first(script, nursery):
    pool = pool_of(script, nursery)
    await settled()
    for number in (1, 2, 3, 4):
        Asked(pool, number, urgent=False)
    for number in (11, 12):
        Asked(pool, number, urgent=True)
    assert script.requests(0) == [1, 2]
    order = []
    for number in (1, 2, 11, 12, 3, 4):
        script.answer(0, number)
        await settled()
        order += script.requests(0)
    assert order == [11, 12, 3, 4]


async def test_a_job_that_somebody_waits_for_by_now_is_hurried_and_sent_once(script, nursery):
    pool = pool_of(script, nursery)
    await settled()
    jobs = [Asked(pool, number, urgent=False) for number in (1, 2, 3, 4, 5)]
    pool.hurry(jobs[4].job)
    pool.hurry(jobs[4].job)
    pool.hurry(jobs[0].job)
    order = script.requests(0)
    for number in (1, 2, 5, 3, 4):
        script.answer(0, number)
        await settled()
        order += script.requests(0)
    assert order == [1, 2, 5, 3, 4]
    assert [(await job.reply()).number for job in jobs] == [1, 2, 3, 4, 5]


async def test_jobs_are_spread(script, nursery):
    pool = pool_of(script, nursery, 3)
    await settled()
    for number in range(6):
        Asked(pool, number, urgent=True)
    assert sorted(len(script.requests(index)) for index in range(3)) == [2, 2, 2]


async def test_a_death_costs_nobody_their_reply(script, nursery):
    """Its jobs go to the next process, before what was submitted to be ready early."""
    pool = pool_of(script, nursery)
    await settled()
    jobs = [Asked(pool, number, urgent=False) for number in (1, 2, 3)]
    assert script.requests(0) == [1, 2]
    script.processes[0].kill()
    script.channels[0].close()
    with trio.fail_after(10):
        while len(script.channels) < 2 or not pool.pids:  # noqa: ASYNC110
            await trio.sleep(0.01)
    assert script.requests(1) == [1, 2]
    for number in (1, 2, 3):
        script.answer(1, number)
        await settled()
    assert [(await job.reply()).status for job in jobs] == [Status.DONE] * 3
    assert script.processes[0].returncode is not None


async def test_another_process_takes_over_at_once(script, nursery):
    pool = pool_of(script, nursery, 2)
    await settled()
    jobs = [Asked(pool, number, urgent=True) for number in (1, 2)]
    asked = [script.requests(index) for index in range(2)]
    assert sorted(asked) == [[1], [2]]
    script.channels[0].close()
    await settled()
    assert script.requests(1) == asked[0]
    for (number,) in (asked[1], asked[0]):
        script.answer(1, number)
    assert [(await job.reply()).status for job in jobs] == [Status.DONE] * 2


async def test_a_record_that_kills_two_processes_is_given_up(script, nursery, autojump_clock):
    pool = pool_of(script, nursery)
    await settled()
    job = Asked(pool, 1, urgent=True)
    for index in range(2):
        with trio.fail_after(5):
            while len(script.channels) <= index or not pool.pids:  # noqa: ASYNC110
                await trio.sleep(0.01)
        assert script.requests(index) == [1]
        script.channels[index].close()
        script.processes[index].kill()
        await trio.sleep(0.01)
    assert (await job.reply()).status is Status.FAILED
    assert pool.is_alive


async def test_processes_that_keep_dying_are_not_started_for_ever(
    script, nursery, autojump_clock, caplog
):
    script.dying = True
    pool = pool_of(script, nursery, 2)
    jobs = [Asked(pool, number, urgent=number % 2 == 0) for number in range(10)]
    for job in jobs:
        assert (await job.reply()).status is Status.FAILED
    await trio.sleep(60)
    assert not pool.is_alive
    assert pool.pids == []
    assert len(script.processes) <= 12
    assert (await Asked(pool, 99, urgent=True).reply()).status is Status.FAILED
    assert "decoding in the daemon itself" in caplog.text
    assert all(process.returncode is not None for process in script.processes)


async def test_a_reply_in_between_forgives_deaths(script, nursery, autojump_clock):
    pool = pool_of(script, nursery)
    for index in range(20):
        job = Asked(pool, index, urgent=True)
        await trio.sleep(5)
        assert script.requests(index) == [index]
        script.answer(index, index)
        assert (await job.reply()).status is Status.DONE
        script.channels[index].close()
        await trio.sleep(0.001)
    assert pool.is_alive


async def test_a_system_that_refuses_processes(script, nursery, caplog):
    script.refusing = True
    pool = pool_of(script, nursery)
    job = Asked(pool, 1, urgent=True)
    assert (await job.reply()).status is Status.FAILED
    assert not pool.is_alive
    assert "too many processes" in caplog.text


async def test_a_process_that_does_not_answer_is_replaced(script, nursery, autojump_clock, caplog):
    """Stopped, or waiting for a disk: its claims are freed and its jobs done elsewhere."""
    pool = pool_of(script, nursery)
    await trio.sleep(1)
    first = Asked(pool, 1, urgent=True)
    await trio.sleep(20)  # it may still be starting
    script.answer(0, 1)
    assert (await first.reply()).status is Status.DONE
    await trio.sleep(1000)  # idle is not hanging
    assert pool.pids == [script.processes[0].pid]
    os.kill(script.processes[0].pid, signal.SIGSTOP)
    started = trio.current_time()
    jobs = [Asked(pool, number, urgent=True) for number in (2, 3)]
    with trio.fail_after(8):
        while len(script.channels) < 2 or not pool.pids:  # noqa: ASYNC110
            await trio.sleep(0.01)
    assert trio.current_time() - started > 4
    assert "does not answer" in caplog.text
    assert script.processes[0].returncode == -signal.SIGKILL
    for number in script.requests(1):
        script.answer(1, number)
    assert [(await job.reply()).status for job in jobs] == [Status.DONE] * 2


async def test_a_slow_process_that_answers_is_left_alone(script, nursery, autojump_clock):
    pool = pool_of(script, nursery)
    jobs = [Asked(pool, number, urgent=True) for number in range(10)]
    for number, job in enumerate(jobs):
        await trio.sleep(4)
        script.answer(0, number)
        assert (await job.reply()).status is Status.DONE
    assert len(script.processes) == 1


async def test_processes_end_with_the_nursery(script):
    async with trio.open_nursery() as nursery:
        pool = pool_of(script, nursery, 3)
        jobs = [Asked(pool, number, urgent=True) for number in range(10)]
        await settled()
        assert len(pool.pids) == 3
        nursery.cancel_scope.cancel()
    # Sent or queued, or asked for by now: nobody is left waiting.
    jobs.append(Asked(pool, 99, urgent=True))
    assert [(await job.reply()).status for job in jobs] == [Status.FAILED] * 11
    assert [process.returncode for process in script.processes] == [-signal.SIGKILL] * 3
    assert pool.pids == []
