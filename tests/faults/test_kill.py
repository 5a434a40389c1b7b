"""kill -9 of real commands at random moments, and who holds the lock."""

from __future__ import annotations

import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

from fragfs.errors import StorageError
from fragfs.library.library import FragmentLibrary
from fragfs.library.lock import writer_lock
from tests.faults.support import (
    Shown,
    check_whole,
    make_libraries,
    renamed,
    same,
    shown,
    with_new,
    without,
)

KILLS = 20
SEED = 7


@dataclass(frozen=True, slots=True)
class Command:
    """A command line, and what the library may show: interrupted, and last, when it is done.

    `status` is how it exits; of models that are `damaged` before and after it is known.
    """

    arguments: tuple[str, ...]
    after: Callable[[Shown, Path], Sequence[Shown]]
    prepared: str = "family"
    status: int = 0
    damaged: frozenset[str] = frozenset()


COMMANDS = {
    "add": Command(("add", "{sources}/new", "{sources}/other", "--workers", "1"), with_new),
    "rm": Command(("rm", "base"), without("base")),
    "mv": Command(("mv", "tuned", "org/tuned"), renamed),
    "gc": Command(("gc", "--grace", "0"), same, "half"),
    "optimize": Command(("optimize", "--workers", "1"), same),
    "optimize --level": Command(("optimize", "--workers", "1", "--level", "fast"), same),
    "check --repair": Command(("check", "--repair"), same, "damaged", 1, frozenset(["base"])),
    "check --rebuild": Command(("check", "--rebuild"), same),
    "migrate 1": Command(("ls",), same, "format1"),
    "migrate 2": Command(("ls",), same, "format2"),
}


@pytest.fixture(scope="module")
def place(memory_path) -> Path:
    place = memory_path / "prepared"
    place.mkdir()
    make_libraries(place)
    return place


@pytest.mark.slow
@pytest.mark.parametrize("name", COMMANDS)
def test_killing_a_command_loses_nothing(name, forker, place, scratch):
    command = COMMANDS[name]
    arguments = [text.format(sources=place / "sources") for text in command.arguments]
    prepared = place / command.prepared / "lib"
    before = shown(prepared, scratch / "before")
    allowed = [before, *command.after(before, place / "sources")]
    durations_s = []
    for attempt in range(3):
        path = scratch / f"probe{attempt}"
        shutil.copytree(prepared, path)
        started_s = time.monotonic()
        assert forker.run(path, arguments) == command.status
        durations_s.append(time.monotonic() - started_s)
    moments = random.Random(f"{SEED} {name}")
    print(f"{name}: seed {SEED}, moments in {min(durations_s):.3f} s")
    killed = interrupted = attempts = 0
    while killed < KILLS:
        attempts += 1
        assert attempts <= 10 * KILLS, "it ends before it can be killed"
        path = scratch / "killed"
        shutil.copytree(prepared, path)
        status = forker.run(path, arguments, kill_after_s=moments.random() * min(durations_s))
        assert status in (command.status, -signal.SIGKILL)
        if status < 0:
            killed += 1
            with writer_lock(path, timeout_s=1.0):
                pass  # the kernel has freed it
            found = check_whole(path, allowed, command.damaged)
            if found != allowed[-1] or before == allowed[-1]:
                interrupted += 1
                if command.after is with_new and "new" in found:
                    # Two models were to be added, and the first one was.
                    assert forker.run(path, ["rm", "new"]) == 0
                assert forker.run(path, arguments) == command.status, "not the second time"
                assert check_whole(path, allowed, command.damaged) == allowed[-1]
        shutil.rmtree(path)
    assert interrupted, "none was killed before its commit"


def test_a_second_writer_is_told_who_holds_the_lock(tmp_path):
    path = tmp_path / "lib"
    FragmentLibrary.create(path).close()
    holder = subprocess.Popen(
        [
            sys.executable,
            "-c",
            "import sys, time; from pathlib import Path\n"
            "from fragfs.library.lock import writer_lock\n"
            "with writer_lock(Path(sys.argv[1]), 5):\n"
            "    print('held', flush=True); time.sleep(60)",
            str(path),
        ],
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        with (
            pytest.raises(StorageError, match=f"another fragfs is writing.*process {holder.pid}"),
            writer_lock(path, timeout_s=0.1),
        ):
            pass
    finally:
        holder.kill()
        holder.wait()
        if holder.stdout:
            holder.stdout.close()
    with writer_lock(path, timeout_s=1.0):
        pass
