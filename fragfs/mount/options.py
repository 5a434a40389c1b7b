"""What a mount is asked to be. Imports nothing heavy: the command line starts with it."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path

from fragfs.errors import UsageError

__all__ = ["READ_AHEAD_KB", "MountOptions"]

READ_AHEAD_KB = 512
"""Requests have 128 KiB by default, and 1 MiB at most; but that and a header are more than a pipe
takes at once, and are copied once more on their way."""

_UMASK_DEFAULT = 0o222
_PATHS = ("library", "mountpoint", "cache_directory", "cache_on_disk", "log_file")


@dataclass(frozen=True, slots=True)
class MountOptions:
    """One mount of one library.

    Attributes:
        library: Directory of the library.
        mountpoint: Directory to mount on.
        models: Names of the models to show; empty shows all.
        allow_other: Let every user read the mount.
        allow_root: Let root read the mount besides its owner.
        uid: Owner shown for everything; None is the user who mounts.
        gid: Group shown for everything; None is the group of who mounts.
        umask: Permission bits taken off 0444 (files) and 0555 (directories).
        nonempty: Mount over a directory that has entries.
        cache_bytes_max: Budget of the fragment cache; None is a share of the memory there is, 0
            keeps fragments in the daemon's own memory only.
        cache_directory: Where the fragment cache is; None is shared memory if it is large enough.
        cache_on_disk: Where it is if shared memory is too small.
        passthrough: Put together what was read, into files that the kernel reads itself, where this
            user may.
        prefill: Store decoded fragments into the kernel's page cache ahead of readers.
        read_ahead_kb: How far the kernel is to read ahead, where this user may say so; None leaves
            what it is.
        log_file: Where the daemon logs; None is syslog when daemonized, stderr in the foreground.
        verbose: Log more.
        grace_s: How long open files may be read on after a termination signal.
        workers: Processes that decode, and threads where there are none; None is one per core,
            from 2 to 16.
    """

    library: Path
    mountpoint: Path
    models: tuple[bytes, ...] = ()
    allow_other: bool = False
    allow_root: bool = False
    uid: int | None = None
    gid: int | None = None
    umask: int | None = None
    nonempty: bool = False
    cache_bytes_max: int | None = None
    cache_directory: Path | None = None
    cache_on_disk: Path | None = None
    passthrough: bool = True
    prefill: bool = True
    read_ahead_kb: int | None = READ_AHEAD_KB
    log_file: Path | None = None
    verbose: bool = False
    grace_s: float = 30.0
    workers: int | None = None

    def __post_init__(self) -> None:
        if self.allow_other and self.allow_root:
            raise UsageError("allow_other and allow_root exclude each other")
        if self.umask is not None and not 0 <= self.umask <= 0o777:
            raise UsageError(f"umask must be from 0 to 777 (octal), not {self.umask:o}")
        if self.cache_bytes_max is not None and self.cache_bytes_max < 0:
            raise UsageError(f"cache_bytes_max must not be negative: {self.cache_bytes_max}")
        if self.read_ahead_kb is not None and not 4 <= self.read_ahead_kb <= 1 << 20:
            raise UsageError(f"read_ahead_kb must be from 4 to 1048576, not {self.read_ahead_kb}")
        if self.grace_s < 0:
            raise UsageError(f"grace_s must not be negative: {self.grace_s}")
        if self.workers is not None and self.workers < 1:
            raise UsageError(f"workers must be at least 1, not {self.workers}")

    @property
    def umask_or_default(self) -> int:
        """The umask in effect."""
        return _UMASK_DEFAULT if self.umask is None else self.umask

    def to_json(self) -> str:
        """For the daemon's standard input; bytes that are not UTF-8 survive."""
        values = asdict(self)
        for name in _PATHS:
            value = values[name]
            values[name] = None if value is None else os.fspath(value)
        values["models"] = [os.fsdecode(name) for name in self.models]
        return json.dumps(values)

    @classmethod
    def from_json(cls, text: str) -> MountOptions:
        """Read what `to_json` wrote."""
        values = json.loads(text)
        for name in _PATHS:
            value = values[name]
            values[name] = None if value is None else Path(value)
        values["models"] = tuple(os.fsencode(name) for name in values["models"])
        return cls(**values)
