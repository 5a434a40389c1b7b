"""Closures: all the fragments it takes to decode one.

Pure; the catalog knows who is predicted from whom. The closure of a fragment is the fragment, its
bases, their bases, and so on. A library's `closure_max` bounds its size, and with it what a random
read may cost.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

__all__ = ["CLOSURE_LIMIT", "closure_of"]

CLOSURE_LIMIT = 8
"""Largest `closure_max` of any library: what a reader follows before it calls a chain damaged."""


def closure_of(numbers: Iterable[int], bases: Callable[[int], Sequence[int]]) -> set[int]:
    """The fragments that decoding all of `numbers` takes, themselves included.

    Stops growing beyond CLOSURE_LIMIT members, so that a damaged catalog cannot make it run on.

    Args:
        numbers: Fragments.
        bases: The bases of a fragment by its number.
    """
    found: set[int] = set()
    waiting = list(numbers)
    while waiting and len(found) <= CLOSURE_LIMIT:
        number = waiting.pop()
        if number not in found:
            found.add(number)
            waiting += bases(number)
    return found
