"""Names, attributes and everything around the bytes (H11 to H24)."""

import ctypes
import errno
import fcntl
import os
import stat
import struct
import subprocess

import pytest

from fragfs.mount.table import find_mount
from tests.mount.support import make_library, run_reader, source_files

pytestmark = [pytest.mark.mount, pytest.mark.slow]

SHARD = "model-00001-of-00004.safetensors"


def test_h11_a_directory_lists_exactly_what_was_added(shared, model, source):
    assert source_files(model) == source_files(source)
    assert os.listdir(shared) == ["org"]
    assert os.listdir(shared / "org") == ["model"]


def test_h12_entries_have_their_type(model, source):
    for parent, directories, files in os.walk(source):
        below = os.path.relpath(parent, source)
        with os.scandir(model / below) as entries:
            kinds = {entry.name: entry.is_dir(follow_symlinks=False) for entry in entries}
        assert kinds == {**dict.fromkeys(directories, True), **dict.fromkeys(files, False)}


@pytest.fixture(scope="session")
def crowded(tmp_path_factory):
    """A library with a directory of 1433 files, the most shards seen in the wild."""
    root = tmp_path_factory.mktemp("crowded")
    source = root / "source"
    source.mkdir()
    for number in range(1433):
        (source / f"model-{number:05}-of-01433.safetensors.with-a-rather-long-name").write_bytes(
            b"%d" % number
        )
    return make_library(root / "lib", {b"crowded": source}), source


def test_h12_a_crowded_directory_lists_completely_in_small_buffers(mounts, crowded):
    library, source = crowded
    path = mounts(library).mountpoint / "crowded"
    expected = sorted(os.listdir(source))
    assert sorted(os.listdir(path)) == expected
    assert sorted(read_directory_in_small_steps(path)) == expected
    assert sum(os.stat(path / name).st_size for name in expected) == sum(
        len(str(number)) for number in range(1433)
    )


def read_directory_in_small_steps(path):
    """getdents64 with a buffer of a few entries."""
    libc = ctypes.CDLL(None, use_errno=True)
    buffer = ctypes.create_string_buffer(400)
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    names = []
    while (got := libc.syscall(217, descriptor, buffer, 400)) > 0:
        at = 0
        while at < got:
            length = struct.unpack_from("H", buffer, at + 16)[0]
            names.append(os.fsdecode(buffer.raw[at + 19 : at + length].split(b"\0")[0]))
            at += length
    os.close(descriptor)
    assert got == 0
    return [name for name in names if name not in (".", "..")]


def test_h11_find_sees_everything(model, source):
    """It takes link counts and entry types for granted, and misses files if they are wrong."""
    for command in ("find . -type f | sort", "find . -type d | sort", "find . -size +1000k | sort"):
        told = [
            subprocess.run(command, shell=True, cwd=where, capture_output=True, check=True).stdout
            for where in (model, source)
        ]
        assert told[0] == told[1] != b""


def test_h12_a_listing_can_be_rewound(model):
    descriptor = os.open(model, os.O_RDONLY)
    first = sorted(os.listdir(descriptor))
    os.lseek(descriptor, 0, os.SEEK_SET)
    assert sorted(os.listdir(descriptor)) == first
    os.close(descriptor)


def test_h13_times_are_those_of_the_source_and_survive_a_remount(mounts, library_path, source):
    def times(model):
        return {
            name: os.stat(os.path.join(os.fsencode(model), name)).st_mtime_ns
            for name in source_files(source)
        }

    seen = []
    for _ in range(2):
        report = mounts(library_path)
        seen.append(times(report.mountpoint / "org" / "model"))
        (report.mountpoint / "org" / "model" / SHARD).read_bytes()
        assert times(report.mountpoint / "org" / "model") == seen[-1]
    assert seen[0] == seen[1] == times(source)
    assert seen[0][b"config.json"] == 1_234_567_890_123_456_789


def test_h14_inodes_are_unique_and_stable(shared, model, source):
    def inodes():
        found = {}
        for parent, directories, files in os.walk(os.fsencode(shared)):
            for name in directories + files:
                path = os.path.join(parent, name)
                status = os.stat(path)
                found[path] = (status.st_dev, status.st_ino)
        return found

    first = inodes()
    assert len(set(first.values())) == len(first)
    assert {device for device, _ in first.values()} == {os.stat(shared).st_dev}
    run_reader("import os, sys; [os.stat(e) for e in os.scandir(sys.argv[1])]", model)
    assert inodes() == first
    assert all(
        os.stat(os.path.join(os.fsencode(model), name)).st_nlink == 1
        for name in source_files(source)
    )


def test_h14_equal_large_files_share_an_inode_and_small_ones_do_not(mounts, tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    large, small = os.urandom(1 << 20), b"small"
    for directory in (one, two):
        directory.mkdir()
        (directory / "large").write_bytes(large)
        (directory / "small").write_bytes(small)
    root = mounts(make_library(tmp_path / "lib", {b"one": one, b"two": two})).mountpoint
    status = {(m, n): os.stat(root / m / n) for m in ("one", "two") for n in ("large", "small")}
    assert status["one", "large"].st_ino == status["two", "large"].st_ino
    assert status["one", "large"].st_mtime_ns == status["two", "large"].st_mtime_ns
    assert status["one", "small"].st_ino != status["two", "small"].st_ino
    assert all(s.st_nlink == 1 for s in status.values())
    assert os.getxattr(root / "one" / "large", "user.fragfs.models") == b"one\ntwo"


def test_h15_h16_blocks_and_block_size(model, source):
    for name in source_files(source):
        status = os.stat(os.path.join(os.fsencode(model), name))
        assert status.st_blocks >= -(-status.st_size // 512)
        assert status.st_blksize == 4096


def test_h17_everything_is_readable_whatever_the_source_mode_was(mounts, tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    (source / "secret").write_bytes(b"x")
    (source / "secret").chmod(0o600)
    library = make_library(tmp_path / "lib", {b"m": source})
    root = mounts(library).mountpoint
    assert os.stat(root / "m" / "secret").st_mode == stat.S_IFREG | 0o444
    assert os.stat(root / "m").st_mode == stat.S_IFDIR | 0o555
    assert (os.stat(root / "m").st_uid, os.stat(root / "m").st_gid) == (os.getuid(), os.getgid())
    root = mounts(library, umask=0o077, uid=12, gid=13).mountpoint
    status = os.stat(root / "m" / "secret")
    assert (status.st_mode, status.st_uid, status.st_gid) == (stat.S_IFREG | 0o400, 12, 13)


def test_h18_real_paths_stay_inside(shared, model, source):
    for name in source_files(source):
        path = os.path.join(os.fsencode(model), name)
        assert os.path.realpath(path) == path
        assert not os.path.islink(path)


def test_h19_the_mount_table_says_what_loaders_look_for(shared):
    entry = find_mount(shared)
    assert (entry.filesystem_type, entry.source) == ("fuse.fragfs", "fragfs")
    assert {"ro", "nosuid", "nodev", "default_permissions"} <= set(entry.options)
    assert "rw" not in entry.options
    assert not any(option.startswith("allow_other") for option in entry.options)


def test_h19_options_reach_the_kernel(mounts, library_path):
    entry = find_mount(mounts(library_path, allow_other=True).mountpoint)
    assert "allow_other" in entry.options


def test_h19_a_mount_point_with_spaces_is_served_with_a_warning(mounts, library_path, tmp_path):
    place = tmp_path / "my models"
    place.mkdir()
    report = mounts(library_path, place)
    assert "spaces" in report.warnings[0]
    assert os.listdir(place) == ["org"]
    assert find_mount(place).is_fragfs


def test_h20_missing_names(shared, model):
    for path in (shared / "nothing", model / "pytorch_model.bin", model / "sub" / "no" / "x"):
        with pytest.raises(FileNotFoundError):
            path.stat()
        with pytest.raises(FileNotFoundError):
            path.open("rb")
    with pytest.raises(NotADirectoryError):
        (model / SHARD / "x").stat()


@pytest.mark.parametrize(
    "name", ["user.nothing", "user.fragfs.nothing", "security.selinux", "security.capability"]
)
def test_h21_unknown_extended_attributes(model, name):
    for path in (model, model / SHARD):
        with pytest.raises(OSError, match="No data available") as caught:
            os.getxattr(path, name)
        assert caught.value.errno == errno.ENODATA


def test_h21_extended_attributes_are_listed(model, source):
    listed = os.listxattr(model / SHARD)
    assert set(listed) == {"user.fragfs.sha256", "user.fragfs.stored_bytes", "user.fragfs.models"}
    assert os.listxattr(model) == []
    assert os.getxattr(model / SHARD, "user.fragfs.models") == b"org/model"
    stored = int(os.getxattr(model / SHARD, "user.fragfs.stored_bytes"))
    assert 0 < stored <= os.stat(model / SHARD).st_size + 100_000


def refused(call, *arguments, **keywords):
    with pytest.raises(OSError, match="Read-only file system") as caught:
        call(*arguments, **keywords)
    return caught.value.errno == errno.EROFS


def test_h22_every_change_is_erofs(model):
    file = model / "config.json"
    assert refused(open, model / "new", "wb")
    assert refused(open, file, "r+b")
    assert refused(open, file, "wb")
    assert refused(os.unlink, file)
    assert refused(os.rename, file, model / "other")
    assert refused(os.mkdir, model / "np")
    assert refused(os.rmdir, model / "sub")
    assert refused(os.chmod, file, 0o600)
    assert refused(os.chown, file, 0, 0)
    assert refused(os.utime, file)
    assert refused(os.truncate, file, 0)
    assert refused(os.symlink, "x", model / "link")
    assert refused(os.link, file, model / "hard")
    assert refused(os.mkfifo, model / "fifo")
    assert refused(os.setxattr, file, "user.x", b"1")
    assert refused(os.removexattr, file, "user.fragfs.sha256")
    # What vLLM, safetensors and huggingface_hub try beside weights.
    assert refused(os.open, model / ".tmpabc.safetensors", os.O_CREAT | os.O_EXCL | os.O_RDWR)
    assert refused(os.open, model / "x.lock", os.O_CREAT | os.O_RDWR)


def test_h22_locks_work(model):
    with (model / "config.json").open("rb") as one, (model / "config.json").open("rb") as two:
        fcntl.flock(one, fcntl.LOCK_EX | fcntl.LOCK_NB)
        with pytest.raises(BlockingIOError):
            fcntl.flock(two, fcntl.LOCK_EX | fcntl.LOCK_NB)
        fcntl.flock(one, fcntl.LOCK_UN)
        fcntl.flock(two, fcntl.LOCK_SH | fcntl.LOCK_NB)
        fcntl.lockf(one, fcntl.LOCK_SH | fcntl.LOCK_NB)


def test_h23_statfs(shared, library_path):
    shown, below = os.statvfs(shared), os.statvfs(library_path)
    assert (shown.f_frsize, shown.f_blocks) == (below.f_frsize, below.f_blocks)
    assert shown.f_files == 11
    assert shown.f_namemax == 255


def test_only_the_models_asked_for_are_shown(mounts, tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    (source / "f").write_bytes(b"x")
    library = make_library(tmp_path / "lib", {b"org/a": source, b"org/b": source, b"c": source})
    root = mounts(library, models=(b"org/b",)).mountpoint
    assert [d for d, _, _ in os.walk(root)] == [str(root), str(root / "org"), str(root / "org/b")]
    assert not (root / "c").exists()
    assert (root / "org" / "b" / "f").read_bytes() == b"x"
