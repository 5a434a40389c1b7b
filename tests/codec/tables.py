"""Tables of float conversions, and digests of them that hold on every machine forever.

Inputs are written with integer arithmetic alone: they are the same where denormals are flushed.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import xxhash

from fragfs.codec.floats import convert, quantize
from fragfs.types import Dtype

SMALL = (Dtype.F16, Dtype.F8_E4M3, Dtype.F8_E5M2)

SPECIAL_F32 = np.array(
    [
        *(0x00000000, 0x00000001, 0x00000002, 0x00000003, 0x00400000, 0x007FFFFF, 0x00800000),
        *(0x00800001, 0x3F7FFFFF, 0x3F800000, 0x3F800001, 0x7F7FFFFF, 0x7F800000, 0x7F800001),
        *(0x7FA00000, 0x7FBFFFFF, 0x7FC00000, 0x7FC00001, 0x7FFF7FFF, 0x7FFF8000, 0x7FFFFFFF),
    ],
    "<u4",
)
"""Zero, denormals, the smallest normal, around one, the largest, infinity, NaNs with payloads."""


def all_words(dtype: Dtype) -> np.ndarray:
    return np.arange(1 << dtype.bits, dtype=np.uint32).astype(f"<u{dtype.bits // 8}")


def exact_f32(dtype: Dtype) -> np.ndarray:
    """Bits of the f32 of every magnitude of a dtype, infinities and NaNs as larger numbers."""
    magnitudes = np.arange(1 << dtype.bits - 1, dtype=np.uint32)
    if dtype is Dtype.BF16:
        return magnitudes << np.uint32(16)
    bias = {Dtype.F16: 15, Dtype.F8_E4M3: 7, Dtype.F8_E5M2: 15}[dtype]
    mantissa = dtype.mantissa_bits
    bits = (magnitudes << np.uint32(23 - mantissa)) + np.uint32(127 - bias << 23)
    for code in range(1, 1 << mantissa):
        # Denormals: the top bit set is the exponent, the rest moves up behind it.
        top = code.bit_length() - 1
        exponent = 127 + 1 - bias - mantissa + top
        bits[code] = exponent << 23 | (code << 23 - top) & 0x7FFFFF
    bits[0] = 0
    return bits


def narrow_inputs(dtype: Dtype) -> np.ndarray:
    """Bits of f32: every number of a dtype, the points half way to the next, all their neighbours,
    special values, and a lattice over all bit patterns; with both signs."""
    exact = exact_f32(dtype).astype(np.int64)
    half_way = exact[:-1] + (exact[1:] - exact[:-1]) // 2
    near = [points + step for points in (exact, half_way) for step in (-1, 0, 1)]
    lattice = (np.arange(1 << 16, dtype=np.int64) * 2654435761 + 12345) & 0x7FFFFFFF
    magnitudes = np.concatenate([*near, SPECIAL_F32.astype(np.int64), lattice])
    bits = np.clip(magnitudes, 0, 0x7FFFFFFF).astype("<u4")
    return np.concatenate([bits, bits | np.uint32(0x80000000)])


def quantize_inputs() -> tuple[np.ndarray, np.ndarray]:
    """Bits of numbers, and of the scales to divide them by."""
    lattice = (np.arange(1 << 14, dtype=np.uint64) * 2654435761 + 99).astype("<u4")
    ties = np.arange(-600, 600).astype("<f4") * np.float32(0.5)
    floats = np.concatenate([lattice, SPECIAL_F32, SPECIAL_F32 | 0x80000000, ties.view("<u4")])
    scales = np.array([2.0**-60, 2.0**-20, 1 / 127, 0.1, 0.5, 1, 3, 1024, 2.0**60], "<f4").view(
        "<u4"
    )
    return np.repeat(floats, scales.size), np.tile(scales, floats.size)


def _quantized() -> np.ndarray:
    floats, scales = quantize_inputs()
    return quantize(floats.view("<f4"), scales.view("<f4"))


def _widened(dtype: Dtype) -> np.ndarray:
    return convert([all_words(dtype)], [dtype], None, Dtype.F32)


def _narrowed(dtype: Dtype) -> np.ndarray:
    return convert([narrow_inputs(dtype)], [Dtype.F32], None, dtype)


TABLES: dict[str, Callable[[], np.ndarray]] = {
    "widen BF16": lambda: _widened(Dtype.BF16),
    "widen F16": lambda: _widened(Dtype.F16),
    "widen F8_E4M3": lambda: _widened(Dtype.F8_E4M3),
    "widen F8_E5M2": lambda: _widened(Dtype.F8_E5M2),
    "narrow BF16": lambda: _narrowed(Dtype.BF16),
    "narrow F16": lambda: _narrowed(Dtype.F16),
    "narrow F8_E4M3": lambda: _narrowed(Dtype.F8_E4M3),
    "narrow F8_E5M2": lambda: _narrowed(Dtype.F8_E5M2),
    "quantize": _quantized,
}
"""Whole tables, by name; the order of a table's inputs is part of its digest."""

DIGESTS: dict[str, str] = {
    "widen BF16": "03b6d46e978b80aeddc2cf862125d2bd",
    "widen F16": "d9ad70935ab2d5fe7a3d7e495082ecd1",
    "widen F8_E4M3": "58afe99b04a29a4037b48fa147b2f54e",
    "widen F8_E5M2": "d382d43f243b2fb39814e9f4765d6fe7",
    "narrow BF16": "f5e5e226d8b7089f475158d628e9e74a",
    "narrow F16": "2783a65b573f5cc947597e6e7744740d",
    "narrow F8_E4M3": "8b979dc361cf506ee0474c3105baee08",
    "narrow F8_E5M2": "a286e271f715c374abce724966c0f506",
    "quantize": "fbe090f7ac8a8c86bd6bcc374aa4d014",
}
"""XXH3-128 of every table. They never change: records that use a conversion are read forever."""


def digest(name: str) -> str:
    return xxhash.xxh3_128_hexdigest(TABLES[name]().tobytes())
