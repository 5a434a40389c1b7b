"""The decoder process, through its socket."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time

import pytest

from fragfs.cache.shared import SharedFragmentCache, file_name
from fragfs.errors import NotFoundError
from fragfs.library.library import FragmentLibrary
from fragfs.reader.decoder import REPLY, DecoderOptions, Reply, Request, Status
from fragfs.reader.pool import start_decoder
from fragfs.types import FragmentId, FragmentIdentity
from tests.cache.support import Child, get, place_at
from tests.library.test_bases import CONFIG, add, base_weights, tuned, write_model
from tests.mount.support import is_alive, wait_until

pytestmark = pytest.mark.slow
REPLY_S = 60


class Decoder:
    """A decoder process with its library and place."""

    def __init__(self, library, place):
        self.process = start_decoder(DecoderOptions(library, place))
        self.process.channel.settimeout(REPLY_S)
        self.library = FragmentLibrary.open(library)

    def ask(self, number, *, with_bases=False):
        return self.ask_for(self.identify(number), with_bases=with_bases)

    def ask_for(self, fragment, *, with_bases=False):
        self.process.channel.send(Request(fragment, with_bases).pack())
        return self.receive()

    def identify(self, number):
        try:
            return self.library.identities([number])[0]
        except NotFoundError:
            return FragmentIdentity(number, FragmentId(bytes(32)), 10, False, False)

    def receive(self):
        return Reply.parse(self.process.channel.recv(REPLY.size + 512))

    def close(self):
        self.process.channel.close()
        self.process.process.wait(REPLY_S)
        self.library.close()


@pytest.fixture
def directory(tmp_path):
    return tmp_path / "place"


@pytest.fixture
def cache(directory):
    made = SharedFragmentCache(place_at(directory))
    yield made
    made.close()


@pytest.fixture
def decoder(shared_family, directory):
    made = Decoder(shared_family.path, place_at(directory))
    yield made
    made.close()


def test_every_fragment_of_a_family(decoder, shared_family, cache):
    """Bases are asked for, then what is predicted from them is decoded alone."""
    for number in shared_family.numbers:
        reply = decoder.ask(number)
        if reply.status is Status.NEEDS:
            assert set(reply.bases) <= set(shared_family.bases[number])
            for base in reply.bases:
                decoder.ask(base, with_bases=True)
            reply = decoder.ask(number)
        assert (reply.number, reply.status) == (number, Status.DONE)
        raw = shared_family.raws[number]
        if reply.decoded:
            assert (reply.decoded, reply.decoded_bytes) == (1, len(raw))
            assert reply.decode_ns > 0
        assert get(cache, shared_family.ids[number], len(raw)) == raw


def test_what_is_there_already_is_done_without_a_decode(decoder, shared_family, cache):
    number = shared_family.plain[0]
    assert decoder.ask(number).decoded == 1
    again = decoder.ask(number)
    assert (again.status, again.decoded) == (Status.DONE, 0)


def test_missing_bases_are_named_or_decoded_too(decoder, shared_family, cache):
    number = next(n for n in shared_family.predicted if len(shared_family.bases[n]) == 1)
    reply = decoder.ask(number)
    assert reply.status is Status.NEEDS
    assert reply.bases == shared_family.bases[number]
    assert not cache.holds(shared_family.ids[number])
    reply = decoder.ask(number, with_bases=True)
    assert reply.status is Status.DONE
    assert reply.decoded >= 2
    assert cache.holds(shared_family.ids[reply.bases[0] if reply.bases else number])
    for base in shared_family.bases[number]:
        assert cache.get(shared_family.ids[base], len(shared_family.raws[base]))


def test_what_has_left_the_cache_is_published_again(decoder, shared_family, cache, directory):
    number = shared_family.plain[0]
    assert decoder.ask(number).decoded == 1
    (directory / file_name(shared_family.ids[number])).unlink()
    again = decoder.ask(number)
    assert (again.status, again.decoded) == (Status.DONE, 1)
    raw = shared_family.raws[number]
    assert get(cache, shared_family.ids[number], len(raw)) == raw


def test_what_has_become_a_base_since_stays_in_the_cache(tmp_path, directory, cache):
    """The decoder knew the fragment before anything was predicted from it."""
    weights = base_weights()
    with FragmentLibrary.create(tmp_path / "library", CONFIG) as library:
        add(library, write_model(tmp_path / "base", weights))
        numbers = range(1, library.stats().fragment_count + 1)
        decoder = Decoder(library.path, place_at(directory))
        try:
            assert {decoder.ask(number).status for number in numbers} == {Status.DONE}
            add(library, write_model(tmp_path / "tuned", tuned(weights, 1)))
            found = library.identities(range(1, library.stats().fragment_count + 1))
            predicted = next(identity for identity in found if identity.has_bases)
            [base] = library.bases(predicted.number)
            path = directory / file_name(library.fragment(base).id)
            assert path.stat().st_mtime < time.time() + 100
            # Another process than the one that decoded it, so that it holds no view of it.
            other = Decoder(library.path, place_at(directory))
            try:
                assert other.ask(predicted.number).status is Status.DONE
            finally:
                other.close()
            assert path.stat().st_mtime > time.time() + 300
            # Decoded again by the first one, it counts as what it is now.
            path.unlink()
            assert decoder.ask(base).status is Status.DONE
            assert path.stat().st_mtime > time.time() + 300
        finally:
            decoder.close()


def test_bytes_are_never_published_as_those_of_another_fragment(decoder, shared_family, cache):
    """A catalog put back from a backup may have another fragment under a number."""
    number, other = shared_family.plain[:2]
    wrong = decoder.identify(number)._replace(id=shared_family.ids[other])
    assert decoder.ask(number).decoded == 1  # and the decoder holds its bytes
    for _ in range(2):
        assert decoder.ask_for(wrong).status is Status.FAILED
        assert not cache.holds(shared_family.ids[other])
    raw = shared_family.raws[number]
    assert get(cache, shared_family.ids[number], len(raw)) == raw
    assert decoder.ask(other).decoded == 1


def test_what_another_process_decodes_is_busy_until_that_ends(decoder, shared_family, cache):
    number = shared_family.plain[0]
    fragment = shared_family.ids[number]
    program = """
cache = SharedFragmentCache(place_at(directory))
from fragfs.types import FragmentId
assert cache.claim(FragmentId.parse(sys.argv[2]))
pause()
"""
    with Child(program, cache.place.directory, fragment.hex()).wait_ready() as child:
        assert decoder.ask(number).status is Status.BUSY
        assert decoder.ask(shared_family.plain[1]).status is Status.DONE
        child.kill()
    assert decoder.ask(number).status is Status.DONE
    # Its own claim was given back.
    assert cache.claim(fragment)


def test_a_damaged_record_and_a_number_that_is_not_there_fail(own_family, directory):
    damaged = own_family.plain[0]
    own_family.damage(damaged)
    decoder = Decoder(own_family.path, place_at(directory))
    try:
        for _ in range(2):
            assert decoder.ask(damaged, with_bases=True).status is Status.FAILED
        assert decoder.ask(1 << 40).status is Status.FAILED
        assert decoder.ask(-1).status is Status.FAILED
        assert decoder.ask(own_family.plain[1]).status is Status.DONE
        cache = SharedFragmentCache(place_at(directory))
        assert not cache.holds(own_family.ids[damaged])
        assert cache.claim(own_family.ids[damaged])
        cache.close()
    finally:
        decoder.close()


def test_a_cache_without_room_is_full(shared_family, directory):
    decoder = Decoder(shared_family.path, place_at(directory, 1000))
    try:
        number = max(shared_family.plain, key=lambda n: len(shared_family.raws[n]))
        reply = decoder.ask(number)
        assert (reply.status, reply.decoded) == (Status.FULL, 1)
    finally:
        decoder.close()


def test_evictions_are_counted_and_the_budget_holds(shared_family, directory):
    decoder = Decoder(shared_family.path, place_at(directory, 300_000))
    try:
        replies = [decoder.ask(number, with_bases=True) for number in shared_family.numbers]
        assert {reply.status for reply in replies} <= {Status.DONE, Status.FULL}
        assert sum(reply.evicted for reply in replies) > 10
        held = [p for p in directory.iterdir() if not p.name.startswith(".")]
        assert sum(path.stat().st_size for path in held) <= 300_000
    finally:
        decoder.close()


def test_a_damaged_base_in_the_cache_does_not_spoil_what_is_predicted_from_it(
    decoder, shared_family, cache, directory
):
    number = shared_family.predicted[0]
    base = shared_family.bases[number][0]
    assert decoder.ask(base, with_bases=True).status is Status.DONE
    path = directory / file_name(shared_family.ids[base])
    data = bytearray(path.read_bytes())
    data[100] ^= 1
    # A decoder that has the base as a view does not look at the file: a new one does.
    path.write_bytes(data)
    other = Decoder(shared_family.path, place_at(directory))
    try:
        assert other.ask(number, with_bases=True).status is Status.DONE
    finally:
        other.close()
    raw = shared_family.raws[number]
    assert get(cache, shared_family.ids[number], len(raw)) == raw


# --- its life


def test_it_ends_when_the_socket_is_closed(shared_family, directory, cache):
    decoder = Decoder(shared_family.path, place_at(directory))
    decoder.ask(shared_family.plain[0])
    decoder.process.channel.close()
    assert decoder.process.process.wait(REPLY_S) == 0


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGHUP])
def test_signals_of_a_terminal_do_not_end_it(decoder, shared_family, number):
    decoder.ask(shared_family.plain[0])
    os.kill(decoder.process.process.pid, number)
    assert decoder.ask(shared_family.plain[1]).status is Status.DONE


def test_it_holds_no_descriptors_of_its_parent(decoder, shared_family):
    with socket.socket() as held:
        held.set_inheritable(True)
        assert decoder.ask(shared_family.plain[0]).status is Status.DONE
        links = []
        root = f"/proc/{decoder.process.process.pid}/fd"
        for name in os.listdir(root):
            with contextlib.suppress(OSError):
                links.append(os.readlink(f"{root}/{name}"))
    assert sum(link.startswith("socket:") for link in links) == 1
    assert "/dev/fuse" not in links


PARENT = """
import sys, time
from pathlib import Path
from fragfs.reader.decoder import DecoderOptions, Request
from fragfs.reader.pool import start_decoder
from fragfs.types import FragmentId, FragmentIdentity
options = DecoderOptions.from_json(sys.argv[1])
processes = [start_decoder(options) for _ in range(3)]
for process in processes:
    process.channel.setblocking(True)
    if sys.argv[2] == "busy":
        fragment = FragmentIdentity(1, FragmentId(bytes(32)), 10, False, False)
        process.channel.send(Request(fragment, True).pack())
        process.channel.recv(1000)
print(*[process.process.pid for process in processes], flush=True)
time.sleep(600)
"""


@pytest.mark.parametrize("state", ["busy", "starting", "stopped"])
def test_kill_9_of_the_parent_ends_decoders_within_a_second(shared_family, directory, state):
    options = DecoderOptions(shared_family.path, place_at(directory)).to_json()
    parent = subprocess.Popen(
        [sys.executable, "-c", PARENT, options, "starting" if state == "starting" else "busy"],
        stdout=subprocess.PIPE,
        text=True,
    )
    pids = [int(word) for word in parent.stdout.readline().split()]
    assert len(pids) == 3
    if state == "stopped":
        for pid in pids:
            os.kill(pid, signal.SIGSTOP)
    parent.kill()
    parent.communicate()
    # A second is what it takes on an idle machine; one that starts ends when it gets that far.
    wait_until(lambda: not any(map(is_alive, pids)), 10 if state == "starting" else 3)
