"""zipnn, where it is installed, as a codec of one tensor on one core."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass

__all__ = ["DTYPES", "ZipnnCodec", "open_zipnn"]

DTYPES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}
"""safetensors dtypes that zipnn knows, and what it calls them."""


@dataclass(frozen=True)
class ZipnnCodec:
    """zipnn for tensors of one dtype.

    Attributes:
        encode: Raw bytes to compressed ones.
        decode: And back.
    """

    encode: Callable[[bytes], bytes]
    decode: Callable[[bytes], bytes | bytearray]


def open_zipnn(dtype: str) -> ZipnnCodec | None:
    """The codec for a dtype of `DTYPES`; None if zipnn is not installed."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # it imports torch.jit, which is deprecated
            from zipnn import ZipNN  # type: ignore[import-untyped]  # it has no annotations
    except ImportError:
        return None
    codec = ZipNN(input_format="byte", bytearray_dtype=DTYPES[dtype], threads=1)
    return ZipnnCodec(codec.compress, codec.decompress)
