"""A new catalog from packs alone: all that was there comes back, and nothing that was not."""

from __future__ import annotations

import errno
import shutil

import numpy as np
import pytest

from fragfs.errors import FormatError, NotFoundError, StorageError
from fragfs.library.add import AddOptions
from fragfs.library.library import FragmentLibrary
from fragfs.library.records import PACK_FOOTER
from fragfs.types import LibraryConfig
from tests.library.checks import (
    BadPage,
    back_up_catalog,
    everything,
    failed,
    flip,
    flip_fragment,
    lost_files,
    pack_path,
    packs_of,
    put_back_catalog,
    rows,
    scan_of,
    write_catalog,
)
from tests.library.families import make_library
from tests.models import make_model

SMALL = LibraryConfig(fragment_elements=1 << 14, pack_bytes_max=1 << 20)


@pytest.fixture(scope="module")
def family(tmp_path_factory):
    return make_library(tmp_path_factory.mktemp("family"), 1 << 14)


@pytest.fixture
def path(family, tmp_path):
    """A library with a past: adds, a removal, a rename, an update, a library with many packs."""
    shutil.copytree(family[1], tmp_path / "lib")
    return tmp_path / "lib"


@pytest.fixture
def packs(tmp_path):
    with FragmentLibrary.create(tmp_path / "many", SMALL) as library:
        for seed in range(2):
            library.add([make_model(tmp_path / f"m{seed}", seed)], AddOptions())
    return tmp_path / "many"


def lose_catalogs(path):
    for name in ("catalog.sqlite", "catalog.sqlite-wal", "catalog.sqlite-shm", "catalog.snapshot"):
        (path / name).unlink(missing_ok=True)


def live_a_little(path, tmp_path):
    """Every kind of change there is; returns what is shown afterwards."""
    with FragmentLibrary.open(path) as library:
        library.remove("other")
        library.add([make_model(tmp_path / "new", 9)], AddOptions(name=b"org/new"))
        library.move("copy", "org/copy")
        library.remove("base", [b"config.json"])
        library.optimize()
        library.add([make_model(tmp_path / "newer", 10)], AddOptions())
        return everything(library)


def is_sound(library):
    report = library.check(data=True)
    return (report.problems, report.notes) == ((), ()) and not failed(library)


def test_all_comes_back_without_any_catalog(path, tmp_path):
    shown = live_a_little(path, tmp_path)
    fragments = set(rows(path, "SELECT id, pack, offset FROM fragments"))
    lose_catalogs(path)
    with pytest.raises(NotFoundError, match=r"lost its catalog.sqlite.*check --rebuild"):
        FragmentLibrary.open(path)
    report = FragmentLibrary.rebuild(path)
    assert (report.notes, report.kept) == ((), ())
    with FragmentLibrary.open(path) as library:
        assert everything(library) == shown
        assert report.model_count == len(shown)
        assert is_sound(library)
        # What optimize dropped as unneeded may still be in a pack; all else is where it was.
        assert fragments <= set(rows(path, "SELECT id, pack, offset FROM fragments"))


def test_the_rebuilt_library_can_be_changed(path, family, tmp_path):
    live_a_little(path, tmp_path)
    lose_catalogs(path)
    FragmentLibrary.rebuild(path)
    with FragmentLibrary.open(path) as library:
        used = {number for entries in everything(library).values() for _, _, number, *_ in entries}
        library.add([make_model(tmp_path / "last", 11)], AddOptions())
        library.add([family[0]["other"]], AddOptions())
        library.remove("newer")
        library.optimize()
        assert is_sound(library)
        new = {entry.content for name in ("last", "other") for entry in library.files(name)}
        assert new.isdisjoint(used)
        shown = everything(library)
    lose_catalogs(path)
    FragmentLibrary.rebuild(path)
    with FragmentLibrary.open(path) as library:
        assert everything(library) == shown
        assert is_sound(library)


def test_a_catalog_put_back_from_a_backup_is_refused_and_a_rebuild_brings_all_back(
    path, tmp_path, caplog
):
    back_up_catalog(path, tmp_path / "backup")
    shown = live_a_little(path, tmp_path)
    put_back_catalog(tmp_path / "backup", path)
    with FragmentLibrary.open(path) as library:
        assert {entry.name for entry in library.models()} != shown.keys()
    assert "older than its packs" in caplog.text
    assert "fragfs check" in caplog.text
    with (
        FragmentLibrary.open(path) as library,
        pytest.raises(FormatError, match=r"older than its packs.*check --rebuild"),
    ):
        library.remove("base")
    report = FragmentLibrary.rebuild(path)
    (kept,) = report.kept
    assert kept.name == "catalog.old-1.sqlite"
    assert kept.read_bytes() == (tmp_path / "backup").read_bytes()
    with FragmentLibrary.open(path) as library:
        assert everything(library) == shown
        assert is_sound(library)
        library.add([make_model(tmp_path / "last", 11)], AddOptions())
        assert is_sound(library)


def test_a_backup_without_its_snapshot_is_as_good(path, tmp_path):
    back_up_catalog(path, tmp_path / "backup")
    shown = live_a_little(path, tmp_path)
    numbers = {row[0] for row in rows(path, "SELECT seq FROM sqlite_sequence")}
    put_back_catalog(tmp_path / "backup", path)
    (path / "catalog.snapshot").unlink()
    FragmentLibrary.rebuild(path)
    with FragmentLibrary.open(path) as library:
        assert everything(library) == shown
        assert is_sound(library)
    # No number that the lost catalog may have given away is given again.
    new = dict(rows(path, "SELECT name, seq FROM sqlite_sequence"))
    assert new["contents"] > max(numbers)
    assert new["fragments"] >= max(row[0] for row in rows(path, "SELECT number FROM fragments"))


def test_numbers_stay_what_they_are_where_a_catalog_tells_them(path, tmp_path):
    live_a_little(path, tmp_path)
    tables = "SELECT number, id FROM fragments"
    before = set(rows(path, tables))
    used = dict(rows(path, "SELECT name, seq FROM sqlite_sequence"))
    FragmentLibrary.rebuild(path)
    assert before <= set(rows(path, tables))
    new = dict(rows(path, "SELECT name, seq FROM sqlite_sequence"))
    assert new["contents"] == used["contents"]
    assert new["fragments"] >= used["fragments"]
    assert new["models"] > used["models"]


def test_a_damaged_catalog_is_kept_and_replaced(path, tmp_path):
    shown = live_a_little(path, tmp_path)
    garbage = b"SQLite format 3\0" + bytes(50_000)
    put_back = tmp_path / "garbage"
    put_back.write_bytes(garbage)
    put_back_catalog(put_back, path)
    with pytest.raises(FormatError, match="check --rebuild"):
        FragmentLibrary.open(path)
    (path / "catalog.sqlite-wal").write_bytes(b"a journal of something")
    report = FragmentLibrary.rebuild(path)
    assert {kept.name for kept in report.kept} == {
        "catalog.old-1.sqlite",
        "catalog.old-1.sqlite-wal",
    }
    assert (path / "catalog.old-1.sqlite").read_bytes() == garbage
    with FragmentLibrary.open(path) as library:
        assert everything(library) == shown
        assert is_sound(library)


def test_nothing_is_rebuilt_while_somebody_may_be_reading(path):
    before = (path / "catalog.sqlite").read_bytes()
    with (
        FragmentLibrary.open(path) as library,
        library.hold_lease(),
        pytest.raises(StorageError, match="is mounted"),
    ):
        FragmentLibrary.rebuild(path)
    assert (path / "catalog.sqlite").read_bytes() == before


def test_a_library_that_was_opened_before_a_rebuild_gets_no_lease_after_it(path):
    with FragmentLibrary.open(path) as library:
        FragmentLibrary.rebuild(path)
        with pytest.raises(StorageError, match="replaced"), library.hold_lease():
            pass
    with FragmentLibrary.open(path) as library, library.hold_lease():
        pass


def test_there_must_be_packs(tmp_path):
    with pytest.raises(NotFoundError, match="no packs"):
        FragmentLibrary.rebuild(tmp_path)
    (tmp_path / "packs").mkdir()
    (tmp_path / "packs" / "0000000001.pack").write_bytes(b"x" * 100)
    with pytest.raises(NotFoundError, match="nothing can be rebuilt"):
        FragmentLibrary.rebuild(tmp_path)
    assert not (tmp_path / "catalog.sqlite").exists()


# --- damage


@pytest.mark.parametrize("victim", [0, 1, 2])
def test_a_lost_pack_costs_only_the_files_that_need_it(packs, victim):
    with FragmentLibrary.open(packs) as library:
        shown = everything(library)
    packs_of(packs)[victim].unlink()
    with FragmentLibrary.open(packs) as library:
        lost = failed(library)
    (packs / "catalog.sqlite").unlink()
    report = FragmentLibrary.rebuild(packs)
    with FragmentLibrary.open(packs) as library:
        now = everything(library)
        assert all(now[name] == shown[name] for name in now)
        gone = shown.keys() - now.keys()
        # A model is only lost if its manifest was in that pack.
        if gone:
            assert report.notes
        assert failed(library) == {file for file in lost if file[0] not in gone}
        check = library.check()
        assert lost_files(check) == failed(library)


def test_a_lost_pack_is_healed_by_adding_again(packs, tmp_path):
    packs_of(packs)[0].unlink()
    lose_catalogs(packs)
    FragmentLibrary.rebuild(packs)
    with FragmentLibrary.open(packs) as library:
        assert failed(library)
        shutil.copytree(tmp_path / "m0", tmp_path / "again")
        assert library.add([tmp_path / "again"], AddOptions()).healed
        assert rows(packs, "SELECT * FROM quarantine") == []
        assert is_sound(library)


@pytest.mark.parametrize("at", [0, 8, 100, -1])
def test_a_damaged_record_costs_only_the_files_that_need_it(path, at):
    with FragmentLibrary.open(path) as library:
        shown = everything(library)
        number = rows(path, "SELECT base FROM bases GROUP BY base ORDER BY count(*) DESC")[0][0]
        identity = library.fragment(number).id
        flip_fragment(library, number, at)
        lost = failed(library)
        assert lost
    lose_catalogs(path)
    FragmentLibrary.rebuild(path)
    with FragmentLibrary.open(path) as library:
        assert everything(library) == shown
        assert failed(library) == lost
        quarantined = rows(path, "SELECT id FROM fragments, quarantine WHERE number = fragment")
        assert quarantined == [(identity,)]
        assert lost_files(library.check(data=True)) == lost


def test_an_older_sound_record_is_better_than_a_newer_damaged_one(path, tmp_path):
    number = rows(path, "SELECT base FROM bases GROUP BY base ORDER BY count(*) DESC")[0][0]
    with FragmentLibrary.open(path) as library:
        flip_fragment(library, number)
        shutil.copytree(path.parent / "lib", tmp_path / "unused")
        sources = make_library(tmp_path / "again", 1 << 14)[0]
        library.add([sources["base"]], AddOptions(name=b"healed"))
        new = library.fragment(number)
        flip_fragment(library, number)
    # The first record is whole again: a pack from a backup.
    pack = pack_path(path, 1)
    old = rows(
        tmp_path / "unused", f"SELECT offset, record_size FROM fragments WHERE number={number}"
    )
    flip(pack, old[0][0] + old[0][1] - 1)
    lose_catalogs(path)
    FragmentLibrary.rebuild(path)
    with FragmentLibrary.open(path) as library:
        row = rows(path, "SELECT id, offset FROM fragments")
        assert (new.id, old[0][0]) in row
        assert is_sound(library)


def test_what_an_interrupted_commit_left_stays_out(path, tmp_path):
    with FragmentLibrary.open(path) as library:
        library.add([make_model(tmp_path / "new", 9)], AddOptions())
        generation, batch = rows(path, "SELECT generation, batch FROM library")[0]
        shown = everything(library)
        library.add([make_model(tmp_path / "lost", 12)], AddOptions())
    pack = packs_of(path)[-1]
    torn = pack.read_bytes()
    index = torn.rindex(b"FrRc\x02")
    # The manifest of the last batch is torn, its trailer is there: writes came out of order.
    pack.write_bytes(torn[: index + 40] + bytes(60) + torn[index + 100 :])
    tip = rows(path, "SELECT batch FROM library")[0][0]
    (path / "staging" / "batch.intent").write_bytes(tip)
    lose_catalogs(path)
    FragmentLibrary.rebuild(path)
    with FragmentLibrary.open(path) as library:
        assert everything(library) == shown
        assert not failed(library)
        assert rows(path, "SELECT generation FROM library")[0][0] >= generation
        assert batch


def test_an_index_leads_past_damage_and_a_search_where_there_is_none(packs):
    sealed = packs_of(packs)[0]
    data = sealed.read_bytes()
    index_offset, _ = PACK_FOOTER.unpack(data, len(data) - PACK_FOOTER.size)
    with FragmentLibrary.open(packs) as library:
        shown = everything(library)
        flip_fragment(library, rows(packs, "SELECT number FROM fragments WHERE pack = 1")[0][0], 2)
        lost = failed(library)
    for index in (True, False):
        if not index:
            flip(sealed, index_offset)
        lose_catalogs(packs)
        FragmentLibrary.rebuild(packs)
        with FragmentLibrary.open(packs) as library:
            assert everything(library) == shown
            assert failed(library) == lost


@pytest.fixture
def opened(tmp_path):
    """A library with one open pack: three models, of which the first was removed."""
    with FragmentLibrary.create(tmp_path / "open", SMALL) as library:
        for seed in range(3):
            library.add([make_model(tmp_path / f"m{seed}", seed, rows=60)], AddOptions())
        library.remove("m0")
    return tmp_path / "open"


def test_a_damaged_trailer_hides_nothing_that_is_behind_it(opened):
    with FragmentLibrary.open(opened) as library:
        shown = everything(library)
    (pack,) = packs_of(opened)
    # Of the batch with the manifest of m1.
    flip(pack, scan_of(pack).batches[3].end - 20)
    with FragmentLibrary.open(opened) as library:
        assert library.check(repair=True).problems == ()
    lose_catalogs(opened)
    assert any("generation 4 to 4" in note for note in FragmentLibrary.rebuild(opened).notes)
    with FragmentLibrary.open(opened) as library:
        assert everything(library) == shown
        report = library.check(data=True)
        assert report.problems == ()
        assert any("no readable record" in note for note in report.notes)
        library.collect(grace_s=0)
        assert pack.exists()
        assert not failed(library)


def test_the_last_trailer_of_a_sealed_pack_takes_no_fragment_along(packs):
    with FragmentLibrary.open(packs) as library:
        shown = everything(library)
    sealed = packs_of(packs)[0]
    flip(sealed, scan_of(sealed).batches[-1].end - 20)
    lose_catalogs(packs)
    assert any("may be missing" in note for note in FragmentLibrary.rebuild(packs).notes)
    with FragmentLibrary.open(packs) as library:
        assert everything(library) == shown
        assert library.check(data=True).problems == ()
        assert not failed(library)


def test_what_is_behind_a_damaged_last_trailer_is_told_and_kept(opened):
    (pack,) = packs_of(opened)
    end = scan_of(pack).batches[-2].end
    flip(pack, pack.stat().st_size - 20)
    lose_catalogs(opened)
    notes = FragmentLibrary.rebuild(opened).notes
    assert any(f"from byte {end} on" in note and "may be missing" in note for note in notes)
    with FragmentLibrary.open(opened) as library:
        assert any("no readable record" in note for note in library.check(data=True).notes)
        for model in library.models():
            library.remove(model.name)
        library.collect(grace_s=0)
    assert pack.exists()


@pytest.mark.parametrize("at", [0, 4096])
def test_a_page_that_the_disk_does_not_give_costs_what_is_in_it(opened, at):
    (pack,) = packs_of(opened)
    with FragmentLibrary.open(opened) as library:
        shown = everything(library)
        meta = max(map(library.fragment, range(10, 14)), key=lambda meta: meta.record_size)
    files = BadPage(pack, meta.offset + at)
    with FragmentLibrary.open(opened, files=files) as library:
        lost = failed(library)
        assert lost_files(library.check(data=True)) == lost
        assert lost_files(library.check(repair=True)) == lost
    lose_catalogs(opened)
    FragmentLibrary.rebuild(opened, files=files)
    with FragmentLibrary.open(opened, files=files) as library:
        assert everything(library) == shown
        assert failed(library) == lost
    with pytest.raises(StorageError, match="open files"):
        FragmentLibrary.rebuild(opened, files=BadPage(pack, meta.offset + at, errno.EMFILE))


def test_a_record_inside_a_stored_file_deceives_nobody(tmp_path):
    """A file that holds another library's pack, behind a damaged record header."""
    path = tmp_path / "lib"
    with FragmentLibrary.create(path, LibraryConfig(fragment_elements=1 << 14)) as library:
        model = make_model(tmp_path / "m", 1, rows=50)
        library.add([model], AddOptions())
        pack = packs_of(path)[0].read_bytes()
        (tmp_path / "evil").mkdir()
        # Incompressible, so that it is stored as it is.
        evil = bytearray(pack[64:])
        (tmp_path / "evil" / "file.bin").write_bytes(evil)
        library.add([tmp_path / "evil"], AddOptions(force=True))
        shown = everything(library)
        entry = library.files("evil")[0]
        number = library.open_content(entry.content).extents[0].fragment
        flip_fragment(library, number, 3)
        lost = failed(library)
    lose_catalogs(path)
    FragmentLibrary.rebuild(path)
    with FragmentLibrary.open(path) as library:
        assert everything(library) == shown
        assert failed(library) == lost
        assert library.check(data=True).decoded_count


def test_records_that_are_predicted_from_each_other_are_refused(path):
    from fragfs.library.resolve import Candidate, resolve_fragments
    from fragfs.types import FragmentId

    one, two, three, four = (FragmentId(bytes([n]) * 32) for n in (1, 2, 3, 4))

    def record(offset, *bases, sound=True):
        return Candidate(1, offset, 100, 100, 4, tuple(bases), sound, False)

    found = resolve_fragments(
        {
            one: [record(1, two), record(2)],
            two: [record(3, one)],
            three: [record(4, four), record(5, one)],
        },
        closure_max=2,
    )
    # Of one the older record counts, for the newer would close a ring.
    assert found.records[one].offset == 2
    assert found.records[two].offset == 3
    # Its newest rests on nothing that is there.
    assert found.records[three].offset == 5
    assert found.lost == {}
    ring = resolve_fragments({one: [record(1, two)], two: [record(3, one)]}, closure_max=4)
    assert ring.records == {}
    assert set(ring.lost) == {one, two}
    deep = resolve_fragments(
        {one: [record(1, two)], two: [record(3, three)], three: [record(5)]}, 2
    )
    assert set(deep.records) == {two, three}
    missing = resolve_fragments({one: [record(1, two)]}, 4)
    assert set(missing.records) == {one}
    assert set(missing.lost) == {two}


def test_packs_of_others_are_left_out_and_named(packs, tmp_path):
    with FragmentLibrary.create(tmp_path / "other", SMALL) as other:
        other.add([make_model(tmp_path / "x", 7)], AddOptions())
    with FragmentLibrary.open(packs) as library:
        shown = everything(library)
    shutil.copy(packs_of(tmp_path / "other")[0], pack_path(packs, 99))
    lose_catalogs(packs)
    report = FragmentLibrary.rebuild(packs)
    assert any("0000000099.pack is left out" in note for note in report.notes)
    with FragmentLibrary.open(packs) as library:
        assert everything(library) == shown


def test_a_catalog_that_breaks_its_rules_is_replaced(path, tmp_path):
    shown = live_a_little(path, tmp_path)
    write_catalog(path, "UPDATE contents SET extents = x'00'")
    write_catalog(path, "DELETE FROM sqlite_sequence")
    FragmentLibrary.rebuild(path)
    with FragmentLibrary.open(path) as library:
        assert everything(library) == shown
        assert is_sound(library)


def hurt(pack, rng):
    """Damage a file of a library at random; says how."""
    data = bytearray(pack.read_bytes())
    start = int(rng.integers(len(data)))
    match rng.choice(["flip", "zero", "cut", "swap", "noise"]):
        case "flip":
            data[start] ^= 1 << int(rng.integers(8))
        case "zero":
            data[start : start + 5000] = bytes(len(data[start : start + 5000]))
        case "cut":
            del data[start:]
        case "swap":
            part = len(data) // 3
            data[:part], data[part : 2 * part] = data[part : 2 * part], data[:part]
        case "noise":
            data[start : start + 300] = rng.bytes(len(data[start : start + 300]))
    pack.write_bytes(data)


@pytest.mark.parametrize("seed", range(24))
def test_whatever_happens_to_packs_nothing_wrong_is_shown(packs, path, tmp_path, seed):
    rng = np.random.default_rng(seed)
    library_path = packs if seed % 2 else path
    with FragmentLibrary.open(library_path) as library:
        shown = everything(library)
    for _ in range(1 + seed % 3):
        hurt(packs_of(library_path)[int(rng.integers(len(packs_of(library_path))))], rng)
    if seed % 4 < 2:
        with FragmentLibrary.open(library_path) as library:
            lost = failed(library)
            assert lost_files(library.check(data=True)) <= lost
            report = library.check(repair=True, data=True)
            assert {p.kind for p in report.problems} <= {"lost"}, report
            assert lost_files(report) == failed(library) <= lost
    lose_catalogs(library_path)
    try:
        FragmentLibrary.rebuild(library_path)
    except NotFoundError:
        return  # not one pack has a header
    with FragmentLibrary.open(library_path) as library:
        now = everything(library)
        assert all(now[name] == shown[name] for name in now)
        report = library.check(data=True)
        assert {p.kind for p in report.problems} <= {"lost", "repairable"}
        assert lost_files(report) <= failed(library)
        report = library.check(repair=True)
        assert {p.kind for p in report.problems} <= {"lost"}, report
        assert lost_files(report) == failed(library)
        for name, model in (("m0", b"m0"), ("m1", b"m1")):
            if library_path is packs and model in now:
                library.add([tmp_path / name], AddOptions(update=True, checksum=True))
        if library_path is packs:
            assert not failed(library)


@pytest.mark.parametrize(
    "sql",
    [
        "UPDATE sqlite_sequence SET seq = 1 << 61",
        "UPDATE sqlite_sequence SET seq = -5",
        "UPDATE library SET generation = 1 << 62",
        "UPDATE packs SET number = 1 << 40",
        "UPDATE fragments SET number = 1 << 50 WHERE number = 3",
    ],
)
def test_what_cannot_be_in_an_old_catalog_is_not_carried_over(path, sql):
    with FragmentLibrary.open(path) as library:
        shown = everything(library)
    write_catalog(path, sql)
    (path / "catalog.snapshot").unlink()
    FragmentLibrary.rebuild(path)
    with FragmentLibrary.open(path) as library:
        assert everything(library) == shown
        assert is_sound(library)
    assert max(rows(path, "SELECT max(number) FROM fragments")[0]) < 10_000


def test_who_had_it_open_before_publishes_nothing_old(path):
    snapshot = path / "catalog.snapshot"
    with FragmentLibrary.open(path) as before:
        FragmentLibrary.rebuild(path)
        published = snapshot.read_bytes()
        with pytest.raises(StorageError, match="moved away or replaced"):
            before._writer.publish_snapshot()
    assert snapshot.read_bytes() == published
