"""Small symbols, several to a byte: what gets Huffman coding below one bit for a symbol.

A code of 1, 2 or 4 bits stands for a residual near zero; the highest code is an escape, whose
residual is stored elsewhere. Packed, eight, four or two neighbours are one symbol of the entropy
coder: a group of residuals that are 95 % zero then costs 0.3 bits each instead of 1, and takes a
quarter of the time to decode. Pure integer arithmetic.
"""

from __future__ import annotations

from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

__all__ = ["PACKED_BITS", "escape_code", "pack_codes", "packed_size", "unpack_codes", "zero_code"]

PACKED_BITS = (1, 2, 4)

_Wide: TypeAlias = NDArray[np.unsignedinteger[Any]]

# Bits of a code: the word that holds a byte's codes one to a byte, and the (shift, mask) of each
# halving on the way from one byte to such a word.
_STEPS: dict[int, tuple[str, tuple[tuple[int, int], ...]]] = {
    4: ("<u2", ((4, 0x0F0F),)),
    2: ("<u4", ((12, 0x000F000F), (6, 0x03030303))),
    1: ("<u8", ((28, 0x0000000F0000000F), (14, 0x0003000300030003), (7, 0x0101010101010101))),
}


def zero_code(bits: int) -> int:
    """The code of a residual of 0; codes count up from the most negative residual."""
    return (1 << bits - 1) - 1


def escape_code(bits: int) -> int:
    """The code of a residual that no other code stands for."""
    return (1 << bits) - 1


def packed_size(count: int, bits: int) -> int:
    """Bytes that `count` codes take."""
    return -(-count * bits // 8)


def pack_codes(codes: NDArray[np.uint8], bits: int) -> NDArray[np.uint8]:
    """Pack codes, the first of each byte in its low bits; the last byte is filled with zeros.

    Args:
        codes: uint8, each below 2**bits.
        bits: 1, 2 or 4.

    Returns:
        uint8, `packed_size` bytes.
    """
    kind, steps = _STEPS[bits]
    size = packed_size(codes.size, bits)
    padded = np.zeros(size * 8 // bits, np.uint8)
    padded[: codes.size] = codes
    wide: _Wide = padded.view(kind)
    masks = [mask for _, mask in steps[:-1]]
    for (shift, _), mask in zip(reversed(steps), [*reversed(masks), 0xFF], strict=True):
        np.bitwise_or(wide, wide >> wide.dtype.type(shift), out=wide)
        np.bitwise_and(wide, wide.dtype.type(mask), out=wide)
    return wide.astype(np.uint8)


def unpack_codes(packed: NDArray[np.uint8], bits: int, out: NDArray[np.uint8]) -> None:
    """Undo `pack_codes`.

    Args:
        packed: uint8.
        bits: 1, 2 or 4.
        out: uint8, aligned to 8 bytes, exactly 8 / bits for each byte of `packed`.
    """
    kind, steps = _STEPS[bits]
    wide: _Wide = out.view(kind)
    np.copyto(wide, packed)
    for shift, mask in steps:
        np.bitwise_or(wide, wide << wide.dtype.type(shift), out=wide)
        np.bitwise_and(wide, wide.dtype.type(mask), out=wide)
