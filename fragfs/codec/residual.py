"""What a prediction got wrong: residual words, grouped, and each group stored the smallest way.

A residual is `word - prediction` modulo the width of the word. A group of residuals (see `groups`)
is stored in one of three ways: as nothing if all are zero; as packed codes of 1, 2 or 4 bits if
nearly all are close to zero (see `packing`); else as byte planes. In planes a bias of 0x80 in every
byte makes small residuals of both signs differ in one plane only, where sign extension would fill
all. Format: library/FORMAT.md, "Residuals".
"""

from __future__ import annotations

import struct

import numpy as np
from numpy.typing import NDArray

from fragfs.codec.entropy import Bytes, store_plane
from fragfs.codec.forms import PLANES, choose_forms
from fragfs.codec.groups import Groups, Words, plan_groups, split_groups
from fragfs.codec.kernels import find_kernels
from fragfs.codec.packing import escape_code, pack_codes, packed_size, zero_code
from fragfs.types import Dtype

__all__ = ["encode_residual", "estimate_residual", "store_streams"]

_GROUP = struct.Struct("<BIB")  # last key, words, bits of a code (0: all zero, 8: planes)
_STREAM = struct.Struct("<BI")  # method, stored size
_COUNT = struct.Struct("<I")

_kernels = find_kernels()


def _bias(unit: int) -> int:
    return int("80" * unit, 16)


def store_streams(
    words: Words, level: int, params: list[bytes], payload: list[Bytes], bias: int = 0
) -> None:
    """Append the planes of some words, lowest byte first: descriptors to `params`.

    Args:
        words: The words, contiguous.
        level: zstd level for planes in which matches pay.
        params: Gets a descriptor of each plane.
        payload: Gets what is stored of each plane.
        bias: Added to each word, modulo its width.
    """
    planes = np.empty((words.itemsize, words.size), np.uint8)
    if _kernels is not None:
        _kernels.planes(words.itemsize, words, bias, planes)
    else:
        biased = words + words.dtype.type(bias)
        np.copyto(planes, biased.view(np.uint8).reshape(-1, words.itemsize).T)
    for plane in planes:
        _store(plane, level, params, payload)


def _store(plane: NDArray[np.uint8], level: int, params: list[bytes], payload: list[Bytes]) -> None:
    method, stored = store_plane(plane, level)
    params.append(_STREAM.pack(method, len(stored)))
    payload.append(stored)


def encode_residual(
    words: Words,
    prediction: Words,
    dtype: Dtype,
    *,
    grouped: bool,
    level: int,
    fine: bool = False,
) -> tuple[bytes, list[Bytes]]:
    """Store what `prediction` got wrong about `words`.

    Args:
        words: What is to be stored; at least one.
        prediction: As many words of the same type, native byte order on little-endian machines.
        dtype: How they read.
        grouped: Group them by the exponent of the prediction, if there are enough of them.
        level: zstd level for planes in which matches pay.
        fine: Make groups finer, for space.

    Returns:
        Parameters and payload; parameters are one zero byte if the prediction is right throughout.
    """
    groups = Groups((255,), (words.size,))
    if grouped:
        groups = plan_groups(prediction, dtype, fine=fine)
    residual = split_groups(words, prediction, groups, dtype)
    forms = choose_forms(residual, groups.sizes).forms
    if not any(forms):
        return b"\0", []
    params = [bytes([len(groups.sizes)])]
    payload: list[Bytes] = []
    escapes: list[Words] = []
    start = 0
    for last_key, size, bits in zip(groups.last_keys, groups.sizes, forms, strict=True):
        values = residual[start : start + size]
        start += size
        params.append(_GROUP.pack(last_key, size, bits))
        if bits == PLANES:
            store_streams(values, level, params, payload, _bias(values.itemsize))
        elif bits:
            packed, outside = _pack(values, bits)
            params.append(_COUNT.pack(outside.size))
            escapes.append(outside)
            _store(packed, level, params, payload)
    outside = np.concatenate(escapes) if escapes else residual[:0]
    if outside.size:
        store_streams(outside, level, params, payload, _bias(outside.itemsize))
    return b"".join(params), payload


def _pack(values: Words, bits: int) -> tuple[NDArray[np.uint8], Words]:
    """Packed codes of some residuals, and the residuals that got the escape."""
    if _kernels is not None:
        packed = np.empty(packed_size(values.size, bits), np.uint8)
        outside = np.empty_like(values)
        count = _kernels.pack(values.itemsize, values, bits, packed, outside)
        return packed, outside[:count]
    shifted = values + values.dtype.type(zero_code(bits))
    escape = values.dtype.type(escape_code(bits))
    outside = values[shifted >= escape]
    codes = np.minimum(shifted, escape, out=shifted).astype(np.uint8)
    return pack_codes(codes, bits), outside


def estimate_residual(words: Words, prediction: Words, dtype: Dtype, *, grouped: bool) -> int:
    """Bytes that `encode_residual` would roughly store, at a tenth of its time.

    Sees how often residuals occur but not in which order, so it knows nothing of runs.
    """
    groups = Groups((255,), (words.size,))
    if grouped:
        groups = plan_groups(prediction, dtype)
    residual = split_groups(words, prediction, groups, dtype)
    return choose_forms(residual, groups.sizes).size
