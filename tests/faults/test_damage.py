"""Damage to a library, at every file, record, field, page and cell: the matrix of `damages.py`.

Each damage is done to a copy. Then every file is read: each comes out right, or is an error that
says where and what to do, and files whose records were not touched come out right. Reading changes
nothing. What was damaged is found: by a reader, or by `fragfs check`.
"""

from __future__ import annotations

import shutil
import sqlite3
from collections import Counter
from pathlib import Path

import pytest

from fragfs.errors import FragmentError, NotFoundError
from fragfs.library.add import AddOptions
from fragfs.library.library import FragmentLibrary
from tests.faults.damages import (
    CATALOG,
    Damage,
    cell_damages,
    file_damages,
    pack_damages,
    page_damages,
)
from tests.faults.template import Template

AREAS = ("file", "pack", "page", "cell")


@pytest.fixture(scope="module")
def template(tmp_path_factory) -> Template:
    return Template(tmp_path_factory.mktemp("damage"))


def damages_of(area: str, template: Template) -> list[Damage]:
    return list(
        {
            "file": lambda: file_damages(template.hot, template.older),
            "pack": lambda: pack_damages(template.path),
            "page": lambda: page_damages(template.path),
            "cell": lambda: cell_damages(template.path),
        }[area]()
    )


def read_all(path: Path, expected: dict[tuple[bytes, bytes], bytes]) -> dict:
    """What comes of reading every file: the errors, by (model, path). Wrong bytes fail here."""
    errors: dict[tuple[bytes, bytes], FragmentError] = {}
    try:
        library = FragmentLibrary.open(path)
    except FragmentError as error:
        return dict.fromkeys(expected, error)
    with library:
        for (model, name), data in expected.items():
            try:
                with library.open_file(model, name) as stream:
                    found = stream.read()
            except FragmentError as error:
                errors[model, name] = error
            else:
                assert found == data, f"{model!r}/{name!r} was served with other bytes"
    return errors


def snapshot(path: Path) -> dict[str, bytes | None]:
    """The files of a library, the catalog and its companions left out."""
    return {
        str(file.relative_to(path)): file.read_bytes() if file.is_file() else None
        for file in sorted(path.rglob("*"))
        # Readers hold leases, and make what is missing for it.
        if not file.name.startswith(CATALOG) and file.parent.name != "leases"
    }


def checked(path: Path) -> list[str]:
    """What `fragfs check` says of a library, without the library's own place."""
    try:
        with FragmentLibrary.open(path) as library:
            report = library.check(workers=1)
    except FragmentError as error:
        return [str(error)]
    said = [problem.what for problem in report.problems] + list(report.notes)
    return [text.replace(str(path), "LIBRARY") for text in said]


def judge(template: Template, damage: Damage, path: Path, turn: int) -> bool:
    """Read a damaged library; says whether a reader met the damage."""
    before = snapshot(path)
    touched = template.touched(path)
    expected = template.expected
    if damage.area in (
        "pack",
        "history",
    ):  # the files that were not touched take turns: there are many damages
        others = sorted(expected.keys() - touched)[turn % 3 :: 3]
        expected = {key: expected[key] for key in (*touched, *others)}
    errors = read_all(path, expected)
    assert snapshot(path) == before, "reading has changed the library"
    for error in errors.values():
        assert error.remedy, f"no remedy: {error}"
        if damage.area in ("catalog", "cell") and isinstance(error, NotFoundError):
            continue  # a damaged name is another name: `check` finds it
        named = f"{error} {error.path}"
        assert any(word in named for word in ("pack", "catalog", "library", "fragment")), named
    if damage.area == "harmless":
        assert not errors
    if damage.area in ("pack", "history"):
        assert errors.keys() <= touched, "an error for a file that was not touched"
        assert not any(isinstance(error, NotFoundError) for error in errors.values())
    return bool(errors)


def may_be_unseen(damage: Damage, path: Path, rows: list[tuple]) -> bool:
    """Whether a damage need not be found: nobody needs the bytes, or all rows are as before."""
    if damage.area in ("catalog", "cell"):
        return rows_of(path) == rows
    return damage.area in ("harmless", "history")


QUERIES = (
    "SELECT * FROM library",
    "SELECT number, committed_size, state FROM packs WHERE state != 3",
    "SELECT path, parent FROM folders",
    *(
        f"SELECT * FROM {table}"
        for table in "fragments bases models contents files quarantine unpublished".split()
    ),
)
"""All that says which bytes there are, under which names. Left out: what steers only the choice of
bases (signatures, similar), numbers that were used (a larger one skips some), sizes of files that
nothing is read by, and when a folder of models changed."""


def rows_of(path: Path) -> list[tuple]:
    """The rows of a catalog that count, read without fragfs; none if SQLite refuses."""
    connection = sqlite3.connect(path / CATALOG)
    connection.text_factory = bytes
    try:
        return [row for query in QUERIES for row in connection.execute(query)]
    except sqlite3.DatabaseError:
        return []
    finally:
        connection.close()


@pytest.mark.slow
@pytest.mark.parametrize("area", AREAS)
def test_whatever_is_damaged_files_come_out_right_or_not_at_all(template, area):
    spare = template.copy(hot=area == "file")
    healthy, rows = checked(spare), rows_of(spare)
    failures, unseen = [], []
    met = Counter()
    for turn, damage in enumerate(damages_of(area, template)):
        path = template.copy(hot=area == "file")
        try:
            damage.apply(path)
            is_met = judge(template, damage, path, turn)
            met[is_met] += 1
            if not is_met and not may_be_unseen(damage, path, rows) and checked(path) == healthy:
                unseen.append(damage.name)
        except Exception as error:
            failures.append(f"{damage.name}: {type(error).__name__}: {error}")
        finally:
            shutil.rmtree(path)
    assert not failures, f"{len(failures)} of {met.total() + len(failures)}:\n" + "\n".join(
        failures
    )
    assert not unseen, f"{len(unseen)} found by nobody:\n" + "\n".join(unseen)
    assert met[True] >= 30, "hardly any damage was met by a reader"


WAYS = ("deleted", "emptied", "truncated in half", "first byte flipped", "an older copy", "a pipe")


@pytest.mark.slow
def test_a_writer_makes_nothing_worse(template, tmp_path):
    """Adding to a damaged library works or is refused; what was readable stays so."""
    (tmp_path / "added").mkdir()
    (tmp_path / "added" / "file").write_bytes(b"added")
    failures = []
    added = Counter()
    for damage in damages_of("file", template):
        if not damage.name.endswith(WAYS):
            continue
        path = template.copy(hot=True)
        damage.apply(path)
        before = read_all(path, template.expected)
        expected = dict(template.expected)
        try:
            with FragmentLibrary.open(path, lock_timeout_s=1) as library:
                library.add([tmp_path / "added"], AddOptions(name=b"added"))
        except FragmentError as error:
            added[False] += 1
            if not error.remedy:
                failures.append(f"{damage.name}: no remedy: {error}")
        except Exception as error:
            failures.append(f"{damage.name}: {type(error).__name__}: {error}")
        else:
            added[True] += 1
            expected[b"added", b"file"] = b"added"
        lost = read_all(path, expected).keys() - before.keys()
        if lost:
            failures.append(f"{damage.name}: lost {sorted(lost)[:3]}")
        shutil.rmtree(path)
    assert not failures, "\n".join(failures)
    assert added[True] >= 20
    assert added[False] >= 5


def test_the_table_is_large_and_names_each_damage_once(template):
    names = [damage.name for area in AREAS for damage in damages_of(area, template)]
    assert len(names) >= 1000
    assert not [name for name, count in Counter(names).items() if count > 1]
