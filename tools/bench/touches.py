"""How many pages are touched at random, and what their times come to."""

from __future__ import annotations

import math
from collections.abc import Iterable

__all__ = ["percentile", "touch_count"]

_TOUCHES_MIN = 1024
_TOUCH_EVERY_BYTES = 128 << 10


def touch_count(size: int) -> int:
    """Touches for a file of `size` bytes.

    A cold touch decodes a fragment of a megabyte or two, once: among so many, about one in
    sixteen does, so that the 99th percentile is that of touches which decode.
    """
    return max(_TOUCHES_MIN, size // _TOUCH_EVERY_BYTES)


def percentile(values: Iterable[float], share: float) -> float:
    """The smallest value that at least `share` of all values do not exceed."""
    ordered = sorted(values)
    return ordered[max(0, math.ceil(share * len(ordered)) - 1)]
