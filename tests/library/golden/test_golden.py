"""Libraries that earlier versions wrote: they must open, verify and work for ever."""

from __future__ import annotations

import hashlib
import json
import os
import sqlite3
from pathlib import Path

import numpy as np
import pytest

from fragfs.library.add import AddOptions
from fragfs.library.library import FragmentLibrary
from fragfs.types import LIBRARY_FORMAT_VERSION, Predictor
from tests.archives import unpack
from tests.models import digests, safetensors_bytes

GOLDEN = Path(__file__).parent
FILES = {
    "format1/library.tar.gz": "a7d030575707508db96aa6985ea88de7cefbc4fbe4f2a6a1e69f5dd07bb97257",
    "format1/expected.json": "ff067383ae3dbf3f3f487ca25684101ac3118b4778e56d8bc543d9926b79db78",
    "format2/library.tar.gz": "ed3ab26ae1e18bfc58ee7a82cd39a47769e11045ecce8d1b4d90f8aafa8c163a",
    "format2/expected.json": "503178704292c4bb2ff326a3dec5502fcbd01c7368dd00aeb1af4787de2b5d4d",
    "format3/library.tar.gz": "1fa939129b63c4b6fa4e939895bcf8624c1f2da799fc26236ba8fbdd73efdab8",
    "format3/expected.json": "da6654cc55013250e72087fd6f4fc5d5eaa4633fa188a71ea0384d250fecb2e3",
}
"""What was made once and is never made again."""


VERSIONS = range(1, LIBRARY_FORMAT_VERSION + 1)


def expected(version: int) -> dict[str, dict[str, str]]:
    found = json.loads((GOLDEN / f"format{version}" / "expected.json").read_text())
    assert found["format"] == version
    return found["models"]


@pytest.fixture(params=VERSIONS)
def version(request):
    return request.param


@pytest.fixture
def path(version, tmp_path):
    """A copy of a golden library."""
    unpack(GOLDEN / f"format{version}" / "library.tar.gz", tmp_path)
    return tmp_path / "library"


def user_version(path: Path) -> int:
    connection = sqlite3.connect(path / "catalog.sqlite")
    try:
        return connection.execute("PRAGMA user_version").fetchone()[0]
    finally:
        connection.close()


def shown(library: FragmentLibrary) -> dict[str, dict[str, str]]:
    return {
        os.fsdecode(model.name): {
            os.fsdecode(entry.path): entry.sha256.hex() for entry in library.files(model.name)
        }
        for model in library.models()
    }


def assert_whole(library: FragmentLibrary, models: dict[str, dict[str, str]]) -> None:
    assert shown(library) == models
    assert [item.error for item in library.verify() if item.error] == []


@pytest.mark.parametrize("name", FILES)
def test_golden_files_never_change(name):
    assert hashlib.sha256((GOLDEN / name).read_bytes()).hexdigest() == FILES[name]


def test_a_golden_library_opens_and_verifies(path, version, tmp_path):
    assert user_version(path) == version
    with FragmentLibrary.open(path) as library:
        assert user_version(path) == LIBRARY_FORMAT_VERSION
        assert_whole(library, expected(version))
        for name, files in expected(version).items():
            library.export(name, tmp_path / "out" / name)
            assert digests(tmp_path / "out" / name) == files


def test_its_packs_stay_as_they_are_when_it_is_opened(path, version):
    before = digests(path / "packs")
    with FragmentLibrary.open(path) as library:
        assert_whole(library, expected(version))
    assert digests(path / "packs") == before


def test_every_version_has_a_golden_library():
    found = sorted(file.name for file in GOLDEN.glob("format*"))
    assert found == [f"format{number}" for number in VERSIONS]


def test_other_users_can_read_it_once_it_was_opened(path, version):
    with FragmentLibrary.open(path):
        pass
    connection = sqlite3.connect(path / "catalog.snapshot")
    assert connection.execute("PRAGMA user_version").fetchone() == (LIBRARY_FORMAT_VERSION,)
    connection.close()


SINCE_THEN = {2: {Predictor.DECAY}, 3: set()}
"""Added to a format when its golden library was there already; tests/codec has golden records."""


@pytest.mark.parametrize("version", [2, 3], indirect=True)
def test_every_predictor_is_in_the_golden_library(path, version):
    connection = sqlite3.connect(path / "catalog.sqlite")
    found = {code for (code,) in connection.execute("SELECT predictor FROM fragments")}
    connection.close()
    assert found == set(Predictor) - SINCE_THEN[version]


@pytest.mark.parametrize("version", [3], indirect=True)
def test_quarantine_and_unfinished_adds_are_kept(path):
    with FragmentLibrary.open(path) as library:
        # It is sound: somebody only said otherwise.
        (problem,) = library.check(data=True).problems
        assert "good again" in problem.what
        assert library.collect(grace_s=1e12, wait_s=0.1).dropped_count == 0
        assert library.check(data=True, repair=True).problems == ()
        library.collect(grace_s=0, wait_s=0.1)
        assert library.check(data=True).problems == ()
    connection = sqlite3.connect(path / "catalog.sqlite")
    for table in ("quarantine", "unpublished"):
        assert connection.execute(f"SELECT count(*) FROM {table}").fetchone() == (0,)
    connection.close()


@pytest.mark.slow
def test_a_golden_library_takes_an_add_and_optimizes(path, version, tmp_path):
    models = expected(version)
    source = tmp_path / "new"
    source.mkdir()
    rng = np.random.default_rng(9)
    value = (rng.standard_normal((200, 100)) * 0.02).astype("<f4")
    (source / "model.safetensors").write_bytes(
        safetensors_bytes({"new.weight": ("F32", value.shape, value.tobytes())})
    )
    with FragmentLibrary.open(path) as library:
        library.add([source], AddOptions(name=b"org/new"))
        models = {**models, "org/new": digests(source)}
        assert_whole(library, models)
        report = library.optimize(workers=1)
        assert report.after_bytes <= report.before_bytes
        assert report.kept == ()
        assert_whole(library, models)
        library.remove("org/base")
        del models["org/base"]
        library.optimize(workers=1)
        assert_whole(library, models)
    with FragmentLibrary.open(path) as again:
        assert_whole(again, models)


@pytest.mark.parametrize("version", [1], indirect=True)
def test_optimize_finds_what_format_1_could_not_predict(path):
    models = expected(1)
    with FragmentLibrary.open(path) as library:
        before = library.stats().stored_bytes
        report = library.optimize(workers=1)
        assert report.changed_count >= 2
        assert library.stats().stored_bytes < 0.8 * before
        assert_whole(library, models)
