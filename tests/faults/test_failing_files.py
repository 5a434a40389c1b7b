"""The operating system refuses, from some operation on: an error that says what to do, no loss."""

from __future__ import annotations

import errno
import os
import shutil
from collections import Counter

import pytest

from fragfs.errors import StorageError
from fragfs.library.files import OsFiles, storage_error
from tests.faults.support import check_whole, make_libraries, shown
from tests.faults.test_crash_matrix import COMMANDS, again

pytestmark = pytest.mark.slow

WRITING = (
    "make_directory",
    "create",
    "open_append",
    "append",
    "sync",
    "sync_directory",
    "rename",
    "unlink",
)
READING = ("open_read", "read_at", "size", "names")
REMEDIES = {
    errno.ENOSPC: "free some space",
    errno.EDQUOT: "free some of your quota",
    errno.EIO: "check its health and your backups",
    errno.EROFS: "the file system is read-only",
    errno.EACCES: "check the owner and the permissions",
    errno.EMFILE: "ulimit -n",
}
LASTING = (errno.ENOSPC, errno.EIO, errno.EROFS, errno.EACCES, errno.EMFILE, errno.EDQUOT)

READ_AS_WELL = (errno.EIO, errno.EMFILE)
"""What only reads is refused by a broken disk, and where there are too many open files."""
_POINTS = 4
"""How often each error meets a long command, in which the same operations come again and again."""


class FailingFiles(OsFiles):
    """Real files of which the operations after the first `count` fail, all of them or one.

    Attributes:
        done: Operations so far.
    """

    def __init__(self, count: int, number: int, *, reading: bool, once: bool) -> None:
        self.done = 0
        self._count = count
        self._number = number
        self._once = once
        for name in (*WRITING, *(READING if reading else ())):
            setattr(self, name, self._failing(name, getattr(self, name)))

    def _failing(self, name, function):
        def operation(*arguments):
            self.done += 1
            if self.done == self._count + 1 or (self.done > self._count and not self._once):
                error = OSError(self._number, os.strerror(self._number))
                raise storage_error(error, f"cannot {name} {arguments[0]}")
            return function(*arguments)

        return operation


@pytest.fixture(scope="module")
def place(memory_path):
    place = memory_path / "prepared"
    place.mkdir()
    make_libraries(place)
    return place


CHANGING = [name for name in COMMANDS if not name.startswith(("init", "migrate", "check"))]


def points_of(name, once, prepared, place, scratch):
    """(error, how many operations succeed before it): short commands are refused everywhere."""
    totals = {}
    for number in (errno.EIO, errno.ENOSPC):
        files = FailingFiles(10**9, number, reading=number in READ_AS_WELL, once=once)
        shutil.copytree(prepared, scratch / "whole")
        COMMANDS[name].run(scratch / "whole", place / "sources", files)
        shutil.rmtree(scratch / "whole")
        totals[number in READ_AS_WELL] = files.done
    errors = (errno.EIO,) if once else LASTING
    if name.startswith(("rm", "mv")):
        return [(errors[at % len(errors)], at) for at in range(totals[True])]
    found = []
    for number in errors:
        total = totals[number in READ_AS_WELL]
        step = max(1, total // (3 * _POINTS if once else _POINTS))
        found += [(number, at) for at in range(0, total, step)]
    return found


@pytest.mark.parametrize("once", [False, True], ids=["lasting", "once"])
@pytest.mark.parametrize("name", CHANGING)
def test_a_command_that_is_refused_can_be_repeated(name, once, place, scratch):
    command = COMMANDS[name]
    prepared = place / command.prepared / "lib"
    before = shown(prepared, scratch / "before")
    allowed = [before, *command.after(before, place / "sources")]
    refused: Counter[int] = Counter()
    for number, count in points_of(name, once, prepared, place, scratch):
        files = FailingFiles(count, number, reading=number in READ_AS_WELL, once=once)
        path = scratch / "lib"
        shutil.copytree(prepared, path)
        error = None
        try:
            command.run(path, place / "sources", files)
        except StorageError as caught:
            error = caught
        where = f"operation {count}: {error}"
        found = check_whole(path, allowed)
        if error is None:
            # Only what the command can do without failed, if anything: the snapshot, clearing up.
            assert found == allowed[-1], where
        else:
            refused[number] += 1
            assert error.errno == number, where
            assert REMEDIES[number] in str(error), where
            assert found != allowed[-1] or command.repeatable, where
        if error is not None or command.repeatable:
            again(command, path, place / "sources", found)
            assert check_whole(path, allowed) == allowed[-1], where
        shutil.rmtree(path)
    assert set(refused) == ({errno.EIO} if once else set(LASTING))
