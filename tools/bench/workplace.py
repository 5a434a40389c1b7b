"""Where a run works: a directory that is gone afterwards, commands run in it, and mounts."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from fragfs.mount.launch import MountReport, mount
from fragfs.mount.options import MountOptions

__all__ = [
    "BenchError",
    "Run",
    "fragfs",
    "has_fuse",
    "mounted",
    "new_library",
    "run_child",
    "run_timed",
    "tree_size",
    "workspace",
]

ROOT = Path(__file__).resolve().parents[2]
_LAUNCHER = Path(__file__).with_name("launcher.py")
_DAEMON_ENDS_S = 10.0


class BenchError(Exception):
    """A measurement cannot be made."""


@dataclass(frozen=True)
class Run:
    """What a command took.

    Attributes:
        seconds: Wall time, its start included.
        peak_bytes: Most resident memory.
    """

    seconds: float
    peak_bytes: int


@contextmanager
def workspace(parent: Path | None) -> Iterator[Path]:
    """A new directory, removed afterwards with whatever is still mounted in it."""
    place = Path(tempfile.mkdtemp(prefix="fragfs-bench-", dir=parent)).resolve()
    try:
        yield place
    finally:
        for point in _mounts_below(place):
            with suppress(BenchError):
                fragfs("umount", "--lazy", point)
        # Never walk into a mount that would not go: what it shows is not ours to delete.
        if not _mounts_below(place):
            shutil.rmtree(place, ignore_errors=True)


def _mounts_below(place: Path) -> list[Path]:
    points = [line.split()[1] for line in Path("/proc/mounts").read_text().splitlines()]
    paths = [Path(os.fsdecode(point.encode().decode("unicode_escape"))) for point in points]
    return [path for path in paths if path.is_relative_to(place)]


def run_timed(*command: str | Path) -> Run:
    """Run a command and say what it took.

    Raises:
        BenchError: It failed; with the end of what it printed.
    """
    words = [sys.executable, "-S", "-E", str(_LAUNCHER), *map(str, command)]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=False)
    result = json.loads(done.stdout) if done.returncode == 0 else {"status": done.returncode}
    if result["status"]:
        raise BenchError(f"{' '.join(map(str, command))} failed: {done.stderr[-2000:].strip()}")
    return Run(result["seconds"], result["peak_bytes"])


def fragfs(*arguments: str | Path, library: Path | None = None) -> Run:
    """Run the real fragfs command."""
    where: list[str | Path] = ["--library", library] if library else []
    return run_timed(sys.executable, "-m", "fragfs", "--quiet", *where, *arguments)


def new_library(path: Path, *options: str) -> Path:
    """Create an empty library in place of whatever was at `path`."""
    shutil.rmtree(path, ignore_errors=True)
    fragfs("init", path, *options)
    return path


def run_child(module: str, *arguments: str | Path | int) -> dict[str, float]:
    """Run a module of this package as a process of its own; gives what it printed, as JSON."""
    words = [sys.executable, "-m", f"tools.bench.{module}", *map(str, arguments)]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        raise BenchError(f"{' '.join(words[1:])} failed: {done.stderr[-2000:].strip()}")
    result: dict[str, float] = json.loads(done.stdout)
    return result


@contextmanager
def mounted(library: Path) -> Iterator[MountReport]:
    """The library, mounted anew: nothing of it is decoded or in the mount's page cache.

    The daemon is the one that `fragfs mount` starts.
    """
    point = Path(tempfile.mkdtemp(prefix="mount-", dir=library.parent))
    report = mount(MountOptions(library=library, mountpoint=point, grace_s=0))
    try:
        yield report
    finally:
        try:
            fragfs("umount", point)
        except BenchError:
            fragfs("umount", "--lazy", point)
        _wait_gone(report.pid)
        point.rmdir()


def _wait_gone(pid: int) -> None:
    """Wait until a process has ended: what follows shall have the machine to itself."""
    deadline = time.monotonic() + _DAEMON_ENDS_S
    while Path(f"/proc/{pid}").exists() and time.monotonic() < deadline:
        time.sleep(0.01)


def has_fuse() -> bool:
    """Whether this user can mount here."""
    return os.access("/dev/fuse", os.R_OK | os.W_OK) and shutil.which("fusermount3") is not None


def tree_size(directory: Path) -> int:
    """Apparent bytes of all files below a directory."""
    return sum(path.stat().st_size for path in directory.rglob("*") if path.is_file())
