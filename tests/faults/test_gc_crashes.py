"""Stop the machine at every file operation of a garbage collection, and kill real ones."""

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

from fragfs.library import collect
from fragfs.library.library import FragmentLibrary
from fragfs.types import LibraryConfig
from tests.faults.test_crash_points import PowerCut
from tests.faults.test_optimize_crashes import ForgetfulFiles, weights
from tests.library.test_bases import add, assert_good, check_closures, tuned, write_model
from tests.library.test_compact import check_rebuildable
from tests.models import digests

pytestmark = pytest.mark.slow

CONFIG = LibraryConfig(fragment_elements=1 << 14, pack_bytes_max=1 << 20)
KEPT = ("tuned", "alone")


@pytest.fixture(scope="module")
def prepared(tmp_path_factory) -> Path:
    """Packs that are half empty, a base that only predicts, many small files that are gone."""
    place = tmp_path_factory.mktemp("prepared")
    base = weights()
    rng = np.random.default_rng(4)
    small = place / "small"
    small.mkdir()
    for number in range(300):
        (small / f"{number}.bin").write_bytes(rng.bytes(700))
    with FragmentLibrary.create(place / "lib", CONFIG) as library:
        add(library, write_model(place / "base", base))
        add(library, small)
        add(library, write_model(place / "gone", weights(seed=9)))
        add(library, write_model(place / "tuned", tuned(base, 1)))
        add(library, write_model(place / "alone", weights(seed=10)))
        for name in ("gone", "base", "small"):
            library.remove(name)
    return place


@pytest.fixture(autouse=True)
def small_parts(monkeypatch):
    monkeypatch.setattr(collect, "_DROPPED_AT_ONCE", 120)


def copied(prepared: Path, place: Path) -> Path:
    shutil.copytree(prepared / "lib", place)
    return place


def check_kept(library: FragmentLibrary, sources: Path) -> None:
    assert {m.name for m in library.models()} == {name.encode() for name in KEPT}
    for name in KEPT:
        shown = {os.fsdecode(e.path): e.sha256.hex() for e in library.files(name)}
        assert shown == digests(sources / name)
    assert_good(library)
    check_closures(library)
    check_rebuildable(library)


def check_whole(path: Path, sources: Path) -> int:
    """Everything is there; gives the bytes of all packs after another run."""
    with FragmentLibrary.open(path) as library:
        check_kept(library, sources)
        library.collect()
        assert library.stats().unreferenced_bytes == 0
        check_kept(library, sources)
        return sum(path.stat().st_size for path in (library.path / "packs").iterdir())


@pytest.mark.parametrize("keep_fraction", [0, 0.5, 1])
def test_a_power_cut_at_any_operation_loses_nothing(prepared, tmp_path, keep_fraction):
    files = ForgetfulFiles(tmp_path / "bin")
    with FragmentLibrary(copied(prepared, tmp_path / "counted"), files=files) as library:
        report = library.collect()
    total = files.operations
    assert report.dropped_count > 2 * 120
    assert report.freed_bytes > 0
    assert total > 25
    done = check_whole(tmp_path / "counted", prepared)
    for stop_after in range(total):
        path = copied(prepared, tmp_path / f"cut{stop_after}")
        files = ForgetfulFiles(tmp_path / f"bin{stop_after}", stop_after)
        library = FragmentLibrary(path, files=files)
        with pytest.raises(PowerCut):
            library.collect()
        library.close()
        files.lose_unsynced(keep_fraction=keep_fraction)
        after = check_whole(path, prepared)
        assert after <= done + 80_000, "no more is left than what is not worth a copy"
        shutil.rmtree(path)


def run_gc(path: Path) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, "-m", "fragfs", "--library", str(path), "gc"],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )


def test_killing_gc_at_random_moments(prepared, tmp_path):
    started = time.monotonic()
    assert run_gc(copied(prepared, tmp_path / "probe")).wait() == 0
    duration_s = time.monotonic() - started
    moments = random.Random(7)
    killed = 0
    for attempt in range(20):
        path = copied(prepared, tmp_path / f"kill{attempt}")
        process = run_gc(path)
        # Its second half: before that Python starts.
        time.sleep((0.5 + 0.5 * moments.random()) * duration_s)
        process.send_signal(signal.SIGKILL)
        killed += process.wait() == -signal.SIGKILL
        check_whole(path, prepared)
    assert killed >= 8
