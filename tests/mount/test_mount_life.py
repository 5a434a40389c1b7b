"""Mounting, unmounting, signals, crashes."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from fragfs.errors import NotFoundError, StorageError, UsageError
from fragfs.mount.launch import mount
from fragfs.mount.options import MountOptions
from fragfs.mount.probe import MountState, probe_mount
from fragfs.mount.table import find_mount
from fragfs.mount.unmount import fragfs_mounts, unmount
from fragfs.mount.users import find_servers, find_users
from tests.mount.support import Reader, is_alive, run_reader, wait_until

pytestmark = [pytest.mark.mount, pytest.mark.slow]

SHARD = "org/model/model-00001-of-00004.safetensors"

MAPPED_READER = """
mapped = map_file(sys.argv[1])
mapped[0]
pause()
for at in range(0, len(mapped), 4096):
    mapped[at]
print("read to the end")
"""


@pytest.fixture
def place(tmp_path):
    directory = tmp_path / "place"
    directory.mkdir()
    return directory


def test_mount_returns_when_the_mount_answers_and_unmount_ends_the_daemon(
    mounts, library_path, place
):
    report = mounts(library_path, place)
    assert os.listdir(place) == ["org"]
    assert is_alive(report.pid)
    assert report.mountpoint == place
    assert report.read_ahead_kb == find_mount(place).read_ahead_kb > 0
    assert report.warnings == ()
    assert place in [entry.mountpoint for entry in fragfs_mounts()]
    ended = unmount(place)
    assert (ended.mountpoint, ended.was_dead, ended.users) == (place, False, ())
    assert find_mount(place) is None
    wait_until(lambda: not is_alive(report.pid))
    assert "unmounted" in mounts.read_log()


def test_the_daemon_stands_alone(mounts, library_path):
    """Own session, no terminal; of its helpers, one holds the connection."""
    report = mounts(library_path)
    assert os.getsid(report.pid) != os.getsid(0)
    status = json.loads(os.getxattr(report.mountpoint, "user.fragfs.status"))
    pusher = status["prefill"]["pid"]
    servers = find_servers(find_mount(report.mountpoint))
    assert servers in (sorted([report.pid, pusher]), [])  # [] before Linux 6.13
    children = Path(f"/proc/{report.pid}/task/{report.pid}/children").read_text()
    assert sorted(map(int, children.split())) == sorted([pusher, *status["helpers"]])
    for number in (0, 1, 2):
        assert os.readlink(f"/proc/{report.pid}/fd/{number}") == os.devnull
    assert os.readlink(f"/proc/{report.pid}/cwd") == "/"


def test_h06_the_daemon_never_uses_its_own_mount(mounts, library_path):
    report = mounts(library_path)
    (report.mountpoint / SHARD).read_bytes()
    os.statvfs(report.mountpoint)
    assert report.pid not in [user.pid for user in find_users(find_mount(report.mountpoint))]


# --- refusals


def test_what_cannot_be_a_mount_point(library_path, tmp_path, place):
    (tmp_path / "file").write_bytes(b"")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").write_bytes(b"")
    for where, kind, words in (
        (tmp_path / "nothing", NotFoundError, "no directory"),
        (tmp_path / "file", UsageError, "not a directory"),
        (tmp_path / "full", UsageError, "not empty"),
        (Path("/proc"), UsageError, "type proc already"),
        (library_path, UsageError, "not empty"),
    ):
        with pytest.raises(kind, match=words):
            mount(MountOptions(library_path, where))
    inside = library_path / "inside"
    inside.mkdir()
    try:
        with pytest.raises(UsageError, match="lie in each other"):
            mount(MountOptions(library_path, inside))
    finally:
        inside.rmdir()
    with pytest.raises(UsageError, match="lie in each other"):
        mount(MountOptions(library_path, library_path.parent, nonempty=True))
    assert find_mount(place) is None


def test_the_daemon_s_own_reason_is_reported(tmp_path, library_path, place):
    with pytest.raises(NotFoundError, match="library"):
        mount(MountOptions(tmp_path / "no-library", place))
    with pytest.raises(NotFoundError, match="org/modle") as caught:
        mount(MountOptions(library_path, place, models=(b"org/modle",)))
    assert "org/model" in str(caught.value)
    with pytest.raises(StorageError, match="log file"):
        mount(MountOptions(library_path, place, log_file=tmp_path / "no" / "log"))
    assert find_mount(place) is None


def test_a_daemon_that_does_not_get_ready_in_time_is_cleaned_up(library_path, place):
    with pytest.raises(StorageError, match="within 0"):
        mount(MountOptions(library_path, place), timeout_s=0.01)
    time.sleep(2)  # by now it would have mounted
    wait_until(lambda: find_mount(place) is None)


def test_nonempty_hides_what_was_there(mounts, library_path, place):
    (place / "hidden").write_bytes(b"x")
    mounts(library_path, place, nonempty=True)
    assert os.listdir(place) == ["org"]
    unmount(place)
    assert os.listdir(place) == ["hidden"]


def test_mounting_twice_is_refused(mounts, library_path, place):
    mounts(library_path, place)
    with pytest.raises(UsageError, match="already"):
        mount(MountOptions(library_path, place))
    assert os.listdir(place) == ["org"]


def test_unmounting_what_is_not_ours(tmp_path):
    with pytest.raises(NotFoundError, match="nothing is mounted"):
        unmount(tmp_path)
    with pytest.raises(UsageError, match="type proc"):
        unmount(Path("/proc"))


# --- busy


def test_a_busy_mount_is_not_unmounted_and_its_users_are_named(mounts, library_path, place):
    mounts(library_path, place)
    with (
        Reader(MAPPED_READER, place / SHARD) as mapped,
        Reader(
            "file = open(sys.argv[1], 'rb'); os.chdir(sys.argv[2]); pause()",
            place / SHARD,
            place / "org",
        ) as opened,
    ):
        with pytest.raises(StorageError, match="in use by") as caught:
            unmount(place)
        message = str(caught.value)
        assert f"process {mapped.pid}: open, mapped" in message
        assert f"process {opened.pid}: open, working directory" in message
        assert "--lazy" in message
        assert os.listdir(place) == ["org"]
        assert mapped.proceed()[:2] == (0, "read to the end\n")
    wait_until(lambda: not find_users(find_mount(place)))
    unmount(place)


def test_a_working_directory_under_the_mount_does_not_make_it_busy(mounts, library_path, place):
    """It was entered before the mount hid it: the kernel knows, the link in /proc does not."""
    with Reader("os.chdir(sys.argv[1]); pause()", place):
        mounts(library_path, place)
        unmount(place)
    assert find_mount(place) is None


def test_lazy_detaches_and_readers_go_on(mounts, library_path, place):
    report = mounts(library_path, place)
    with Reader(MAPPED_READER, place / SHARD) as reader:
        ended = unmount(place, lazy=True)
        assert [user.pid for user in ended.users] == [reader.pid]
        assert find_mount(place) is None
        assert os.listdir(place) == []
        assert is_alive(report.pid)
        assert reader.proceed()[:2] == (0, "read to the end\n")
    wait_until(lambda: not is_alive(report.pid))


def test_force_cuts_readers_off(mounts, library_path, place):
    report = mounts(library_path, place)
    with Reader(MAPPED_READER, place / SHARD) as reader:
        ended = unmount(place, force=True)
        assert [user.pid for user in ended.users] == [reader.pid]
        assert find_mount(place) is None
        status, _, took = reader.proceed()
        assert status == -signal.SIGBUS
        assert took < 1
    wait_until(lambda: not is_alive(report.pid))


# --- crashes


def test_a_killed_daemon_fails_its_readers_within_a_second(mounts, library_path, place):
    report = mounts(library_path, place)
    with Reader(MAPPED_READER, place / SHARD) as reader:
        os.kill(report.pid, signal.SIGKILL)
        wait_until(lambda: not is_alive(report.pid))
        status, _, took = reader.proceed()
    assert status == -signal.SIGBUS
    assert took < 1
    assert probe_mount(place, 5) is MountState.DEAD
    # The next mount at the same place clears the dead one.
    mounts(library_path, place)
    assert os.listdir(place) == ["org"]
    assert sum(entry.mountpoint == place for entry in fragfs_mounts()) == 1


def test_a_dead_mount_is_cleared_even_if_someone_still_holds_it(mounts, library_path, place):
    report = mounts(library_path, place)
    with Reader("file = open(sys.argv[1], 'rb'); pause()", place / SHARD):
        os.kill(report.pid, signal.SIGKILL)
        wait_until(lambda: not is_alive(report.pid))
        assert unmount(place).was_dead
    assert find_mount(place) is None


def test_dead_mounts_on_top_of_each_other_are_all_cleared(mounts, library_path, place):
    report = mounts(library_path, place)
    os.kill(report.pid, signal.SIGKILL)
    wait_until(lambda: not is_alive(report.pid))
    mounts(library_path, place)
    unmount(place)
    assert find_mount(place) is None


def test_a_stopped_daemon_is_told_apart_from_a_dead_one(mounts, library_path, place):
    report = mounts(library_path, place)
    os.kill(report.pid, signal.SIGSTOP)
    try:
        assert probe_mount(place, 0.5) is MountState.HANGS
        with pytest.raises(UsageError, match="does not answer"):
            mount(MountOptions(library_path, place))
    finally:
        os.kill(report.pid, signal.SIGCONT)
    assert os.listdir(place) == ["org"]


# --- signals


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_unmounts_an_idle_mount(mounts, library_path, place, number):
    report = mounts(library_path, place)
    os.kill(report.pid, number)
    wait_until(lambda: not is_alive(report.pid))
    assert find_mount(place) is None
    assert number.name in mounts.read_log()
    assert "cutting off" not in mounts.read_log()


def test_a_signal_lets_open_files_be_read_to_their_end(mounts, library_path, place):
    report = mounts(library_path, place)
    with Reader(MAPPED_READER, place / SHARD) as reader:
        os.kill(report.pid, signal.SIGTERM)
        wait_until(lambda: find_mount(place) is None)
        assert is_alive(report.pid)
        assert reader.proceed()[:2] == (0, "read to the end\n")
    wait_until(lambda: not is_alive(report.pid))
    assert "cutting off" not in mounts.read_log()


@pytest.mark.parametrize("how", ["grace", "second signal"])
def test_after_the_grace_time_or_a_second_signal_readers_are_named_and_cut_off(
    mounts, library_path, place, how
):
    report = mounts(library_path, place, grace_s=0.3 if how == "grace" else 60.0)
    with Reader(MAPPED_READER, place / SHARD) as reader:
        os.kill(report.pid, signal.SIGTERM)
        if how == "second signal":
            wait_until(lambda: find_mount(place) is None)
            os.kill(report.pid, signal.SIGTERM)
        wait_until(lambda: not is_alive(report.pid))
        log = mounts.read_log()
        assert f"process {reader.pid}: open, mapped" in log
        assert SHARD in log
        assert reader.proceed()[0] == -signal.SIGBUS


def test_serving_in_the_foreground(library_path, tmp_path):
    place = tmp_path / "a place"
    place.mkdir()
    program = (
        "import sys; from pathlib import Path\n"
        "from fragfs.mount.launch import serve\n"
        "from fragfs.mount.options import MountOptions\n"
        "sys.exit(serve(MountOptions(Path(sys.argv[1]), Path(sys.argv[2]))))"
    )
    daemon = subprocess.Popen(
        [sys.executable, "-c", program, library_path, place], stderr=subprocess.PIPE, text=True
    )
    try:
        wait_until(lambda: find_mount(place) is not None, 20)
        assert os.listdir(place) == ["org"]
        daemon.send_signal(signal.SIGINT)
        _, said = daemon.communicate(timeout=20)
    finally:
        daemon.kill()
        if find_mount(place) is not None:
            unmount(place, lazy=True)
    assert daemon.returncode == 0
    assert "fragfs: INFO: mounted" in said
    assert "spaces" in said
    assert find_mount(place) is None


def test_a_daemon_that_fails_takes_its_mount_down(library_path, place):
    """Something unforeseen after mounting: the directory is usable again, not a dead mount."""
    program = """
import sys
from pathlib import Path
from fragfs.mount.daemon import run
from fragfs.mount.options import MountOptions
def fail():
    raise RuntimeError("unforeseen")
run(MountOptions(Path(sys.argv[1]), Path(sys.argv[2])), fail, foreground=True)
"""
    done = run_reader(program, library_path, place, check=False)
    assert done.returncode == 1
    assert "RuntimeError: unforeseen" in done.stderr
    assert find_mount(place) is None
    assert os.listdir(place) == []
