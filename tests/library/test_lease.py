"""Leases: who keeps what no model names."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import re
import subprocess
import sys
import tempfile
import threading
from dataclasses import fields
from itertools import pairwise
from pathlib import Path

import pytest
import xxhash
from hypothesis import given
from hypothesis import strategies as st

from fragfs.errors import StorageError
from fragfs.library import catalog
from fragfs.library.add import AddOptions
from fragfs.library.lease import (
    LEASES_NAME,
    PINS_ONLY,
    LeaseState,
    as_ranges,
    hold_lease,
    live_leases,
    no_leases,
    no_new_leases,
)
from fragfs.library.library import FragmentLibrary
from fragfs.types import LibraryConfig
from tests.library.test_bases import rows
from tests.models import make_model

CONFIG = LibraryConfig(fragment_elements=1 << 14)


def test_a_forked_child_does_not_end_its_parents_lease(tmp_path, monkeypatch):
    with monkeypatch.context() as patch, hold_lease(tmp_path, "reader"):
        patch.setattr(os, "getpid", lambda: 1)
    assert [path.suffix for path in (tmp_path / "leases").iterdir()].count(".lease") == 1


def test_leases_that_cannot_be_listed_keep_everything(tmp_path, monkeypatch):
    def refuse(path):
        raise OSError(errno.EMFILE, "Too many open files")

    with hold_lease(tmp_path, "reader"):
        monkeypatch.setattr(os, "listdir", refuse)
        (state,) = live_leases(tmp_path)
    assert state.generation is None


def test_nobody_holds_one_at_first(tmp_path):
    with no_leases(tmp_path) as alone:
        assert alone


def test_a_lease_is_seen_while_it_is_held(tmp_path):
    with hold_lease(tmp_path, "test"):
        with no_leases(tmp_path) as alone:
            assert not alone
        with hold_lease(tmp_path, "test"):
            pass
        with no_leases(tmp_path) as alone:
            assert not alone, "one of two is left"
    with no_leases(tmp_path) as alone:
        assert alone


def test_a_lease_waits_for_who_is_alone(tmp_path):
    got = threading.Event()

    def hold() -> None:
        with hold_lease(tmp_path, "test"):
            got.set()

    with no_leases(tmp_path) as alone:
        assert alone
        thread = threading.Thread(target=hold)
        thread.start()
        assert not got.wait(0.1)
    assert got.wait(5)
    thread.join()


def test_a_lease_dies_with_its_process(tmp_path):
    program = (
        "import sys, time; from pathlib import Path; from fragfs.library.lease import hold_lease\n"
        "with hold_lease(Path(sys.argv[1]), 'child'): print('held', flush=True); time.sleep(60)"
    )
    holder = subprocess.Popen(
        [sys.executable, "-c", program, str(tmp_path)], stdout=subprocess.PIPE, text=True
    )
    assert holder.stdout is not None
    assert holder.stdout.readline() == "held\n"
    with no_leases(tmp_path) as alone:
        assert not alone
    holder.kill()
    holder.wait()
    holder.stdout.close()
    with no_leases(tmp_path) as alone:
        assert alone


def refuse_writing(monkeypatch) -> None:
    """As for another user: root may do everything."""
    real = os.open

    def refusing(path, flags, *rest, **options):
        if LEASES_NAME in str(path) and flags & os.O_RDWR:
            raise PermissionError(13, "Permission denied", str(path))
        return real(path, flags, *rest, **options)

    monkeypatch.setattr(os, "open", refusing)


def test_who_may_only_read_holds_one_as_well(tmp_path, monkeypatch):
    with hold_lease(tmp_path, "test"):
        pass  # the owner has made the file
    with monkeypatch.context() as patch:
        refuse_writing(patch)
        scope = hold_lease(tmp_path, "test")
        scope.__enter__()
    with no_leases(tmp_path) as alone:
        assert not alone
    scope.__exit__(None, None, None)


def test_where_there_is_nothing_to_hold_nothing_is_dropped(tmp_path, monkeypatch):
    refuse_writing(monkeypatch)
    with hold_lease(tmp_path, "test"), no_leases(tmp_path) as alone:
        assert not alone


def test_where_there_are_no_locks_readers_go_on(library, tmp_path, monkeypatch):
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", refuse)
    assert not [item for item in library.verify() if item.error]
    with library.open_file("goes", "config.json") as stream:
        assert stream.read() == (tmp_path / "goes" / "config.json").read_bytes()
    assert library.export("goes", tmp_path / "out").failed == ()
    with pytest.raises(StorageError, match="no file locks"):
        library.add([make_model(tmp_path / "more", rows=10)], AddOptions())
    assert os.listdir(library.path / LEASES_NAME) == ["shared"]


def test_a_new_library_has_one_to_hold(tmp_path):
    """A mount of another user, made before the owner's first add, must find something to lock."""
    FragmentLibrary.create(tmp_path / "lib").close()
    assert (tmp_path / "lib" / LEASES_NAME / "shared").exists()


DOCUMENT = (Path(catalog.__file__).parent / "FORMAT.md").read_text()


def test_the_format_document_names_it():
    assert f"{LEASES_NAME}/" in DOCUMENT.split("## Packs")[0].split("## The directory")[1]


def test_the_format_document_lists_what_a_lease_says():
    section = DOCUMENT.split("## Leases")[1].split("\n## ")[0]
    keys = re.findall(r"^\| `(\w+)` \|", section, re.M)
    assert keys == [field.name for field in fields(LeaseState)]
    digest, line, end = LeaseState(7, "it", 5, ((1, 3),)).pack().split(b"\n")
    assert (digest, end) == (b"%016x" % xxhash.xxh3_64_intdigest(line), b"")
    assert json.loads(line) == {"process": 7, "what": "it", "generation": 5, "pins": [[1, 3]]}
    assert PINS_ONLY == 2**63 - 1


# --- what a lease says


def test_it_keeps_everything_until_it_says_less(tmp_path):
    with hold_lease(tmp_path, "it") as lease:
        assert live_leases(tmp_path) == [LeaseState(os.getpid(), "it", None, ())]
        lease.say(12, ((5, 9), (11, 11)))
        assert live_leases(tmp_path) == [LeaseState(os.getpid(), "it", 12, ((5, 9), (11, 11)))]
        lease.say(1)
        assert live_leases(tmp_path) == [LeaseState(os.getpid(), "it", 1, ())]
        lease.pin(((3, 3),))
        assert live_leases(tmp_path) == [LeaseState(os.getpid(), "it", PINS_ONLY, ((3, 3),))]
    assert live_leases(tmp_path) == []
    assert os.listdir(tmp_path / LEASES_NAME) == ["shared"]


def test_what_has_not_changed_is_not_written_again(tmp_path):
    with hold_lease(tmp_path, "it") as lease:
        lease.say(12)
        [path] = (tmp_path / LEASES_NAME).glob("*.lease")
        path.write_bytes(b"changed")
        lease.say(12)
        assert path.read_bytes() == b"changed"
        lease.say(13)
        assert live_leases(tmp_path)[0].generation == 13


def test_a_statement_that_cannot_be_written_is_no_error(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    with hold_lease(tmp_path, "it") as lease:
        lease.say(12, ((1, 1),))
        with monkeypatch.context() as patch:
            patch.setattr(os, "pwrite", full)
            lease.say(13)
        assert live_leases(tmp_path)[0].generation == 12, "the last one keeps more"
        lease.say(13)
        assert live_leases(tmp_path)[0].generation == 13


@pytest.mark.parametrize(
    "body",
    [
        b"[]",
        b"{}",
        b"nonsense",
        b'{"process": 1, "what": "it", "generation": 3}',
        b'{"process": 1, "what": "it", "generation": "x", "pins": []}',
        b'{"process": 1, "what": "it", "generation": 3, "pins": [[1]]}',
        b'{"process": null, "what": "it", "generation": 3, "pins": []}',
    ],
)
def test_statements_of_something_else_are_none(body):
    assert LeaseState.parse(b"%016x\n%s\n" % (xxhash.xxh3_64_intdigest(body), body)) is None


@given(st.sets(st.integers(1, 200)))
def test_numbers_as_ranges(numbers):
    ranges = as_ranges(numbers)
    assert [n for first, last in ranges for n in range(first, last + 1)] == sorted(numbers)
    assert all(a[1] + 1 < b[0] for a, b in pairwise(ranges)), "as few as can be"


def test_a_statement_that_is_being_written_is_read_again(tmp_path):
    """Whoever reads sees one statement or the other, whatever their lengths."""
    states = [(1, ()), (2, tuple((n, n) for n in range(1, 4000, 2)))]
    stop = threading.Event()
    with hold_lease(tmp_path, "it") as lease:
        lease.say(*states[0])

        def write() -> None:
            while not stop.is_set():
                for state in states:
                    lease.say(*state)

        thread = threading.Thread(target=write)
        thread.start()
        seen = [live_leases(tmp_path)[0] for _ in range(200)]
        stop.set()
        thread.join()
    assert {(state.generation, state.pins) for state in seen} <= {*states, (None, ())}
    assert {state.generation for state in seen} & {1, 2}


# --- making and removing


def test_nobody_takes_one_while_that_is_forbidden(tmp_path):
    got = threading.Event()

    def hold() -> None:
        with hold_lease(tmp_path, "late"):
            got.set()

    with hold_lease(tmp_path, "early"), no_new_leases(tmp_path) as alone:
        assert alone, "those that hold one are no obstacle"
        assert [lease.what for lease in live_leases(tmp_path)] == ["early"]
        thread = threading.Thread(target=hold)
        thread.start()
        assert not got.wait(0.1)
        assert len(live_leases(tmp_path)) == 1
    assert got.wait(5)
    thread.join()


def test_a_file_that_was_taken_for_a_dead_holders_is_made_again(tmp_path, monkeypatch):
    real, removed = fcntl.flock, []

    def flock(descriptor, how):
        if how == fcntl.LOCK_EX and not removed:
            [path] = (tmp_path / LEASES_NAME).glob("*.lease")
            assert live_leases(tmp_path, remove_dead=True) == []
            removed.append(path)
        return real(descriptor, how)

    monkeypatch.setattr(fcntl, "flock", flock)
    with hold_lease(tmp_path, "it"):
        assert len(removed) == 1
        assert [lease.what for lease in live_leases(tmp_path)] == ["it"]


AS_ANOTHER_USER = """
import os, sys
from fragfs.library.library import FragmentLibrary
import numpy, fragfs.library.decode, fragfs.library.stream  # who may not read them later
os.setgid(65534)
os.setuid(65534)
with FragmentLibrary.open(sys.argv[1]) as library:
    with library.open_file("goes", "model.safetensors") as stream:
        start = stream.raw.read(1000)  # nothing is read ahead
        print("open", flush=True)
        sys.stdin.readline()
        sys.stdout.buffer.write(start + stream.raw.readall())
"""


@pytest.mark.skipif(os.getuid() != 0, reason="only root can become another user")
@pytest.mark.parametrize("mode", [0o755, 0o1777, 0o700], ids=oct)
def test_another_user_keeps_what_he_reads(tmp_path, mode):
    source = make_model(tmp_path / "goes", seed=1, rows=60)
    other = make_model(tmp_path / "gone", seed=2, rows=60)
    with tempfile.TemporaryDirectory(prefix="fragfs-lease-") as place:
        os.chmod(place, 0o755)
        with FragmentLibrary.create(Path(place) / "lib", CONFIG) as library:
            library.add([source, other], AddOptions())
            (library.path / LEASES_NAME).chmod(mode)
            process = subprocess.Popen(
                [sys.executable, "-c", AS_ANOTHER_USER, str(library.path)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
            )
            assert process.stdout is not None
            assert process.stdout.readline() == b"open\n"
            library.remove("goes")
            library.remove("gone")
            report = library.collect(wait_s=0)
            output, _ = process.communicate(b"go\n", timeout=60)
            if mode == 0o700:  # nothing to hold: nothing is kept, and the reader is told
                assert report.leases == ()
                assert process.returncode != 0
                assert output == b""
                return
            [kept] = report.leases
            assert kept.everything == (mode == 0o755)
            assert kept.process == (process.pid if mode == 0o1777 else 0)
            assert bool(report.dropped_count) == (mode == 0o1777)
            assert output == (source / "model.safetensors").read_bytes()
            assert library.collect().leases == ()
            assert fragment_count(library) == 0
            assert [path.name for path in (library.path / LEASES_NAME).iterdir()] == ["shared"]


@pytest.fixture
def library(tmp_path):
    with FragmentLibrary.create(tmp_path / "lib", CONFIG) as library:
        for seed, name in enumerate(("stays", "goes")):
            library.add([make_model(tmp_path / name, seed=seed, rows=60)], AddOptions())
        yield library


def fragment_count(library: FragmentLibrary) -> int:
    return rows(library, "SELECT count(*) FROM fragments")[0][0]


def test_optimize_says_what_a_lease_keeps(library):
    before = fragment_count(library)
    library.remove("goes")
    unreferenced = library.stats().unreferenced_bytes
    assert unreferenced
    with library.hold_lease():
        report = library.optimize(workers=1)
        assert report.leased_bytes == unreferenced
        assert fragment_count(library) == before
    report = library.optimize(workers=1)
    assert report.leased_bytes == 0
    assert fragment_count(library) < before
    assert library.stats().unreferenced_bytes == 0
    assert not [item for item in library.verify() if item.error]


def test_what_is_open_stays_readable_under_a_lease(library, tmp_path):
    [entry] = [e for e in library.files("goes") if e.path == b"model.safetensors"]
    content = library.open_content(entry.content)
    with library.hold_lease():
        library.remove("goes")
        library.optimize(workers=1)
        data = b"".join(
            bytes(library.decode_fragment(extent.fragment, NOTHING)) for extent in content.extents
        )
    assert data == (tmp_path / "goes" / "model.safetensors").read_bytes()


class _Nothing:
    def get(self, number: int) -> None:
        return None

    def put(self, number: int, raw: memoryview, record: object = None) -> None:
        return None


NOTHING = _Nothing()

PAUSED_ADD = """
import sys
from pathlib import Path
from fragfs.library import ingest
from fragfs.library.add import Adder, AddOptions
from fragfs.library.library import FragmentLibrary

store = ingest.Ingester.store

def paused(self, files):
    found = store(self, files)
    print("committed", flush=True)  # its fragments; no model names them
    sys.stdin.readline()
    return found

ingest.Ingester.store = paused
FragmentLibrary.open(sys.argv[1]).add([Path(sys.argv[2])], AddOptions(workers=1))
"""


@pytest.mark.slow
def test_an_add_that_has_not_published_holds_one(library, tmp_path):
    source = make_model(tmp_path / "new", seed=7, rows=60)
    process = subprocess.Popen(
        [sys.executable, "-c", PAUSED_ADD, str(library.path), str(source)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "committed\n"
    assert library.stats().unreferenced_bytes
    report = library.optimize(workers=1)
    assert report.leased_bytes == library.stats().unreferenced_bytes > 0
    process.communicate("go\n")
    assert process.returncode == 0
    assert not [item for item in library.verify() if item.error]
    assert library.stats().unreferenced_bytes == 0
    assert library.optimize(workers=1).leased_bytes == 0
    assert not [item for item in library.verify() if item.error]


@pytest.mark.slow
def test_a_killed_add_holds_nothing(library, tmp_path):
    source = make_model(tmp_path / "new", seed=7, rows=60)
    before = fragment_count(library)
    process = subprocess.Popen(
        [sys.executable, "-c", PAUSED_ADD, str(library.path), str(source)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "committed\n"
    process.kill()
    process.communicate()
    report = library.collect()
    assert report.leases == ()
    assert report.recent_bytes
    report = library.collect(grace_s=0)
    assert report.recent_bytes == 0
    assert fragment_count(library) == before
