"""`-o` options of `fragfs mount` and of fstab lines. Pure."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fragfs.errors import UsageError

__all__ = ["FstabOptions", "parse_fstab_options"]

# Words for mount(8), systemd or the kernel, which a read-only tree of plain files satisfies
# anyway: pyfuse3 always mounts nosuid and nodev, and nothing here has set-user-ID bits to honour.
_IGNORED = frozenset(
    "auto noauto defaults _netdev nofail user users nouser owner group ro suid nosuid dev nodev"
    " exec noexec atime noatime relatime norelatime strictatime lazytime nolazytime diratime"
    " nodiratime async loud silent default_permissions".split()
)


_FLAGS = {
    "allow_other": "allow_other",
    "allow_root": "allow_root",
    "nonempty": "nonempty",
    "rw": "writable",
}


@dataclass(frozen=True, slots=True)
class FstabOptions:
    """What an `-o` list says; None and empty mean that it does not say."""

    allow_other: bool = False
    allow_root: bool = False
    nonempty: bool = False
    uid: int | None = None
    gid: int | None = None
    umask: int | None = None
    library: Path | None = None
    models: tuple[bytes, ...] = ()
    writable: bool = False


def parse_fstab_options(text: str) -> FstabOptions:
    """Read a comma-separated list of mount options.

    Args:
        text: For example `ro,allow_other,umask=022,x-systemd.automount`.

    Returns:
        What it says; of options given twice, the last one counts, but for `model=`, which adds.

    Raises:
        UsageError: An option is unknown or has a bad value.
    """
    found: dict[str, Any] = {}
    for word in filter(None, text.split(",")):
        name, has_value, value = word.partition("=")
        if _is_ignored(name, has_value=bool(has_value)):
            continue
        if not has_value and name in _FLAGS:
            found[_FLAGS[name]] = True
        elif value and name in ("uid", "gid", "umask"):
            found[name] = parse_number(name, value)
        elif value and name == "library":
            found[name] = Path(value)
        elif value and name == "model":
            found["models"] = (*found.get("models", ()), os.fsencode(value))
        else:
            raise UsageError(
                f"unknown mount option {word!r}",
                remedy="use ro, allow_other, allow_root, nonempty, uid=N, gid=N, umask=OCTAL,"
                " library=PATH or model=NAME",
            )
    return FstabOptions(**found)


def _is_ignored(name: str, *, has_value: bool) -> bool:
    if name.lower().startswith("x-") or name == "comment":
        return True
    return name in _IGNORED and not has_value


def parse_number(name: str, text: str) -> int:
    """Read a `uid`, a `gid` (decimal), or a `umask` (octal).

    Raises:
        UsageError: `text` is no such number.
    """
    base, limit = (8, 0o777) if name == "umask" else (10, 2**32 - 2)
    try:
        number = int(text, base)
    except ValueError:
        number = -1
    if not 0 <= number <= limit:
        kind = "an octal number up to 777" if name == "umask" else "the number of a user or group"
        raise UsageError(f"{name}={text} is not {kind}", remedy=f"give {name} as {kind}")
    return number
