"""Conversions between float formats, the same on every machine.

Libraries differ: a NaN cast to bf16 is 0x7fc0 in one and 0xffff in another, and a process that
flushes denormals changes what numpy computes. Here every conversion is integer arithmetic on bit
patterns, or a single IEEE operation whose result does not depend on flushing, with the special
cases defined by us. A conversion need not be what any library does, only always the same: the
residual covers the rest. Format: library/FORMAT.md, "Conversions".
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from fragfs.codec.kernels import find_kernels
from fragfs.types import Dtype

__all__ = ["FLOATS", "blend", "convert", "narrow", "quantize", "widen", "word_type"]

Words: TypeAlias = NDArray[np.unsignedinteger[Any]]
Floats: TypeAlias = NDArray[np.float32]

FLOATS = (Dtype.F32, Dtype.BF16, Dtype.F16, Dtype.F8_E4M3, Dtype.F8_E5M2)
"""Formats that can be converted into one another, by way of f32."""

_TINY_EXPONENT = 64
"""An f32 with a smaller exponent field counts as zero in a blend: products with coefficients of at
least 2**-20 and their sums are then never denormal, so flushing cannot change them."""

_kernels = find_kernels()
_FORMATS = {Dtype.BF16: 0, Dtype.F16: 1, Dtype.F8_E4M3: 2, Dtype.F8_E5M2: 3, Dtype.F32: 4}
"""What the kernels call the formats."""
_WIDENED = (Dtype.BF16, Dtype.F16, Dtype.F32)
"""The formats that the kernels read; they write all."""

_BLOCK_WORDS = 1 << 15
"""Words converted at a time without the kernels: temporaries fit the second-level cache."""


@dataclass(frozen=True, slots=True)
class _Small:
    """A float of 8 or 16 bits with a narrower exponent than f32.

    Attributes:
        mantissa: Stored bits.
        bias: Of the exponent.
        largest: The code of its largest finite number.
        sign: The sign bit.
    """

    mantissa: int
    bias: int
    largest: int
    sign: int

    @property
    def drop(self) -> int:
        """Mantissa bits of f32 that it lacks."""
        return 23 - self.mantissa

    @property
    def magic(self) -> np.float32:
        """A number whose unit in the last place is the smallest denormal: adding it rounds."""
        return np.float32(2.0 ** (23 + 1 - self.bias - self.mantissa))


_SMALL = {
    Dtype.F16: _Small(10, 15, 0x7BFF, 0x8000),
    Dtype.F8_E4M3: _Small(3, 7, 0x7E, 0x80),
    Dtype.F8_E5M2: _Small(2, 15, 0x7B, 0x80),
}


def word_type(dtype: Dtype) -> np.dtype[np.unsignedinteger[Any]]:
    """Little-endian words of a dtype of 8, 16, 32 or 64 bits."""
    return np.dtype(f"<u{dtype.bits // 8}")


def convert(
    inputs: Sequence[Words],
    formats: Sequence[Dtype],
    coefficients: Sequence[float] | None,
    dtype: Dtype,
) -> Words:
    """The sum of each input times its coefficient, or one input as it is, as words of a dtype.

    Args:
        inputs: Bit patterns, contiguous, all of one size.
        formats: How each reads; of FLOATS.
        coefficients: One f32 for each input; None for one input as it is.
        dtype: What to convert to; of FLOATS.

    Returns:
        Bit patterns of `dtype`, in fresh memory.
    """
    count = inputs[0].size
    out: Words = np.empty(count, word_type(dtype))
    factors = [1.0] if coefficients is None else coefficients
    if _kernels is not None and all(known in _WIDENED for known in formats):
        given = [
            (_FORMATS[known], words, factor)
            for known, words, factor in zip(formats, inputs, factors, strict=True)
        ]
        _kernels.convert(given, coefficients is not None, _FORMATS[dtype], out)
        return out
    for start in range(0, count, _BLOCK_WORDS):
        part = slice(start, start + _BLOCK_WORDS)
        floats = [widen(words[part], known) for words, known in zip(inputs, formats, strict=True)]
        total = floats[0] if coefficients is None else blend(floats, coefficients)
        out[part] = narrow(total, dtype)
    return out


def widen(words: Words, dtype: Dtype) -> Floats:
    """Exactly the same numbers as f32.

    Infinities and NaNs of f16 and of 8-bit floats count as the numbers that would follow the
    largest one.

    Args:
        words: Bit patterns of `dtype`.
        dtype: One of FLOATS.

    Returns:
        float32, of fresh memory; for F32 a view.
    """
    match dtype:
        case Dtype.F32:
            exact: Floats = words.view("<f4")
            return exact
        case Dtype.BF16:
            wide: Floats = (words.astype("<u4") << np.uint32(16)).view("<f4")
            return wide
        case Dtype.F16:
            return _widen_half(words)
        case _:
            return _small_table(dtype)[words]


def _widen_half(words: Words) -> Floats:
    """By moving exponent and mantissa; numpy's own conversion takes four times as long."""
    magnitude = words & np.uint16(0x7FFF)
    bits: Words = magnitude.astype("<u4")
    np.left_shift(bits, np.uint32(13), out=bits)
    np.add(bits, np.uint32(112 << 23), out=bits)
    is_denormal = magnitude < np.uint16(0x0400)
    if is_denormal.any():
        # Whole numbers times a power of two: exact, and no denormal of f32 comes near.
        tiny = magnitude[is_denormal].astype("<f4") * np.float32(2.0**-24)
        bits[is_denormal] = tiny.view("<u4")
    signs = (words & np.uint16(0x8000)).astype("<u4")
    np.left_shift(signs, np.uint32(16), out=signs)
    np.bitwise_or(bits, signs, out=bits)
    floats: Floats = bits.view("<f4")
    return floats


@cache
def _small_table(dtype: Dtype) -> Floats:
    """Every value of an 8-bit float; its infinities and NaNs count as larger numbers."""
    small = _SMALL[dtype]
    codes = np.arange(256, dtype=np.int64)
    exponents = (codes & 0x7F) >> small.mantissa
    fractions = (codes & ((1 << small.mantissa) - 1)).astype(np.float64)
    leading = np.where(exponents > 0, 1 << small.mantissa, 0)
    values = np.ldexp(leading + fractions, np.maximum(exponents, 1) - small.bias - small.mantissa)
    table: Floats = np.where(codes & 0x80, -values, values).astype("<f4")
    return table


def narrow(floats: Floats, dtype: Dtype) -> Words:
    """Round to the nearest number of `dtype`, ties to even.

    bf16: infinities and NaNs are rounded like numbers. f16 and 8-bit floats: what is too large,
    infinite or NaN becomes the largest finite number, with its sign.

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
            np.right_shift(rounded, np.uint32(16), out=rounded)
            halves: Words = rounded.astype("<u2")
            return halves
        case _:
            return _narrow_small(bits, _SMALL[dtype], word_type(dtype))


def _narrow_small(bits: Words, small: _Small, word: np.dtype[np.unsignedinteger[Any]]) -> Words:
    magnitude = bits & np.uint32(0x7FFFFFFF)
    drop = np.uint32(small.drop)
    code = magnitude >> drop
    np.bitwise_and(code, np.uint32(1), out=code)
    np.add(code, np.uint32((1 << small.drop - 1) - 1), out=code)
    np.add(code, magnitude, out=code)
    np.right_shift(code, drop, out=code)
    # Exponents below the smallest wrap around here; they are denormal and replaced below.
    np.subtract(code, np.uint32((127 - small.bias) << small.mantissa), out=code)
    is_denormal = magnitude < np.uint32((128 - small.bias) << 23)
    if is_denormal.any():
        # Far larger than any denormal of f32, so flushing those to zero changes nothing.
        tiny = magnitude[is_denormal].view("<f4") + small.magic
        code[is_denormal] = tiny.view("<u4") - small.magic.view(np.uint32)
    np.minimum(code, np.uint32(small.largest), out=code)
    np.right_shift(bits, np.uint32(32 - 8 * word.itemsize), out=magnitude)
    np.bitwise_and(magnitude, np.uint32(small.sign), out=magnitude)
    np.bitwise_or(code, magnitude, out=code)
    codes: Words = code.astype(word)
    return codes


def blend(inputs: Sequence[Floats], coefficients: Sequence[float]) -> Floats:
    """The sum of each input times its coefficient, rounded to f32 after every operation.

    Numbers below 2**-63 count as 0, and so does a sum that is infinite or NaN: its bits would be
    the machine's choice.

    Args:
        inputs: float32, all of one size.
        coefficients: One f32 for each.
    """
    total: Floats = np.empty(inputs[0].size, "<f4")
    for index, (floats, coefficient) in enumerate(zip(inputs, coefficients, strict=True)):
        with np.errstate(all="ignore"):
            product = _without_tiny(floats) * np.float32(coefficient)
            np.add(total, product, out=total) if index else np.copyto(total, product)
    bits: Words = total.view("<u4")
    special = (bits & np.uint32(0x7F800000)) == 0x7F800000
    if special.any():
        bits[special] = 0
    return total


def _without_tiny(floats: Floats) -> Floats:
    bits: Words = floats.view("<u4")
    tiny = (bits & np.uint32(0x7F800000)) < np.uint32(_TINY_EXPONENT << 23)
    if not tiny.any():
        return floats
    cleaned = bits.copy()
    cleaned[tiny] = 0
    return cleaned.view("<f4")


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
    codes: Words = np.clip(ratio, -128, 127).astype(np.int8).view(np.uint8)
    return codes
