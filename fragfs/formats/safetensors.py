"""safetensors: 8 bytes of header length, a JSON header, then tensors.

Source: safetensors 0.8.0, src/tensor.rs. A verdict says "safe_open rejects it" exactly if that
version does.
"""

from __future__ import annotations

from fragfs.formats.bundle import bundle_small
from fragfs.formats.layout import (
    FileFormat,
    Layout,
    ReadAt,
    Span,
    TensorLabel,
    cover,
    opaque_layout,
)
from fragfs.formats.ranges import TypedRange, tensor_spans
from fragfs.formats.refusals import TRUNCATED_REMEDY, promise_broken
from fragfs.formats.safetensors_header import (
    Entry,
    Header,
    HeaderError,
    parse_header,
    shown,
)
from fragfs.types import SpanKind

__all__ = ["HEADER_SIZE_MAX", "parse_safetensors"]

HEADER_SIZE_MAX = 100_000_000
"""Limit of the format: longer headers are rejected by every reader and not parsed here."""

_LENGTH_SIZE = 8
_WINDOW_SIZE = 1024
_WHITESPACE = b" \t\n\r"


def parse_safetensors(name: str, size: int, read_at: ReadAt) -> Layout | None:
    """Lay out a safetensors file.

    Args:
        name: File name: one that ends in .safetensors gets a verdict if it is not structured.
        size: Bytes of the file.
        read_at: Reads from it.

    Returns:
        None if the file is not safetensors by content nor by name.
    """
    named = name.endswith(".safetensors")
    try:
        header_size = _header_size(size, read_at)
        header = parse_header(read_at(_LENGTH_SIZE, header_size))
    except _TruncatedHeaderError as error:
        return _cut_short(size, str(error)) if named else None
    except HeaderError as error:
        return opaque_layout(size, verdict=f"safe_open rejects it: {error}") if named else None
    return _layout(header, _LENGTH_SIZE + header_size, size)


class _TruncatedHeaderError(HeaderError):
    """The file ends inside its own header."""


def _header_size(size: int, read_at: ReadAt) -> int:
    """Length of the JSON, once a first look says that it may be JSON.

    Raises:
        HeaderError: No reader would accept such a header.
    """
    if size < _LENGTH_SIZE:
        raise HeaderError("it is shorter than 8 bytes")
    window = read_at(0, min(size, _WINDOW_SIZE))
    header_size = int.from_bytes(window[:_LENGTH_SIZE], "little")
    if header_size > HEADER_SIZE_MAX:
        raise HeaderError(f"its header would be longer than {HEADER_SIZE_MAX} bytes")
    start = window[_LENGTH_SIZE : _LENGTH_SIZE + header_size].lstrip(_WHITESPACE)
    if header_size + _LENGTH_SIZE > size:
        if start.startswith(b"{"):
            raise _TruncatedHeaderError(promise_broken(_LENGTH_SIZE + header_size, size))
        raise HeaderError("its header would be longer than the file")
    if start and not start.startswith(b"{"):
        raise HeaderError("its header is not a JSON object")
    return header_size


def _cut_short(size: int, promise: str) -> Layout:
    return opaque_layout(
        size,
        verdict=f"safe_open rejects it: {promise}",
        refusal=promise,
        refusal_remedy=TRUNCATED_REMEDY,
    )


def _layout(header: Header, data_start: int, size: int) -> Layout:
    data_size = size - data_start
    # What a later entry of the same name overrides promises nothing: no reader looks there.
    read = {entry.name: entry for entry in header.entries}.values()
    promised = max((entry.end for entry in read if not entry.problem), default=0)
    refusal = promise_broken(data_start + promised, size) if promised > data_size else None
    problem = header.problem or refusal or _rejection(header.entries, data_size)
    if problem:
        verdict = f"safe_open rejects it: {problem}"
    elif header.duplicate is not None:
        verdict = f"tensor {shown(header.duplicate)} occurs twice; readers use the last one"
    else:
        verdict = ""
    return Layout(
        format=FileFormat.SAFETENSORS,
        size=size,
        spans=tuple(_spans(header.entries, data_start, size)),
        tensors=tuple(_labels(header.entries, data_start, data_size)),
        verdict=verdict,
        refusal=refusal,
        refusal_remedy=TRUNCATED_REMEDY if refusal else None,
    )


def _rejection(entries: list[Entry], data_size: int) -> str:
    """Why safe_open rejects a header of good syntax: the last entry of each name counts."""
    last = {entry.name: entry for entry in entries}
    position = 0
    for entry in sorted(last.values(), key=lambda entry: (entry.begin, entry.end)):
        if entry.begin > position:
            return f"a gap of {entry.begin - position} bytes before tensor {shown(entry.name)}"
        if entry.begin < position:
            return f"tensor {shown(entry.name)} shares bytes with another"
        if entry.problem:
            return f"tensor {shown(entry.name)} {entry.problem}"
        position = entry.end
    if position < data_size:
        return f"{data_size - position} trailing bytes after the last tensor"
    return ""


def _labels(entries: list[Entry], data_start: int, data_size: int) -> list[TensorLabel]:
    return [
        TensorLabel(
            entry.name,
            entry.dtype_name,
            entry.shape,
            data_start + entry.begin,
            entry.end - entry.begin,
        )
        for entry in entries
        if entry.shape is not None and entry.dtype_name and entry.begin <= entry.end <= data_size
    ]


def _spans(entries: list[Entry], data_start: int, size: int) -> list[Span]:
    ranges = []
    for entry in entries:
        if entry.problem and entry.end > size - data_start:
            continue
        begin, end, unit = data_start + entry.begin, data_start + entry.end, entry.unit
        if end > size:
            end = begin + (size - begin) // unit * unit
        if begin < end:
            ranges.append(TypedRange(begin, end, entry.dtype, unit))
    spans = cover(list(tensor_spans(ranges)), data_start, size, SpanKind.GAP, SpanKind.TAIL)
    return [Span(0, data_start, SpanKind.HEADER), *bundle_small(spans)]
