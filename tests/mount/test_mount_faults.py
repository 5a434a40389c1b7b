"""Damage below the mount: the reader gets EIO, the log says where, everything else goes on."""

import mmap
import os
import signal

import pytest

from fragfs.library.library import FragmentLibrary
from tests.mount.support import Reader, make_library

pytestmark = [pytest.mark.mount, pytest.mark.slow]


@pytest.fixture
def damaged(tmp_path):
    """A library in which one byte of one fragment's record is flipped; (path, fragment)."""
    source = tmp_path / "source"
    source.mkdir()
    (source / "f").write_bytes(os.urandom(4 << 20))
    (source / "g").write_bytes(b"healthy")
    path = make_library(tmp_path / "lib", {b"org/m": source})
    with FragmentLibrary.open(path) as library:
        content = library.open_content(library.lookup(b"org/m/f").content)
        extent = content.extents[2]
        fragment = library.fragment(extent.fragment)
    (pack,) = [p for p in (path / "packs").iterdir() if int(p.stem) == fragment.pack]
    with pack.open("r+b") as file:
        file.seek(fragment.offset + fragment.record_size // 2)
        byte = file.read(1)
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte[0] ^ 0x10]))
    return path, source, extent, fragment


def test_h02_a_damaged_fragment_is_eio_and_logged_once(mounts, damaged):
    path, source, extent, fragment = damaged
    root = mounts(path).mountpoint / "org" / "m"
    expected = (source / "f").read_bytes()
    middle = extent.offset + extent.size // 2
    descriptor = os.open(root / "f", os.O_RDONLY | os.O_DIRECT)
    buffer = mmap.mmap(-1, 4096)
    for _ in range(3):
        with pytest.raises(OSError, match="Input/output error"):
            os.preadv(descriptor, [buffer], middle // 4096 * 4096)
    os.close(descriptor)
    with (root / "f").open("rb") as file:
        assert file.read(1000) == expected[:1000]
        with pytest.raises(OSError, match="Input/output error"):
            file.read()
        file.seek(3 << 20)
        assert file.read() == expected[3 << 20 :]
        assert os.fstat(file.fileno()).st_size == len(expected)
    assert (root / "g").read_bytes() == b"healthy"
    errors = [line for line in mounts.read_log().splitlines() if "ERROR" in line]
    assert len(errors) == 1
    for words in (
        fragment.id.short,
        f"pack {fragment.pack}",
        str(fragment.offset),
        "org/m",
        "restore the pack",
    ):
        assert words in errors[0]


def test_h02_a_mapped_reader_of_a_damaged_fragment_gets_sigbus_not_zeros(mounts, damaged):
    path, _, extent, _ = damaged
    root = mounts(path).mountpoint / "org" / "m"
    with Reader(
        "mapped = map_file(sys.argv[1]); pause(); print(mapped[int(sys.argv[2])])",
        root / "f",
        extent.offset + extent.size // 2,
    ) as reader:
        assert reader.proceed()[0] == -signal.SIGBUS


def test_a_pack_that_comes_back_is_read_again(mounts, damaged):
    """A fault is told to the reader and to nobody after it: nothing bad is remembered."""
    path, _, _, _ = damaged
    (path / "packs").rename(path / "elsewhere")
    root = mounts(path).mountpoint / "org" / "m"
    with (root / "g").open("rb", buffering=0) as file:
        with pytest.raises(OSError, match="Input/output error"):
            file.read(100)
        (path / "elsewhere").rename(path / "packs")
        assert file.read(100) == b"healthy"
