"""`check` and `--repair`: what is found, what is named, what is mended, what heals."""

from __future__ import annotations

import shutil

import pytest

from fragfs.errors import FormatError, StorageError
from fragfs.library import check_packs
from fragfs.library.add import AddOptions
from fragfs.library.check import Checker
from fragfs.library.extents import ExtentMap
from fragfs.library.library import FragmentLibrary
from fragfs.library.lock import writer_lock
from fragfs.library.records import PACK_FOOTER
from fragfs.library.scan import TRAILER_SIZE
from fragfs.types import LibraryConfig
from tests.library.checks import (
    back_up_catalog,
    failed,
    flip,
    flip_fragment,
    kinds,
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
    """A library of five related models, and their sources."""
    sources, path = make_library(tmp_path_factory.mktemp("family"), 1 << 14)
    return sources, path


@pytest.fixture
def path(family, tmp_path):
    """A copy of it that a test may damage."""
    shutil.copytree(family[1], tmp_path / "lib")
    return tmp_path / "lib"


@pytest.fixture
def packs(tmp_path):
    """A library with several sealed packs."""
    with FragmentLibrary.create(tmp_path / "many", SMALL) as library:
        for seed in range(2):
            library.add([make_model(tmp_path / f"m{seed}", seed)], AddOptions())
    return tmp_path / "many"


def check(path, **options):
    with FragmentLibrary.open(path) as library:
        return library.check(**options)


def chain(path):
    """Numbers of four fragments, each predicted from the next."""
    bases = dict(rows(path, "SELECT fragment, base FROM bases ORDER BY position DESC"))
    for number in bases:
        found = [number]
        while found[-1] in bases:
            found.append(bases[found[-1]])
        if len(found) >= 3:
            return found
    raise AssertionError("the family has no chain of three")


def test_a_sound_library_has_no_problems_and_nothing_to_repair(path):
    report = check(path, data=True)
    assert (report.problems, report.notes) == ((), ())
    assert report.decoded_count == report.fragment_count > 100
    assert report.file_count == 10
    before = rows(path, "SELECT generation FROM library")
    report = check(path, repair=True)
    assert (report.problems, report.notes, report.repaired) == ((), (), ())
    assert rows(path, "SELECT generation FROM library") == before


def test_a_sound_library_of_sealed_packs_has_no_problems(packs):
    report = check(packs, data=True)
    assert (report.problems, report.notes) == ((), ())
    assert report.pack_count > 2


@pytest.mark.parametrize("at", [0, 9, 30, -1])
def test_a_damaged_fragment_is_named_with_the_files_it_takes_along(path, at):
    number = chain(path)[-1]
    with FragmentLibrary.open(path) as library:
        meta = library.fragment(number)
        flip_fragment(library, number, at)
        report = library.check()
        assert set(kinds(report)) == {"lost"}
        (problem,) = report.problems
        assert problem.fragments == (meta.id.hex(),)
        assert (problem.path, problem.offset) == (str(pack_path(path, meta.pack)), meta.offset)
        assert f"pack {meta.pack} at offset {meta.offset}" in problem.what
        assert "add a model" in problem.remedy
        # Everything that is predicted from it, at any depth.
        assert lost_files(report) == failed(library)
        assert len({model for model, _ in lost_files(report)}) >= 3


def test_repair_puts_damage_in_quarantine_and_says_what_is_lost(path):
    number = chain(path)[-1]
    with FragmentLibrary.open(path) as library:
        flip_fragment(library, number)
        lost = failed(library)
        report = library.check(repair=True)
        assert "quarantine" in " ".join(report.repaired)
        assert [number] == [row[0] for row in rows(path, "SELECT fragment FROM quarantine")]
        assert not rows(path, f"SELECT 1 FROM signatures WHERE fragment = {number}")
        assert not rows(path, f"SELECT 1 FROM similar WHERE fragment = {number}")
        for again in (report, library.check(), library.check(data=True)):
            assert kinds(again) == ["lost"]
            assert lost_files(again) == lost
        assert library.check(repair=True).repaired == ()


@pytest.mark.parametrize("depth", [0, 1, 2])
def test_adding_a_good_copy_heals_at_any_depth(family, path, depth):
    number = chain(path)[depth]
    with FragmentLibrary.open(path) as library:
        flip_fragment(library, number)
        assert failed(library)
        library.check(repair=True)
        owners = {model for model, _ in lost_files(library.check())}
        report = library.add(
            [family[0][name.decode()] for name in sorted(owners)],
            AddOptions(update=True, checksum=True),
        )
        assert report.healed or any(report.models)
        assert not failed(library)
        assert rows(path, "SELECT * FROM quarantine") == []
        assert library.check(data=True).problems == ()


def test_the_owner_of_a_base_heals_what_is_predicted_from_it(family, path):
    number = chain(path)[-1]
    with FragmentLibrary.open(path) as library:
        flip_fragment(library, number)
        library.check(repair=True)
        (problem,) = library.check().problems
        assert {model for model, _ in problem.files} > {b"base"}
        source = family[0]["base"]
        copy = path.parent / "again"
        shutil.copytree(source, copy)
        assert len(library.add([copy], AddOptions()).healed) == 1
        assert library.check(data=True).problems == ()


def test_what_is_in_quarantine_is_no_dedup_hit_and_no_base(family, path):
    number = chain(path)[-1]
    write_catalog(path, "INSERT INTO quarantine VALUES (?, 1, 'it was said to be bad')", number)
    with FragmentLibrary.open(path) as library:
        copy = path.parent / "again"
        shutil.copytree(family[0]["merge"], copy)
        copied = library.add([copy], AddOptions())
        assert copied.healed
        assert "it was said to be bad" in copied.healed[0]
        quarantined = {row[0] for row in rows(path, "SELECT fragment FROM quarantine")}
        new = {m.number for e in library.files("again") for m in fragments_of(library, e)}
        for fragment in new:
            closure = closure_of(library, fragment)
            assert closure.isdisjoint(quarantined)


def fragments_of(library, entry):
    extents = library.open_content(entry.content).extents
    return [library.fragment(number) for number in extents.fragments]


def closure_of(library, number):
    found, waiting = set(), [number]
    while waiting:
        member = waiting.pop()
        found.add(member)
        waiting += library.bases(member)
    return found


def test_what_decodes_again_leaves_quarantine(path):
    number = chain(path)[-1]
    with FragmentLibrary.open(path) as library:
        flip_fragment(library, number)
        library.check(repair=True)
        flip_fragment(library, number)
        report = library.check(repair=True)
        assert report.problems == ()
        assert rows(path, "SELECT * FROM quarantine") == []


def test_only_decoding_finds_a_file_with_another_digest(path):
    content, extents = rows(path, "SELECT number, extents FROM contents WHERE size > 10000")[0]
    sealed = ExtentMap.parse(extents).pack(content, bytes(32))
    sql = "UPDATE contents SET sha256 = ?, extents = ? WHERE number = ?"
    write_catalog(path, sql, bytes(32), sealed, content)
    # The manifest in the packs has the right one: that is told without decoding.
    assert kinds(check(path)) == ["repairable"]
    report = check(path, data=True)
    (problem,) = [problem for problem in report.problems if problem.kind == "lost"]
    assert "SHA-256" in problem.what
    assert problem.files


# --- packs as a whole


def test_a_missing_pack_is_one_problem_that_names_every_file(packs):
    victim = packs_of(packs)[1]
    victim.unlink()
    with FragmentLibrary.open(packs) as library:
        report = library.check()
        lost = failed(library)
    (problem,) = [problem for problem in report.problems if problem.kind == "lost"]
    assert "pack 2 is missing" in problem.what
    assert len(problem.fragments) > 3
    assert set(problem.files) == lost


@pytest.mark.parametrize("share", [0, 0.3, 0.9])
def test_a_truncated_pack_is_named(packs, share):
    victim = packs_of(packs)[0]
    data = victim.read_bytes()
    victim.write_bytes(data[: int(len(data) * share)])
    with FragmentLibrary.open(packs) as library:
        report = library.check()
        lost = failed(library)
        assert lost_files(report) == lost
        assert any("pack" in problem.what for problem in report.problems)
        library.check(repair=True)
        report = library.check(data=True)
        assert lost_files(report) == lost
        assert set(kinds(report)) == {"lost"}


def test_packs_under_each_others_names_are_named(packs):
    one, two, *_ = packs_of(packs)
    data = one.read_bytes()
    one.write_bytes(two.read_bytes())
    two.write_bytes(data)
    report = check(packs)
    assert {"pack 2 under another name" in p.what for p in report.problems if p.kind == "lost"} == {
        True,
        False,
    }


@pytest.mark.parametrize("number", [1, 3])
@pytest.mark.parametrize("place", [0, 8, 30, 60])
def test_a_damaged_pack_header_is_written_again(packs, number, place):
    victim = pack_path(packs, number)
    good = victim.read_bytes()
    flip(victim, place)
    with FragmentLibrary.open(packs) as library:
        report = library.check()
        (problem,) = report.problems
        assert problem.kind == "repairable"
        assert set(problem.files) == failed(library)
        report = library.check(repair=True, data=True)
        assert report.problems == ()
        assert victim.read_bytes()[:64] == good[:64]
        assert not failed(library)
        assert rows(packs, "SELECT * FROM quarantine") == []


def test_missing_directories_are_named(packs):
    (packs / "staging").rmdir()
    assert kinds(check(packs)) == ["repairable"]
    assert check(packs, repair=True).problems == ()
    shutil.rmtree(packs / "packs")
    assert set(kinds(check(packs))) == {"lost", "repairable"}


def test_a_missing_index_is_made_again_without_a_change_to_other_bytes(packs):
    victim = packs_of(packs)[0]
    good = victim.read_bytes()
    index_offset, _ = PACK_FOOTER.unpack(good, len(good) - PACK_FOOTER.size)
    for place in (index_offset, index_offset + 60, len(good) - 3):
        victim.write_bytes(good)
        flip(victim, place)
        assert kinds(check(packs)) == ["repairable"]
        report = check(packs, repair=True)
        assert report.problems == ()
        assert "pack 1 has its index again" in report.repaired
        assert victim.read_bytes() == good
    assert check(packs, data=True).notes == ()


@pytest.mark.parametrize("first", ["trailer", "record"])
def test_no_damaged_end_is_taken_for_an_index(packs, first):
    """A new index would be put over the last trailer, or over the last records."""
    pack = packs_of(packs)[0]
    batch = scan_of(pack).batches[-1]
    start = batch.end - TRAILER_SIZE if first == "trailer" else batch.records[-1].offset
    data = pack.read_bytes()
    pack.write_bytes(data[:start] + bytes(len(data) - start))
    damaged = pack.read_bytes()
    report = check(packs, repair=True)
    assert pack.read_bytes() == damaged
    assert set(kinds(report)) <= {"lost"}
    assert any("pack 1 hold no readable record" in note for note in report.notes)
    with FragmentLibrary.open(packs) as library:
        assert lost_files(report) == failed(library)
        assert bool(failed(library)) == (first == "record")


def test_a_repair_of_an_index_goes_on_after_it_was_interrupted(packs):
    victim = packs_of(packs)[0]
    good = victim.read_bytes()
    index_offset, _ = PACK_FOOTER.unpack(good, len(good) - PACK_FOOTER.size)
    # The pack was sealed without an index; a repair was killed between rename and commit.
    write_catalog(
        packs,
        "UPDATE packs SET committed_size = ?, file_size = ? WHERE number = 1",
        index_offset,
        index_offset,
    )
    for data in (good, good[:index_offset], good[:-5]):
        victim.write_bytes(data)
        check(packs, repair=True)
        assert victim.read_bytes() == good
        assert check(packs).problems == ()


# --- the catalog


@pytest.mark.parametrize(
    ("sql", "text"),
    [
        ("UPDATE contents SET size = size + 1", "cover"),
        ("UPDATE fragments SET raw_size = 1 WHERE number = 3", "beyond the end"),
        ("DELETE FROM fragments WHERE number = 3", "not in the catalog"),
        ("UPDATE fragments SET offset = offset + 100000000 WHERE number = 3", "bytes count"),
        ("UPDATE fragments SET pack = 77 WHERE number = 3", "which is not in the catalog"),
        ("UPDATE packs SET state = 3", "retired"),
        ("UPDATE contents SET extents = x'00'", "extents"),
        ("DELETE FROM contents", "which is not in the catalog"),
        ("UPDATE models SET parent = x'41'", "where it is not"),
        ("DELETE FROM folders", "folder"),
        ("DELETE FROM sqlite_sequence", "again"),
        ("UPDATE bases SET base = fragment", "predicted from itself"),
        ("UPDATE library SET closure_max = 1", "more than the 1"),
    ],
)
def test_a_catalog_that_breaks_its_rules_is_told_with_the_remedy(path, sql, text):
    write_catalog(path, sql)
    report = check(path)
    assert set(kinds(report)) == {"catalog"}
    assert any(text in problem.what for problem in report.problems)
    assert all("--rebuild" in problem.remedy for problem in report.problems)
    # A repair keeps its hands off: nothing it derives could be believed.
    assert check(path, repair=True).repaired == ()


@pytest.mark.parametrize(
    "sql",
    [
        "DELETE FROM bases WHERE fragment = (SELECT max(fragment) FROM bases)",
        "INSERT INTO signatures VALUES (999999, x'00')",
        "INSERT INTO similar VALUES (5, 999999)",
        "INSERT INTO quarantine VALUES (999999, 1, 'gone')",
        "UPDATE models SET mtime_ns = 5 WHERE number = 1",
    ],
)
def test_what_can_be_derived_is_repaired(path, sql):
    tables = ("contents", "bases", "signatures", "similar", "quarantine", "models")
    before = [rows(path, f"SELECT * FROM {table}") for table in tables]
    write_catalog(path, sql)
    assert set(kinds(check(path))) == {"repairable"}
    report = check(path, repair=True)
    assert report.problems == ()
    assert report.repaired
    assert check(path, data=True).problems == ()
    if "mtime_ns" not in sql:  # there it is the packs that follow the catalog
        assert [rows(path, f"SELECT * FROM {table}") for table in tables] == before


def test_sizes_that_are_out_of_date_are_counted_anew(path):
    before = rows(path, "SELECT number, stored_bytes FROM contents")
    write_catalog(path, "UPDATE contents SET stored_bytes = 7")
    report = check(path)
    assert report.problems == ()
    assert "out of date" in report.notes[0]
    assert check(path, repair=True).notes == ()
    assert rows(path, "SELECT number, stored_bytes FROM contents") == before


def test_a_damaged_database_is_told_with_the_remedy(path):
    data = bytearray((path / "catalog.sqlite").read_bytes())
    data[8192:12288] = bytes(4096)
    (path / "catalog.sqlite").write_bytes(data)
    assert set(kinds(check(path))) == {"catalog"}
    (path / "catalog.sqlite").write_bytes(bytes(data[:100]) + bytes(len(data) - 100))
    with pytest.raises(FormatError, match="check --rebuild"):
        check(path)


def test_a_catalog_older_than_its_packs_is_told_and_not_repaired(path, tmp_path):
    back_up_catalog(path, tmp_path / "backup")
    with FragmentLibrary.open(path) as library:
        library.add([make_model(tmp_path / "new", 3)], AddOptions())
    put_back_catalog(tmp_path / "backup", path)
    report = check(path)
    assert set(kinds(report)) == {"catalog"}
    assert "older than its packs" in report.problems[0].what
    assert check(path, repair=True).repaired == ()


# --- snapshot and leavings


@pytest.mark.parametrize("content", [b"", b"garbage" * 1000, None])
def test_a_snapshot_of_no_use_is_published_anew(path, content):
    if content is None:
        write_catalog(path, "UPDATE library SET generation = generation - 3")
    else:
        (path / "catalog.snapshot").write_bytes(content)
    report = check(path)
    assert "repairable" in kinds(report)
    assert "catalog.snapshot" in " ".join(problem.what for problem in report.problems)
    assert check(path, repair=True).problems == ()


def test_leavings_are_notes_and_go_with_a_repair(path):
    (path / "staging" / "catalog.snapshot.999999").write_bytes(b"left")
    with packs_of(path)[-1].open("ab") as stream:
        stream.write(b"torn" * 100)
    (path / "packs" / "0000000009.pack").write_bytes(b"")
    report = check(path)
    assert report.problems == ()
    assert len(report.notes) == 2
    report = check(path, repair=True)
    assert (report.problems, report.notes) == ((), ())
    assert list((path / "staging").iterdir()) == []
    # Nothing of a pack is evidence that a repair would remove.
    assert {"0000000001.pack", "0000000009.pack"} < {pack.name for pack in packs_of(path)}


def test_a_damaged_manifest_is_written_again(path):
    offset = packs_of(path)[0].read_bytes().index(b"FrRc\x02\x00")
    flip(packs_of(path)[0], offset + 40)
    report = check(path)
    assert kinds(report) == ["repairable"]
    assert "base" in report.problems[0].what
    report = check(path, repair=True)
    assert report.problems == ()
    assert any("MANIFEST" in note for note in report.notes)


def test_nothing_is_called_damaged_that_others_work_on(path, monkeypatch):
    run = Checker.run
    looks = []

    def disturbed(self, *, data):
        findings = run(self, data=data)
        try:
            with writer_lock(path, 0.05):
                looks.append("free")
        except StorageError:
            looks.append("locked")
            return findings
        with FragmentLibrary.open(path) as other:
            (model, *_) = other.models()
            other.move(model.name, model.name + b"x")
        findings.distrust("half of a change was seen")
        return findings

    monkeypatch.setattr(Checker, "run", disturbed)
    report = check(path)
    assert looks == ["free", "free", "free", "locked"]
    assert report.problems == ()
    assert check(path, data=True).problems == ()


def test_what_was_not_decoded_beside_changes_is_decoded_under_the_lock(path, monkeypatch):
    run = Checker.run

    def distrusting(self, *, data):
        findings = run(self, data=data and bool(looks))
        if not looks:
            looks.append(data)
            findings.distrust("half of a change was seen")
            findings.decoded_count = None
        return findings

    looks = []
    monkeypatch.setattr(Checker, "run", distrusting)
    report = check(path, data=True)
    assert report.problems == ()
    assert report.decoded_count == report.fragment_count > 0


def test_a_look_that_others_may_have_disturbed_says_so(path):
    (path / "packs").rename(path / "elsewhere")
    with writer_lock(path, 1.0), FragmentLibrary.open(path, lock_timeout_s=0.05) as library:
        report = library.check()
    assert report.problems
    assert any("others may have been writing" in note for note in report.notes)


def test_a_model_that_is_removed_while_it_is_looked_at_is_no_problem(path, monkeypatch):
    manifest = check_packs.current_manifest

    def removing(catalog, name):
        if name in names:
            names.remove(name)
            with FragmentLibrary.open(path) as other:
                other.remove(name)
        return manifest(catalog, name)

    monkeypatch.setattr(check_packs, "current_manifest", removing)
    with FragmentLibrary.open(path) as library:
        names = [model.name for model in library.models()][:3]
        report = library.check(data=True)
        assert report.problems == ()
        assert names == []
        assert report.decoded_count
        assert {model.name for model in library.models()}
