"""Fragments as a prediction from other fragments and what it got wrong.

A fragment may be longer than its bases: the words they cover are predicted, the rest is stored
solo. Pure and thread-safe: bytes to bytes. Format: library/FORMAT.md, "Predictors".
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from fragfs.codec.entropy import Bytes
from fragfs.codec.predict import (
    Prediction,
    Words,
    check_scales,
    parse_prediction,
    scale_count,
    unit_size,
)
from fragfs.codec.rebuild import decode_residual, parse_streams
from fragfs.codec.residual import encode_residual, store_streams
from fragfs.codec.solo import Buffer, Encoding, decode_solo, encode_solo
from fragfs.codec.steps import STEP_COUNT, pack_steps, parse_steps
from fragfs.errors import FormatError
from fragfs.types import FRAGMENT_BYTES_MAX, Dtype, Predictor

__all__ = ["covered_words", "decode_predicted", "encode_predicted"]

_COVERED = struct.Struct("<I")
_REST = struct.Struct("<BH")  # predictor, size of parameters
_CHANGES = struct.Struct("<I")

_RESIDUAL_LEVEL = 3
"""zstd level for residual planes in which matches pay: runs of zeros, which every level finds."""

_SPARSE_SHARE_MAX = 1 / 64
"""Listing what differs is tried below this share of the words."""


def covered_words(raw: Buffer, dtype: Dtype, bases: Sequence[tuple[memoryview, Dtype]]) -> int:
    """Words of a fragment that all of its bases reach; each base with how it reads."""
    sizes = [len(base) // unit_size(base_dtype) for base, base_dtype in bases]
    return min(len(memoryview(raw)) // unit_size(dtype), *sizes, 1 << 30)


def encode_predicted(
    raw: Buffer,
    dtype: Dtype,
    prediction: Prediction,
    bases: Sequence[memoryview],
    *,
    grouped: bool,
    zstd_level: int,
    fine: bool = False,
) -> Encoding:
    """Store what a prediction got wrong, and what its bases do not cover.

    Args:
        raw: The fragment's bytes; at least one word of them is covered.
        dtype: How to read them.
        prediction: How they are predicted.
        bases: Raw bytes of each base.
        grouped: Group residuals by the exponent of the prediction.
        zstd_level: zstd level of what no base covers.
        fine: Make groups finer, for space.

    Returns:
        An encoding, which may be larger than `raw`. SPARSE for a DELTA that is best listed.
    """
    view = memoryview(raw).cast("B")
    unit = unit_size(dtype)
    count = covered_words(view, dtype, list(zip(bases, prediction.dtypes, strict=True)))
    words: Words = np.frombuffer(view, f"<u{unit}", count)
    predicted = prediction.predict(bases, dtype, count)
    params = [_COVERED.pack(count)]
    payload: list[Bytes] = []
    predictor = prediction.predictor
    changes = _list_changes(words, predicted) if predictor is Predictor.DELTA else None
    if changes is not None:
        predictor = Predictor.SPARSE
        _store_changes(words, predicted, changes, params, payload)
    else:
        params.append(prediction.pack())
        if predictor is Predictor.QUANTIZE:
            store_streams(prediction.scales.view("<u4"), _RESIDUAL_LEVEL, params, payload)
        elif predictor is Predictor.DECAY:
            store_streams(pack_steps(prediction.steps), _RESIDUAL_LEVEL, params, payload)
        stored = encode_residual(
            words, predicted, dtype, grouped=grouped, level=_RESIDUAL_LEVEL, fine=fine
        )
        params.append(stored[0])
        payload += stored[1]
    rest = view[count * unit :]
    if len(rest):
        encoding = encode_solo(rest, dtype, zstd_level=zstd_level)
        params += [_REST.pack(encoding.predictor, len(encoding.params)), encoding.params]
        payload.append(encoding.payload)
    return Encoding(predictor, b"".join(params), b"".join(payload))


def _list_changes(words: Words, predicted: Words) -> NDArray[np.intp] | None:
    """Where a prediction is wrong, if that is best listed."""
    differs = words != predicted
    if not 0 < np.count_nonzero(differs) <= words.size * _SPARSE_SHARE_MAX:
        return None
    return np.flatnonzero(differs)


def _store_changes(
    words: Words,
    predicted: Words,
    changes: NDArray[np.intp],
    params: list[bytes],
    payload: list[Bytes],
) -> None:
    gaps: NDArray[np.uint32] = np.diff(changes, prepend=-1).astype("<u4") - np.uint32(1)
    residual = words[changes] - predicted[changes]
    params.append(_CHANGES.pack(changes.size))
    store_streams(gaps, _RESIDUAL_LEVEL, params, payload)
    store_streams(residual, _RESIDUAL_LEVEL, params, payload)


def decode_predicted(
    predictor: int,
    dtype: Dtype,
    params: memoryview,
    payload: memoryview,
    raw_size: int,
    bases: Sequence[memoryview],
) -> memoryview:
    """Undo `encode_predicted`; see `encoding.decode` for arguments, result and errors."""
    unit = unit_size(dtype)
    if not 0 < raw_size <= FRAGMENT_BYTES_MAX or len(params) < _COVERED.size:
        raise FormatError("a predicted fragment is malformed", actual=raw_size)
    (count,) = _COVERED.unpack_from(params)
    params = params[_COVERED.size :]
    if not 0 < count * unit <= raw_size:
        raise FormatError("a prediction covers more than there is", actual=count)
    if predictor == Predictor.SPARSE:
        prediction, _ = parse_prediction(Predictor.DELTA, params, dtype, len(bases))
        predicted = prediction.predict(bases, dtype, count)
        words, params, payload = _apply_changes(predicted, params, payload)
    else:
        prediction, params = parse_prediction(Predictor(predictor), params, dtype, len(bases))
        if prediction.predictor is Predictor.QUANTIZE:
            scales = scale_count(prediction, count)
            if scales > count + 1:
                raise FormatError("a quantized fragment has too many scales", actual=scales)
            bits, params, payload = parse_streams(params, payload, scales, np.dtype("<u4"))
            check_scales(bits.view("<f4"))
            prediction = replace(prediction, scales=bits.view("<f4"))
        elif prediction.predictor is Predictor.DECAY:
            bits, params, payload = parse_streams(params, payload, STEP_COUNT, np.dtype("<u4"))
            prediction = replace(prediction, steps=parse_steps(bits))
        predicted = prediction.predict(bases, dtype, count)
        # A DELTA's prediction is its base itself, which others read.
        is_ours = prediction.predictor is not Predictor.DELTA
        words, params, payload = decode_residual(
            params, payload, predicted, dtype, overwrite=is_ours
        )
    covered = count * unit
    if covered == raw_size:
        if len(params) or len(payload):
            raise FormatError("bytes follow a predicted fragment", actual=len(payload))
        return words.view(np.uint8).data.toreadonly()
    if len(params) < _REST.size:
        raise FormatError("parameters end before what no base covers", actual=len(params))
    solo, params_size = _REST.unpack_from(params)
    params = params[_REST.size :]
    if len(params) != params_size:
        raise FormatError(
            "parameters of what no base covers have the wrong size",
            expected=params_size,
            actual=len(params),
        )
    raw = np.empty(raw_size, np.uint8)
    raw[:covered] = words.view(np.uint8)
    rest = decode_solo(solo, dtype, params, payload, raw_size - covered)
    raw[covered:] = np.frombuffer(rest, np.uint8)
    return raw.data.toreadonly()


def _apply_changes(
    predicted: Words, params: memoryview, payload: memoryview
) -> tuple[Words, memoryview, memoryview]:
    if len(params) < _CHANGES.size:
        raise FormatError("parameters of changes end early", actual=len(params))
    (change_count,) = _CHANGES.unpack_from(params)
    if not 0 < change_count <= predicted.size:
        raise FormatError("an impossible number of changes", actual=change_count)
    gaps, params, payload = parse_streams(
        params[_CHANGES.size :], payload, change_count, np.dtype("<u4")
    )
    residual, params, payload = parse_streams(params, payload, change_count, predicted.dtype)
    places = np.cumsum(gaps.astype(np.int64) + 1) - 1
    if places[-1] >= predicted.size:
        raise FormatError("a change lies behind the end", actual=int(places[-1]))
    words = predicted.copy()
    words[places] += residual
    return words, params, payload
