"""The compiled front, with a socket for the device: requests in, replies out."""

import array
import contextlib
import errno
import os
import select
import socket
import struct
import threading
import time
from itertools import pairwise

import pytest
import trio
from pyfuse3 import FUSEError

import fragfs.mount.front
from fragfs.cache.shared import SharedFragmentCache, file_name
from fragfs.library.extents import ExtentMapBuilder, OpenContent
from fragfs.mount.front import find_front_module
from fragfs.types import SpanKind
from tests.cache.support import fragment_of, place_at

MODULE = find_front_module()
pytestmark = pytest.mark.skipif(MODULE is None, reason="the compiled front was not built")

IN_HEADER = struct.Struct("=IIQQIIIHH")
READ_IN = struct.Struct("=QQIIQII")
OUT_HEADER = struct.Struct("=IiQ")
RECORD = struct.Struct("=QQQII")
SERVED, MISSED, ENDED, OPENS, CLOSES = range(5)
LOOKUP, OPEN, READ, RELEASE, INIT, READDIR, INTERRUPT, BATCH_FORGET, READDIRPLUS = (
    *(1, 14, 15, 18, 26),
    *(28, 36, 42, 44),
)
INIT_IN = INIT_OUT = struct.Struct("=16I")
EXTENDED, PASSTHROUGH = 1 << 30, 1 << 5

COARSE_S = 0.02
"""The clock of a file's times is a coarse one: what follows a cache may look older than it."""

FILE = 7
PARTS = [os.urandom(200_000), os.urandom(5), os.urandom(90_000)]
WHOLE = b"".join(PARTS)


class Bench:
    """A front between a kernel, pyfuse3 and an event loop that are this test."""

    def __init__(self, directory, bytes_max=1 << 30, *, is_blocking=True):
        self._directory = directory
        # A stream: what a reply consists of may come in pieces, as its header says how long it is.
        self.kernel, self._device = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        # A device takes a reply whole or not at all; a socket only if it may block.
        self._device.setblocking(is_blocking)
        requests, self.pyfuse3 = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.records, records_in = os.pipe()
        self._requests, self._records_in = requests, records_in
        for end in (self.kernel, self.pyfuse3):
            end.settimeout(20)
        self.front = MODULE.Front(self._device.fileno(), requests.fileno(), records_in, bytes_max)
        self.ended_with = []
        self._threads = [
            threading.Thread(target=lambda: self.ended_with.append(self.front.serve())),
            threading.Thread(target=self.front.relay),
        ]

    def __enter__(self):
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_):
        self.kernel.close()
        self.front.stop()
        for thread in self._threads:
            thread.join(10)
            assert not thread.is_alive()
        self.front = None
        self._threads = []
        for end in (self._device, self._requests, self.pyfuse3):
            end.close()
        os.close(self.records)
        os.close(self._records_in)

    def add_file(self, number, sizes, fragments=None, offsets=None):
        ends = array.array("q")
        for size in sizes:
            ends.append((ends[-1] if ends else 0) + size)
        self.front.add_file(
            number,
            ends,
            array.array("q", fragments or range(1, len(sizes) + 1)),
            array.array("I", sizes),
            array.array("I", offsets or [0] * len(sizes)),
        )

    def give_file(self, fragment, raw):
        path = self._directory / f"{fragment}"
        path.write_bytes(raw + b"what follows is not the fragment's")
        with path.open("rb") as file:
            self.front.give_file(fragment, file.fileno(), len(raw))

    def give_parts(self):
        """The file of this test: in files of the cache, but for the smallest piece."""
        self.add_file(FILE, [len(part) for part in PARTS])
        self.give_file(1, PARTS[0])
        self.front.give_bytes(2, PARTS[1])
        self.give_file(3, PARTS[2])

    def ask(self, opcode, unique, body=b""):
        header = IN_HEADER.pack(IN_HEADER.size + len(body), opcode, unique, FILE, 0, 0, 0, 0, 0)
        self.kernel.sendall(header + body)

    def ask_read(self, unique, offset, size, number=FILE):
        self.ask(READ, unique, READ_IN.pack(number, offset, size, 0, 0, 0, 0))

    def reply(self):
        length, error, unique = OUT_HEADER.unpack(self._take(OUT_HEADER.size))
        return unique, -error, self._take(length - OUT_HEADER.size)

    def read(self, offset, size):
        self.ask_read(5, offset, size)
        unique, error, data = self.reply()
        assert (unique, error) == (5, 0)
        return data

    def _take(self, size):
        data = b""
        while len(data) < size:
            data += self.kernel.recv(size - len(data))
        return data

    def notes(self, timeout_s=20):
        assert select.select([self.records], [], [], timeout_s)[0], (
            "the event loop was told nothing"
        )
        return list(RECORD.iter_unpack(os.read(self.records, 1 << 16)))

    def has_notes(self, timeout_s=0.05):
        return bool(select.select([self.records], [], [], timeout_s)[0])


@pytest.fixture
def bench(tmp_path):
    with Bench(tmp_path) as made:
        yield made


@pytest.mark.parametrize(
    ("offset", "size"),
    [
        (0, 4096),  # copied
        (0, 131072),  # spliced from one file
        (17, 150_001),
        (4096, len(WHOLE)),  # over all pieces, to the end
        (199_990, 40),  # over the small one, copied
        (190_000, 100_000),  # spliced, with a copy in between
        (len(WHOLE) - 3, 4096),
        (len(WHOLE), 4096),
        (1 << 50, 4096),
        (0, 0),
    ],
)
def test_reads_what_it_was_given(bench, offset, size):
    bench.give_parts()
    assert bench.read(offset, size) == WHOLE[offset : offset + size]
    bench.notes()  # what it counts it counts before it tells of it
    assert bench.front.counters() == (1, len(WHOLE[offset : offset + size]), 0)


class Cache:
    """Files of a shared cache that a front may open."""

    def __init__(self, directory, bench):
        self.shared = SharedFragmentCache(place_at(directory))
        self._front = bench.front
        self._front.use_cache(
            os.fsencode(self.shared.place.directory), self.shared.fileno(), self.shared.since_ns
        )

    def put(self, raw):
        assert self.shared.put(fragment_of(raw), memoryview(raw))
        return self.path(raw)

    def path(self, raw):
        return self.shared.place.directory / file_name(fragment_of(raw))

    def name(self, number, raw, credit_ns=0):
        self._front.name(number, fragment_of(raw), len(raw), credit_ns)


@pytest.fixture
def cache(bench, tmp_path):
    made = Cache(tmp_path / "place", bench)
    time.sleep(COARSE_S)
    yield made
    made.shared.close()


def test_it_opens_what_was_named_when_it_is_read(bench, cache):
    bench.add_file(FILE, [len(part) for part in PARTS])
    for number, part in enumerate(PARTS, 1):
        cache.name(number, part)
    bench.ask_read(5, 150_000, 60_000)
    assert bench.notes() == [(5, FILE, 150_000, 60_000, MISSED)]
    for part in PARTS:
        cache.put(part)
    assert not bench.front.holds(1)
    assert bench.front.answer(5, FILE, 150_000, 60_000)
    assert bench.reply() == (5, 0, WHOLE[150_000:210_000])
    assert bench.front.holds(1)
    assert bench.read(0, 300_000) == WHOLE
    assert bench.front.counters()[2] == 3
    # What is open stays, whatever leaves the cache.
    cache.shared.trim(0)
    assert bench.read(0, 300_000) == WHOLE


def test_it_moves_what_it_opens_in_the_order_of_leaving(bench, cache):
    bench.add_file(FILE, [len(PARTS[0])])
    path = cache.put(PARTS[0])
    cache.name(1, PARTS[0], credit_ns=-3_600_000_000_000)
    before = time.time()
    bench.read(0, 10)
    assert before - 3601 < path.stat().st_mtime < time.time() - 3599


def test_it_opens_nothing_that_was_not_named(bench, cache):
    bench.add_file(FILE, [len(PARTS[0])])
    cache.put(PARTS[0])
    # Another one with the same place among the names.
    cache.name(1, PARTS[0])
    cache.name(1 + 4096, PARTS[2])
    bench.ask_read(5, 0, 10)
    assert bench.notes() == [(5, FILE, 0, 10, MISSED)]


def _longer(path):
    path.write_bytes(path.read_bytes() + b"x")


def _another(path):
    data = bytearray(path.read_bytes())
    data[-1] ^= 1  # of the id in the footer
    path.write_bytes(data)


def _no_footer(path):
    data = path.read_bytes()
    path.write_bytes(data[:-56] + bytes(56))


def _link(path):
    path.rename(path.with_suffix(".moved"))
    path.symlink_to(path.with_suffix(".moved"))


@pytest.mark.parametrize("harm", [_longer, _another, _no_footer, _link])
def test_it_opens_nothing_that_looks_wrong(bench, cache, harm):
    bench.add_file(FILE, [len(PARTS[0])])
    harm(cache.put(PARTS[0]))
    cache.name(1, PARTS[0])
    bench.ask_read(5, 0, 10)
    assert bench.notes() == [(5, FILE, 0, 10, MISSED)]


def test_it_opens_nothing_that_was_there_before(bench, tmp_path):
    with contextlib.closing(SharedFragmentCache(place_at(tmp_path / "place"))) as earlier:
        earlier.put(fragment_of(PARTS[0]), memoryview(PARTS[0]))
        time.sleep(COARSE_S)
        cache = Cache(tmp_path / "place", bench)
        bench.add_file(FILE, [len(PARTS[0])])
        cache.name(1, PARTS[0])
        bench.ask_read(5, 0, 10)
        assert bench.notes() == [(5, FILE, 0, 10, MISSED)]
        cache.shared.close()


def test_one_in_sixteen_is_left_to_who_can_check_it(bench, cache):
    raws = {number: os.urandom(100) for number in range(1, 161)}
    for number, raw in raws.items():
        cache.put(raw)
        cache.name(number, raw)
        bench.add_file(number, [len(raw)], fragments=[number])
    opened = {number for number in raws if bench.front.answer(number, number, 0, 100)}
    assert len(opened) == 150
    for number in sorted(opened):
        assert bench.reply() == (number, 0, raws[number])
    assert {number for number in raws if bench.front.is_due(number)} == raws.keys() - opened
    for number in raws.keys() - opened:
        assert not bench.front.answer(number, number, 0, 100)
        cache.name(number, raws[number])
        assert not bench.front.is_due(number)
        assert bench.front.answer(number, number, 0, 100)
        assert bench.reply() == (number, 0, raws[number])


def test_what_is_not_there_yet_is_asked_for_as_often_as_it_takes(bench, cache):
    bench.add_file(FILE, [len(PARTS[0])])
    cache.name(1, PARTS[0])
    for _ in range(40):
        assert not bench.front.answer(5, FILE, 0, 10)
    assert not bench.front.is_due(1)
    cache.put(PARTS[0])
    assert bench.front.answer(5, FILE, 0, 10)
    assert bench.reply() == (5, 0, WHOLE[:10])


def test_nothing_is_opened_for_a_read_of_too_many_pieces(bench, cache):
    raw = os.urandom(10)
    cache.put(raw)
    cache.name(1, raw)
    bench.add_file(FILE, [10] * 100, fragments=[1] * 100)
    assert not bench.front.answer(5, FILE, 0, 1000)
    assert not bench.front.answer(5, FILE, 5, 640)
    assert bench.front.counters()[2] == 0
    assert bench.front.answer(5, FILE, 5, 635)
    assert bench.reply() == (5, 0, (raw * 64)[5:])


def test_it_opens_nothing_more_once_damage_was_found(bench, cache):
    bench.add_file(FILE, [len(part) for part in PARTS])
    for number, part in enumerate(PARTS, 1):
        cache.put(part)
        cache.name(number, part)
    assert bench.read(0, 10) == WHOLE[:10]
    path = cache.path(PARTS[1])
    path.write_bytes(b"?" + path.read_bytes()[1:])
    assert cache.shared.get(fragment_of(PARTS[1]), len(PARTS[1]), check=True) is None
    assert bench.read(0, 10) == WHOLE[:10]
    assert not bench.front.answer(5, FILE, 200_005, 10)


@pytest.mark.parametrize("number", [0, -1])
def test_names_that_cannot_be(bench, cache, number):
    with pytest.raises(ValueError, match="no fragment has"):
        bench.front.name(number, bytes(32), 1, 0)
    with pytest.raises(ValueError, match="no fragment has"):
        bench.front.name(1, bytes(31), 1, 0)


def test_a_cache_is_chosen_once(bench, cache):
    with pytest.raises(TypeError, match="already"):
        bench.front.use_cache(b"/nowhere", cache.shared.fileno(), 0)


def test_extents_that_start_within_fragments(bench):
    bench.add_file(FILE, [1000, 70_000, 500], fragments=[9, 1, 9], offsets=[64, 4100, 0])
    bench.give_file(9, PARTS[2])
    bench.give_file(1, PARTS[0])
    whole = PARTS[2][64:1064] + PARTS[0][4100:74_100] + PARTS[2][:500]
    assert bench.read(0, 1 << 20) == whole
    assert bench.read(990, 60_000) == whole[990:60_990]


def test_more_pages_than_a_pipe_holds_are_mapped(bench):
    raw = os.urandom(5 << 20)
    bench.add_file(FILE, [len(raw), 3, 70_000], fragments=[1, 2, 1])
    bench.give_file(1, raw)
    bench.front.give_bytes(2, b"abc")
    whole = raw + b"abc" + raw[:70_000]
    assert bench.read(123, 5 << 20) == whole[123 : 123 + (5 << 20)]
    assert bench.read(4096, 6 << 20) == whole[4096:]


def test_more_pieces_than_it_looks_at_are_missed(bench):
    bench.add_file(FILE, [10] * 100, fragments=[1] * 100)
    bench.front.give_bytes(1, b"0123456789")
    bench.ask_read(5, 0, 1000)
    assert bench.notes() == [(5, FILE, 0, 1000, MISSED)]
    assert bench.read(0, 300) == b"0123456789" * 30


def test_what_it_lacks_is_asked_for_and_answered_later(bench):
    bench.add_file(FILE, [len(part) for part in PARTS])
    bench.give_file(1, PARTS[0])
    bench.ask_read(12, 150_000, 90_000)
    assert bench.notes() == [(12, FILE, 150_000, 90_000, MISSED)]
    assert not bench.front.answer(12, FILE, 150_000, 90_000)
    bench.front.give_bytes(2, PARTS[1])
    bench.give_file(3, PARTS[2])
    assert bench.front.answer(12, FILE, 150_000, 90_000)
    assert bench.reply() == (12, 0, WHOLE[150_000:240_000])


def test_files_it_was_not_told_of_are_missed(bench):
    bench.ask_read(3, 0, 10)
    assert bench.notes() == [(3, FILE, 0, 10, MISSED)]
    bench.give_parts()
    assert bench.read(0, 10) == WHOLE[:10]
    bench.front.remove_file(FILE)
    bench.front.remove_file(FILE)
    time.sleep(0.01)
    bench.ask_read(4, 0, 10)
    assert bench.notes()[-1] == (4, FILE, 0, 10, MISSED)


def test_files_whose_numbers_share_a_bucket(bench):
    for number in (1, 1025, 2049):
        bench.add_file(number, [4], fragments=[number])
        bench.front.give_bytes(number, b"%04d" % number)
    bench.front.remove_file(1025)
    for number in (1, 2049):
        bench.ask_read(9, 0, 4, number)
        assert bench.reply() == (9, 0, b"%04d" % number)


def test_a_fragment_shorter_than_its_extent_is_missed(bench):
    bench.add_file(FILE, [1000])
    bench.give_file(1, b"too short")
    bench.ask_read(5, 0, 1000)
    assert bench.notes() == [(5, FILE, 0, 1000, MISSED)]
    assert bench.read(0, 9) == b"too short"


def test_a_file_of_the_cache_that_lost_bytes_is_missed(bench, tmp_path):
    bench.give_parts()
    os.truncate(tmp_path / "1", 100)
    for size in (1000, 100_000):
        bench.ask_read(5, 0, size)
        assert bench.notes()[-1] == (5, FILE, 0, size, MISSED)
    # Nothing of it was left in the pipe.
    assert bench.read(200_005, 80_000) == PARTS[2][:80_000]


def test_what_was_used_last_stays(tmp_path):
    with Bench(tmp_path, bytes_max=250) as bench:
        for fragment in (1, 2):
            bench.front.give_bytes(fragment, bytes(100))
        assert bench.front.holds(1)
        bench.front.give_bytes(3, bytes(100))
        assert [bench.front.holds(fragment) for fragment in (1, 2, 3)] == [True, False, True]
        bench.front.give_bytes(4, bytes(251))
        assert not bench.front.holds(4)
        for fragment in range(10, 1000):
            bench.front.give_bytes(fragment, b"")
        assert bench.front.holds(999)
        assert not bench.front.holds(10)


def test_open_files_are_closed_with_it(tmp_path):
    before = len(os.listdir("/proc/self/fd"))
    with Bench(tmp_path) as bench:
        for fragment in range(1, 600):
            bench.give_file(fragment, b"x")
        assert len(os.listdir("/proc/self/fd")) < before + 300
        assert bench.front.holds(599)
    assert len(os.listdir("/proc/self/fd")) == before


def test_reads_that_go_on_are_one_note(bench):
    bench.give_parts()
    bench.read(0, 1)
    assert bench.notes() == [(5, FILE, 0, 1, SERVED)]
    for offset in range(0, 15 * 4096, 4096):  # at once: told when there is enough to say
        bench.read(offset, 4096)
    told = []
    while sum(note[3] for note in told) < 15 * 4096:
        # Whatever was late was told alone; one more read says what is left.
        time.sleep(0.01)
        bench.read(250_000, 1)
        told += [note for note in bench.notes() if note[2] != 250_000]
    assert sum(note[3] for note in told) == 15 * 4096
    assert told[0][2] == 0
    assert all(a[2] + a[3] == b[2] for a, b in pairwise(told))
    assert {note[4] for note in told} == {SERVED}


def test_readers_side_by_side_are_a_note_each(bench):
    """Four of them, one read each in turn: told when there is enough to say, not at every read."""
    raw = bytes(4 << 20)
    bench.add_file(FILE, [len(raw)])
    bench.give_file(1, raw)
    told = []
    started = time.monotonic()
    for step in range(0, 1 << 20, 64 << 10):
        for reader in range(4):
            bench.read(reader << 20 | step, 64 << 10)
            if bench.has_notes(0):
                told += bench.notes()
    # Each begins with a leap, which is told at once.
    assert [note[2:4] for note in told[:4]] == [(reader << 20, 64 << 10) for reader in range(4)]
    elapsed_s = time.monotonic() - started
    assert len(told) <= 4 + 4 * (1 + elapsed_s // 0.008)
    time.sleep(0.02)
    bench.read(0, 1)
    told += bench.notes()
    assert sum(note[3] for note in told) == len(raw) + 1


def test_a_leap_is_told_at_once(bench):
    bench.give_parts()
    for offset in (0, 90_000, 40_000):
        bench.read(offset, 4096)
        assert bench.notes(1) == [(5, FILE, offset, 4096, SERVED)]


def test_other_requests_and_replies_pass_through(bench):
    bench.ask(LOOKUP, 8, b"name\0")
    request = bench.pyfuse3.recv(1 << 20)
    assert IN_HEADER.unpack_from(request)[1:3] == (LOOKUP, 8)
    assert request[IN_HEADER.size :] == b"name\0"
    bench.pyfuse3.send(OUT_HEADER.pack(OUT_HEADER.size, -errno.ENOENT, 8))
    assert bench.reply() == (8, errno.ENOENT, b"")


def test_forgets_by_the_thousand_pass_in_parts(bench):
    count = 1700
    forgets = struct.pack(f"={2 * count}Q", *range(2 * count))
    bench.ask(BATCH_FORGET, 0, struct.pack("=II", count, 0) + forgets)
    seen = b""
    while len(seen) < len(forgets):
        message = bench.pyfuse3.recv(1 << 20)
        length, opcode = IN_HEADER.unpack_from(message)[:2]
        (part,) = struct.unpack_from("=I", message, IN_HEADER.size)
        assert (length, opcode) == (len(message), BATCH_FORGET)
        assert len(message) == IN_HEADER.size + 8 + part * 16
        seen += message[IN_HEADER.size + 8 :]
    assert seen == forgets


def test_opens_are_told_of(bench):
    bench.ask(OPEN, 8, struct.pack("=II", os.O_RDONLY | os.O_DIRECT, 0))
    assert bench.notes() == [(8, FILE, os.O_RDONLY | os.O_DIRECT, 0, OPENS)]


def test_a_close_is_told_of_after_the_reads_before_it(bench):
    bench.give_parts()
    bench.read(0, 1)
    bench.notes()
    bench.read(1, 2)  # kept back for others
    bench.ask(RELEASE, 8, struct.pack("=QIIQ", FILE, 0, 0, 0))
    told = bench.notes()
    while told[-1][4] != CLOSES:
        told += bench.notes()
    assert told == [(5, FILE, 1, 2, SERVED), (8, FILE, 0, 0, CLOSES)]


def greet(bench, asked, answered, error=0, size=INIT_OUT.size):
    """What the kernel gets for an answer to its greeting, as sixteen numbers."""
    bench.ask(INIT, 2, INIT_IN.pack(7, 42, 131072, *asked, *bytes(11)))
    assert IN_HEADER.unpack_from(bench.pyfuse3.recv(1 << 20))[1:3] == (INIT, 2)
    body = b"" if error else INIT_OUT.pack(7, 38, 131072, *answered, *bytes(16 - 3 - len(answered)))
    body = body[:size]
    bench.pyfuse3.send(OUT_HEADER.pack(OUT_HEADER.size + len(body), -error, 2) + body)
    unique, told, body = bench.reply()
    assert (unique, told) == (2, error)
    return INIT_OUT.unpack(body) if len(body) == INIT_OUT.size else body


def test_passthrough_is_asked_for_in_the_answer_to_the_greeting(bench):
    bench.front.want_passthrough()
    answer = greet(bench, (EXTENDED | 5, PASSTHROUGH | 2), (9, 1, 2, 3, 4))
    assert answer == (7, 38, 131072, EXTENDED | 9, 1, 2, 3, 4, PASSTHROUGH, 1, *[0] * 6)
    assert bench.front.has_passthrough()


@pytest.mark.parametrize(
    ("is_wanted", "asked"),
    [
        (False, (EXTENDED, PASSTHROUGH)),
        (True, (0, PASSTHROUGH)),
        (True, (EXTENDED, ~PASSTHROUGH & 0xFFFFFFFF)),
    ],
)
def test_passthrough_is_asked_for_only_where_it_is_offered(bench, is_wanted, asked):
    if is_wanted:
        bench.front.want_passthrough()
    assert greet(bench, asked, (9, 1)) == (7, 38, 131072, 9, 1, *[0] * 11)
    assert not bench.front.has_passthrough()


def test_a_greeting_that_was_refused_or_of_an_old_libfuse(bench):
    bench.front.want_passthrough()
    assert greet(bench, (EXTENDED, PASSTHROUGH), (), error=errno.EPROTO) == b""
    assert len(greet(bench, (EXTENDED, PASSTHROUGH), (9,), size=24)) == 24
    assert not bench.front.has_passthrough()


@pytest.mark.parametrize("opcode", [READDIR, READDIRPLUS])
def test_listings_fit_the_socket(bench, opcode):
    bench.ask(opcode, 8, READ_IN.pack(3, 9, 1 << 20, 0, 0, 0, 0))
    request = bench.pyfuse3.recv(1 << 20)
    assert READ_IN.unpack_from(request, IN_HEADER.size)[:3] == (3, 9, 64 << 10)
    bench.ask(opcode, 9, READ_IN.pack(3, 9, 4096, 0, 0, 0, 0))
    assert READ_IN.unpack_from(bench.pyfuse3.recv(1 << 20), IN_HEADER.size)[2] == 4096


def test_interrupts_are_dropped_and_short_reads_refused(bench):
    bench.ask(INTERRUPT, 3, bytes(8))
    time.sleep(0.05)
    bench.ask(READ, 4, bytes(8))
    assert bench.reply() == (4, errno.EIO, b"")


def test_it_says_when_it_ends(tmp_path):
    with Bench(tmp_path, is_blocking=False) as bench:
        bench.front.stop()
        assert bench.notes() == [(0, 0, 0, 0, ENDED)]
    assert bench.ended_with == [0]


def test_it_says_why_it_ends(tmp_path):
    with Bench(tmp_path) as bench:
        bench.kernel.close()
        assert bench.notes() == [(0, 0, 0, errno.ENODEV, ENDED)]
    assert bench.ended_with == [errno.ENODEV]


def test_it_ends_when_nobody_takes_other_requests(tmp_path):
    with Bench(tmp_path) as bench:
        bench.pyfuse3.close()
        bench.ask(LOOKUP, 8, b"name\0")
        assert bench.notes()[-1][4] == ENDED


def test_columns_must_be_of_one_length(bench):
    short = array.array("I", [1])
    with pytest.raises(ValueError, match="different lengths"):
        bench.front.add_file(1, array.array("q", [1, 2]), array.array("q", [1, 2]), short, short)


def test_descriptors_that_are_not_open(bench):
    with pytest.raises(OSError, match="Bad file descriptor"):
        bench.front.give_file(1, 1 << 20, 10)


def test_while_fragments_come_and_go(tmp_path):
    """Threads give, evict and close what another one reads from."""
    raws = {number: os.urandom(70_000 + number) for number in range(1, 9)}
    with Bench(tmp_path, bytes_max=300_000) as bench:
        for number, raw in raws.items():
            bench.add_file(number, [len(raw)], fragments=[number])
            (tmp_path / f"f{number}").write_bytes(raw)
        stop = threading.Event()

        def give():
            while not stop.is_set():
                for number, raw in raws.items():
                    with (tmp_path / f"f{number}").open("rb") as file:
                        bench.front.give_file(number, file.fileno(), len(raw))

        def drain():
            while not stop.is_set():
                if bench.has_notes():
                    bench.notes()

        threads = [threading.Thread(target=work) for work in (give, give, drain)]
        for thread in threads:
            thread.start()
        served = 0
        try:
            for turn in range(2000):
                number = turn % len(raws) + 1
                if bench.front.answer(turn, number, 11, 69_000):
                    served += 1
                    assert bench.reply() == (turn, 0, raws[number][11:69_011])
        finally:
            stop.set()
            for thread in threads:
                thread.join()
        assert served > 100


# --- with the event loop


class FakeReads:
    """Answers as it is told; notes what it is told of."""

    def __init__(self, prepared=None, answer=b"from Python", opened=0):
        self.prepared = prepared
        self.answer = answer
        self.opened = opened
        self.noted = []
        self.closed = trio.Event()

    def open_content(self, number, flags):
        if isinstance(self.opened, Exception):
            raise self.opened
        return self.opened

    def close_content(self, handle):
        assert handle == FILE
        self.closed.set()
        if self.opened is None:
            raise ValueError("a bug")

    def note_read(self, handle, offset, size):
        self.noted.append((handle, offset, size))
        if size == 13:
            raise ValueError("a bug")

    async def prepare_read(self, handle, offset, size):
        await trio.lowlevel.checkpoint()
        if isinstance(self.prepared, Exception):
            raise self.prepared
        if self.prepared is not None:
            self.prepared()
        return self.prepared is not None

    async def read_content(self, handle, offset, size):
        await trio.lowlevel.checkpoint()
        if isinstance(self.answer, Exception):
            raise self.answer
        return self.answer


class Kernel:
    """What the front of a mount sees of the kernel."""

    def __init__(self, monkeypatch):
        self.socket, device = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        self._session = device.detach()
        monkeypatch.setattr(fragfs.mount.front, "find_device", lambda: self._session)
        self.front = fragfs.mount.front.Front(MODULE, 1 << 20)
        # From now on pyfuse3 would read from this one.
        self.pyfuse3 = socket.socket(fileno=self._session)
        self.socket.settimeout(20)

    def ask_read(self, unique, offset, size):
        self._ask(READ, unique, READ_IN.pack(FILE, offset, size, 0, 0, 0, 0))

    def ask_open(self, unique):
        self._ask(OPEN, unique, bytes(8))

    def ask_close(self, unique):
        self._ask(RELEASE, unique, struct.pack("=QIIQ", FILE, 0, 0, 0))

    def _ask(self, opcode, unique, body):
        header = IN_HEADER.pack(IN_HEADER.size + len(body), opcode, unique, FILE, 0, 0, 0, 0, 0)
        self.socket.sendall(header + body)

    async def reply(self):
        data = await trio.to_thread.run_sync(self.socket.recv, 1 << 16)
        length, error, unique = OUT_HEADER.unpack_from(data)
        assert length == len(data)
        return unique, -error, data[OUT_HEADER.size :]


@pytest.fixture
def kernel(monkeypatch):
    made = Kernel(monkeypatch)
    yield made
    made.socket.close()
    made.pyfuse3.close()


async def serve(kernel, reads, ask):
    """What `run` returned, after `ask` was done and the front was closed."""
    ended = []

    async def run():
        ended.append(await kernel.front.run(reads))

    async with trio.open_nursery() as nursery:
        nursery.start_soon(run)
        await ask()
        kernel.socket.shutdown(socket.SHUT_RDWR)
    kernel.front.close()
    return ended


async def test_what_was_prepared_is_answered_by_compiled_code(kernel):
    builder = ExtentMapBuilder()
    builder.append(4, 1, 0, SpanKind.OPAQUE, first=True)
    kernel.front.open_file(OpenContent(FILE, 4, 0, bytes(32), 4, builder.build()))
    reads = FakeReads(lambda: kernel.front.give(1, memoryview(b"abcd")))

    async def ask():
        for unique in (1, 2):
            kernel.ask_read(unique, 1, 4096)
            assert await kernel.reply() == (unique, 0, b"bcd")
        assert kernel.front.counters() == (2, 6, 0)

    assert await serve(kernel, reads, ask) == [errno.ENODEV]
    assert reads.noted[0] == (FILE, 1, 4096)


@pytest.mark.parametrize(
    "prepared", [None, OSError(errno.EMFILE, "too many open files"), ValueError("a bug")]
)
async def test_what_was_not_prepared_is_read_by_python(kernel, prepared):
    async def ask():
        kernel.ask_read(3, 0, 11)
        assert await kernel.reply() == (3, 0, b"from Python")

    await serve(kernel, FakeReads(prepared), ask)


@pytest.mark.parametrize(
    ("answer", "number"),
    [(FUSEError(errno.ESTALE), errno.ESTALE), (ValueError("a bug"), errno.EIO)],
)
async def test_reads_that_fail_are_answered_and_the_mount_goes_on(kernel, answer, number):
    reads = FakeReads(answer=answer)

    async def ask():
        for unique in (1, 2):
            kernel.ask_read(unique, 0, 13)  # and nobody can follow the reader
            assert await kernel.reply() == (unique, number, b"")

    assert await serve(kernel, reads, ask) == [errno.ENODEV]
    assert len(reads.noted) == 2


@pytest.mark.parametrize(("backing", "flags"), [(0, 1 << 1), (3, 1 << 7)])
async def test_opens_are_answered(kernel, backing, flags):
    async def ask():
        kernel.ask_open(4)
        assert await kernel.reply() == (4, 0, struct.pack("=QIi", FILE, flags, backing))

    await serve(kernel, FakeReads(opened=backing), ask)


@pytest.mark.parametrize(
    ("error", "number"),
    [(FUSEError(errno.ESTALE), errno.ESTALE), (ValueError("a bug"), errno.EIO)],
)
async def test_opens_that_fail_are_answered_and_the_mount_goes_on(kernel, error, number):
    async def ask():
        for unique in (1, 2):
            kernel.ask_open(unique)
            assert await kernel.reply() == (unique, number, b"")

    await serve(kernel, FakeReads(opened=error), ask)


@pytest.mark.parametrize("opened", [0, None])
async def test_closes_are_answered_whatever_goes_wrong(kernel, opened):
    reads = FakeReads(opened=opened)

    async def ask():
        kernel.ask_close(4)
        assert await kernel.reply() == (4, 0, b"")
        assert reads.closed.is_set()

    assert await serve(kernel, reads, ask) == [errno.ENODEV]


async def test_what_was_opened_for_nobody_is_closed(kernel, monkeypatch):
    reads = FakeReads()

    async def ask():
        monkeypatch.setattr(kernel.front, "device", os.open("/dev/null", os.O_RDONLY))
        kernel.ask_open(4)
        with trio.fail_after(20):
            await reads.closed.wait()
        os.close(kernel.front.device)
        monkeypatch.undo()

    device = kernel.front.device
    await serve(kernel, reads, ask)
    assert kernel.front.device == device


async def test_it_can_be_closed_while_it_serves(kernel):
    with trio.move_on_after(0.1) as scope:
        await kernel.front.run(FakeReads())
    assert scope.cancelled_caught
    kernel.front.close()
    assert kernel.pyfuse3.recv(10) == b""


def test_no_front_where_pages_are_large(monkeypatch):
    monkeypatch.setattr(os, "sysconf", lambda name: 65536)
    assert find_front_module() is None
