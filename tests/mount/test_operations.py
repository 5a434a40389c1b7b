"""Request handlers without a kernel: what pyfuse3 would get."""

import errno
import os
import stat

import pytest
from pyfuse3 import FUSEError

from fragfs.errors import IntegrityError
from fragfs.mount.inodes import ROOT_INODE, InodeTable
from fragfs.mount.operations import ENTRY_TIMEOUT_S, MountOperations, Ownership
from fragfs.reader.fetch import FragmentFetcher
from fragfs.reader.file import FileReader
from tests.reader.fakes import MTIME_NS, FakeLibrary, memory_cache

DATA = bytes(range(256)) * 20


@pytest.fixture
def library():
    fake = FakeLibrary("/")
    fake.add(b"org/m", b"f", DATA)
    return fake


class Reading:
    """What reads, and what it was told."""

    def __init__(self, read):
        self.read = read
        self.told = []

    def open_file(self, content):
        self.told.append(("open", content.number))

    def close_file(self, content):
        self.told.append(("close", content.number))

    def backing(self, number):
        return 0

    def on_read(self, content, offset, size):
        self.told.append(("read", content.number, offset, size))

    async def prepare(self, content, offset, size):
        self.told.append(("prepare", content.number, offset, size))
        return True


@pytest.fixture
def operations(library, nursery):
    fetcher = FragmentFetcher(library.decode_fragment, memory_cache(), nursery, workers=1)
    table = InodeTable(library.lookup(b""))
    reading = Reading(FileReader(fetcher).read)
    return MountOperations(library, library, table, reading, Ownership(7, 8, 0o027))


async def walk(operations, *names):
    attributes = await operations.getattr(ROOT_INODE, None)
    for name in names:
        attributes = await operations.lookup(attributes.st_ino, name, None)
    return attributes


async def errno_from(awaitable):
    with pytest.raises(FUSEError) as caught:
        await awaitable
    return caught.value.errno


async def test_attributes_of_files_and_directories(operations):
    file = await walk(operations, b"org", b"m", b"f")
    assert file.st_mode == stat.S_IFREG | 0o440
    assert (file.st_uid, file.st_gid, file.st_nlink) == (7, 8, 1)
    assert (file.st_size, file.st_blocks, file.st_blksize) == (5120, 10, 4096)
    assert file.st_mtime_ns == MTIME_NS
    assert file.entry_timeout == file.attr_timeout == ENTRY_TIMEOUT_S >= 3600
    directory = await walk(operations, b"org", b"m")
    assert directory.st_mode == stat.S_IFDIR | 0o550
    assert directory.st_nlink == 2


async def test_a_name_that_no_file_can_have(operations):
    model = await walk(operations, b"org", b"m")
    assert await errno_from(operations.lookup(model.st_ino, b"n" * 255, None)) == errno.ENOENT
    assert await errno_from(operations.lookup(model.st_ino, b"n" * 256, None)) == errno.ENAMETOOLONG


async def test_blocks_cover_the_size(operations, library):
    for size in (0, 1, 511, 512, 513):
        library.add(b"org/m", b"s", b"x" * size)
        assert (await walk(operations, b"org", b"m", b"s")).st_blocks == (size + 511) // 512


async def test_h20_a_missing_name_is_enoent_and_not_cached(operations):
    assert await errno_from(operations.lookup(ROOT_INODE, b"nothing", None)) == errno.ENOENT


async def test_a_lookup_below_a_file_or_an_unknown_inode(operations):
    file = await walk(operations, b"org", b"m", b"f")
    assert await errno_from(operations.lookup(file.st_ino, b"x", None)) == errno.ENOTDIR
    assert await errno_from(operations.getattr(999, None)) == errno.ESTALE


async def test_reads_are_exact(operations):
    file = await walk(operations, b"org", b"m", b"f")
    opened = await operations.open(file.st_ino, os.O_RDONLY, None)
    assert opened.keep_cache
    assert not opened.direct_io
    for offset, size in ((0, 10), (990, 2500), (5000, 4096), (5120, 10), (9999, 10), (0, 0)):
        assert (
            bytes(await operations.read(opened.fh, offset, size)) == (DATA[offset : offset + size])
        )


@pytest.mark.parametrize("flags", [os.O_WRONLY, os.O_RDWR])
async def test_opening_for_writing_is_refused(operations, flags):
    file = await walk(operations, b"org", b"m", b"f")
    assert await errno_from(operations.open(file.st_ino, flags, None)) == errno.EROFS


async def test_handles_of_one_file_are_closed_one_by_one(operations):
    file = await walk(operations, b"org", b"m", b"f")
    first = await operations.open(file.st_ino, os.O_RDONLY, None)
    second = await operations.open(file.st_ino, os.O_RDONLY, None)
    await operations.release(first.fh)
    assert bytes(await operations.read(second.fh, 0, 4)) == DATA[:4]
    assert operations.open_paths() == [b"org/m/f"]
    await operations.release(second.fh)
    assert operations.open_paths() == []
    # The front is told once that there is a file, and once that there is none.
    number = file.st_ino
    assert operations._reading.told == [("open", number), ("read", number, 0, 4), ("close", number)]


async def test_what_the_front_asks_for(operations):
    file = await walk(operations, b"org", b"m", b"f")
    opened = await operations.open(file.st_ino, os.O_RDONLY, None)
    operations.note_read(opened.fh, 0, 9)
    assert await operations.prepare_read(opened.fh, 0, 9)
    assert bytes(await operations.read_content(opened.fh, 0, 9)) == DATA[:9]
    assert operations._reading.told[1:] == [
        ("read", file.st_ino, 0, 9),
        ("prepare", file.st_ino, 0, 9),
    ]
    await operations.release(opened.fh)
    # Of a file that was closed meanwhile there is nothing to follow or to prepare.
    told = list(operations._reading.told)
    operations.note_read(opened.fh, 0, 9)
    assert not await operations.prepare_read(opened.fh, 0, 9)
    assert operations._reading.told == told
    assert await errno_from(operations.read_content(opened.fh, 0, 9)) == errno.EIO


async def test_h04_an_open_file_survives_the_removal_of_its_model(operations, library):
    file = await walk(operations, b"org", b"m", b"f")
    opened = await operations.open(file.st_ino, os.O_RDONLY, None)
    library.remove(b"org")
    library.contents.clear()
    assert bytes(await operations.read(opened.fh, 0, 5120)) == DATA
    assert (await operations.getattr(file.st_ino, None)).st_size == 5120


async def test_opening_what_is_gone_makes_the_kernel_look_again(operations, library):
    file = await walk(operations, b"org", b"m", b"f")
    library.remove(b"org")
    library.contents.clear()
    assert await errno_from(operations.open(file.st_ino, os.O_RDONLY, None)) == errno.ESTALE


async def test_a_directory_that_is_gone(operations, library):
    directory = await walk(operations, b"org", b"m")
    library.remove(b"org")
    assert (await operations.getattr(directory.st_ino, None)).st_mode & stat.S_IFDIR
    assert await errno_from(operations.opendir(directory.st_ino, None)) == errno.ESTALE
    assert await errno_from(operations.lookup(directory.st_ino, b"f", None)) == errno.ENOENT


async def test_h13_directory_times_follow_the_catalog(operations, library):
    before = await walk(operations, b"org", b"m")
    library.add(b"org/m", b"g", b"new")
    assert (await operations.getattr(before.st_ino, None)).st_mtime_ns > before.st_mtime_ns


async def test_h02_a_fault_is_eio_and_says_where_once(operations, library, caplog):
    file = await walk(operations, b"org", b"m", b"f")
    opened = await operations.open(file.st_ino, os.O_RDONLY, None)
    library.failing[2] = IntegrityError("fragment 2 is damaged", fragment="aa", remedy="add it")
    for _ in range(3):
        assert await errno_from(operations.read(opened.fh, 500, 1000)) == errno.EIO
    assert [record.getMessage() for record in caplog.records] == [
        "I/O error reading org/m/f (models: org/m): fragment 2 is damaged; add it"
    ]
    assert bytes(await operations.read(opened.fh, 0, 1000)) == DATA[:1000]


async def test_h02_a_short_read_becomes_eio(operations, library):
    file = await walk(operations, b"org", b"m", b"f")
    opened = await operations.open(file.st_ino, os.O_RDONLY, None)

    async def read_short(content, offset, size):
        return b"x" * (size - 1)

    operations._reading = Reading(read_short)
    assert await errno_from(operations.read(opened.fh, 0, 10)) == errno.EIO


async def test_h21_extended_attributes(operations, library):
    file = await walk(operations, b"org", b"m", b"f")
    number = file.st_ino
    assert await operations.getxattr(number, b"user.fragfs.models", None) == b"org/m"
    assert await operations.getxattr(number, b"user.fragfs.sha256", None) == b"00" * 32
    assert await operations.getxattr(number, b"user.fragfs.stored_bytes", None) == b"2560"
    assert set(await operations.listxattr(number, None)) == {
        b"user.fragfs.models",
        b"user.fragfs.sha256",
        b"user.fragfs.stored_bytes",
    }
    for name in (b"security.selinux", b"system.posix_acl_access", b"user.other"):
        assert await errno_from(operations.getxattr(number, name, None)) == errno.ENODATA
    name = b"user.fragfs.sha256"
    assert await errno_from(operations.getxattr(ROOT_INODE, name, None)) == errno.ENODATA
    assert list(await operations.listxattr(ROOT_INODE, None)) == []


async def test_h23_statfs_is_the_library_s_file_system(operations):
    shown, below = await operations.statfs(None), os.statvfs("/")
    assert (shown.f_bsize, shown.f_frsize, shown.f_blocks, shown.f_namemax) == (
        below.f_bsize,
        below.f_frsize,
        below.f_blocks,
        255,
    )
    assert shown.f_files == 1


async def test_forget_never_raises(operations, caplog):
    await operations.forget([(1, 5), (999, 1), (1024, 1)])
    assert caplog.records == []

    class Broken:
        def forget(self, number, count):
            raise KeyError(number)

    operations._inodes = Broken()
    await operations.forget([(1024, 1)])
    assert "forget failed unexpectedly" in caplog.text
