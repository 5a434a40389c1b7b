"""`optimize`: what it changes, what it never changes, and what it leaves alone."""

from __future__ import annotations

import os
import random
import shutil
import sqlite3
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest

from fragfs.errors import FragmentError
from fragfs.library.decode import NO_SOURCE
from fragfs.library.library import FragmentLibrary
from fragfs.library.optimize import Optimizer
from fragfs.types import Level, LibraryConfig
from tests.library.test_bases import (
    Weights,
    add,
    assert_good,
    bad_models,
    bases_of,
    check_closures,
    closure,
    flip,
    make_old,
    predictors,
    quantized,
    rows,
    tuned,
    write_model,
)
from tests.models import digests

ELEMENTS = 1 << 14
ORDER = ("base", "tuned", "other", "copy", "tuned copy", "merge", "int8")


def weights(seed: int = 0) -> Weights:
    rng = np.random.default_rng(seed)
    return {"up.weight": (rng.standard_normal((512, 160)) * 0.02).astype(np.float32)}


def write_family(directory: Path) -> dict[str, Path]:
    base = weights()
    one, other = tuned(base, 1), tuned(base, 2)
    half = np.float32(0.5)
    models = {
        "base": (base, "F32"),
        "tuned": (one, "F32"),
        "other": (other, "F32"),
        "copy": (base, "BF16"),
        "tuned copy": (one, "BF16"),
        "merge": ({name: one[name] * half + other[name] * half for name in base}, "F32"),
        "int8": (quantized(base), "I8"),
    }
    return {name: write_model(directory / name, *models[name]) for name in ORDER}


@pytest.fixture(scope="module")
def sources(tmp_path_factory) -> dict[str, Path]:
    return write_family(tmp_path_factory.mktemp("sources"))


@pytest.fixture
def create(tmp_path, sources):
    """Make a library of some of the family, in this order; libraries are closed afterwards."""
    made: list[FragmentLibrary] = []

    def make(*names: str, **settings) -> FragmentLibrary:
        config = LibraryConfig(fragment_elements=ELEMENTS, **settings)
        library = FragmentLibrary.create(tmp_path / f"lib{len(made)}", config)
        made.append(library)
        for name in names:
            add(library, sources[name])
        return library

    yield make
    for library in made:
        library.close()


def optimize(library: FragmentLibrary, level: Level | None = None):
    return library.optimize(level, workers=1)


def record_bytes(library: FragmentLibrary) -> int:
    return rows(library, "SELECT coalesce(sum(record_size), 0) FROM fragments")[0][0]


def check_stored_bytes(library: FragmentLibrary) -> None:
    for model in library.models():
        total = 0
        for entry in library.files(model.name):
            numbers = {e.fragment for e in library.open_content(entry.content).extents}
            stored = sum(library.fragment(number).record_size for number in numbers)
            assert entry.stored_bytes == stored
            total += stored
        assert model.stored_bytes == total


def check_tables(library: FragmentLibrary) -> None:
    """No table says anything about a fragment that is not there."""
    for table, column in (
        ("bases", "fragment"),
        ("bases", "base"),
        ("signatures", "fragment"),
        ("similar", "fragment"),
    ):
        sql = f"SELECT DISTINCT {column} FROM {table} WHERE {column} NOT IN"
        assert rows(library, f"{sql} (SELECT number FROM fragments)") == [], (table, column)


def check(library: FragmentLibrary) -> None:
    assert_good(library)
    check_closures(library)
    check_stored_bytes(library)
    check_tables(library)


# --- what it finds


def test_an_empty_library(create):
    library = create()
    report = optimize(library)
    assert (report.examined_count, report.changed_count, report.before_bytes) == (0, 0, 0)


@pytest.mark.slow
def test_a_base_that_came_after_its_fine_tune(create):
    library = create("tuned", "copy", "base")
    before = record_bytes(library)
    report = optimize(library)
    assert report.before_bytes == before
    assert report.after_bytes == record_bytes(library) <= before
    assert report.examined_count > 0
    check(library)


def test_an_int8_copy_that_came_before_its_original(create):
    library = create("int8", "base")
    assert "QUANTIZE" not in predictors(library, "int8")
    report = optimize(library)
    assert predictors(library, "int8") == {"QUANTIZE"}
    assert report.after_bytes < report.before_bytes
    check(library)


@pytest.mark.slow
def test_an_int8_copy_is_found_whatever_else_is_there(create):
    """A plan that is worse for the others must not cost the copy its original."""
    library = create(*reversed(ORDER))
    optimize(library)
    assert predictors(library, "int8") == {"QUANTIZE"}
    check(library)


@pytest.mark.slow
def test_a_narrow_copy_that_came_before_its_original(create):
    library, other = create("copy", "base"), create("base", "copy")
    optimize(library)
    assert record_bytes(library) <= 1.02 * record_bytes(other)
    check(library)


@pytest.fixture(scope="module")
def in_order(tmp_path_factory, sources):
    """What the family takes, added in its own order."""
    config = LibraryConfig(fragment_elements=ELEMENTS)
    with FragmentLibrary.create(tmp_path_factory.mktemp("ordered") / "lib", config) as library:
        for name in ORDER:
            add(library, sources[name])
        return record_bytes(library)


@pytest.mark.slow
@pytest.mark.parametrize("order", ["reversed", 3, 8])
def test_the_order_of_adding_hardly_matters(create, in_order, order):
    names = list(ORDER)[::-1]
    if isinstance(order, int):
        random.Random(order).shuffle(names)
    library = create(*names)
    optimize(library)
    check(library)
    assert record_bytes(library) <= 1.05 * in_order


@pytest.mark.slow
def test_a_fine_tune_and_copies_in_any_order(create):
    sizes = []
    for order in (("base", "tuned", "copy", "int8"), ("int8", "copy", "tuned", "base")):
        library = create(*order)
        optimize(library)
        check(library)
        sizes.append(record_bytes(library))
    assert max(sizes) <= 1.05 * min(sizes)


@pytest.mark.parametrize(
    "removed",
    [
        ("base",),
        ("base", "tuned", "other", "copy", "merge", "int8"),
        ("base", "tuned", "copy", "tuned copy", "merge", "int8"),
        ("base", "copy", "other"),
        ("tuned", "other", "int8"),
    ],
)
def test_what_was_predicted_from_removed_models_takes_no_more_than_without_them(create, removed):
    library = create(*ORDER)
    for name in removed:
        library.remove(name)
    # At once: what nothing needs any more is still there, and must not stand in the way.
    optimize(library)
    fresh = create(*(name for name in ORDER if name not in removed))
    optimize(fresh)
    assert record_bytes(library) <= 1.03 * record_bytes(fresh)
    check(library)


@pytest.mark.slow
@pytest.mark.parametrize("closure_max", [1, 2, 3, 4])
def test_closures_stay_within_the_limit(create, closure_max):
    library = create("merge", "copy", "tuned", "other", "base", closure_max=closure_max)
    before = record_bytes(library)
    optimize(library)
    sizes = check_closures(library)
    assert (max(sizes) == 1) == (closure_max == 1)
    assert record_bytes(library) <= before
    check(library)


@pytest.mark.slow
@pytest.mark.parametrize("closure_max", [1, 2, 3])
def test_only_what_may_serve_as_a_base_is_signed(create, closure_max):
    """FORMAT.md, "Signatures": closures of signed fragments are smaller than the limit."""
    library = create("int8", "copy", "tuned", "base", closure_max=closure_max)
    optimize(library)
    bases = bases_of(library)
    signed = {number for (number,) in rows(library, "SELECT fragment FROM signatures")}
    assert {number for number in signed if len(closure(bases, number)) >= closure_max} == set()


@pytest.mark.slow
def test_a_second_run_changes_almost_nothing(create):
    library = create("int8", "copy", "tuned", "base")
    first = optimize(library)
    assert first.changed_count
    packs = sorted(os.listdir(library.path / "packs"))
    second = optimize(library)
    assert second.changed_count <= 0.02 * second.examined_count
    assert second.before_bytes == first.after_bytes
    assert 0.999 * second.before_bytes <= second.after_bytes <= second.before_bytes
    assert sorted(os.listdir(library.path / "packs")) == packs
    check(library)


def test_nothing_to_change_writes_nothing(create):
    library = create("base", "copy")
    optimize(library)
    generation = rows(library, "SELECT generation FROM library")
    packs = digests(library.path / "packs")
    report = optimize(library)
    assert (report.changed_count, report.freed_bytes) == (0, 0)
    assert rows(library, "SELECT generation FROM library") == generation
    assert digests(library.path / "packs") == packs


# --- levels


@pytest.mark.slow
def test_level_small_never_makes_it_larger(create):
    library = create("base", "tuned", "merge")
    for _ in range(2):
        before = record_bytes(library)
        report = optimize(library, Level.SMALL)
        assert report.after_bytes == record_bytes(library) <= before
    check(library)


def test_level_fast_encodes_everything_anew(create):
    library = create("base", "tuned")
    places = dict(rows(library, "SELECT number, offset FROM fragments WHERE raw_size >= 4096"))
    report = optimize(library, Level.FAST)
    assert report.changed_count >= len(places)
    check(library)


def test_the_librarys_own_level_is_not_another_one(create):
    library = create("base", "tuned")
    assert optimize(library, Level.BALANCED).changed_count == 0
    check(library)


# --- what it leaves alone


@pytest.mark.slow
def test_signatures_of_format_1_are_made(tmp_path, sources):
    config = LibraryConfig(fragment_elements=ELEMENTS)
    with FragmentLibrary.create(tmp_path / "lib", config) as library:
        add(library, sources["base"])
    make_old(tmp_path / "lib")
    with FragmentLibrary.open(tmp_path / "lib") as library:
        assert rows(library, "SELECT count(*) FROM signatures") == [(0,)]
        optimize(library)
        unsigned = "SELECT count(*) FROM fragments WHERE raw_size >= 4096 AND number NOT IN"
        assert rows(library, f"{unsigned} (SELECT fragment FROM signatures)") == [(0,)]
        report = add(library, sources["tuned"])
        assert predictors(library, "tuned") == {"DELTA"}
        assert report.new_bytes < 0.8 * report.logical_bytes
        check(library)


def largest(library: FragmentLibrary, model: str) -> int:
    [entry] = library.files(model)
    numbers = {extent.fragment for extent in library.open_content(entry.content).extents}
    return max(numbers, key=lambda number: library.fragment(number).record_size)


@pytest.mark.slow
@pytest.mark.parametrize("at", [5, 60, 300])
def test_a_damaged_fragment_is_left_alone(create, at):
    library = create("int8", "tuned", "base")
    number = largest(library, "base")
    before = library.fragment(number)
    bad = bad_models(library)
    assert bad == set()
    flip(library, number, at)
    bad = bad_models(library)
    assert b"base" in bad
    report = optimize(library)
    after = library.fragment(number)
    assert (after.pack, after.offset) == (before.pack, before.offset)
    assert bad_models(library) == bad
    if report.kept:
        (pack, why) = report.kept[0]
        assert pack == before.pack
        assert before.id.short in why or f"pack {pack} at offset {before.offset}" in why


def test_a_damaged_file_header_does_not_stop_it(create):
    library = create("int8", "base")
    [entry] = library.files("base")
    header = library.open_content(entry.content).extents[0].fragment
    flip(library, header, library.fragment(header).record_size - 5)
    with pytest.raises(FragmentError):
        library.decode_fragment(header, NO_SOURCE)
    optimize(library)
    assert bad_models(library) == {b"base"}
    assert predictors(library, "int8") == {"QUANTIZE"}


def test_a_missing_pack_does_not_stop_it(create, sources):
    library = create("base", pack_bytes_max=1 << 20)
    (library.path / "packs" / "0000000001.pack").unlink()
    with FragmentLibrary.open(library.path) as again:
        report = optimize(again)
        assert report.changed_count == 0
        add(again, shutil.copytree(sources["base"], library.path.parent / "again"))
        assert_good(again)


# --- others at the same time


@pytest.mark.slow
def test_what_another_run_drops_meanwhile_stays_gone(create, tmp_path, monkeypatch):
    """One run has planned changes to fragments that another one drops before they are written."""
    library = create("int8", "base")
    commit = Optimizer._commit
    others = []

    def late(self, groups):
        if groups and not others:
            others.append(1)
            with FragmentLibrary.open(library.path) as other:
                other.remove("int8")
                other.optimize(workers=1)
        return commit(self, groups)

    monkeypatch.setattr(Optimizer, "_commit", late)
    optimize(library)
    monkeypatch.undo()
    assert others
    add(library, write_model(tmp_path / "new", tuned(weights(), 4)))
    add(library, write_model(tmp_path / "again", quantized(tuned(weights(), 5)), "I8"))
    check(library)


def test_a_model_that_is_removed_meanwhile_does_not_stop_it(create, monkeypatch):
    library = create("base", "tuned")
    manifest = FragmentLibrary.manifest
    removed = []

    def late(self, name):
        if not removed:
            removed.append(name)
            with FragmentLibrary.open(library.path) as other:
                other.remove("tuned")
        return manifest(self, name)

    monkeypatch.setattr(FragmentLibrary, "manifest", late)
    optimize(library)
    assert removed
    check(library)


@pytest.mark.slow
def test_readers_read_on(create):
    """A thread of another reader verifies in a loop while everything moves."""
    library = create("int8", "tuned", "base", pack_bytes_max=1 << 20)
    problems: list[str] = []
    rounds = 0
    stop = threading.Event()

    def read() -> None:
        nonlocal rounds
        with FragmentLibrary.open(library.path) as reader:
            while not stop.is_set():
                problems.extend(str(x.error) for x in reader.verify(workers=1) if x.error)
                rounds += 1

    thread = threading.Thread(target=read)
    thread.start()
    try:
        for level in (None, Level.FAST, Level.SMALL):
            optimize(library, level)
    finally:
        stop.set()
        thread.join()
    assert problems == []
    assert rounds >= 2
    check(library)


ADD = """
import sys
from pathlib import Path
from fragfs.library import ingest
from fragfs.library.add import AddOptions
from fragfs.library.library import FragmentLibrary
ingest._BATCH_S = 0.0  # give the lock up often
with FragmentLibrary.open(sys.argv[1]) as library:
    print("ready", flush=True)
    for path in sys.argv[2:]:
        library.add([Path(path)], AddOptions(workers=1))
        library.remove(Path(path).name)
        library.add([Path(path)], AddOptions(workers=1))
"""


@pytest.mark.slow
def test_an_add_in_another_process(create, sources, tmp_path):
    library = create("int8", "tuned", "base")
    more = [write_model(tmp_path / f"more{n}", tuned(weights(), 10 + n)) for n in range(3)]
    more.append(shutil.copytree(sources["other"], tmp_path / "other"))
    process = subprocess.Popen(
        [sys.executable, "-c", ADD, str(library.path), *map(str, more)],
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    runs = 0
    while process.poll() is None:
        optimize(library, Level.FAST if runs % 2 else None)
        runs += 1
    process.stdout.close()
    assert process.returncode == 0
    assert runs
    check(library)
    for path in more:
        [entry] = library.files(path.name)
        assert {os.fsdecode(entry.path): entry.sha256.hex()} == digests(path)
    optimize(library)
    check(library)


@pytest.mark.slow
def test_two_runs_at_once(create):
    library = create("int8", "tuned", "base")
    program = (
        "import sys; from fragfs.library.library import FragmentLibrary;"
        " FragmentLibrary.open(sys.argv[1]).optimize(workers=1)"
    )
    processes = [
        subprocess.Popen([sys.executable, "-c", program, str(library.path)]) for _ in range(2)
    ]
    assert [process.wait(timeout=60) for process in processes] == [0, 0]
    check(library)


def test_catalog_integrity_after_a_run(create):
    library = create("tuned", "base")
    optimize(library, Level.FAST)
    connection = sqlite3.connect(library.path / "catalog.sqlite")
    assert connection.execute("PRAGMA integrity_check").fetchone() == ("ok",)
    connection.close()
