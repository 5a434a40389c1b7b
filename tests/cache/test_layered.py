"""Views of one process over the shared files."""

import os
from types import SimpleNamespace

import pytest
import xxhash

from fragfs.cache import layered as module
from fragfs.cache.layered import LayeredFragmentCache, leaving_credit_s
from fragfs.cache.memory import MemoryFragmentCache
from fragfs.cache.shared import SharedFragmentCache, file_name
from fragfs.types import FragmentIdentity
from tests.cache.support import drop, fragment_of, place_at, raw_of

SIZE = 70_000
BASE = 5
"""The one fragment that others are predicted from."""


def identify(number):
    return FragmentIdentity(
        number, fragment_of(raw_of(number, SIZE)), SIZE, has_bases=False, is_base=number == BASE
    )


def identify_all(numbers):
    return [identify(number) for number in numbers]


@pytest.fixture
def shared(tmp_path):
    made = SharedFragmentCache(place_at(tmp_path / "place"))
    yield made
    made.close()


def layered(shared, views_max=10 * SIZE):
    return LayeredFragmentCache(identify_all, MemoryFragmentCache(views_max), shared)


def test_what_one_process_put_another_gets_and_keeps_as_a_view(shared):
    one, two = layered(shared), layered(shared)
    one.put(1, raw_of(1, SIZE))
    assert two.holds(1)
    assert two.get(1) == raw_of(1, SIZE)
    drop(shared, identify(1).id)
    assert two.holds(1)
    assert two.get(1) == raw_of(1, SIZE)
    assert layered(shared).get(1) is None


def test_a_record_says_whose_bytes_they_are_and_their_checksum(shared):
    raw = raw_of(1, SIZE)
    record = SimpleNamespace(id=identify(2).id, raw_checksum=xxhash.xxh3_64_intdigest(raw))
    layered(shared).put(1, raw, record)
    assert not shared.holds(identify(1).id)
    assert layered(shared).find(2, check=True).read(0, SIZE) == raw
    record.raw_checksum ^= 1
    layered(shared).put(3, raw, record)
    assert layered(shared).find(2, check=True) is None


def test_neighbouring_reads_look_for_a_file_once(shared):
    cache = layered(shared)
    cache.publish(identify(1), raw_of(1, SIZE))
    assert cache.get(1) is cache.get(1)
    assert shared.statistics().hits == 1


def test_publishing_keeps_no_view(shared):
    cache = layered(shared)
    assert cache.publish(identify(1), raw_of(1, SIZE))
    assert not cache.held.holds(1)
    assert cache.holds(1)


def test_without_a_shared_cache_there_are_only_views():
    cache = layered(None)
    assert cache.get(1) is None
    assert not cache.holds(1)
    raw = raw_of(1, SIZE)
    cache.put(1, raw)
    assert cache.get(1) is raw
    assert cache.holds(1)
    assert not cache.publish(identify(2), raw_of(2, SIZE))


def test_a_damaged_file_is_a_miss(shared, tmp_path):
    cache = layered(shared)
    cache.publish(identify(1), raw_of(1, SIZE))
    os.truncate(tmp_path / "place" / file_name(identify(1).id), 100)
    assert cache.get(1) is None
    assert not cache.held.holds(1)


def test_a_base_costs_more_to_lose_than_a_fragment_and_a_slow_one_more_than_a_fast_one():
    assert leaving_credit_s(1_000, 1_000, is_base=False) < leaving_credit_s(
        5_000, 1_000, is_base=False
    )
    assert leaving_credit_s(5_000, 1_000, is_base=False) < leaving_credit_s(
        1_000, 1_000, is_base=True
    )
    assert leaving_credit_s(10**12, 1, is_base=False) <= 80
    assert leaving_credit_s(0, 0, is_base=False) == 0


def test_what_was_served_leaves_first_then_what_was_not_and_bases_last(shared):
    """Each in the order they came; a fragment that nobody had yet is what was decoded ahead."""
    reader = layered(shared)
    for number in (BASE, 1, 2, 3, 4):
        reader.publish(identify(number), raw_of(number, SIZE), decode_ns=SIZE)
    for number in (BASE, 3, 4):
        assert reader.find(number) is not None
    left = []
    for kept in (4, 3, 2, 1, 0):
        before = [n for n in (BASE, 1, 2, 3, 4) if shared.holds(identify(n).id)]
        shared.trim(kept * (SIZE + 56))
        left += [n for n in before if not shared.holds(identify(n).id)]
    assert left == [3, 4, 1, 2, BASE]


@pytest.mark.parametrize("how", ["published as a base", "decoded with since"])
def test_what_is_decoded_with_stays(shared, how):
    """Also if it was no base when this process first heard of it."""
    cache = layered(shared)
    kept = BASE if how == "published as a base" else 1
    for number in (kept, 2, 3):
        cache.publish(identify(number), raw_of(number, SIZE), decode_ns=SIZE)
    if kept != BASE:
        assert not cache.identify(kept).is_base
        assert layered(shared).get(kept) is not None
    shared.trim(SIZE + 56)
    assert [n for n in (kept, 2, 3) if shared.holds(identify(n).id)] == [kept]


def test_what_fragments_are_is_asked_together_and_once(shared, monkeypatch):
    asked = []

    def ask(numbers):
        asked.append([*numbers])
        return [identify(number)._replace(is_base=len(asked) > 5) for number in numbers]

    monkeypatch.setattr(module, "_IDENTITIES_MAX", 4)
    cache = LayeredFragmentCache(ask, MemoryFragmentCache(1), shared)
    assert [found.number for found in cache.identify_all([3, 1, 3])] == [3, 1, 3]
    assert cache.identify(1) == cache.identify_all([1])[0] == identify(1)
    assert [found.number for found in cache.identify_all([2, 3, 4])] == [2, 3, 4]
    assert asked == [[3, 1, 3], [2, 4]]
    # More than are remembered, of which some are known: all are said, and few are kept.
    assert [found.number for found in cache.identify_all([9, 1, 8, 7])] == [9, 1, 8, 7]
    assert asked[2:] == [[9, 8, 7]]
    assert cache.identify(1).number == 1
    assert cache.identify(2).number == 2
    assert asked[3:] == [[2]]
    cache.drop_identities()
    assert not cache.identify(2).is_base
    for number in (2, 3, 4, 5, 6):
        cache.note_identity(identify(number)._replace(is_base=True))
    assert cache.identify(6).is_base
    assert asked[4:] == [[2]]
    assert cache.identify(2).number == 2  # one too many was noted, and the others were forgotten
    assert asked[5:] == [[2]]


def damage(shared, number):
    """Change a byte in place, as bad memory does: what is mapped or open shows it."""
    with open(shared.place.directory / file_name(identify(number).id), "r+b") as file:
        file.seek(100)
        byte = file.read(1)
        file.seek(100)
        file.write(bytes([byte[0] ^ 1]))


@pytest.mark.parametrize("how", ["not held", "held", "mapped"])
def test_a_damaged_base_is_decoded_again_not_decoded_with(tmp_path, how):
    """In memory, where most reads are not checked; every single one must be noticed."""
    shared = SharedFragmentCache(place_at(tmp_path / "place", in_memory=True), check_all=False)
    cache = layered(shared)
    for number in range(8):
        cache.publish(identify(number), raw_of(number, SIZE))
    shared.get(identify(0).id, SIZE)
    for number in range(1, 8):
        shared._check_all = False  # each for itself: after the first one all are checked
        os.truncate(shared.place.directory / ".claims", 0)
        if how != "not held":
            assert cache.find(number) is not None
        if how == "mapped":
            assert cache.get(number) == raw_of(number, SIZE)
        damage(shared, number)
        assert cache.get(number) is None
        assert not cache.holds(number)
    assert shared.statistics().damaged == 7
    shared.close()


def test_a_damaged_small_fragment_is_never_held(tmp_path):
    small = 1000

    def identify_small(number):
        return identify(number)._replace(id=fragment_of(raw_of(number, small)), raw_size=small)

    shared = SharedFragmentCache(place_at(tmp_path / "place", in_memory=True), check_all=False)
    cache = LayeredFragmentCache(
        lambda numbers: [*map(identify_small, numbers)], MemoryFragmentCache(1 << 20), shared
    )
    for number in (1, 2):
        cache.publish(identify_small(number), raw_of(number, small))
    assert cache.get(1) == raw_of(1, small)
    path = shared.place.directory / file_name(identify_small(2).id)
    data = bytearray(path.read_bytes())
    data[100] ^= 1
    path.write_bytes(data)
    assert cache.find(2) is None
    shared.close()
