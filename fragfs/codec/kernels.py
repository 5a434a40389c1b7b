"""The compiled loops, where they were built and suit the machine; None elsewhere.

Everything they do is also done with numpy, with equal results.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from types import ModuleType

__all__ = ["find_kernels"]

_VERSION = 5
"""Of the functions and what they take; raised with every change to them, here and in the source."""


def find_kernels() -> ModuleType | None:
    """The compiled module, or None."""
    if sys.byteorder != "little":
        return None
    try:
        from fragfs.codec import _kernels  # type: ignore[attr-defined]  # compiled, no stub
    except ImportError:
        return None
    module: ModuleType = _kernels
    # A file built for older sources is as good as none.
    return module if getattr(module, "VERSION", None) == _VERSION else None
