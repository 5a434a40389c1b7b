"""Many processes and threads that touch random pages of 160 mapped shards, all cold.

`python -m tests.mount.soak_shards MINUTES` runs for as long as is wanted; the suite runs seconds of
it. The fragment cache is smaller than a shard, so what one thread waits for leaves for another's
sake. What must hold: every process goes on all the time, and every byte is right.
"""

import mmap
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from fragfs.mount.launch import mount
from fragfs.mount.options import MountOptions
from fragfs.mount.unmount import unmount
from tests.mount.support import make_library, write_safetensors

SHARDS = 160
SHARD_SHAPE = (450, 512)
CACHE_BYTES = 1 << 20
"""Of 1.8 MB in a shard."""

THREADS = (4, 16, 64)
PROCESSES = 8
HANG_S = 10.0
"""Idle machines see each process touch thousands of pages a second."""

PROGRAM = """
import mmap, os, random, sys, threading, time
root, source = sys.argv[1:3]
count, seconds, seed, counters = map(int, sys.argv[3:])
shards = sorted(os.listdir(source))
def mapped(directory, name):
    with open(os.path.join(directory, name), "rb") as file:
        return mmap.mmap(file.fileno(), 0, mmap.MAP_PRIVATE, mmap.PROT_READ)
ours, theirs = ([mapped(d, n) for n in shards] for d in (root, source))
# A fault is waited for with the interpreter's lock held, so nobody here could say what goes on.
touched = memoryview(mmap.mmap(counters, 8 * count)).cast("Q")
stop = time.monotonic() + seconds
def work(number):
    chosen = random.Random(seed * 1000 + number)
    while time.monotonic() < stop:
        which = chosen.randrange(len(ours))
        at = chosen.randrange(len(ours[which]) // 4096) * 4096
        if ours[which][at:at + 64] != theirs[which][at:at + 64]:
            os.write(2, b"wrong bytes in %s at %d" % (shards[which].encode(), at))
            os._exit(1)
        if chosen.random() < 0.02:
            name = os.path.join(root, shards[which])
            descriptor = os.open(name, os.O_RDONLY)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(descriptor)
            ours[which].madvise(mmap.MADV_DONTNEED)
        touched[number] += 1
threads = [threading.Thread(target=work, args=(n,), daemon=True) for n in range(count)]
for thread in threads: thread.start()
for thread in threads: thread.join(seconds + 60)
if any(thread.is_alive() for thread in threads):
    os.write(2, b"a thread hangs"); os._exit(1)
"""


def make(directory):
    """(library, source) with the shards, no two alike."""
    source = directory / "source"
    source.mkdir()
    for number in range(SHARDS):
        name = f"model-{number + 1:05d}-of-{SHARDS:05d}.safetensors"
        write_safetensors(source / name, number, tensor_count=2, shape=SHARD_SHAPE)
    return make_library(directory / "library", {b"model": source}), source


def soak(mountpoint, source, seconds, thread_count, process_count=PROCESSES):
    """Pages that were touched; fails if a process stops, or says that something is wrong."""
    words = (mountpoint / "model", source, thread_count, seconds)
    processes, counters = [], []
    for seed in range(process_count):
        shared = os.memfd_create("counters")
        os.truncate(shared, 8 * thread_count)
        counters.append(memoryview(mmap.mmap(shared, 8 * thread_count)).cast("Q"))
        processes.append(
            subprocess.Popen(
                [sys.executable, "-c", PROGRAM, *map(str, (*words, seed, shared))],
                pass_fds=[shared],
                stderr=subprocess.PIPE,
            )
        )
        os.close(shared)
    counts = [0] * process_count
    moved_at = [time.monotonic()] * process_count
    try:
        while any(process.poll() is None for process in processes):
            time.sleep(0.1)
            for index, process in enumerate(processes):
                if sum(counters[index]) > counts[index]:
                    counts[index], moved_at[index] = sum(counters[index]), time.monotonic()
                stands_s = time.monotonic() - moved_at[index]
                assert process.poll() is not None or stands_s < HANG_S, "no progress"
        said = [process.stderr.read() for process in processes]
        assert [process.returncode for process in processes] == [0] * process_count, said
    finally:
        for process in processes:
            process.kill()
            process.communicate()
    return sum(counts)


def main(minutes):
    with tempfile.TemporaryDirectory(prefix="fragfs-shards-") as name:
        library, source = make(Path(name))
        place = Path(name) / "mount"
        place.mkdir()
        for thread_count in THREADS:
            mount(MountOptions(library, place, cache_bytes_max=CACHE_BYTES))
            try:
                seconds = max(1, int(float(minutes) * 60 / len(THREADS)))
                touched = soak(place, source, seconds, thread_count)
            finally:
                unmount(place, lazy=True)
            print(f"{PROCESSES} processes of {thread_count} threads: {touched:,} pages touched")


if __name__ == "__main__":
    main(*sys.argv[1:])
