"""Choosing the parser: content decides, the name is only a hint for messages."""

from __future__ import annotations

from dataclasses import replace

from fragfs.formats.gguf import parse_gguf
from fragfs.formats.layout import Layout, ReadAt, opaque_layout
from fragfs.formats.safetensors import parse_safetensors
from fragfs.formats.zip import parse_zip

__all__ = ["parse_layout"]

_POINTER_START = b"version https://git-lfs.github.com/spec/v1"
_POINTER_SIZE_MAX = 1023
_WEIGHT_SUFFIXES = tuple(".safetensors .bin .pt .pth .ckpt .gguf .onnx .msgpack .h5".split())


def parse_layout(name: str, size: int, read_at: ReadAt) -> Layout:
    """Find the spans and tensors of a file.

    Never raises for odd content: there are fewer labels then.

    Args:
        name: The file's name; used for verdicts and refusals, never to choose a parser.
        size: Bytes of the file.
        read_at: Reads from it; its errors propagate.
    """
    if _is_lfs_pointer(name, size, read_at):
        return opaque_layout(
            size,
            verdict="a git LFS pointer, not the weights",
            refusal="it is a git LFS pointer, not the weights it stands for",
            refusal_remedy="run git lfs pull",
        )
    layout = parse_gguf(size, read_at) or parse_zip(name, size, read_at)
    if layout is not None:
        return _misnamed(layout) if name.endswith(".safetensors") else layout
    return parse_safetensors(name, size, read_at) or opaque_layout(size)


def _misnamed(layout: Layout) -> Layout:
    verdict = f"safe_open rejects it: it is a {layout.format.name.lower()} file"
    return replace(layout, verdict=verdict)


def _is_lfs_pointer(name: str, size: int, read_at: ReadAt) -> bool:
    if not len(_POINTER_START) <= size <= _POINTER_SIZE_MAX:
        return False
    return name.endswith(_WEIGHT_SUFFIXES) and read_at(0, len(_POINTER_START)) == _POINTER_START
