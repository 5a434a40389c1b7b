"""`python -m tests.mount.plain_daemon LIBRARY MOUNTPOINT`: a mount without the compiled front."""

import sys
from pathlib import Path

from fragfs.mount.options import MountOptions


def main(library, mountpoint):
    sys.modules["fragfs.mount._front"] = None
    from fragfs.mount.daemon import run

    options = MountOptions(Path(library), Path(mountpoint), read_ahead_kb=None, grace_s=0)
    return run(options, lambda: None, foreground=True)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
