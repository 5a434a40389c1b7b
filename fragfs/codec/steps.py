"""Steps: what a word moves by, told by the leading bits of its mantissa.

Weights that get no gradient, such as the rows of an embedding whose tokens do not occur, still
decay: each is multiplied by a number just below 1 at every update, and rounded. In units in the
last place all of one mantissa lose the same then, whatever their exponents, so a table with a step
for each range of mantissas predicts them nearly always exactly. Only for F32: in words of 16 bits
decay is lost in rounding (no fragment of a run in bf16 got smaller, 2026-11-24).
Format: library/FORMAT.md, "Predictions from bases".
"""

from __future__ import annotations

from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from fragfs.codec.kernels import find_kernels
from fragfs.types import Dtype

__all__ = ["STEPPED", "STEP_COUNT", "add_steps", "fit_steps", "pack_steps", "parse_steps"]

Words: TypeAlias = NDArray[np.unsignedinteger[Any]]

STEPPED = (Dtype.F32,)
"""Dtypes whose words have steps."""

STEP_COUNT = 256
"""A step for each value of the 8 leading bits of a mantissa."""

_SHIFT = 15
"""Bits of an F32 below those."""
_BLOCK_WORDS = 1 << 15
"""Words stepped at a time without the kernels: temporaries fit the second-level cache."""
_BIAS = np.uint32(0x80808080)

_STEP_MAX = 1 << 15
"""Larger moves are none that a range of mantissas has in common: those at its two ends differ by a
256th of them."""
_HELD_MIN = 1 / 8
"""Of the words of a range, how many must move alike to have a step."""
_HELD_WORDS_MIN = 3
_PROBED_WORDS = 2048
"""Words that tell whether any step can be found: moves that were trained hardly ever repeat."""

_kernels = find_kernels()


def add_steps(words: Words, steps: Words) -> Words:
    """Each word plus its step, modulo 2**32.

    Args:
        words: Of F32; contiguous.
        steps: STEP_COUNT words.

    Returns:
        As many words, in fresh memory.
    """
    out: Words = np.empty(words.size, "<u4")
    if _kernels is not None:
        _kernels.add_steps(words, steps, out)
        return out
    for start in range(0, words.size, _BLOCK_WORDS):
        block = words[start : start + _BLOCK_WORDS]
        # The cast cuts sign and exponent off.
        ranges = (block >> np.uint32(_SHIFT)).astype(np.uint8)
        np.add(block, steps[ranges], out=out[start : start + _BLOCK_WORDS])
    return out


def pack_steps(steps: Words) -> Words:
    """What is stored of steps, in planes: neighbours differ by little."""
    return np.diff(steps, prepend=steps.dtype.type(0)) + _BIAS


def parse_steps(stored: Words) -> Words:
    """Undo `pack_steps`; any words are steps."""
    steps: Words = np.cumsum(stored - _BIAS, dtype="<u4")
    return steps


# --- fitting, for writers only: nothing here needs to be the same everywhere


def fit_steps(target: Words, base: Words) -> Words | None:
    """The step that most words of each range have moved by; None if there is nothing in it.

    Args:
        target: Some words of what is to be predicted.
        base: The same words of the base.
    """
    moves = target - base
    probed = np.sort(moves[:: -(-moves.size // _PROBED_WORDS)])
    repeated = np.count_nonzero((probed[1:] == probed[:-1]) & (probed[1:] != 0))
    if repeated < _HELD_MIN * probed.size:
        return None
    ranges = (base >> np.uint32(_SHIFT)) & np.uint32(STEP_COUNT - 1)
    totals = np.bincount(ranges, minlength=STEP_COUNT)
    places = moves + np.uint32(_STEP_MAX)
    near = places < 2 * _STEP_MAX
    pairs = np.sort(ranges[near] << np.uint32(16) | places[near])
    if not pairs.size:
        return None
    starts = np.flatnonzero(np.diff(pairs, prepend=~pairs[0]))
    counts = np.diff(starts, append=pairs.size)
    kinds = pairs[starts]
    present, first = np.unique(kinds >> np.uint32(16), return_index=True)
    best = np.maximum.reduceat(counts << 16 | (kinds & np.uint32(0xFFFF)).astype(np.int64), first)
    held = best >> 16 > np.maximum(_HELD_MIN * totals[present], _HELD_WORDS_MIN - 1)
    steps: Words = ((best[held] & 0xFFFF) - _STEP_MAX).astype("<i4").view("<u4")
    if not steps.any():
        return None
    # A range without a step has that of the one below it, or of the lowest there is.
    known = np.searchsorted(present[held], np.arange(STEP_COUNT), side="right") - 1
    return steps[np.maximum(known, 0)]
