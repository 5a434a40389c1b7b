"""Fetching through decoder processes: scripted ones for what is rare, real ones for the bytes."""

import os
import shutil
import signal

import pytest
import trio
import trio.testing

from fragfs.cache.layered import LayeredFragmentCache
from fragfs.cache.memory import MemoryFragmentCache
from fragfs.cache.shared import SharedFragmentCache, file_name
from fragfs.errors import IntegrityError, NotFoundError
from fragfs.library.library import FragmentLibrary
from fragfs.reader.decoder import DecoderOptions, Reply, Status
from fragfs.reader.fetch import FragmentFetcher
from fragfs.reader.pool import Decode, DecoderPool
from fragfs.types import FragmentIdentity
from tests.cache.support import bytes_of, fragment_of, place_at, raw_of
from tests.library.test_bases import delta_record, forge

SIZE = 70_000


def identify(number):
    id_ = fragment_of(raw_of(number, SIZE))
    return FragmentIdentity(number, id_, SIZE, has_bases=False, is_base=False)


def identify_all(numbers):
    return [identify(number) for number in numbers]


class ScriptedPool:
    """A pool whose replies a test chooses: a function of the job, or what was appended."""

    def __init__(self, answer, nursery):
        self._answer = answer
        self._nursery = nursery
        self.is_alive = True
        self.jobs = []
        self.hurried = []
        self.decodes = self.decoded_bytes = self.evictions = 0
        self.working = 0

    def submit(self, fragment, on_reply, *, urgent, with_bases=False):
        job = Decode(fragment, on_reply, with_bases=with_bases)
        self.jobs.append((fragment.number, urgent, with_bases))
        self._nursery.start_soon(self._work, job)
        return job

    def hurry(self, job):
        self.hurried.append(job.fragment.number)

    async def _work(self, job):
        self.working += 1
        try:
            reply = await self._answer(job)
        finally:
            self.working -= 1
        job.finish(reply)

    def asked(self):
        return [number for number, _, _ in self.jobs]


class Threads:
    """What a decode in a thread would do; counts."""

    def __init__(self):
        self.started = []
        self.failures = {}

    def __call__(self, number, source):
        self.started.append(number)
        if number in self.failures:
            raise self.failures[number]
        raw = raw_of(number, SIZE)
        source.put(number, raw)
        return raw


@pytest.fixture
def shared(tmp_path):
    made = SharedFragmentCache(place_at(tmp_path / "place"))
    yield made
    made.close()


@pytest.fixture
def cache(shared):
    return LayeredFragmentCache(identify_all, MemoryFragmentCache(10 * SIZE), shared)


@pytest.fixture
def threads():
    return Threads()


def publish(cache, number):
    assert cache.publish(identify(number), raw_of(number, SIZE))
    return Reply(number, Status.DONE, 1, SIZE)


def fetcher_of(cache, threads, nursery, answer):
    pool = ScriptedPool(answer, nursery)
    return FragmentFetcher(threads, cache, nursery, workers=2, pool=pool), pool


async def test_a_hundred_tasks_share_one_job(cache, threads, nursery):
    gate = trio.Event()

    async def answer(job):
        await gate.wait()
        return publish(cache, job.fragment.number)

    fetcher, pool = fetcher_of(cache, threads, nursery, answer)
    got = []

    async def ask():
        got.append(bytes_of(await fetcher.fetch(7)))

    async with trio.open_nursery() as asking:
        for _ in range(100):
            asking.start_soon(ask)
        await trio.testing.wait_all_tasks_blocked()
        assert fetcher.statistics().joins == 99
        gate.set()
    assert got == [raw_of(7, SIZE)] * 100
    assert (pool.asked(), threads.started) == ([7], [])
    assert fetcher.statistics().flights == 0


async def test_a_fetch_hurries_what_was_begun_ahead_and_its_bases(cache, threads, nursery):
    gates = {1: trio.Event(), 2: trio.Event()}

    async def answer(job):
        if job.fragment.number == 1 and not cache.holds(2):
            return Reply(1, Status.NEEDS, bases=(2,))
        await gates[job.fragment.number].wait()
        return publish(cache, job.fragment.number)

    fetcher, pool = fetcher_of(cache, threads, nursery, answer)
    fetcher.begin_nowait(1, urgent=False)
    await trio.testing.wait_all_tasks_blocked()
    assert pool.jobs == [(1, False, False), (2, False, False)]
    got = []

    async def ask():
        got.append(bytes_of(await fetcher.fetch(1)))

    async with trio.open_nursery() as asking:
        asking.start_soon(ask)
        await trio.testing.wait_all_tasks_blocked()
        gates[2].set()
        await trio.testing.wait_all_tasks_blocked()
        assert pool.jobs[2] == (1, True, False)
        gates[1].set()
    assert got == [raw_of(1, SIZE)]
    assert 1 in pool.hurried


async def test_a_base_of_two_fragments_is_decoded_once(cache, threads, nursery):
    gate = trio.Event()

    async def answer(job):
        await trio.lowlevel.checkpoint()
        if job.fragment.number == 9:
            await gate.wait()
        elif not cache.holds(9):
            return Reply(job.fragment.number, Status.NEEDS, bases=(9,))
        return publish(cache, job.fragment.number)

    fetcher, pool = fetcher_of(cache, threads, nursery, answer)
    async with trio.open_nursery() as asking:
        for number in (1, 2, 3, 9):
            asking.start_soon(fetcher.fetch, number)
        await trio.testing.wait_all_tasks_blocked()
        gate.set()
    assert pool.asked().count(9) == 1
    assert threads.started == []


async def test_what_is_busy_elsewhere_is_polled_for_and_occupies_no_decoder(
    cache, threads, nursery, autojump_clock
):
    start = trio.current_time()

    async def answer(job):
        if job.fragment.number != 1:
            return publish(cache, job.fragment.number)
        if trio.current_time() < start + 2:
            return Reply(1, Status.BUSY)
        publish(cache, 1)  # by the other one
        return Reply(1, Status.DONE)

    fetcher, pool = fetcher_of(cache, threads, nursery, answer)
    async with trio.open_nursery() as asking:
        asking.start_soon(fetcher.fetch, 1)
        await trio.testing.wait_all_tasks_blocked()
        assert pool.working == 0
        assert bytes_of(await fetcher.fetch(2)) == raw_of(2, SIZE)
        assert trio.current_time() < start + 1
    assert 2 <= trio.current_time() - start < 2.2
    assert pool.asked().count(1) < 100
    assert threads.started == []


async def test_who_is_busy_for_ever_is_not_waited_for(cache, threads, nursery, autojump_clock):
    """A process that was stopped keeps its claims."""

    async def answer(job):
        return Reply(job.fragment.number, Status.BUSY)

    fetcher, _ = fetcher_of(cache, threads, nursery, answer)
    start = trio.current_time()
    assert bytes_of(await fetcher.fetch(1)) == raw_of(1, SIZE)
    assert trio.current_time() - start < 6
    assert threads.started == [1]


@pytest.mark.parametrize("status", [Status.FAILED, Status.FULL])
async def test_what_processes_cannot_do_threads_do(cache, threads, nursery, status):
    async def answer(job):
        return Reply(job.fragment.number, status)

    fetcher, _ = fetcher_of(cache, threads, nursery, answer)
    assert bytes_of(await fetcher.fetch(1)) == raw_of(1, SIZE)
    assert threads.started == [1]


async def test_an_error_is_the_one_of_the_thread_and_is_not_kept(cache, threads, nursery):
    async def answer(job):
        return Reply(job.fragment.number, Status.FAILED)

    fetcher, _ = fetcher_of(cache, threads, nursery, answer)
    threads.failures[1] = IntegrityError("fragment 1 is damaged")
    for _ in range(2):
        with pytest.raises(IntegrityError, match="damaged"):
            await fetcher.fetch(1)
    del threads.failures[1]
    assert bytes_of(await fetcher.fetch(1)) == raw_of(1, SIZE)


async def test_a_base_that_cannot_be_decoded_is_tried_once(cache, threads, nursery):
    async def answer(job):
        await trio.lowlevel.checkpoint()
        return (
            Reply(1, Status.NEEDS, bases=(2,))
            if job.fragment.number == 1
            else Reply(2, Status.FAILED)
        )

    fetcher, pool = fetcher_of(cache, threads, nursery, answer)
    threads.failures = {n: IntegrityError("fragment 2 is damaged") for n in (1, 2)}
    with pytest.raises(IntegrityError, match="damaged"):
        await fetcher.fetch(1)
    assert pool.asked() == [1, 2]


async def test_a_base_that_the_catalog_does_not_say_is_decoded_in_a_thread(
    shared, threads, nursery
):
    def ask(numbers):
        if 2 in numbers:
            raise NotFoundError("there is no fragment 2")
        return identify_all(numbers)

    async def answer(job):
        return Reply(1, Status.NEEDS, bases=(2,))

    cache = LayeredFragmentCache(ask, MemoryFragmentCache(10 * SIZE), shared)
    threads.failures[2] = NotFoundError("there is no fragment 2")
    fetcher, pool = fetcher_of(cache, threads, nursery, answer)
    assert bytes_of(await fetcher.fetch(1)) == raw_of(1, SIZE)
    assert pool.asked() == [1]
    assert threads.started == [2, 1]
    assert fetcher.statistics().flights == 0


async def test_a_full_cache_is_left_alone_for_a_moment(cache, threads, nursery, autojump_clock):
    async def answer(job):
        return Reply(job.fragment.number, Status.FULL)

    fetcher, pool = fetcher_of(cache, threads, nursery, answer)
    for number in (1, 2, 3):
        await fetcher.fetch(number)
    assert pool.asked() == [1]
    await trio.sleep(3)
    await fetcher.fetch(4)
    assert pool.asked() == [1, 4]


async def test_a_dead_pool_is_not_asked(cache, threads, nursery):
    fetcher, pool = fetcher_of(cache, threads, nursery, None)
    pool.is_alive = False
    assert bytes_of(await fetcher.fetch(1)) == raw_of(1, SIZE)
    assert pool.asked() == []


@pytest.mark.parametrize("how", ["evicted", "truncated"])
async def test_what_left_between_done_and_get_is_decoded_again(
    cache, threads, nursery, shared, how
):
    async def answer(job):
        reply = publish(cache, job.fragment.number)
        if how == "evicted":
            shared.trim(0)
        else:
            os.truncate(shared.place.directory / file_name(identify(job.fragment.number).id), 7)
        return reply

    fetcher, _ = fetcher_of(cache, threads, nursery, answer)
    assert bytes_of(await fetcher.fetch(1)) == raw_of(1, SIZE)
    assert threads.started == [1]


async def test_all_who_waited_for_what_left_share_one_decode(cache, threads, nursery, shared):
    gate = trio.Event()

    async def answer(job):
        await gate.wait()
        reply = publish(cache, job.fragment.number)
        shared.trim(0)
        return reply

    fetcher, pool = fetcher_of(cache, threads, nursery, answer)
    raws = []

    async def ask():
        raws.append(bytes_of(await fetcher.fetch(1)))

    async with trio.open_nursery() as asking:
        for _ in range(20):
            asking.start_soon(ask)
        await trio.testing.wait_all_tasks_blocked()
        gate.set()
    assert raws == [raw_of(1, SIZE)] * 20
    assert threads.started == [1]
    assert pool.asked() == [1]
    assert fetcher.statistics().flights == 0


async def test_bases_that_leave_as_fast_as_they_come_are_decoded_with_the_fragment(
    cache, threads, nursery, shared
):
    async def answer(job):
        if job.fragment.number == 1 and not job.with_bases:
            shared.trim(0)
            return Reply(1, Status.NEEDS, bases=(2,))
        return publish(cache, job.fragment.number)

    fetcher, pool = fetcher_of(cache, threads, nursery, answer)
    with trio.fail_after(20):
        assert bytes_of(await fetcher.fetch(1)) == raw_of(1, SIZE)
    assert pool.jobs[-1] == (1, True, True)
    assert len(pool.jobs) < 15


@pytest.mark.parametrize("length", [1, 2, 3])
async def test_a_damaged_catalog_with_cyclic_bases_does_not_hang(cache, threads, nursery, length):
    async def answer(job):
        await trio.lowlevel.checkpoint()
        if job.with_bases:
            return Reply(job.fragment.number, Status.FAILED)
        return Reply(job.fragment.number, Status.NEEDS, bases=(job.fragment.number % length + 1,))

    fetcher, _ = fetcher_of(cache, threads, nursery, answer)
    for number in range(1, length + 1):
        threads.failures[number] = IntegrityError(f"{number} needs itself")
    errors = []

    async def ask(number):
        with pytest.raises(IntegrityError, match="needs itself"):
            await fetcher.fetch(number)
        errors.append(number)

    with trio.fail_after(20):
        async with trio.open_nursery() as asking:
            for number in range(1, length + 1):
                asking.start_soon(ask, number)
    assert len(errors) == length
    assert fetcher.statistics().flights == 0


async def test_a_reader_that_leaves_takes_nothing_along(cache, threads, nursery):
    gate = trio.Event()

    async def answer(job):
        await gate.wait()
        return publish(cache, job.fragment.number)

    fetcher, _ = fetcher_of(cache, threads, nursery, answer)
    with trio.move_on_after(0.01):
        await fetcher.fetch(1)
    gate.set()
    await fetcher.ready(1)
    assert cache.holds(1)
    assert threads.started == []


async def test_ready_waits_without_taking_the_bytes_and_never_raises(cache, threads, nursery):
    async def answer(job):
        await trio.lowlevel.checkpoint()
        return (
            publish(cache, job.fragment.number)
            if job.fragment.number == 1
            else Reply(2, Status.FAILED)
        )

    fetcher, _ = fetcher_of(cache, threads, nursery, answer)
    threads.failures[2] = IntegrityError("fragment 2 is damaged")
    await fetcher.ready(1)
    assert cache.holds(1)
    assert not cache.held.holds(1)
    await fetcher.ready(2)


# --- real processes


class Reading:
    """A library read through two decoder processes."""

    def __init__(self, path, directory, nursery, bytes_max=1 << 30):
        place = place_at(directory, bytes_max)
        self.library = FragmentLibrary.open(path)
        self.shared = SharedFragmentCache(place)
        views = MemoryFragmentCache(1 << 20)
        self.cache = LayeredFragmentCache(self.library.identities, views, self.shared)
        self.pool = DecoderPool(DecoderOptions(path, place), nursery, 2)
        self.pool.start()
        self.fetcher = FragmentFetcher(
            self.library.decode_fragment, self.cache, nursery, workers=2, pool=self.pool
        )

    def close(self):
        self.shared.close()
        self.library.close()


async def fetch_all(reading, numbers, raws):
    wrong = []

    async def ask(number):
        if bytes_of(await reading.fetcher.fetch(number)) != raws[number]:
            wrong.append(number)

    with trio.fail_after(60):
        async with trio.open_nursery() as asking:
            for number in numbers:
                asking.start_soon(ask, number)
    assert wrong == []


@pytest.mark.slow
async def test_a_family_all_at_once_decodes_each_fragment_once(shared_family, tmp_path):
    async with trio.open_nursery() as nursery:
        reading = Reading(shared_family.path, tmp_path / "place", nursery)
        await fetch_all(reading, shared_family.numbers[::-1], shared_family.raws)
        statistics = reading.fetcher.statistics()
        assert statistics.decodes == len(shared_family.numbers)
        assert statistics.decoded_bytes == sum(map(len, shared_family.raws.values()))
        nursery.cancel_scope.cancel()
    reading.close()


@pytest.mark.slow
async def test_two_readers_of_one_place_decode_each_fragment_once(shared_family, tmp_path):
    async with trio.open_nursery() as nursery:
        one, two = (Reading(shared_family.path, tmp_path / "place", nursery) for _ in range(2))
        async with trio.open_nursery() as asking:
            asking.start_soon(fetch_all, one, shared_family.numbers, shared_family.raws)
            asking.start_soon(fetch_all, two, shared_family.numbers[::-1], shared_family.raws)
        decodes = one.fetcher.statistics().decodes + two.fetcher.statistics().decodes
        assert decodes == len(shared_family.numbers)
        nursery.cancel_scope.cancel()
    for reading in (one, two):
        reading.close()


@pytest.mark.slow
async def test_a_small_cache_and_processes_that_are_killed(shared_family, tmp_path):
    """A few fragments of room, a kill every moment: every byte arrives."""
    async with trio.open_nursery() as nursery:
        reading = Reading(shared_family.path, tmp_path / "place", nursery, 200_000)

        async def kill():
            for _ in range(6):
                for pid in reading.pool.pids[:1]:
                    os.kill(pid, signal.SIGKILL)
                await trio.sleep(0.15)

        async with trio.open_nursery() as together:
            together.start_soon(kill)
            for _ in range(2):
                await fetch_all(reading, shared_family.numbers, shared_family.raws)
        nursery.cancel_scope.cancel()
    reading.close()


@pytest.mark.slow
async def test_a_stopped_process_hangs_nobody_for_long(shared_family, tmp_path):
    async with trio.open_nursery() as nursery:
        reading = Reading(shared_family.path, tmp_path / "place", nursery)
        # Both have answered once they share these: one that starts is given more time.
        await fetch_all(reading, shared_family.plain[:20], shared_family.raws)
        for pid in reading.pool.pids:
            os.kill(pid, signal.SIGSTOP)
        await fetch_all(reading, shared_family.numbers, shared_family.raws)
        nursery.cancel_scope.cancel()
    reading.close()


@pytest.mark.slow
async def test_a_deleted_cache_directory_is_no_error(shared_family, tmp_path):
    async with trio.open_nursery() as nursery:
        reading = Reading(shared_family.path, tmp_path / "place", nursery)
        await fetch_all(reading, shared_family.numbers[:20], shared_family.raws)
        shutil.rmtree(tmp_path / "place")
        await fetch_all(reading, shared_family.numbers, shared_family.raws)
        nursery.cancel_scope.cancel()
    reading.close()


@pytest.mark.slow
async def test_a_damaged_fragment_names_itself_also_for_what_is_predicted_from_it(
    own_family,
    tmp_path,
):
    base = max(own_family.plain, key=lambda n: len(own_family.dependents(n)))
    own_family.damage(base)
    broken = {base}
    while True:
        more = {n for n in own_family.numbers if broken & set(own_family.bases[n])} - broken
        if not more:
            break
        broken |= more
    async with trio.open_nursery() as nursery:
        reading = Reading(own_family.path, tmp_path / "place", nursery)
        for number in sorted(broken):
            with (
                pytest.raises(IntegrityError, match=own_family.ids[base].short),
                trio.fail_after(60),
            ):
                await reading.fetcher.fetch(number)
        healthy = [n for n in own_family.numbers if n not in broken]
        await fetch_all(reading, healthy, own_family.raws)
        nursery.cancel_scope.cancel()
    reading.close()


@pytest.mark.slow
async def test_records_that_need_each_other_are_an_error_and_no_hang(own_family, tmp_path):
    """The catalog and the records say so; the same through a thread is `test_a_cycle_is_named`."""
    dependent = next(n for n in own_family.predicted if len(own_family.bases[n]) == 1)
    (base,) = own_family.bases[dependent]
    with FragmentLibrary.open(own_family.path) as library:
        raws = {n: own_family.raws[n] for n in (base, dependent)}
        ids = own_family.ids
        forge(library, base, delta_record(ids[base], raws[base], ids[dependent], raws[dependent]))
    async with trio.open_nursery() as nursery:
        reading = Reading(own_family.path, tmp_path / "place", nursery)
        for number in (base, dependent):
            with pytest.raises(IntegrityError, match="predicted from it"), trio.fail_after(60):
                await reading.fetcher.fetch(number)
        nursery.cancel_scope.cancel()
    reading.close()
