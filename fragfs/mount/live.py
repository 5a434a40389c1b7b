"""The mounts of one library that answer, and what they say of themselves."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fragfs.errors import NotFoundError, StorageError, UsageError
from fragfs.mount.probe import MountState, ask_mount, ask_mounts
from fragfs.mount.table import MountEntry, canonical_mountpoint, find_mount, read_mount_table

__all__ = ["LiveMount", "live_mounts", "named_mount", "reachable_mounts"]


@dataclass(frozen=True, slots=True)
class LiveMount:
    """A mount that answers.

    Attributes:
        entry: Its line in the mount table.
        status: Its counters.
    """

    entry: MountEntry
    status: dict[str, Any]


def reachable_mounts() -> list[MountEntry]:
    """Every fragfs mount of the mount table that no other mount hides."""
    on_top = {entry.mountpoint: entry for entry in read_mount_table()}
    return [entry for entry in on_top.values() if entry.is_fragfs]


def live_mounts(library: Path, timeout_s: float) -> list[LiveMount]:
    """The mounts of a library, as far as they answer this user; blocks for `timeout_s` at most.

    Args:
        library: Its directory.
        timeout_s: How long a mount may take to answer; all are asked at once.
    """
    entries = reachable_mounts()
    answers = ask_mounts([entry.mountpoint for entry in entries], timeout_s)
    wanted = os.path.realpath(library)
    return [
        LiveMount(entry, answer.status)
        for entry, answer in zip(entries, answers, strict=True)
        if answer.status is not None and answer.status.get("library") == wanted
    ]


def named_mount(library: Path, mountpoint: Path, timeout_s: float) -> LiveMount:
    """The mount of a library on one directory.

    Raises:
        NotFoundError: Nothing of fragfs is mounted there.
        UsageError: It shows another library.
        StorageError: It does not answer.
    """
    place = canonical_mountpoint(mountpoint)
    entry = find_mount(place)
    if entry is None or not entry.is_fragfs:
        raise NotFoundError(
            f"no fragfs library is mounted on {place}",
            path=os.fspath(place),
            remedy=f"mount it: fragfs mount {place}",
        )
    answer = ask_mount(place, timeout_s)
    if answer.state is not MountState.ANSWERS or answer.status is None:
        raise StorageError(
            f"the mount on {place} does not answer",
            path=os.fspath(place),
            remedy=f"see why: fragfs doctor {place}",
        )
    if answer.status.get("library") != os.path.realpath(library):
        raise UsageError(
            f"the mount on {place} shows the library {answer.status.get('library')}",
            path=os.fspath(place),
            remedy=f"name that one with --library, or another mount point of {library}",
        )
    return LiveMount(entry, answer.status)
