"""Which fragments are worth blending, and with which coefficients: for writers only.

Sums of products of a few thousand words say how well any set of bases can be fitted, without
looking at the words again. Nothing here needs to be the same everywhere.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from fragfs.codec.floats import widen
from fragfs.codec.predict import Prediction, blend_of
from fragfs.types import Dtype

__all__ = ["BlendFits", "Fit", "fit_blend"]

Words: TypeAlias = NDArray[np.unsignedinteger[Any]]

_WORDS_PER_BASE_MIN = 16

_RIDGE = 1e-13
"""Added to squares, as a share of them: fits of equal bases have a solution then."""
_TINY = 1e-290


@dataclass(frozen=True, slots=True)
class Fit:
    """The best blend of a set of bases.

    Attributes:
        bases: Their indices.
        left_over: The sum of the squares of what it gets wrong, in the numbers looked at.
        coefficients: One for each base.
    """

    bases: tuple[int, ...]
    left_over: float
    coefficients: Sequence[float]


class BlendFits:
    """Fits of a fragment by blends of others.

    Args:
        target: Some words of the fragment.
        dtype: How they read; one of FLOATS.
        bases: The same words of each base, and how they read.
        step: Look at one word in so many.
    """

    def __init__(
        self, target: Words, dtype: Dtype, bases: Sequence[tuple[Words, Dtype]], step: int = 1
    ) -> None:
        rows = np.empty((len(bases) + 1, -(-target.size // step)))
        with np.errstate(all="ignore"):  # signalling NaNs
            for row, (words, known) in zip(rows, [(target, dtype), *bases], strict=True):
                row[:] = widen(np.ascontiguousarray(words[::step]), known)
            usable = np.isfinite(rows.sum(axis=0))
        if not usable.all():
            rows = rows[:, usable]
        self._count = rows.shape[1]
        self._products = rows @ rows.T

    def left_over(self, index: int) -> float:
        """What the base with this index gets wrong on its own, as in `Fit`."""
        products = self._products
        place = index + 1
        return float(products[0, 0] - 2 * products[0, place] + products[place, place])

    def fit(self, sets: Sequence[tuple[int, ...]]) -> list[Fit]:
        """The best blend of each set of bases, those that fit best first.

        Args:
            sets: Indices of the bases of each; all sets are of one size.
        """
        if not sets or self._count < _WORDS_PER_BASE_MIN * len(sets[0]):
            return []
        places = np.array(sets) + 1
        squares = self._products[places[:, :, None], places[:, None, :]]
        given = self._products[0][places]
        diagonal = np.arange(len(sets[0]))
        solvable = squares.copy()
        solvable[:, diagonal, diagonal] *= 1 + _RIDGE
        solvable[:, diagonal, diagonal] += _TINY
        try:
            found = np.linalg.solve(solvable, given[:, :, None])[:, :, 0]
        except np.linalg.LinAlgError:
            return []
        left = self._left_over(found, squares, given)
        order = np.argsort(left, kind="stable").tolist()
        return [Fit(sets[row], float(left[row]), found[row].tolist()) for row in order]

    def _left_over(
        self, found: NDArray[np.float64], squares: NDArray[np.float64], given: NDArray[np.float64]
    ) -> NDArray[np.float64]:
        fitted = (squares @ found[:, :, None])[:, :, 0]
        rest: NDArray[np.float64] = self._products[0, 0] + ((fitted - 2 * given) * found).sum(
            axis=1
        )
        return rest


def fit_blend(
    target: Words, dtype: Dtype, bases: Sequence[tuple[Words, Dtype]]
) -> Prediction | None:
    """The best blend of all these bases; None if it is none. Arguments: see `BlendFits`."""
    found = BlendFits(target, dtype, bases).fit([tuple(range(len(bases)))])
    if not found:
        return None
    coefficients = [_plain(value) for value in found[0].coefficients]
    return blend_of([known for _, known in bases], coefficients)


def _plain(value: float) -> float:
    """The round number that a person would have chosen, if the fit is near one."""
    for denominator in (1, 2, 4, 5, 8, 10, 20, 3, 6, 7, 9, 100):
        near = round(value * denominator) / denominator
        if abs(near - value) < 2e-5:
            return near
    return value
