"""What a parser finds in a file: byte ranges with an element type, and named tensors.

A layout only chooses cut points and labels. Whatever a parser misreads, the spans still cover the
file exactly once, so that a file is stored byte for byte however odd it is.
"""

from __future__ import annotations

import enum
from collections.abc import Callable
from dataclasses import dataclass

from fragfs.types import Dtype, SpanKind

__all__ = [
    "Cut",
    "FileFormat",
    "Layout",
    "ReadAt",
    "Span",
    "TensorLabel",
    "cover",
    "element_unit",
    "opaque_layout",
]

ReadAt = Callable[[int, int], bytes]
"""(offset, size) -> exactly `size` bytes of the file. Parsers ask only inside [0, file size)."""


class FileFormat(enum.IntEnum):
    """Which parser understood the file."""

    OPAQUE = 0
    SAFETENSORS = 1
    GGUF = 2
    ZIP = 3


@dataclass(frozen=True, slots=True)
class TensorLabel:
    """A tensor as the file names it; several labels may share bytes.

    Attributes:
        name: Its name; any string, lone surrogates included.
        dtype: Its dtype as the file spells it, for example "BF16" or "Q4_K".
        shape: Elements per dimension, in the file's order; () for a scalar.
        offset: Where its bytes start in the file.
        size: Its bytes; 0 for a tensor without elements. The range lies inside the file.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: int
    size: int


@dataclass(frozen=True, slots=True)
class Span:
    """A byte range of a file with one element type.

    Attributes:
        offset: Where it starts in the file.
        size: Its length; at least 1 and a multiple of `unit`.
        kind: What it is.
        dtype: How its bytes read as elements.
        unit: Bytes that no cut splits: an element, the smallest whole number of bytes of packed
            elements, or a block of quantized weights.
    """

    offset: int
    size: int
    kind: SpanKind
    dtype: Dtype = Dtype.BYTES
    unit: int = 1

    @property
    def end(self) -> int:
        """First byte after the span."""
        return self.offset + self.size


@dataclass(frozen=True, slots=True)
class Layout:
    """How a file is to be cut, and what is worth telling about it.

    Attributes:
        format: Which parser understood it.
        size: Bytes of the file.
        spans: Ranges that cover [0, size) exactly once, in order, none empty.
        tensors: Named tensors in the file's own order; duplicate names, tied, overlapping and
            zero-size ones included.
        verdict: "" if nothing is remarkable, else why, in a few words.
        refusal: Why the file should not be added unless the user insists; None for most files.
        refusal_remedy: What the user can do about the refusal; None exactly if that is.
    """

    format: FileFormat
    size: int
    spans: tuple[Span, ...]
    tensors: tuple[TensorLabel, ...] = ()
    verdict: str = ""
    refusal: str | None = None
    refusal_remedy: str | None = None


@dataclass(frozen=True, slots=True)
class Cut:
    """A byte range of a file that becomes one fragment.

    Attributes:
        offset: Where it starts in the file.
        size: Its length; from 1 to FRAGMENT_BYTES_MAX.
        dtype: How its bytes read as elements.
        kind: What the span it belongs to is.
        first: True for the first cut of its span.
    """

    offset: int
    size: int
    dtype: Dtype
    kind: SpanKind
    first: bool


_PACKED_UNITS = {4: 1, 6: 3}  # two 4-bit elements fill a byte, four 6-bit elements fill three


def element_unit(dtype: Dtype) -> int:
    """Smallest whole number of bytes that holds whole elements of `dtype`."""
    return _PACKED_UNITS.get(dtype.bits) or dtype.bits // 8


def opaque_layout(
    size: int,
    *,
    verdict: str = "",
    refusal: str | None = None,
    refusal_remedy: str | None = None,
) -> Layout:
    """The layout of a file that no parser understands: one span of plain bytes."""
    spans = (Span(0, size, SpanKind.OPAQUE),) if size else ()
    return Layout(FileFormat.OPAQUE, size, spans, (), verdict, refusal, refusal_remedy)


def cover(spans: list[Span], start: int, end: int, gap: SpanKind, tail: SpanKind) -> list[Span]:
    """Fill what `spans` leave free of [start, end) with plain bytes.

    Args:
        spans: Ordered, disjoint, inside [start, end).
        start: First byte to cover.
        end: First byte not to cover.
        gap: Kind of the ranges before the last span.
        tail: Kind of the range after it, or of the whole range if there are no spans.
    """
    covered: list[Span] = []
    position = start
    for span in spans:
        if span.offset > position:
            covered.append(Span(position, span.offset - position, gap))
        covered.append(span)
        position = span.end
    if position < end:
        covered.append(Span(position, end - position, tail))
    return covered
