"""What shows a file to a reader: fragfs, a minimal server in C, squashfs and squashfuse.

Each is mounted in a context and leaves neither mount nor process behind.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from tools.bench.processes import MARK, end, marked
from tools.bench.workplace import ROOT, BenchError

__all__ = [
    "SHARED_MEMORY",
    "Server",
    "build_c_server",
    "flat_numbers",
    "fragfs_mount",
    "make_image",
    "mount_offers",
    "serve_with_c",
    "serve_with_squashfs",
    "serve_with_squashfuse",
    "set_read_ahead",
]

_SETTLE_S = 1.5
SHARED_MEMORY = Path("/dev/shm")

_STATUS = "user.fragfs.status"
_C_SOURCE = Path(__file__).with_name("c_server.c")
_STARTS_S = 30.0


@dataclass(frozen=True)
class Server:
    """A mount and the processes behind it.

    Attributes:
        mountpoint: Where it is.
        pids: Its processes when it had just started.
        is_marked: Its processes are found by their environment.
        cache_directory: Where it keeps decoded fragments; None if it cannot be told where.
    """

    mountpoint: Path
    pids: tuple[int, ...] = ()
    is_marked: bool = False
    cache_directory: Path | None = None

    def processes(self) -> list[int]:
        """Its processes now."""
        helpers = marked(os.fspath(self.mountpoint)) if self.is_marked else []
        return sorted({*self.pids, *helpers})

    def status(self) -> dict[str, Any]:
        """What the mount's root says of it; empty if it says nothing."""
        try:
            text = os.getxattr(self.mountpoint, _STATUS)
        except OSError:
            return {}
        found: dict[str, Any] = json.loads(text)
        return found

    def counters(self) -> dict[str, float]:
        """The numbers of its status."""
        return flat_numbers(self.status())


def flat_numbers(status: dict[str, Any]) -> dict[str, float]:
    """The numbers of a status and of the objects in it, by their own names; the outer ones win."""
    found: dict[str, float] = {}
    for value in status.values():
        if isinstance(value, dict):
            found |= flat_numbers(value)
    return found | {
        name: value
        for name, value in status.items()
        if isinstance(value, int | float) and not isinstance(value, bool)
    }


def set_read_ahead(mountpoint: Path, kilobytes: int) -> bool:
    """How far the kernel reads ahead on a mount; False if only root may say."""
    device = os.stat(mountpoint).st_dev
    path = Path(f"/sys/class/bdi/{os.major(device)}:{os.minor(device)}/read_ahead_kb")
    try:
        path.write_text(f"{kilobytes}\n")
    except OSError:
        return False
    return True


@contextmanager
def _mountpoint(place: Path) -> Iterator[Path]:
    point = Path(tempfile.mkdtemp(prefix="mount-", dir=place))
    try:
        yield point
    finally:
        with contextlib.suppress(OSError):
            point.rmdir()  # never more: what a mount shows is not ours to delete


def _run(*words: str | Path, environment: dict[str, str] | None = None) -> None:
    done = subprocess.run(
        [os.fspath(word) for word in words],
        cwd=ROOT,
        env={**os.environ, **(environment or {})},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        said = (done.stderr or done.stdout)[-2000:].strip()
        raise BenchError(f"{' '.join(map(str, words))} failed: {said}")


# --- fragfs


@cache
def mount_offers(option: str) -> bool:
    """Whether `fragfs mount` has an option."""
    words = [sys.executable, "-m", "fragfs", "mount", "--help"]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=False)
    return option in done.stdout.split()


@contextmanager
def fragfs_mount(
    library: Path, *options: str, cache_directory: Path | None = None
) -> Iterator[Server]:
    """A library mounted by `fragfs mount`.

    Args:
        library: What to mount.
        options: More options of `fragfs mount`.
        cache_directory: The fragment cache of another mount; None is one that is new and empty.
    """
    with _mountpoint(library.parent) as point, contextlib.ExitStack() as stack:
        chosen = list(options)
        if cache_directory is None and mount_offers("--cache-dir"):
            cache_directory = Path(tempfile.mkdtemp(prefix="fragfs-bench-", dir=_memory_place()))
            stack.callback(shutil.rmtree, cache_directory, ignore_errors=True)
        if cache_directory is not None:
            chosen += ["--cache-dir", os.fspath(cache_directory)]
        stack.callback(lambda: end(marked(os.fspath(point))))
        try:
            words = ["--quiet", "--library", os.fspath(library), "mount", "--grace", "0", *chosen]
            marking = {MARK: os.fspath(point)}
            _run(sys.executable, "-m", "fragfs", *words, os.fspath(point), environment=marking)
            # Its helpers are starting, which takes as long as reading the file: a mount is mostly
            # there long before it is read.
            time.sleep(_SETTLE_S)
            pids = tuple(marked(os.fspath(point)))
            yield Server(point, pids, is_marked=True, cache_directory=cache_directory)
        finally:
            # Not `fragfs umount`: that one starts an interpreter, and a run has a hundred mounts.
            if os.path.ismount(point):
                _detach("fusermount3", "-u", point, lazy=("-z",))


def _detach(*command: str | Path, lazy: tuple[str, ...]) -> None:
    """Unmount; the usual way first, since the other leaves a daemon to readers that are left."""
    try:
        _run(*command)
    except BenchError:
        _run(*command[:-1], *lazy, command[-1])


def _memory_place() -> Path:
    """Where files are memory, if there is such a place."""
    usable = SHARED_MEMORY.is_dir() and os.access(SHARED_MEMORY, os.W_OK)
    return SHARED_MEMORY if usable else Path(tempfile.gettempdir())


# --- others


def build_c_server(place: Path) -> Path | str:
    """Compile the server in C; gives the program, or why there is none."""
    compiler, config = shutil.which("cc"), shutil.which("pkg-config")
    if compiler is None or config is None:
        return "no C compiler, or no pkg-config"
    flags = subprocess.run(
        [config, "--cflags", "--libs", "fuse3"], capture_output=True, text=True, check=False
    )
    if flags.returncode:
        return "no headers of libfuse3"
    program = place / "c_server"
    words: list[str | Path] = [compiler, "-O2", "-o", program, _C_SOURCE, *flags.stdout.split()]
    try:
        _run(*words)
    except BenchError as error:
        return str(error)
    return program


@contextmanager
def serve_with_c(program: Path, file: Path) -> Iterator[Server]:
    """The server in C over one file, which the mount shows as "file"."""
    with _foreground(file.parent, program, file) as server:
        yield server


def make_image(file: Path, image: Path) -> Path | str:
    """A squashfs image with one file, compressed by zstd; or why there is none."""
    program = shutil.which("mksquashfs")
    if program is None:
        return "mksquashfs is not installed"
    # The highest levels take minutes and read no slower.
    options = ["-comp", "zstd", "-Xcompression-level", "3", "-b", "128K", "-quiet", "-no-progress"]
    _run(program, file, image, "-noappend", *options)
    return image


@contextmanager
def serve_with_squashfuse(image: Path) -> Iterator[Server]:
    """An image mounted by squashfuse.

    Raises:
        BenchError: It is not installed, or cannot mount.
    """
    program = shutil.which("squashfuse_ll") or shutil.which("squashfuse")
    if program is None:
        raise BenchError("squashfuse is not installed")
    with _foreground(image.parent, Path(program), "-f", image) as server:
        yield server


@contextmanager
def serve_with_squashfs(image: Path) -> Iterator[Server]:
    """An image mounted by the kernel.

    Raises:
        BenchError: Only root may, or the kernel cannot.
    """
    if os.geteuid() != 0:
        raise BenchError("only root can mount squashfs")
    with _mountpoint(image.parent) as point:
        _run("mount", "-t", "squashfs", "-o", "loop,ro", image, point)
        try:
            yield Server(point)
        finally:
            _detach("umount", point, lazy=("-l",))


@contextmanager
def _foreground(place: Path, *command: str | Path) -> Iterator[Server]:
    """A FUSE server that stays our child; the mount point is its last argument."""
    with _mountpoint(place) as point, tempfile.TemporaryFile() as said:
        words = [os.fspath(word) for word in (*command, point)]
        process = subprocess.Popen(words, stdout=said, stderr=said)
        try:
            deadline = time.monotonic() + _STARTS_S
            while not os.path.ismount(point):
                if process.poll() is not None or time.monotonic() > deadline:
                    said.seek(0)
                    raise BenchError(f"{words[0]} does not mount: {said.read().decode()[-500:]}")
                time.sleep(0.01)
            yield Server(point, (process.pid,))
        finally:
            if os.path.ismount(point):
                _detach("fusermount3", "-u", point, lazy=("-z",))
            try:
                process.wait(_STARTS_S)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
