"""The guard of the pusher, and aborting a connection: who waits is freed, who does not is spared.

The pusher of these tests is a child with the descriptor of a real daemon's device, so that the
moment when it waits in the kernel for a page is chosen and not hoped for.
"""

import contextlib
import ctypes
import errno
import os
import signal
import subprocess
import sys

import pytest

from fragfs.mount.abort import abort_connection, can_abort, open_abort
from fragfs.mount.control import open_control, write_control
from fragfs.mount.table import find_mount, is_mounted
from fragfs.mount.unmount import unmount
from tests.mount.support import is_alive, wait_until

pytestmark = [pytest.mark.mount, pytest.mark.slow]

_SYS_PIDFD_GETFD = 438
TAKEOVERS_MAX = 20

PUSHER = """
import os, signal, struct, sys, time
from fragfs.mount.guard import start_guard
from fragfs.mount.table import find_mount
from pathlib import Path
entry = find_mount(Path(sys.argv[1]))
device, lifeline, inode, what = *map(int, sys.argv[2:5]), sys.argv[5]
guard = None if what == "unguarded" else start_guard(entry, device, lifeline)
print("ready", flush=True)
if what in ("store", "unguarded"):
    message = struct.pack("=IiQQQII", 40 + 4096, 4, 0, inode, 0, 4096, 0) + bytes(4096)
    os.write(device, message)
elif what == "end":
    os.close(device)
    guard.end()
    sys.exit(0)
time.sleep(600)
"""


def state_of(pid):
    with open(f"/proc/{pid}/stat") as stat:
        return stat.read().rpartition(")")[2].split()[0]


def is_waiting(pid):
    """Whether it waits for a page or for the daemon."""
    with open(f"/proc/{pid}/wchan") as place:
        return state_of(pid) == "D" or "fuse" in place.read()


def children_of(pid):
    found = []
    for name in filter(str.isdigit, os.listdir("/proc")):
        with contextlib.suppress(OSError), open(f"/proc/{name}/stat") as stat:
            if stat.read().rpartition(")")[2].split()[1] == str(pid):
                found.append(int(name))
    return found


def device_of(pid):
    """A descriptor of the device a daemon serves."""
    name = next(
        name
        for name in os.listdir(f"/proc/{pid}/fd")
        if os.readlink(f"/proc/{pid}/fd/{name}") == "/dev/fuse"
    )
    daemon = os.pidfd_open(pid)
    try:
        device = ctypes.CDLL(None).syscall(_SYS_PIDFD_GETFD, daemon, int(name), 0)
    finally:
        os.close(daemon)
    if device < 0:
        pytest.skip("this user may not take a descriptor of another process")
    return device


class Scene:
    """A mount, a reader that waits for its stopped daemon, and a pusher."""

    def __init__(self, report):
        self.report = report
        self.entry = find_mount(report.mountpoint)
        self.path = report.mountpoint / "org" / "model" / "exact"
        self.inode = os.stat(self.path).st_ino
        self.lifeline_out, self.lifeline = os.pipe()
        self.processes = []
        self.guards = []

    def start_reader(self):
        reading = "import os, sys; f = os.open(sys.argv[1], os.O_RDONLY); print(flush=True);"
        reading += "input(); os.pread(f, 4096, 0)"
        reader = self._start([sys.executable, "-c", reading, self.path])
        reader.stdout.readline()
        os.kill(self.report.pid, signal.SIGSTOP)
        reader.stdin.write(b"\n")
        reader.stdin.flush()
        wait_until(lambda: is_waiting(reader.pid))
        return reader

    def start_pusher(self, what):
        """One that stores into the page which the reader waits for, or only waits."""
        device = device_of(self.report.pid)
        numbers = (device, self.lifeline_out, self.inode)
        pusher = self._start(
            [sys.executable, "-c", PUSHER, self.report.mountpoint, *map(str, numbers), what],
            pass_fds=numbers[:2],
        )
        os.close(device)
        assert pusher.stdout.readline() == b"ready\n"
        if what not in ("unguarded", "end"):
            self.guards = children_of(pusher.pid)
            assert len(self.guards) == 1
        if what in ("store", "unguarded"):
            wait_until(lambda: state_of(pusher.pid) == "D", 20)
        return pusher

    def _start(self, command, **options):
        process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            **options,
        )
        self.processes.append(process)
        return process

    def daemon_dies(self):
        os.kill(self.report.pid, signal.SIGKILL)
        self.end_lifeline()

    def end_lifeline(self):
        os.close(self.lifeline)
        self.lifeline = None

    def answers(self):
        return self.path.read_bytes() == bytes(range(256)) * 4096

    def close(self):
        os.close(self.lifeline_out)
        if self.lifeline is not None:
            os.close(self.lifeline)
        for process in self.processes:
            process.kill()
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.report.pid, signal.SIGCONT)
        for process in self.processes:
            process.communicate(timeout=20)


@pytest.fixture
def scene(mounts, library_path):
    made = Scene(mounts(library_path, prefill=False))
    if not can_abort(made.entry):
        pytest.skip("this user may not abort connections: there is no pusher")
    yield made
    made.close()


def test_both_are_killed_while_the_pusher_waits_for_the_reader_s_page(scene):
    reader = scene.start_reader()
    pusher = scene.start_pusher("store")
    pusher.kill()
    assert is_alive(pusher.pid)
    scene.daemon_dies()
    assert reader.wait(10) in (0, 1)  # the page may be stored before the reader looks again
    assert pusher.wait(10) == -signal.SIGKILL
    wait_until(lambda: not any(map(is_alive, scene.guards)))


def test_without_a_guard_they_wait_until_somebody_aborts(scene):
    """What the guard is for; if this fails, the kernel has learnt to do without."""
    reader = scene.start_reader()
    pusher = scene.start_pusher("unguarded")
    pusher.kill()
    scene.daemon_dies()
    with pytest.raises(subprocess.TimeoutExpired):
        reader.wait(1)
    assert is_alive(pusher.pid)
    assert abort_connection(scene.entry)
    assert reader.wait(10) in (0, 1)  # the page may be stored before the reader looks again
    assert pusher.wait(10) == -signal.SIGKILL


def test_a_stopped_pusher_and_a_dead_daemon(scene):
    pusher = scene.start_pusher("wait")
    reader = scene.start_reader()
    os.kill(pusher.pid, signal.SIGSTOP)
    scene.daemon_dies()
    assert reader.wait(10) == 1
    assert pusher.wait(10) == -signal.SIGKILL


def test_a_pusher_that_dies_takes_its_guard_along_and_nothing_else(scene):
    pusher = scene.start_pusher("wait")
    pusher.kill()
    wait_until(lambda: not any(map(is_alive, scene.guards)))
    scene.end_lifeline()
    assert scene.answers()


def test_a_pusher_that_ends_in_order_leaves_no_guard(scene):
    pusher = scene.start_pusher("end")
    assert pusher.wait(10) == 0
    scene.end_lifeline()
    assert scene.answers()


def test_a_guard_holds_neither_the_device_nor_what_it_was_given(scene):
    scene.start_pusher("wait")
    (guard,) = scene.guards
    held = {}

    def is_ready():
        held.clear()
        for name in os.listdir(f"/proc/{guard}/fd"):
            with contextlib.suppress(OSError):
                held[int(name)] = os.readlink(f"/proc/{guard}/fd/{name}")
        return "/dev/fuse" not in held.values()

    wait_until(is_ready)
    kinds = sorted(link.partition(":")[0] for number, link in held.items() if number > 2)
    assert {held[number] for number in range(3)} == {"/dev/null"}
    assert kinds.count("pipe") == 2
    assert len(kinds) <= 3


# --- aborting


def test_an_idle_mount_is_dead_afterwards_not_gone(scene):
    try:
        os.close(open_control(scene.entry, "abort"))
    except OSError as error:
        pytest.skip(f"no control file system: {error}")
    os.kill(scene.report.pid, signal.SIGSTOP)  # it would detach the mount itself
    assert abort_connection(scene.entry)
    assert is_mounted(scene.entry)
    with pytest.raises(OSError, match="Transport endpoint") as caught:
        os.listdir(scene.report.mountpoint)
    assert caught.value.errno == errno.ENOTCONN


def test_a_late_abort_spares_who_has_the_number_now(scene, mounts, library_path):
    opened = open_abort(scene.entry)
    if opened is None:
        pytest.skip("no control file system")
    unmount(scene.report.mountpoint)
    wait_until(lambda: not is_alive(scene.report.pid))
    try:
        for _ in range(TAKEOVERS_MAX):
            again = mounts(library_path, scene.report.mountpoint, prefill=False)
            if find_mount(again.mountpoint).device == scene.entry.device:
                break
            unmount(again.mountpoint)
        else:
            pytest.skip("other mounts of this machine took the number")
        abort_connection(scene.entry, opened)
    finally:
        os.close(opened)
    assert scene.answers()


def test_a_mount_that_is_gone_is_not_aborted(scene):
    unmount(scene.report.mountpoint)
    assert not abort_connection(scene.entry)


def test_numbers_are_written_where_nothing_is_mounted(scene):
    try:
        write_control(scene.entry, "max_background", 33)
    except OSError as error:
        pytest.skip(f"no control file system: {error}")
    with pytest.raises(FileNotFoundError):
        write_control(scene.entry, "no_such_file", 1)
    assert scene.answers()


def test_forced_unmount_does_not_kill_what_it_can_abort(scene, mounts):
    """The daemon notices and ends in order: it says so in its log."""
    report = unmount(scene.report.mountpoint, force=True)
    assert not report.was_dead
    wait_until(lambda: not is_alive(scene.report.pid), 20)
    assert "unmounted" in mounts.read_log()
