"""A small file system of a test's own, to fill and to make read-only."""

import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

__all__ = ["Disk", "as_root", "small_disk"]

as_root = pytest.mark.skipif(os.geteuid() != 0, reason="mounting and changing users take root")


class Disk:
    """A small file system of its own."""

    def __init__(self, path: Path) -> None:
        self.path = path
        # Others may look in, whatever pytest made of the directories above.
        made = subprocess.run(
            ["mount", "-t", "tmpfs", "-o", "size=16m,mode=755", "fragfs-test", path],
            capture_output=True,
            text=True,
        )
        if made.returncode:
            pytest.skip(f"a tmpfs cannot be mounted: {made.stderr.strip()}")

    def change(self, options: str) -> None:
        subprocess.run(["mount", "-o", f"remount,{options}", self.path], check=True)

    def fill(self, free_bytes: int = 0) -> None:
        """Leave so many bytes, in whole pages."""
        with (self.path / "filler").open("wb", buffering=0) as filler:
            size = 1 << 20
            while size:
                try:
                    filler.write(bytes(size))
                except OSError:
                    size //= 2
            filler.truncate(filler.tell() - free_bytes)
        status = os.statvfs(self.path)
        assert status.f_bavail * status.f_frsize >= free_bytes

    def clear(self) -> None:
        (self.path / "filler").unlink()

    def close(self) -> None:
        subprocess.run(["umount", "--lazy", self.path], check=True)


@contextmanager
def small_disk() -> Iterator[Disk]:
    """Mount one, for as long as the context lasts."""
    # Not below pytest's directory, into which other users may not look.
    parent = Path("/dev/shm") if os.access("/dev/shm", os.W_OK) else Path("/tmp")
    path = parent / f"fragfs-tests-disk-{os.getpid()}"
    path.mkdir()
    try:
        made = Disk(path)
        try:
            yield made
        finally:
            made.close()
    finally:
        path.rmdir()
