"""The power fails at every operation of every command that changes a library.

Each command runs once, on a disk that remembers (`disk.py`). Every state that a power cut could
have left is then made real: the library must open, show only what was there before or what is there
after, verify, agree with its packs, and take the command again.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from copy import copy
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from unittest import mock

import pytest

from fragfs.errors import NotFoundError
from fragfs.library import collect
from fragfs.library.catalog import SNAPSHOT_NAME
from fragfs.library.files import Files, OsFiles
from fragfs.library.library import FragmentLibrary
from fragfs.types import LIBRARY_FORMAT_VERSION, Level
from tests.faults.disk import CrashState, RecordedDisk, crash_states, directory_files
from tests.faults.support import (
    CONFIG,
    Shown,
    check_bytes,
    check_records,
    check_snapshot,
    make_libraries,
    models_of,
    pack_bytes,
    renamed,
    same,
    shown,
    updated,
    whole_family,
    with_more,
    with_new,
    without,
    without_folder,
)
from tests.library.test_bases import add

pytestmark = pytest.mark.slow

POINTS_MIN = 500


@dataclass(frozen=True, slots=True)
class Command:
    """A command that changes a library.

    Attributes:
        run: Does it to the library in a directory, whose sources are in another one.
        after: What the library may show, by what it showed before and the sources: first what a
            crash between two models may leave, last what the finished command leaves.
        prepared: Name of the library to start from.
        repeatable: Whether the finished command may be given again.
        opens: Whether the library opens before the command is done.
        damaged: Models of which something is damaged, before and after.
    """

    run: Callable[[Path, Path, Files], None]
    after: Callable[[Shown, Path], Sequence[Shown]]
    prepared: str = "family"
    repeatable: bool = False
    opens: bool = True
    damaged: frozenset[str] = frozenset()


def with_library(act: Callable[[FragmentLibrary, Path], object]):
    def run(path: Path, sources: Path, files: Files) -> None:
        library = FragmentLibrary(path, files=files)
        try:
            act(library, sources)
            if isinstance(files, RecordedDisk):
                files.finish()
        finally:
            library.close()

    return run


def create(path: Path, _: Path, files: Files) -> None:
    FragmentLibrary.create(path, CONFIG, files=files).close()


def repair(library: FragmentLibrary, _: Path) -> None:
    library.check(repair=True, workers=1)
    left = library.check(workers=1).problems
    assert len(left) == 1, f"not only the fragment in quarantine: {left}"


def rebuild(path: Path, _: Path, files: Files) -> None:
    FragmentLibrary.rebuild(path, files=files)
    if isinstance(files, RecordedDisk):
        files.finish()


def collect_in_parts(library: FragmentLibrary) -> None:
    with mock.patch.object(collect, "_DROPPED_AT_ONCE", 3):
        library.collect(grace_s=0)
    assert library.stats().unreferenced_bytes == 0


COMMANDS = {
    "init": Command(create, same, prepared="nothing", opens=False),
    "init DIRECTORY": Command(create, same, prepared="empty", opens=False),
    "add": Command(
        with_library(lambda lib, src: add(lib, src / "new", src / "other", workers=1)), with_new
    ),
    "add --into": Command(
        with_library(lambda lib, src: add(lib, src / "new", into=b"base/more", workers=1)),
        with_more,
    ),
    "add --update": Command(
        with_library(lambda lib, src: add(lib, src / "update" / "base", update=True, workers=1)),
        updated,
        repeatable=True,
    ),
    "rm MODEL": Command(with_library(lambda lib, _: lib.remove("base")), without("base")),
    "rm MODEL/FILE": Command(
        with_library(lambda lib, _: lib.remove("base", [b"sub"])), without_folder
    ),
    "mv": Command(with_library(lambda lib, _: lib.move("tuned", "org/tuned")), renamed),
    "gc": Command(
        with_library(lambda lib, _: collect_in_parts(lib)), same, "half", repeatable=True
    ),
    "optimize": Command(
        with_library(lambda lib, _: lib.optimize(workers=1)), same, repeatable=True
    ),
    "optimize --level": Command(
        with_library(lambda lib, _: lib.optimize(Level.FAST, workers=1)), same, repeatable=True
    ),
    "check --repair": Command(
        with_library(repair), same, "damaged", repeatable=True, damaged=frozenset(["base"])
    ),
    "check --rebuild": Command(rebuild, same, repeatable=True),
    "check --rebuild, no catalog": Command(
        rebuild, whole_family, "lost", repeatable=True, opens=False
    ),
} | {
    f"migrate {version}": Command(
        with_library(lambda *_: None), same, f"format{version}", repeatable=True
    )
    for version in range(1, LIBRARY_FORMAT_VERSION)
}


@pytest.fixture(scope="module")
def place(memory_path) -> Path:
    """Prepared libraries, and the sources of what is added to them."""
    place = memory_path / "prepared"
    place.mkdir()
    make_libraries(place)
    return place


@pytest.fixture(scope="module")
def record(place, memory_path):
    """Runs a command once, on a disk that remembers."""

    @cache
    def run(name: str) -> RecordedDisk:
        root = memory_path / "recorded"
        shutil.copytree(place / COMMANDS[name].prepared, root)
        disk = RecordedDisk(root, root / "lib")
        COMMANDS[name].run(root / "lib", place / "sources", disk)
        disk.release()
        shutil.rmtree(root)
        return disk

    return run


def test_the_matrix_has_enough_points(record):
    counts = {name: sum(1 for _ in crash_states(record(name))) for name in COMMANDS}
    print(f"crash points: {sum(counts.values())} in all; {counts}")
    assert all(counts.values())
    assert sum(counts.values()) >= POINTS_MIN


@pytest.mark.parametrize("name", COMMANDS)
def test_a_power_cut_loses_nothing(name, record, place, scratch):
    states = list(crash_states(record(name)))
    # What was interrupted is written once more; the check itself adds or renames a model.
    bytes_max = 2 * pack_bytes(states[-1].files) + 100_000
    failures = list(failures_of(COMMANDS[name], states, place, scratch, bytes_max))
    assert failures == [], f"{len(failures)} of {len(states)} states"


@pytest.mark.parametrize(
    ("name", "kind", "where"),
    [
        ("mv", "sync", ".pack"),
        ("gc", "sync_directory", "packs"),
        ("mv", "sync", "batch.intent"),
        ("mv", "sync_directory", "staging"),
        ("mv", "sync", "catalog.snapshot"),
        ("init", "sync_directory", "lib"),
    ],
)
def test_the_matrix_notices_what_is_not_synced(name, kind, where, record, place, scratch):
    disk = copy(record(name))
    kept = [step for step in disk.steps if step.kind != kind or where not in step.path.name]
    assert len(kept) < len(disk.steps), "nothing of that name is synced"
    disk.steps = kept
    failures = failures_of(COMMANDS[name], crash_states(disk), place, scratch)
    assert next(failures, None) is not None


def failures_of(
    command: Command,
    states: Iterable[CrashState],
    place: Path,
    scratch: Path,
    bytes_max: int = 1 << 62,
) -> Iterator[str]:
    """What is wrong with the library after which power cut."""
    before = shown(place / command.prepared / "lib", scratch / "before")
    allowed = [before, *command.after(before, place / "sources")]
    for state in states:
        root = scratch / "root"
        state.write(root)
        try:
            check(command, root / "lib", place / "sources", allowed, bytes_max)
        except Exception as error:
            yield f"{state.label}: {type(error).__name__}: {error}"
        shutil.rmtree(root)


def check(
    command: Command, path: Path, sources: Path, allowed: Sequence[Shown], bytes_max: int
) -> None:
    try:
        with FragmentLibrary.open(path) as library:
            found = models_of(library)
            assert found in allowed, f"shows {json.dumps(found)}"
            check_bytes(library, command.damaged)
            if not command.damaged:
                # Twice, by our own eyes below and by these: what a crash leaves is no damage.
                assert library.check(workers=1).problems == ()
        check_snapshot(path / SNAPSHOT_NAME)
    except NotFoundError:
        assert not command.opens, "the library is gone"
        found = None
    if command.repeatable or found != allowed[-1]:
        again(command, path, sources, found)
        found = None
    with FragmentLibrary.open(path) as library:
        if found is None:
            assert models_of(library) == allowed[-1], "another result the second time"
            check_bytes(library, command.damaged)
        # Also where nothing was left to do: what the crash left must not be in anybody's way.
        if models := library.models():
            library.move(models[0].name, b"moved")
        else:
            add(library, sources / "tuned", workers=1)
        if not command.damaged:
            check_records(library)
    assert pack_bytes(directory_files(path)) <= bytes_max, "more than what was interrupted is left"


def again(command: Command, path: Path, sources: Path, found: Shown | None) -> None:
    if command.after is with_new and "new" in (found or {}):
        # Two models were to be added, and the first one was.
        with FragmentLibrary.open(path) as library:
            library.remove("new")
    command.run(path, sources, OsFiles())
