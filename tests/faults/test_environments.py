"""Places a library can find itself in: each is an error that says what to do, and loses nothing.

Commands run as a user gives them, in a child of their own.
"""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
import sqlite3
from collections.abc import Sequence
from pathlib import Path

import pytest

from fragfs.errors import StorageError
from fragfs.library import filesystem
from fragfs.library.filesystem import database_error, lock_error, network_kind
from fragfs.library.library import FragmentLibrary
from fragfs.library.lock import writer_lock
from tests.faults.small_disk import as_root
from tests.faults.support import CONFIG, Forker, check_whole, make_libraries, models_of
from tests.library.test_bases import add
from tests.models import digests

pytestmark = pytest.mark.slow

NOBODY = 65534
CHANGES = (
    ["add", "--no-space-check", "{new}"],
    ["rm", "base"],
    ["mv", "tuned", "x"],
    ["gc", "--grace", "0"],
)
"""Commands that change a library; `optimize` only does where there is something to do."""

FILES_MAX = (4, 6, 7, 8, 9, 10, 12, 14, 16, 20, 32, 40)


@pytest.fixture(scope="module")
def place(memory_path):
    place = memory_path / "prepared"
    place.mkdir()
    make_libraries(place)
    return place


@pytest.fixture
def sources(place):
    return place / "sources"


@pytest.fixture
def library(place, disk):
    """A library on a disk of its own, and `new` to add beside it."""
    shutil.copytree(place / "family" / "lib", disk.path / "lib")
    shutil.copytree(place / "sources" / "new", disk.path / "new")
    return disk.path / "lib"


class Runner:
    """Runs commands, each of which must end as expected."""

    def __init__(self, forker: Forker, output: Path, sources: Path) -> None:
        self._forker = forker
        self._output = output
        self._sources = sources

    def __call__(self, library: Path, arguments: Sequence[str], status: int, **options) -> str:
        """What a command printed that had to exit with `status`."""
        found, text = self.either(library, arguments, **options)
        assert found == status, text
        return text

    def either(self, library: Path, arguments: Sequence[str], **options) -> tuple[int, str]:
        """The exit status of a command that may fail, and what it printed."""
        # Below the library's own directory where others may not look at the other one.
        new = library.parent / "new"
        new = new if new.exists() else self._sources / "new"
        filled = [text.format(new=new) for text in arguments]
        status = self._forker.run(library, filled, output=str(self._output), **options)
        assert status in (0, 1), self._forker.text
        assert "internal error" not in self._forker.text
        assert "Traceback" not in self._forker.text
        return status, self._forker.text


@pytest.fixture
def run(forker, tmp_path, sources):
    return Runner(forker, tmp_path / "output", sources)


def same(library: Path) -> list[dict]:
    with FragmentLibrary.open(library) as found:
        return [models_of(found)]


# --- a full disk


@as_root
def test_an_add_that_fills_the_disk(run, disk, sources, tmp_path):
    # In packs as large as they usually are: nothing of it is committed before it fails.
    library = disk.path / "usual"
    FragmentLibrary.create(library).close()
    big = tmp_path / "big"
    big.mkdir()
    (big / "noise.bin").write_bytes(os.urandom(20 << 20))
    text = run(library, ["add", str(big)], 1)
    assert "may need up to" in text
    assert "free some space" in text
    text = run(library, ["add", "--no-space-check", str(big)], 1)
    assert f"{library}/packs/" in text
    assert "No space left on device; free some space and run the command again" in text
    check_whole(library, [{}])
    assert shutil.disk_usage(disk.path).free > 8 << 20, "what cannot be used is not left behind"
    run(library, ["add", "--no-space-check", str(sources / "base")], 0)
    run(library, ["add", "--no-space-check", str(big)], 1)
    check_whole(library, [{"base": digests(sources / "base")}])
    disk.change("size=64m")
    run(library, ["add", "--no-space-check", str(big)], 0)
    with FragmentLibrary.open(library) as found:
        assert models_of(found)["big"] == digests(big)
        assert not [item for item in found.verify() if item.error]


@as_root
@pytest.mark.parametrize("arguments", [["ls"], ["verify"], *CHANGES], ids=" ".join)
def test_a_disk_without_a_byte(arguments, run, disk, library):
    before = same(library)
    disk.fill()
    text = run(library, arguments, 1)
    assert "free some space" in text
    disk.clear()
    check_whole(library, before)
    run(library, arguments, 0)
    with FragmentLibrary.open(library) as found:
        assert not [item for item in found.verify() if item.error]


@as_root
@pytest.mark.parametrize("arguments", CHANGES, ids=" ".join)
def test_a_disk_that_fills_up_at_any_moment(arguments, run, disk, library, place):
    """At every stage: locks, records, catalog, its log, the snapshot."""
    refused = done = 0
    # A garbage collection copies what stays of a pack before it removes it.
    step = 96 << 10 if arguments[0] == "gc" else 36 << 10
    for free_bytes in range(0, 20 * step, step):
        shutil.rmtree(library)
        shutil.copytree(place / "family" / "lib", library)
        before = same(library)
        disk.fill(free_bytes)
        status, text = run.either(library, arguments)
        disk.clear()
        if status:
            refused += 1
            assert "free some space" in text, free_bytes
            check_whole(library, before)
            run(library, arguments, 0)
        else:
            done += 1
        after = same(library)
        check_whole(library, after)
        assert (after == before) == (arguments[0] == "gc")
    assert refused
    assert done


# --- a disk that may not be written


@as_root
def test_a_read_only_disk(run, disk, library, sources):
    before = same(library)
    disk.change("ro")
    assert "base" in run(library, ["ls"], 0)
    run(library, ["verify"], 0)
    for arguments in CHANGES:
        text = run(library, [*arguments], 1)
        assert "cannot change the library" in text, text
        assert "read-only" in text, text
    text = run(disk.path / "other", ["init"], 1)
    assert "the file system is read-only: use a writable one" in text
    disk.change("rw")
    check_whole(library, before)
    for arguments in CHANGES:
        run(library, arguments, 0)


# --- another user's library


@as_root
def test_another_user_reads_what_the_owner_publishes(run, library):
    assert "base" in run(library, ["ls"], 0, user=NOBODY)
    run(library, ["verify"], 0, user=NOBODY)
    for arguments in CHANGES:
        text = run(library, arguments, 1, user=NOBODY)
        assert "this user cannot change the library" in text
        assert "run the command as the library's owner" in text
    run(library, ["mv", "base", "renamed"], 0)
    text = run(library, ["ls"], 0, user=NOBODY)
    assert "renamed" in text
    assert "base" not in text
    run(library, ["verify"], 0, user=NOBODY)


@as_root
def test_a_permission_that_is_taken_away_and_given_back(run, library):
    before = same(library)
    (library / "packs").chmod(0o700)
    text = run(library, ["verify"], 1, user=NOBODY)
    assert "ask the library's owner for permission to read it" in text
    (library / "packs").chmod(0o755)
    run(library, ["verify"], 0, user=NOBODY)
    library.chmod(0o700)
    assert "check the owner and the permissions" in run(library, ["ls"], 1, user=NOBODY)
    library.chmod(0o755)
    assert "base" in run(library, ["ls"], 0, user=NOBODY)
    check_whole(library, before)


@as_root
@pytest.mark.parametrize("lost", ["packs", "staging", "lock", "packs/0000000001.pack"])
def test_an_owner_who_lost_a_permission(lost, run, library):
    before = same(library)
    for path in (library, *library.rglob("*")):
        os.chown(path, NOBODY, NOBODY)
    mode = (library / lost).stat().st_mode
    (library / lost).chmod(0o555 if (library / lost).is_dir() else 0o444)
    text = run(library, ["add", "--no-space-check", "{new}"], 1, user=NOBODY)
    assert "check the owner and the permissions" in text
    assert str(library) in text
    check_whole(library, before)
    (library / lost).chmod(mode)
    for path in (library, *library.rglob("*")):
        os.chown(path, NOBODY, NOBODY)
    run(library, ["add", "--no-space-check", "{new}"], 0, user=NOBODY)


# --- too many open files


def test_too_few_open_files(run, place, scratch):
    refused = done = 0
    for files_max in FILES_MAX:
        path = scratch / f"lib{files_max}"
        shutil.copytree(place / "family" / "lib", path)
        before = same(path)
        for arguments in (["ls"], ["verify"], *CHANGES):
            status, text = run.either(path, arguments, files_max=files_max)
            if status == 0:
                done += 1
            else:
                refused += 1
                assert "raise the limit on open files (ulimit -n)" in text, (files_max, arguments)
                check_whole(path, before)
            before = same(path)
        shutil.rmtree(path)
    assert refused
    assert done > 2 * len(CHANGES)


# --- a clock that goes backwards


def test_a_clock_that_goes_backwards(place, sources, scratch):
    day_ns = 86_400 * 10**9
    at = [2_000 * day_ns]

    def now_ns() -> int:
        at[0] -= day_ns
        return at[0]

    path = scratch / "lib"
    with FragmentLibrary.create(path, CONFIG, now_ns=now_ns) as library:
        for name in ("int8", "gone", "tuned", "base", "new"):
            add(library, sources / name)
        generation = library.generation()
        library.remove("gone")
        library.move("tuned", "org/tuned")
        add(library, sources / "update" / "base", update=True)
        assert library.collect().dropped_count, "what is no model's is found, whatever the time"
        library.optimize(workers=1)
        assert library.generation() > generation
        expected = {
            "int8": digests(sources / "int8"),
            "new": digests(sources / "new"),
            "org/tuned": digests(sources / "tuned"),
            "base": digests(sources / "update" / "base"),
        }
    check_whole(path, [expected])


# --- network file systems


@pytest.fixture
def no_locks(monkeypatch):
    """As on a network file system without flock."""

    def refuse(*_: object) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", refuse)


def test_a_file_system_without_locks(place, sources, scratch, no_locks, monkeypatch):
    monkeypatch.setattr(filesystem, "network_kind", lambda _: "nfs4")
    path = scratch / "lib"
    shutil.copytree(place / "family" / "lib", path)
    message = r"this file system \(nfs4, over the network\) has no file locks.*on a local disk"
    with FragmentLibrary.open(path) as library:
        for act in (
            lambda: add(library, sources / "new"),
            lambda: library.remove("base"),
            lambda: library.move("base", "x"),
            lambda: library.collect(),
        ):
            with pytest.raises(StorageError, match=message) as caught:
                act()
            assert caught.value.errno == errno.ENOLCK
        # Reading takes no lock: only a lease, which nobody there could look for.
        assert not [item for item in library.verify() if item.error]
    monkeypatch.undo()
    check_whole(path, same(place / "family" / "lib"))


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS])
def test_locks_that_a_file_system_lacks(number, tmp_path):
    error = lock_error(OSError(number, os.strerror(number)), "cannot lock it", tmp_path)
    assert "keep the library on a local disk" in str(error)
    busy = lock_error(OSError(errno.EACCES, "no"), "cannot lock it", tmp_path)
    assert "check the owner" in str(busy)


@pytest.mark.parametrize("name", ["SQLITE_IOERR_SHMMAP", "SQLITE_IOERR_LOCK", "SQLITE_PROTOCOL"])
def test_a_file_system_on_which_sqlite_has_no_log(name, tmp_path):
    path = tmp_path / "catalog.sqlite"
    path.touch()
    error = sqlite3.OperationalError("disk I/O error")
    error.sqlite_errorname = name
    found = database_error(error, path)
    assert str(path) in str(found)
    assert "cannot share it between processes: keep the library on a local disk" in str(found)


def test_a_database_on_a_network_file_system(tmp_path, monkeypatch):
    monkeypatch.setattr(filesystem, "network_kind", lambda _: "cifs")
    path = tmp_path / "catalog.sqlite"
    path.touch()
    found = database_error(sqlite3.OperationalError("disk I/O error"), path)
    assert "it is on a network file system (cifs): keep the library on a local disk" in str(found)


def test_the_kernel_says_what_is_a_network_file_system(tmp_path):
    device = tmp_path.stat().st_dev
    table = tmp_path / "mountinfo"
    line = "29 1 {}:{} / /srv rw,relatime shared:1 - {} server:/export rw,vers=4.2\n"
    other = line.format(os.major(device) + 1, os.minor(device), "nfs")
    for kind, expected in (("nfs4", "nfs4"), ("fuse.sshfs", "fuse.sshfs"), ("ext4", None)):
        own = line.format(os.major(device), os.minor(device), kind)
        table.write_text(other + own)
        assert network_kind(tmp_path, table) == expected
    assert network_kind(tmp_path / "missing", table) is None
    assert network_kind(tmp_path, tmp_path / "no table") is None


def test_a_second_writer_waits_where_locks_work(tmp_path):
    FragmentLibrary.create(tmp_path / "lib").close()
    with (
        writer_lock(tmp_path / "lib", 1),
        pytest.raises(StorageError, match="another fragfs is writing"),
        writer_lock(tmp_path / "lib", 0.1),
    ):
        pass
