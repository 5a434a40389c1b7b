"""What is counted, against a plain count with sets over the same catalog."""

from __future__ import annotations

import shutil
import sqlite3

import pytest

from fragfs.library.add import AddOptions
from fragfs.library.catalog import CATALOG_NAME, Catalog
from fragfs.library.library import FragmentLibrary
from fragfs.library.stats import FragmentTable
from tests.library.checks import write_catalog
from tests.library.families import ORDER, make_library


class Oracle:
    """The same figures, counted fragment by fragment."""

    def __init__(self, library: FragmentLibrary) -> None:
        database = sqlite3.connect(library.path / CATALOG_NAME)
        rows = database.execute("SELECT number, raw_size, record_size FROM fragments").fetchall()
        self.raw = {number: raw for number, raw, _ in rows}
        self.record = {number: record for number, _, record in rows}
        self.bases: dict[int, set[int]] = {}
        for fragment, base in database.execute("SELECT fragment, base FROM bases"):
            self.bases.setdefault(fragment, set()).add(base)
        database.close()
        self.own: dict[bytes, set[int]] = {}
        for model in library.models():
            self.own[model.name] = {
                extent.fragment
                for file in library.files(model.name)
                for extent in library.open_content(file.content).extents
            }

    def closure(self, numbers: set[int]) -> set[int]:
        found: set[int] = set()
        waiting = list(numbers)
        while waiting:
            number = waiting.pop()
            if number not in found:
                found.add(number)
                waiting += self.bases.get(number, ())
        return found

    def needed(self, name: bytes) -> set[int]:
        return self.closure(self.own[name])

    def others(self, name: bytes) -> set[int]:
        return set().union(*(self.needed(other) for other in self.own if other != name))

    def stored(self, numbers: set[int]) -> int:
        return sum(self.record[number] for number in numbers)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return make_library(tmp_path_factory.mktemp("family"), 1 << 19)


@pytest.fixture
def family(made):
    return made[0]


@pytest.fixture
def library(made, tmp_path):
    shutil.copytree(made[1], tmp_path / "lib")
    with FragmentLibrary.open(tmp_path / "lib") as library:
        yield library


def check_against_oracle(library: FragmentLibrary) -> None:
    oracle = Oracle(library)
    everything = set().union(*(oracle.needed(name) for name in oracle.own))
    in_files = set().union(*oracle.own.values())
    whole = library.stats()
    assert whole.stored_bytes == oracle.stored(in_files)
    assert whole.exclusive_bytes == oracle.stored(everything)
    assert whole.base_bytes == oracle.stored(everything - in_files)
    assert whole.unreferenced_bytes == oracle.stored(oracle.record.keys() - everything)
    for name, own in oracle.own.items():
        stats = library.stats(name)
        needed, others = oracle.needed(name), oracle.others(name)
        assert stats.stored_bytes == oracle.stored(own)
        assert stats.unique_bytes == sum(oracle.raw[number] for number in own)
        assert stats.exclusive_bytes == oracle.stored(needed - others)
        assert stats.shared_bytes == oracle.stored(own & others)
        assert stats.shared_fragment_count == len(own & others)
        assert stats.base_bytes == oracle.stored(needed - own)
        saved = sum(stats.saved_bytes.values())
        assert saved == stats.logical_bytes - stats.stored_bytes


def test_every_figure_is_what_a_plain_count_says(library):
    check_against_oracle(library)
    stats = library.stats("tuned")
    assert stats.base_bytes > stats.stored_bytes
    assert library.stats().base_bytes == 0


def test_what_others_are_predicted_from_stays_needed(library):
    before = library.stats()
    library.remove("base")
    check_against_oracle(library)
    after = library.stats()
    assert after.base_bytes > 0.9 * library.stats("copy").base_bytes > 0
    # Only the header and the like of the removed model can go.
    assert 0 < after.unreferenced_bytes < 5_000
    assert after.exclusive_bytes + after.unreferenced_bytes == before.exclusive_bytes


def test_savings_are_split_by_mechanism(library):
    saved = library.stats().saved_bytes
    assert {"exact", "planes", "cast"} <= saved.keys()
    assert saved["cast"] > 0
    copy = library.stats("copy").saved_bytes
    assert max(copy, key=copy.get) == "cast"
    assert copy["cast"] > 0.9 * library.stats("copy").logical_bytes


def test_bases_belong_to_the_oldest_model_that_has_them(library, family):
    assert library.stats("base").predicted_bytes == {}
    copied = library.stats("copy").predicted_bytes
    assert copied.keys() == {"base"}
    assert copied["base"] > 0.99 * library.stats("copy").unique_bytes - 5_000
    library.add([family["base"]], AddOptions(name=b"again"))
    library.remove("base")
    assert library.stats("copy").predicted_bytes.keys() == {"again"}
    library.remove("again")
    assert library.stats("copy").predicted_bytes == {"": copied["base"]}


def test_a_removal_says_what_stays_and_for_whom(library):
    oracle = Oracle(library)
    removed = oracle.own[b"base"]
    report = library.remove("base")
    left = {name: own for name, own in oracle.own.items() if name != b"base"}
    in_files = set().union(*left.values())
    kept = (removed & oracle.others(b"base")) - in_files
    assert report.kept_bytes == oracle.stored(kept) > 0
    expected = {name: oracle.stored(oracle.closure(own) & kept) for name, own in left.items()}
    assert dict(report.kept_for) == {name: size for name, size in expected.items() if size}
    sizes = [size for _, size in report.kept_for]
    assert sizes == sorted(sizes, reverse=True)
    assert report.unreferenced_bytes == library.stats().unreferenced_bytes


def test_a_removal_that_nobody_minds_keeps_nothing(library):
    report = library.remove("merge")
    assert (report.kept_bytes, report.kept_for) == (0, ())
    report = library.remove("base", [b"config.json"])
    assert (report.kept_bytes, report.kept_for) == (0, ())
    assert report.removed_bytes == len(b'{"model_type": "test"}')  # as every other model has


def test_a_removed_file_may_be_needed_by_its_own_model(library, family, tmp_path):
    (tmp_path / "pair").mkdir()
    for name in ("base", "copy"):
        source = family[name] / "model.safetensors"
        (tmp_path / "pair" / f"{name}.safetensors").write_bytes(source.read_bytes())
    for name in ORDER:
        library.remove(name)
    library.add([tmp_path / "pair"], AddOptions())
    report = library.remove("pair", [b"base.safetensors"])
    assert [name for name, _ in report.kept_for] == [b"pair"]
    assert report.kept_bytes > 100_000


@pytest.mark.parametrize("name", ["base", "merge"])
def test_damaged_extents_keep_no_model_from_being_removed(library, caplog, name):
    entry = next(e for e in library.files("base") if e.path == b"model.safetensors")
    write_catalog(
        library.path, "UPDATE contents SET extents = x'00' WHERE number = ?", entry.content
    )
    report = library.remove(name)
    assert name.encode() not in {model.name for model in library.models()}
    assert report.file_count == 2
    assert (report.unreferenced_bytes, report.kept_bytes, report.kept_for) == (0, 0, ())
    assert "not known" in caplog.text


def test_closures_are_counted_per_fragment(library):
    oracle = Oracle(library)
    table = FragmentTable(library._catalog)
    numbers = table.closure(table.bases_of(table.closure(table.raw.nonzero()[0])))
    own = table.raw.nonzero()[0]
    assert table.closure_sizes(own).tolist() == [len(oracle.closure({n})) for n in own.tolist()]
    assert max(table.closure_sizes(own)) >= 2
    assert set(numbers.tolist()) == oracle.closure(set().union(*oracle.bases.values()))


def test_an_empty_library_counts_nothing(tmp_path):
    with FragmentLibrary.create(tmp_path / "lib") as library:
        stats = library.stats()
    assert (stats.stored_bytes, stats.exclusive_bytes, stats.unreferenced_bytes) == (0, 0, 0)
    assert stats.predicted_bytes == {}


@pytest.mark.slow
def test_large_tables_are_read_in_parts(tmp_path):
    FragmentLibrary.create(tmp_path / "lib").close()
    count = 120_000
    database = sqlite3.connect(tmp_path / "lib" / CATALOG_NAME)
    database.executemany(
        "INSERT INTO fragments VALUES (?, ?, 1, ?, 10, 100, 4)",
        ((n, n.to_bytes(32, "little"), n) for n in range(1, count + 1)),
    )
    # Chains of four, and a second base for every last one: rows of a fragment meet the parts' ends.
    database.executemany(
        "INSERT INTO bases VALUES (?, 0, ?)", ((n, n - 1) for n in range(1, count + 1) if n % 4)
    )
    database.executemany(
        "INSERT INTO bases VALUES (?, 1, ?)", ((n, n - 2) for n in range(3, count + 1, 4))
    )
    database.commit()
    database.close()
    catalog = Catalog(tmp_path / "lib")
    table = FragmentTable(catalog)
    catalog.close()
    assert int(table.record.sum()) == 10 * count
    assert int((table.bases[0] > 0).sum()) == sum(1 for n in range(2, count + 1) if n % 4)
    own = table.raw.nonzero()[0]
    sizes = table.closure_sizes(own)
    assert sizes[7 - 1] == 4  # 7, 6, 5, 4
    assert sizes[8 - 1] == 1
    assert table.closure(own[6:7]).tolist() == [4, 5, 6, 7]
