"""What is planned ahead of readers: the properties that hold whatever the policy is."""

import itertools
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fragfs.library.extents import ExtentMapBuilder
from fragfs.reader.ahead import PAGE_BYTES, TRIPWIRE_BYTES, ReadAhead
from fragfs.types import SpanKind

MIB = 1 << 20
REQUEST = 128 << 10


def file_of(header, tensors, fragment_bytes=MIB, tail=0):
    """Extents of a file: a header, tensors cut into fragments, and a tail."""
    builder = ExtentMapBuilder()
    number = 0

    def append(size, kind):
        nonlocal number
        for start in range(0, size, fragment_bytes):
            number += 1
            length = min(fragment_bytes, size - start)
            builder.append(length, number, 0, kind, first=start == 0)

    append(header, SpanKind.HEADER)
    for size in tensors:
        append(size, SpanKind.TENSOR)
    append(tail, SpanKind.TAIL)
    return builder.build()


def starts_of(extents):
    return [extent.offset for extent in extents if extent.first]


def test_reading_only_the_header_plans_nothing():
    """Loaders look at the headers of every shard first, and many tools at nothing else."""
    for header in (100, 10_000, 1_000_000):
        extents = file_of(header, [8 * MIB, 8 * MIB])
        for sizes in ([8, header], [header], [4096] * (header // 4096 + 1)):
            ahead, offset = ReadAhead(extents), 0
            for size in sizes:
                assert ahead.on_read(offset, size) is None
                offset += size


def test_a_small_file_plans_nothing_but_itself():
    for size in (0, 1, 100, 4096):
        ahead = ReadAhead(file_of(0, [size]))
        window = ahead.on_read(0, REQUEST)
        assert window is None or window.stop <= size


def test_a_reader_from_front_to_back_is_followed_to_the_end():
    extents = file_of(5000, [7 * MIB + 13, 30 * MIB, 3 * MIB])
    ahead, offset, planned = ReadAhead(extents), 0, set()
    while offset < extents.size:
        window = ahead.on_read(offset, REQUEST)
        if window is not None:
            planned |= set(range(window.start // PAGE_BYTES, -(-window.stop // PAGE_BYTES)))
            if window.trip is not None:
                planned -= set(
                    range(window.trip // PAGE_BYTES, (window.trip + TRIPWIRE_BYTES) // PAGE_BYTES)
                )
        offset += REQUEST
        # What is there already is not asked for: the reader's next miss is the next hole.
        while offset < extents.size and offset // PAGE_BYTES in planned:
            offset += PAGE_BYTES
    assert len(planned) * PAGE_BYTES > extents.size // 2


@pytest.mark.parametrize("block", [64 << 10, 512 << 10, MIB, 7 * MIB // 4])
@pytest.mark.parametrize("stored", [0, 700 << 10])
def test_a_reader_from_back_to_front_is_followed_to_the_start(block, stored):
    """Also where some of a block is not asked for, because it was stored as its end was touched."""
    extents = file_of(5000, [7 * MIB + 13, 30 * MIB, 3 * MIB])
    ahead, windows = ReadAhead(extents), []
    reads = 0
    for start in reversed(range(0, extents.size, block)):
        asked = max(REQUEST, block - stored)
        for offset in range(start, min(start + asked, extents.size), REQUEST):
            reads += 1
            window = ahead.on_read(offset, min(REQUEST, block))
            if window is not None and window.stream is not None:
                if window.is_backward:
                    windows.append(window)
                    # What was read already is behind its reader, however far it reaches.
                    assert window.stop <= start
                else:
                    assert start > extents.size - 3 * block  # nobody knows yet where it goes
    assert windows[-1].start == 0
    for window, below in itertools.pairwise(windows):
        assert below.stop == window.start
    assert windows[0].stop > extents.size - 4 * block - MIB
    assert len(windows) < 8


def test_one_who_goes_on_beyond_the_block_above_goes_front_to_back_again():
    extents = file_of(5000, [64 * MIB])
    ahead = ReadAhead(extents)
    for start in (33 * MIB, 32 * MIB, 31 * MIB):
        last = ahead.on_read(start, REQUEST)
    assert last.is_backward
    windows = [ahead.on_read(31 * MIB + REQUEST * index, REQUEST) for index in range(1, 64)]
    forward = [window for window in windows if window is not None]
    assert forward
    assert not any(window.is_backward for window in forward)
    assert forward[0].start > 33 * MIB


@pytest.mark.parametrize("tensor", [1, 2, 3])
def test_a_read_at_the_start_of_a_tensor_plans_within_it(tensor):
    extents = file_of(5000, [4 * MIB + 8, 6 * MIB, 5 * MIB + 4, 9 * MIB])
    starts = [*starts_of(extents), extents.size]
    start, stop = starts[tensor + 1], starts[tensor + 2]
    window = ReadAhead(extents).on_read(start // PAGE_BYTES * PAGE_BYTES, REQUEST)
    assert start <= window.start < window.stop <= stop


def test_a_read_in_the_middle_touches_its_fragment_and_no_more():
    extents = file_of(4096, [64 * MIB])
    for offset in (9 * MIB + 4096, 30 * MIB, 63 * MIB):
        window = ReadAhead(extents).on_read(offset, 4096)
        extent = extents[extents.index_at(offset)]
        assert extent.offset <= window.start < window.stop <= extent.offset + extent.size


@pytest.mark.parametrize("touch", [128 << 10, 512 << 10])
def test_who_has_read_more_than_the_kernel_reads_around_a_page_has_gone_on(touch):
    """Reads that follow each other may be told of as one: of a thread that began in the middle."""
    extents = file_of(4096, [64 * MIB])
    window = ReadAhead(extents, touch_bytes_max=touch).on_read(9 * MIB, touch)
    assert window.stream is None
    window = ReadAhead(extents, touch_bytes_max=touch).on_read(9 * MIB, touch + PAGE_BYTES)
    assert window.stream is not None
    assert window.start >= 9 * MIB + touch


def test_random_touches_grow_no_windows():
    extents = file_of(4096, [512 * MIB])
    ahead = ReadAhead(extents)
    for index in range(200):
        offset = (index * 7919 % 125) * 4 * MIB + 2 * MIB
        window = ahead.on_read(offset, 4096)
        assert window is None or window.stop - window.start <= MIB


@pytest.mark.parametrize(("size", "limit"), [(16, 64), (64, 32), (1024, 0)])
def test_touches_anywhere_are_rarely_taken_for_a_reader_from_back_to_front(size, limit):
    """In a small file many are near each other, one below the other; but then it has little."""
    extents = file_of(4096, [size * MIB])
    random, planned = Random(size), 0
    ahead = ReadAhead(extents)
    for _ in range(400):
        window = ahead.on_read(random.randrange(size * MIB) // PAGE_BYTES * PAGE_BYTES, 4096)
        if window is not None and window.is_backward:
            planned += window.stop - window.start
    assert planned <= limit * MIB


@pytest.mark.parametrize("beside", ["one who goes on", "another back to front", "touches"])
def test_a_reader_from_back_to_front_is_followed_beside_others(beside):
    extents = file_of(5000, [400 * MIB])
    ahead, random, planned = ReadAhead(extents), Random(1), set()
    others = {
        "one who goes on": (250 * MIB + REQUEST * index for index in itertools.count()),
        "another back to front": (390 * MIB - REQUEST * index for index in itertools.count()),
        "touches": (random.randrange(250, 400) * MIB for _ in itertools.count()),
    }[beside]
    for block in range(199, 99, -1):
        for offset in range(0, MIB, REQUEST):
            windows = [ahead.on_read(block * MIB + offset, REQUEST)]
            windows.append(ahead.on_read(next(others), REQUEST))
            for window in windows:
                if window is not None and window.is_backward:
                    planned |= set(range(window.start // MIB, window.stop // MIB))
    assert len(planned & set(range(100, 200))) > 90


def test_threads_that_take_blocks_from_back_to_front_are_planned_for():
    """No block is whole when the next one begins, and none is the last that was read."""
    block, threads = 2 * MIB, 3
    extents = file_of(5000, [512 * MIB])
    ahead, planned, covered, reads = ReadAhead(extents), set(), 0, 0
    for top in range(extents.size // block - 1, threads, -threads):
        for offset in range(0, block, REQUEST):
            for number in range(top, top - threads, -1):
                at = number * block + offset
                reads += 1
                covered += at // PAGE_BYTES in planned
                window = ahead.on_read(at, REQUEST)
                if window is not None:
                    pages = range(window.start // PAGE_BYTES, window.stop // PAGE_BYTES)
                    planned.update(pages)
    assert covered > 0.85 * reads


READS = st.lists(
    st.tuples(
        st.integers(0, 1 << 26),
        st.sampled_from([1, 4096, 131072, 1 << 20]),
        st.sampled_from(["anywhere", "behind", "before"]),
    ),
    max_size=60,
)


@settings(max_examples=50)
@given(
    st.integers(0, 2 * MIB),
    st.lists(st.integers(1, 9 * MIB), max_size=6),
    st.sampled_from([30_000, MIB, 2 * MIB]),
    st.integers(0, 9000),
    READS,
)
def test_windows_are_pages_within_the_file_and_never_planned_twice(
    header, tensors, fragment_bytes, tail, reads
):
    """Any reads, also beyond the end; many follow their predecessor, or end where it began."""
    extents = file_of(header, tensors, fragment_bytes, tail)
    ahead, planned, at, end = ReadAhead(extents), [], 0, 0
    for offset, size, place in reads:
        anywhere = offset % (extents.size + REQUEST)
        at = {"anywhere": anywhere, "behind": end, "before": max(0, at - size)}[place]
        end = at + size
        window = ahead.on_read(at, size)
        if window is None:
            continue
        assert 0 <= window.start < window.stop <= extents.size
        assert window.start % PAGE_BYTES == 0
        assert window.stop % PAGE_BYTES == 0 or window.stop == extents.size
        if window.trip is not None:
            assert window.trip % PAGE_BYTES == 0
            assert window.start <= window.trip
            assert window.trip + TRIPWIRE_BYTES <= window.stop
        if window.stream is not None:
            for before in planned:
                if before.stream is window.stream:
                    assert window.start >= before.stop or window.stop <= before.start
            planned.append(window)
