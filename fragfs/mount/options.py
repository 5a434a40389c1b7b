"""What a mount is asked to be. Imports nothing heavy: the command line starts with it."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path

from fragfs.cache.memory import CACHE_BYTES_MAX_DEFAULT
from fragfs.errors import UsageError

__all__ = ["MountOptions"]

_UMASK_DEFAULT = 0o222


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
        cache_bytes_max: Budget of the daemon's decoded-fragment cache.
        log_file: Where the daemon logs; None is syslog when daemonized, stderr in the foreground.
        verbose: Log more.
        grace_s: How long open files may be read on after a termination signal.
        workers: Fragments decoded at once; None is one per core, from 2 to 16.
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
    cache_bytes_max: int = CACHE_BYTES_MAX_DEFAULT
    log_file: Path | None = None
    verbose: bool = False
    grace_s: float = 30.0
    workers: int | None = None

    def __post_init__(self) -> None:
        if self.allow_other and self.allow_root:
            raise UsageError("allow_other and allow_root exclude each other")
        if self.umask is not None and not 0 <= self.umask <= 0o777:
            raise UsageError(f"umask must be from 0 to 777 (octal), not {self.umask:o}")
        if self.cache_bytes_max < 0:
            raise UsageError(f"cache_bytes_max must not be negative: {self.cache_bytes_max}")
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
        for name in ("library", "mountpoint", "log_file"):
            value = values[name]
            values[name] = None if value is None else os.fspath(value)
        values["models"] = [os.fsdecode(name) for name in self.models]
        return json.dumps(values)

    @classmethod
    def from_json(cls, text: str) -> MountOptions:
        """Read what `to_json` wrote."""
        values = json.loads(text)
        for name in ("library", "mountpoint", "log_file"):
            value = values[name]
            values[name] = None if value is None else Path(value)
        values["models"] = tuple(os.fsencode(name) for name in values["models"])
        return cls(**values)
