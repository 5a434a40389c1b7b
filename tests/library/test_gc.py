"""Garbage collection: what goes, what stays, and for whom."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import threading
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

from fragfs.errors import FormatError, NotFoundError
from fragfs.library import collect as collect_module
from fragfs.library.add import AddOptions
from fragfs.library.collect import Collector
from fragfs.library.decode import NO_SOURCE
from fragfs.library.ingest import Ingester
from fragfs.library.lease import LEASES_NAME, as_ranges
from fragfs.library.library import FragmentLibrary
from fragfs.library.writer import LibraryWriter
from fragfs.types import LibraryConfig
from tests.library.test_bases import (
    add,
    assert_good,
    base_weights,
    execute,
    rows,
    tuned,
    write_model,
)
from tests.library.test_compact import check_rebuildable, pack_bytes
from tests.models import digests, make_model

CONFIG = LibraryConfig(fragment_elements=1 << 14, pack_bytes_max=1 << 20)
NAMES = ("first", "second", "third")
DAY_NS = 86_400 * 10**9


class Clock:
    def __init__(self) -> None:
        self.now_ns = 1_700_000_000 * 10**9

    def __call__(self) -> int:
        return self.now_ns


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """A library of three unrelated models in several packs, and their sources beside it."""
    place = tmp_path_factory.mktemp("made")
    with FragmentLibrary.create(place / "lib", CONFIG, now_ns=Clock()) as library:
        for seed, name in enumerate(NAMES):
            add(library, make_model(place / name, seed=seed, rows=150))
    return place


@pytest.fixture
def place(made, tmp_path) -> Path:
    shutil.copytree(made, tmp_path / "copy")
    return tmp_path / "copy"


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def library(place, clock):
    with FragmentLibrary(place / "lib", now_ns=clock) as library:
        yield library


def fragment_numbers(library) -> set[int]:
    return {number for (number,) in rows(library, "SELECT number FROM fragments")}


def fragments_of(library, *names: str) -> set[int]:
    return {
        number
        for name in names
        for entry in library.files(name)
        for number in library.open_content(entry.content).extents.fragments
    }


def unpublished(library) -> list[tuple[int, int, int]]:
    return rows(library, "SELECT first, last, stored_ns FROM unpublished ORDER BY first")


def check(library) -> None:
    assert_good(library)
    check_rebuildable(library)


# --- what goes


def test_what_nothing_needs_goes(library):
    before = pack_bytes(library)
    unreferenced = library.remove("second").unreferenced_bytes
    needed = fragments_of(library, "first", "third")
    report = library.collect()
    assert (report.dry_run, report.leases, report.kept_packs) == (False, (), ())
    assert (report.leased_bytes, report.recent_bytes, report.base_bytes) == (0, 0, 0)
    assert report.dropped_bytes == unreferenced
    assert fragment_numbers(library) == needed
    assert 0.9 * unreferenced < report.freed_bytes
    assert pack_bytes(library) < before - 0.9 * unreferenced
    assert library.stats().unreferenced_bytes == 0
    check(library)


def test_a_library_without_waste_is_left_alone(library):
    before = digests(library.path / "packs")
    generation = library.generation()
    report = library.collect()
    assert (report.dropped_count, report.freed_bytes) == (0, 0)
    assert library.generation() == generation
    assert digests(library.path / "packs") == before


def test_a_dry_run_foretells_and_changes_nothing(library):
    library.remove("second")
    before = digests(library.path)
    foretold = library.collect(dry_run=True)
    assert foretold.dry_run
    assert digests(library.path) == before
    report = library.collect()
    assert (foretold.dropped_count, foretold.dropped_bytes) == (
        report.dropped_count,
        report.dropped_bytes,
    )
    assert foretold.freed_bytes == pytest.approx(report.freed_bytes, rel=0.1)


def test_what_is_dropped_leaves_every_table(library):
    library.remove("second")
    doomed = fragment_numbers(library) - fragments_of(library, "first", "third")
    execute(library, ("INSERT INTO quarantine VALUES (?, 1, 'damaged')", min(doomed)))
    library.collect()
    for table in ("bases", "signatures", "similar", "quarantine"):
        left = {number for (number,) in rows(library, f"SELECT fragment FROM {table}")}
        assert not left & doomed, table
    assert rows(library, "SELECT count(*) FROM quarantine") == [(0,)]


def test_what_is_only_a_base_stays_and_is_told(tmp_path):
    base = base_weights()
    with FragmentLibrary.create(tmp_path / "lib", CONFIG) as library:
        add(library, write_model(tmp_path / "base", base))
        add(library, write_model(tmp_path / "tuned", tuned(base, 1)))
        library.remove("base")
        report = library.collect()
        assert report.base_bytes > 100_000
        assert report.base_users == ((b"tuned", report.base_bytes),)
        check(library)
        library.remove("tuned")
        report = library.collect()
        assert (report.base_bytes, report.base_users) == (0, ())
        assert fragment_numbers(library) == set()


def test_the_catalog_gets_smaller_too(tmp_path):
    rng = np.random.default_rng(1)
    directory = tmp_path / "many"
    directory.mkdir()
    for number in range(1500):
        (directory / f"{number}.bin").write_bytes(rng.bytes(600))
    with FragmentLibrary.create(tmp_path / "lib", CONFIG) as library:
        add(library, directory)
        add(library, make_model(tmp_path / "stays", rows=20))
        path = library.path / "catalog.sqlite"
        [(before,)] = rows(
            library, "SELECT page_count * page_size FROM pragma_page_count(), pragma_page_size()"
        )
        library.remove("many")
        with FragmentLibrary.open(library.path) as reader:
            reader.collect(dry_run=True)  # has the old pages in its cache
            library.collect()
            assert path.stat().st_size < 0.5 * before
            assert rows(library, "PRAGMA freelist_count") == [(0,)]
            assert rows(library, "PRAGMA integrity_check") == [("ok",)]
            assert_good(reader)
        snapshot = library.path / "catalog.snapshot"
        assert snapshot.stat().st_size < 0.5 * before


# --- damage: what is needed must be known


@pytest.fixture
def family(tmp_path):
    base = base_weights()
    with FragmentLibrary.create(tmp_path / "family", CONFIG) as library:
        add(library, write_model(tmp_path / "base", base))
        add(library, write_model(tmp_path / "tuned", tuned(base, 1)))
        library.remove("base")
        yield library


@pytest.mark.parametrize(
    "damage",
    [
        "DELETE FROM bases WHERE fragment = (SELECT max(fragment) FROM bases)",
        "UPDATE bases SET base = 100000 WHERE fragment = (SELECT max(fragment) FROM bases)",
        "UPDATE bases SET base = 99 WHERE fragment = (SELECT max(fragment) FROM bases)",
        "UPDATE fragments SET predictor = 2 WHERE number = (SELECT max(fragment) FROM bases)",
        "DELETE FROM fragments WHERE number = (SELECT min(base) FROM bases)",
        "DELETE FROM fragments WHERE number = (SELECT max(fragment) FROM bases)",
        "UPDATE contents SET extents = x'00'",
        "UPDATE contents SET extents = (SELECT min(extents) FROM contents), sha256 = x'00'",
    ],
)
def test_from_a_damaged_catalog_nothing_is_dropped(family, damage):
    execute(family, (damage,))
    before = fragment_numbers(family)
    packs = digests(family.path / "packs")
    for dry_run in (False, True):
        with pytest.raises(FormatError):
            family.collect(dry_run=dry_run)
    assert fragment_numbers(family) == before
    assert digests(family.path / "packs") == packs


def test_names_that_an_index_does_not_find_are_needed_as_well(library):
    before = fragment_numbers(library)
    execute(library, ("DELETE FROM files WHERE model = (SELECT max(number) FROM models)",))
    library.collect()
    assert fragment_numbers(library) == before


# --- in parts


@contextmanager
def between_batches(monkeypatch, act):
    """Call `act(count)` before each batch of anybody but `act` itself, without the lock."""
    real = LibraryWriter.batch
    state = {"count": 0, "inside": False}

    def batch(self):
        if not state["inside"]:
            state["inside"] = True
            act(state["count"])
            state["inside"] = False
            state["count"] += 1
        return real(self)

    with monkeypatch.context() as patch:
        patch.setattr(LibraryWriter, "batch", batch)
        yield state


def test_many_are_dropped_in_parts_and_others_get_the_lock_in_between(library, monkeypatch):
    monkeypatch.setattr(collect_module, "_DROPPED_AT_ONCE", 4)
    library.remove("second")
    generation = library.generation()
    with (
        FragmentLibrary.open(library.path, lock_timeout_s=0) as other,
        between_batches(
            monkeypatch,
            lambda count: other.move(*sorted(["third", "fourth"], reverse=count % 2 == 0)),
        ) as state,
    ):
        report = library.collect()
    assert report.dropped_count > 8
    assert state["count"] > report.dropped_count // 4
    assert library.generation() >= generation + 2 * (report.dropped_count // 4)
    assert library.stats().unreferenced_bytes == 0
    check(library)


def test_what_is_needed_again_between_two_parts_stays(library, place, monkeypatch):
    monkeypatch.setattr(collect_module, "_DROPPED_AT_ONCE", 4)
    library.remove("second")

    with FragmentLibrary.open(library.path) as other:

        def act(count):
            if count == 2:
                other.add([place / "second"], AddOptions())

        with between_batches(monkeypatch, act) as state:
            report = library.collect()
    assert state["count"] > 2
    assert report.dropped_count == 8
    assert {m.name for m in library.models()} == {name.encode() for name in NAMES}
    check(library)


def test_no_part_drops_what_others_are_predicted_from(tmp_path, monkeypatch):
    base = base_weights()
    monkeypatch.setattr(collect_module, "_DROPPED_AT_ONCE", 1)
    with FragmentLibrary.create(tmp_path / "lib", CONFIG) as library:
        add(library, write_model(tmp_path / "base", base))
        add(library, write_model(tmp_path / "tuned", tuned(base, 1)))
        assert any(
            identity.is_base for identity in library.identities([*fragments_of(library, "base")])
        )
        for name in ("base", "tuned"):
            library.remove(name)

        def act(count):
            sql = "SELECT count(*) FROM bases WHERE base NOT IN (SELECT number FROM fragments)"
            assert rows(library, sql) == [(0,)], count

        with between_batches(monkeypatch, act) as state:
            report = library.collect()
        assert state["count"] > report.dropped_count > 4
        assert library.stats().unreferenced_bytes == 0


# --- leases


def test_pins_keep_their_closure_and_nothing_else(tmp_path):
    base = base_weights()
    with FragmentLibrary.create(tmp_path / "lib", CONFIG) as library:
        add(library, write_model(tmp_path / "base", base))
        add(library, write_model(tmp_path / "tuned", tuned(base, 1)))
        add(library, make_model(tmp_path / "other", seed=5, rows=60))
        wanted, others = fragments_of(library, "tuned"), fragments_of(library, "other")
        bases = fragments_of(library, "base")
        for name in ("base", "tuned", "other"):
            library.remove(name)
        with library.hold_lease("test reader") as lease:
            lease.say(library.generation(), as_ranges(wanted))
            report = library.collect()
            [kept] = report.leases
            assert (kept.process, kept.what, kept.everything) == (
                os.getpid(),
                "test reader",
                False,
            )
            assert kept.kept_bytes == report.leased_bytes > 0
            left = fragment_numbers(library)
            assert wanted <= left <= wanted | bases
            assert not left & (others - bases - wanted)
            for number in wanted:
                library.decode_fragment(number, NO_SOURCE)
        assert library.collect().leases == ()
        assert fragment_numbers(library) == set()


def test_who_has_not_seen_the_change_keeps_everything(library):
    with library.hold_lease("frozen mount") as lease:
        lease.say(library.generation())
        unreferenced = library.remove("second").unreferenced_bytes
        report = library.collect(wait_s=0.1)
        [kept] = report.leases
        assert (kept.what, kept.everything) == ("frozen mount", True)
        assert kept.kept_bytes == report.leased_bytes == unreferenced
        assert report.dropped_count == 0
        lease.say(library.generation())
        assert library.collect(wait_s=0.1).dropped_bytes == unreferenced


def test_it_waits_for_who_is_about_to_see_the_change(library):
    with library.hold_lease("mount") as lease:
        lease.say(library.generation())
        pinned = fragments_of(library, "second")
        library.remove("second")
        library.remove("third")
        timer = threading.Timer(
            0.3, lambda: lease.say(library.generation(), as_ranges(sorted(pinned)[:3]))
        )
        timer.start()
        report = library.collect(wait_s=30)
        timer.join()
        assert report.dropped_count
        [kept] = report.leases
        assert not kept.everything
        assert fragment_numbers(library) >= set(sorted(pinned)[:3])
        assert not pinned <= fragment_numbers(library)


@pytest.mark.parametrize("damage", ["cut", "changed", "emptied", "foreign"])
def test_a_lease_that_cannot_be_read_keeps_everything(library, damage):
    with library.hold_lease() as lease:
        lease.say(library.generation() + 1)
        [path] = (library.path / LEASES_NAME).glob("*.lease")
        data = path.read_bytes()
        changed = {
            "cut": data[:-5],
            "changed": data.replace(b"generation", b"generatioN"),
            "emptied": b"",
            "foreign": b"{}\n",
        }[damage]
        path.write_bytes(changed)
        library.remove("second")
        report = library.collect(wait_s=0)
        [kept] = report.leases
        assert kept.everything
        assert kept.process == os.getpid()
        assert report.dropped_count == 0
    assert library.collect().dropped_count


def test_the_files_of_the_dead_are_removed(library):
    program = (
        "import sys, os; from fragfs.library.library import FragmentLibrary\n"
        "scope = FragmentLibrary.open(sys.argv[1]).hold_lease(); scope.__enter__(); os._exit(9)"
    )
    subprocess.run([sys.executable, "-c", program, str(library.path)], check=False)
    assert list((library.path / LEASES_NAME).glob("*.lease"))
    library.remove("second")
    assert library.collect(dry_run=True).leases == ()
    assert list((library.path / LEASES_NAME).glob("*.lease")), "a dry run changes nothing"
    report = library.collect()
    assert report.dropped_count
    assert not list((library.path / LEASES_NAME).glob("*.lease"))


# --- readers


def test_a_file_that_is_open_is_readable_to_the_end(library, place):
    with library.open_file("second", "model.safetensors") as stream:
        start = stream.raw.read(1000)  # nothing is read ahead
        library.remove("second")
        report = library.collect(wait_s=0)
        assert [kept.everything for kept in report.leases] == [False]
        assert report.dropped_count, "its other files"
        assert start + stream.raw.readall() == (place / "second" / "model.safetensors").read_bytes()
    assert library.collect().dropped_count
    assert fragment_numbers(library) == fragments_of(library, "first", "third")


READER = """
import hashlib, sys
from fragfs.library.library import FragmentLibrary
with FragmentLibrary.open(sys.argv[1]) as library:
    with library.open_file("second", "model.safetensors") as stream:
        digest = hashlib.sha256(stream.raw.read(1000))
        print("open", flush=True)
        sys.stdin.readline()
        digest.update(stream.raw.readall())
        print(digest.hexdigest(), flush=True)
"""


def test_a_reader_in_another_process(library, place):
    process = subprocess.Popen(
        [sys.executable, "-c", READER, str(library.path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "open\n"
    library.remove("second")
    library.remove("first")
    report = library.collect(wait_s=0)
    assert report.dropped_count
    [kept] = report.leases
    assert (kept.process, kept.what) == (process.pid, "program reading a file")
    output, _ = process.communicate("go\n", timeout=60)
    assert output.strip() == digests(place / "second")["model.safetensors"]
    assert library.collect().leases == ()
    assert fragment_numbers(library) == fragments_of(library, "third")


class Meddler:
    """Progress that lets something happen once."""

    def __init__(self, act) -> None:
        self.act = act

    def start(self, what, total_bytes):
        pass

    def advance(self, size):
        pass

    def note(self, text):
        act, self.act = self.act, lambda: None
        act()


def test_what_is_exported_stays_until_it_is_written(library, place, tmp_path):
    reports = []

    def meddle():
        with FragmentLibrary.open(library.path) as other:
            other.remove("second")
            other.remove("third")
            reports.append(other.collect(wait_s=0))

    report = library.export("second", tmp_path / "out", Meddler(meddle))
    assert report.failed == ()
    assert digests(tmp_path / "out") == digests(place / "second")
    assert reports[0].dropped_count
    assert [kept.what for kept in reports[0].leases] == ["export"]


def test_what_is_verified_stays_meanwhile(library):
    checked = library.verify()
    next(checked)
    library.remove("second")
    report = library.collect(wait_s=0)
    assert report.dropped_count == 0
    assert [(kept.what, kept.everything) for kept in report.leases] == [("verify", True)]
    checked.close()
    assert library.collect().dropped_count


# --- adds that were interrupted


class Stop(Exception):
    pass


def interrupted_add(library, source, monkeypatch) -> set[int]:
    """Add up to the last batch of fragments; gives their numbers."""
    before = fragment_numbers(library)
    real = Ingester.store

    def store(self, files):
        real(self, files)
        raise Stop

    with monkeypatch.context() as patch:
        patch.setattr(Ingester, "store", store)
        with pytest.raises(Stop):
            library.add([source], AddOptions(workers=1))
    return fragment_numbers(library) - before


@pytest.fixture
def left(library, tmp_path, monkeypatch) -> set[int]:
    return interrupted_add(library, make_model(tmp_path / "new", seed=7, rows=150), monkeypatch)


def test_an_add_leaves_a_note_until_it_has_published(library, place, tmp_path):
    assert unpublished(library) == []
    add(library, make_model(tmp_path / "new", seed=7, rows=150))
    assert unpublished(library) == []


def test_what_an_interrupted_add_stored_can_be_resumed_for_a_day(library, left, tmp_path, clock):
    assert {n for first, last, _ in unpublished(library) for n in range(first, last + 1)} == left
    clock.now_ns += DAY_NS - 1
    report = library.collect()
    assert report.dropped_count == 0
    assert report.recent_bytes > 0
    assert left <= fragment_numbers(library)
    assert add(library, tmp_path / "new").new_bytes == 0
    assert unpublished(library) == []
    library.remove("new")
    assert library.collect().dropped_count == len(left), "it waits for no model any more"
    check(library)


def test_after_a_day_it_goes(library, left, clock):
    clock.now_ns += DAY_NS
    report = library.collect()
    assert (report.dropped_count, report.recent_bytes) == (len(left), 0)
    assert not left & fragment_numbers(library)
    assert unpublished(library) == []
    check(library)


def test_without_a_grace_it_goes_at_once(library, left):
    assert library.collect(grace_s=0).dropped_count == len(left)


def test_the_bases_of_what_waits_for_a_model_wait_too(tmp_path, monkeypatch, clock):
    base = base_weights()
    with FragmentLibrary.create(tmp_path / "lib", CONFIG, now_ns=clock) as library:
        add(library, write_model(tmp_path / "base", base))
        source = write_model(tmp_path / "tuned", tuned(base, 1))
        left = interrupted_add(library, source, monkeypatch)
        library.remove("base")
        library.collect()
        for number in left:
            library.decode_fragment(number, NO_SOURCE)
        # What it only found stored already, a header, does not wait with it.
        assert add(library, source).new_bytes < 1000
        check(library)


def test_a_model_takes_only_its_own_out_of_a_range(library, tmp_path, monkeypatch, clock):
    both = tmp_path / "both"
    both.mkdir()
    make_model(both / "a", seed=7, rows=150)
    make_model(both / "b", seed=8, rows=150)
    left = interrupted_add(library, both, monkeypatch)
    add(library, both / "b")
    waiting = {n for first, last, _ in unpublished(library) for n in range(first, last + 1)}
    assert waiting == left - fragments_of(library, "b")
    assert 0 < len(waiting) < len(left)
    clock.now_ns += DAY_NS
    assert library.collect().dropped_count == len(waiting)
    check(library)


def test_a_clock_that_was_set_back_neither_drops_nor_keeps_for_ever(library, left, clock):
    clock.now_ns -= 400 * DAY_NS
    assert library.collect().dropped_count == 0
    assert {row[2] for row in unpublished(library)} == {clock.now_ns}
    clock.now_ns += DAY_NS - 1
    assert library.collect().dropped_count == 0
    clock.now_ns += 1
    assert library.collect().dropped_count == len(left)


def test_what_was_stored_while_the_clock_was_back_is_not_old(library, tmp_path, clock, monkeypatch):
    right_ns = clock.now_ns
    clock.now_ns = 0
    left = interrupted_add(library, make_model(tmp_path / "new", seed=7, rows=150), monkeypatch)
    clock.now_ns = right_ns + DAY_NS - 1
    assert library.collect().dropped_count == 0
    clock.now_ns = right_ns + DAY_NS
    assert library.collect().dropped_count == len(left)


# --- at once


ADDER = """
import sys
from pathlib import Path
from fragfs.library.add import AddOptions
from fragfs.library.library import FragmentLibrary
with FragmentLibrary.open(sys.argv[1]) as library:
    for turn in range(3):
        for path in sys.argv[2:]:
            library.add([Path(path)], AddOptions(workers=1))
            library.remove(Path(path).name)
    for path in sys.argv[2:]:
        library.add([Path(path)], AddOptions(workers=1))
"""


@pytest.mark.slow
def test_adds_and_collections_at_once(library, place, tmp_path):
    sources = [make_model(tmp_path / f"new{n}", seed=7 + n % 2, rows=60 + n) for n in range(3)]
    arguments = [sys.executable, "-c", ADDER, str(library.path), *map(str, sources)]
    process = subprocess.Popen(arguments)
    dropped = runs = 0
    while process.poll() is None:
        dropped += library.collect(grace_s=0, wait_s=0).dropped_count
        runs += 1
    assert process.returncode == 0
    assert runs > 3
    dropped += library.collect(grace_s=0).dropped_count
    assert dropped
    assert library.stats().unreferenced_bytes == 0
    assert {m.name for m in library.models()} == {n.encode() for n in NAMES} | {
        os.fsencode(path.name) for path in sources
    }
    check(library)


def test_two_collections_at_once(library, monkeypatch):
    monkeypatch.setattr(collect_module, "_DROPPED_AT_ONCE", 4)
    library.remove("second")
    with FragmentLibrary.open(library.path) as other:
        reports = []
        threads = [
            threading.Thread(target=lambda one=one: reports.append(one.collect()))
            for one in (library, other)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
    assert len(reports) == 2
    assert library.stats().unreferenced_bytes == 0
    check(library)


def test_a_content_that_is_gone_cannot_be_opened(library):
    [entry] = [e for e in library.files("second") if e.path == b"config.json"]
    assert library.has_content(entry.content)
    library.remove("second")
    library.collect()
    assert not library.has_content(entry.content)
    with pytest.raises(NotFoundError):
        library.open_content(entry.content)


def test_a_run_that_stops_between_two_parts_is_finished_by_the_next(library, monkeypatch):
    monkeypatch.setattr(collect_module, "_DROPPED_AT_ONCE", 4)
    library.remove("second")

    def act(count):
        if count == 2:
            raise Stop

    with between_batches(monkeypatch, act), pytest.raises(Stop):
        library.collect()
    assert library.stats().unreferenced_bytes
    check(library)
    library.collect()
    assert library.stats().unreferenced_bytes == 0
    check(library)


def test_optimize_ends_with_a_collection(library, monkeypatch):
    calls = []
    real = Collector.run
    monkeypatch.setattr(Collector, "run", lambda self, *a: calls.append(a) or real(self, *a))
    library.remove("second")
    library.optimize(workers=1)
    assert len(calls) == 1
    assert library.stats().unreferenced_bytes == 0
