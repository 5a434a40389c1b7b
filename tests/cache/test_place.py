"""Where the cache goes and how large it may get."""

import contextlib
import os
import shutil
import stat
import subprocess
import threading
from pathlib import Path

import pytest

from fragfs.cache.place import (
    CACHE_BYTES_MIN,
    SHARED_MEMORY,
    available_memory,
    choose_place,
    measure_budget,
)
from fragfs.cache.users import begin_use, end_use
from fragfs.errors import StorageError
from tests.cache.support import Child

UUID = bytes(range(16))

needs_shared_memory = pytest.mark.skipif(
    not SHARED_MEMORY.is_dir() or shutil.disk_usage(SHARED_MEMORY).free < 256 << 20,
    reason="needs 256 MiB of shared memory",
)


@pytest.fixture
def memory(tmp_path_factory):
    """A directory in shared memory."""
    name = tmp_path_factory.mktemp("name").parent.name + "-" + str(os.getpid())
    made = SHARED_MEMORY / f"fragfs-test-{name}"
    made.mkdir()
    yield made
    shutil.rmtree(made)


@pytest.fixture
def small_memory(tmp_path):
    """A tmpfs of 64 MiB, as containers have it."""
    made = tmp_path / "shm"
    made.mkdir()
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", made], capture_output=True, check=False
    )
    if done.returncode:
        pytest.skip(f"no tmpfs can be mounted: {done.stderr.decode().strip()}")
    yield made
    subprocess.run(["umount", "--lazy", made], check=True)


# --- the directory


@needs_shared_memory
def test_shared_memory_is_preferred(memory, tmp_path):
    place = choose_place(UUID, disk=tmp_path / "disk", shared_memory=memory)
    assert place.in_memory
    assert place.directory == memory / f"fragfs-{os.geteuid()}" / UUID.hex()
    assert place.bytes_max >= CACHE_BYTES_MIN
    for path in (place.directory, place.directory.parent):
        assert stat.S_IMODE(path.stat().st_mode) == 0o700
    assert not (tmp_path / "disk").exists()


def test_no_cache_is_wanted(tmp_path):
    assert choose_place(UUID, asked=0, directory=tmp_path) is None
    assert list(tmp_path.iterdir()) == []


def test_too_little_shared_memory_goes_to_disk_and_leaves_nothing_there(small_memory, tmp_path):
    place = choose_place(UUID, disk=tmp_path / "a" / "disk", shared_memory=small_memory)
    assert not place.in_memory
    assert place.directory.parent.parent == tmp_path / "a" / "disk"
    assert not list(small_memory.glob("*/*"))


def test_too_little_shared_memory_and_no_disk_is_no_cache(small_memory):
    assert choose_place(UUID, shared_memory=small_memory) is None


def test_who_asks_for_little_gets_it_in_little_shared_memory(small_memory, tmp_path):
    place = choose_place(UUID, asked=4 << 20, disk=tmp_path, shared_memory=small_memory)
    assert place.in_memory
    assert place.bytes_max == place.asked == 4 << 20


def test_a_named_directory_is_taken_and_made(tmp_path):
    place = choose_place(UUID, asked=1 << 20, directory=tmp_path / "new" / "cache")
    assert place.directory.parent.parent == tmp_path / "new" / "cache"


def test_a_system_without_shared_memory_uses_the_disk_and_makes_no_shared_memory(tmp_path):
    place = choose_place(UUID, disk=tmp_path / "disk", shared_memory=tmp_path / "dev" / "shm")
    assert place.directory.parent.parent == tmp_path / "disk"
    assert not (tmp_path / "dev").exists()


def test_a_place_is_chosen_while_the_last_user_leaves_it(tmp_path):
    """As after a kill: the helpers of the one mount end while the next one starts."""
    place = choose_place(UUID, asked=1 << 20, directory=tmp_path)
    done = threading.Event()

    def come_and_go():
        while not done.is_set():
            end_use(begin_use(place.directory), place.directory, remove=True)

    thread = threading.Thread(target=come_and_go)
    thread.start()
    try:
        chosen = [choose_place(UUID, asked=1 << 20, directory=tmp_path) for _ in range(500)]
    finally:
        done.set()
        thread.join()
    assert {one and one.directory for one in chosen} == {place.directory}


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_what_may_not_be_written_is_passed_over(tmp_path):
    sealed = tmp_path / "sealed"
    sealed.mkdir(mode=0o500)
    place = choose_place(UUID, disk=tmp_path / "disk", shared_memory=sealed)
    assert place.directory.parent.parent == tmp_path / "disk"


@pytest.mark.parametrize("which", ["user", "library"])
def test_a_link_in_the_place_of_the_directory_is_refused(tmp_path, which):
    """Somebody else made it first, to read or change what is served."""
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir(mode=0o700)
    user = tmp_path / "shm" / f"fragfs-{os.geteuid()}"
    if which == "user":
        user.parent.mkdir()
        user.symlink_to(elsewhere)
    else:
        user.mkdir(parents=True, mode=0o700)
        (user / UUID.hex()).symlink_to(elsewhere)
    with pytest.raises(StorageError, match="not a directory of this user"):
        choose_place(UUID, asked=1 << 20, directory=tmp_path / "shm")
    assert list(elsewhere.iterdir()) == []


def test_a_file_in_the_place_of_the_directory_is_refused(tmp_path):
    (tmp_path / f"fragfs-{os.geteuid()}").write_bytes(b"")
    with pytest.raises(StorageError, match="not a directory of this user"):
        choose_place(UUID, asked=1 << 20, directory=tmp_path)


@pytest.mark.parametrize("mode", [0o755, 0o770, 0o701])
def test_a_directory_that_others_may_enter_is_refused(tmp_path, mode):
    directory = tmp_path / f"fragfs-{os.geteuid()}"
    directory.mkdir()
    directory.chmod(mode)
    with pytest.raises(StorageError, match=f"mode {mode:o}"):
        choose_place(UUID, asked=1 << 20, directory=tmp_path)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can make what belongs to others")
@pytest.mark.parametrize("which", ["user", "library"])
def test_a_directory_of_somebody_else_is_refused(tmp_path, which):
    directory = tmp_path / "fragfs-0"
    if which == "library":
        directory.mkdir(mode=0o700)
        directory /= UUID.hex()
    directory.mkdir(mode=0o700)
    os.chown(directory, 65534, 65534)
    with pytest.raises(StorageError, match="somebody else made it"):
        choose_place(UUID, asked=1 << 20, directory=tmp_path)


@needs_shared_memory
def test_choosing_removes_what_killed_users_of_other_libraries_left(memory):
    other = choose_place(bytes(16), shared_memory=memory)
    with Child("begin_use(directory); pause()", other.directory).wait_ready() as child:
        choose_place(UUID, shared_memory=memory)
        assert other.directory.exists()
        child.kill()
    choose_place(UUID, shared_memory=memory)
    assert not other.directory.exists()


# --- the budget


@needs_shared_memory
def test_files_that_others_remove_meanwhile_count_nothing(memory, tmp_path, monkeypatch):
    place = choose_place(UUID, disk=tmp_path / "disk", shared_memory=memory)
    for name in ("kept", "removed"):
        (place.directory / name).write_bytes(bytes(1000))
    scandir = os.scandir

    @contextlib.contextmanager
    def removing(directory):
        with scandir(directory) as entries:
            found = list(entries)
        if Path(directory) == place.directory:
            (place.directory / "removed").unlink(missing_ok=True)
        yield iter(found)

    monkeypatch.setattr(os, "scandir", removing)
    again = choose_place(UUID, disk=tmp_path / "disk", shared_memory=memory)
    assert again.directory == place.directory
    assert not (place.directory / "removed").exists()


def test_a_budget_that_was_asked_for_is_given_if_it_fits(tmp_path):
    assert measure_budget(tmp_path, in_memory=False, asked=12345, held=0) == 12345
    assert measure_budget(tmp_path, in_memory=True, asked=12345, held=0) == 12345
    room = shutil.disk_usage(tmp_path).free
    budget = measure_budget(tmp_path, in_memory=False, asked=1 << 60, held=0)
    assert 0 < budget < room
    assert 0 < measure_budget(tmp_path, in_memory=True, asked=1 << 60, held=0) < 1 << 60


def test_a_share_of_what_there_is(small_memory):
    half = measure_budget(small_memory, in_memory=True, asked=None, held=0)
    assert half <= 32 << 20
    (small_memory / "file").write_bytes(bytes(16 << 20))
    # What the cache itself holds is room; what somebody else wrote is not.
    assert measure_budget(small_memory, in_memory=True, asked=None, held=16 << 20) == half
    assert measure_budget(small_memory, in_memory=True, asked=None, held=0) < half


def machine(directory, *, available_kb=8 << 20, cgroup="0::/\n", groups=()):
    """The files that say how much memory there is."""
    (directory / "proc" / "self").mkdir(parents=True)
    (directory / "proc" / "meminfo").write_text(
        f"MemTotal:       99999999 kB\nMemAvailable:   {available_kb} kB\n"
    )
    (directory / "proc" / "self" / "cgroup").write_text(cgroup)
    for path, limit, used, droppable in groups:
        group = directory / "sys" / "fs" / "cgroup" / path
        group.mkdir(parents=True, exist_ok=True)
        (group / "memory.max").write_text(f"{limit}\n")
        (group / "memory.current").write_text(f"{used}\n")
        (group / "memory.stat").write_text(f"anon 5\ninactive_file {droppable}\nfile 7\n")
    return directory


GIB = 1 << 30


@pytest.mark.parametrize(
    ("cgroup", "groups", "expected"),
    [
        ("", (), 8 * GIB),
        ("0::/\n", (), 8 * GIB),
        ("0::/\n", [(".", "max", 1, 0)], 8 * GIB),
        ("0::/\n", [(".", 2 * GIB, GIB, 0)], GIB),  # a container's own root group
        ("0::/a/b\n", [("a/b", 3 * GIB, GIB, GIB // 2)], 2 * GIB + GIB // 2),
        ("0::/a/b\n", [("a/b", "max", 0, 0), ("a", 2 * GIB, GIB, 0)], GIB),
        ("0::/a/b\n", [("a/b", 3 * GIB, 0, 0), ("a", 4 * GIB, 3 * GIB, 0)], GIB),
        ("0::/a\n", [("a", GIB, 2 * GIB, 0)], 0),  # beyond its limit already
        ("0::/a\n", [("a", 100 * GIB, 0, 0)], 8 * GIB),
        ("0::/not/seen/here\n", [(".", GIB, 0, 0)], GIB),
        ("4:memory:/x\n0::/\n", (), 8 * GIB),
    ],
)
def test_memory_is_what_the_machine_and_its_control_groups_allow(
    tmp_path, cgroup, groups, expected
):
    root = machine(tmp_path, cgroup=cgroup, groups=groups)
    assert available_memory(root) == expected


@pytest.mark.parametrize(
    ("path", "mounted"), [("/docker/x", "docker/x"), ("/docker/x", "."), ("/", ".")]
)
def test_memory_of_the_first_kind_of_control_groups(tmp_path, path, mounted):
    root = machine(tmp_path, cgroup=f"7:memory:{path}\n0::/\n")
    group = root / "sys" / "fs" / "cgroup" / "memory" / mounted
    group.mkdir(parents=True)
    (group / "memory.limit_in_bytes").write_text(f"{2 * GIB}\n")
    (group / "memory.usage_in_bytes").write_text(f"{GIB + 5}\n")
    (group / "memory.stat").write_text("cache 1\ninactive_file 77\ntotal_inactive_file 5\n")
    assert available_memory(root) == GIB


def test_nonsense_in_those_files_is_passed_over(tmp_path):
    root = machine(tmp_path, groups=[(".", "what", "is", "this")])
    (root / "proc" / "meminfo").write_text("MemAvailable: much\n")
    assert available_memory(root) > 1 << 50
    assert available_memory(Path("/nowhere")) > 1 << 50


def test_this_machine_says_something_sensible():
    assert 1 << 20 < available_memory() < 1 << 50
