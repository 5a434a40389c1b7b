"""Giving back space: what is copied, what vouches for it, and who may read on."""

from __future__ import annotations

import errno
import os
import shutil
import sqlite3
from collections import Counter
from contextlib import suppress
from pathlib import Path

import pytest

from fragfs.errors import StorageError
from fragfs.library import appender
from fragfs.library.add import AddOptions
from fragfs.library.compact import Compactor
from fragfs.library.decode import NO_SOURCE
from fragfs.library.files import OsFiles, storage_error
from fragfs.library.library import FragmentLibrary
from fragfs.library.manifests import parse_manifest
from fragfs.library.records import (
    PACK_HEADER,
    RecordKind,
    checksum,
    parse_batch_trailer,
    parse_record_header,
    parse_retirement,
)
from fragfs.types import LibraryConfig
from tests.library.test_bases import add, assert_good, bad_models, flip, rows
from tests.models import digests, make_model

CONFIG = LibraryConfig(fragment_elements=1 << 14, pack_bytes_max=1 << 20)


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """A library of three models in several packs, and their sources beside it."""
    place = tmp_path_factory.mktemp("made")
    with FragmentLibrary.create(place / "lib", CONFIG) as library:
        for seed, name in enumerate(("first", "second", "third")):
            add(library, make_model(place / name, seed=seed, rows=150))
    return place


@pytest.fixture
def place(made, tmp_path):
    shutil.copytree(made, tmp_path / "copy")
    return tmp_path / "copy"


@pytest.fixture
def library(place):
    with FragmentLibrary.open(place / "lib") as library:
        yield library


def optimize(library: FragmentLibrary):
    return library.optimize(workers=1)


def pack_files(library: FragmentLibrary) -> dict[int, Path]:
    paths = sorted((library.path / "packs").iterdir())
    return {int(path.stem): path for path in paths}


def pack_bytes(library: FragmentLibrary) -> int:
    return sum(path.stat().st_size for path in pack_files(library).values())


def records(library: FragmentLibrary) -> list[tuple[int, int, RecordKind, bytes, bytes]]:
    """(pack, offset, kind, header, payload) of what the catalog says counts in each pack."""
    sizes = dict(rows(library, "SELECT number, committed_size FROM packs WHERE state IN (0, 1, 2)"))
    found = []
    for number, path in pack_files(library).items():
        data = path.read_bytes()[: sizes.get(number, 0)]
        offset = PACK_HEADER.size
        while offset + 24 <= len(data):
            header = parse_record_header(data[offset:], "here")
            payload = data[offset + header.header_size : offset + header.record_size]
            assert checksum(payload) == header.payload_checksum
            head = data[offset : offset + header.header_size]
            found.append((number, offset, header.kind, head, payload))
            offset += header.record_size
    return found


def walk_batches(library: FragmentLibrary) -> list[bytes]:
    """Every batch from the newest to the first, along the chain of parents."""
    parents: dict[bytes, tuple[int, bytes]] = {}
    for _, _, kind, header, payload in records(library):
        if kind is RecordKind.BATCH_TRAILER:
            batches = [parse_batch_trailer(header)]
        elif kind is RecordKind.RETIREMENT:
            batches = parse_retirement(payload)
        else:
            continue
        for batch in batches:
            entry = (batch.generation, batch.parent)
            assert parents.setdefault(batch.batch, entry) == entry
    [(generation, batch)] = rows(library, "SELECT generation, batch FROM library")
    found = []
    while batch != bytes(16):
        assert batch in parents, f"the batch of generation {generation} is nowhere"
        assert parents[batch][0] == generation
        found.append(batch)
        generation, batch = generation - 1, parents[batch][1]
    assert generation == 0
    return found


def newest_by_name(library: FragmentLibrary) -> dict[bytes, tuple[RecordKind, bytes]]:
    """What a rebuild would believe: the newest record of each name, in generation order."""
    generations: dict[int, list[tuple[int, int]]] = {}
    for pack, offset, kind, header, _ in records(library):
        if kind is RecordKind.BATCH_TRAILER:
            trailer = parse_batch_trailer(header)
            generations.setdefault(pack, []).append((offset, trailer.generation))
    ordered = []
    for pack, offset, kind, _, payload in records(library):
        if kind in (RecordKind.MANIFEST, RecordKind.REMOVAL):
            generation = next(g for end, g in generations[pack] if offset < end)
            ordered.append((generation, offset, kind, payload))
    found: dict[bytes, tuple[RecordKind, bytes]] = {}
    places: Counter[tuple[bytes, int]] = Counter()
    for generation, _, kind, payload in sorted(ordered):
        manifest = kind is RecordKind.MANIFEST
        name = parse_manifest(payload, "here").name if manifest else payload
        places[name, generation] += manifest
        found[name] = (kind, payload)
    assert max(places.values()) <= 1, "no batch has two manifests of a model"
    return found


def check_rebuildable(library: FragmentLibrary) -> None:
    walk_batches(library)
    newest = newest_by_name(library)
    models = {model.name for model in library.models()}
    assert {name for name, (kind, _) in newest.items() if kind is RecordKind.MANIFEST} == models
    for name in models:
        manifest = parse_manifest(newest[name][1], "here")
        contents = {content.number: content for content in manifest.contents}
        files = {file.path: file.content for file in manifest.files if file.content is not None}
        assert files == {entry.path: entry.content for entry in library.files(name)}
        for entry in library.files(name):
            assert contents[entry.content].sha256 == entry.sha256
    stored = {
        bytes(header[24:56])
        for _, _, kind, header, _ in records(library)
        if kind is RecordKind.FRAGMENT
    }
    assert {bytes(i) for (i,) in rows(library, "SELECT id FROM fragments")} <= stored


def check(library: FragmentLibrary) -> None:
    assert_good(library)
    check_rebuildable(library)


def test_a_library_without_waste_is_left_alone(library):
    check_rebuildable(library)
    packs = digests(library.path / "packs")
    assert optimize(library).freed_bytes == 0
    assert digests(library.path / "packs") == packs


def test_removed_models_are_given_back(library):
    before = pack_bytes(library)
    unreferenced = library.remove("second").unreferenced_bytes
    assert unreferenced > 100_000
    assert pack_bytes(library) >= before, "rm gives nothing back by itself"
    with_removal = pack_bytes(library)
    report = optimize(library)
    assert report.freed_bytes == with_removal - pack_bytes(library)
    assert report.freed_bytes > 0.9 * unreferenced
    assert report.leased_bytes == 0
    assert report.kept == ()
    check(library)


def test_all_models_removed(library, place):
    for name in ("first", "second", "third"):
        library.remove(name)
    optimize(library)
    assert rows(library, "SELECT count(*) FROM fragments") == [(0,)]
    assert pack_bytes(library) < 100_000
    check_rebuildable(library)
    removed = {name for name, (kind, _) in newest_by_name(library).items()}
    assert removed == {b"first", b"second", b"third"}
    library.add([place / "second"], AddOptions())
    check(library)


@pytest.mark.slow
def test_renamed_and_updated_models(library, place):
    library.move("first", "org/one")
    library.remove("second")
    (place / "third" / "config.json").write_text("{}")
    library.add([place / "third"], AddOptions(update=True))
    optimize(library)
    check(library)
    newest = newest_by_name(library)
    assert newest[b"first"][0] is RecordKind.REMOVAL
    assert newest[b"second"][0] is RecordKind.REMOVAL


@pytest.mark.slow
def test_again_and_again(library, place):
    for round_number in range(4):
        batches = len(walk_batches(library))
        library.remove("second")
        optimize(library)
        library.add([place / "second"], AddOptions())
        check(library)
        assert len(walk_batches(library)) > batches, round_number
        assert rows(library, "SELECT generation FROM library") == [(len(walk_batches(library)),)]


@pytest.mark.slow
def test_numbers_of_packs_are_never_used_again(library, place):
    used = set(pack_files(library))
    for _ in range(3):
        before = set(pack_files(library))
        library.remove("third")
        optimize(library)
        library.add([place / "third"], AddOptions())
        new = set(pack_files(library)) - before
        assert new
        assert not new & used
        used |= new
    retired = {n for (n,) in rows(library, "SELECT number FROM packs WHERE state = 3")}
    assert used == retired | set(pack_files(library))
    assert not retired & set(pack_files(library))


def test_a_second_run_copies_nothing(library):
    library.remove("second")
    optimize(library)
    packs = digests(library.path / "packs")
    assert optimize(library).freed_bytes == 0
    assert digests(library.path / "packs") == packs


@pytest.mark.slow
def test_a_second_run_copies_nothing_where_records_are_tiny(tmp_path):
    """The index of a sealed pack is no waste, however small the records."""
    config = LibraryConfig(fragment_elements=1 << 12, pack_bytes_max=1 << 20)
    source = tmp_path / "source"
    source.mkdir()
    (source / "gone").write_bytes(os.urandom(400_000))
    (source / "large").write_bytes(os.urandom(900_000))
    for number in range(1500):
        (source / f"{number}.bin").write_bytes(os.urandom(100))
    with FragmentLibrary.create(tmp_path / "lib", config) as library:
        library.add([source], AddOptions())
        library.remove("source", [b"gone"])
        optimize(library)
        packs = digests(library.path / "packs")
        optimize(library)
        assert digests(library.path / "packs") == packs


# --- readers


def test_a_reader_that_was_there_before_reads_on(library, place):
    with FragmentLibrary.open(library.path) as reader:
        contents = [
            (name, entry, reader.open_content(entry.content))
            for name in ("first", "third")
            for entry in reader.files(name)
        ]
        # It holds descriptors of packs, and numbers of fragments; half of the packs it has open.
        for _, _, content in contents[::2]:
            for extent in content.extents:
                reader.decode_fragment(extent.fragment, NO_SOURCE)
        before = set(pack_files(library))
        library.remove("second")
        optimize(library)
        assert before - set(pack_files(library))
        for name, entry, content in contents:
            data = b"".join(
                bytes(reader.decode_fragment(extent.fragment, NO_SOURCE))
                for extent in content.extents
            )
            assert data == (place / name / os.fsdecode(entry.path)).read_bytes()


def test_a_place_that_was_looked_up_before_is_looked_up_again(library, monkeypatch):
    """Between a look at the catalog and the read, the pack is given back."""
    with FragmentLibrary.open(library.path) as reader:
        [entry] = [e for e in reader.files("third") if e.path == b"model.safetensors"]
        numbers = [extent.fragment for extent in reader.open_content(entry.content).extents]
        places = {number: reader.fragment(number) for number in numbers}
        library.remove("second")
        library.remove("first")
        optimize(library)
        moved = [n for n in numbers if library.fragment(n).pack != places[n].pack]
        assert moved
        catalog = reader._catalog
        fresh = catalog.fragment
        for number in moved:
            asked = []

            def stale(wanted, number=number, asked=asked):
                asked.append(wanted)
                return places[number] if len(asked) == 1 else fresh(wanted)

            monkeypatch.setattr(catalog, "fragment", stale)
            assert reader.decode_fragment(number, NO_SOURCE)
            assert len(asked) > 1


def as_another_user(monkeypatch) -> None:
    """Who may not open the catalog reads the snapshot; root may do everything."""
    connect = sqlite3.connect

    def refuse(database, *arguments, **options):
        if "catalog.sqlite" in str(database):
            raise sqlite3.OperationalError("unable to open database file")
        return connect(database, *arguments, **options)

    monkeypatch.setattr(sqlite3, "connect", refuse)
    monkeypatch.setattr(os, "access", lambda *arguments, **options: False)


def test_a_reader_of_the_snapshot_reads_everything(library, monkeypatch):
    with monkeypatch.context() as patch:
        as_another_user(patch)
        reader = FragmentLibrary.open(library.path)
        assert_good(reader, "third")
    library.remove("second")
    optimize(library)
    with monkeypatch.context() as patch:
        as_another_user(patch)
        assert {model.name for model in reader.models()} == {b"first", b"third"}
        assert_good(reader)
        with FragmentLibrary.open(library.path) as fresh:
            assert_good(fresh)
        reader.close()


class FullAtSnapshot(OsFiles):
    """The disk is full whenever the catalog's copy is to be published."""

    def rename(self, old, new):
        if new.name == "catalog.snapshot":
            raise storage_error(OSError(errno.ENOSPC, "full"), "cannot rename")
        super().rename(old, new)


def test_no_pack_goes_before_the_snapshot_knows(place, monkeypatch):
    """Who reads the snapshot needs the packs that the snapshot names."""
    with FragmentLibrary.open(place / "lib", files=FullAtSnapshot()) as library:
        library.remove("second")
        with suppress(StorageError):
            optimize(library)
    with monkeypatch.context() as patch:
        as_another_user(patch)
        with FragmentLibrary.open(place / "lib") as reader:
            assert_good(reader)
    with FragmentLibrary.open(place / "lib") as library:
        optimize(library)
        check(library)
        retired = {n for (n,) in rows(library, "SELECT number FROM packs WHERE state = 3")}
        assert retired
        assert not retired & set(pack_files(library))


# --- damage


def a_pack_to_give_back(library: FragmentLibrary) -> tuple[int, list[int]]:
    """Remove a model; a pack with its fragments and others', and the numbers of those others."""
    library.remove("second")
    needed = {
        extent.fragment
        for name in ("first", "third")
        for entry in library.files(name)
        for extent in library.open_content(entry.content).extents
    }
    mixed = Counter(
        pack
        for number, pack in rows(library, "SELECT number, pack FROM fragments")
        if number not in needed
    )
    for pack, _ in mixed.most_common():
        live = [n for n in sorted(needed) if library.fragment(n).pack == pack]
        if live:
            return pack, live
    raise AssertionError("no pack holds fragments of both")


@pytest.mark.parametrize("at", [5, 60, 120])
def test_a_pack_with_damage_is_kept(library, at):
    pack, live = a_pack_to_give_back(library)
    number = max(live, key=lambda n: library.fragment(n).record_size)
    path = pack_files(library)[pack]
    flip(library, number, at)
    bad = bad_models(library)
    assert bad
    report = optimize(library)
    assert [kept for kept, _ in report.kept] == [pack]
    assert f"pack {pack} at offset {library.fragment(number).offset}" in report.kept[0][1]
    assert path.exists()
    assert library.fragment(number).pack == pack
    assert bad_models(library) == bad


def test_damage_leaves_no_half_copies_behind(library, monkeypatch):
    """What was copied before the damage was met counts for nothing, and should not stay."""
    monkeypatch.setattr(appender, "_BUFFERED_BYTES_MAX", 1 << 14)
    pack, live = a_pack_to_give_back(library)
    flip(library, max(live, key=lambda n: library.fragment(n).offset), 120)
    report = optimize(library)
    assert [kept for kept, _ in report.kept] == [pack]
    committed = dict(rows(library, "SELECT number, committed_size FROM packs"))
    sizes = {number: path.stat().st_size for number, path in pack_files(library).items()}
    assert sizes == {number: committed.get(number) for number in sizes}


def damage(path: Path, offset: int) -> None:
    with path.open("r+b") as stream:
        stream.seek(offset)
        byte = stream.read(1)[0]
        stream.seek(offset)
        stream.write(bytes([byte ^ 0x10]))


def test_a_damaged_manifest_keeps_its_pack(library):
    pack, _ = a_pack_to_give_back(library)
    [(offset, header)] = [
        (offset, header)
        for number, offset, kind, header, _ in records(library)
        if kind is RecordKind.MANIFEST and number == pack
    ][:1]
    damage(pack_files(library)[pack], offset + len(header) + 3)
    report = optimize(library)
    assert [kept for kept, _ in report.kept] == [pack]
    assert pack in pack_files(library)
    assert_good(library)


def test_damage_between_what_counts_hides_no_manifest(library):
    """The header of a record that nothing needs is damaged: what follows it still counts."""
    pack, _ = a_pack_to_give_back(library)
    models = {model.name for model in library.models()}
    before = len(walk_batches(library))
    needed = {
        extent.fragment
        for name in models
        for entry in library.files(name)
        for extent in library.open_content(entry.content).extents
    }
    unneeded = rows(library, "SELECT number, offset FROM fragments WHERE pack = ?", pack)
    offset = next(offset for number, offset in unneeded if number not in needed)
    damage(pack_files(library)[pack], offset + 30)
    report = optimize(library)
    assert_good(library)
    if pack in pack_files(library):
        assert [kept for kept, _ in report.kept] == [pack]
    else:
        check_rebuildable(library)
        assert len(walk_batches(library)) >= before


# --- what a crash has left


def test_what_a_crash_has_left_is_given_back(library, place):
    with FragmentLibrary.open(place / "lib") as other:
        last = max(pack_files(other))
    with pack_files(library)[last].open("ab") as stream:
        stream.write(os.urandom(300_000))
    before = pack_bytes(library)
    library.remove("second")
    for _ in range(2):
        optimize(library)
    assert pack_bytes(library) < before - 300_000
    check(library)


def test_one_run_gives_back_what_a_crash_has_left(library):
    last = max(pack_files(library))
    with pack_files(library)[last].open("ab") as stream:
        stream.write(os.urandom(300_000))
    before = pack_bytes(library)
    optimize(library)
    assert pack_bytes(library) < before - 250_000
    check(library)


# --- others at the same time


@pytest.mark.parametrize("when", ["_wasted", "_is_wasteful", "_check_records"])
def test_what_others_write_meanwhile_is_vouched_for(tmp_path, monkeypatch, when):
    """Models are published into the open pack just before that pack is given back."""
    sources = [make_model(tmp_path / name, seed=n, rows=40) for n, name in enumerate("abcd")]
    step = getattr(Compactor, when)
    done = []

    def late(self, *arguments):
        found = step(self, *arguments)
        if not done:
            done.append(1)
            # Where the lock is held by now nobody can: that is as good.
            with (
                FragmentLibrary.open(tmp_path / "lib", lock_timeout_s=0.05) as other,
                suppress(StorageError),
            ):
                other.add([sources[3]], AddOptions())
                other.move("a", "org/a")
        return found

    with FragmentLibrary.create(tmp_path / "lib", LibraryConfig()) as library:
        library.add(sources[:3], AddOptions())
        library.remove("b")
        monkeypatch.setattr(Compactor, when, late)
        optimize(library)
        monkeypatch.undo()
        assert done
        assert {model.name for model in library.models()} >= {b"c"}
        check(library)
