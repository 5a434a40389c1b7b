"""Cutting a layout into the byte ranges that become fragments.

Tensors are cut every so many elements from their own start, so that siblings, casts to another
dtype, grown vocabularies and re-keyed files line up fragment by fragment.
"""

from __future__ import annotations

from collections.abc import Iterator

from fragfs.formats.layout import Cut, Layout, Span
from fragfs.types import FRAGMENT_BYTES_MAX, Dtype, SpanKind

__all__ = ["BYTES_CUT_SIZE", "WHOLE_FILE_SIZE_MAX", "plan_cuts"]

BYTES_CUT_SIZE = 1 << 20
"""Cut size of everything that has no elements; also the aim for quantized blocks and bundles."""

WHOLE_FILE_SIZE_MAX = 64 << 10
"""Files up to this size are one fragment: more cuts would cost more records than they save."""


def plan_cuts(layout: Layout, fragment_elements: int) -> Iterator[Cut]:
    """Cut a file, lazily and in order; the cuts cover [0, layout.size) exactly once.

    Args:
        layout: The file's spans.
        fragment_elements: Elements of a tensor per fragment: a power of two, at least 4096.
    """
    if 0 < layout.size <= WHOLE_FILE_SIZE_MAX:
        yield Cut(0, layout.size, Dtype.BYTES, SpanKind.OPAQUE, first=True)
        return
    for span in layout.spans:
        step = _step(span, fragment_elements)
        for offset in range(span.offset, span.end, step):
            size = min(step, span.end - offset)
            yield Cut(offset, size, span.dtype, span.kind, first=offset == span.offset)


def _step(span: Span, fragment_elements: int) -> int:
    """Bytes per cut: a whole number of the span's units, the same for every such span."""
    if span.dtype in (Dtype.BYTES, Dtype.QUANT) or span.kind is SpanKind.BUNDLE:
        aim = BYTES_CUT_SIZE
    else:
        aim = min(fragment_elements * span.dtype.bits // 8, FRAGMENT_BYTES_MAX)
    return aim // span.unit * span.unit
