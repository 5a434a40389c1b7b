"""From typed byte ranges, which may be tied or overlap, to disjoint spans."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from fragfs.formats.layout import Span
from fragfs.types import Dtype, SpanKind

__all__ = ["TypedRange", "tensor_spans"]


@dataclass(frozen=True, slots=True, order=True)
class TypedRange:
    """Bytes [offset, end) that a file says hold elements of a dtype; not empty."""

    offset: int
    end: int
    code: int
    unit: int


def tensor_spans(ranges: Iterable[TypedRange]) -> Iterator[Span]:
    """Cut at the boundaries of all ranges, so that each byte is in one span.

    Tied ranges become one span. A piece that several ranges share keeps a dtype only if they
    agree on it and on where its elements start; else it is plain bytes.
    """
    cluster: list[TypedRange] = []
    cluster_end = 0
    for item in sorted(set(ranges)):
        if cluster and item.offset >= cluster_end:
            yield from _cluster_spans(cluster)
            cluster = []
        cluster.append(item)
        cluster_end = max(cluster_end, item.end)
    if cluster:
        yield from _cluster_spans(cluster)


def _cluster_spans(cluster: list[TypedRange]) -> Iterator[Span]:
    if len(cluster) == 1:
        item = cluster[0]
        yield _span(item.offset, item.end, item.code, item.unit)
        return
    changes: dict[int, Counter[tuple[int, int, int]]] = {}
    for item in cluster:
        reading = (item.code, item.unit, item.offset % item.unit)
        changes.setdefault(item.offset, Counter())[reading] += 1
        changes.setdefault(item.end, Counter())[reading] -= 1
    active: Counter[tuple[int, int, int]] = Counter()
    boundaries = sorted(changes)
    for start, end in zip(boundaries, boundaries[1:], strict=False):
        for reading, change in changes[start].items():
            active[reading] += change
            if not active[reading]:
                del active[reading]
        yield _shared_span(start, end, list(active))


def _shared_span(start: int, end: int, readings: list[tuple[int, int, int]]) -> Span:
    if len(readings) == 1:
        code, unit, phase = readings[0]
        if start % unit == phase and (end - start) % unit == 0:
            return _span(start, end, code, unit)
    return Span(start, end - start, SpanKind.TENSOR)


def _span(start: int, end: int, code: int, unit: int) -> Span:
    dtype = Dtype.of_code(code)
    if dtype is None or (end - start) % unit:
        return Span(start, end - start, SpanKind.TENSOR)
    return Span(start, end - start, SpanKind.TENSOR, dtype, unit)
