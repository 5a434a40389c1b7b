"""Mounting: check the place, start the daemon as a new process, return when the mount answers.

Imports nothing heavy at import time; the command line starts with it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import os
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import fragfs.errors
from fragfs.errors import FragmentError, NotFoundError, StorageError, UsageError
from fragfs.mount.options import MountOptions
from fragfs.mount.probe import MountAnswer, MountState, ask_mount, probe_mount
from fragfs.mount.table import canonical_mountpoint, find_mount, name_warning
from fragfs.mount.unmount import detach

__all__ = ["MountReport", "mount", "serve"]

log = logging.getLogger(__name__)

_PROBE_S_MAX = 2.0
_DEVICE = "/dev/fuse"


@dataclass(frozen=True, slots=True)
class MountReport:
    """A mount that answers.

    Attributes:
        pid: The daemon's process.
        mountpoint: As the mount table spells it.
        read_ahead_kb: How far the kernel reads ahead on it; None if it does not say.
        max_background: Background requests the kernel keeps in flight; None if not readable.
        cache_directory: Where its shared fragment cache is; None if it has none.
        warnings: What the user should know, as sentences.
    """

    pid: int
    mountpoint: Path
    read_ahead_kb: int | None
    max_background: int | None
    cache_directory: Path | None
    warnings: tuple[str, ...]


def mount(options: MountOptions, *, timeout_s: float = 30.0) -> MountReport:
    """Start a daemon that serves the mount, and wait until the mount answers.

    A dead fragfs mount at the same place is cleared first.

    Args:
        options: What to mount where.
        timeout_s: How long the mount may take to answer.

    Raises:
        UsageError: The place cannot be a mount point: not an empty directory, mounted already, or
            library and mount point lie in each other.
        FragmentError: What the daemon said: no such library or model, mounting refused.
        StorageError: The mount does not answer in time.
    """
    options, warnings = _prepare(options)
    deadline = time.monotonic() + timeout_s
    with tempfile.TemporaryFile() as said:
        messages = _start(options, said)
        with contextlib.closing(messages):
            pid = None
            try:
                pid = messages.next(deadline)["pid"]
                messages.next(deadline)
                answer = _wait_answering(options.mountpoint, deadline)
            except _Silent:
                _clean_up(pid, options.mountpoint)
                raise _failure(
                    {"error": f"no mount on {options.mountpoint} within {timeout_s:g} s"}, said
                ) from None
            except _Failed as failed:
                raise _failure(failed.message, said) from None
    entry = find_mount(options.mountpoint)
    if entry is not None and options.read_ahead_kb is not None:
        entry.raise_read_ahead(options.read_ahead_kb)
    return MountReport(
        pid=pid,
        mountpoint=options.mountpoint,
        read_ahead_kb=entry.read_ahead_kb if entry else None,
        max_background=entry.max_background if entry else None,
        cache_directory=_cache_directory(answer),
        warnings=warnings,
    )


def serve(options: MountOptions) -> int:
    """Serve the mount in this process until it is unmounted or a signal ends it.

    Returns:
        0, or 1 if readers were cut off.

    Raises:
        UsageError, FragmentError: As `mount`.
    """
    options, warnings = _prepare(options)
    for text in warnings:
        log.warning("%s", text)
    from fragfs.mount.daemon import run

    return run(options, lambda: None, foreground=True)


# --- before


def _prepare(options: MountOptions) -> tuple[MountOptions, tuple[str, ...]]:
    """Check the place and spell all paths for a process that runs elsewhere."""
    if not os.path.exists(_DEVICE):
        raise StorageError(
            f"{_DEVICE} is missing: this system cannot mount FUSE file systems",
            remedy="load the fuse module, or give the container the device",
        )
    if os.geteuid() != 0 and shutil.which("fusermount3") is None:
        raise StorageError("fusermount3 is not installed", remedy="install fuse3")
    library = Path(os.path.realpath(options.library))
    place = canonical_mountpoint(options.mountpoint)
    _clear_dead(place)
    _check_place(place, nonempty=options.nonempty)
    for inner, outer in ((library, place), (place, library)):
        if inner == outer or outer in inner.parents:
            raise UsageError(
                f"the library {library} and the mount point {place} lie in each other",
                path=os.fspath(place),
                remedy="mount somewhere else",
            )
    log_file = options.log_file and Path(os.path.abspath(options.log_file))
    prepared = dataclasses.replace(options, library=library, mountpoint=place, log_file=log_file)
    warning = name_warning(place)
    return prepared, () if warning is None else (warning,)


def _clear_dead(place: Path) -> None:
    """Detach fragfs mounts whose daemon is gone; there may be several on top of each other."""
    while (entry := find_mount(place)) is not None:
        if not entry.is_fragfs:
            raise UsageError(
                f"{place} is a mount of type {entry.filesystem_type} already",
                path=os.fspath(place),
                remedy="mount somewhere else",
            )
        state = probe_mount(place, _PROBE_S_MAX)
        if state is not MountState.DEAD:
            raise UsageError(
                f"a fragfs library is mounted on {place} already"
                + (", and does not answer" if state is MountState.HANGS else ""),
                path=os.fspath(place),
                remedy=f"unmount it first: fragfs umount {place}",
            )
        detach(entry)


def _check_place(place: Path, *, nonempty: bool) -> None:
    try:
        with os.scandir(place) as entries:
            occupied = next(entries, None) is not None
    except FileNotFoundError as error:
        raise NotFoundError(
            f"there is no directory {place}", path=os.fspath(place), remedy="create it first"
        ) from error
    except NotADirectoryError as error:
        raise UsageError(f"{place} is not a directory", path=os.fspath(place)) from error
    except OSError as error:
        raise StorageError(
            f"cannot look at {place}: {error.strerror}", path=os.fspath(place), errno=error.errno
        ) from error
    if occupied and not nonempty:
        raise UsageError(
            f"{place} is not empty; what it holds would be hidden",
            path=os.fspath(place),
            remedy="mount on an empty directory, or allow it with -o nonempty",
        )


# --- the daemon


class _Silent(Exception):
    """The daemon said nothing in time, or ended without a word."""


class _Failed(Exception):
    """The daemon said what is wrong."""

    def __init__(self, message: dict[str, Any]) -> None:
        super().__init__(message)
        self.message = message


class _Messages:
    """Lines of JSON from the daemon."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self._buffer = b""

    def next(self, deadline: float) -> dict[str, Any]:
        while b"\n" not in self._buffer:
            remaining = max(0.0, deadline - time.monotonic())
            if not select.select([self._descriptor], [], [], remaining)[0]:
                raise _Silent
            data = os.read(self._descriptor, 65536)
            if not data:
                raise _Failed({"error": "the daemon ended before it had mounted"})
            self._buffer += data
        line, _, self._buffer = self._buffer.partition(b"\n")
        message: dict[str, Any] = json.loads(line)
        if "error" in message:
            raise _Failed(message)
        return message

    def close(self) -> None:
        os.close(self._descriptor)


def _start(options: MountOptions, said: IO[bytes]) -> _Messages:
    reading, writing = os.pipe()
    try:
        # The process started here ends at once, leaving the daemon to init.
        subprocess.run(
            [sys.executable, "-P", "-m", "fragfs.mount.detached", str(writing)],
            input=options.to_json().encode(),
            stdout=subprocess.DEVNULL,
            stderr=said,
            pass_fds=(writing,),
            start_new_session=True,
            cwd="/",
            check=False,
        )
    except OSError as error:
        os.close(reading)
        raise StorageError(
            f"cannot start {sys.executable}: {error.strerror}", errno=error.errno
        ) from error
    finally:
        os.close(writing)
    return _Messages(reading)


def _wait_answering(place: Path, deadline: float) -> MountAnswer:
    answer = ask_mount(place, max(0.1, deadline - time.monotonic()))
    if answer.state is not MountState.ANSWERS:
        raise _Silent
    return answer


def _cache_directory(answer: MountAnswer) -> Path | None:
    cache = answer.status.get("cache") if answer.status else None
    return Path(cache["directory"]) if cache else None


def _clean_up(pid: int | None, place: Path) -> None:
    if pid is not None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    entry = find_mount(place)
    if entry is not None and entry.is_fragfs:
        with contextlib.suppress(FragmentError):
            detach(entry)


def _failure(message: dict[str, Any], said: IO[bytes]) -> FragmentError:
    """The daemon's error in this process, with what it and fusermount3 wrote to stderr."""
    said.seek(0)
    tail = said.read()[-2000:].decode(errors="replace").strip()
    text = message["error"] + (f": {tail}" if tail else "")
    kind = getattr(fragfs.errors, message.get("kind") or "", StorageError)
    error: FragmentError = kind(text, remedy=message.get("remedy"), path=message.get("path"))
    return error
