"""Named tensors of a stored file: its own header, read again, laid over its extents."""

from __future__ import annotations

import os
from collections.abc import Callable

from fragfs.formats.detect import parse_layout
from fragfs.formats.layout import TensorLabel
from fragfs.library.extents import ExtentMap, OpenContent
from fragfs.types import FileEntry, FragmentId, FragmentType, LayerMapping, TensorRef

__all__ = ["file_layers"]


def file_layers(
    entry: FileEntry,
    content: OpenContent,
    decode: Callable[[int], memoryview],
    fragment_id: Callable[[int], FragmentId],
) -> list[LayerMapping]:
    """The tensors a file names, in the file's own order.

    Args:
        entry: The file.
        content: What it shows.
        decode: Decodes a fragment by number; called for the header's fragments.
        fragment_id: Id of a fragment by number.
    """
    extents = content.extents

    def read_at(offset: int, size: int) -> bytes:
        return b"".join(
            decode(fragment)[start : start + length]
            for fragment, start, length in _pieces(extents, offset, size)
        )

    name = os.fsdecode(entry.path.rpartition(b"/")[2])
    layout = parse_layout(name, content.size, read_at)
    return [_mapping(label, entry, extents, fragment_id) for label in layout.tensors]


def _pieces(extents: ExtentMap, offset: int, size: int) -> list[tuple[int, int, int]]:
    """(fragment, offset in it, size) of what covers `[offset, offset + size)`."""
    found = []
    index = extents.index_at(offset) if size else 0
    while size:
        extent = extents[index]
        skip = offset - extent.offset
        length = min(extent.size - skip, size)
        found.append((extent.fragment, extent.fragment_offset + skip, length))
        offset += length
        size -= length
        index += 1
    return found


def _mapping(
    label: TensorLabel,
    entry: FileEntry,
    extents: ExtentMap,
    fragment_id: Callable[[int], FragmentId],
) -> LayerMapping:
    refs = tuple(
        TensorRef(fragment_id(fragment), start, length, index)
        for index, (fragment, start, length) in enumerate(
            _pieces(extents, label.offset, label.size)
        )
    )
    return LayerMapping(
        name=label.name,
        file=os.fsdecode(entry.path),
        dtype=label.dtype,
        shape=label.shape,
        offset=label.offset,
        refs=refs,
        fragment_type=FragmentType.from_tensor_name(label.name),
    )
