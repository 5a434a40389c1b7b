"""What is to be said about a mount. Pure: facts in, findings out."""

from __future__ import annotations

import errno
import shlex
from collections.abc import Iterator
from typing import Any

from fragfs.mount.findings import (
    READ_AHEAD_DEFAULT_KB,
    Finding,
    MountFacts,
    Severity,
    SystemFacts,
    describe_size,
    wants_background,
    wants_read_ahead,
)
from fragfs.mount.options import READ_AHEAD_KB
from fragfs.mount.probe import MountState
from fragfs.mount.table import MountEntry, name_warning
from fragfs.types import LIBRARY_FORMAT_VERSION

__all__ = ["examine_mount"]

_CACHE_BYTES_SMALL = 256 << 20


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
        f" {describe_size(status.get('bytes_returned', 0))}"
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
        shared = f" (/dev/shm has {describe_size(system.shared_bytes)}, {describe_size(free)} free)"
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
        f"{describe_size(cache['bytes_held'])} of {describe_size(cache['bytes_max'])}"
        f" in {cache['directory']}"
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
            f" {describe_size(prefill.get('pushed_bytes', 0))} stored into the page cache"
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
            f" {describe_size(status.get('bytes_decoded', 0))}",
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
