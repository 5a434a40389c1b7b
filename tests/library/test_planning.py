"""What the planner asks a catalog."""

from __future__ import annotations

import pytest

from fragfs.library.catalog import CATALOG_NAME, Catalog, create_catalog
from fragfs.library.closure import Closures
from fragfs.library.planning import CatalogSignatureRows, look_up_ahead
from fragfs.similarity.index import SimilarityMatch
from fragfs.types import Dtype, LibraryConfig
from tests.similarity.rows_suite import ROWS_CHECKS


@pytest.fixture
def catalog(tmp_path):
    create_catalog(tmp_path / CATALOG_NAME, bytes(16), LibraryConfig(), 0)
    catalog = Catalog(tmp_path)
    yield catalog
    catalog.close()


class WritableCatalogRows(CatalogSignatureRows):
    """Rows in a catalog, put there without a writer."""

    def __init__(self, catalog):
        super().__init__(catalog)
        self._tables = catalog

    def add(self, number, signature, hint_keys=()):
        with self._tables.transaction() as connection:
            connection.execute(
                "INSERT OR REPLACE INTO signatures VALUES (?, ?)", (number, signature.sketch)
            )
            connection.executemany(
                "INSERT OR IGNORE INTO similar VALUES (?, ?)",
                [(key, number) for key in (*signature.keys, *hint_keys)],
            )


@pytest.mark.parametrize("check", ROWS_CHECKS)
def test_rows(check, catalog):
    check(WritableCatalogRows(catalog))


def test_bases_of_many_fragments_are_those_of_each(catalog):
    rows = [(7, 1, 5), (7, 0, 9), (9, 0, 5), (5, 0, 3)]
    with catalog.transaction() as connection:
        connection.executemany("INSERT INTO bases VALUES (?, ?, ?)", rows)
    numbers = [7, 9, 4]
    assert catalog.bases_of(numbers) == {7: (9, 5), 9: (5,), 4: ()}
    assert catalog.bases_of(numbers) == {number: catalog.bases(number) for number in numbers}
    assert catalog.bases_of([]) == {}


def test_closures_are_looked_up_for_some_matches_at_a_time():
    asked = []

    def find_bases(numbers):
        asked.append(sorted(numbers))
        return dict.fromkeys(numbers, ())

    matches = [SimilarityMatch(number, 0.0, Dtype.F32) for number in range(30)]
    found = look_up_ahead(matches, Closures(find_bases))
    assert next(found) == matches[0]
    assert len(asked) == 1
    assert 0 in asked[0]
    assert len(asked[0]) < len(matches)
    assert list(found) == matches[1:]
    assert sorted(number for numbers in asked for number in numbers) == list(range(30))
