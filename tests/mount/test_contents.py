import pytest

import fragfs.mount.contents
from fragfs.errors import NotFoundError
from fragfs.mount.contents import OpenContents
from tests.reader.fakes import FakeLibrary


class Counted:
    """A library of ten files of ten extents, and the contents loaded from it."""

    def __init__(self):
        self.library = FakeLibrary()
        self.numbers = [self.library.add(b"m", b"%d" % n, bytes(10), 1) for n in range(10)]
        self.loads = []
        self.contents = OpenContents(self.load, self.library.data_version)

    def load(self, number):
        self.loads.append(number)
        return self.library.open_content(number)


@pytest.fixture
def counted():
    return Counted()


def test_all_handles_share_one_load(counted):
    number = counted.numbers[0]
    counted.contents.open(number)
    counted.contents.open(number)
    assert counted.loads == [number]
    counted.contents.close(number)
    assert list(counted.contents) == [number]
    assert counted.contents[number].number == number
    counted.contents.close(number)
    assert list(counted.contents) == []


def test_a_file_opened_again_and_again_is_loaded_once(counted):
    for _ in range(5):
        counted.contents.open(counted.numbers[0])
        counted.contents.close(counted.numbers[0])
    assert len(counted.loads) == 1


def test_a_commit_ends_what_was_kept_of_closed_files(counted):
    number = counted.numbers[0]
    counted.contents.open(number)
    counted.contents.close(number)
    counted.library.remove(b"m")
    del counted.library.contents[number]
    with pytest.raises(NotFoundError):
        counted.contents.open(number)


def test_what_was_open_during_a_commit_is_not_kept_once_it_is_closed(counted):
    number, other = counted.numbers[:2]
    counted.contents.open(number)
    counted.library.remove(b"m")
    del counted.library.contents[number]
    counted.contents.open(other)  # the commit is noticed
    counted.contents.close(number)
    with pytest.raises(NotFoundError):
        counted.contents.open(number)


def test_what_is_open_needs_no_catalog(counted):
    number = counted.numbers[0]
    counted.contents.open(number)
    counted.library.remove(b"m")
    counted.library.contents.clear()
    counted.contents.open(number)
    assert counted.contents.find(number) is counted.contents[number]
    with pytest.raises(NotFoundError):
        counted.contents.find(counted.numbers[1])


def test_closed_files_are_kept_within_bounds(counted, monkeypatch):
    monkeypatch.setattr(fragfs.mount.contents, "_CLOSED_EXTENTS_MAX", 35)
    for number in counted.numbers:
        counted.contents.open(number)
        counted.contents.close(number)
    counted.loads.clear()
    for number in reversed(counted.numbers):
        counted.contents.open(number)
    assert len(counted.loads) == 7


def test_looking_at_a_closed_file_opens_nothing(counted):
    counted.contents.find(counted.numbers[0])
    assert list(counted.contents) == []
