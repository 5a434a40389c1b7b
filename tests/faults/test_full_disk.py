"""The disk fills up at every append and sync of an add: an error with a remedy, nothing lost."""

from __future__ import annotations

import errno
import os

import pytest

from fragfs.errors import StorageError
from fragfs.library.add import AddOptions
from fragfs.library.files import OsFiles, storage_error
from fragfs.library.library import FragmentLibrary
from fragfs.types import LibraryConfig
from tests.models import digests, make_model


class FillingFiles(OsFiles):
    """Real files on a disk that is full after so many appends and syncs."""

    def __init__(self, room: int) -> None:
        self.room = room

    def _use(self) -> None:
        if self.room <= 0:
            raise storage_error(OSError(errno.ENOSPC, "full"), "cannot append")
        self.room -= 1

    def append(self, descriptor, buffers):
        self._use()
        super().append(descriptor, buffers)

    def sync(self, descriptor):
        self._use()
        super().sync(descriptor)


@pytest.mark.parametrize("room", range(12))
def test_an_add_that_fills_the_disk_can_be_repeated(tmp_path, room):
    path = tmp_path / "lib"
    config = LibraryConfig(fragment_elements=1 << 14, pack_bytes_max=1 << 20)
    old = make_model(tmp_path / "old", seed=1, rows=60)
    new = make_model(tmp_path / "new", seed=2, rows=60)
    with FragmentLibrary.create(path, config) as library:
        library.add([old], AddOptions())
    with FragmentLibrary.open(path, files=FillingFiles(room)) as library:
        refused = None
        try:
            library.add([new], AddOptions())
        except StorageError as error:
            refused = error
        names = [model.name for model in library.models()]
    # Late enough, only the snapshot for other users fails, which costs a warning and no add.
    assert names == ([b"old"] if refused else [b"new", b"old"])
    if refused:
        assert refused.errno == errno.ENOSPC
        assert "free some space" in str(refused)
    with FragmentLibrary.open(path) as library:
        if b"new" not in [model.name for model in library.models()]:
            library.add([new], AddOptions())
        for name, source in (("old", old), ("new", new)):
            shown = {os.fsdecode(e.path): e.sha256.hex() for e in library.files(name)}
            assert shown == digests(source)
        assert not [item for item in library.verify() if item.error]


def test_the_disk_is_really_full_somewhere_in_that_range(tmp_path):
    path = tmp_path / "lib"
    FragmentLibrary.create(path).close()
    with (
        FragmentLibrary.open(path, files=FillingFiles(0)) as library,
        pytest.raises(StorageError, match="No space left"),
    ):
        library.add([make_model(tmp_path / "m", rows=20)], AddOptions())
