"""Guessing the element type of anonymous bytes from their statistics.

Weights have one telling property: the exponents of neighbouring values are few and close, while
mantissas are noise. Gathered as one float type or another, the bytes therefore cost more or less
per value, and the true type costs least. Nothing but the bytes enters the guess, so that siblings
are guessed alike; a wrong guess only costs size.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from fragfs.formats.layout import ReadAt
from fragfs.types import Dtype

__all__ = ["guess_dtype"]

_SAMPLE_COUNT = 4
_SAMPLE_SIZE = 16 << 10

_CANDIDATES = (Dtype.F16, Dtype.BF16, Dtype.F32)
"""From the reading with the least structure to the one with the most: a later one must win by a
margin, because permuting independent bits costs nothing either way."""

_MARGIN = 0.98
_PLAUSIBLE_SHARE = 0.95
_EXPONENTS_BELOW_ONE, _EXPONENTS_ABOVE_ONE = 96, 32  # optimizer moments go down to about 1e-28


def guess_dtype(offset: int, size: int, read_at: ReadAt) -> Dtype:
    """BF16, F16 or F32 if `[offset, offset + size)` reads best as such, else BYTES.

    Args:
        offset: Where the bytes start.
        size: How many they are; at least 8.
        read_at: Asked for at most 64 KiB of them.
    """
    sample = np.frombuffer(_sample(offset, size, read_at), dtype=np.uint8)
    best, best_cost = Dtype.BYTES, _entropy(sample) / 8
    for dtype in _CANDIDATES:
        if size % (dtype.bits // 8):
            continue
        values = sample.view(f"<u{dtype.bits // 8}").astype(np.uint32)
        cost = _cost(values, dtype)
        if cost < best_cost * _MARGIN and _is_plausible(values, dtype):
            best, best_cost = dtype, cost
    return best


def _sample(offset: int, size: int, read_at: ReadAt) -> bytes:
    """Evenly spaced pieces, aligned to 8 bytes from the start; a whole number of 8 bytes."""
    if size <= _SAMPLE_COUNT * _SAMPLE_SIZE:
        return read_at(offset, size // 8 * 8)
    stride = (size - _SAMPLE_SIZE) // (_SAMPLE_COUNT - 1) // 8 * 8
    return b"".join(
        read_at(offset + index * stride, _SAMPLE_SIZE) for index in range(_SAMPLE_COUNT)
    )


def _cost(values: NDArray[np.uint32], dtype: Dtype) -> float:
    """Order-0 cost of the values, as a share of their size, with the exponent as one symbol."""
    mantissa_bits = dtype.mantissa_bits
    bits = _entropy(_exponents(values, dtype))
    sign = values >> (dtype.bits - 1)
    rest = (sign << mantissa_bits) | (values & ((1 << mantissa_bits) - 1))
    for shift in range(0, mantissa_bits + 1, 8):
        bits += _entropy((rest >> shift) & 0xFF)
    return bits / dtype.bits


def _exponents(values: NDArray[np.uint32], dtype: Dtype) -> NDArray[np.integer[Any]]:
    return (values >> dtype.mantissa_bits) & ((1 << dtype.exponent_bits) - 1)


def _is_plausible(values: NDArray[np.uint32], dtype: Dtype) -> bool:
    """Whether nearly all values are zero or of a magnitude that weights have."""
    bias = (1 << (dtype.exponent_bits - 1)) - 1
    exponents = _exponents(values, dtype).astype(np.int32) - bias
    in_range = (exponents >= -_EXPONENTS_BELOW_ONE) & (exponents <= _EXPONENTS_ABOVE_ONE)
    zero = (values & ((1 << (dtype.bits - 1)) - 1)) == 0
    return bool(np.mean(in_range | zero) >= _PLAUSIBLE_SHARE)


def _entropy(symbols: NDArray[np.integer[Any]]) -> float:
    """Bits per symbol of symbols below 256 under an order-0 model."""
    counts = np.bincount(symbols, minlength=256)
    shares = counts[counts > 0] / symbols.size
    return float(-(shares * np.log2(shares)).sum())
