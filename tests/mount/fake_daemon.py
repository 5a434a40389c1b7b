"""`python -m tests.mount.fake_daemon MOUNTPOINT FILE_BYTES`: serves one file of any size.

The file repeats one fragment, so it needs no disk; it has as many extents as a real one.
"""

import sys
from pathlib import Path

from fragfs.mount.daemon import run
from fragfs.mount.options import MountOptions
from tests.reader.fakes import FakeLibrary

FRAGMENT = b"".join(number.to_bytes(8, "little") for number in range(1 << 17))


def main(mountpoint, size):
    library = FakeLibrary("/")
    library.add_repeated(b"big", b"file", int(size), FRAGMENT)
    options = MountOptions(Path("/"), Path(mountpoint), cache_bytes_max=0)
    return run(options, lambda: None, foreground=True, open_library=lambda _: library)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
