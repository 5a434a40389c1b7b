import threading

import pytest
import trio

from fragfs.errors import IntegrityError, StorageError
from fragfs.reader.fetch import FragmentFetcher
from tests.reader.fakes import memory_cache


class GatedDecoder:
    """Decodes when told to; records what ran, and how many ran at once."""

    def __init__(self, *, is_open=False):
        self.started = []
        self.running = 0
        self.running_max = 0
        self.failures = {}
        self._lock = threading.Lock()
        self._gate = threading.Event()
        if is_open:
            self._gate.set()

    def open(self):
        self._gate.set()

    def __call__(self, number, source):
        with self._lock:
            self.started.append(number)
            self.running += 1
            self.running_max = max(self.running_max, self.running)
        assert self._gate.wait(10)
        with self._lock:
            self.running -= 1
        if number in self.failures:
            raise self.failures[number]
        raw = memoryview(number.to_bytes(4, "little") * 10)
        source.put(number, raw)
        return raw


async def until(condition):
    """Wait for what worker threads do; nothing in trio can be waited for instead."""
    with trio.fail_after(10):
        while not condition():  # noqa: ASYNC110
            await trio.sleep(0.001)


@pytest.fixture
async def decoder():
    gated = GatedDecoder()
    yield gated
    gated.open()


@pytest.fixture
def cache():
    return memory_cache(10_000)


async def test_a_hundred_tasks_share_one_flight(decoder, cache, nursery):
    fetcher = FragmentFetcher(decoder, cache, nursery, workers=4)
    results = []

    async def ask():
        results.append(await fetcher.fetch(7))

    async with trio.open_nursery() as asking:
        for _ in range(100):
            asking.start_soon(ask)
        await until(lambda: fetcher.statistics().joins == 99)
        decoder.open()
    assert decoder.started == [7]
    assert len(results) == 100
    assert all(result is results[0] for result in results)
    statistics = fetcher.statistics()
    assert (statistics.decodes, statistics.flights) == (1, 0)


async def test_a_cached_fragment_is_not_decoded(decoder, cache, nursery):
    raw = memoryview(b"here")
    cache.put(3, raw)
    fetcher = FragmentFetcher(decoder, cache, nursery, workers=1)
    assert await fetcher.fetch(3) is raw
    fetcher.begin_nowait(3)
    await trio.testing.wait_all_tasks_blocked()
    assert decoder.started == []


async def test_published_before_anyone_is_woken(decoder, cache, nursery):
    decoder.open()
    fetcher = FragmentFetcher(decoder, cache, nursery, workers=1)
    raw = await fetcher.fetch(3)
    assert cache.get(3) is raw


async def test_errors_reach_every_waiter_and_are_not_kept(decoder, cache, nursery):
    decoder.failures[5] = IntegrityError("fragment 5 is damaged")
    fetcher = FragmentFetcher(decoder, cache, nursery, workers=1)
    errors = []

    async def ask():
        with pytest.raises(IntegrityError, match="damaged") as caught:
            await fetcher.fetch(5)
        errors.append(caught.value)

    async with trio.open_nursery() as asking:
        for _ in range(10):
            asking.start_soon(ask)
        await until(lambda: fetcher.statistics().joins == 9)
        decoder.open()
    assert len(errors) == 10
    del decoder.failures[5]
    assert bytes((await fetcher.fetch(5))[:4]) == b"\5\0\0\0"
    assert decoder.started == [5, 5]


async def test_unexpected_errors_reach_the_waiter_too(decoder, cache, nursery):
    decoder.failures[5] = ZeroDivisionError("a bug")
    decoder.open()
    fetcher = FragmentFetcher(decoder, cache, nursery, workers=1)
    with pytest.raises(ZeroDivisionError):
        await fetcher.fetch(5)


async def test_the_first_to_ask_may_leave(decoder, cache, nursery):
    fetcher = FragmentFetcher(decoder, cache, nursery, workers=1)
    got = []

    async def ask():
        got.append(await fetcher.fetch(9))

    async with trio.open_nursery() as others:
        with trio.CancelScope() as first:
            async with trio.open_nursery() as firsts:
                firsts.start_soon(fetcher.fetch, 9)
                await until(lambda: decoder.started == [9])
                others.start_soon(ask)
                await until(lambda: fetcher.statistics().joins == 1)
                first.cancel()
        decoder.open()
    assert len(got) == 1
    assert decoder.started == [9]


async def test_a_decode_nobody_waits_for_still_reaches_the_cache(decoder, cache, nursery):
    fetcher = FragmentFetcher(decoder, cache, nursery, workers=1)
    with trio.move_on_after(0.01):
        await fetcher.fetch(4)
    decoder.open()
    await until(lambda: fetcher.statistics().flights == 0)
    assert cache.get(4) is not None


async def test_at_most_so_many_decodes_at_once(decoder, cache, nursery):
    fetcher = FragmentFetcher(decoder, cache, nursery, workers=3)
    async with trio.open_nursery() as asking:
        for number in range(20):
            asking.start_soon(fetcher.fetch, number)
        await until(lambda: decoder.running == 3)
        await trio.testing.wait_all_tasks_blocked()
        assert len(decoder.started) == 3
        decoder.open()
    assert decoder.running_max == 3
    assert sorted(decoder.started) == list(range(20))


async def test_begin_starts_a_decode_that_fetch_joins(decoder, cache, nursery):
    fetcher = FragmentFetcher(decoder, cache, nursery, workers=1)
    fetcher.begin_nowait(6)
    fetcher.begin_nowait(6)
    await until(lambda: decoder.started == [6])
    async with trio.open_nursery() as asking:
        asking.start_soon(fetcher.fetch, 6)
        await until(lambda: fetcher.statistics().joins == 1)
        decoder.open()
    assert decoder.started == [6]


async def test_closing_drops_what_is_queued_and_tells_who_waits(decoder, cache):
    outcomes = {}

    async def ask(number):
        try:
            await fetcher.fetch(number)
            outcomes[number] = "decoded"
        except StorageError as error:
            outcomes[number] = error.retryable

    async with trio.open_nursery() as asking, trio.open_nursery() as decoders:
        fetcher = FragmentFetcher(decoder, cache, decoders, workers=1)
        asking.start_soon(ask, 1)
        await until(lambda: decoder.started == [1])
        asking.start_soon(ask, 2)
        await until(lambda: fetcher.statistics().flights == 2)
        decoders.cancel_scope.cancel()
        with trio.CancelScope(shield=True):
            await until(lambda: 2 in outcomes)
        decoder.open()
    assert outcomes == {1: "decoded", 2: True}
    assert decoder.started == [1]


async def test_waiting_reads_hold_no_decoded_bytes(nursery):
    """Nothing is cached, fifty fragments are asked for: no result outlives its waiters."""
    alive, alive_max = set(), 0
    lock = threading.Lock()

    class Raw(bytearray):
        def __del__(self):
            with lock:
                alive.discard(id(self))

    def decode(number, source):
        nonlocal alive_max
        raw = Raw(100)
        with lock:
            alive.add(id(raw))
            alive_max = max(alive_max, len(alive))
        source.put(number, memoryview(raw))
        return memoryview(raw)

    fetcher = FragmentFetcher(decode, memory_cache(0), nursery, workers=2)

    async def ask(number):
        (await fetcher.fetch(number)).release()

    async with trio.open_nursery() as asking:
        for number in range(50):
            asking.start_soon(ask, number)
    assert fetcher.statistics().decodes == 50
    assert alive_max <= 6
