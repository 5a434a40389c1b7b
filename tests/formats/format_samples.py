"""Builders of model files, the odd ones included, and the rules that every layout keeps."""

from __future__ import annotations

import io
import json
import struct
import zipfile

from fragfs.formats.cut import WHOLE_FILE_SIZE_MAX, plan_cuts
from fragfs.formats.detect import parse_layout
from fragfs.formats.layout import Cut, Layout
from fragfs.types import FRAGMENT_BYTES_MAX

ELEMENTS = 1 << 12


class Source:
    """A file in memory that refuses reads outside itself and counts the rest."""

    def __init__(self, data: bytes, size: int | None = None) -> None:
        self.data = data
        self.size = len(data) if size is None else size
        self.read_bytes = 0
        self.read_count = 0

    def read_at(self, offset: int, size: int) -> bytes:
        assert 0 <= offset <= offset + size <= self.size
        self.read_bytes += size
        self.read_count += 1
        return self.data[offset : offset + size].ljust(size, b"\0")


def layout_of(data: bytes, name: str = "model.safetensors", size: int | None = None) -> Layout:
    """Parse bytes (followed by zeros up to `size`) and check what holds for every file."""
    source = Source(data, size)
    layout = parse_layout(name, source.size, source.read_at)
    check_layout(layout, source.size)
    return layout


def check_layout(layout: Layout, size: int) -> None:
    assert layout.size == size
    position = 0
    for span in layout.spans:
        assert span.offset == position
        assert span.size > 0
        assert span.size % span.unit == 0
        position = span.end
    assert position == size
    for label in layout.tensors:
        assert label.size >= 0
        assert 0 <= label.offset <= label.offset + label.size <= size
    assert (layout.refusal is None) == (layout.refusal_remedy is None)
    for fragment_elements in (1 << 12, 1 << 21):
        check_cuts(layout, fragment_elements)


def check_cuts(layout: Layout, fragment_elements: int) -> None:
    spans = {span.offset: span for span in layout.spans}
    position, span = 0, None
    for cut in plan_cuts(layout, fragment_elements):
        assert cut.offset == position
        assert 0 < cut.size <= FRAGMENT_BYTES_MAX
        position += cut.size
        if layout.size <= WHOLE_FILE_SIZE_MAX:
            assert cut.size == layout.size
            continue
        span = spans.get(cut.offset, span)
        assert span is not None
        assert cut.first == (cut.offset == span.offset)
        assert (cut.kind, cut.dtype) == (span.kind, span.dtype)
        assert (cut.offset - span.offset) % span.unit == 0
        assert cut.size % span.unit == 0
    assert position == layout.size


def cuts_of(layout: Layout, fragment_elements: int = ELEMENTS) -> list[Cut]:
    return list(plan_cuts(layout, fragment_elements))


# --- safetensors


def entry(dtype: object, shape: object, *offsets: object) -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": list(offsets)}


def safetensors_bytes(header: object, data: bytes = b"", header_size: int | None = None) -> bytes:
    """A file from a header (raw bytes, or anything json can write) and its data."""
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(raw) if header_size is None else header_size) + raw + data


def pairs_json(*pairs: tuple[str, object]) -> bytes:
    """A JSON object that may have a key twice."""
    return b"{%s}" % b",".join(
        json.dumps(key).encode() + b":" + json.dumps(value).encode() for key, value in pairs
    )


# --- gguf

GGUF_ARRAY, GGUF_STRING, GGUF_UINT32 = 9, 8, 4


def gguf_string(text: str | bytes) -> bytes:
    raw = text.encode() if isinstance(text, str) else text
    return struct.pack("<Q", len(raw)) + raw


def gguf_pair(key: str, value_type: int, value: bytes) -> bytes:
    return gguf_string(key) + struct.pack("<I", value_type) + value


def gguf_tensor(name: str, shape: tuple[int, ...], type_number: int, offset: int) -> bytes:
    return (
        gguf_string(name)
        + struct.pack(f"<I{len(shape)}Q", len(shape), *shape)
        + struct.pack("<IQ", type_number, offset)
    )


def gguf_bytes(
    pairs: list[bytes],
    tensors: list[bytes],
    data: bytes = b"",
    *,
    alignment: int = 32,
    version: int = 3,
    order: str = "<",
) -> bytes:
    """A gguf file; `alignment` only pads, a pair must announce it if it is not 32."""
    head = b"GGUF" + struct.pack(f"{order}IQQ", version, len(tensors), len(pairs))
    head += b"".join(pairs) + b"".join(tensors)
    return head + bytes(-len(head) % alignment) + data


# --- zip


def zip_bytes(members: dict[str, bytes], compression: int = zipfile.ZIP_STORED) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", compression) as archive:
        for name, data in members.items():
            archive.writestr(zipfile.ZipInfo(name), data, compression)
    return buffer.getvalue()
