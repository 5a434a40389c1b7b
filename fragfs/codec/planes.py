"""Byte planes: cut elements into the bytes that behave alike, and put them together again.

A `Layout` says how an unsigned word of 1, 2, 4 or 8 bytes falls apart into as many planes, most
significant first. Floats whose exponent does not sit on a byte edge have their two top bytes
rearranged, so that the eight low exponent bits make one plane and what surrounds them the next.
Everything is integer arithmetic on bit patterns, little-endian on every host.

Source: library/FORMAT.md, "Planes".
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fragfs.types import Dtype

__all__ = ["BLOCK_BYTES", "Bytes", "Layout", "Scratch", "Value", "Words"]

BLOCK_BYTES = 1 << 18
"""Raw bytes that one block of all planes together makes: what a decoder works on at a time.

Small enough that planes, scratch and result stay in a core's own cache (1 MiB here).
"""

Bytes = NDArray[np.uint8]
Words = NDArray[Any]  # unsigned, 1 to 8 bytes, little-endian
Value = Words | int
"""One block of one plane or of several joined ones; an int if every word of it is the same."""


class Scratch:
    """Reused memory for one thread that joins planes: fresh pages cost more than the work."""

    __slots__ = ("_buffers",)

    def __init__(self) -> None:
        self._buffers = {width: np.empty(BLOCK_BYTES, np.uint8) for width in (0, 1, 2, 4)}

    def plane(self, index: int, count: int, word_size: int) -> Bytes:
        """Room for `count` bytes of plane `index`; distinct for every plane of a layout."""
        start = index * (BLOCK_BYTES // word_size)
        return self._buffers[1][start : start + count]

    def words(self, index: int, count: int, width: int, word_size: int) -> Words:
        """Room for `count` joined words of `width` bytes, a part of words of `word_size`."""
        start = index * (BLOCK_BYTES // word_size) * width
        return self._buffers[width][start : start + count * width].view(f"<u{width}")

    def spare(self, count: int) -> Words:
        """Room for `count` words of 2 bytes, valid until the next call."""
        return self._buffers[0][: 2 * count].view("<u2")


@dataclass(frozen=True, slots=True)
class Layout:
    """How a word is cut into byte planes.

    Attributes:
        word_size: Bytes per word, which is also the number of planes: 1, 2, 4 or 8.
        lead_bits: 0, or how many bits stand above the eight that are gathered. With the top
            sixteen bits of a word made of `a` (lead_bits), `e` (8) and `b` (8 - lead_bits), the
            first plane then holds `e` and the second `a` followed by `b`.
    """

    word_size: int
    lead_bits: int

    @property
    def code(self) -> int:
        """Number of this layout in the parameters of an encoding."""
        return self.lead_bits << 4 | self.word_size.bit_length() - 1

    @classmethod
    def of_code(cls, code: int) -> Layout | None:
        """The layout with this number, or None if no such number is known."""
        return _LAYOUTS.get(code)

    @classmethod
    def of_dtype(cls, dtype: Dtype) -> Layout:
        """The layout that suits elements of `dtype`; complex numbers are pairs of floats."""
        bits = dtype.bits // 2 if dtype in (Dtype.C64, Dtype.C128) else dtype.bits
        word_size = max(1, bits // 8)
        if word_size == 1:
            return cls(1, 0)
        # A five-bit exponent shares its byte with sign and two mantissa bits: gathering it saves
        # 0.05 % on real weights and costs decoding time.
        return cls(word_size, {8: 1, 11: 4}.get(dtype.exponent_bits, 0))

    def split(self, raw: Bytes) -> list[Bytes]:
        """Cut whole words into planes.

        Args:
            raw: Words back to back; raw.size is a multiple of `word_size`.

        Returns:
            `word_size` contiguous arrays of raw.size // word_size bytes, most significant first.
            Copies, but for words of one byte, whose plane is `raw` itself.
        """
        size = self.word_size
        if size == 1:
            return [raw]
        pairs = raw.view("<u2").reshape(-1, size // 2)
        planes: list[Bytes] = []
        for column in range(size // 2 - 1, -1, -1):
            pair = np.ascontiguousarray(pairs[:, column])
            if self.lead_bits and not planes:
                planes.append((pair >> (8 - self.lead_bits)).astype(np.uint8))
                around = pair & _spread_mask(self.lead_bits)
                planes.append((around | around >> 8).astype(np.uint8))
            else:
                planes.append((pair >> 8).astype(np.uint8))
                planes.append(pair.astype(np.uint8))
        return planes

    def join(self, values: list[Value], pairs: list[Value | None], out: Words, scratch: Scratch) -> None:
        """Put one block of planes together: the inverse of `split`.

        Args:
            values: One per plane, most significant first; out.size bytes, or an int.
            pairs: One per two planes; where not None, their words of two bytes, used instead.
            out: Receives the words; at most BLOCK_BYTES bytes, little-endian.
            scratch: Memory to work in; `values` may lie in its planes.
        """
        size, count = self.word_size, out.size
        width = 1
        while width < size:
            width *= 2
            joined: list[Value] = []
            for index in range(size // width):
                into = out if width == size else scratch.words(index, count, width, size)
                high, low = values[2 * index], values[2 * index + 1]
                pair = pairs[index] if width == 2 else None
                if pair is not None:
                    joined.append(pair)
                elif width == 2 and index == 0 and self.lead_bits:
                    joined.append(_join_gathered(high, low, self.lead_bits, into, scratch))
                else:
                    joined.append(_join(high, low, into))
            values = joined
        if values[0] is not out:
            out[...] = values[0]


_LAYOUTS = {
    layout.code: layout
    for layout in (
        Layout(1, 0),
        Layout(2, 0),
        Layout(2, 1),
        Layout(4, 0),
        Layout(4, 1),
        Layout(8, 0),
        Layout(8, 4),
    )
}


def _spread_mask(lead_bits: int) -> int:
    """Which of a word's sixteen top bits surround the gathered eight."""
    return (0xFF00 << (8 - lead_bits)) & 0xFF00 | (1 << (8 - lead_bits)) - 1


def _join(high: Value, low: Value, out: Words) -> Value:
    """Make words of two halves; gives `out`, or an int if both halves are constant."""
    bits = out.itemsize * 4
    if isinstance(high, int):
        if isinstance(low, int):
            return high << bits | low
        np.copyto(out, low)
        if high:
            np.bitwise_or(out, high << bits, out=out)
        return out
    np.copyto(out, high)
    if bits == 8:
        np.multiply(out, 256, out=out)  # 1.6 times as fast as a shift of 16-bit words
    else:
        np.left_shift(out, bits, out=out)
    if not isinstance(low, int) or low:
        np.bitwise_or(out, low, out=out)
    return out


def _join_gathered(
    gathered: Value, rest: Value, lead_bits: int, out: Words, scratch: Scratch
) -> Value:
    """Make words of two bytes of the gathered bits and those around them."""
    scale = 1 << (8 - lead_bits)
    mask = _spread_mask(lead_bits)
    if isinstance(rest, int):
        around = rest * 0x101 & mask
        if isinstance(gathered, int):
            return gathered * scale | around
        np.copyto(out, gathered)
        np.multiply(out, scale, out=out)
        np.bitwise_or(out, around, out=out)
        return out
    if lead_bits == 1:  # widening with the sign puts the lead bit in place: one pass less
        np.copyto(out.view("<i2"), rest.view(np.int8))
    else:
        np.copyto(out, rest)
        np.multiply(out, 0x101, out=out)
    np.bitwise_and(out, mask, out=out)
    if isinstance(gathered, int):
        np.bitwise_or(out, gathered * scale, out=out)
        return out
    spare = scratch.spare(out.size)
    np.copyto(spare, gathered)
    np.multiply(spare, scale, out=spare)
    np.bitwise_or(out, spare, out=out)
    return out
