"""kill -9 of a real `add` at random moments."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from fragfs.library.add import AddOptions
from fragfs.library.library import FragmentLibrary
from fragfs.library.lock import writer_lock
from fragfs.types import LibraryConfig
from tests.models import digests, make_model

PROGRAM = """
import sys
from pathlib import Path
from fragfs.library import ingest
from fragfs.library.add import AddOptions
from fragfs.library.library import FragmentLibrary
ingest._BATCH_S = 0.02  # many batches in a short life
library = FragmentLibrary.open(sys.argv[1])
print("ready", flush=True)
library.add([Path(sys.argv[2])], AddOptions(name=sys.argv[3].encode()))
print("done", flush=True)
"""

CONFIG = LibraryConfig(fragment_elements=1 << 12, pack_bytes_max=1 << 20)


def run_add(library: Path, source: Path, name: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", PROGRAM, str(library), str(source), name],
        stdout=subprocess.PIPE,
        text=True,
    )


@pytest.mark.slow
def test_killing_an_add_at_fifty_random_moments(tmp_path):
    path = tmp_path / "lib"
    with FragmentLibrary.create(path, CONFIG) as library:
        library.add([make_model(tmp_path / "old", seed=1)], AddOptions())
    # How long an undisturbed add takes on this machine sets the range of moments.
    probe = make_model(tmp_path / "probe", seed=99)
    process = run_add(path, probe, "probe")
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    started = time.monotonic()
    assert process.stdout.readline() == "done\n"
    duration_s = time.monotonic() - started
    process.wait()
    process.stdout.close()
    random_moments = random.Random(7)
    whole = killed = reused = 0
    for attempt in range(50):
        source = make_model(tmp_path / f"new{attempt}", seed=100 + attempt)
        name = f"org/new{attempt}"
        process = run_add(path, source, name)
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        time.sleep(random_moments.random() * duration_s * 1.2)
        process.send_signal(signal.SIGKILL)
        killed += process.wait() == -signal.SIGKILL
        process.stdout.close()
        started = time.monotonic()
        with writer_lock(path, timeout_s=1.0):
            assert time.monotonic() - started < 1.0
        with FragmentLibrary.open(path) as library:
            names = [model.name for model in library.models()]
            assert b"old" in names
            if os.fsencode(name) in names:
                whole += 1
            else:
                report = library.add([source], AddOptions(name=os.fsencode(name)))
                reused += report.reused_bytes > 0
            shown = {os.fsdecode(e.path): e.sha256.hex() for e in library.files(name)}
            assert shown == digests(source)
            assert not [item for item in library.verify(name) if item.error]
            assert not [item for item in library.verify("old") if item.error]
            library.remove(name)
    assert killed >= 25, "most attempts must be killed before they are done"
    assert reused >= 5, "batches committed before the kill must be found again"
    with FragmentLibrary.open(path) as library:
        assert not [item for item in library.verify() if item.error]


def test_a_second_writer_is_told_who_holds_the_lock(tmp_path):
    from fragfs.errors import StorageError

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
