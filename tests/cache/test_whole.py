"""Contents put together into one file: right, within the budget, and never from wrong bytes."""

import contextlib
import errno
import hashlib
import mmap
import os
import threading
import time
from pathlib import Path

import pytest

from fragfs.cache import whole as module
from fragfs.cache.layered import BASE_CREDIT_S, SERVED_CREDIT_S
from fragfs.cache.pages import LARGE_PAGE_BYTES, collapse_pages
from fragfs.cache.shared import FOOTER, SharedFragmentCache, file_name
from fragfs.cache.whole import WHOLE_BYTES_MIN, Part, Whole, WholeFiles
from fragfs.errors import IntegrityError
from fragfs.types import FragmentId, FragmentIdentity
from tests.cache.support import drop, fragment_of, place_at, raw_of

SIZES = [1_000_000, 5, 1_300_001, 70_000]
BUDGET = 32 << 20


def always():
    return True


def nothing(fragment):
    raise AssertionError(f"fragment {fragment.number} was fetched")


class Content:
    """A content of a few fragments: all of the first, ranges of others, the first again."""

    def __init__(self, seed=0, sizes=SIZES, *, bases=()):
        self.raws = [raw_of(seed * 1000 + number, size) for number, size in enumerate(sizes, 1)]
        self.fragments = [
            FragmentIdentity(number, fragment_of(raw), raw.nbytes, False, number in bases)
            for number, raw in enumerate(self.raws, seed * 1000 + 1)
        ]
        first, small, large, last = self.fragments
        self.parts = [
            Part(first, 0, sizes[0]),
            Part(small, 1, 3),
            Part(large, 17, sizes[2] - 20),
            Part(last, 0, sizes[3]),
            Part(first, 100, 50),
        ]
        raws = dict(zip((one.number for one in self.fragments), self.raws, strict=True))
        self.data = b"".join(
            raws[part.fragment.number][part.start : part.start + part.size] for part in self.parts
        )
        self.size = len(self.data)
        self.whole = Whole(77 + seed, hashlib.sha256(self.data).digest(), self.size)

    def put(self, shared):
        for fragment, raw in zip(self.fragments, self.raws, strict=True):
            assert shared.put(fragment.id, raw)

    def is_held(self, shared):
        return [shared.holds(fragment.id) for fragment in self.fragments]


@pytest.fixture
def directory(tmp_path):
    return tmp_path / "user" / "library"


@pytest.fixture
def shared(directory):
    made = SharedFragmentCache(place_at(directory, BUDGET, in_memory=True))
    yield made
    if directory.exists():
        made.close()


@pytest.fixture
def whole(shared):
    return WholeFiles(shared, nothing, always)


def read(whole, content):
    """The bytes of a content's file, or None."""
    found = whole.open(content.whole)
    if found is None:
        return None
    with open(found, "rb") as file:
        return file.read()


def path_of(shared, content):
    return Path(shared.place.directory, content.whole.name)


def shared_time(shared, fragment):
    """A fragment's place in the order of leaving."""
    return Path(shared.place.directory, file_name(fragment.id)).stat().st_mtime


def names_in(directory):
    return {path.name for path in directory.iterdir() if not path.name.startswith(".")}


def test_what_was_put_together_is_the_content(shared, whole):
    content = Content()
    content.put(shared)
    assert read(whole, content) is None
    assert whole.make(content.whole, content.parts)
    assert read(whole, content) == content.data
    assert whole.holds() == 1
    assert whole.check(content.whole)
    # Once is enough.
    before = path_of(shared, content).stat().st_ino
    assert whole.make(content.whole, content.parts)
    assert path_of(shared, content).stat().st_ino == before
    # Where there is room the fragments stay.
    assert all(content.is_held(shared))
    assert shared.statistics().bytes_held == content.size + sum(SIZES) + 4 * FOOTER.size


@pytest.mark.parametrize("which", [0, 2])
def test_where_much_is_missing_there_is_no_file(shared, whole, which):
    content = Content()
    content.put(shared)
    drop(shared, content.fragments[which].id)
    before = names_in(shared.place.directory)
    assert not whole.make(content.whole, content.parts)
    assert read(whole, content) is None
    assert names_in(shared.place.directory) == before


def test_a_little_that_is_missing_is_fetched(shared, whole):
    content = Content()
    content.put(shared)
    fetched = []

    def fetch(fragment):
        fetched.append(fragment)
        return content.raws[content.fragments.index(fragment)]

    for which in (1, 3):
        drop(shared, content.fragments[which].id)
    whole = WholeFiles(shared, fetch, always)
    assert whole.make(content.whole, content.parts)
    assert fetched == [content.fragments[1], content.fragments[3]]
    assert read(whole, content) == content.data


def test_what_leaves_meanwhile_and_is_much_ends_it(shared, whole):
    content = Content()
    content.put(shared)

    def leave():
        drop(shared, content.fragments[2].id)
        return True

    assert not WholeFiles(shared, nothing, leave).make(content.whole, content.parts)
    assert not [name for name in os.listdir(shared.place.directory) if "w" in name]


def test_one_that_cannot_be_fetched_leaves_nothing(shared, whole):
    content = Content()
    content.put(shared)
    drop(shared, content.fragments[1].id)

    def fetch(fragment):
        raise IntegrityError("damaged")

    before = set(os.listdir(shared.place.directory))
    with pytest.raises(IntegrityError):
        WholeFiles(shared, fetch, always).make(content.whole, content.parts)
    assert set(os.listdir(shared.place.directory)) == before
    assert shared.claim(FragmentId(content.whole.sha256))


def test_a_fragment_that_changed_is_in_no_file(shared, whole):
    content = Content()
    content.put(shared)
    path = Path(shared.place.directory, file_name(content.fragments[2].id))
    data = bytearray(path.read_bytes())
    data[5] ^= 1
    path.write_bytes(data)
    assert not whole.make(content.whole, content.parts)
    assert shared.statistics().damaged == 1
    assert not path_of(shared, content).exists()
    # From then on every byte is checked, which the kernel does not do.
    content.put(shared)
    assert not whole.make(content.whole, content.parts)


def test_what_is_not_wanted_any_more_leaves_nothing(shared, whole):
    content = Content()
    content.put(shared)
    wanted = iter([True, True, False])
    before = set(os.listdir(shared.place.directory))
    assert not WholeFiles(shared, nothing, lambda: next(wanted)).make(content.whole, content.parts)
    assert set(os.listdir(shared.place.directory)) == before


def test_a_full_disk_leaves_nothing(shared, whole, monkeypatch):
    content = Content()
    content.put(shared)
    before = set(os.listdir(shared.place.directory))

    def full(*_):
        raise OSError(errno.ENOSPC, "full")

    with monkeypatch.context() as patched:
        patched.setattr(module.os, "pwrite", full)
        assert not whole.make(content.whole, content.parts)
    assert set(os.listdir(shared.place.directory)) == before
    assert whole.make(content.whole, content.parts)


def test_small_and_large_contents_are_left_alone(shared, whole):
    assert not whole.takes(WHOLE_BYTES_MIN - 1)
    assert whole.takes(WHOLE_BYTES_MIN)
    assert whole.takes(shared.files_bytes_max * 3 // 4)
    assert not whole.takes(shared.files_bytes_max * 3 // 4 + 1)
    content = Content(sizes=[1000, 5, 1000, 500])
    content.put(shared)
    assert not whole.make(content.whole, content.parts)


def test_there_are_none_on_disk(directory):
    with contextlib.closing(SharedFragmentCache(place_at(directory, BUDGET))) as shared:
        content = Content()
        content.put(shared)
        assert not WholeFiles(shared, nothing, always).make(content.whole, content.parts)


def test_parts_that_are_not_all_of_it_make_no_file(shared, whole):
    content = Content()
    content.put(shared)
    assert not whole.make(content.whole, content.parts[:-1])


def test_of_two_contents_with_one_sha256_none_is_the_other(shared, whole):
    """As a damaged catalog may say."""
    content = Content()
    content.put(shared)
    assert whole.make(content.whole, content.parts)
    assert whole.open(Whole(5, content.whole.sha256, content.size)) is None


# --- room


def test_the_budget_is_kept_and_what_is_a_base_stays(directory, monkeypatch):
    content = Content(sizes=[1_000_000, 5, 1_300_001, 900_000], bases={3})
    place = place_at(directory, 12_000_000, in_memory=True)
    with contextlib.closing(SharedFragmentCache(place)) as shared:
        limit = shared.files_bytes_max
        others = [raw_of(100 + number, 500_000) for number in range(12)]
        for raw in others:
            assert shared.put(fragment_of(raw), raw)
        content.put(shared)
        assert shared.room() < content.size
        most = 0
        write = os.pwrite

        def watched(descriptor, data, start):
            nonlocal most
            count = write(descriptor, data, start)
            held = sum(entry.stat().st_size for entry in os.scandir(place.directory))
            most = max(most, held)
            return count

        monkeypatch.setattr(module.os, "pwrite", watched)
        whole = WholeFiles(shared, nothing, always)
        assert whole.make(content.whole, content.parts)
        assert read(whole, content) == content.data
        # A fragment is there once more until it was copied.
        assert most <= limit + 1_300_001
        assert shared.statistics().bytes_held <= limit
        # The first is used twice, the second is small, the third is a base.
        assert content.is_held(shared) == [True, True, True, False]


def test_what_has_no_room_beside_its_bases_is_left_as_it_is(directory):
    content = Content(sizes=[1_000_000, 5, 1_300_001, 900_000], bases={1, 2, 3, 4})
    place = place_at(directory, 7_000_000, in_memory=True)
    with contextlib.closing(SharedFragmentCache(place)) as shared:
        content.put(shared)
        whole = WholeFiles(shared, nothing, always)
        assert whole.takes(content.size)
        before = names_in(place.directory)
        assert not whole.make(content.whole, content.parts)
        assert names_in(place.directory) == before


def test_a_file_leaves_as_fragments_do(shared, whole):
    content = Content()
    content.put(shared)
    assert whole.make(content.whole, content.parts)
    shared.trim(0)
    assert read(whole, content) is None
    assert whole.holds() == 0
    content.put(shared)
    assert whole.make(content.whole, content.parts)
    assert read(whole, content) == content.data


def test_what_is_open_or_mapped_stays(shared, whole):
    """Its memory would not be free."""
    content = Content()
    content.put(shared)
    assert whole.make(content.whole, content.parts)
    found = whole.open(content.whole)
    shared.trim(0)
    assert names_in(shared.place.directory) == {content.whole.name}
    assert shared.statistics().bytes_held == content.size
    mapped = mmap.mmap(found, content.size, prot=mmap.PROT_READ)
    os.close(found)
    shared.trim(0)
    assert mapped[:] == content.data
    assert read(whole, content) == content.data
    mapped.close()
    shared.trim(0)
    assert names_in(shared.place.directory) == set()


def test_what_is_being_written_counts(shared):
    path = Path(shared.temporary("w1"))
    path.write_bytes(bytes(1_000_000))
    room = shared.room()
    path.unlink()
    assert shared.room() == room + 1_000_000


def make_some(whole, shared, count, **changes):
    """As many contents of 2.3 MB, put together one after the other; which of them were."""
    made = []
    for seed in range(1, count + 1):
        content = Content(seed, **changes)
        content.put(shared)
        for fragment in content.fragments:
            shared.touch(fragment.id, SERVED_CREDIT_S)
        made.append((content, whole.make(content.whole, content.parts)))
    return made


def test_files_used_within_the_hour_leave_for_no_other(directory):
    place = place_at(directory, 12_000_000, in_memory=True)
    with contextlib.closing(SharedFragmentCache(place)) as shared:
        whole = WholeFiles(shared, nothing, always)
        made = make_some(whole, shared, 4)
        # Three quarters of what is for files: two of them.
        assert [is_made for _, is_made in made] == [True, True, False, False]
        first, third = made[0][0], made[2][0]
        used = time.time() - 3700
        os.utime(path_of(shared, first), (used - 1800, used - 1800))
        found = whole.open(first.whole)  # it is used now
        third.put(shared)
        assert not whole.make(third.whole, third.parts)
        os.utime(path_of(shared, first), (used - 1800, used - 1800))
        # As if used long ago, but open.
        assert not whole.make(third.whole, third.parts)
        os.close(found)
        os.utime(path_of(shared, first), (used - 1800, used - 1800))
        assert whole.make(third.whole, third.parts)
        assert read(whole, first) is None
        assert read(whole, third) == third.data


def test_where_files_in_use_are_the_budget_fragments_keep_some_room(directory, monkeypatch):
    """As when memory becomes short; what is decoded would else leave at once."""
    place = place_at(directory, 12_000_000, in_memory=True)
    with contextlib.closing(SharedFragmentCache(place)) as shared:
        whole = WholeFiles(shared, nothing, always)
        made = [content for content, is_made in make_some(whole, shared, 2) if is_made]
        held = [whole.open(content.whole) for content in made]
        monkeypatch.setattr("fragfs.cache.shared.measure_budget", lambda *_, **__: 4_000_000)
        shared.trim()
        trims = []
        trim = shared.trim
        monkeypatch.setattr(shared, "trim", lambda *a, **k: trims.append(1) or trim(*a, **k))
        for number in range(100):
            raw = raw_of(9000 + number, 50_000)
            assert shared.put(fragment_of(raw), raw)
            assert shared.holds(fragment_of(raw))
        assert len(trims) < 30
        assert shared.statistics().bytes_held < 2 * made[0].size + 1_000_000
        for content, descriptor in zip(made, held, strict=True):
            os.close(descriptor)
            assert read(whole, content) == content.data
        shared.trim()
        assert shared.statistics().bytes_held < 4_000_000


def test_room_for_one_is_not_made_of_others(directory):
    place = place_at(directory, 12_000_000, in_memory=True)
    with contextlib.closing(SharedFragmentCache(place)) as shared:
        whole = WholeFiles(shared, nothing, always)
        ((other, _),) = make_some(whole, shared, 1)
        content = Content(
            7, sizes=[1_000_000, 5, 2_900_001, 900_000], bases={7001, 7002, 7003, 7004}
        )
        content.put(shared)
        assert not whole.make(content.whole, content.parts)
        assert all(content.is_held(shared))
        assert read(whole, other) == other.data


def test_what_is_stopped_holds_nobody_up(shared, whole, monkeypatch):
    content = Content()
    content.put(shared)
    monkeypatch.setattr(module, "_CLAIM_S_MAX", 0.2)
    with contextlib.closing(SharedFragmentCache(shared.place)) as other:
        assert other.claim(FragmentId(content.whole.sha256))
        assert not whole.make(content.whole, content.parts)


def test_one_process_at_a_time_puts_a_content_together(shared, whole):
    content = Content()
    content.put(shared)
    with contextlib.closing(SharedFragmentCache(shared.place)) as other:
        claim = FragmentId(content.whole.sha256)
        assert other.claim(claim)
        wanted = iter([True, False])
        tired = WholeFiles(shared, nothing, lambda: next(wanted))
        assert not tired.make(content.whole, content.parts)
        timer = threading.Timer(0.2, other.release, (claim,))
        timer.start()
        assert whole.make(content.whole, content.parts)
        timer.join()


def test_it_leaves_after_what_was_served_and_before_bases(shared, whole):
    content = Content(bases={3})
    content.put(shared)
    for fragment in content.fragments:
        shared.touch(fragment.id, BASE_CREDIT_S if fragment.is_base else SERVED_CREDIT_S)
    assert whole.make(content.whole, content.parts)
    first, small, large, last = content.fragments
    path = path_of(shared, content)
    for _ in range(2):
        served = max(shared_time(shared, one) for one in (first, small, last))
        assert served + 1000 < path.stat().st_mtime < shared_time(shared, large) - 1000
        # Whoever opens it uses it.
        os.utime(path, (0, 0))
        assert read(whole, content) == content.data


# --- files of other processes


def test_the_file_of_another_process_is_used_once_it_was_checked(directory, shared, whole):
    content = Content()
    content.put(shared)
    assert whole.make(content.whole, content.parts)
    other = WholeFiles(shared, nothing, always)
    assert read(other, content) is None
    inode = path_of(shared, content).stat().st_ino
    for fragment in content.fragments:
        drop(shared, fragment.id)
    assert other.make(content.whole, content.parts)
    assert read(other, content) == content.data
    assert path_of(shared, content).stat().st_ino == inode


@pytest.mark.parametrize("size_changes", [False, True])
def test_a_wrong_file_of_another_process_is_removed(shared, whole, size_changes):
    content = Content()
    content.put(shared)
    data = bytearray(content.data)
    data[-1] ^= 1
    if size_changes:
        del data[-1]
    path_of(shared, content).write_bytes(data)
    assert not whole.make(content.whole, content.parts)
    assert not path_of(shared, content).exists()
    assert read(whole, content) is None
    assert shared.statistics().damaged == 1


def test_a_file_that_changed_is_found_and_removed(shared, whole):
    content = Content()
    content.put(shared)
    assert whole.make(content.whole, content.parts)
    with path_of(shared, content).open("r+b") as file:
        file.seek(2_000_000)
        file.write(b"?")
    assert not whole.check(content.whole)
    assert not path_of(shared, content).exists()
    assert read(whole, content) is None
    assert shared.is_suspect()


def test_nothing_is_opened_once_damage_was_found(shared, whole):
    content = Content()
    content.put(shared)
    assert whole.make(content.whole, content.parts)
    shared.drop_damaged("whatever")
    assert read(whole, content) is None


def test_another_file_in_its_place_is_not_opened(shared, whole):
    content = Content()
    content.put(shared)
    assert whole.make(content.whole, content.parts)
    path = path_of(shared, content)
    path.with_suffix(".new").write_bytes(bytes(content.size))
    path.with_suffix(".new").rename(path)
    assert read(whole, content) is None


# --- pages


def test_pages_are_collapsed_without_a_change(tmp_path):
    directory = Path("/dev/shm")
    if not os.access(directory, os.W_OK):
        directory = tmp_path
    path = directory / f"fragfs-test-{os.getpid()}"
    data = os.urandom(3 * LARGE_PAGE_BYTES)
    try:
        path.write_bytes(data)
        with path.open("rb") as file:
            collapse_pages(file.fileno(), LARGE_PAGE_BYTES, 2 * LARGE_PAGE_BYTES)
            assert file.read() == data
            assert not collapse_pages(file.fileno(), 100 * LARGE_PAGE_BYTES, LARGE_PAGE_BYTES)
    finally:
        path.unlink()
