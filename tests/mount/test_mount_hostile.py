"""Odd names, hostile catalogs, poisoned caches and other users, through real mounts."""

import os
import shutil
import sqlite3
import tempfile
from pathlib import Path

import pytest

from fragfs.cache.place import CachePlace, user_directory
from fragfs.cache.shared import SharedFragmentCache, file_name
from fragfs.library.library import FragmentLibrary
from tests.cache.support import place_at
from tests.cli.test_hostile_names import NAMES
from tests.mount.support import make_library, run_reader, source_files

pytestmark = [pytest.mark.mount, pytest.mark.slow]

NOBODY = 65534

AS_NOBODY = """
import os, sys
os.setgroups([])
os.setgid(65534)
os.setuid(65534)
try:
    print(sorted(os.listdir(sys.argv[1])))
    print(open(sys.argv[1] + "/m/f", "rb").read())
except PermissionError:
    print("refused")
"""


@pytest.fixture
def small(tmp_path):
    """A library with one model of a few fragments; (its path, what it holds)."""
    source = tmp_path / "source"
    source.mkdir()
    (source / "f").write_bytes(b"a file")
    (source / "large").write_bytes(os.urandom(3 << 20))
    return make_library(tmp_path / "lib", {b"m": source}), source


def test_odd_names_are_shown_as_they_are(mounts, tmp_path):
    source = os.fsencode(tmp_path / "source")
    for name in NAMES:
        os.makedirs(os.path.join(source, b"d" + name[:200]))
        for path in (name, os.path.join(b"d" + name[:200], name)):
            with open(os.path.join(source, path), "wb") as file:
                file.write(b"content of " + path)
    models = {name: tmp_path / "source" for name in NAMES[:4]} | {b"m": tmp_path / "source"}
    root = mounts(make_library(tmp_path / "lib", models)).mountpoint
    assert sorted(os.listdir(os.fsencode(root))) == sorted(models)
    for model in models:
        shown = os.path.join(os.fsencode(root), model)
        assert source_files(shown) == source_files(source)
        for path in source_files(source):
            with open(os.path.join(shown, path), "rb") as file:
                assert file.read() == b"content of " + path


@pytest.mark.parametrize("name", [b"../../escape", b"a/b", b"", b"..", b"n" * 300])
def test_a_name_that_cannot_be_is_an_io_error_for_its_directory_alone(mounts, small, name):
    path, source = small
    connection = sqlite3.connect(path / "catalog.sqlite")
    connection.execute("UPDATE files SET name = ? WHERE name = x'66'", (name,))
    connection.commit()
    connection.close()
    root = mounts(path).mountpoint
    with pytest.raises(OSError, match="Input/output error"):
        os.listdir(root / "m")
    assert (root / "m" / "large").read_bytes() == (source / "large").read_bytes()
    assert os.listdir(root) == ["m"]
    assert "name" in mounts.read_log()


# --- the shared cache


def poison(place, path, content=None):
    """Fill a cache place with files of the right form and wrong bytes, for every fragment."""
    cache = SharedFragmentCache(place)
    names = []
    with FragmentLibrary.open(path) as library:
        for number in range(1, library.stats().fragment_count + 1):
            fragment = library.fragment(number)
            raw = library.decode_fragment(number, NoSource())
            cache.put(fragment.id, raw)
            names.append(place.directory / file_name(fragment.id))
    for name in names:
        data = bytearray(name.read_bytes())
        data[len(data) // 3] ^= 0x20
        name.write_bytes(data)
    # Not closed: a killed daemon leaves its files.
    return names


class NoSource:
    def get(self, number):
        return None

    def put(self, number, raw, record=None):
        return None


@pytest.mark.parametrize("in_memory", [False, True])
def test_wrong_bytes_in_the_cache_are_never_served(mounts, small, tmp_path, in_memory):
    path, source = small
    shared = Path("/dev/shm") / f"fragfs-test-{os.getpid()}"
    parent = shared if in_memory else tmp_path / "cache"
    parent.mkdir()
    try:
        with FragmentLibrary.open(path) as library:
            uuid = library.uuid
        directory = user_directory(parent) / uuid.hex()
        directory.mkdir(parents=True, mode=0o700)
        user_directory(parent).chmod(0o700)
        made = place_at(directory, in_memory=in_memory)
        place = CachePlace(directory, in_memory, made.bytes_max, made.asked)
        assert poison(place, path)
        root = mounts(path, cache_directory=parent).mountpoint
        for _ in range(2):
            assert (root / "m" / "large").read_bytes() == (source / "large").read_bytes()
    finally:
        shutil.rmtree(parent, ignore_errors=True)


@pytest.mark.parametrize("how", ["link", "group-writable", "somebody else's"])
def test_a_cache_directory_that_cannot_be_trusted_is_not_used(mounts, small, tmp_path, how):
    path, source = small
    parent, elsewhere = tmp_path / "cache", tmp_path / "elsewhere"
    parent.mkdir()
    elsewhere.mkdir(mode=0o700)
    user = user_directory(parent)
    if how == "link":
        user.symlink_to(elsewhere)
    elif how == "group-writable":
        user.mkdir()
        user.chmod(0o770)
    elif os.geteuid() == 0:
        user.mkdir(mode=0o700)
        os.chown(user, NOBODY, NOBODY)
    else:
        pytest.skip("only root can give a directory away")
    root = mounts(path, cache_directory=parent).mountpoint
    assert (root / "m" / "large").read_bytes() == (source / "large").read_bytes()
    assert "no shared fragment cache" in mounts.read_log()
    assert list(elsewhere.iterdir()) == []
    assert how == "link" or list(user.iterdir()) == []


# --- other users


@pytest.fixture
def public_point():
    """A mount point that other users can reach; removed after the mount."""
    point = Path(tempfile.mkdtemp(prefix="fragfs-test-"))
    point.chmod(0o755)
    yield point
    point.rmdir()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
@pytest.mark.parametrize(
    ("options", "is_refused"),
    [
        ({}, True),
        ({"allow_other": True}, False),
        ({"allow_other": True, "umask": 0o277}, True),
    ],
)
def test_other_users_read_only_what_they_are_given(
    public_point, mounts, small, options, is_refused
):
    """Without allow_other the kernel refuses, with it default_permissions does."""
    path, _ = small
    root = mounts(path, public_point, **options).mountpoint
    said = run_reader(AS_NOBODY, root).stdout
    assert ("refused" in said) == is_refused
    assert is_refused or "a file" in said
