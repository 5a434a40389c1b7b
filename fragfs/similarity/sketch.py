"""Sketches: a few numbers of a fragment in 48 bytes, and how far apart two sketches are.

| offset | size | field                                                                        |
|--------|------|------------------------------------------------------------------------------|
| 0      | 1    | layout version                                                               |
| 1      | 1    | code of the dtype                                                            |
| 2      | 1    | level: the numbers stand at places below 2**level                            |
| 3      | 1    | largest exponent field (binary32) among the numbers                          |
| 4      | 44   | 32 numbers of 11 bits, highest bit first: sign, then 10 bits of magnitude    |

A magnitude counts steps of 1/64 octave up to 16 octaves below the largest exponent; 0 is zero. The
numbers are absolute: how far apart two sketches are does not depend on either's largest exponent.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from fragfs.similarity.numbers import Patterns, Reader, find_reader
from fragfs.similarity.positions import SAMPLES, shared_samples
from fragfs.types import Dtype

__all__ = ["SKETCH_SIZE", "pack_sketch", "sketch_distance", "sketch_distances"]

SKETCH_SIZE = 48
"""Bytes of a sketch."""

_LAYOUT_VERSION = 1
_HEADER_SIZE = 4
_TOP_OFFSET = 3
_CODE_BITS = 11
_MAGNITUDE_BITS = _CODE_BITS - 1
_MANTISSA_BITS = 6
_CODE_MAX = (1 << _MAGNITUDE_BITS) - 1
_SHIFT = 23 - _MANTISSA_BITS
_HALF_STEP = 1 << (_SHIFT - 1)
_TINY = float(np.finfo(np.float64).tiny)
_LEVEL_MAX = 63
_KIND_SIZE = 3  # version, dtype, level
_CODE_STARTS = np.arange(SAMPLES) * _CODE_BITS
_CODE_BYTES = _HEADER_SIZE + _CODE_STARTS // 8
_CODE_SHIFTS = (32 - _CODE_BITS - _CODE_STARTS % 8).astype(np.uint32)

_ALIKE_MAX = 28
"""Numbers of a sketch that may be the same one. Beyond, too little is left to compare."""

_SHARED_MIN = 8
"""Fewest common numbers that two sketches are compared by: siblings up to two levels apart."""

_STRANGERS = 0.7
"""Mean of the ratio below for unrelated numbers of a Gaussian (2**-0.5); 0.67 to 0.75 for other
shapes."""

_OUTLIER = 2.0
"""Numbers beyond this many medians count as if they were this large: a few large columns, which all
layers of a model share, must not decide alone."""

Floats = NDArray[np.float64]


def pack_sketch(patterns: Patterns, dtype: Dtype, level: int) -> bytes | None:
    """Sketch the numbers found at `sample_places(level)`.

    Returns:
        SKETCH_SIZE bytes, or None if nearly all numbers are the same one.
    """
    # Plain integers: for so few numbers, a third of the time that a dozen numpy calls take.
    numbers = patterns.tolist()
    top = max(number & 0x7FFFFFFF for number in numbers) >> 23
    base = _base(top)
    codes = []
    for number in numbers:
        code = ((number & 0x7FFFFFFF) + _HALF_STEP >> _SHIFT) - base
        codes.append(min(code, _CODE_MAX) | number >> 31 << _MAGNITUDE_BITS if code > 0 else 0)
    ordered = sorted(codes)
    if any(map(operator.eq, ordered, ordered[_ALIKE_MAX:])):
        return None
    packed = 0
    for code in codes:
        packed = packed << _CODE_BITS | code
    header = bytes((_LAYOUT_VERSION, dtype.code, level, top))
    return header + packed.to_bytes(SKETCH_SIZE - _HEADER_SIZE, "big")


def sketch_dtype(sketch: bytes) -> Dtype | None:
    """The dtype of the fragment that a sketch was made of; None if this fragfs knows it not."""
    return Dtype.of_code(sketch[1]) if len(sketch) == SKETCH_SIZE else None


def sketch_distance(target: bytes, base: bytes) -> float:
    """How different the numbers of two fragments are; see `sketch_distances`."""
    return float(sketch_distances(target, [base])[0])


def sketch_distances(target: bytes, bases: Sequence[bytes]) -> Floats:
    """How different a fragment's numbers are from those of each of `bases`.

    The sum of the differences over the sum of the deviations from the common median, each number
    weighted down if it is an outlier, scaled so that strangers are about 1 apart. Noise of 1 % of
    the numbers' spread gives about 0.007. What rounding to a one-byte dtype explains does not
    count: a cast of `base` is 0 from it, though `base` is not 0 from its cast. Numbers of one byte
    are compared with those of other dtypes up to a scale.

    Args:
        target: Sketch of the fragment that is to be predicted.
        bases: Sketches of those that it may be predicted from.

    Returns:
        float64 in [0, 1], shape (len(bases),). 1 where sketches cannot be compared: malformed,
        another layout, or fragments of very different length.
    """
    distances = np.ones(len(bases))
    target_reader = _reader_of(target[:_KIND_SIZE], len(target))
    if target_reader is None:
        return distances
    kinds: dict[bytes, list[int]] = {}
    for index, base in enumerate(bases):
        if len(base) == SKETCH_SIZE:
            kinds.setdefault(base[:_KIND_SIZE], []).append(index)
    for kind, rows in kinds.items():
        reader = _reader_of(kind, SKETCH_SIZE)
        if reader is None:
            continue
        values = _unpack([target, *(bases[index] for index in rows)])
        if kind[2] != target[2]:
            mask = shared_samples(target[2], kind[2])
            if np.count_nonzero(mask) < _SHARED_MIN:
                continue
            values = values[:, mask]
        distances[rows] = _compare(values[0], target_reader, values[1:], reader)
    return distances


@lru_cache(maxsize=1024)
def _reader_of(kind: bytes, size: int) -> Reader | None:
    """How numbers of a sketch of this size and beginning were read; None if it is malformed."""
    if size != SKETCH_SIZE or kind[0] != _LAYOUT_VERSION or kind[2] > _LEVEL_MAX:
        return None
    dtype = Dtype.of_code(kind[1])
    return find_reader(dtype) if dtype is not None else None


def _base(top: int) -> int:
    """What code 0 stands for, in steps: 16 octaves below the exponent after `top`, and normal."""
    return max(((top + 1) << _MANTISSA_BITS) - (1 << _MAGNITUDE_BITS), (1 << _MANTISSA_BITS) - 1)


_BASES = np.array([_base(top) for top in range(256)], np.uint32)


def _unpack(sketches: list[bytes]) -> Floats:
    """The numbers of sketches, shape (len(sketches), SAMPLES)."""
    joined = b"".join([*sketches, bytes(3)])
    # Every four bytes as one word, wherever they begin; the last ones reach behind the sketch.
    around: NDArray[np.uint32] = np.ndarray(
        (len(sketches), SKETCH_SIZE), ">u4", joined, 0, (SKETCH_SIZE, 1)
    )
    codes = around.take(_CODE_BYTES, axis=1) >> _CODE_SHIFTS & np.uint32((1 << _CODE_BITS) - 1)
    magnitude = codes & np.uint32(_CODE_MAX)
    tops = np.frombuffer(joined, np.uint8)[_TOP_OFFSET:-3:SKETCH_SIZE]
    base = _BASES.take(tops)[:, None]
    steps = np.minimum(magnitude + base, np.uint32((255 << _MANTISSA_BITS) - 1))
    patterns = np.where(magnitude > 0, steps << np.uint32(_SHIFT), np.uint32(0))
    patterns |= codes >> np.uint32(_MAGNITUDE_BITS) << np.uint32(31)
    return patterns.view(np.float32).astype(np.float64)


def _compare(target: Floats, target_reader: Reader, bases: Floats, base_reader: Reader) -> Floats:
    allowance: Floats | None = None
    if target_reader.narrow and not base_reader.narrow:
        allowance = _rounding(target, target_reader.mantissa_bits, target_reader.ulp_min)
    distances = _ratio(target, bases, allowance)
    if target_reader != base_reader and (target_reader.narrow or base_reader.narrow):
        fitted = _fit_scale(target, bases)
        distances = np.minimum(distances, _ratio(target, fitted, allowance))
    return distances


def _rounding(target: Floats, mantissa_bits: int, ulp_min: float) -> Floats:
    """How far rounding may have moved each number of `target`."""
    if mantissa_bits < 0:
        return np.full(target.shape, ulp_min / 2)
    _, exponents = np.frexp(target)
    ulps: Floats = np.ldexp(1.0, exponents - 1 - mantissa_bits)
    return np.maximum(ulps, ulp_min) / 2


def _fit_scale(target: Floats, bases: Floats) -> Floats:
    """`bases`, each multiplied by what brings it closest to `target`."""
    # Divided by their largest number first, so that squares neither overflow nor vanish.
    size = np.abs(bases).max(axis=1, keepdims=True)
    unit = bases / np.where(size > 0, size, 1.0)
    squares = np.square(unit).sum(axis=1, keepdims=True)
    scale = (unit * target).sum(axis=1, keepdims=True) / np.where(squares > 0, squares, 1.0)
    fitted: Floats = unit * np.maximum(scale, 0.0)
    return fitted


def _ratio(target: Floats, bases: Floats, allowance: Floats | None) -> Floats:
    count = target.size
    both = np.empty((len(bases), 2 * count))
    both[:, :count] = target
    both[:, count:] = bases
    both.sort(axis=1)
    center = (both[:, count - 1] + both[:, count])[:, None] / 2
    spread = np.abs(target - center) + np.abs(bases - center)
    differences = np.abs(target - bases)
    if allowance is not None:
        coding = np.abs(bases) * 2.0 ** -(_MANTISSA_BITS + 1)
        differences = np.maximum(differences - (allowance + coding), 0.0)
    # The median of those spreads that are not 0: many numbers of a pruned fragment are.
    ordered = np.sort(spread, axis=1)
    middle = (count + np.count_nonzero(spread == 0, axis=1)) // 2
    limit = _OUTLIER * ordered[np.arange(len(bases)), np.minimum(middle, count - 1)][:, None]
    weight = limit / np.maximum(np.maximum(spread, limit), _TINY)
    total = (spread * weight).sum(axis=1)
    ratio = (differences * weight).sum(axis=1) / np.maximum(total, _TINY)
    return np.where(total > 0, np.minimum(ratio / _STRANGERS, 1.0), 1.0)
