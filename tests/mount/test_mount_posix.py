"""What POSIX says of a read-only file system, call by call.

Each call has the answer that is expected of it, and, where root may mount a read-only tmpfs, is
asked of that as well: the kernel's own file system is the oracle of what the table expects.
"""

import ctypes
import errno
import fcntl
import mmap
import os
import random
import stat
import struct
import subprocess
import sys

import pytest

from fragfs.mount.table import find_mount
from tests.mount.support import make_library, run_reader

pytestmark = [pytest.mark.mount, pytest.mark.slow]

SIZE = 1_300_000
CROWD = 3000
LONGEST = "n" * 255
O_TMPFILE = 0o20200000
O_PATH = os.O_PATH


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    """The source of both file systems."""
    root = tmp_path_factory.mktemp("posix") / "m"
    (root / "dir" / "deep").mkdir(parents=True)
    (root / "file").write_bytes(random.Random(1).randbytes(SIZE))
    (root / "empty").write_bytes(b"")
    (root / "dir" / "inner").write_bytes(b"inner")
    (root / "dir" / "deep" / "last").write_bytes(b"last")
    (root / LONGEST).write_bytes(b"long")
    (root / "crowd").mkdir()
    for number in range(CROWD):
        (root / "crowd" / f"{number:05}-{'x' * (number % 40)}").write_bytes(b"")
    for parent, directories, files in os.walk(root, topdown=False):
        for name in files:
            os.chmod(os.path.join(parent, name), 0o444)
        for name in directories:
            os.chmod(os.path.join(parent, name), 0o555)
    return root


@pytest.fixture(scope="module")
def mounted(tmp_path_factory, tree):
    from tests.mount.conftest import Mounts

    place = tmp_path_factory.mktemp("posix-mount")
    made = Mounts(place)
    report = made(make_library(place / "lib", {b"m": tree}))
    yield report.mountpoint / "m"
    made.close()


@pytest.fixture(scope="module")
def oracle(tmp_path_factory, tree):
    """The same tree in a tmpfs that is mounted read-only."""
    if os.geteuid() != 0:
        pytest.skip("only root may mount the tmpfs to compare with")
    place = tmp_path_factory.mktemp("posix-oracle")
    made = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=64m,nosuid,nodev", "oracle", place],
        capture_output=True,
        text=True,
        check=False,
    )
    if made.returncode:
        pytest.skip(f"no tmpfs to compare with: {made.stderr.strip()}")
    try:
        subprocess.run(["cp", "-a", tree, place / "m"], check=True)
        subprocess.run(["mount", "-o", "remount,ro", place], check=True)
        yield place / "m"
    finally:
        subprocess.run(["umount", place], check=True)


def opening(name, flags, mode=0o600):
    def call(root):
        os.close(os.open(root / name, flags, mode))

    return call


def with_open(call, name="file", flags=os.O_RDONLY):
    """A call on an open descriptor."""

    def run(root):
        descriptor = os.open(root / name, flags)
        try:
            return call(descriptor)
        finally:
            os.close(descriptor)

    return run


def both_open(call):
    def run(root):
        with (root / "file").open("rb") as one, (root / "file").open("rb") as two:
            return call(one.fileno(), two.fileno())

    return run


def lock(kind):
    return struct.pack("hhqqi", kind, os.SEEK_SET, 0, 0, 0)


def flock_twice(one, two):
    fcntl.flock(one, fcntl.LOCK_EX)
    fcntl.flock(two, fcntl.LOCK_EX | fcntl.LOCK_NB)


def flock_shared(one, two):
    fcntl.flock(one, fcntl.LOCK_SH)
    fcntl.flock(two, fcntl.LOCK_SH | fcntl.LOCK_NB)


def map_with(flags, protection):
    return with_open(lambda fd: mmap.mmap(fd, SIZE, flags, protection).close())


def libc_call(name, *arguments):
    libc = ctypes.CDLL(None, use_errno=True)
    if getattr(libc, name)(*arguments) < 0:
        raise OSError(ctypes.get_errno(), name)


def utimens_now(descriptor):
    os.utime(descriptor)


CALLS = {
    # open
    "open O_RDONLY": (opening("file", os.O_RDONLY), "ok"),
    "open O_WRONLY": (opening("file", os.O_WRONLY), "EROFS"),
    "open O_RDWR": (opening("file", os.O_RDWR), "EROFS"),
    "open O_RDONLY|O_TRUNC": (opening("file", os.O_RDONLY | os.O_TRUNC), "EROFS"),
    "open O_WRONLY|O_TRUNC": (opening("file", os.O_WRONLY | os.O_TRUNC), "EROFS"),
    "open O_WRONLY|O_APPEND": (opening("file", os.O_WRONLY | os.O_APPEND), "EROFS"),
    "open O_RDONLY|O_APPEND": (opening("file", os.O_APPEND), "ok"),
    "open O_CREAT, there": (opening("file", os.O_CREAT), "ok"),
    "open O_CREAT|O_EXCL, there": (opening("file", os.O_CREAT | os.O_EXCL), "EEXIST"),
    "open O_CREAT|O_RDWR, there": (opening("file", os.O_CREAT | os.O_RDWR), "EROFS"),
    "open O_CREAT": (opening("new", os.O_CREAT), "EROFS"),
    "open O_CREAT|O_WRONLY": (opening("new", os.O_CREAT | os.O_WRONLY), "EROFS"),
    "open O_CREAT|O_EXCL|O_RDWR": (
        opening("new", os.O_CREAT | os.O_EXCL | os.O_RDWR),
        "EROFS",
    ),
    "open O_CREAT in nothing": (opening("no/new", os.O_CREAT), "ENOENT"),
    "open O_CREAT in a file": (opening("file/new", os.O_CREAT), "ENOTDIR"),
    "open O_CREAT of a directory": (opening("dir", os.O_CREAT), "EISDIR"),
    "open O_DIRECTORY": (opening("dir", os.O_DIRECTORY), "ok"),
    "open O_DIRECTORY of a file": (opening("file", os.O_DIRECTORY), "ENOTDIR"),
    "open O_DIRECTORY of nothing": (opening("no", os.O_DIRECTORY), "ENOENT"),
    "open a directory": (opening("dir", os.O_RDONLY), "ok"),
    "open a directory O_WRONLY": (opening("dir", os.O_WRONLY), "EISDIR"),
    "open a directory O_RDWR": (opening("dir", os.O_RDWR), "EISDIR"),
    "open a directory O_TRUNC": (opening("dir", os.O_TRUNC), "EISDIR"),
    "open O_NOFOLLOW": (opening("file", os.O_NOFOLLOW), "ok"),
    "open O_PATH": (opening("file", O_PATH), "ok"),
    "open O_NOATIME": (opening("file", os.O_NOATIME), "ok"),
    "open O_SYNC|O_NONBLOCK": (opening("file", os.O_SYNC | os.O_NONBLOCK), "ok"),
    "open O_TMPFILE": (opening("dir", O_TMPFILE | os.O_RDWR), "EROFS"),
    "open nothing": (opening("no", os.O_RDONLY), "ENOENT"),
    "open below a file": (opening("file/x", os.O_RDONLY), "ENOTDIR"),
    "open with a slash at its end": (lambda root: os.open(f"{root}/file/", 0), "ENOTDIR"),
    "open by way of ..": (opening("dir/../dir/./inner", os.O_RDONLY), "ok"),
    "open the longest name": (opening(LONGEST, os.O_RDONLY), "ok"),
    "open a name of 255 bytes": (opening("y" * 255, os.O_RDONLY), "ENOENT"),
    "open a name of 256 bytes": (opening("y" * 256, os.O_RDONLY), "ENAMETOOLONG"),
    "create a name of 256 bytes": (opening("y" * 256, os.O_CREAT), "ENAMETOOLONG"),
    "open a path of 5000 bytes": (opening("dir/../" * 715 + "file", os.O_RDONLY), "ENAMETOOLONG"),
    # attributes
    "stat nothing": (lambda root: os.stat(root / "no"), "ENOENT"),
    "stat a name of 256 bytes": (lambda root: os.lstat(root / ("y" * 256)), "ENAMETOOLONG"),
    "stat below a file": (lambda root: os.stat(root / "file" / "x"), "ENOTDIR"),
    "readlink a file": (lambda root: os.readlink(root / "file"), "EINVAL"),
    "access F_OK": (lambda root: libc_access(root / "file", os.F_OK), "ok"),
    "access R_OK": (lambda root: libc_access(root / "file", os.R_OK), "ok"),
    "access W_OK": (lambda root: libc_access(root / "file", os.W_OK), "EROFS"),
    "access X_OK": (lambda root: libc_access(root / "file", os.X_OK), "EACCES"),
    "access a directory R_OK|X_OK": (lambda root: libc_access(root / "dir", 5), "ok"),
    "access a directory W_OK": (lambda root: libc_access(root / "dir", os.W_OK), "EROFS"),
    "access nothing": (lambda root: libc_access(root / "no", os.F_OK), "ENOENT"),
    "execute": (lambda root: os.posix_spawn(root / "file", ["file"], {}), "EACCES"),
    "chmod": (lambda root: os.chmod(root / "file", 0o600), "EROFS"),
    "chmod as it is": (lambda root: os.chmod(root / "file", 0o444), "EROFS"),
    "chmod nothing": (lambda root: os.chmod(root / "no", 0o600), "ENOENT"),
    "fchmod": (with_open(lambda fd: os.fchmod(fd, 0o600)), "EROFS"),
    "chown": (lambda root: os.chown(root / "file", 1, 1), "EROFS"),
    "chown to nobody": (lambda root: os.chown(root / "file", -1, -1), "EROFS"),
    "lchown": (lambda root: os.lchown(root / "dir", 1, 1), "EROFS"),
    "fchown": (with_open(lambda fd: os.fchown(fd, 1, 1)), "EROFS"),
    "utimensat": (lambda root: os.utime(root / "file", ns=(1, 1)), "EROFS"),
    "utimensat now": (lambda root: os.utime(root / "dir"), "EROFS"),
    "futimens": (with_open(utimens_now), "EROFS"),
    "truncate": (lambda root: os.truncate(root / "file", 0), "EROFS"),
    "truncate to its size": (lambda root: os.truncate(root / "file", SIZE), "EROFS"),
    "truncate a directory": (lambda root: os.truncate(root / "dir", 0), "EISDIR"),
    "truncate nothing": (lambda root: os.truncate(root / "no", 0), "ENOENT"),
    "ftruncate": (with_open(lambda fd: os.ftruncate(fd, 0)), "EINVAL"),
    "setxattr": (lambda root: os.setxattr(root / "file", "user.x", b"1"), "EROFS"),
    "setxattr of a directory": (lambda root: os.setxattr(root / "dir", "user.x", b"1"), "EROFS"),
    "fsetxattr": (with_open(lambda fd: os.setxattr(fd, "user.x", b"1")), "EROFS"),
    "removexattr": (lambda root: os.removexattr(root / "file", "user.x"), "EROFS"),
    "getxattr of none": (lambda root: os.getxattr(root / "file", "user.none"), "ENODATA"),
    # names
    "mkdir": (lambda root: os.mkdir(root / "new"), "EROFS"),
    "mkdir, there": (lambda root: os.mkdir(root / "dir"), "EEXIST"),
    "mkdir in nothing": (lambda root: os.mkdir(root / "no" / "new"), "ENOENT"),
    "mkdir in a file": (lambda root: os.mkdir(root / "file" / "new"), "ENOTDIR"),
    "mkdir a name of 256 bytes": (lambda root: os.mkdir(root / ("y" * 256)), "ENAMETOOLONG"),
    "mknod": (lambda root: os.mknod(root / "new"), "EROFS"),
    "mknod, there": (lambda root: os.mknod(root / "file"), "EEXIST"),
    "mkfifo": (lambda root: os.mkfifo(root / "new"), "EROFS"),
    "link": (lambda root: os.link(root / "file", root / "new"), "EROFS"),
    "link, there": (lambda root: os.link(root / "file", root / "empty"), "EEXIST"),
    "link nothing": (lambda root: os.link(root / "no", root / "new"), "ENOENT"),
    "link from elsewhere": (lambda root: os.link(__file__, root / "new"), "EXDEV or EROFS"),
    "symlink": (lambda root: os.symlink("file", root / "new"), "EROFS"),
    "symlink, there": (lambda root: os.symlink("file", root / "empty"), "EEXIST"),
    "rename": (lambda root: os.rename(root / "file", root / "new"), "EROFS"),
    "rename over another": (lambda root: os.rename(root / "file", root / "empty"), "EROFS"),
    "rename to itself": (lambda root: os.rename(root / "file", root / "file"), "EROFS"),
    "rename a directory": (lambda root: os.rename(root / "dir", root / "new"), "EROFS"),
    "rename to elsewhere": (
        lambda root: os.rename(root / "file", root.parent.parent / "file"),
        "EXDEV",
    ),
    "unlink": (lambda root: os.unlink(root / "file"), "EROFS"),
    "unlink nothing": (lambda root: os.unlink(root / "no"), "EROFS"),
    "unlink below a file": (lambda root: os.unlink(root / "file" / "x"), "ENOTDIR"),
    "unlink a directory": (lambda root: os.unlink(root / "dir"), "EROFS"),
    "rmdir": (lambda root: os.rmdir(root / "dir"), "EROFS"),
    "rmdir a file": (lambda root: os.rmdir(root / "file"), "EROFS"),
    "rmdir .": (lambda root: os.rmdir(f"{root}/dir/."), "EINVAL"),
    "rmdir ..": (lambda root: os.rmdir(f"{root}/dir/.."), "ENOTEMPTY"),
    # descriptors
    "write": (with_open(lambda fd: os.write(fd, b"x")), "EBADF"),
    "pwrite": (with_open(lambda fd: os.pwrite(fd, b"x", 0)), "EBADF"),
    "posix_fallocate": (with_open(lambda fd: os.posix_fallocate(fd, 0, 10)), "EBADF"),
    "copy_file_range into": (both_open(lambda a, b: os.copy_file_range(a, b, 10)), "EBADF"),
    "sendfile into": (both_open(lambda a, b: os.sendfile(b, a, 0, 10)), "EBADF"),
    "read a directory": (with_open(lambda fd: os.read(fd, 10), "dir"), "EISDIR"),
    "read O_PATH": (with_open(lambda fd: os.read(fd, 10), flags=O_PATH), "EBADF"),
    "list a file": (lambda root: os.listdir(root / "file"), "ENOTDIR"),
    "list nothing": (lambda root: os.listdir(root / "no"), "ENOENT"),
    "chdir into a file": (lambda root: os.chdir(root / "file"), "ENOTDIR"),
    "pread before the start": (with_open(lambda fd: os.pread(fd, 1, -1)), "EINVAL"),
    "pread at the end": (with_open(lambda fd: os.pread(fd, 10, SIZE)), "ok: b''"),
    "pread far behind it": (with_open(lambda fd: os.pread(fd, 10, 1 << 60)), "ok: b''"),
    "pread 0 bytes": (with_open(lambda fd: os.pread(fd, 0, 0)), "ok: b''"),
    "pread across the end": (with_open(lambda fd: len(os.pread(fd, 99, SIZE - 7))), "ok: 7"),
    "lseek before the start": (with_open(lambda fd: os.lseek(fd, -1, 0)), "EINVAL"),
    "lseek behind the end": (with_open(lambda fd: os.lseek(fd, 5, 2)), f"ok: {SIZE + 5}"),
    "lseek SEEK_DATA": (with_open(lambda fd: os.lseek(fd, 9, os.SEEK_DATA)), "ok: 9"),
    "lseek SEEK_HOLE": (with_open(lambda fd: os.lseek(fd, 9, os.SEEK_HOLE)), f"ok: {SIZE}"),
    "lseek SEEK_DATA at the end": (with_open(lambda fd: os.lseek(fd, SIZE, 3)), "ENXIO"),
    "lseek SEEK_HOLE at the end": (with_open(lambda fd: os.lseek(fd, SIZE, 4)), "ENXIO"),
    "lseek SEEK_DATA of nothing": (with_open(lambda fd: os.lseek(fd, 0, 3), "empty"), "ENXIO"),
    "lseek with another whence": (with_open(lambda fd: os.lseek(fd, 0, 9)), "EINVAL"),
    "fsync": (with_open(os.fsync), "ok"),
    "fdatasync": (with_open(os.fdatasync), "ok"),
    "fsync a directory": (with_open(os.fsync, "dir"), "ok"),
    "syncfs": (with_open(lambda fd: libc_call("syncfs", fd)), "ok"),
    "fadvise": (with_open(lambda fd: os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_RANDOM)), "ok"),
    "readahead": (
        with_open(lambda fd: libc_call("readahead", fd, ctypes.c_int64(0), 1 << 20)),
        "ok",
    ),
    "map private, writable": (map_with(mmap.MAP_PRIVATE, 3), "ok"),
    "map shared": (map_with(mmap.MAP_SHARED, mmap.PROT_READ), "ok"),
    "map shared, writable": (map_with(mmap.MAP_SHARED, 3), "EACCES"),
    "map a directory": (with_open(lambda fd: mmap.mmap(fd, 1, 1, 1), "dir"), "EACCES or ENODEV"),
    # locks
    "flock exclusively": (with_open(lambda fd: fcntl.flock(fd, fcntl.LOCK_EX)), "ok"),
    "flock exclusively twice": (both_open(flock_twice), "EAGAIN"),
    "flock shared twice": (both_open(flock_shared), "ok"),
    "fcntl read lock": (
        with_open(lambda fd: fcntl.fcntl(fd, fcntl.F_SETLK, lock(fcntl.F_RDLCK)) and None),
        "ok",
    ),
    "fcntl write lock": (
        with_open(lambda fd: fcntl.fcntl(fd, fcntl.F_SETLK, lock(fcntl.F_WRLCK))),
        "EBADF",
    ),
}

DIFFERS = {
    "map a directory": "a directory of tmpfs has no operations to map with; neither can be mapped",
}
"""What the oracle answers in its own way, and why both are right."""


def libc_access(path, mode):
    libc_call("faccessat", -100, os.fsencode(path), mode, 0)


def outcome(call, root):
    """How a call ends: the name of an error, or "ok" and what it returned."""
    try:
        returned = call(root)
    except OSError as error:
        return errno.errorcode[error.errno]
    return "ok" if returned is None else f"ok: {returned!r}"


@pytest.mark.parametrize("name", CALLS)
def test_a_call_is_answered(mounted, name):
    call, expected = CALLS[name]
    assert outcome(call, mounted) in expected.split(" or ")


def test_the_table_is_what_a_read_only_tmpfs_answers(oracle):
    answers = {name: outcome(call, oracle) for name, (call, _) in CALLS.items()}
    differing = {
        name: (answer, CALLS[name][1])
        for name, answer in answers.items()
        if answer not in CALLS[name][1].split(" or ")
    }
    assert differing.keys() <= DIFFERS.keys(), differing


def test_links_from_elsewhere(mounted, tmp_path):
    (tmp_path / "to file").symlink_to(mounted / "file")
    (tmp_path / "to dir").symlink_to(mounted / "dir")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    (tmp_path / "to loop").symlink_to(tmp_path / "loop")
    assert outcome(opening("to file", os.O_NOFOLLOW), tmp_path) == "ELOOP"
    assert outcome(opening("to file", os.O_RDONLY), tmp_path) == "ok"
    assert outcome(opening("to file", os.O_RDWR), tmp_path) == "EROFS"
    assert outcome(opening("to dir/inner", os.O_NOFOLLOW), tmp_path) == "ok"
    assert outcome(opening("to dir", os.O_NOFOLLOW | os.O_DIRECTORY), tmp_path) == "ENOTDIR"
    assert outcome(opening("to loop", os.O_RDONLY), tmp_path) == "ELOOP"


def test_nothing_changed(mounted, tree):
    """After all calls above, and in whatever order they were made."""
    for parent, directories, files in os.walk(tree):
        shown = mounted / os.path.relpath(parent, tree)
        assert sorted(os.listdir(shown)) == sorted(directories + files)
    assert (mounted / "file").read_bytes() == (tree / "file").read_bytes()


def test_every_field_of_stat(mounted, tree):
    for name in ("file", "empty", "dir/inner", LONGEST):
        shown, wanted = os.lstat(mounted / name), os.lstat(tree / name)
        assert stat.S_ISREG(shown.st_mode)
        assert stat.S_IMODE(shown.st_mode) == 0o444
        assert shown.st_size == wanted.st_size
        assert shown.st_nlink == 1
        assert shown.st_mtime_ns == shown.st_ctime_ns == shown.st_atime_ns == wanted.st_mtime_ns
        assert shown.st_blocks == -(-shown.st_size // 512)
        assert (shown.st_uid, shown.st_gid, shown.st_rdev) == (os.getuid(), os.getgid(), 0)
        with (mounted / name).open("rb") as file:
            assert os.fstat(file.fileno()) == shown
    shown = os.lstat(mounted / "dir")
    assert stat.S_ISDIR(shown.st_mode)
    assert stat.S_IMODE(shown.st_mode) == 0o555
    # 2 for all: as on btrfs, which says that links do not count subdirectories.
    assert shown.st_nlink == 2


def test_reading_leaves_the_times(mounted):
    before = os.stat(mounted / "file")
    (mounted / "file").read_bytes()
    os.listdir(mounted)
    assert os.stat(mounted / "file") == before


def test_statfs(mounted):
    status = os.statvfs(mounted)
    assert status.f_flag & os.ST_RDONLY
    assert status.f_flag & os.ST_NOSUID
    assert status.f_namemax == 255
    assert status.f_blocks >= status.f_bfree >= status.f_bavail
    with (mounted / "file").open("rb") as file:
        assert os.fstatvfs(file.fileno()).f_files == status.f_files


class Dirent(ctypes.Structure):
    _fields_ = (
        ("inode", ctypes.c_uint64),
        ("offset", ctypes.c_int64),
        ("length", ctypes.c_ushort),
        ("kind", ctypes.c_ubyte),
        ("name", ctypes.c_char * 256),
    )


class Listing:
    """opendir, readdir, telldir and seekdir of the C library."""

    def __init__(self, path):
        self._libc = ctypes.CDLL(None, use_errno=True)
        for name, result, arguments in (
            ("opendir", ctypes.c_void_p, [ctypes.c_char_p]),
            ("readdir", ctypes.POINTER(Dirent), [ctypes.c_void_p]),
            ("telldir", ctypes.c_long, [ctypes.c_void_p]),
            ("seekdir", None, [ctypes.c_void_p, ctypes.c_long]),
            ("rewinddir", None, [ctypes.c_void_p]),
            ("closedir", ctypes.c_int, [ctypes.c_void_p]),
        ):
            function = getattr(self._libc, name)
            function.restype, function.argtypes = result, arguments
        self._handle = self._libc.opendir(os.fsencode(path))
        assert self._handle

    def __enter__(self):
        return self

    def __exit__(self, *_):
        assert self._libc.closedir(self._handle) == 0

    def next(self):
        """The next entry's name; None at the end."""
        entry = self._libc.readdir(self._handle)
        return os.fsdecode(entry.contents.name) if entry else None

    def rest(self):
        return list(iter(self.next, None))

    def tell(self):
        return self._libc.telldir(self._handle)

    def seek(self, position):
        self._libc.seekdir(self._handle, position)

    def rewind(self):
        self._libc.rewinddir(self._handle)


def test_seekdir_goes_back_to_where_telldir_was(mounted):
    with Listing(mounted / "crowd") as listing:
        places, names = [], []
        while True:
            place = listing.tell()
            name = listing.next()
            if name is None:
                break
            places.append(place)
            names.append(name)
        assert len(names) == len(set(names)) == CROWD + names.count(".") + names.count("..")
        for index in random.Random(2).sample(range(len(names)), 60):
            listing.seek(places[index])
            assert [listing.next() for _ in range(3)] == [*names[index : index + 3], None][:3]
        listing.rewind()
        assert listing.rest() == names


def test_two_listings_of_one_directory_do_not_meet(mounted):
    with Listing(mounted / "crowd") as one, Listing(mounted / "crowd") as two:
        first = [one.next() for _ in range(1500)]
        assert two.rest() == [*first, *one.rest()]


def test_a_listing_shows_inodes_and_kinds_as_stat_does(mounted):
    with os.scandir(mounted) as entries:
        for entry in entries:
            status = os.lstat(entry.path)
            assert entry.inode() == status.st_ino
            assert entry.is_dir() == stat.S_ISDIR(status.st_mode)
            assert entry.is_file() == stat.S_ISREG(status.st_mode)
            assert not entry.is_symlink()


def test_a_working_directory_inside(mounted):
    program = (
        "import os, sys; os.chdir(sys.argv[1]); print(os.getcwd(), os.listdir('..') != [],"
        " open('inner', 'rb').read(), os.path.samefile('.', sys.argv[1]))"
    )
    told = run_reader(program, mounted / "dir").stdout
    assert told.strip() == f"{mounted / 'dir'} True b'inner' True"


def test_descriptors_are_independent(mounted, tree):
    expected = (tree / "file").read_bytes()
    one, two = (os.open(mounted / "file", os.O_RDONLY) for _ in range(2))
    copy = os.dup(one)
    assert os.read(one, 100) == expected[:100]
    assert os.read(copy, 100) == expected[100:200]
    assert os.read(two, 100) == expected[:100]
    os.close(one)
    assert os.read(copy, 100) == expected[200:300]
    os.close(copy)
    os.close(two)


def test_relative_calls(mounted):
    descriptor = os.open(mounted / "dir", O_PATH | os.O_DIRECTORY)
    inner = os.open("inner", os.O_RDONLY, dir_fd=descriptor)
    assert os.read(inner, 9) == b"inner"
    assert os.stat("deep/last", dir_fd=descriptor).st_size == 4
    with pytest.raises(OSError, match="Read-only"):
        os.unlink("inner", dir_fd=descriptor)
    os.close(inner)
    os.close(descriptor)


def test_the_mount_point_itself(mounted):
    root = mounted.parent
    assert find_mount(root).is_fragfs
    assert os.path.ismount(root)
    for call, expected in (
        (lambda: os.rmdir(root), errno.EBUSY),
        (lambda: os.rename(root, root.parent / "other"), errno.EBUSY),
        (lambda: os.mkdir(root / "new"), errno.EROFS),
        (lambda: os.rmdir(mounted), errno.EROFS),
        (lambda: os.rename(mounted, root / "other"), errno.EROFS),
    ):
        with pytest.raises(OSError) as caught:  # noqa: PT011  # its number is what is compared
            call()
        assert caught.value.errno == expected


def test_a_file_is_watched(mounted):
    """inotify takes a watch, although nothing ever happens to a file."""
    libc = ctypes.CDLL(None, use_errno=True)
    descriptor = libc.inotify_init1(os.O_NONBLOCK)
    assert libc.inotify_add_watch(descriptor, os.fsencode(mounted / "file"), 0x20) >= 0
    (mounted / "file").read_bytes()
    assert len(os.read(descriptor, 100)) == 16
    os.close(descriptor)


def test_many_descriptors_of_one_file(mounted, tree):
    expected = (tree / "file").read_bytes()[:16]
    program = """
import os, sys
descriptors = [os.open(sys.argv[1], os.O_RDONLY) for _ in range(900)]
print({os.pread(fd, 16, 0) for fd in descriptors} == {bytes.fromhex(sys.argv[2])})
"""
    assert run_reader(program, mounted / "file", expected.hex()).stdout == "True\n"


def test_a_process_without_rights_is_refused(mounted):
    """Not with allow_other: the kernel keeps everybody else out."""
    if os.geteuid() != 0:
        pytest.skip("only root may be somebody else")
    program = """
import os, sys
os.setgid(65534); os.setuid(65534)
try:
    os.stat(sys.argv[1])
except PermissionError as error:
    print("refused", error.errno)
"""
    told = subprocess.run(
        [sys.executable, "-c", program, mounted], capture_output=True, text=True, check=True
    )
    assert told.stdout == f"refused {errno.EACCES}\n", told.stderr
