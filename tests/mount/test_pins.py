"""The mount's lease: what it says, and in which order it finds out."""

from array import array

import pytest

from fragfs.errors import StorageError
from fragfs.library.extents import ExtentMap, OpenContent
from fragfs.library.lease import hold_lease, live_leases
from fragfs.mount.pins import MountLease


def content(number, *fragments):
    count = len(fragments)
    extents = ExtentMap(
        array("I", [10] * count), array("q", fragments), array("I", [0] * count), bytes(count)
    )
    return OpenContent(number, 10 * count, 0, bytes(32), 0, extents)


class Mounted:
    """A catalog and an event loop, as far as the lease asks them; notes what it asked."""

    def __init__(self, lease):
        self.generation = 1
        self.open = {}
        self.stored = set()
        self.asked = []
        self.lease = MountLease(lease, self.ask_generation, self.copy_open, self.has_content)

    def ask_generation(self):
        self.asked.append("generation")
        return self.generation

    def copy_open(self):
        self.asked.append("open")
        return list(self.open.values())

    def has_content(self, number):
        self.asked.append("catalog")
        return number in self.stored

    def open_file(self, number, *fragments):
        self.open[number] = content(number, *fragments)
        self.stored.add(number)


@pytest.fixture
def mounted(tmp_path):
    with hold_lease(tmp_path, "mount") as lease:
        yield Mounted(lease)


def said(tmp_path):
    [state] = live_leases(tmp_path)
    return state.generation, state.pins


def test_what_is_open_and_in_the_catalog_needs_no_pin(mounted, tmp_path):
    mounted.open_file(5, 1, 2, 3)
    mounted.lease.move()
    assert said(tmp_path) == (1, ())


def test_what_is_open_and_gone_is_pinned(mounted, tmp_path):
    mounted.open_file(5, 1, 2, 3, 9)
    mounted.open_file(6, 20)
    mounted.stored.remove(5)
    mounted.generation = 7
    mounted.lease.move()
    assert said(tmp_path) == (7, ((1, 3), (9, 9)))


def test_the_generation_is_read_before_anything_else(mounted):
    """Then what is opened after the list was made is opened from a catalog as new as that."""
    mounted.open_file(5, 1)
    mounted.lease.move()
    assert mounted.asked == ["generation", "open", "catalog"]


def test_a_catalog_that_cannot_be_asked_leaves_what_was_said(mounted, tmp_path):
    mounted.lease.move()
    mounted.open_file(5, 1)
    mounted.generation = 2

    def fail(number):
        raise StorageError("the catalog cannot be read")

    lease = MountLease(mounted.lease._lease, mounted.ask_generation, mounted.copy_open, fail)
    with pytest.raises(StorageError):
        lease.move()
    assert said(tmp_path) == (1, ()), "a generation that is over keeps everything"


def test_what_was_closed_is_let_go(mounted, tmp_path):
    mounted.open_file(5, 1, 2)
    mounted.open_file(6, 8)
    mounted.stored.clear()
    mounted.lease.move()
    assert said(tmp_path) == (1, ((1, 2), (8, 8)))
    mounted.generation = 3
    mounted.lease.let_go()
    assert said(tmp_path) == (1, ((1, 2), (8, 8)))
    del mounted.open[5]
    mounted.lease.let_go()
    assert said(tmp_path) == (1, ((8, 8),)), "the generation was not looked at"
    del mounted.open[6]
    mounted.lease.let_go()
    assert said(tmp_path) == (1, ())


def test_nothing_is_asked_where_nothing_is_pinned(mounted):
    mounted.open_file(5, 1)
    mounted.lease.move()
    mounted.asked.clear()
    mounted.lease.let_go()
    assert mounted.asked == []
