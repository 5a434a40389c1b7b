import trio.testing

from fragfs.cache.memory import MemoryFragmentCache
from fragfs.reader.ahead import SequentialReads
from fragfs.reader.fetch import FragmentFetcher
from fragfs.reader.file import FileReader
from tests.reader.fakes import FakeLibrary

STEP = 128 << 10


def read_on(reads, content, offsets):
    return [reads.observe(content, offset, offset + STEP) for offset in offsets]


def test_a_run_is_noticed_once_it_is_long_enough():
    found = read_on(SequentialReads(), 1, range(0, 10 * STEP, STEP))
    assert found == [False] * 3 + [True] * 7


def test_neighbouring_requests_may_come_out_of_order():
    order = [0, 2, 1, 4, 3, 5, 7, 6]
    assert read_on(SequentialReads(), 1, [k * STEP for k in order])[-1]


def test_random_touches_are_no_run():
    offsets = [k * 37 % 1000 * (1 << 20) for k in range(500)]
    assert not any(read_on(SequentialReads(), 1, offsets))


def test_reading_the_same_place_again_is_no_run():
    assert not any(read_on(SequentialReads(), 1, [0] * 50))


def test_several_readers_of_one_file_are_told_apart():
    reads = SequentialReads()
    found = []
    for step in range(8):
        for start in (0, 100 << 20, 300 << 20):
            found.append(reads.observe(1, start + step * STEP, start + (step + 1) * STEP))
    assert found[-3:] == [True] * 3


def test_files_are_told_apart_and_forgotten_when_many():
    reads = SequentialReads()
    for content in range(1000):
        assert not reads.observe(content, 0, STEP)
    assert not read_on(reads, 1, [STEP, 2 * STEP])[-1]


async def test_a_sequential_reader_finds_the_next_fragments_decoded(nursery):
    library = FakeLibrary()
    content = library.contents[library.add(b"m", b"f", bytes(16 << 20), 1 << 20)]
    fetcher = FragmentFetcher(library.decode_fragment, MemoryFragmentCache(), nursery, workers=2)
    reader = FileReader(fetcher)
    await reader.read(content, 0, STEP)
    await trio.testing.wait_all_tasks_blocked()
    assert library.decodes == [1]
    for offset in range(STEP, 8 * STEP, STEP):
        await reader.read(content, offset, STEP)
    while fetcher.statistics().flights:
        await trio.testing.wait_all_tasks_blocked()
    assert sorted(library.decodes) == [1, 2, 3]


async def test_nothing_is_decoded_beyond_the_end(nursery):
    library = FakeLibrary()
    content = library.contents[library.add(b"m", b"f", bytes(2 << 20), 1 << 20)]
    fetcher = FragmentFetcher(library.decode_fragment, MemoryFragmentCache(), nursery, workers=2)
    reader = FileReader(fetcher)
    for offset in range(0, 2 << 20, STEP):
        await reader.read(content, offset, STEP)
    assert bytes(await reader.read(content, 2 << 20, STEP)) == b""
    assert sorted(library.decodes) == [1, 2]
