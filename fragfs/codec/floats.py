"""Conversions between float formats, the same on every machine.

Libraries differ: a NaN cast to bf16 is 0x7fc0 in one and 0xffff in another, and a process that flushes
denormals changes what numpy computes. Here every conversion is integer arithmetic on bit patterns, or
a single IEEE operation whose result does not depend on flushing, with the special cases defined by us.
A conversion need not be what any library does, only always the same: the residual covers the rest.
Format: library/FORMAT.md, "Conversions".
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from fragfs.types import Dtype

__all__ = ["FLOATS", "narrow", "quantize", "widen", "word_type"]

Words: TypeAlias = NDArray[np.unsignedinteger[Any]]
Floats: TypeAlias = NDArray[np.float32]

FLOATS = (Dtype.F32, Dtype.BF16, Dtype.F16, Dtype.F8_E4M3, Dtype.F8_E5M2)
"""Formats that can be converted into one another, by way of f32."""

_BLOCK_WORDS = 1 << 15
"""Words converted at a time: all temporaries of a block fit the second-level cache."""


@dataclass(frozen=True, slots=True)
class _Small:
    """A float of 8 bits: `mantissa` stored bits, exponent bias, and the code of its largest value."""

    mantissa: int
    bias: int
    largest: int

    @property
    def drop(self) -> int:
        """Mantissa bits of f32 that it lacks."""
        return 23 - self.mantissa

    @property
    def magic(self) -> np.float32:
        """A number whose unit in the last place is the smallest denormal: adding it rounds."""
        return np.float32(2.0 ** (23 + 1 - self.bias - self.mantissa))


_SMALL = {Dtype.F8_E4M3: _Small(3, 7, 0x7E), Dtype.F8_E5M2: _Small(2, 15, 0x7B)}


def word_type(dtype: Dtype) -> np.dtype[np.unsignedinteger[Any]]:
    """Little-endian words of a dtype of 8, 16, 32 or 64 bits."""
    return np.dtype(f"<u{dtype.bits // 8}")


def widen(words: Words, dtype: Dtype) -> Floats:
    """Exactly the same numbers as f32; a NaN keeps its sign and the bits that fit.

    Args:
        words: Bit patterns of `dtype`.
        dtype: One of FLOATS.

    Returns:
        float32, of fresh memory; for F32 a view.
    """
    match dtype:
        case Dtype.F32:
            return words.view("<f4")
        case Dtype.BF16:
            return (words.astype("<u4") << np.uint32(16)).view("<f4")
        case Dtype.F16:
            floats = words.view("<f2").astype("<f4")
            special = (words & np.uint16(0x7C00)) == 0x7C00
            if special.any():
                bits = words[special].astype("<u4")
                floats.view("<u4")[special] = (
                    (bits & 0x8000) << 16 | 0x7F800000 | (bits & 0x3FF) << 13
                )
            return floats
        case _:
            return _small_table(dtype)[words]


@cache
def _small_table(dtype: Dtype) -> Floats:
    """Every value of an 8-bit float; its infinities and NaNs count as larger numbers."""
    small = _SMALL[dtype]
    codes = np.arange(256, dtype=np.int64)
    exponents = (codes & 0x7F) >> small.mantissa
    fractions = (codes & ((1 << small.mantissa) - 1)).astype(np.float64)
    leading = np.where(exponents > 0, 1 << small.mantissa, 0)
    scale = np.exp2(np.maximum(exponents, 1) - small.bias - small.mantissa)
    values = (leading + fractions) * scale
    return np.where(codes & 0x80, -values, values).astype("<f4")


def narrow(floats: Floats, dtype: Dtype) -> Words:
    """Round to the nearest number of `dtype`, ties to even.

    bf16: NaNs are rounded like numbers. f16: NaNs become 0x7e00 with their sign. 8-bit floats: what
    is too large, infinite or NaN becomes the largest finite number.

    Args:
        floats: float32.
        dtype: One of FLOATS.

    Returns:
        Bit patterns of `dtype`, of fresh memory; for F32 a view.
    """
    bits: Words = floats.view("<u4")
    match dtype:
        case Dtype.F32:
            return bits
        case Dtype.BF16:
            rounded = bits >> np.uint32(16)
            np.bitwise_and(rounded, np.uint32(1), out=rounded)
            np.add(rounded, np.uint32(0x7FFF), out=rounded)
            np.add(rounded, bits, out=rounded)
            return np.right_shift(rounded, np.uint32(16), out=rounded).astype("<u2")
        case Dtype.F16:
            with np.errstate(all="ignore"):
                words: Words = floats.astype("<f2").view("<u2")
            is_nan = (words & np.uint16(0x7FFF)) > 0x7C00
            if is_nan.any():
                words[is_nan] = words[is_nan] & np.uint16(0x8000) | np.uint16(0x7E00)
            return words
        case _:
            return _narrow_small(bits, _SMALL[dtype])


def _narrow_small(bits: Words, small: _Small) -> Words:
    magnitude = bits & np.uint32(0x7FFFFFFF)
    drop = np.uint32(small.drop)
    normal = magnitude >> drop
    np.bitwise_and(normal, np.uint32(1), out=normal)
    np.add(normal, np.uint32((1 << small.drop - 1) - 1), out=normal)
    np.add(normal, magnitude, out=normal)
    np.right_shift(normal, drop, out=normal)
    # Exponents below the smallest wrap around here; they are denormal and replaced below.
    np.subtract(normal, np.uint32((127 - small.bias) << small.mantissa), out=normal)
    is_denormal = magnitude < np.uint32((128 - small.bias) << 23)
    if is_denormal.any():
        # Far larger than any denormal, so flushing them to zero changes nothing.
        tiny = magnitude[is_denormal].view("<f4") + small.magic
        normal[is_denormal] = tiny.view("<u4") - small.magic.view(np.uint32)
    np.minimum(normal, np.uint32(small.largest), out=normal)
    codes: Words = normal.astype(np.uint8)
    codes |= (bits >> np.uint32(24)).astype(np.uint8) & np.uint8(0x80)
    return codes


def quantize(floats: Floats, scales: Floats) -> Words:
    """`floats / scales`, rounded to whole numbers (ties to even) and cut to a signed byte.

    Args:
        floats: float32; NaN counts as 0.
        scales: float32 of the same shape, each at least 2**-60 in size: a denormal divided by it is
            0 whether or not denormals are flushed.

    Returns:
        Two's complement bytes.
    """
    with np.errstate(all="ignore"):
        ratio = np.rint(floats / scales)
    np.copyto(ratio, np.float32(0), where=np.isnan(ratio))
    return np.clip(ratio, -128, 127).astype(np.int8).view(np.uint8)
