"""Elements of every numeric dtype as binary32 bit patterns, so that copies in other dtypes meet.

Only integer operations and exact conversions of numbers that are normal in their target: a process
that flushes denormals gets the same patterns as one that does not.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from fragfs.types import Dtype

__all__ = ["Patterns", "Reader", "find_reader", "has_numbers", "magnitudes"]

Patterns: TypeAlias = NDArray[np.uint32]
"""binary32 bit patterns. Rounded towards zero from wider floats, exact from narrower ones."""

Words: TypeAlias = NDArray[Any]

_MAGNITUDE = np.uint32(0x7FFFFFFF)
_INFINITY = np.uint32(0x7F800000)
_MINIFLOATS_FINITE = {Dtype.F8_E4M3: 0x7F, Dtype.F8_E4M3FNUZ: 0x80, Dtype.F8_E5M2FNUZ: 0x80}
"""First magnitude code that is not a finite number, where IEEE 754's rule does not give it."""
_FNUZ = (Dtype.F8_E4M3FNUZ, Dtype.F8_E5M2FNUZ)


@dataclass(frozen=True, slots=True)
class Reader:
    """How to read numbers of one dtype.

    Attributes:
        word: numpy dtype of one number; complex elements are two numbers.
        to_patterns: Turns words into patterns; numbers that are not finite become zero.
        mantissa_bits: Stored mantissa bits; -1 for integers.
        ulp_min: Distance of neighbouring numbers next to zero, where it is coarse enough to matter.
    """

    word: np.dtype[Any]
    to_patterns: Callable[[Words], Patterns]
    mantissa_bits: int
    ulp_min: float = 0.0

    @property
    def narrow(self) -> bool:
        """Whether a number takes one byte: such copies are often stored with a scale."""
        return self.word.itemsize == 1


def has_numbers(dtype: Dtype) -> bool:
    """Whether fragments of `dtype` are numbers that a signature can be taken of."""
    return find_reader(dtype) is not None


@cache
def find_reader(dtype: Dtype) -> Reader | None:
    """How to read `dtype`, or None for bytes, booleans, blocks and packed elements."""
    if dtype in (Dtype.BYTES, Dtype.QUANT, Dtype.BOOL) or dtype.bits % 8:
        return None
    if dtype.exponent_bits == 0:
        kind = "i" if dtype.name.startswith("I") else "u"
        word = np.dtype(f"<{kind}{dtype.bits // 8}")
        return Reader(word, _from_bytes if word == np.uint8 else _from_integers, -1, 1.0)
    if dtype in (Dtype.F32, Dtype.C64):
        return Reader(np.dtype("<u4"), _from_binary32, 23)
    if dtype in (Dtype.F64, Dtype.C128):
        return Reader(np.dtype("<u8"), _from_binary64, 52)
    if dtype is Dtype.BF16:
        return Reader(np.dtype("<u2"), _from_bfloat16, 7)
    table = _table_of(dtype)
    smallest = (table[1:2] & _MAGNITUDE).view(np.float32).item()
    word = np.dtype(f"<u{dtype.bits // 8}")
    return Reader(word, table.take, dtype.mantissa_bits, smallest)


def magnitudes(patterns: Patterns) -> Patterns:
    """`patterns` without their signs; they compare as the magnitudes of the numbers do."""
    return patterns & _MAGNITUDE


def _from_binary32(words: Words) -> Patterns:
    finite = (words & _MAGNITUDE) < _INFINITY
    patterns: Patterns = words * finite
    return patterns


def _from_bfloat16(words: Words) -> Patterns:
    return _from_binary32(words.astype(np.uint32) << np.uint32(16))


def _from_binary64(words: Words) -> Patterns:
    wide = words.astype(np.uint64)
    shifted = (wide & np.uint64(2**63 - 1)) >> np.uint64(29)
    rebased = shifted.astype(np.int64) - ((1023 - 127) << 23)
    patterns = rebased.clip(0, int(_INFINITY) - 1).astype(np.uint32)
    patterns |= (wide >> np.uint64(63)).astype(np.uint32) << np.uint32(31)
    finite = (wide & np.uint64(0x7FF << 52)) != np.uint64(0x7FF << 52)
    return np.where(finite, patterns, np.uint32(0))


def _from_integers(words: Words) -> Patterns:
    return words.astype(np.float32).view(np.uint32)


def _from_bytes(words: Words) -> Patterns:
    # Unsigned bytes are mostly quantized numbers around a zero point of 128.
    return _from_integers(words.astype(np.int16) - np.int16(128))


@cache
def _table_of(dtype: Dtype) -> Patterns:
    """Pattern of every code of a float of one or two bytes."""
    codes = np.arange(1 << dtype.bits, dtype=np.int64)
    if dtype is Dtype.F8_E8M0:
        return np.where(codes < 255, codes << 23, 0).astype(np.uint32)
    mantissa_bits, exponent_bits = dtype.mantissa_bits, dtype.exponent_bits
    bias = (1 << (exponent_bits - 1)) - (0 if dtype in _FNUZ else 1)
    magnitude = codes & ((1 << (dtype.bits - 1)) - 1)
    exponent, mantissa = magnitude >> mantissa_bits, magnitude & ((1 << mantissa_bits) - 1)
    significand = np.where(exponent > 0, mantissa + (1 << mantissa_bits), mantissa)
    # As binary64, where every such number is normal; the smallest one is 2**-24.
    values = np.ldexp(
        significand.astype(np.float64), np.maximum(exponent, 1) - bias - mantissa_bits
    )
    finite = _MINIFLOATS_FINITE.get(dtype, ((1 << exponent_bits) - 1) << mantissa_bits)
    # In the last family the one code that is no number is what would be minus zero.
    values = np.where((magnitude < finite) & (codes != finite), values, 0.0)
    patterns = values.astype(np.float32).view(np.uint32)
    sign = (codes >> (dtype.bits - 1)).astype(np.uint32) << np.uint32(31)
    return np.where(patterns > 0, patterns | sign, patterns)
