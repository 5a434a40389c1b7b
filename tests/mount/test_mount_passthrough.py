"""Files that the kernel reads itself: the same bytes, whatever is opened, evicted or killed."""

import hashlib
import json
import mmap
import os
import random
import signal
import tempfile
import time
from pathlib import Path

import pytest

from fragfs.cache.pages import is_in_use
from fragfs.mount.table import find_mount
from fragfs.mount.unmount import detach
from tests.mount.support import (
    Reader,
    is_alive,
    make_library,
    run_reader,
    wait_until,
    write_safetensors,
)

pytestmark = [
    pytest.mark.mount,
    pytest.mark.slow,
    pytest.mark.skipif(os.geteuid() != 0, reason="only of root the kernel takes files"),
]

SHARD = "model-00001-of-00004.safetensors"
OTHER = "model-00002-of-00004.safetensors"


SOME_S, SOME_S_MAX = 4, 90


def digest(data):
    return hashlib.sha256(data).hexdigest()


def status_of(mountpoint):
    return json.loads(os.getxattr(mountpoint, "user.fragfs.status"))


def read_once(path):
    """All bytes of a file, by one handle."""
    with open(path, "rb", buffering=0) as file:
        return file.read()


def drop_pages(path):
    """Have the next reader ask for every page: pages that are there are not asked for."""
    with open(path, "rb") as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def whole_files(mountpoint):
    """The whole files of a mount's cache, by name."""
    directory = Path(status_of(mountpoint)["cache"]["directory"])
    return {path.name: path for path in directory.glob("w*")}


class Passing:
    """A mount whose cache is its own."""

    def __init__(self, mounts, library, directory, **options):
        report = mounts(library, cache_directory=directory, **options)
        self.mountpoint, self.pid = report.mountpoint, report.pid
        self.model = self.mountpoint / "org" / "model"

    def status(self):
        return status_of(self.mountpoint)

    @property
    def opened(self):
        return self.status()["passthrough"]["opened"]

    def is_passed(self, name):
        """Whether an open of a file hands it to the kernel."""
        before = self.opened
        with open(self.model / name, "rb"):
            return self.opened > before

    def put_together(self, name=SHARD):
        """Read a file, and wait until the kernel can read it; gives its whole file."""
        path = self.model / name
        drop_pages(path)
        read_once(path)
        wait_until(lambda: self.is_passed(name), 20)
        name = f"w{path.stat().st_ino:x}-{os.getxattr(path, 'user.fragfs.sha256').decode()[:32]}"
        return whole_files(self.mountpoint)[name]


@pytest.fixture
def memory(tmp_path_factory):
    """A directory in shared memory for the cache of a test."""
    with tempfile.TemporaryDirectory(prefix="fragfs-test-", dir="/dev/shm") as made:
        yield Path(made)


@pytest.fixture
def passing(mounts, library_path, memory):
    made = Passing(mounts, library_path, memory)
    read_once(made.model / "trailing.safetensors")
    if made.status()["passthrough"] is None:
        pytest.skip("no front, or no shared memory")
    path = made.model / OTHER
    read_once(path)
    wait_until(
        lambda: made.status()["passthrough"]["files"] or made.status()["passthrough"]["off"],
        20,
    )
    if made.status()["passthrough"]["off"] is not None:
        pytest.skip("this kernel takes no files")
    return made


def test_what_was_read_is_read_by_the_kernel_then(passing, source):
    passing.put_together()
    reads, opened = passing.status()["reads"], passing.opened
    expected = (source / SHARD).read_bytes()
    assert read_once(passing.model / SHARD) == expected
    with open(passing.model / SHARD, "rb") as file:
        assert os.fstat(file.fileno()).st_size == len(expected)
        with mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as mapped:
            assert mapped[:] == expected
        assert os.pread(file.fileno(), 100, len(expected) - 10) == expected[-10:]
        assert os.pread(file.fileno(), 100, len(expected)) == b""
    assert passing.status()["reads"] == reads
    assert passing.opened == opened + 2


def test_what_was_only_looked_at_stays_as_it_is(passing):
    """Although all of it is decoded: read through handles that stay open."""
    path = passing.model / SHARD
    with open(path, "rb") as file:
        while file.read(1 << 20):
            pass
    wait_until(lambda: passing.is_passed(SHARD), 20)
    for found in whole_files(passing.mountpoint).values():
        found.unlink()
    drop_pages(path)
    with open(path, "rb") as file:
        file.read(100_000)
    read_once(passing.model / "config.json")
    time.sleep(0.5)
    assert not whole_files(passing.mountpoint)
    drop_pages(path)
    read_once(path)
    wait_until(lambda: passing.is_passed(SHARD), 20)


def test_handles_of_both_kinds_are_never_mixed(passing, source):
    expected = (source / SHARD).read_bytes()
    with open(passing.model / SHARD, "rb") as asked:
        assert asked.read(10) == expected[:10]
        opened = passing.opened
        with open(passing.model / SHARD, "rb") as early:
            assert early.read() == expected
        assert passing.opened == opened
    passing.put_together()
    opened = passing.opened
    with open(passing.model / SHARD, "rb") as passed:
        assert passing.opened == opened + 1
        # It has left, but who opens the file meanwhile gets what is open.
        for path in whole_files(passing.mountpoint).values():
            path.unlink()
        assert read_once(passing.model / SHARD) == expected
        assert passed.read() == expected
    assert read_once(passing.model / SHARD) == expected
    assert passing.opened == opened + 1
    passing.put_together()


def test_a_mapping_outlives_its_handle_and_the_file(passing, source):
    path = passing.put_together()
    expected = (source / SHARD).read_bytes()
    with open(passing.model / SHARD, "rb") as file:
        mapped = mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ)
    assert is_in_use(os.fspath(path))
    path.unlink()
    with open(passing.model / SHARD, "rb") as asked:
        assert asked.read() == expected
        assert mapped[:] == expected
    mapped.close()


@pytest.mark.parametrize("flags", [os.O_DIRECT, os.O_NOATIME, os.O_NONBLOCK])
def test_however_it_is_opened(passing, source, flags):
    passing.put_together()
    expected = (source / SHARD).read_bytes()
    opened = passing.opened
    descriptor = os.open(passing.model / SHARD, os.O_RDONLY | flags)
    try:
        buffer = mmap.mmap(-1, 1 << 20)
        assert os.preadv(descriptor, [buffer], 4096) == 1 << 20
        assert buffer[:] == expected[4096 : 4096 + (1 << 20)]
    finally:
        os.close(descriptor)
    assert passing.opened == opened + 1


def test_advice_to_read_ahead_is_answered_all_the_same(passing, source):
    passing.put_together()
    with open(passing.model / SHARD, "rb") as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_WILLNEED)
        assert file.read() == (source / SHARD).read_bytes()
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        file.seek(0)
        assert file.read() == (source / SHARD).read_bytes()


def test_once_damage_was_found_the_kernel_reads_nothing_more(passing, source):
    """It checks nothing; doctor says why it does not read."""
    passing.put_together()
    directory = Path(passing.status()["cache"]["directory"])
    with (directory / ".claims").open("r+b") as file:  # as any process does that finds damage
        file.write(b"D")
    assert not passing.is_passed(SHARD)
    assert read_once(passing.model / SHARD) == (source / SHARD).read_bytes()
    assert "damage" in passing.status()["passthrough"]["off"]


def test_pages_that_were_touched_at_random_count_as_read(passing, source):
    expected = (source / SHARD).read_bytes()
    order = list(range(0, len(expected), 4096))
    random.Random(5).shuffle(order)
    drop_pages(passing.model / SHARD)
    with (
        open(passing.model / SHARD, "rb") as file,
        mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as mapped,
    ):
        mapped.madvise(mmap.MADV_RANDOM)
        assert all(mapped[start] == expected[start] for start in order)
    wait_until(lambda: passing.is_passed(SHARD), 20)


def test_off_when_told_so(mounts, library_path, memory, source):
    mount = Passing(mounts, library_path, memory, passthrough=False)
    assert read_once(mount.model / SHARD) == (source / SHARD).read_bytes()
    assert mount.status()["passthrough"] is None


def test_another_mount_uses_the_files_once_it_has_checked_them(
    passing, mounts, library_path, memory, source
):
    path = passing.put_together()
    inode = path.stat().st_ino
    other = Passing(mounts, library_path, memory)
    expected = (source / SHARD).read_bytes()
    assert read_once(other.model / SHARD) == expected
    assert other.opened == 0
    wait_until(lambda: other.is_passed(SHARD), 20)
    assert path.stat().st_ino == inode
    assert read_once(other.model / SHARD) == expected


MAP_ONLY_AND_WAIT = """
import ctypes
libc = ctypes.CDLL(None)
libc.mmap.restype = ctypes.c_void_p
descriptor = os.open(sys.argv[1], os.O_RDONLY)
size = os.fstat(descriptor).st_size
address = libc.mmap(None, ctypes.c_size_t(size), 1, mmap.MAP_SHARED, descriptor, ctypes.c_long(0))
os.close(descriptor)
mapped = (ctypes.c_ubyte * size).from_address(address)
assert hashlib.sha256(bytes(mapped[: 1 << 20])).hexdigest() == sys.argv[2]
pause()
assert hashlib.sha256(mapped).hexdigest() == sys.argv[3]
print("right")
"""

MAP_AND_WAIT = """
mapped = map_file(sys.argv[1])
assert hashlib.sha256(mapped[: 1 << 20]).hexdigest() == sys.argv[2]
pause()
assert hashlib.sha256(mapped).hexdigest() == sys.argv[3]
print("right")
"""


def test_who_has_it_mapped_reads_on_when_the_daemon_is_killed(passing, source):
    passing.put_together()
    expected = (source / SHARD).read_bytes()
    sums = digest(expected[: 1 << 20]), digest(expected)
    with Reader(MAP_AND_WAIT, passing.model / SHARD, *sums) as reader:
        os.kill(passing.pid, signal.SIGKILL)
        wait_until(lambda: not is_alive(passing.pid))
        status, said, _ = reader.proceed()
    assert (status, said) == (0, "right\n")
    detach(find_mount(passing.mountpoint))


def test_a_mount_is_busy_while_it_is_mapped(passing, source):
    passing.put_together()
    expected = (source / SHARD).read_bytes()
    sums = digest(expected[: 1 << 20]), digest(expected)
    umount = [os.sys.executable, "-m", "fragfs", "umount", os.fspath(passing.mountpoint)]
    program = "import subprocess, sys; sys.exit(subprocess.run(sys.argv[1:]).returncode)"
    with Reader(MAP_AND_WAIT, passing.model / SHARD, *sums) as reader:
        done = run_reader(program, *umount, check=False)
        assert done.returncode != 0
        assert f"{reader.pid}" in done.stdout + done.stderr
        assert reader.proceed()[:2] == (0, "right\n")
    assert run_reader(program, *umount).returncode == 0
    assert find_mount(passing.mountpoint) is None


def test_a_model_that_is_removed_stays_whole_for_who_reads_it(mounts, tmp_path, memory):
    from fragfs.library.library import FragmentLibrary

    write_safetensors(tmp_path / "model.safetensors", seed=5)
    expected = (tmp_path / "model.safetensors").read_bytes()
    library = make_library(tmp_path / "lib", {b"one": tmp_path / "model.safetensors"})
    mount = Passing(mounts, library, memory)
    mount.model = mount.mountpoint / "one"
    if mount.status()["passthrough"] is None:
        pytest.skip("no front, or no shared memory")
    read_once(mount.model / "model.safetensors")
    wait_until(
        lambda: mount.status()["passthrough"]["files"] or mount.status()["passthrough"]["off"]
    )
    with open(mount.model / "model.safetensors", "rb") as file:
        file.read(10)
        with FragmentLibrary.open(library) as opened:
            opened.remove(b"one")
            opened.collect()
        wait_until(lambda: not (mount.mountpoint / "one").exists())
        assert expected[10:] == file.read()


def test_a_detached_mount_ends_in_peace_when_it_is_only_mapped(
    mounts, library_path, memory, source
):
    passing = Passing(mounts, library_path, memory, grace_s=0.2)
    if passing.status()["passthrough"] is None:
        pytest.skip("no front, or no shared memory")
    passing.put_together()
    expected = (source / SHARD).read_bytes()
    sums = digest(expected[: 1 << 20]), digest(expected)
    with Reader(MAP_ONLY_AND_WAIT, passing.model / SHARD, *sums) as reader:
        os.kill(passing.pid, signal.SIGTERM)
        wait_until(lambda: not is_alive(passing.pid), 20)
        assert reader.proceed()[:2] == (0, "right\n")
    assert "cutting off" not in mounts.read_log()


OPEN_AND_READ = """
import mmap, os, random, time
paths, plains = sys.argv[1:3], sys.argv[3:5]
seed, stop = int(sys.argv[5]), sys.argv[6]
expected = [open(path, "rb").read() for path in plains]
choose = random.Random(seed)
held = []
pause()
while not os.path.exists(stop):
    which = choose.randrange(2)
    data = expected[which]
    descriptor = os.open(paths[which], os.O_RDONLY | choose.choice((0, 0, os.O_DIRECT)))
    held.append(descriptor)
    start = choose.randrange(len(data) // 4096) * 4096
    size = choose.choice((4096, 200_000, len(data))) // 4096 * 4096
    buffer = mmap.mmap(-1, size)
    count = os.preadv(descriptor, [buffer], start)
    assert buffer[:count] == data[start : start + count] and count
    if choose.random() < 0.3:
        with mmap.mmap(descriptor, 0, prot=mmap.PROT_READ) as mapped:
            assert mapped[start : start + size] == data[start : start + size]
    if choose.random() < 0.5:
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    while len(held) > choose.randrange(3):
        os.close(held.pop(0))
    if choose.random() < 0.5:
        while held:
            os.close(held.pop())
        time.sleep(choose.random() * 0.15)
print("right")
"""


def test_while_files_are_put_together_and_leave(passing, source, tmp_path):
    """Every open gives a handle that works, of the kind that the kernel allows at that moment."""
    stop = tmp_path / "stop"
    choose = random.Random(3)
    names = (SHARD, OTHER)
    paths = [*(passing.model / name for name in names), *(source / name for name in names)]
    passing.put_together()
    opened, left = passing.opened, 0
    readers = [Reader(OPEN_AND_READ, *paths, seed, stop) for seed in range(3)]
    try:
        for reader in readers:
            reader.process.stdin.write("go\n")
            reader.process.stdin.flush()
        started = time.monotonic()
        # Some seconds, and longer where quiet is rare.
        while (took := time.monotonic() - started) < SOME_S or (
            took < SOME_S_MAX and min(left, passing.opened - opened) < 3
        ):
            assert all(reader.process.poll() is None for reader in readers)
            time.sleep(choose.random() * 0.5)
            for found in whole_files(passing.mountpoint).values():
                found.unlink(missing_ok=True)
                left += 1
        stop.touch()
        for reader in readers:
            said, errors = reader.process.communicate(timeout=60)
            assert (reader.process.returncode, said) == (0, "right\n"), errors
    finally:
        for reader in readers:
            reader.__exit__()
    assert passing.opened - opened >= 3
    assert left >= 3
    passing.put_together()
