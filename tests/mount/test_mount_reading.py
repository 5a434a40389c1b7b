"""Byte identity through every way a loader reads (H1 to H10, H25, H27)."""

import ctypes
import errno
import fcntl
import hashlib
import json
import mmap
import os
import random
import shutil
import signal
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from tests.mount import soak_shards
from tests.mount.conftest import Mounts
from tests.mount.support import Reader, drop_pages, run_reader, source_files, wait_until

pytestmark = [pytest.mark.mount, pytest.mark.slow]

SHARD = "model-00001-of-00004.safetensors"
MADVICE = {
    "WILLNEED": mmap.MADV_WILLNEED,
    "RANDOM": mmap.MADV_RANDOM,
    "SEQUENTIAL": mmap.MADV_SEQUENTIAL,
    "DONTNEED": mmap.MADV_DONTNEED,
    "POPULATE_READ": 22,
}


def digest(data):
    return hashlib.sha256(data).hexdigest()


@pytest.fixture(scope="module")
def whole(tmp_path_factory, library_path, source):
    """The model, mounted so that the kernel reads what it can itself."""
    made = Mounts(tmp_path_factory.mktemp("whole"))
    mountpoint = made(library_path).mountpoint
    for name in source_files(source):
        with open(os.path.join(os.fsencode(mountpoint / "org" / "model"), name), "rb") as file:
            file.read()
    large = [
        name
        for name in source_files(source)
        if (source / os.fsdecode(name)).stat().st_size >= 1 << 20
    ]

    def status():
        return json.loads(os.getxattr(mountpoint, "user.fragfs.status"))

    def is_done():
        found = status()["passthrough"]
        return found is None or found["off"] is not None or found["files"] >= len(large)

    wait_until(is_done, 20)
    found = status()["passthrough"]
    if found is None or found["off"] is not None:
        pytest.skip("the kernel takes no files here")
    yield mountpoint / "org" / "model"
    assert status()["passthrough"]["opened"] >= len(large)
    made.close()


@pytest.fixture(params=["asked", "whole"])
def cold(request, model):
    """The mounted model, no page of it cached."""
    if request.param == "whole":
        return request.getfixturevalue("whole")
    drop_pages(model)
    return model


def test_h27_every_file_has_the_sha256_of_its_source(cold, source):
    names = source_files(source)
    assert len(names) == 11
    for name in names:
        mounted = os.path.join(os.fsencode(cold), name)
        with open(mounted, "rb") as a, open(os.path.join(os.fsencode(source), name), "rb") as b:
            expected = digest(b.read())
            assert digest(a.read()) == expected, name
        assert os.getxattr(mounted, "user.fragfs.sha256").decode() == expected


@pytest.mark.parametrize(
    ("flags", "protection"),
    [
        (mmap.MAP_PRIVATE, mmap.PROT_READ),
        (mmap.MAP_PRIVATE, mmap.PROT_READ | mmap.PROT_WRITE),
        (mmap.MAP_SHARED, mmap.PROT_READ),
        (mmap.MAP_SHARED | mmap.MAP_POPULATE, mmap.PROT_READ),
    ],
    ids=["private", "private-writable", "shared", "populate"],
)
def test_h01_every_kind_of_mapping(cold, source, flags, protection):
    descriptor = os.open(cold / SHARD, os.O_RDONLY)
    with mmap.mmap(descriptor, os.fstat(descriptor).st_size, flags, protection) as mapped:
        os.close(descriptor)
        assert digest(mapped) == digest((source / SHARD).read_bytes())


def test_h01_a_private_mapping_is_written_without_changing_the_file(cold, source):
    with (cold / SHARD).open("rb") as file:
        mapped = mmap.mmap(file.fileno(), 0, mmap.MAP_PRIVATE, mmap.PROT_READ | mmap.PROT_WRITE)
    mapped[5000:5004] = b"mine"
    assert (cold / SHARD).read_bytes() == (source / SHARD).read_bytes()
    mapped.close()


@pytest.mark.parametrize("advice", MADVICE)
def test_h01_advice_leaves_the_bytes_right(cold, source, advice):
    expected = (source / SHARD).read_bytes()
    with (cold / SHARD).open("rb") as file:
        mapped = mmap.mmap(file.fileno(), 0, mmap.MAP_PRIVATE, mmap.PROT_READ)
    mapped[0]
    mapped.madvise(MADVICE[advice])
    assert digest(mapped) == digest(expected)
    mapped.close()


def test_h01_a_middle_range_may_be_unmapped(cold, source):
    expected = (source / SHARD).read_bytes()
    page = mmap.PAGESIZE
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mmap.restype = ctypes.c_void_p
    libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
    libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
    with (cold / SHARD).open("rb") as file:
        length = len(expected) // page * page
        address = libc.mmap(None, length, mmap.PROT_READ, mmap.MAP_PRIVATE, file.fileno(), 0)
    assert libc.munmap(address + 100 * page, 100 * page) == 0
    tail = (address + 200 * page, length - 200 * page)
    assert ctypes.string_at(address, 100 * page) == expected[: 100 * page]
    assert ctypes.string_at(*tail) == expected[200 * page : length]
    libc.munmap(address, 100 * page)
    libc.munmap(*tail)


def test_h03_the_size_is_exact_from_the_first_lookup(model, source):
    for name in source_files(source):
        expected = os.stat(os.path.join(os.fsencode(source), name)).st_size
        assert os.stat(os.path.join(os.fsencode(model), name)).st_size == expected


def test_pread_at_random_offsets(cold, source):
    expected = (source / SHARD).read_bytes()
    chosen = random.Random(5)
    descriptor = os.open(cold / SHARD, os.O_RDONLY)
    for _ in range(300):
        offset = chosen.randrange(len(expected) + 1000)
        size = chosen.choice([1, 17, 4096, 65536, 2_000_000])
        assert os.pread(descriptor, size, offset) == expected[offset : offset + size]
    os.close(descriptor)


def test_h07_o_direct(cold, source):
    """Aligned, odd, across the end and beyond it; refused or right, never anything else."""
    expected = (source / SHARD).read_bytes()
    descriptor = os.open(cold / SHARD, os.O_RDONLY | os.O_DIRECT)
    buffer = mmap.mmap(-1, 1 << 21)
    end = len(expected)
    offsets = [0, 512, 4096, 1 << 20, 777, 4097, end // 4096 * 4096, end - 100, end, end + 4096]
    for offset in offsets:
        for size in (512, 4096, 1 << 20, 1 << 21):
            got = os.preadv(descriptor, [memoryview(buffer)[:size]], offset)
            assert got == min(size, max(0, end - offset))
            assert buffer[:got] == expected[offset : offset + got]
    os.close(descriptor)


def test_h07_direct_readers_side_by_side(cold, source):
    expected = (source / SHARD).read_bytes()
    descriptor = os.open(cold / SHARD, os.O_RDONLY | os.O_DIRECT)

    def read(start):
        buffer = mmap.mmap(-1, 1 << 20)
        got = os.preadv(descriptor, [buffer], start)
        return buffer[:got] == expected[start : start + (1 << 20)]

    with ThreadPoolExecutor(16) as pool:
        assert all(pool.map(read, range(0, len(expected), 1 << 20)))
    os.close(descriptor)


@pytest.mark.parametrize(
    "advice", [os.POSIX_FADV_SEQUENTIAL, os.POSIX_FADV_WILLNEED, os.POSIX_FADV_DONTNEED]
)
def test_h08_fadvise(cold, source, advice):
    with (cold / SHARD).open("rb", buffering=0) as file:
        os.posix_fadvise(file.fileno(), 0, 0, advice)
        assert digest(file.read()) == digest((source / SHARD).read_bytes())


def test_h09_a_descriptor_shared_by_forked_processes(cold, source):
    program = """
import os, sys, random
expected = open(sys.argv[2], "rb").read()
fd = os.open(sys.argv[1], os.O_RDONLY)
children = []
for seed in range(8):
    pid = os.fork()
    if not pid:
        chosen = random.Random(seed)
        for _ in range(200):
            offset = chosen.randrange(len(expected))
            if os.pread(fd, 50_000, offset) != expected[offset:offset + 50_000]:
                os._exit(1)
        os._exit(0)
    children.append(pid)
assert [os.waitpid(pid, 0)[1] for pid in children] == [0] * 8
"""
    run_reader(program, cold / SHARD, source / SHARD)


def test_h10_copies_by_the_kernel_are_identical(cold, source, tmp_path):
    expected = digest((source / SHARD).read_bytes())
    shutil.copyfile(cold / SHARD, tmp_path / "shutil")
    run_reader(
        "import subprocess, sys; subprocess.run(['cp', *sys.argv[1:]], check=True)",
        cold / SHARD,
        tmp_path / "cp",
    )
    size = os.stat(cold / SHARD).st_size
    for call in ("sendfile", "copy_file_range"):
        with (cold / SHARD).open("rb") as a, (tmp_path / call).open("wb") as b:
            done = 0
            while done < size:
                if call == "sendfile":
                    done += os.sendfile(b.fileno(), a.fileno(), done, size - done)
                else:
                    try:
                        done += os.copy_file_range(a.fileno(), b.fileno(), size - done)
                    except OSError:  # across file systems: refused is fine, wrong is not
                        shutil.copyfile(cold / SHARD, tmp_path / call)
                        break
    for name in ("shutil", "cp", "sendfile", "copy_file_range"):
        assert digest((tmp_path / name).read_bytes()) == expected, name


def test_h10_holes_are_not_reported(model):
    with (model / SHARD).open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        assert os.lseek(file.fileno(), 0, os.SEEK_DATA) == 0
        assert os.lseek(file.fileno(), 0, os.SEEK_HOLE) == size
        # FICLONE onto another file system; cp then falls back to reading.
        with (
            open(os.devnull, "wb") as target,
            pytest.raises(OSError, match=r"\[Errno") as caught,
        ):
            fcntl.ioctl(target.fileno(), 0x40049409, file.fileno())
        assert caught.value.errno in (errno.EXDEV, errno.EOPNOTSUPP, errno.EINVAL, errno.ENOTTY)


def test_h25_pages_survive_a_reopen(mounts, library_path, source):
    """With the daemon stopped, everything read before is read again: no request is sent."""
    report = mounts(library_path)
    path = report.mountpoint / "org" / "model" / SHARD
    expected = digest((source / SHARD).read_bytes())
    assert digest(path.read_bytes()) == expected
    with Reader(
        """
file = open(sys.argv[1], "rb")
pause()
print(hashlib.sha256(file.read(os.fstat(file.fileno()).st_size)).hexdigest(), flush=True)
os._exit(0)  # closing would ask the daemon
""",
        path,
    ) as reader:
        os.kill(report.pid, signal.SIGSTOP)
        try:
            status, output, _ = reader.proceed(timeout=20)
        finally:
            os.kill(report.pid, signal.SIGCONT)
    assert (status, output.strip()) == (0, expected)


def test_processes_and_threads_at_once(mounts, library_path, source):
    """8 processes of 4 threads read and map everything, cold, in different orders."""
    report = mounts(library_path, cache_bytes_max=4 << 20)
    program = """
import hashlib, mmap, os, random, sys, threading
root, source, seed = os.fsencode(sys.argv[1]), os.fsencode(sys.argv[2]), int(sys.argv[3])
names = []
for parent, _, files in os.walk(source):
    names += [os.path.relpath(os.path.join(parent, f), source) for f in files]
failures = []
def work(seed):
    chosen = random.Random(seed)
    for name in chosen.sample(names, len(names)):
        with open(os.path.join(source, name), "rb") as file:
            expected = file.read()
        with open(os.path.join(root, name), "rb") as file:
            if not expected or chosen.random() < 0.5:
                found = file.read()
            else:
                mapped = mmap.mmap(file.fileno(), 0, mmap.MAP_PRIVATE, mmap.PROT_READ)
                for _ in range(50):
                    at = chosen.randrange(len(expected))
                    if mapped[at] != expected[at]:
                        failures.append(name)
                found = mapped[:]
        if found != expected:
            failures.append(name)
threads = [threading.Thread(target=work, args=(seed * 10 + n,)) for n in range(4)]
for thread in threads: thread.start()
for thread in threads: thread.join()
sys.exit(str(failures) if failures else 0)
"""
    results = []

    def child(seed):
        results.append(
            run_reader(program, report.mountpoint / "org" / "model", source, seed, check=False)
        )

    children = [threading.Thread(target=child, args=(seed,)) for seed in range(8)]
    for thread in children:
        thread.start()
    for thread in children:
        thread.join()
    assert [result.stderr for result in results] == [""] * 8


@pytest.mark.parametrize("thread_count", [4, 16, 64])
def test_h05_parallel_faults_on_many_shards_always_progress(
    mounts, library_path, source, thread_count
):
    """Random pages of all shards, mapped, cold, with a cache smaller than one shard."""
    report = mounts(library_path, cache_bytes_max=2 << 20)
    program = """
import mmap, os, random, sys, threading, time
root, source, count = sys.argv[1], sys.argv[2], int(sys.argv[3])
shards = sorted(n for n in os.listdir(source) if n.startswith("model-"))
def mapped(directory, name):
    with open(os.path.join(directory, name), "rb") as file:
        return mmap.mmap(file.fileno(), 0, mmap.MAP_PRIVATE, mmap.PROT_READ)
ours, theirs = ([mapped(d, n) for n in shards for _ in range(5)] for d in (root, source))
touched, failures, stop = [0] * count, [], time.monotonic() + 3
def work(number):
    chosen = random.Random(number)
    while time.monotonic() < stop:
        which = chosen.randrange(len(ours))
        at = chosen.randrange(len(ours[which]) // 4096) * 4096
        if ours[which][at:at + 64] != theirs[which][at:at + 64]:
            failures.append((which, at))
        if chosen.random() < 0.02:
            ours[which].madvise(mmap.MADV_DONTNEED)
        touched[number] += 1
threads = [threading.Thread(target=work, args=(n,)) for n in range(count)]
for thread in threads: thread.start()
before = 0
while any(thread.is_alive() for thread in threads):
    time.sleep(0.5)
    if sum(touched) == before and time.monotonic() < stop:
        os.write(2, b"no progress"); os._exit(1)
    before = sum(touched)
sys.exit(str(failures[:3]) if failures else 0)
"""
    run_reader(program, report.mountpoint / "org" / "model", source, thread_count)


def test_h05_processes_and_threads_on_160_shards(mounts, tmp_path):
    library, source = soak_shards.make(tmp_path)
    report = mounts(library, cache_bytes_max=soak_shards.CACHE_BYTES)
    assert soak_shards.soak(report.mountpoint, source, 4, thread_count=16) > 8 * 100
