"""What is to be said about a mount and the machine it is on. Pure: facts in, findings out.

Source of the figures on read-ahead: two cores, Linux 6.18, 2026-11: at 128 KiB requests arrive with
128 KiB, at 512 with 512 KiB; fs.fuse.max_pages_limit of 256 would allow 1 MiB.
"""

from __future__ import annotations

import enum
import errno
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fragfs.mount.options import READ_AHEAD_KB
from fragfs.mount.probe import MountAnswer, MountState
from fragfs.mount.table import MountEntry, name_warning
from fragfs.types import LIBRARY_FORMAT_VERSION

__all__ = [
    "BACKGROUND_WANTED",
    "LARGE_PAGES",
    "READ_AHEAD_DEFAULT_KB",
    "Finding",
    "MountFacts",
    "Severity",
    "SystemFacts",
    "examine_mount",
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

_CACHE_BYTES_SMALL = 256 << 20


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
        group = f"; the control group still allows {_size(facts.group_bytes)}"
    text = f"{_size(facts.memory_bytes)} available{group}"
    if facts.memory_bytes < _MEMORY_BYTES_MIN:
        yield Finding(
            Severity.PROBLEM,
            "memory",
            f"{text}: nothing is stored ahead of readers below {_size(_MEMORY_BYTES_MIN)}",
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
            f"{_size(size)} of memory are held by fragment caches that nobody uses: {names}",
            "fragfs doctor --fix",
        )


# --- a mount


def examine_mount(facts: MountFacts, system: SystemFacts) -> list[Finding]:
    """What there is to say about a mount."""
    place = facts.entry.mountpoint
    found = [_answers(facts)]
    warning = name_warning(place)
    if warning is not None:
        found.append(
            Finding(Severity.ADVICE, "name", warning, "mount it under a name without them")
        )
    if facts.answer.state is MountState.ANSWERS:
        found += _library(facts)
        found += _read_ahead(facts, system)
        found += _background(facts, system)
        status = facts.answer.status
        if status is not None:
            found += _cache(facts, status, system)
            found += _front(status)
            found += _prefill(status, system)
            found += _passthrough(facts, status)
            found += _decoders(facts, status)
            found += _errors(status)
    return [
        Finding(finding.severity, finding.topic, finding.text, finding.remedy, place)
        for finding in found
    ]


def _answers(facts: MountFacts) -> Finding:
    state, status = facts.answer.state, facts.answer.status
    place = shlex.quote(str(facts.entry.mountpoint))
    if state is MountState.DEAD:
        return Finding(
            Severity.PROBLEM,
            "answers",
            "no: its process is gone",
            f"fragfs umount {place}, or fragfs doctor --fix {place}",
        )
    if state is MountState.HANGS:
        waiting = f"; {facts.waiting} requests wait" if facts.waiting is not None else ""
        servers = ", ".join(map(str, facts.servers))
        if facts.stopped:
            return Finding(
                Severity.PROBLEM,
                "answers",
                f"no: its process was stopped by a signal (SIGSTOP){waiting}",
                f"let it go on: kill -CONT {' '.join(map(str, facts.stopped))}",
            )
        if servers:
            waiting = f" (process {servers}){waiting}"
        return Finding(
            Severity.PROBLEM,
            "answers",
            f"no: it hangs{waiting}",
            f"see its log; end it with: fragfs umount --force {place}",
        )
    if state is MountState.FAILS:
        owner = _owner(facts.entry)
        if facts.answer.error == errno.EACCES:
            return Finding(
                Severity.ADVICE,
                "answers",
                f"not to this user: user {owner} mounted it for nobody else",
                f"run this as user {owner}, or mount it with --allow-other",
            )
        return Finding(
            Severity.PROBLEM,
            "answers",
            f"with an error: {errno.errorcode.get(facts.answer.error, facts.answer.error)}",
            "see its log",
        )
    if status is None:
        return Finding(
            Severity.ADVICE,
            "answers",
            "yes, but says nothing about itself: another version of fragfs serves it",
            f"mount it again: fragfs umount {place}, then fragfs mount {place}",
        )
    in_flight = status.get("waiting") or 0
    return Finding(
        Severity.OK,
        "answers",
        f"yes: process {status.get('pid')}, {status.get('reads', 0):,} reads,"
        f" {_size(status.get('bytes_returned', 0))}"
        + (f", {in_flight} waiting" if in_flight else ""),
    )


def _owner(entry: MountEntry) -> str:
    named = (option for option in entry.options if option.startswith("user_id="))
    return next(named, "user_id=?").partition("=")[2]


def _library(facts: MountFacts) -> Iterator[Finding]:
    path = (facts.answer.status or {}).get("library")
    if path is None:
        return
    version = facts.library_format
    if version is None:
        yield Finding(
            Severity.PROBLEM,
            "library",
            f"{path}: its catalog cannot be read",
            "see whether the disk is there, and the library was not moved",
        )
    elif version == LIBRARY_FORMAT_VERSION:
        yield Finding(Severity.OK, "library", f"{path} (format {version})")
    elif version < LIBRARY_FORMAT_VERSION:
        yield Finding(
            Severity.ADVICE,
            "library",
            f"{path} has format {version}; this fragfs writes format {LIBRARY_FORMAT_VERSION}",
            "it is brought up to date when somebody who may write to it opens it; then run:"
            " fragfs optimize",
        )
    else:
        yield Finding(
            Severity.PROBLEM,
            "library",
            f"{path} has format {version}, newer than this fragfs",
            "use the newer fragfs",
        )


def _read_ahead(facts: MountFacts, system: SystemFacts) -> Iterator[Finding]:
    kb = facts.read_ahead_kb
    if kb is None:
        yield Finding(Severity.OK, "read-ahead", "not known: /sys does not tell")
        return
    largest_kb = (system.max_pages or 256) * system.page_bytes >> 10
    text = f"{kb} KiB; requests of up to {min(kb, largest_kb)} KiB"
    if not wants_read_ahead(facts):
        yield Finding(Severity.OK, "read-ahead", text)
        return
    place = shlex.quote(str(facts.entry.mountpoint))
    default = ", the kernel's default" if kb == READ_AHEAD_DEFAULT_KB else ""
    if system.is_root:
        remedy = f"fragfs doctor --fix {place}, or mount with --read-ahead {READ_AHEAD_KB}"
    else:
        remedy = (
            f"as root: echo {READ_AHEAD_KB} > /sys/class/bdi/{facts.entry.device}/read_ahead_kb"
        )
    yield Finding(
        Severity.ADVICE,
        "read-ahead",
        f"{kb} KiB{default}: programs that read() send requests of that size;"
        f" {READ_AHEAD_KB} KiB means fewer",
        remedy,
    )


def _background(facts: MountFacts, system: SystemFacts) -> Iterator[Finding]:
    count, threshold = facts.max_background, facts.congestion_threshold
    if count is None:
        why = (
            "only who mounted it, and root, may know"
            if system.has_control
            else "/sys/fs/fuse/connections is not mounted"
        )
        yield Finding(Severity.OK, "background", f"not known: {why}")
        return
    text = f"at most {count} requests in flight, read-ahead pauses at {threshold}"
    if wants_background(facts):
        place = shlex.quote(str(facts.entry.mountpoint))
        yield Finding(
            Severity.ADVICE,
            "background",
            f"{text}: few for several readers at once",
            f"as root: fragfs doctor --fix {place}",
        )
    else:
        yield Finding(Severity.OK, "background", text)


def _cache(facts: MountFacts, status: dict[str, Any], system: SystemFacts) -> Iterator[Finding]:
    cache, asked = status.get("cache"), facts.options
    shared = ""
    if system.shared_bytes is not None:
        free = system.shared_free_bytes or 0
        shared = f" (/dev/shm has {_size(system.shared_bytes)}, {_size(free)} free)"
    if cache is None:
        if asked.get("cache_bytes_max") == 0:
            yield Finding(
                Severity.ADVICE,
                "cache",
                "none, as --cache 0 says: what does not fit 96 MiB is decoded again",
                "mount without --cache 0",
            )
        else:
            yield Finding(
                Severity.ADVICE,
                "cache",
                f"none: no room, or its directory is not safe to use; the log says which{shared}",
                "give the container more shared memory, or name a place with --cache-dir",
            )
        return
    asks = cache["hits"] + cache["misses"]
    hits = f", {100 * cache['hits'] / asks:.0f} % of {asks:,} found" if asks else ""
    evictions = f", {cache['evictions']:,} evicted" if cache["evictions"] else ""
    text = (
        f"{_size(cache['bytes_held'])} of {_size(cache['bytes_max'])} in {cache['directory']}"
        f"{hits}{evictions}"
    )
    if cache["damaged"]:
        yield Finding(
            Severity.PROBLEM,
            "cache",
            f"{cache['damaged']} files of it had changed, and were decoded again: bad memory, a"
            " bad disk, or somebody writes there",
            "see the log; check the machine's memory",
        )
    if not cache["in_memory"] and asked.get("cache_directory") is None:
        yield Finding(
            Severity.ADVICE,
            "cache",
            f"on disk, for shared memory is too small{shared}: {text}",
            "give the container more shared memory (docker run --shm-size), or name a fast"
            " place with --cache-dir",
        )
    elif cache["bytes_max"] < _CACHE_BYTES_SMALL and asked.get("cache_bytes_max") is None:
        yield Finding(
            Severity.ADVICE,
            "cache",
            f"small, for want of room{shared}: {text}",
            "name a size with --cache, or another place with --cache-dir",
        )
    else:
        kind = "in memory" if cache["in_memory"] else "on disk, as --cache-dir says"
        yield Finding(Severity.OK, "cache", f"{kind}: {text}")


def _front(status: dict[str, Any]) -> Iterator[Finding]:
    if status.get("front", True):
        return
    yield Finding(
        Severity.ADVICE,
        "reads",
        "go through the interpreter, which takes about twice as long: the compiled part of"
        " fragfs was not built",
        "install a C compiler and Linux's headers, then fragfs again",
    )


def _prefill(status: dict[str, Any], system: SystemFacts) -> Iterator[Finding]:
    prefill = status.get("prefill")
    if prefill is None:
        why = "as --no-prefill says" if status.get("cache") else "for want of a fragment cache"
        yield Finding(Severity.OK, "prefill", f"off, {why}")
    elif prefill.get("pid") is None:
        how = (
            "mount it as root"
            if system.has_control
            else "as root: mount -t fusectl fusectl /sys/fs/fuse/connections; then mount it again"
        )
        yield Finding(
            Severity.ADVICE,
            "prefill",
            "decodes ahead of readers, but stores no pages: this user may not abort the"
            " connection, and a crash could leave readers waiting",
            how,
        )
    elif not prefill.get("alive", True):
        yield Finding(
            Severity.PROBLEM,
            "prefill",
            "off: the process that stores pages keeps ending",
            "see the log; mount it again",
        )
    else:
        failed = prefill.get("failed_stores", 0)
        yield Finding(
            Severity.OK,
            "prefill",
            "on: decodes ahead of readers;"
            f" {_size(prefill.get('pushed_bytes', 0))} stored into the page cache"
            + (f", {failed:,} refused" if failed else ""),
        )


def _passthrough(facts: MountFacts, status: dict[str, Any]) -> Iterator[Finding]:
    passthrough = status.get("passthrough")
    if passthrough is None:
        why = (
            "off, as --no-passthrough says"
            if facts.options.get("passthrough") is False
            else "off: the kernel takes files only of a mount by root, whose cache is in memory and"
            " whose reads are answered by compiled code"
        )
    elif passthrough["off"] is not None:
        why = f"off: {passthrough['off']}"
    else:
        why = (
            f"on: files that were read once are read by the kernel itself; it has"
            f" {passthrough['files']:,}, opened {passthrough['opened']:,} times"
        )
    yield Finding(Severity.OK, "passthrough", why)


def _decoders(facts: MountFacts, status: dict[str, Any]) -> Iterator[Finding]:
    if status.get("cache") is None:
        yield Finding(Severity.OK, "decoders", "threads of the process itself: there is no cache")
        return
    alive = [pid for pid in status.get("helpers", []) if pid not in facts.dead_decoders]
    if alive:
        counts = f"{len(alive)} processes" if len(alive) > 1 else "1 process"
        yield Finding(
            Severity.OK,
            "decoders",
            f"{counts}; {status.get('decodes', 0):,} fragments decoded,"
            f" {_size(status.get('bytes_decoded', 0))}",
        )
    else:
        yield Finding(
            Severity.PROBLEM,
            "decoders",
            "none lives: they keep ending, and the mount decodes in its own process, slowly",
            "see the log; mount it again",
        )


def _errors(status: dict[str, Any]) -> Iterator[Finding]:
    for fault in status.get("last_errors", []):
        yield Finding(
            Severity.PROBLEM,
            "error",
            f"{fault.get('what')}: {fault.get('error')}",
            "find what is damaged with: fragfs verify; adding the same model again repairs it",
        )


def _size(count: int) -> str:
    """A size for people."""
    value, unit = float(count), "B"
    for following in ("kB", "MB", "GB", "TB"):
        if value < 1000:
            break
        value, unit = value / 1000, following
    return f"{value:.3g} {unit}" if value < 999.5 else f"{value:,.0f} {unit}"
