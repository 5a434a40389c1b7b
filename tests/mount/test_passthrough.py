"""When contents are put together, handed over, taken back and checked; the device is a fake."""

import contextlib
import errno
import hashlib
import os
import time
from types import SimpleNamespace

import pytest

from fragfs.cache.shared import SharedFragmentCache
from fragfs.errors import NotFoundError
from fragfs.library.extents import ExtentMapBuilder, OpenContent
from fragfs.mount import passthrough as module
from fragfs.mount.passthrough import Passthrough
from fragfs.types import FragmentIdentity, SpanKind
from tests.cache.support import fragment_of, place_at, raw_of
from tests.mount.support import wait_until

SIZE = 1 << 20


class Device:
    """What the kernel was asked to keep, and what was taken back."""

    def __init__(self):
        self.kept = {}
        self.refusal = None
        self.count = 0

    def ioctl(self, descriptor, request, data):
        if request == module._BACKING_CLOSE:
            del self.kept[int.from_bytes(data, "little")]
            return 0
        if self.refusal is not None:
            raise OSError(self.refusal, os.strerror(self.refusal))
        self.count += 1
        file = int.from_bytes(data[:4], "little")
        self.kept[self.count] = os.readlink(f"/proc/self/fd/{file}")
        return self.count


class Bench:
    """A passthrough over a cache of its own, with two contents of two fragments each."""

    def __init__(self, directory, monkeypatch, device, *, is_offered=True):
        self.shared = SharedFragmentCache(place_at(directory, 64 << 20, in_memory=True))
        self.is_offered = is_offered
        monkeypatch.setattr(module, "fcntl", SimpleNamespace(ioctl=device.ioctl))
        monkeypatch.setattr(module, "_QUIET_S", 0.05)
        self.fragments = {}
        self.contents = [self.content(number) for number in (7, 8)]
        null = os.open(os.devnull, os.O_RDONLY)
        self.passthrough = Passthrough(
            null,
            lambda: self.is_offered,
            self.shared,
            lambda numbers: [self.fragments[number] for number in numbers],
            lambda number: raw_of(number, SIZE),
        )
        os.close(null)

    def content(self, number):
        builder, data = ExtentMapBuilder(), b""
        for fragment in (number * 10, number * 10 + 1):
            raw = raw_of(fragment, SIZE)
            assert self.shared.put(fragment_of(raw), raw)
            self.fragments[fragment] = FragmentIdentity(
                fragment, fragment_of(raw), SIZE, False, False
            )
            builder.append(SIZE, fragment, 0, SpanKind.OPAQUE, first=True)
            data += raw
        sha256 = hashlib.sha256(data).digest()
        return OpenContent(number, 2 * SIZE, 0, sha256, 2 * SIZE, builder.build())

    def read(self, content, size=2 * SIZE):
        """Open a content, read so much of it, close it; what the kernel read instead."""
        self.passthrough.open_file(content)
        backing = self.passthrough.backing(content.number)
        if size:
            self.passthrough.note_read(content.number, size)
        self.passthrough.close_file(content)
        return backing

    def files(self):
        return {path.name for path in self.shared.place.directory.glob("w*")}

    def put_together(self, content):
        self.read(content)
        wait_until(lambda: self.read(content, 0), 20)


@pytest.fixture
def device():
    return Device()


@pytest.fixture
def bench(tmp_path, monkeypatch, device):
    made = Bench(tmp_path / "place", monkeypatch, device)
    with contextlib.closing(made.shared):
        yield made
        assert made.passthrough.close()
        assert device.kept == {}


def test_what_was_read_is_handed_over_and_taken_back(bench, device):
    content, other = bench.contents
    bench.put_together(content)
    bench.passthrough.open_file(content)
    backing = bench.passthrough.backing(content.number)
    assert device.kept[backing].endswith(next(iter(bench.files())))
    assert bench.passthrough.backing(other.number) == 0
    bench.passthrough.close_file(content)
    assert device.kept == {}
    assert bench.passthrough.status()["files"] == 1


@pytest.mark.parametrize(("size", "is_made"), [(SIZE - 1, False), (SIZE, True)])
def test_half_of_it_is_enough(bench, size, is_made):
    bench.read(bench.contents[0], size)
    bench.read(bench.contents[1])
    wait_until(lambda: len(bench.files()) == 1 + is_made, 20)
    time.sleep(0.1)
    assert len(bench.files()) == 1 + is_made


def test_reads_of_one_time_do_not_count_the_next(bench):
    for _ in range(3):
        bench.read(bench.contents[0], SIZE - 1)
    bench.read(bench.contents[1])
    wait_until(bench.files, 20)
    time.sleep(0.1)
    assert len(bench.files()) == 1


def test_while_somebody_reads_it_waits(bench, monkeypatch):
    monkeypatch.setattr(module, "_QUIET_S", 0.2)
    monkeypatch.setattr(module, "_PATIENCE_S", 60)
    bench.read(bench.contents[0])
    for _ in range(20):
        bench.passthrough.note_read(99, 1)
        time.sleep(0.02)
    assert not bench.files()
    wait_until(bench.files, 20)


def test_where_there_is_never_quiet_it_gives_up(bench, monkeypatch):
    monkeypatch.setattr(module, "_PATIENCE_S", 0.2)
    bench.read(bench.contents[0])
    for _ in range(25):
        bench.passthrough.note_read(99, 1)
        time.sleep(0.02)
    time.sleep(0.3)
    assert not bench.files()
    bench.put_together(bench.contents[0])


def test_what_ends_takes_back_what_it_handed_over(bench, device):
    content = bench.contents[0]
    bench.put_together(content)
    bench.passthrough.open_file(content)
    assert len(device.kept) == 1
    assert bench.passthrough.close()
    assert device.kept == {}
    bench.passthrough.close_file(content)
    bench.passthrough.open_file(content)
    assert bench.passthrough.backing(content.number) == 0
    bench.passthrough = SimpleNamespace(close=lambda: True)


def test_a_file_is_checked_again_some_time_after(bench, monkeypatch):
    content, other = bench.contents
    for one in (content, other):
        bench.put_together(one)
    for name in bench.files():
        path = bench.shared.place.directory / name
        data = bytearray(path.read_bytes())
        data[SIZE + 5] ^= 1
        path.write_bytes(data)
    for _ in range(20):
        assert bench.read(content, 0)
    time.sleep(0.2)
    assert len(bench.files()) == 2  # not yet
    monkeypatch.setattr(module, "_CHECKED_S", 0.0)
    assert bench.read(content, 0)
    wait_until(lambda: len(bench.files()) == 1, 20)
    assert bench.read(other, 0) == 0
    assert "damage" in bench.passthrough.status()["off"]


@pytest.mark.parametrize("refusal", [errno.EPERM, errno.ENOTTY])
def test_where_the_kernel_refuses_nothing_is_put_together(bench, device, refusal):
    device.refusal = refusal
    for content in bench.contents:
        bench.read(content)
    wait_until(lambda: bench.passthrough.status()["off"], 20)
    assert os.strerror(refusal) in bench.passthrough.status()["off"]
    time.sleep(0.2)
    assert not bench.files()


def test_what_passes_is_tried_again(bench, device):
    device.refusal = errno.ENOMEM
    bench.read(bench.contents[0])
    time.sleep(0.3)
    assert not bench.files()
    assert bench.passthrough.status()["off"] is None
    device.refusal = None
    bench.put_together(bench.contents[0])
    device.refusal = errno.EMFILE
    assert bench.read(bench.contents[0]) == 0
    device.refusal = None
    assert bench.read(bench.contents[0])


def test_a_kernel_that_does_not_offer_it(bench):
    bench.is_offered = False
    bench.read(bench.contents[0])
    time.sleep(0.2)
    assert not bench.files()
    assert "6.9" in bench.passthrough.status()["off"]


def test_what_goes_wrong_with_one_does_not_end_it(bench, caplog):
    content, other = bench.contents
    identity = bench.fragments.pop(70)
    bench.read(content)
    wait_until(lambda: "was not put together" in caplog.text, 20)
    bench.put_together(other)
    bench.fragments[70] = identity
    bench.put_together(content)


def test_a_content_that_was_removed_is_no_error(bench, caplog):
    content, other = bench.contents
    found = bench.passthrough._identify_all

    def identify_all(numbers):
        if 70 in numbers:
            raise NotFoundError("fragment number 70 is not in the catalog")
        return found(numbers)

    bench.passthrough._identify_all = identify_all
    bench.read(content)
    bench.put_together(other)
    assert len(bench.files()) == 1
    assert not caplog.records


def test_it_ends_while_it_waits(bench, monkeypatch):
    monkeypatch.setattr(module, "_QUIET_S", 60)
    bench.read(bench.contents[0])
    time.sleep(0.05)
    started = time.monotonic()
    assert bench.passthrough.close()
    assert time.monotonic() - started < 1
    bench.passthrough = SimpleNamespace(close=lambda: True)
