"""What a prediction got wrong: residual words, grouped, and each group stored the smallest way.

A residual is `word - prediction` modulo the width of the word. A group of residuals (see `groups`)
is stored in one of three ways: as nothing if all are zero; as packed codes of 1, 2 or 4 bits if
nearly all are close to zero (see `packing`); else as byte planes. In planes a bias of 0x80 in every
byte makes small residuals of both signs differ in one plane only, where sign extension would fill
all. Format: library/FORMAT.md, "Residuals".
"""

from __future__ import annotations

import math
import struct

import numpy as np
from numpy.typing import NDArray

from fragfs.codec.entropy import Bytes, store_plane
from fragfs.codec.groups import Groups, Words, plan_groups, split_groups
from fragfs.codec.kernels import find_kernels
from fragfs.codec.packing import PACKED_BITS, escape_code, pack_codes, zero_code
from fragfs.types import Dtype

__all__ = ["encode_residual", "estimate_residual", "store_streams"]

_GROUP = struct.Struct("<BIB")  # last key, words, bits of a code (0: all zero, 8: planes)
_STREAM = struct.Struct("<BI")  # method, stored size
_COUNT = struct.Struct("<I")

_PLANES = 8

_SAMPLE_WORDS = 1 << 12
"""Words of a group that its form is chosen by."""

_FAR_MAX = 1 / 16
"""With more residuals than this outside one byte, no packed form pays."""

_RAW_BITS = 7.7
"""Planes of a higher entropy stay raw; a sample of 4096 shows up to 7.95 bits."""

_PACKING_MARGIN = 1.01
"""How much better packed codes must look than planes: they take longer to encode."""

_ESCAPE_BITS = 0.3
"""What an escape takes beyond the entropy of what is outside: few values, which Huffman codes of
whole bits fit badly, and one code for all groups. Without it blends stored 0.069 instead of 0.065,
and took longer to decode."""

_kernels = find_kernels()


def _bias(unit: int) -> int:
    return int("80" * unit, 16)


def store_streams(words: Words, level: int, params: list[bytes], payload: list[Bytes]) -> None:
    """Append the planes of some words, lowest byte first: descriptors to `params`."""
    planes = words.view(np.uint8).reshape(-1, words.itemsize)
    for position in range(words.itemsize):
        _store(np.ascontiguousarray(planes[:, position]), level, params, payload)


def _store(plane: NDArray[np.uint8], level: int, params: list[bytes], payload: list[Bytes]) -> None:
    method, stored = store_plane(plane, level)
    params.append(_STREAM.pack(method, len(stored)))
    payload.append(stored)


def encode_residual(
    words: Words, prediction: Words, dtype: Dtype, *, grouped: bool, level: int
) -> tuple[bytes, list[Bytes]]:
    """Store what `prediction` got wrong about `words`.

    Args:
        words: What is to be stored; at least one.
        prediction: As many words of the same type, native byte order on little-endian machines.
        dtype: How they read.
        grouped: Group them by the exponent of the prediction, if there are enough of them.
        level: zstd level for planes in which matches pay.

    Returns:
        Parameters and payload; parameters are one zero byte if the prediction is right throughout.
    """
    groups = Groups((255,), (words.size,))
    if grouped:
        groups = plan_groups(prediction, dtype)
    residual = split_groups(words, prediction, groups, dtype)
    if not residual.any():
        return b"\0", []
    params = [bytes([len(groups.sizes)])]
    payload: list[Bytes] = []
    escapes: list[Words] = []
    start = 0
    for last_key, size in zip(groups.last_keys, groups.sizes, strict=True):
        values = residual[start : start + size]
        start += size
        bits, _ = _choose_form(values)
        if bits and len(groups.sizes) == 1:
            bits = _settle_form(values)
        params.append(_GROUP.pack(last_key, size, bits))
        if bits == _PLANES:
            bias = values.dtype.type(_bias(values.itemsize))
            store_streams(values + bias, level, params, payload)
        elif bits:
            codes, outside = _to_codes(values, bits)
            params.append(_COUNT.pack(outside.size))
            escapes.append(outside)
            _store(pack_codes(codes, bits), level, params, payload)
    outside = np.concatenate(escapes) if escapes else residual[:0]
    if outside.size:
        bias = outside.dtype.type(_bias(outside.itemsize))
        store_streams(outside + bias, level, params, payload)
    return b"".join(params), payload


def _to_codes(values: Words, bits: int) -> tuple[NDArray[np.uint8], Words]:
    """Codes of some residuals, and the residuals that got the escape."""
    if _kernels is not None:
        codes, outside = np.empty(values.size, np.uint8), np.empty_like(values)
        count = _kernels.codes(
            values.itemsize, values, zero_code(bits), escape_code(bits), codes, outside
        )
        return codes, outside[:count]
    shifted = values + values.dtype.type(zero_code(bits))
    escape = values.dtype.type(escape_code(bits))
    outside = values[shifted >= escape]
    return np.minimum(shifted, escape, out=shifted).astype(np.uint8), outside


def estimate_residual(words: Words, prediction: Words, dtype: Dtype, *, grouped: bool) -> int:
    """Bytes that `encode_residual` would roughly store, at a tenth of its time.

    Sees how often residuals occur but not in which order, so it knows nothing of runs.
    """
    groups = Groups((255,), (words.size,))
    if grouped:
        groups = plan_groups(prediction, dtype)
    residual = split_groups(words, prediction, groups, dtype)
    bits = 0.0
    start = 0
    for size in groups.sizes:
        bits += size * _choose_form(residual[start : start + size])[1]
        start += size
    return int(bits / 8)


def _choose_form(values: Words) -> tuple[int, float]:
    """The form of a group, and about how many bits it takes for each residual.

    By the order-0 entropy of a sample, with Huffman's floor of one bit for each symbol it sees.

    Returns:
        0 for all zero, 1, 2 or 4 for packed codes, 8 for planes; bits for each residual.
    """
    upper_planes = values.itemsize - 1
    sample = values[:: max(1, values.size // _SAMPLE_WORDS)]
    low = sample + sample.dtype.type(0x80)
    shares = np.bincount(low.astype(np.uint8), minlength=256) / low.size
    if shares[0x80] == 1 and not values.any():
        return 0, 0.0
    far = np.count_nonzero(low > low.dtype.type(0xFF)) / low.size if upper_planes else 0.0
    if far > _FAR_MAX:
        return _PLANES, _plane_bits(sample)
    terms = shares * np.log2(shares, where=shares > 0, out=np.zeros(256))
    all_terms = float(terms.sum())

    def far_bits(share: float) -> float:
        # Planes above the lowest are constant but for the residuals that are far from zero.
        return upper_planes * _coded_bits(_term(share) + _term(1 - share) + 6 * share)

    best_form, best_cost = _PLANES, _coded_bits(-all_terms) + far_bits(far)
    for bits in PACKED_BITS:
        codes = slice(0x80 - zero_code(bits), 0x80 - zero_code(bits) + escape_code(bits))
        near, near_terms = float(shares[codes].sum()), float(terms[codes].sum())
        escape = min(1.0, max(0.0, 1 - near) + far)
        cost = max(bits / 8, _term(escape) - near_terms)
        if escape > 0:
            # The entropy of what is outside, from the terms of what is inside.
            outside = max(1 - near, 1e-9)
            entropy = max(0.0, near_terms - all_terms) / outside + math.log2(outside)
            cost += escape * (
                _ESCAPE_BITS + _coded_bits(max(0.0, entropy)) + far_bits(min(1.0, far / escape))
            )
        if cost * _PACKING_MARGIN < best_cost:
            best_form, best_cost = bits, cost
    return best_form, best_cost


def _settle_form(values: Words) -> int:
    """The form that stores least of a sample, tried: one group alone is hard to estimate."""
    sample = np.ascontiguousarray(values[:: max(1, values.size // (2 * _SAMPLE_WORDS))])
    return min((_PLANES, *PACKED_BITS), key=lambda form: _stored_size(sample, form))


def _stored_size(values: Words, form: int) -> int:
    payload: list[Bytes] = []
    if form != _PLANES:
        codes, values = _to_codes(values, form)
        _store(pack_codes(codes, form), 1, [], payload)
    if values.size:
        store_streams(values + values.dtype.type(_bias(values.itemsize)), 1, [], payload)
    return sum(map(len, payload))


def _plane_bits(sample: Words) -> float:
    """Bits for each residual in planes, from the entropy of each plane."""
    biased = sample + sample.dtype.type(_bias(sample.itemsize))
    total = 0.0
    for plane in biased.view(np.uint8).reshape(-1, sample.itemsize).T:
        shares = np.bincount(plane, minlength=256) / plane.size
        entropy = -float(np.sum(shares * np.log2(shares, where=shares > 0, out=np.zeros(256))))
        total += 8.0 if entropy > _RAW_BITS else _coded_bits(entropy)
    return total


def _term(share: float) -> float:
    return -share * math.log2(share) if share > 0 else 0.0


def _coded_bits(entropy: float) -> float:
    """What a plane of this entropy takes for each byte: Huffman's floor, or matches below it."""
    return entropy if entropy >= 1 else min(1.0, 1.6 * entropy + 0.02)
