"""Ways to read a file, compared with its source: what a child of a test runs.

`python -m tests.mount.readers MODE MOUNTED SOURCE [SECONDS]` reads every file below MOUNTED once,
or over and over for so long, forgetting its pages each time. It writes a dot after each file,
"wrong" and where if a byte differs, and exits with 3 then.
"""

import mmap
import os
import random
import sys
import threading
import time

PAGE = mmap.PAGESIZE
MODES = (
    "read",
    "small reads",
    "pread",
    "map",
    "map sequential",
    "map populate",
    "map random",
    "map threads",
    "map unaligned",
)


def main(mode, mounted, source, seconds=None):
    random.seed(os.getpid())
    deadline = time.monotonic() + float(seconds) if seconds else None
    names = _names(source)
    while True:
        random.shuffle(names)
        for name in names:
            with open(os.path.join(source, name), "rb") as file:
                expected = file.read()
            _check(mode, os.path.join(mounted, name), expected)
            os.write(1, b".")
            if deadline is not None and time.monotonic() > deadline:
                return
        if deadline is None:
            return


def _names(source):
    found = []
    for parent, _, names in os.walk(os.fsencode(source)):
        found += [
            os.path.relpath(os.path.join(parent, name), os.fsencode(source)) for name in names
        ]
    return sorted(os.fsdecode(name) for name in found)


def _check(mode, path, expected):
    if mode == "any":
        mode = random.choice(MODES)
    elif mode == "any that may fail":
        # Not MAP_POPULATE: for a page that cannot be read, Linux 6.18 (`__mm_populate`) tries
        # again until the process is killed: seen without a daemon and with a damaged fragment.
        mode = random.choice([mode for mode in MODES if mode != "map populate"])
    descriptor = os.open(path, os.O_RDONLY)
    try:
        if os.fstat(descriptor).st_size != len(expected):
            _wrong(path, mode, -1)
        if mode in ("read", "small reads", "pread"):
            _READ[mode](path, descriptor, expected)
        elif expected:
            flags = mmap.MAP_PRIVATE | (mmap.MAP_POPULATE if mode == "map populate" else 0)
            with mmap.mmap(descriptor, len(expected), flags, mmap.PROT_READ) as mapped:
                _check_mapped(mode, path, mapped, expected)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(descriptor)


def _read(path, descriptor, expected, size=1 << 20):
    at = 0
    while data := os.read(descriptor, size):
        _compare(path, f"read of {size}", at, data, expected)
        at += len(data)
    if at != len(expected):
        _wrong(path, "short read", at)


def _small_reads(path, descriptor, expected):
    _read(path, descriptor, expected, 77_777)


def _pread(path, descriptor, expected):
    for _ in range(40):
        at, size = random.randrange(len(expected) + 1), random.choice((1, 4096, 70_001, 3_000_000))
        stop = min(at + size, len(expected))
        while at < stop:
            # Short before what cannot be read, as when the daemon is killed: then that raises.
            data = os.pread(descriptor, stop - at, at)
            if not data:
                _wrong(path, "short pread", at)
            _compare(path, "pread", at, data, expected)
            at += len(data)


_READ = {"read": _read, "small reads": _small_reads, "pread": _pread}


def _check_mapped(mode, path, mapped, expected):
    if mode == "map sequential":
        mapped.madvise(mmap.MADV_SEQUENTIAL)
    pages = list(range(0, len(expected), PAGE))
    if mode == "map random":
        mapped.madvise(mmap.MADV_RANDOM)
        random.shuffle(pages)
        _compare_pages(path, mode, mapped, expected, pages)
    elif mode == "map threads":
        shares = [pages[len(pages) * n // 4 : len(pages) * (n + 1) // 4] for n in range(4)]
        threads = [
            threading.Thread(target=_compare_pages, args=(path, mode, mapped, expected, share))
            for share in shares
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    elif mode == "map unaligned":
        at = 0
        while at < len(expected):
            size = random.randrange(1, 300_000)
            _compare(path, mode, at, mapped[at : at + size], expected)
            at += size
    else:
        _compare_pages(path, mode, mapped, expected, pages)


def _compare_pages(path, mode, mapped, expected, pages):
    for at in pages:
        _compare(path, mode, at, mapped[at : at + PAGE], expected)


def _compare(path, mode, at, data, expected):
    if data != expected[at : at + len(data)]:
        _wrong(path, mode, at)


def _wrong(path, mode, at):
    os.write(2, f"wrong: {path!a} at {at} by {mode}\n".encode())
    os._exit(3)


if __name__ == "__main__":
    main(*sys.argv[1:])
