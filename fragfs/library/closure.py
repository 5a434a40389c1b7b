"""Closures: all the fragments it takes to decode one.

Pure; the catalog knows who is predicted from whom. The closure of a fragment is the fragment, its
bases, their bases, and so on. A library's `closure_max` bounds its size, and with it what a random
read may cost.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence

__all__ = ["CLOSURE_LIMIT", "Closures", "closure_of"]

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


class Closures:
    """Closures of fragments whose bases do not change meanwhile: each is looked up once.

    Args:
        find_bases: The bases of each of some fragments, by its number.
    """

    def __init__(
        self, find_bases: Callable[[Collection[int]], Mapping[int, tuple[int, ...]]]
    ) -> None:
        self._find_bases = find_bases
        self._known: dict[int, tuple[int, ...]] = {}

    def load(self, numbers: Iterable[int]) -> None:
        """Look up the closures of all of `numbers` at once, one look-up for each level."""
        waiting = set(numbers) - self._known.keys()
        for _ in range(CLOSURE_LIMIT + 1):
            if not waiting:
                break
            found = self._find_bases(waiting)
            self._known.update(found)
            waiting = {base for bases in found.values() for base in bases} - self._known.keys()

    def bases(self, number: int) -> tuple[int, ...]:
        """The bases of a fragment, in its predictor's order."""
        self.load((number,))
        return self._known[number]

    def of(self, numbers: Sequence[int]) -> set[int]:
        """The fragments that decoding all of `numbers` takes; see `closure_of`."""
        self.load(numbers)
        return closure_of(numbers, self._known.__getitem__)
