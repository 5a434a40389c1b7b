"""From typed byte ranges, which may be tied or overlap, to disjoint spans."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from itertools import pairwise
from typing import NamedTuple

from fragfs.formats.layout import Span
from fragfs.types import Dtype, SpanKind

__all__ = ["TypedRange", "tensor_spans"]


class TypedRange(NamedTuple):
    """Bytes [offset, end), not empty, that a file says hold elements of a dtype.

    No cut splits `unit` bytes, counted from `offset`.
    """

    offset: int
    end: int
    dtype: Dtype
    unit: int


_Reading = tuple[Dtype, int, int]
"""Dtype, unit, and where units start modulo the unit."""


def tensor_spans(ranges: Iterable[TypedRange]) -> Iterator[Span]:
    """Cut at the boundaries of all ranges, so that each byte is in one span.

    Tied ranges become one span. A piece that several ranges share keeps a dtype only if they
    agree on it and on where its elements start; else it is plain bytes.
    """
    cluster: list[TypedRange] = []
    cluster_end = 0
    for item in sorted(ranges, key=lambda item: (item.offset, item.end)):
        if cluster and item.offset >= cluster_end:
            yield from _cluster_spans(cluster)
            cluster = []
        cluster.append(item)
        cluster_end = max(cluster_end, item.end)
    if cluster:
        yield from _cluster_spans(cluster)


def _cluster_spans(cluster: list[TypedRange]) -> Iterator[Span]:
    """Spans of ranges that overlap without a break."""
    if len(cluster) == 1:
        item = cluster[0]
        yield _span(item.offset, item.end, [(item.dtype, item.unit, item.offset % item.unit)])
        return
    changes: dict[int, Counter[_Reading]] = {}
    for item in cluster:
        reading = (item.dtype, item.unit, item.offset % item.unit)
        changes.setdefault(item.offset, Counter())[reading] += 1
        changes.setdefault(item.end, Counter())[reading] -= 1
    active: Counter[_Reading] = Counter()
    for start, end in pairwise(sorted(changes)):
        for reading, change in changes[start].items():
            active[reading] += change
            if not active[reading]:
                del active[reading]
        yield _span(start, end, list(active))


def _span(start: int, end: int, readings: list[_Reading]) -> Span:
    if len(readings) == 1:
        dtype, unit, phase = readings[0]
        if start % unit == phase and (end - start) % unit == 0:
            return Span(start, end - start, SpanKind.TENSOR, dtype, unit)
    return Span(start, end - start, SpanKind.TENSOR)
