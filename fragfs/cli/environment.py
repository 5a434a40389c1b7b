"""Where things are when the command line does not say: the only reader of the environment.

`FRAGFS_LIBRARY` itself is read by click, as the default of `--library` (see `options`).
"""

from __future__ import annotations

from pathlib import Path

__all__ = [
    "LIBRARY_VARIABLE",
    "default_cache",
    "default_library",
    "default_log_file",
    "default_state",
]

LIBRARY_VARIABLE = "FRAGFS_LIBRARY"
"""Names the library when `--library` is not given."""

_SYSLOG_SOCKET = Path("/dev/log")


def default_library() -> Path:
    """The library used when neither `--library` nor `FRAGFS_LIBRARY` names one."""
    import platformdirs  # 30 ms to import: only for those who need the default

    return platformdirs.user_data_path("fragfs") / "library"


def default_cache() -> Path:
    """Where the fragment cache goes when shared memory is too small."""
    import platformdirs

    return platformdirs.user_cache_path("fragfs") / "fragments"


def default_state() -> Path:
    """Where commands keep what they need to go on after an interruption."""
    import platformdirs

    return platformdirs.user_state_path("fragfs")


def default_log_file() -> Path | None:
    """Where a mount logs when there is no system log to write to; None if there is one.

    Creates the directory, readable by its owner only: messages name models and files.
    """
    if _SYSLOG_SOCKET.exists():
        return None
    import platformdirs

    directory = platformdirs.user_log_path("fragfs")
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    return directory / "mount.log"
