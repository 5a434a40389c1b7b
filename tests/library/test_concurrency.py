"""Several processes and threads at one library."""

from __future__ import annotations

import fcntl
import os
import subprocess
import sys
import threading
import time

import pytest

from fragfs.errors import StorageError
from fragfs.library.add import AddOptions
from fragfs.library.decode import NO_SOURCE
from fragfs.library.library import FragmentLibrary
from fragfs.library.lock import TURNSTILE_NAME
from fragfs.types import LibraryConfig
from tests.models import digests, make_model

ADD = """
import sys
from pathlib import Path
from fragfs.library.add import AddOptions
from fragfs.library.library import FragmentLibrary
from fragfs.library import ingest
ingest._BATCH_S = 0.01  # give the lock up often
with FragmentLibrary.open(sys.argv[1]) as library:
    for number in range(3):
        library.add([Path(sys.argv[2])], AddOptions(name=f"{sys.argv[3]}/{number}".encode()))
"""


def test_adders_in_several_processes_take_turns(tmp_path):
    path = tmp_path / "lib"
    FragmentLibrary.create(path, LibraryConfig(fragment_elements=1 << 12)).close()
    sources = [make_model(tmp_path / f"source{n}", seed=n, rows=200) for n in range(3)]
    processes = [
        subprocess.Popen([sys.executable, "-c", ADD, str(path), str(source), f"org{n}"])
        for n, source in enumerate(sources)
    ]
    assert [process.wait(timeout=120) for process in processes] == [0, 0, 0]
    with FragmentLibrary.open(path) as library:
        assert len(library.models()) == 9
        assert not [item for item in library.verify() if item.error]
        for n, source in enumerate(sources):
            shown = {e.path.decode(): e.sha256.hex() for e in library.files(f"org{n}/2")}
            assert shown == digests(source)


def test_a_reader_sees_what_another_process_commits(tmp_path):
    path = tmp_path / "lib"
    FragmentLibrary.create(path).close()
    source = make_model(tmp_path / "source", rows=50)
    with FragmentLibrary.open(path) as reader:
        before = reader.data_version()
        subprocess.run([sys.executable, "-c", ADD, str(path), str(source), "org"], check=True)
        assert reader.data_version() != before
        assert len(reader.models()) == 3
        assert reader.lookup(b"org/0/config.json") is not None


def test_many_threads_decode_at_once(tmp_path):
    source = make_model(tmp_path / "source")
    config = LibraryConfig(fragment_elements=1 << 12)
    with FragmentLibrary.create(tmp_path / "lib", config) as library:
        library.add([source], AddOptions())
        content = library.open_content(library.files("source")[2].content)
        expected = (source / "model.safetensors").read_bytes()
        failures: list[str] = []

        def read(seed: int) -> None:
            for index in range(seed % 5, len(content.extents), 5):
                extent = content.extents[index]
                raw = library.decode_fragment(extent.fragment, NO_SOURCE)
                if raw != expected[extent.offset : extent.offset + extent.size]:
                    failures.append(f"extent {index}")

        threads = [threading.Thread(target=read, args=(n,)) for n in range(16)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert content.size == len(expected)
        assert failures == []


HOLD = """
import sys
from fragfs.library.library import FragmentLibrary
with FragmentLibrary.open(sys.argv[1]) as library, library._start_batch():
    print("held", flush=True)
    sys.stdin.readline()
"""


@pytest.fixture
def held(tmp_path):
    """A library, and another process that is writing to it until it gets a line."""
    path = tmp_path / "lib"
    FragmentLibrary.create(path, LibraryConfig(fragment_elements=1 << 12)).close()
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert holder.stdout.readline() == "held\n"
    yield path, holder
    holder.kill()
    holder.communicate()


def test_a_second_adder_says_who_is_writing(held, tmp_path):
    path, holder = held
    source = make_model(tmp_path / "source", rows=50)
    with FragmentLibrary.open(path, lock_timeout_s=0.1) as library:
        with pytest.raises(StorageError, match=f"another fragfs.*process {holder.pid}") as caught:
            library.add([source], AddOptions())
        assert caught.value.retryable
        assert library.models() == []


def test_a_second_adder_waits_for_its_turn(held, tmp_path):
    path, holder = held
    source = make_model(tmp_path / "source", rows=50)
    second = subprocess.Popen(
        [sys.executable, "-m", "fragfs", "--library", str(path), "add", str(source)],
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        # It waits once it has the turnstile: nobody else gets that then.
        turnstile = os.open(path / TURNSTILE_NAME, os.O_RDWR | os.O_CREAT)
        while is_free(turnstile):
            assert second.poll() is None, second.stderr.read()
            time.sleep(0.02)
        os.close(turnstile)
        assert second.poll() is None
        holder.communicate("go on\n", timeout=60)
        _, errors = second.communicate(timeout=60)
        assert second.returncode == 0, errors
    finally:
        second.kill()
        second.communicate()
    with FragmentLibrary.open(path) as library:
        assert [model.name for model in library.models()] == [b"source"]


def is_free(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    fcntl.flock(descriptor, fcntl.LOCK_UN)
    return True
