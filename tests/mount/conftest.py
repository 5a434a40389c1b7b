"""Real mounts for the tests: made in child processes, always taken down, killed as last resort."""

import contextlib
import os
import shutil
import signal

import pytest

from fragfs.mount.launch import mount
from fragfs.mount.options import MountOptions
from fragfs.mount.probe import MountState, probe_mount
from fragfs.mount.table import find_mount
from fragfs.mount.unmount import detach, fragfs_mounts
from tests.faults.small_disk import small_disk
from tests.mount.support import is_alive, make_library, wait_until, write_safetensors

SHARDS = 4


def reason_without_fuse():
    """Why real mounts are impossible here; None if they are not."""
    if not os.path.exists("/dev/fuse"):
        return "/dev/fuse is missing"
    if not os.access("/dev/fuse", os.R_OK | os.W_OK):
        return "/dev/fuse may not be opened by this user"
    if shutil.which("fusermount3") is None:
        return "fusermount3 is not installed"
    return None


def pytest_collection_modifyitems(items):
    reason = reason_without_fuse()
    if reason:
        for item in items:
            if item.get_closest_marker("mount"):
                item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(scope="session", autouse=True)
def _swept():
    """Detach dead mounts that a killed test run left behind."""
    for entry in fragfs_mounts():
        if "/pytest-of-" in os.fspath(entry.mountpoint) and (
            probe_mount(entry.mountpoint, 5) is MountState.DEAD
        ):
            detach(entry)


class Mounts:
    """Mounts of one test."""

    def __init__(self, directory):
        self._directory = directory
        self._count = 0
        self.reports = []
        self.defaults = {}

    def __call__(self, library, mountpoint=None, **options):
        """Mount a library; the report's `log` is the daemon's log file."""
        if mountpoint is None:
            self._count += 1
            mountpoint = self._directory / f"mount{self._count}"
            mountpoint.mkdir()
        options = {"log_file": self.log} | self.defaults | options
        report = mount(MountOptions(library, mountpoint, **options))
        self.reports.append(report)
        return report

    @property
    def log(self):
        return self._directory / "daemon.log"

    def read_log(self):
        return self.log.read_text() if self.log.exists() else ""

    def close(self):
        for report in self.reports:
            while (entry := find_mount(report.mountpoint)) is not None:
                detach(entry)
            with contextlib.suppress(AssertionError):
                wait_until(lambda pid=report.pid: not is_alive(pid), 5)
            if is_alive(report.pid):
                os.kill(report.pid, signal.SIGKILL)


@pytest.fixture
def mounts(tmp_path):
    made = Mounts(tmp_path)
    yield made
    made.close()


@pytest.fixture(scope="session")
def source(tmp_path_factory):
    """A model as people have them, and odd files beside it."""
    root = tmp_path_factory.mktemp("source") / "model"
    (root / "sub" / "deep").mkdir(parents=True)
    for shard in range(1, SHARDS + 1):
        name = f"model-{shard:05}-of-{SHARDS:05}.safetensors"
        write_safetensors(root / name, seed=shard)
    (root / "config.json").write_text('{"model_type": "test"}')
    (root / "empty").write_bytes(b"")
    (root / "one").write_bytes(b"1")
    (root / "exact").write_bytes(bytes(range(256)) * 4096)
    (root / "sub" / "deep" / "odd.bin").write_bytes(os.urandom(1_234_567))
    (root / os.fsdecode("ünï ".encode() + b"\xff")).write_bytes(b"a name that is not UTF-8")
    trailing = root / "trailing.safetensors"
    write_safetensors(trailing, seed=99, tensor_count=1, shape=(30, 30))
    with trailing.open("ab") as file:
        file.write(b"trailing bytes")
    os.utime(root / "config.json", ns=(1, 1_234_567_890_123_456_789))
    return root


@pytest.fixture(scope="session")
def library_path(tmp_path_factory, source):
    """A library with `source` as org/model; tests must not change it."""
    return make_library(tmp_path_factory.mktemp("library") / "lib", {b"org/model": source})


@pytest.fixture(scope="session")
def shared(tmp_path_factory, library_path):
    """One mount of that library for all tests that only read; it is asked for every page."""
    made = Mounts(tmp_path_factory.mktemp("shared"))
    report = made(library_path, passthrough=False)
    yield report.mountpoint
    made.close()


@pytest.fixture(scope="session")
def model(shared):
    """The mounted model."""
    return shared / "org" / "model"


@pytest.fixture
def disk():
    """A small file system of the test's own."""
    with small_disk() as made:
        yield made
