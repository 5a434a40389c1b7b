"""Stop the machine at every file operation of an optimize, and kill real ones."""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from fragfs.library.library import FragmentLibrary
from fragfs.types import Level, LibraryConfig
from tests.faults.test_crash_points import MortalFiles, PowerCut
from tests.library.test_bases import (
    Weights,
    add,
    assert_good,
    check_closures,
    quantized,
    tuned,
    write_model,
)
from tests.library.test_compact import check_rebuildable
from tests.models import digests

pytestmark = pytest.mark.slow

CONFIG = LibraryConfig(fragment_elements=1 << 14, pack_bytes_max=1 << 20)
KEPT = ("int8", "tuned", "base")


class ForgetfulFiles(MortalFiles):
    """Removed names come back as well, unless their directory was synced."""

    def __init__(self, bin_path: Path, stop_after: int | None = None) -> None:
        super().__init__(stop_after)
        self.bin = bin_path
        self.bin.mkdir()
        self.removed: dict[Path, Path] = {}

    def unlink(self, path):
        if path.exists():
            kept = self.bin / f"{len(os.listdir(self.bin))}"
            os.link(path, kept)
            self.removed[path] = kept
        super().unlink(path)

    def sync_directory(self, path):
        super().sync_directory(path)
        self.removed = {p: kept for p, kept in self.removed.items() if p.parent != path}

    def lose_unsynced(self, *, keep_fraction: float) -> None:
        super().lose_unsynced(keep_fraction=keep_fraction)
        if keep_fraction < 1:
            for path, kept in self.removed.items():
                if not path.exists():
                    os.link(kept, path)


def weights(seed: int = 0) -> Weights:
    rng = np.random.default_rng(seed)
    return {"up.weight": (rng.standard_normal((300, 256)) * 0.02).astype(np.float32)}


@pytest.fixture(scope="module")
def prepared(tmp_path_factory) -> Path:
    """A library with much to do: a base that came last, and a model that is gone."""
    place = tmp_path_factory.mktemp("prepared")
    base = weights()
    models = {
        "int8": (quantized(base), "I8"),
        "gone": (weights(seed=9), "F32"),
        "tuned": (tuned(base, 1), "F32"),
        "base": (base, "F32"),
    }
    with FragmentLibrary.create(place / "lib", CONFIG) as library:
        for name, (values, kind) in models.items():
            add(library, write_model(place / name, values, kind))
        library.remove("gone")
    return place


def copied(prepared: Path, place: Path) -> Path:
    shutil.copytree(prepared / "lib", place)
    return place


def check_whole(path: Path, sources: Path) -> int:
    """Everything is there; gives the bytes of all packs after another optimize."""
    with FragmentLibrary.open(path) as library:
        assert {m.name for m in library.models()} == {name.encode() for name in KEPT}
        for name in KEPT:
            shown = {os.fsdecode(e.path): e.sha256.hex() for e in library.files(name)}
            assert shown == digests(sources / name)
        assert_good(library)
        library.optimize(workers=1)
        assert_good(library)
        check_closures(library)
        check_rebuildable(library)
        return sum(path.stat().st_size for path in (library.path / "packs").iterdir())


@pytest.mark.parametrize("shift", [0, 1])
def test_a_power_cut_at_any_operation_loses_nothing(prepared, tmp_path, shift):
    files = ForgetfulFiles(tmp_path / "bin")
    with FragmentLibrary(copied(prepared, tmp_path / "counted"), files=files) as library:
        report = library.optimize(workers=1)
    total = files.operations
    assert report.changed_count
    assert report.freed_bytes > 0
    assert total > 25
    done = check_whole(tmp_path / "counted", prepared)
    for stop_after in range(shift, total, 2):
        path = copied(prepared, tmp_path / f"cut{stop_after}")
        files = ForgetfulFiles(tmp_path / f"bin{stop_after}", stop_after)
        library = FragmentLibrary(path, files=files)
        with pytest.raises(PowerCut):
            library.optimize(workers=1)
        library.close()
        files.lose_unsynced(keep_fraction=(0, 0.5, 1)[stop_after // 2 % 3])
        after = check_whole(path, prepared)
        assert after <= 2 * done + 10_000, "at most what one interrupted batch had written is left"


def test_a_power_cut_while_the_level_changes_loses_nothing(prepared, tmp_path):
    """As above, at some of the operations: every fragment gets another record."""
    files = ForgetfulFiles(tmp_path / "bin")
    with FragmentLibrary(copied(prepared, tmp_path / "counted"), files=files) as library:
        library.optimize(Level.FAST, workers=1)
    for number, stop_after in enumerate(range(1, files.operations, 4)):
        path = copied(prepared, tmp_path / f"cut{stop_after}")
        files = ForgetfulFiles(tmp_path / f"bin{stop_after}", stop_after)
        library = FragmentLibrary(path, files=files)
        with pytest.raises(PowerCut):
            library.optimize(Level.FAST, workers=1)
        library.close()
        files.lose_unsynced(keep_fraction=(0, 0.5, 1)[number % 3])
        check_whole(path, prepared)


def run_optimize(path: Path) -> subprocess.Popen[bytes]:
    arguments = ["--library", str(path), "optimize", "--workers", "1", "--level", "fast"]
    return subprocess.Popen(
        [sys.executable, "-m", "fragfs", *arguments],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )


def test_killing_optimize_at_random_moments(prepared, tmp_path):
    started = time.monotonic()
    assert run_optimize(copied(prepared, tmp_path / "probe")).wait() == 0
    duration_s = time.monotonic() - started
    moments = random.Random(7)
    killed = 0
    for attempt in range(6):
        path = copied(prepared, tmp_path / f"kill{attempt}")
        process = run_optimize(path)
        time.sleep((0.4 + 0.6 * moments.random()) * duration_s)
        process.send_signal(signal.SIGKILL)
        killed += process.wait() == -signal.SIGKILL
        check_whole(path, prepared)
    assert killed >= 3
