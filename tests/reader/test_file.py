import pytest
import trio
from hypothesis import given
from hypothesis import strategies as st

from fragfs.errors import IntegrityError
from fragfs.reader.fetch import FragmentFetcher
from fragfs.reader.file import FileReader
from tests.reader.fakes import FakeLibrary, content_of, extents_of, memory_cache


def pattern(size):
    return bytes((k * 7 + k // 251) & 0xFF for k in range(size))


def reader_of(library, nursery, bytes_max=1 << 20):
    cache = memory_cache(bytes_max)
    return FileReader(FragmentFetcher(library.decode_fragment, cache, nursery, workers=2))


@given(
    st.integers(0, 3000),
    st.integers(1, 700),
    st.lists(st.tuples(st.integers(0, 3200), st.integers(0, 3200)), max_size=5),
    st.sampled_from([0, 500, 1 << 20]),
)
def test_every_range_equals_the_file(size, fragment_bytes, ranges, cache_bytes):
    data = pattern(size)
    library = FakeLibrary()
    content = library.contents[library.add(b"m", b"f", data, fragment_bytes)]

    async def check():
        async with trio.open_nursery() as nursery:
            reader = reader_of(library, nursery, cache_bytes)
            for offset, length in ranges:
                assert (
                    bytes(await reader.read(content, offset, length))
                    == (data[offset : offset + length])
                )

    trio.run(check)


async def test_one_fragment_is_a_view_without_copy(nursery):
    library = FakeLibrary()
    content = library.contents[library.add(b"m", b"f", pattern(1000))]
    data = await reader_of(library, nursery).read(content, 100, 50)
    assert isinstance(data, memoryview)
    assert data.obj is library.fragments[1]


async def test_fragments_of_one_read_are_decoded_side_by_side(nursery):
    library = FakeLibrary()
    content = library.contents[library.add(b"m", b"f", pattern(3000))]
    running, running_max = 0, 0
    both = trio.Event()

    class Recording(FragmentFetcher):
        async def _fly(self, number, flight, reply):
            nonlocal running, running_max
            running += 1
            running_max = max(running_max, running)
            if running_max == 2:
                both.set()
            with trio.move_on_after(1):
                await both.wait()
            await super()._fly(number, flight, reply)
            running -= 1

    cache = memory_cache()
    fetcher = Recording(library.decode_fragment, cache, nursery, workers=2)
    await FileReader(fetcher).read(content, 500, 1000)
    assert running_max == 2
    assert sorted(library.decodes) == [1, 2]


async def test_a_cached_read_passes_no_checkpoint(nursery):
    library = FakeLibrary()
    content = library.contents[library.add(b"m", b"f", pattern(3000))]
    reader = reader_of(library, nursery)
    await reader.read(content, 0, 3000)
    with trio.testing.assert_no_checkpoints():
        assert bytes(await reader.read(content, 500, 2000)) == pattern(3000)[500:2500]
        assert bytes(await reader.read(content, 3000, 10)) == b""


async def test_a_missing_fragment_fails_the_whole_read(nursery):
    library = FakeLibrary()
    content = library.contents[library.add(b"m", b"f", pattern(3000))]
    library.failing[2] = IntegrityError("fragment 2 is damaged")
    reader = reader_of(library, nursery)
    with pytest.raises(IntegrityError, match="damaged"):
        await reader.read(content, 0, 3000)
    assert bytes(await reader.read(content, 0, 1000)) == pattern(3000)[:1000]


async def test_a_fragment_shorter_than_its_extent_is_an_error_never_a_short_read(nursery):
    library = FakeLibrary()
    library.fragments[1] = b"short"
    content = content_of(extents_of([10]))
    reader = reader_of(library, nursery)
    assert bytes(await reader.read(content, 0, 5)) == b"short"
    with pytest.raises(IntegrityError, match="an extent needs 6"):
        await reader.read(content, 0, 6)
