import os
import shutil
import tempfile
from pathlib import Path

import pytest

from tests.faults.small_disk import small_disk
from tests.faults.support import Forker

ROOM_BYTES = 32 << 20


@pytest.fixture(scope="module")
def memory_path(tmp_path_factory):
    """A directory in shared memory, if there is room: hundreds of libraries are synced there."""
    shared = Path("/dev/shm")
    if not os.access(shared, os.W_OK) or shutil.disk_usage(shared).free < ROOM_BYTES:
        yield tmp_path_factory.mktemp("memory")
        return
    with tempfile.TemporaryDirectory(dir=shared, prefix="fragfs-tests-") as directory:
        yield Path(directory)


@pytest.fixture
def scratch(memory_path):
    """A directory there for one test."""
    with tempfile.TemporaryDirectory(dir=memory_path) as directory:
        yield Path(directory)


@pytest.fixture(scope="module")
def forker():
    made = Forker()
    yield made
    made.close()


@pytest.fixture
def disk():
    """A small file system of the test's own."""
    with small_disk() as made:
        yield made
