"""Stop the machine at every file operation of an add, with unsynced bytes lost or torn."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from fragfs.library.add import AddOptions
from fragfs.library.files import OsFiles
from fragfs.library.library import FragmentLibrary
from fragfs.types import LibraryConfig
from tests.models import digests, make_model

CONFIG = LibraryConfig(fragment_elements=1 << 14, pack_bytes_max=1 << 20)


class PowerCut(BaseException):
    """Not an Exception: no cleanup code of the product may treat it as an error to handle."""


class MortalFiles(OsFiles):
    """Real files until `stop_after` writing operations; then the power is gone.

    Remembers what was made durable, so that `lose_unsynced` can take the rest away.
    """

    def __init__(self, stop_after: int | None = None) -> None:
        self.operations = 0
        self.stop_after = stop_after
        self.paths: dict[int, Path] = {}
        self.durable_sizes: dict[Path, int] = {}
        self.unsynced_names: set[Path] = set()
        self.dead = False

    def _step(self) -> None:
        if self.dead or (self.stop_after is not None and self.operations >= self.stop_after):
            self.dead = True
            raise PowerCut
        self.operations += 1

    def create(self, path):
        self._step()
        descriptor = super().create(path)
        self.paths[descriptor] = path
        self.durable_sizes[path] = 0
        self.unsynced_names.add(path)
        return descriptor

    def open_append(self, path):
        descriptor = super().open_append(path)
        self.paths[descriptor] = path
        self.durable_sizes.setdefault(path, path.stat().st_size)
        return descriptor

    def append(self, descriptor, buffers):
        self._step()
        super().append(descriptor, buffers)

    def sync(self, descriptor):
        self._step()
        super().sync(descriptor)
        path = self.paths[descriptor]
        self.durable_sizes[path] = path.stat().st_size

    def sync_directory(self, path):
        self._step()
        super().sync_directory(path)
        self.unsynced_names = {p for p in self.unsynced_names if p.parent != path}

    def rename(self, old, new):
        self._step()
        super().rename(old, new)
        self.durable_sizes[new] = self.durable_sizes.pop(old, 0)

    def unlink(self, path):
        self._step()
        super().unlink(path)

    def lose_unsynced(self, *, keep_fraction: float) -> None:
        """What a power cut does: names not synced vanish, ends not synced are cut or torn."""
        for path, size in self.durable_sizes.items():
            if not path.exists():
                continue
            if path in self.unsynced_names and keep_fraction == 0:
                path.unlink()
                continue
            written = path.stat().st_size
            os.truncate(path, size + int((written - size) * keep_fraction))


def prepared(tmp_path: Path) -> Path:
    path = tmp_path / "lib"
    if not path.exists():
        with FragmentLibrary.create(path, CONFIG) as library:
            library.add([make_model(tmp_path / "old", seed=1, rows=200)], AddOptions())
        make_model(tmp_path / "new", seed=2, rows=200)
    return path


def count_operations(tmp_path: Path, act) -> int:
    files = MortalFiles()
    with FragmentLibrary(prepared(tmp_path), files=files) as library:
        act(library)
    return files.operations


def add_new(tmp_path):
    return lambda library: library.add([tmp_path / "new"], AddOptions(workers=1))


def actions(tmp_path):
    return {
        "add": add_new(tmp_path),
        "remove": lambda library: library.remove("old"),
        "move": lambda library: library.move("old", "org/older"),
        "update": lambda library: library.add(
            [tmp_path / "new"], AddOptions(name=b"old", update=True, workers=1)
        ),
    }


@pytest.mark.slow
@pytest.mark.parametrize("keep_fraction", [0, 0.5, 1])
@pytest.mark.parametrize("action", ["add", "remove", "move", "update"])
def test_a_power_cut_at_any_operation_loses_nothing(tmp_path, action, keep_fraction):
    act = actions(tmp_path)[action]
    prepared(tmp_path)
    total = count_operations(tmp_path_copy(tmp_path, "count"), actions(tmp_path / "count")[action])
    assert total > 5
    for stop_after in range(total):
        place = tmp_path_copy(tmp_path, f"cut{stop_after}")
        act = actions(place)[action]
        files = MortalFiles(stop_after)
        library = FragmentLibrary(place / "lib", files=files)
        with pytest.raises(PowerCut):
            act(library)
        library.close()
        files.lose_unsynced(keep_fraction=keep_fraction)
        check_after_crash(place, act, action)


def tmp_path_copy(tmp_path: Path, name: str) -> Path:
    """Copy library and sources: each cut starts from the same state."""
    import shutil

    place = tmp_path / name
    place.mkdir()
    for part in ("lib", "old", "new"):
        shutil.copytree(tmp_path / part, place / part)
    return place


def check_after_crash(place: Path, act, action: str) -> None:
    old, new = digests(place / "old"), digests(place / "new")
    with FragmentLibrary.open(place / "lib") as library:
        shown = {
            model.name: {
                os.fsdecode(entry.path): entry.sha256.hex() for entry in library.files(model.name)
            }
            for model in library.models()
        }
        assert not [item for item in library.verify() if item.error]
        before = {b"old": old}
        after = {
            "add": {b"old": old, b"new": new},
            "remove": {},
            "move": {b"org/older": old},
            "update": {b"old": new},
        }[action]
        assert shown in (before, after)
        if shown == before:
            act(library)
            assert not [item for item in library.verify() if item.error]
            names = {model.name for model in library.models()}
            assert names == set(after)
