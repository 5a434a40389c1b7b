"""Files larger than 4 GiB and daemons that stay small, served from a library in memory."""

import os
import random
import subprocess
import sys
import time

import pytest

from fragfs.mount.table import find_mount
from fragfs.mount.unmount import unmount
from tests.mount.fake_daemon import FRAGMENT
from tests.mount.support import rss_anonymous_bytes, wait_until

pytestmark = [pytest.mark.mount, pytest.mark.slow]

BIG = (28_000 << 20) + 12_345
"""28,000 fragments of 1 MiB and a bit: what a 14 B model in bf16 has in one file."""


@pytest.fixture
def big(tmp_path):
    place = tmp_path / "place"
    place.mkdir()
    daemon = subprocess.Popen(
        [sys.executable, "-m", "tests.mount.fake_daemon", place, str(BIG)],
        stderr=subprocess.DEVNULL,
    )
    try:
        wait_until(lambda: find_mount(place) is not None, 20)
        yield daemon, place / "big" / "file"
    finally:
        if find_mount(place) is not None:
            unmount(place, lazy=True)
        daemon.terminate()
        daemon.wait(10)


def expected_at(offset, size):
    size = max(0, min(size, BIG - offset))
    start = offset % len(FRAGMENT)
    return (FRAGMENT * 3)[start : start + size]


def test_h01_offsets_beyond_4_gib_read_right(big):
    _, path = big
    assert path.stat().st_size == BIG
    chosen = random.Random(3)
    descriptor = os.open(path, os.O_RDONLY)
    for offset in [0, (4 << 30) - 5, BIG - 7, BIG, *[chosen.randrange(BIG) for _ in range(200)]]:
        assert os.pread(descriptor, 100_000, offset) == expected_at(offset, 100_000)
    os.close(descriptor)


def test_28000_extents_open_in_under_10_ms(big):
    _, path = big
    path.stat()
    times = []
    for _ in range(5):
        started = time.perf_counter()
        os.close(os.open(path, os.O_RDONLY))
        times.append(time.perf_counter() - started)
    assert min(times) < 0.01


def test_h24_a_handle_waits_for_ever(big):
    """Nothing in the daemon counts the idle time of a handle; a minute stands for hours."""
    _, path = big
    descriptor = os.open(path, os.O_RDONLY)
    os.pread(descriptor, 10, 0)
    time.sleep(3)
    assert os.pread(descriptor, 10, 9 << 30) == expected_at(9 << 30, 10)
    os.close(descriptor)


def test_memory_stays_small_while_gigabytes_are_read(big):
    daemon, path = big
    with path.open("rb", buffering=0) as file:
        buffer = bytearray(1 << 20)
        for _ in range(1024):
            file.readinto(buffer)
    assert rss_anonymous_bytes(daemon.pid) < 300 << 20
