"""Decoded fragments that many processes share: what is served is right, whatever happens."""

import contextlib
import errno
import fcntl
import os
import shutil
import subprocess
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fragfs.cache import shared as module
from fragfs.cache.place import CachePlace
from fragfs.cache.shared import FOOTER, SharedFragmentCache, file_name
from tests.cache.support import Child, drop, fragment_of, get, place_at, raw_of

SIZES = (0, 1, 100, 65_536 - FOOTER.size - 1, 65_536, 1_000_003)
"""Copied and mapped ones: see _MAP_BYTES_MIN."""


@pytest.fixture
def directory(tmp_path):
    return tmp_path / "user" / "library"


@pytest.fixture
def cache(directory):
    made = SharedFragmentCache(place_at(directory))
    yield made
    made.close()


def put(cache, number, size=10_000, credit_s=0.0):
    raw = raw_of(number, size)
    assert cache.put(fragment_of(raw), raw, credit_s)
    return fragment_of(raw)


def held_by(directory):
    return {path.name for path in directory.iterdir() if not path.name.startswith(".")}


def bytes_of(directory):
    return sum((directory / name).stat().st_size for name in held_by(directory))


# --- put and get


@pytest.mark.parametrize("size", SIZES)
def test_what_was_put_is_got(cache, size):
    raw = raw_of(3, size)
    fragment = fragment_of(raw)
    assert get(cache, fragment, size) is None
    assert not cache.holds(fragment)
    assert cache.put(fragment, raw)
    assert cache.holds(fragment)
    got = get(cache, fragment, size)
    assert got == raw
    assert got.readonly
    assert (cache.statistics().hits, cache.statistics().misses) == (1, 1)


def test_another_process_sees_it(cache, directory):
    fragment = put(cache, 7)
    program = """
cache = SharedFragmentCache(place_at(directory))
got = get(cache, fragment_of(raw_of(7)), 10_000)
cache.put(fragment_of(raw_of(8)), raw_of(8))
print(got == raw_of(7))
"""
    with Child(program, directory) as child:
        assert child.proceed() == "True\n"
    assert get(cache, fragment_of(raw_of(8)), 10_000) == raw_of(8)
    assert get(cache, fragment, 10_000) == raw_of(7)


@pytest.mark.parametrize("size", [100, 1_000_003])
def test_a_view_survives_eviction_removal_and_the_end_of_the_cache(directory, size):
    cache = SharedFragmentCache(place_at(directory))
    fragment = put(cache, 5, size)
    first = get(cache, fragment, size)
    cache.trim(0)
    assert not cache.holds(fragment)
    assert first == raw_of(5, size)
    put(cache, 5, size)
    second = get(cache, fragment, size)
    drop(cache, fragment)
    cache.close()
    shutil.rmtree(directory)
    assert first == second == raw_of(5, size)


def test_files_are_for_their_owner_only(cache, directory):
    put(cache, 1)
    for path in directory.iterdir():
        assert path.stat().st_mode & 0o777 == 0o600


def test_shared_memory_is_given_back_by_the_last_one(directory):
    first, second = (SharedFragmentCache(place_at(directory, in_memory=True)) for _ in range(2))
    put(first, 1)
    first.close()
    assert directory.exists()
    second.close()
    assert not directory.exists()


# --- damage


def flip(path, at):
    with path.open("r+b") as file:
        file.seek(at)
        byte = file.read(1)
        file.seek(at)
        file.write(bytes([byte[0] ^ 0x40]))


def truncate(path):
    os.truncate(path, path.stat().st_size - 1)


def empty(path):
    os.truncate(path, 0)


def grow(path):
    with path.open("ab") as file:
        file.write(b"x")


def put_another(path):
    """The whole file of another fragment, right in itself."""
    raw = raw_of(99, path.stat().st_size - FOOTER.size)
    other = path.parent.parent / "other"
    cache = SharedFragmentCache(place_at(other))
    cache.put(fragment_of(raw), raw)
    cache.close()
    os.replace(other / file_name(fragment_of(raw)), path)


def put_a_directory(path):
    path.unlink()
    path.mkdir()


def put_a_link(path):
    os.rename(path, path.parent.parent / "moved")
    path.symlink_to(path.parent.parent / "moved")


DAMAGE = {
    "first byte": lambda path: flip(path, 0),
    "middle byte": lambda path: flip(path, path.stat().st_size // 2),
    "last byte": lambda path: flip(path, path.stat().st_size - FOOTER.size - 1),
    "magic": lambda path: flip(path, path.stat().st_size - FOOTER.size),
    "size": lambda path: flip(path, path.stat().st_size - FOOTER.size + 8),
    "checksum": lambda path: flip(path, path.stat().st_size - FOOTER.size + 16),
    "id": lambda path: flip(path, path.stat().st_size - 1),
    "truncated": truncate,
    "empty": empty,
    "grown": grow,
    "another fragment": put_another,
}


@pytest.mark.parametrize("size", [1000, 1_000_003])
@pytest.mark.parametrize("how", DAMAGE)
@pytest.mark.parametrize("in_memory", [True, False])
def test_a_damaged_file_is_a_miss_and_removed(directory, how, size, in_memory, caplog):
    cache = SharedFragmentCache(place_at(directory, in_memory=in_memory))
    fragment = put(cache, 4, size)
    DAMAGE[how](directory / file_name(fragment))
    assert get(cache, fragment, size) is None
    assert not cache.holds(fragment)
    assert cache.statistics().damaged == 1
    assert "damaged" in caplog.text
    put(cache, 4, size)
    assert get(cache, fragment, size) == raw_of(4, size)
    cache.close()


@pytest.mark.parametrize("how", [put_a_directory, put_a_link])
def test_what_is_not_a_file_is_a_miss(cache, directory, how):
    fragment = put(cache, 4)
    how(directory / file_name(fragment))
    assert get(cache, fragment, 10_000) is None


def test_a_fragment_of_another_length_is_a_miss(cache):
    """The catalog says how long it is."""
    fragment = put(cache, 4)
    assert get(cache, fragment, 9_999) is None


def test_after_one_damaged_file_in_memory_every_file_is_checked(directory):
    """One in sixteen is checked until then, beginning with the first."""
    cache = SharedFragmentCache(place_at(directory, in_memory=True))
    fragments = [put(cache, number) for number in range(100)]
    for fragment in fragments:
        flip(directory / file_name(fragment), 5)
    assert [get(cache, fragment, 10_000) for fragment in fragments] == [None] * 100
    assert cache.statistics().damaged == 100
    cache.close()


def test_what_was_in_memory_before_is_checked_whoever_put_it_there(directory):
    place = place_at(directory, in_memory=True)
    before = SharedFragmentCache(place)
    fragments = [put(before, number) for number in range(20)]
    flip(directory / file_name(fragments[7]), 5)
    time.sleep(0.02)  # the kernel's clock for files ticks every 10 ms at most
    now = SharedFragmentCache(place)
    got = [get(now, fragment, 10_000) for fragment in fragments]
    assert [number for number, raw in enumerate(got) if raw is None] == [7]
    before.close()
    now.close()


def test_on_disk_every_file_is_checked(cache, directory):
    fragments = [put(cache, number) for number in range(40)]
    for fragment in fragments[::2]:
        flip(directory / file_name(fragment), 5)
    got = [get(cache, fragment, 10_000) for fragment in fragments]
    assert [raw is None for raw in got] == [True, False] * 20


# --- no room


@pytest.fixture
def small(tmp_path):
    """A tmpfs of 4 MiB with a cache that was promised more."""
    made = tmp_path / "small"
    made.mkdir()
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", made], capture_output=True, check=False
    )
    if done.returncode:
        pytest.skip(f"no tmpfs can be mounted: {done.stderr.decode().strip()}")
    yield made
    subprocess.run(["umount", "--lazy", made], check=True)


def test_a_full_file_system_refuses_and_leaves_nothing_behind(small):
    (small / "of somebody else").write_bytes(bytes(3 << 20))
    directory = small / "cache"
    directory.mkdir()
    cache = SharedFragmentCache(CachePlace(directory, True, 1 << 30, None))
    # Between the measurement and the write somebody fills it: the budget is what it was before.
    cache._bytes_max = 1 << 30
    raw = raw_of(1, 2 << 20)
    assert not cache.put(fragment_of(raw), raw)
    assert not cache.holds(fragment_of(raw))
    assert {path.name for path in directory.iterdir()} == {".users", ".claims", ".lock"}
    cache.close()
    assert held_by(small) == {"of somebody else"}


def test_a_full_file_system_makes_room_and_is_left_alone_for_a_moment(small, monkeypatch):
    now = time.monotonic()
    monkeypatch.setattr(module.time, "monotonic", lambda: now)
    cache = SharedFragmentCache(CachePlace(small, True, 64 << 20, None))
    cache._bytes_max = 64 << 20
    kept = [raw_of(number, 700_000) for number in range(5)]
    assert [cache.put(fragment_of(raw), raw) for raw in kept] == [True] * 5
    cache._bytes_max = 64 << 20
    assert not cache.put(fragment_of(raw_of(9, 700_000)), raw_of(9, 700_000))
    assert cache.evictions > 0
    assert not cache.put(fragment_of(raw_of(9, 100)), raw_of(9, 100))
    now += 3
    assert cache.put(fragment_of(raw_of(9, 100)), raw_of(9, 100))
    cache.close()


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.ENOMEM, errno.EIO])
@pytest.mark.parametrize("after", [0, 1000])
def test_a_write_that_fails_is_no_fragment(cache, directory, monkeypatch, number, after):
    raw = raw_of(1)

    def writev(descriptor, parts):
        os.write(descriptor, parts[0][:after])
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(module.os, "writev", writev)
    assert not cache.put(fragment_of(raw), raw)
    monkeypatch.undo()
    assert get(cache, fragment_of(raw), raw.nbytes) is None
    assert cache.statistics().refused == 1
    assert {path.name for path in directory.iterdir()} <= {".users", ".claims", ".lock"}


def test_short_writes_are_continued(cache, monkeypatch):
    raw = raw_of(1)
    monkeypatch.setattr(
        module.os, "writev", lambda descriptor, parts: os.write(descriptor, parts[0][:999])
    )
    assert cache.put(fragment_of(raw), raw)
    assert get(cache, fragment_of(raw), raw.nbytes) == raw


def test_a_fragment_beyond_the_budget_is_refused(directory):
    cache = SharedFragmentCache(place_at(directory, 10_000))
    fragment = put(cache, 1, 7_000)
    assert not cache.put(fragment_of(raw_of(2)), raw_of(2))
    assert cache.holds(fragment)
    cache.close()


def test_a_directory_that_was_deleted_is_only_misses(cache, directory):
    fragment = put(cache, 1)
    shutil.rmtree(directory)
    assert get(cache, fragment, 10_000) is None
    assert not cache.put(fragment_of(raw_of(2)), raw_of(2))
    assert not cache.holds(fragment)
    cache.touch(fragment, 5)
    drop(cache, fragment)
    cache.trim()
    assert cache.claim(fragment)
    cache.release(fragment)
    statistics = cache.statistics()
    assert (statistics.bytes_held, statistics.refused) == (0, 1)


# --- the order of leaving


def test_damage_is_told_of_where_nothing_more_can_be_written(directory):
    """The first byte of the claims has its page from the beginning: a full tmpfs has no other."""
    with contextlib.closing(SharedFragmentCache(place_at(directory))) as cache:
        claims = directory / ".claims"
        assert claims.read_bytes() == b"\0\0"
        assert claims.stat().st_blocks
        fragment = put(cache, 1)
        path = directory / file_name(fragment)
        path.write_bytes(b"?" + path.read_bytes()[1:])
        assert cache.get(fragment, 10_000, check=True) is None
        assert claims.read_bytes()[:1] == b"D"
        with contextlib.closing(SharedFragmentCache(place_at(directory))) as another:
            assert claims.read_bytes()[:1] == b"D"
            assert another.is_to_check(put(another, 2))


def test_what_is_to_be_checked(directory):
    with contextlib.closing(SharedFragmentCache(place_at(directory, in_memory=True))) as cache:
        old = put(cache, 1)
        cache.since_ns += 10**9
        assert cache.is_to_check(old)
        assert not cache.is_to_check(fragment_of(raw_of(2)))  # it is not there
    with contextlib.closing(SharedFragmentCache(place_at(directory))) as on_disk:
        assert on_disk.is_to_check(old)


def test_the_budget_holds(directory):
    """A quarter of it is for files that were removed and are still held open."""
    cache = SharedFragmentCache(place_at(directory, 200_000))
    for number in range(100):
        put(cache, number)
        assert bytes_of(directory) <= 150_000
    assert cache.evictions >= 85
    assert cache.statistics().bytes_held == bytes_of(directory) > 120_000
    cache.close()


def test_the_oldest_leave_first_and_what_costs_much_stays_longer(cache):
    dear = put(cache, 0, credit_s=600)
    plain = [put(cache, number) for number in range(1, 5)]
    served = put(cache, 9)
    cache.touch(served, -3600)
    cache.touch(plain[0], 1)
    left = []
    for limit in (56_000, 45_000, 34_000, 23_000, 12_000, 0):
        before = {f for f in (dear, served, *plain) if cache.holds(f)}
        cache.trim(limit)
        left += [f for f in before if not cache.holds(f)]
    assert left == [served, *plain[1:], plain[0], dear]


def test_processes_that_put_at_once_keep_one_budget(directory):
    program = """
cache = SharedFragmentCache(place_at(directory, 2_000_000))
first = int(sys.argv[2])
pause()
for number in range(first, first + 100):
    raw = raw_of(number, 100_000)
    cache.put(fragment_of(raw), raw)
    got = get(cache, fragment_of(raw), 100_000)
    assert got is None or got == raw
cache.close()
"""
    with (
        Child(program, directory, 0) as one,
        Child(program, directory, 1000) as two,
    ):
        one.wait_ready()
        two.wait_ready()
        highest = 0
        with ThreadPoolExecutor(2) as pool:
            done = [pool.submit(child.proceed) for child in (one, two)]
            while not all(future.done() for future in done):
                # Who puts while another one trims goes over it for a moment.
                highest = max(highest, bytes_of_racing(directory))
                time.sleep(0.005)
        assert [future.result() for future in done] == ["", ""]
    assert highest <= 4_000_000
    cache = SharedFragmentCache(place_at(directory, 2_000_000))
    assert bytes_of(directory) <= 2_000_000
    cache.close()


def bytes_of_racing(directory):
    total = 0
    for path in directory.iterdir():
        with contextlib.suppress(FileNotFoundError):
            total += 0 if path.name.startswith(".") else path.stat().st_size
    return total


def test_a_trim_gives_way_to_one_that_is_under_way(cache, directory):
    fragment = put(cache, 1)
    program = """
import fcntl
lock = open(directory / ".lock", "r+b")
fcntl.flock(lock, fcntl.LOCK_EX)
pause()
"""
    with Child(program, directory).wait_ready() as child:
        cache.trim(0)
        assert cache.holds(fragment)
        child.kill()
    cache.trim(0)
    assert not cache.holds(fragment)


def test_who_fills_an_over_full_place_waits_for_who_makes_room(directory):
    """One that has to wait for a processor; one that was stopped only makes the others slow."""
    cache = SharedFragmentCache(place_at(directory, 1_000_000))
    limit = 750_000  # a quarter is for what is held open
    for number in range(limit // 10_056):
        put(cache, number)
    assert 0.9 * limit < bytes_of(directory) <= limit
    with (directory / ".lock").open("r+b") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        done = threading.Timer(0.1, fcntl.flock, (lock, fcntl.LOCK_UN))
        done.start()
        put(cache, 1000)
        assert bytes_of(directory) <= limit
        done.join()
        fcntl.flock(lock, fcntl.LOCK_EX)
        start = time.monotonic()
        fragments = [put(cache, number) for number in range(2000, 2010)]
        assert bytes_of(directory) > limit
        assert all(map(cache.holds, fragments))
        # Nobody waits for it again and again: ten such waits would have taken seconds.
        assert time.monotonic() - start < 2
    cache.close()


def test_what_killed_writers_left_is_removed_after_a_while(cache, directory, monkeypatch):
    program = """
import os
from fragfs.cache import shared
def write(descriptor, parts):
    os.write(descriptor, parts[0][:5000])
    pause()
shared.os.writev = write
cache = SharedFragmentCache(place_at(directory))
cache.put(fragment_of(raw_of(1)), raw_of(1))
"""
    with Child(program, directory).wait_ready() as child:
        child.kill()
    own = {".users", ".claims", ".lock"}
    left = {path.name for path in directory.iterdir()} - own
    assert len(left) == 1
    assert get(cache, fragment_of(raw_of(1)), 10_000) is None
    assert cache.statistics().bytes_held == 0
    cache.trim()
    assert {path.name for path in directory.iterdir()} - own == left
    now = time.time()
    monkeypatch.setattr(module.time, "time", lambda: now + 61)
    cache.trim()
    assert {path.name for path in directory.iterdir()} == own


# --- claims


def test_one_process_claims_a_fragment(cache, directory):
    """The kernel frees what a killed one had."""
    mine, theirs = fragment_of(b"mine"), fragment_of(b"theirs")
    program = """
cache = SharedFragmentCache(place_at(directory))
print(cache.claim(fragment_of(b"mine")), cache.claim(fragment_of(b"theirs")), flush=True)
pause()
cache.release(fragment_of(b"theirs"))
pause()
"""
    assert cache.claim(mine)
    assert cache.claim(mine)
    with Child(program, directory) as child:
        assert child._process.stdout.readline() == "False True\n"
        child.wait_ready()
        assert not cache.claim(theirs)
        child.kill()
    assert cache.claim(theirs)
    cache.release(mine)
    with Child(program, directory) as child:
        assert child._process.stdout.readline() == "True False\n"


def test_a_claim_that_was_given_back_is_free(cache, directory):
    other = SharedFragmentCache(place_at(directory))
    fragment = fragment_of(b"x")
    assert cache.claim(fragment)
    assert not other.claim(fragment)
    cache.release(fragment)
    assert other.claim(fragment)
    other.close()
    assert cache.claim(fragment)


# --- against a model


STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("put"), st.integers(0, 7), st.integers(-5, 5)),
        st.tuples(st.just("get"), st.integers(0, 7), st.just(0)),
        st.tuples(st.just("touch"), st.integers(0, 7), st.integers(-5, 5)),
        st.tuples(st.just("drop"), st.integers(0, 7), st.just(0)),
        st.tuples(st.just("trim"), st.integers(0, 40_000), st.just(0)),
        st.tuples(st.just("damage"), st.integers(0, 7), st.integers(0, 100)),
        st.tuples(st.just("delete"), st.integers(0, 7), st.just(0)),
    ),
    max_size=40,
)


@settings(max_examples=60)
@given(STEPS)
def test_equals_a_dictionary_of_places_in_the_order_of_leaving(tmp_path_factory, steps):
    """Two caches on one directory, as of two processes; the clock moves a second per step."""
    directory = tmp_path_factory.mktemp("model")
    directory.chmod(0o700)
    caches = [SharedFragmentCache(place_at(directory, 40_000)) for _ in range(2)]
    model, damaged, now = {}, set(), time.time_ns()  # model: number -> place
    sizes = {number: 3_000 + number * 1_000 for number in range(8)}
    raws = {number: raw_of(number, size) for number, size in sizes.items()}
    ids = {number: fragment_of(raw) for number, raw in raws.items()}

    def total():
        return sum(sizes[number] + FOOTER.size for number in model)

    def trim(limit):
        if total() > limit:
            for number in sorted(model, key=model.__getitem__):
                if total() <= limit * 0.9:
                    break
                del model[number]
                damaged.discard(number)

    patch = pytest.MonkeyPatch()
    try:
        for index, (step, number, value) in enumerate(steps):
            now += 1_000_000_000
            patch.setattr(module.time, "time_ns", lambda at=now: at)
            cache = caches[index % 2]
            if step == "put":
                assert cache.put(ids[number], raws[number], value + 0.001 * number)
                model[number] = now + int((value + 0.001 * number) * 1e9)
                damaged.discard(number)
                cache.trim()
                trim(40_000)
            elif step == "get":
                got = get(cache, ids[number], sizes[number])
                if number in model and number not in damaged:
                    assert got == raws[number]
                else:
                    assert got is None
                    model.pop(number, None)
                    damaged.discard(number)
            elif step == "touch":
                cache.touch(ids[number], value + 0.001 * number)
                if number in model:
                    model[number] = now + int((value + 0.001 * number) * 1e9)
            elif step == "trim":
                cache.trim(number)
                trim(number)
            elif number in model:
                path = directory / file_name(ids[number])
                if step == "damage":
                    place_ns = path.stat().st_mtime_ns
                    flip(path, value)
                    os.utime(path, ns=(place_ns, place_ns))
                    damaged ^= {number}  # flipped twice is right again
                    if value != 0 and number not in damaged:
                        damaged.add(number)
                        path.write_bytes(b"damaged for good".ljust(path.stat().st_size))
                        os.utime(path, ns=(place_ns, place_ns))
                else:
                    drop(cache, ids[number]) if step == "drop" else path.unlink()
                    del model[number]
                    damaged.discard(number)
            assert held_by(directory) == {file_name(ids[number]) for number in model}
            assert cache.statistics().bytes_held == total() <= 40_000
    finally:
        patch.undo()
        for cache in caches:
            cache.close()


def test_threads_that_put_get_and_trim_see_whole_fragments(directory):
    cache = SharedFragmentCache(place_at(directory, 500_000))
    failures = []

    def work(seed):
        random = Random(seed)
        for _ in range(300):
            raw = raw_of(random.randrange(30), 70_000)
            fragment = fragment_of(raw)
            found = get(cache, fragment, raw.nbytes)
            if found is None:
                cache.put(fragment, raw)
            elif found != raw:
                failures.append(seed)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    assert cache.statistics().damaged == 0
    cache.close()


def test_who_finds_a_damaged_file_warns_all_who_share_the_place(tmp_path):
    place = place_at(tmp_path / "place", in_memory=True)
    one, two = SharedFragmentCache(place), SharedFragmentCache(place)
    raws = [raw_of(number) for number in range(4)]
    for raw in raws:
        assert one.put(fragment_of(raw), raw)
    assert two.get(fragment_of(raws[0]), len(raws[0]))
    for raw in raws[1:]:
        path = place.directory / file_name(fragment_of(raw))
        data = bytearray(path.read_bytes())
        data[100] ^= 1
        path.write_bytes(data)
    assert one.get(fragment_of(raws[1]), len(raws[1])) is None
    for raw in raws[2:]:
        assert two.get(fragment_of(raw), len(raw)) is None
    assert (one.statistics().damaged, two.statistics().damaged) == (1, 2)
    one.close()
    two.close()
