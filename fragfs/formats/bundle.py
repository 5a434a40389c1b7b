"""Joining tiny tensors, so that thousands of norms, biases and scalars cost few fragments."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import groupby

from fragfs.formats.layout import Span
from fragfs.types import SpanKind

__all__ = ["SMALL_TENSOR_SIZE", "TYPED_PART_SIZE", "bundle_small"]

SMALL_TENSOR_SIZE = 4 << 10
"""Tensors below this size are bundled with their neighbours."""


TYPED_PART_SIZE = 64 << 10
"""Where the dtype changes inside a run, a stretch of one dtype keeps it from this size on. Shorter
ones are joined as plain bytes: batch norms that alternate with counters must not cost a fragment
each, and their few bytes gain nothing from planes."""


def bundle_small(spans: list[Span]) -> list[Span]:
    """Replace maximal runs of adjacent small tensors by bundles.

    Small gaps between two members belong to the run (alignment padding would otherwise cost as
    many fragments as the tensors saved); gaps at its ends do not, so that a run reads the same
    whatever surrounds it.

    Args:
        spans: Ordered spans without holes between them.
    """
    bundled: list[Span] = []
    for small, group in groupby(spans, _is_small):
        run = list(group)
        bundled.extend(_bundle_run(run) if small else run)
    return bundled


def _is_small(span: Span) -> bool:
    return span.size < SMALL_TENSOR_SIZE and span.kind in (SpanKind.TENSOR, SpanKind.GAP)


def _bundle_run(run: list[Span]) -> list[Span]:
    tensors = [index for index, span in enumerate(run) if span.kind is SpanKind.TENSOR]
    if not tensors:
        return run
    first, last = tensors[0], tensors[-1] + 1
    return [*run[:first], *_join_short(list(_uniform_parts(run[first:last]))), *run[last:]]


def _join_short(parts: list[Span]) -> Iterator[Span]:
    for short, group in groupby(parts, lambda part: part.size < TYPED_PART_SIZE):
        members = list(group)
        if short and len(members) > 1:
            offset = members[0].offset
            yield Span(offset, members[-1].end - offset, SpanKind.BUNDLE)
        else:
            yield from members


def _uniform_parts(run: list[Span]) -> Iterator[Span]:
    """Split a run where its dtype changes; padding of whole elements takes the dtype before it."""
    start = run[0]
    end = start.end
    for span in run[1:]:
        padding = span.kind is SpanKind.GAP and span.size % start.unit == 0
        if not padding and (span.dtype, span.unit) != (start.dtype, start.unit):
            yield Span(start.offset, end - start.offset, SpanKind.BUNDLE, start.dtype, start.unit)
            start = span
        end = span.end
    yield Span(start.offset, end - start.offset, SpanKind.BUNDLE, start.dtype, start.unit)
