"""The power fails at every operation of `check --repair` and `check --rebuild`.

After each state that a power cut could leave nothing is lost that was not lost before, and the
command, given again, does what it would have done.
"""

import shutil

import numpy as np
import pytest

from fragfs.errors import FragmentError
from fragfs.library.library import FragmentLibrary
from tests.faults.disk import RecordedDisk, crash_states
from tests.faults.support import make_family
from tests.library.checks import (
    back_up_catalog,
    everything,
    failed,
    flip,
    flip_fragment,
    pack_path,
    put_back_catalog,
    rows,
    write_catalog,
)
from tests.library.test_bases import add

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def place(memory_path):
    place = memory_path / "care"
    (place / "sources").mkdir(parents=True)
    make_family(place)
    return place


def recorded(root, act):
    disk = RecordedDisk(root, root / "lib")
    act(disk)
    disk.release()
    return disk


def repair(path, files=None):
    with FragmentLibrary(path, files=files) as library:
        report = library.check(repair=True)
        if files is not None:
            files.finish()
        return report


def told(report):
    """What a report says, wherever the library is."""
    return [(problem.kind, problem.what, problem.files) for problem in report.problems]


def test_a_repair_can_be_interrupted(place, scratch):
    root = scratch / "prepared"
    shutil.copytree(place / "family", root)
    path = root / "lib"
    with FragmentLibrary.open(path) as library:
        library.optimize(workers=1)
        noise = scratch / "noise"
        noise.mkdir()
        (noise / "noise.bin").write_bytes(np.random.default_rng(4).bytes(500_000))
        add(library, noise, workers=1)
        add(library, place / "sources" / "new", workers=1)
        ((index, size),) = rows(path, "SELECT number, file_size FROM packs WHERE state = 1")
        (opened,) = rows(path, "SELECT number FROM packs WHERE state = 0")[0]
        entry = next(e for e in library.files("base") if e.path.endswith(b".safetensors"))
        flip_fragment(library, library.open_content(entry.content).extents[0].fragment)
        lost = failed(library)
        assert lost
    flip(pack_path(path, index), size - 20)  # the index
    flip(pack_path(path, opened), 20)  # a header
    write_catalog(path, "UPDATE models SET mtime_ns = 7")  # what packs do not tell
    (path / "catalog.snapshot").unlink()
    (path / "staging" / "left").write_bytes(b"x")
    shutil.copytree(root, scratch / "recorded")
    disk = recorded(scratch / "recorded", lambda disk: repair(scratch / "recorded" / "lib", disk))
    done = repair(scratch / "recorded" / "lib")
    states = list(crash_states(disk))
    print(f"{len(states)} states")
    assert len(states) > 40
    for state in states:
        state.write(scratch / "state")
        path = scratch / "state" / "lib"
        report = repair(path)
        assert told(report) == told(done), state.label
        with FragmentLibrary.open(path) as library:
            assert failed(library) == lost, state.label
        shutil.rmtree(scratch / "state")


def test_a_rebuild_can_be_interrupted(place, scratch):
    root = scratch / "prepared"
    shutil.copytree(place / "family", root)
    path = root / "lib"
    back_up_catalog(path, scratch / "backup")
    with FragmentLibrary.open(path) as library:
        before = everything(library)
        add(library, place / "sources" / "new", workers=1)
        library.remove("int8")
        library.move("base", "org/base")
        library.optimize(workers=1)
        shown = everything(library)
    put_back_catalog(scratch / "backup", path)
    shutil.copytree(root, scratch / "recorded")
    path = scratch / "recorded" / "lib"
    disk = recorded(scratch / "recorded", lambda disk: FragmentLibrary.rebuild(path, files=disk))
    states = list(crash_states(disk))
    print(f"{len(states)} states")
    assert len(states) > 20
    found = set()
    for state in states:
        state.write(scratch / "state")
        path = scratch / "state" / "lib"
        with FragmentLibrary.open(path) as library:
            now = everything(library)
            assert now in (before, shown), state.label
            found.add(now == shown)
        FragmentLibrary.rebuild(path)
        with FragmentLibrary.open(path) as library:
            assert everything(library) == shown, state.label
            assert library.check(data=True).problems == (), state.label
        shutil.rmtree(scratch / "state")
    assert found == {True, False}


def test_only_whole_catalogs_have_the_name(place, scratch):
    """Whatever the crash: a damaged catalog is never what a rebuild leaves."""
    root = scratch / "recorded"
    shutil.copytree(place / "family", root)
    path = root / "lib"
    (path / "catalog.sqlite").write_bytes(b"garbage")
    for name in ("catalog.sqlite-wal", "catalog.sqlite-shm"):
        (path / name).unlink(missing_ok=True)
    disk = recorded(root, lambda disk: FragmentLibrary.rebuild(path, files=disk))
    for state in crash_states(disk):
        state.write(scratch / "state")
        path = scratch / "state" / "lib"
        if (path / "catalog.sqlite").read_bytes() == b"garbage":
            with pytest.raises(FragmentError, match="--rebuild"):
                FragmentLibrary.open(path)
        else:
            with FragmentLibrary.open(path) as library:
                assert failed(library) == set(), state.label
        FragmentLibrary.rebuild(path)
        with FragmentLibrary.open(path) as library:
            assert library.check().problems == (), state.label
            assert len(library.models()) == 3, state.label
        shutil.rmtree(scratch / "state")
