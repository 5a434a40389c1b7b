"""Places and fragments for the tests of the shared cache, and children that use them too."""

import subprocess
import sys

import blake3

from fragfs.cache.place import CachePlace
from fragfs.cache.shared import file_name
from fragfs.types import FragmentId

TIMEOUT_S = 60


def fragment_of(data):
    """The id of some bytes."""
    return FragmentId(blake3.blake3(bytes(data)).digest())


def raw_of(number, size=10_000):
    """Bytes that no other number has; the view is read-only."""
    return memoryview((number.to_bytes(8, "little") * (size // 8 + 1))[:size])


def get(cache, fragment, size):
    """The bytes of a fragment in a shared cache, or None."""
    file = cache.get(fragment, size)
    return None if file is None else file.view()


def drop(cache, fragment):
    """Remove a fragment's file, as eviction by another process does."""
    (cache.place.directory / file_name(fragment)).unlink(missing_ok=True)


def bytes_of(fetched):
    """The bytes of what a fetcher gave: a view, or an open file."""
    return fetched if isinstance(fetched, memoryview) else fetched.view()


def place_at(directory, bytes_max=1 << 30, *, in_memory=False):
    """A place with a fixed budget: asked for, and far below the room there is."""
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    return CachePlace(directory, in_memory, bytes_max, bytes_max)


PRELUDE = """
import sys, time
from pathlib import Path
from fragfs.cache.shared import SharedFragmentCache
from fragfs.cache.users import begin_use, end_use
from tests.cache.support import fragment_of, get, place_at, raw_of
directory = Path(sys.argv[1])
def pause():
    print("ready", flush=True)
    sys.stdin.readline()
"""


class Child:
    """A process that runs a program on a directory, and waits where the program pauses."""

    def __init__(self, program, directory, *arguments):
        self._process = subprocess.Popen(
            [sys.executable, "-c", PRELUDE + program, str(directory), *map(str, arguments)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.kill()

    def wait_ready(self):
        assert self._process.stdout.readline() == "ready\n"
        return self

    def proceed(self):
        """Let it go on to its end; returns what it said."""
        output, _ = self._process.communicate("go\n", timeout=TIMEOUT_S)
        assert self._process.returncode == 0
        return output

    def kill(self):
        """End it at once, as `kill -9` does."""
        if self._process.returncode is None:
            self._process.kill()
            self._process.communicate()
