"""What happens to the machine below a mount: it stays up, and reads what can be read."""

import errno
import json
import os
import resource
import shutil
import subprocess
import sys

import numpy as np
import pytest

from tests.faults.small_disk import as_root
from tests.models import digests
from tests.mount.support import drop_pages, make_library, run_reader, wait_until

pytestmark = [pytest.mark.mount, pytest.mark.slow, as_root]

READ = """
import hashlib, json, os, sys
found = {}
for parent, _, names in os.walk(sys.argv[1]):
    for name in names:
        path = os.path.join(parent, name)
        try:
            with open(path, "rb") as file:
                found[os.path.relpath(path, sys.argv[1])] = hashlib.sha256(file.read()).hexdigest()
        except OSError as error:
            found[os.path.relpath(path, sys.argv[1])] = error.errno
print(json.dumps(found))
"""


@pytest.fixture
def files(tmp_path):
    """A model of a few files, some of several fragments."""
    directory = tmp_path / "files"
    directory.mkdir()
    rng = np.random.default_rng(3)
    for number in range(4):
        (directory / f"{number}.bin").write_bytes(rng.bytes(900_000))
    return directory


@pytest.fixture
def library(disk, files, tmp_path):
    """A library on a disk of its own."""
    # Made elsewhere: an add asks for more free space than that disk has.
    made = make_library(tmp_path / "lib", {b"m": files})
    return shutil.copytree(made, disk.path / "lib")


def read(root):
    """SHA-256 of every file, or the number of the error."""
    return json.loads(run_reader(READ, root).stdout)


def fragfs(*arguments):
    return subprocess.run(
        [sys.executable, "-m", "fragfs", *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=60,
    )


def test_the_disk_fills_up_below_a_mount(mounts, disk, library, files):
    root = mounts(library, cache_bytes_max=0).mountpoint
    disk.fill()
    assert read(root / "m") == digests(files)
    refused = fragfs("--library", library, "rm", "m/0.bin")
    assert refused.returncode == 1
    assert "free some space" in refused.stderr
    drop_pages(root / "m")
    assert read(root / "m") == digests(files)
    disk.clear()
    assert fragfs("--library", library, "rm", "m/0.bin").returncode == 0
    wait_until(lambda: not (root / "m" / "0.bin").exists())
    (files / "0.bin").unlink()
    assert read(root / "m") == digests(files)


def test_a_full_disk_cannot_be_mounted_from_until_there_is_room(
    disk, library, files, tmp_path, mounts
):
    disk.fill()
    (tmp_path / "point").mkdir()
    refused = fragfs("--library", library, "mount", tmp_path / "point")
    assert refused.returncode == 1
    assert "free some space" in refused.stderr
    assert "internal error" not in refused.stderr
    disk.clear()
    assert read(mounts(library).mountpoint / "m") == digests(files)


@pytest.mark.parametrize("full_at_first", [False, True])
def test_the_fragment_cache_is_on_a_full_disk(full_at_first, mounts, disk, files, tmp_path):
    library = make_library(tmp_path / "lib", {b"m": files})
    if full_at_first:
        disk.fill()
    root = mounts(library, cache_directory=disk.path, cache_bytes_max=8 << 20).mountpoint
    if not full_at_first:
        disk.fill()
    for _ in range(2):
        assert read(root / "m") == digests(files)
        drop_pages(root / "m")


def test_a_daemon_without_descriptors_answers_and_recovers(mounts, library, files):
    report = mounts(library, cache_bytes_max=0)
    root = report.mountpoint
    used = max(map(int, os.listdir(f"/proc/{report.pid}/fd"))) + 1
    before = resource.prlimit(report.pid, resource.RLIMIT_NOFILE)
    resource.prlimit(report.pid, resource.RLIMIT_NOFILE, (used, before[1]))
    found = read(root / "m")
    for name, digest in digests(files).items():
        assert found[name] in (digest, errno.EIO, errno.EMFILE, errno.ENFILE)
    resource.prlimit(report.pid, resource.RLIMIT_NOFILE, before)
    assert read(root / "m") == digests(files)


def test_a_read_only_disk_is_mounted_from(mounts, disk, library, files):
    disk.change("ro")
    assert read(mounts(library).mountpoint / "m") == digests(files)
