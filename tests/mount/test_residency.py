import mmap
import os
from contextlib import contextmanager

import pytest

from fragfs.mount import residency
from fragfs.mount.residency import Residency, count_resident, drop_pages

PAGE = mmap.PAGESIZE


@contextmanager
def opened(path):
    descriptor = os.open(path, os.O_RDONLY)
    yield descriptor
    os.close(descriptor)


@pytest.mark.parametrize(("size", "pages"), [(0, 0), (1, 1), (PAGE, 1), (10 * PAGE + 1, 11)])
def test_what_was_just_written_is_in_memory(tmp_path, size, pages):
    (tmp_path / "file").write_bytes(b"x" * size)
    with opened(tmp_path / "file") as descriptor:
        assert count_resident(descriptor) == Residency(pages, pages)


def test_what_nobody_touched_is_not(tmp_path):
    with (tmp_path / "file").open("wb") as file:
        file.truncate(8 * PAGE)
        file.seek(2 * PAGE)
        file.write(b"x" * PAGE)
    with opened(tmp_path / "file") as descriptor:
        found = count_resident(descriptor)
        assert found == Residency(8, 1)
        assert not found.is_complete
        assert count_resident(descriptor) == found, "counting read something"
        drop_pages(descriptor)


def test_large_files_are_counted_in_steps(tmp_path, monkeypatch):
    monkeypatch.setattr(residency, "_STEP_BYTES", 2 * PAGE)
    (tmp_path / "file").write_bytes(b"x" * (5 * PAGE + 7))
    with opened(tmp_path / "file") as descriptor:
        assert count_resident(descriptor) == Residency(6, 6)


def test_of_files_of_others_nothing_is_known(tmp_path, monkeypatch):
    (tmp_path / "file").write_bytes(b"x")
    monkeypatch.setattr(os, "geteuid", lambda: os.getuid() + 1)
    with opened(tmp_path / "file") as descriptor:
        found = count_resident(descriptor)
    assert found == Residency(1, None)
    assert not found.is_complete


def test_what_cannot_be_mapped_is_an_error(tmp_path):
    with opened("/proc/self/status") as descriptor:
        assert count_resident(descriptor) == Residency(0, 0)
    (tmp_path / "file").write_bytes(b"x")
    descriptor = os.open(tmp_path / "file", os.O_WRONLY)
    with pytest.raises(PermissionError):
        count_resident(descriptor)
    os.close(descriptor)
