from pathlib import Path

import pytest

from fragfs.library.library import FragmentLibrary
from fragfs.library.version import read_format_version
from fragfs.types import LIBRARY_FORMAT_VERSION
from tests.archives import unpack

GOLDEN = Path(__file__).parent / "golden"


def test_looking_at_an_old_library_leaves_it_old(tmp_path):
    unpack(GOLDEN / "format1" / "library.tar.gz", tmp_path)
    (catalog,) = tmp_path.rglob("catalog.sqlite")
    before = catalog.read_bytes()
    assert read_format_version(catalog.parent) == 1
    assert catalog.read_bytes() == before


def test_a_new_library(tmp_path):
    with FragmentLibrary.create(tmp_path / "odd ?#%41 name") as library:
        assert read_format_version(library.path) == LIBRARY_FORMAT_VERSION


@pytest.mark.parametrize("content", [None, b"", b"no catalog" * 100])
def test_what_is_no_library_has_no_version(tmp_path, content):
    if content is not None:
        (tmp_path / "catalog.sqlite").write_bytes(content)
    assert read_format_version(tmp_path) is None
