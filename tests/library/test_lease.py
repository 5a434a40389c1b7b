"""Leases: who keeps what no model names."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from fragfs.library import catalog
from fragfs.library.add import AddOptions
from fragfs.library.lease import LEASES_NAME, hold_lease, no_leases
from fragfs.library.library import FragmentLibrary
from fragfs.types import LibraryConfig
from tests.library.test_bases import rows
from tests.models import make_model

CONFIG = LibraryConfig(fragment_elements=1 << 14)


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


def test_a_new_library_has_one_to_hold(tmp_path):
    """A mount of another user, made before the owner's first add, must find something to lock."""
    FragmentLibrary.create(tmp_path / "lib").close()
    assert (tmp_path / "lib" / LEASES_NAME / "shared").exists()


def test_the_format_document_names_it():
    listing = (Path(catalog.__file__).parent / "FORMAT.md").read_text().split("## Packs")[0]
    assert f"{LEASES_NAME}/" in listing.split("## The directory")[1]


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

    def put(self, number: int, raw: memoryview) -> None:
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
