"""Reading ahead, on plain files: nothing here knows that a file is mounted."""

import os

import pytest

from fragfs.mount import warm
from fragfs.mount.residency import Residency
from fragfs.mount.warm import (
    MEMORY_KEPT_BYTES,
    FileResidency,
    check_files,
    drop_files,
    find_files,
    measure_need,
    warm_files,
)

SIZE = 3_000_000


class Recorder:
    """A `Progress` that remembers."""

    def __init__(self):
        self.total = None
        self.done = 0
        self.noted = set()

    def start(self, what, total_bytes):
        self.total = total_bytes

    def advance(self, size):
        self.done += size

    def note(self, text):
        self.noted.add(text)


@pytest.fixture
def files(tmp_path):
    (tmp_path / "m").mkdir()
    for name in ("a", "b", "c"):
        (tmp_path / "m" / name).write_bytes(os.urandom(SIZE))
    os.link(tmp_path / "m" / "a", tmp_path / "m" / "same")
    (tmp_path / "m" / "empty").touch()
    found, missing = find_files(tmp_path, [b"m/a", b"m/b", b"m/c", b"m/same", b"m/empty", b"m/no"])
    assert [name for name, _ in missing] == [b"m/no"]
    return found


def test_everything_is_read_once(files):
    progress = Recorder()
    report = warm_files(files, progress)
    assert (report.file_count, report.total_bytes) == (5, 3 * SIZE)
    assert report.read_bytes == 3 * SIZE
    assert (report.left_out_bytes, report.failed) == (0, [])
    assert (progress.total, progress.done) == (3 * SIZE, 3 * SIZE)
    assert progress.noted <= {"m/a", "m/b", "m/c", "m/same"}
    assert all(share.is_complete for share in check_files(files))


def test_files_are_read_in_parts_that_cover_them(files, monkeypatch):
    monkeypatch.setattr(warm, "_PART_BYTES", 700_001)
    monkeypatch.setattr(warm, "_READ_BYTES", 99_999)
    assert warm_files(files).read_bytes == 3 * SIZE


def test_a_file_that_cannot_be_read_does_not_stop_the_others(files):
    files[1].path.unlink()
    report = warm_files(files)
    ((failed, error),) = report.failed
    assert (failed.name, type(error)) == (b"m/b", FileNotFoundError)
    assert (report.read_bytes, report.left_out_bytes) == (2 * SIZE, 0)
    gone = check_files(files)[1]
    assert (gone.residency, gone.error) == (None, "No such file or directory")
    assert not gone.is_complete


def sparse(tmp_path, size=10 << 20):
    """A file of which nothing is in memory."""
    with (tmp_path / "sparse").open("wb") as file:
        file.truncate(size)
    (found,), _ = find_files(tmp_path, [b"sparse"])
    return found


def test_memory_is_left_to_others(tmp_path, monkeypatch):
    monkeypatch.setattr(warm, "_MEASURED_EVERY_BYTES", 1 << 20)
    file = sparse(tmp_path)
    report = warm_files([file], memory=lambda: MEMORY_KEPT_BYTES + (4 << 20), threads=1)
    assert report.read_bytes == 4 << 20
    assert report.left_out_bytes == 6 << 20
    assert measure_need([file], lambda: 0)[1] == 0


def test_what_is_in_memory_needs_no_more(files):
    needed, room = measure_need(files, lambda: MEMORY_KEPT_BYTES + 3 * SIZE + 5)
    assert (needed, room) == (0, 5)
    report = warm_files(files, memory=lambda: MEMORY_KEPT_BYTES + 3 * SIZE)
    assert report.left_out_bytes == 0


def test_what_the_fragment_cache_has_is_not_memory_that_can_be_had(files, monkeypatch):
    """Of files that the kernel reads itself: they are in no figure of available memory."""
    monkeypatch.setattr("fragfs.mount.residency._is_passed_through", lambda _: True)
    needed, room = measure_need(files, lambda: MEMORY_KEPT_BYTES + 5)
    assert (needed, room) == (0, 5)
    report = warm_files(files, memory=lambda: MEMORY_KEPT_BYTES)
    assert report.left_out_bytes == 0


def test_what_is_not_in_memory_is_needed(tmp_path):
    file = sparse(tmp_path)
    assert measure_need([file, file], lambda: MEMORY_KEPT_BYTES + 7) == (10 << 20, 7)
    (share,) = drop_files([file])
    assert share.residency.resident == 0


def test_nothing_to_read():
    report = warm_files([])
    assert (report.file_count, report.read_bytes) == (0, 0)


def test_pages_that_are_missing_afterwards_are_read_again(files, monkeypatch):
    read = []
    real = warm._Work._read

    def recording(self, part, buffer):
        read.append(part.file.name)
        real(self, part, buffer)

    monkeypatch.setattr(warm._Work, "_read", recording)
    monkeypatch.setattr(
        warm,
        "check_files",
        lambda found: [
            FileResidency(file, Residency(2, 1 if file.name == b"m/b" else 2)) for file in found
        ],
    )
    report = warm_files(files)
    assert sorted(read) == [b"m/b", b"m/b", b"m/c", b"m/same"]
    assert report.read_bytes == 3 * SIZE
