"""What doctor looks at, and what is to be said about the machine. Pure: facts in, findings out.

Source of the figures on read-ahead: two cores, Linux 6.18, 2026-11: at 128 KiB requests arrive with
128 KiB, at 512 with 512 KiB; fs.fuse.max_pages_limit of 256 would allow 1 MiB.
"""

from __future__ import annotations

import enum
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fragfs.mount.options import READ_AHEAD_KB
from fragfs.mount.probe import MountAnswer, MountState
from fragfs.mount.table import MountEntry

__all__ = [
    "BACKGROUND_WANTED",
    "LARGE_PAGES",
    "READ_AHEAD_DEFAULT_KB",
    "Finding",
    "MountFacts",
    "Severity",
    "SystemFacts",
    "describe_size",
    "examine_system",
    "wants_background",
    "wants_read_ahead",
]

READ_AHEAD_DEFAULT_KB = 128
LARGE_PAGES = "huge=within_size"
"""Mount option of a tmpfs: pages as large as what is written, and never larger."""

BACKGROUND_WANTED = 64

_MEMORY_BYTES_MIN = 256 << 20
"""Below this, nothing is stored ahead of readers (`prefill`)."""


class Severity(enum.Enum):
    """How much a finding matters."""

    OK = "ok"
    ADVICE = "advice"
    PROBLEM = "problem"


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that was looked at.

    Attributes:
        severity: How much it matters.
        topic: What was looked at, in a word or two.
        text: What there is.
        remedy: What to do about it; None if nothing.
        mountpoint: Of which mount; None of the machine.
    """

    severity: Severity
    topic: str
    text: str
    remedy: str | None = None
    mountpoint: Path | None = None


@dataclass(frozen=True, slots=True)
class SystemFacts:
    """The machine, as this process sees it; None where it does not tell.

    Attributes:
        is_root: Whether this user is root.
        has_device: Whether there is /dev/fuse.
        has_fusermount: Whether fusermount3 is installed.
        has_control: Whether the control file system of FUSE is mounted.
        default_timeout_s: Seconds a server may take that named no timeout; 0 is any time.
        max_timeout_s: Seconds any server may take; 0 is any time.
        max_pages: Most pages of one request.
        page_bytes: Bytes of a page.
        memory_bytes: Memory that can be had without pushing anybody out.
        group_bytes: What the control group of this process still allows; None if it has no limit.
        shared_bytes: Size of the file system for shared memory.
        shared_free_bytes: What is free of it.
        shared_small_pages: Whether it holds files in the smallest pages, where this kernel has
            larger ones.
        abandoned: Fragment caches nobody uses: directory and bytes.
    """

    is_root: bool
    has_device: bool
    has_fusermount: bool
    has_control: bool
    default_timeout_s: int | None
    max_timeout_s: int | None
    max_pages: int | None
    page_bytes: int
    memory_bytes: int
    group_bytes: int | None
    shared_bytes: int | None
    shared_free_bytes: int | None
    shared_small_pages: bool
    abandoned: tuple[tuple[Path, int], ...]


@dataclass(frozen=True, slots=True)
class MountFacts:
    """One mount.

    Attributes:
        entry: Its line in the mount table.
        answer: How it reacts, and its counters.
        read_ahead_kb: How far the kernel reads ahead.
        max_background: Background requests in flight; None if this user may not know.
        congestion_threshold: Background requests at which read-ahead pauses; None likewise.
        waiting: Requests the kernel waits for; None likewise.
        servers: Of a mount that hangs, the processes that serve it, as far as this user may see.
        stopped: Those of them that were stopped by a signal.
        dead_decoders: Decoder processes that its counters name and that are no more.
        library_format: Format of its library; None if that cannot be read.
    """

    entry: MountEntry
    answer: MountAnswer
    read_ahead_kb: int | None
    max_background: int | None
    congestion_threshold: int | None
    waiting: int | None
    servers: tuple[int, ...]
    stopped: tuple[int, ...]
    dead_decoders: tuple[int, ...]
    library_format: int | None

    @property
    def options(self) -> dict[str, Any]:
        """What the mount was asked to be, as far as it tells."""
        options: dict[str, Any] = (self.answer.status or {}).get("options") or {}
        return options


def wants_read_ahead(facts: MountFacts) -> bool:
    """Whether the kernel should read ahead further: it does not, and nobody chose so."""
    return (
        facts.answer.state is MountState.ANSWERS
        and facts.read_ahead_kb is not None
        and facts.read_ahead_kb < READ_AHEAD_KB
        and facts.options.get("read_ahead_kb") != facts.read_ahead_kb
    )


def wants_background(facts: MountFacts) -> bool:
    """Whether the kernel should have more requests in flight."""
    return (
        facts.answer.state is MountState.ANSWERS
        and facts.max_background is not None
        and facts.max_background < BACKGROUND_WANTED
    )


# --- the machine


def examine_system(facts: SystemFacts) -> list[Finding]:
    """What there is to say about the machine."""
    return [
        *_fuse(facts),
        *_timeouts(facts),
        *_memory(facts),
        *_shared_pages(facts),
        *_abandoned(facts),
    ]


def _fuse(facts: SystemFacts) -> Iterator[Finding]:
    if not facts.has_device:
        yield Finding(
            Severity.PROBLEM,
            "fuse",
            "there is no /dev/fuse: nothing can be mounted",
            "load the fuse module, or give the container the device",
        )
    if not facts.has_fusermount:
        yield Finding(
            Severity.PROBLEM,
            "fuse",
            "fusermount3 is not installed: mounts cannot be ended, nor made by users",
            "install fuse3",
        )
    if facts.has_device and facts.has_fusermount:
        limit = ""
        if facts.max_pages is not None:
            limit = f"; requests of at most {facts.max_pages * facts.page_bytes >> 10} KiB"
        yield Finding(Severity.OK, "fuse", f"/dev/fuse and fusermount3 are there{limit}")


def _timeouts(facts: SystemFacts) -> Iterator[Finding]:
    limits = [
        (seconds, name)
        for seconds, name in (
            (facts.default_timeout_s, "default_request_timeout"),
            (facts.max_timeout_s, "max_request_timeout"),
        )
        if seconds
    ]
    if limits:
        seconds, name = min(limits)
        yield Finding(
            Severity.ADVICE if seconds >= 60 else Severity.PROBLEM,
            "timeout",
            f"the kernel ends a mount that takes {seconds} s over one request (fs.fuse.{name});"
            " reading from a slow disk, or with all cores busy, may take that long",
            f"as root: sysctl fs.fuse.{name}=0",
        )
    elif facts.default_timeout_s is not None:
        yield Finding(Severity.OK, "timeout", "the kernel sets requests no time limit")


def _memory(facts: SystemFacts) -> Iterator[Finding]:
    group = ""
    if facts.group_bytes is not None:
        group = f"; the control group still allows {describe_size(facts.group_bytes)}"
    text = f"{describe_size(facts.memory_bytes)} available{group}"
    if facts.memory_bytes < _MEMORY_BYTES_MIN:
        yield Finding(
            Severity.PROBLEM,
            "memory",
            f"{text}: nothing is stored ahead of readers below {describe_size(_MEMORY_BYTES_MIN)}",
            "end what needs it, or allow the control group more",
        )
    else:
        yield Finding(Severity.OK, "memory", text)


def _shared_pages(facts: SystemFacts) -> Iterator[Finding]:
    """A cold read of a GB takes 3.1 core-seconds with the smallest pages, 2.4 with large ones."""
    if facts.shared_small_pages:
        yield Finding(
            Severity.ADVICE,
            "shared memory",
            "it holds files in the smallest pages: first loads take about a quarter longer than"
            " they need to",
            f"as root: fragfs doctor --fix, until the next boot; for good: {LARGE_PAGES} among the"
            " options of /dev/shm in /etc/fstab",
        )


def _abandoned(facts: SystemFacts) -> Iterator[Finding]:
    if facts.abandoned:
        size = sum(size for _, size in facts.abandoned)
        names = ", ".join(str(directory) for directory, _ in facts.abandoned)
        yield Finding(
            Severity.ADVICE,
            "caches",
            f"{describe_size(size)} of memory are held by fragment caches that nobody uses:"
            f" {names}",
            "fragfs doctor --fix",
        )


def describe_size(count: int) -> str:
    """A size for people."""
    value, unit = float(count), "B"
    for following in ("kB", "MB", "GB", "TB"):
        if value < 1000:
            break
        value, unit = value / 1000, following
    return f"{value:.3g} {unit}" if value < 999.5 else f"{value:,.0f} {unit}"
