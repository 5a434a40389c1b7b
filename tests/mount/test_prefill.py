"""What prefill makes of reads, without a kernel: nothing is decoded or stored here."""

import pytest
import trio.testing

from fragfs.errors import NotFoundError
from fragfs.mount.prefill import Prefill
from fragfs.types import FragmentId, FragmentIdentity
from tests.reader.fakes import content_of, extents_of

MIB = 1 << 20


class IdleFetcher:
    """Decodes nothing until it is told to; counts what was begun."""

    def __init__(self):
        self.begun = []
        self.go = trio.Event()

    def begin_nowait(self, number, *, urgent):
        assert not urgent
        self.begun.append(number)
        return False

    async def ready(self, number):
        await self.go.wait()


class FakePusher:
    is_alive = True
    bytes = failed = push_ns = 0

    def __init__(self):
        self.stored = []

    async def store(self, inode, offset, parts):
        await trio.lowlevel.checkpoint()
        self.stored.append((inode, offset))


def identify_all(numbers):
    return [
        FragmentIdentity(number, FragmentId(bytes(32)), MIB, has_bases=False, is_base=False)
        for number in numbers
    ]


def touch_all(prefill, content, order):
    for index in order:
        prefill.on_read(content, index * MIB + MIB // 2, 4096)


async def test_what_is_touched_again_before_it_was_stored_is_stored_once(nursery):
    fetcher, pusher = IdleFetcher(), FakePusher()
    prefill = Prefill(fetcher, identify_all, pusher, nursery, 1 << 30, lambda: 128)
    content = content_of(extents_of([MIB] * 200))
    order = [index * 71 % 200 for index in range(1, 200)]  # far from each other, each once
    for _ in range(3):
        touch_all(prefill, content, order)
        await trio.testing.wait_all_tasks_blocked()
    assert sorted(fetcher.begun) == sorted(index + 1 for index in order)
    fetcher.go.set()
    await trio.testing.wait_all_tasks_blocked()
    assert len({offset // MIB for _, offset in pusher.stored}) == len(order)
    stores = len(pusher.stored)
    # Once stored, whoever asks again does so because the pages have left.
    touch_all(prefill, content, order[:100])
    await trio.testing.wait_all_tasks_blocked()
    assert len(pusher.stored) > stores


@pytest.mark.parametrize("is_damaged", [False, True])
async def test_what_is_only_decoded_ahead_is_begun_at_once_and_offered(nursery, is_damaged):
    """They are asked for together; if one of them cannot be, the others are begun all the same."""
    fetcher, offered = IdleFetcher(), []

    def offer(number, is_there):
        offered.append((number, is_there))

    asked = []

    def identify(numbers):
        asked.append(len(numbers))
        if is_damaged:
            raise NotFoundError("one of them is not there")
        return identify_all(numbers)

    prefill = Prefill(fetcher, identify, None, nursery, 1 << 30, lambda: 128, offer)
    content = content_of(extents_of([MIB] * 20))
    for offset in range(0, MIB, 128 << 10):
        prefill.on_read(content, offset, 128 << 10)
    await trio.testing.wait_all_tasks_blocked()
    assert fetcher.begun
    assert offered == [(number, False) for number in fetcher.begun]
    assert fetcher.begun == sorted(set(fetcher.begun))
    assert sum(asked) == len(fetcher.begun)
    assert max(asked) > 2


@pytest.mark.parametrize("has_front", [True, False])
async def test_who_reads_back_to_front_is_decoded_for_in_that_order(nursery, has_front):
    """Whether or not there is a front: what is stored is stored front to back."""
    fetcher, pusher = IdleFetcher(), FakePusher()
    offer = (lambda number, is_there: None) if has_front else None
    prefill = Prefill(fetcher, identify_all, pusher, nursery, 1 << 30, lambda: 128, offer)
    content = content_of(extents_of([MIB] * 40))
    for block in range(39, 36, -1):
        fetcher.begun.clear()
        for offset in range(0, MIB, 128 << 10):
            prefill.on_read(content, block * MIB + offset, 128 << 10)
        await trio.testing.wait_all_tasks_blocked()
    assert fetcher.begun == [37, 36, 35, 34]  # fragments are numbered from one
    fetcher.go.set()
    await trio.testing.wait_all_tasks_blocked()
    assert {offset // MIB for _, offset in pusher.stored} == {38, 39}
