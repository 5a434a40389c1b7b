"""`mount`, `umount` and the mount helper; those marked `mount` with a real mount."""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from fragfs.cli import mount_helper
from fragfs.cli.environment import default_log_file
from fragfs.mount.table import find_mount

needs_fuse = [
    pytest.mark.mount,
    pytest.mark.slow,
    pytest.mark.skipif(
        not os.access("/dev/fuse", os.R_OK | os.W_OK) or shutil.which("fusermount3") is None,
        reason="needs /dev/fuse and fusermount3",
    ),
]


def mounts(test):
    for mark in needs_fuse:
        test = mark(test)
    return test


@pytest.fixture
def mountpoint(tmp_path):
    """An empty directory; whatever a test leaves mounted on it is detached."""
    directory = tmp_path / "mnt"
    directory.mkdir()
    yield directory
    subprocess.run(["fusermount3", "-u", "-z", directory], stderr=subprocess.DEVNULL, check=False)


@pytest.fixture
def helper(capfdbinary):
    def call(*arguments):
        capfdbinary.readouterr()
        status = mount_helper.main([os.fspath(argument) for argument in arguments])
        out, err = capfdbinary.readouterr()
        return status, out.decode(), err.decode()

    return call


# --- without a mount


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["-o", "rw"], "mounted read-only; leave out 'rw'"),
        (["-o", "ro,frobnicate"], "unknown mount option 'frobnicate'"),
        (["--uid", "nobody"], "uid=nobody is not the number"),
        (["--umask", "999"], "umask=999 is not an octal number"),
        (["--json", "-f"], "leave out --foreground or --json"),
        (["--grace", "-1"], "Invalid value for '--grace'"),
        (["--allow-other", "-o", "allow_root"], "allow_other and allow_root exclude each other"),
    ],
)
def test_bad_options_are_usage_errors(fragfs, tmp_path, arguments, message):
    result = fragfs("mount", tmp_path, *arguments)
    assert result.status == 2
    assert message in result.stderr


def test_umount_of_what_is_not_mounted(run, tmp_path):
    result = run("umount", tmp_path)
    assert result.status == 1
    assert f"nothing is mounted on {tmp_path}" in result.stderr


def test_the_helper_checks_its_arguments(helper, tmp_path):
    status, _, err = helper(tmp_path)
    assert status == 2
    assert err.startswith("mount.fuse.fragfs: Missing argument 'MOUNTPOINT'")
    status, _, err = helper(tmp_path, tmp_path, "-sfn", "-o", "rw,frobnicate")
    assert status == 2
    assert "unknown mount option 'frobnicate'" in err


def test_a_dry_run_of_the_helper_mounts_nothing(helper, tmp_path):
    options = "rw,noauto,allow_other,x-systemd.automount"
    status, out, err = helper("/srv/m", tmp_path, "-f", "-v", "-t", "fuse.fragfs", "-o", options)
    assert (status, out, err) == (0, "", "")


@pytest.mark.skipif(Path("/dev/log").exists(), reason="there is a system log here")
def test_the_log_is_a_file_of_the_user_alone_where_there_is_no_system_log(home):
    path = default_log_file()
    assert home in path.parents
    assert path.parent.is_dir()
    assert path.parent.stat().st_mode & 0o077 == 0


# --- with one


@mounts
def test_mount_and_umount(fragfs, make_model, mountpoint):
    directory = make_model("one")
    fragfs("add", directory)
    result = fragfs("mount", mountpoint)
    assert result.status == 0, result.stderr
    assert result.lines[0] == f"mounted on {mountpoint}; end it with: fragfs umount {mountpoint}"
    if find_mount(mountpoint).read_ahead_kb == 128:
        hint = f"  read-ahead is the kernel's default; see: fragfs doctor {mountpoint}"
        assert result.lines[1:] == [hint]
    shown = mountpoint / "one" / "model.safetensors"
    assert shown.read_bytes() == (directory / "model.safetensors").read_bytes()
    again = fragfs("mount", mountpoint)
    assert again.status == 2
    assert "mounted on" in again.stderr
    result = fragfs("umount", mountpoint)
    assert (result.status, result.text) == (0, f"unmounted {mountpoint}\n")
    assert not mountpoint.is_mount()


@mounts
def test_a_busy_mount_names_who_uses_it(fragfs, make_model, mountpoint):
    fragfs("add", make_model("one"))
    fragfs("mount", mountpoint)
    with (mountpoint / "one" / "config.json").open("rb") as file:
        result = fragfs("umount", mountpoint)
        assert result.status == 1
        assert f"process {os.getpid()}" in result.stderr
        result = fragfs("umount", "--lazy", mountpoint)
        assert result.status == 0
        assert "go on reading" in result.text
        assert file.read() == b'{"seed": 1}'


@mounts
def test_mount_options_reach_the_mount(fragfs, make_model, mountpoint):
    fragfs("add", make_model("one"), make_model("two", 2))
    options = ["-o", "ro,model=two,uid=1234", "--gid", "2345", "--umask", "077", "--cache", "8M"]
    result = fragfs("mount", mountpoint, "--quiet", *options)
    assert (result.status, result.stdout, result.stderr) == (0, b"", "")
    assert os.listdir(mountpoint) == ["two"]
    status = (mountpoint / "two" / "config.json").stat()
    assert (status.st_uid, status.st_gid, status.st_mode & 0o777) == (1234, 2345, 0o400)
    assert fragfs("umount", mountpoint).status == 0


@mounts
def test_the_helper_mounts(fragfs, make_model, mountpoint, helper):
    fragfs("add", make_model("one"))
    status, out, err = helper(fragfs.library, mountpoint, "-v", "-o", "rw,noauto,nofail,umask=022")
    assert status == 0, err
    assert out.startswith(f"mounted on {mountpoint}")
    assert os.listdir(mountpoint) == ["one"]
    assert fragfs("umount", mountpoint).status == 0


@mounts
def test_a_mount_of_nothing_fails_with_the_reason(run, tmp_path, mountpoint):
    result = run("--library", tmp_path / "none", "mount", mountpoint)
    assert result.status == 1
    assert "no fragfs library in" in result.stderr
    assert not mountpoint.is_mount()


@mounts
def test_the_foreground_ends_with_sigterm(fragfs, make_model, mountpoint):
    fragfs("add", make_model("one"))
    command = [sys.executable, "-m", "fragfs", "--library", fragfs.library, "mount", "-f"]
    process = subprocess.Popen([*command, mountpoint])
    deadline = time.monotonic() + 20
    while not mountpoint.is_mount():
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.02)
    assert os.listdir(mountpoint) == ["one"]
    process.send_signal(signal.SIGTERM)
    assert process.wait(20) == 0
    assert not mountpoint.is_mount()
