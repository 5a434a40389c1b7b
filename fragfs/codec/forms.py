"""Which form a group of residuals is stored in, and about how many bytes that takes.

By how often each byte occurs in a sample of the group: its order-0 entropy, and what the coder is
known to need above that. In which order residuals come is not seen, so this knows
nothing of runs. For writers only, but in whole numbers throughout: compiled loops and numpy come to
the same decisions, and store the same bytes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from fragfs.codec.kernels import find_kernels
from fragfs.codec.packing import PACKED_BITS, escape_code, zero_code

__all__ = ["PLANES", "Costs", "choose_forms"]

Words: TypeAlias = NDArray[np.unsignedinteger[Any]]
Counts: TypeAlias = NDArray[np.int64]

PLANES = 8
"""The form of byte planes. Others: 0 if all residuals are zero; 1, 2 or 4 bits for a code."""

_SAMPLE_WORDS = 1 << 12
"""Words of a group that its form is chosen by, at least; fewer than twice as many."""

_FIXED = 16
"""Fraction bits of logarithms and costs."""
_LOGS: NDArray[np.uint32] = np.rint(
    np.log2(np.maximum(np.arange(2 * _SAMPLE_WORDS), 1)) * (1 << _FIXED)
).astype(np.uint32)
"""Logarithms to base 2 of all counts that occur in a sample. That of 0 is never multiplied by
anything else."""

_LOSS_BITS = 8
_LOSSES: NDArray[np.uint32] = np.rint(
    np.interp(
        np.arange((1 << _LOSS_BITS) + 1) / (1 << _LOSS_BITS),
        [0, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.75, 0.8, 0.85, 0.9, 0.93, 0.96, 0.98, 0.99, 1],
        [0.03, 0.04, 0.06, 0.16, 0.3, 0.42, 0.53, 0.57, 0.59, 0.58, 0.5, 0.4, 0.28, 0.16, 0.08, 0],
    )
    * (1 << _FIXED)
).astype(np.uint32)
"""Bits above its entropy that a byte takes, by the share of the most frequent byte. Below one bit
Huffman coding has nothing, and zstd takes runs of four equal bytes for matches, which costs more
than it saves up to a share of 0.9. (Gaussian and Laplacian planes of 130,000 bytes, zstd 1.5.7.)"""

_RAW_TENTHS = 77
"""Tenths of a bit: planes of a higher entropy stay raw; a sample of 4096 shows up to 7.95 bits."""

_PACKING_MARGIN = 101, 100
"""How much better packed codes must look than planes: they take longer to encode."""

_kernels = find_kernels()


class Costs:
    """Forms of the groups of some residuals, and what storing each takes.

    Attributes:
        forms: The form of each group.
        bits: Bits that each group takes, in units of 2**-16.
    """

    def __init__(self, forms: Sequence[int], bits: Sequence[int]) -> None:
        self.forms = forms
        self.bits = bits

    @property
    def size(self) -> int:
        """Bytes of all groups together."""
        return sum(self.bits) >> _FIXED + 3


def choose_forms(residual: Words, sizes: Sequence[int]) -> Costs:
    """Choose the form of each group.

    Args:
        residual: Residuals, group after group.
        sizes: How many are in each group; at least 1.
    """
    if _kernels is not None:
        forms, bits = np.empty(len(sizes), np.uint8), np.empty(len(sizes), np.int64)
        _kernels.forms(
            residual.itemsize,
            residual,
            np.array(sizes, np.uint32),
            _LOGS,
            _LOSSES,
            forms,
            bits,
        )
        return Costs(forms.tolist(), bits.tolist())
    found = []
    start = 0
    for size in sizes:
        found.append(_choose_form(residual[start : start + size], len(sizes) > 1))
        start += size
    return Costs([form for form, _ in found], [cost for _, cost in found])


def _choose_form(values: Words, is_mixed: bool) -> tuple[int, int]:
    sample = values[:: max(1, values.size // _SAMPLE_WORDS)]
    # What is within a signed byte of zero has only this bias in its upper bytes.
    bias = sample.dtype.type(int("80" * sample.itemsize, 16))
    planes = (sample + bias).view(np.uint8).reshape(-1, sample.itemsize)
    is_far = (planes[:, 1:] != 0x80).any(axis=1)
    near, far = _count(planes[~is_far, 0]), _count(planes[is_far, 0])
    upper = [_count(planes[:, position]) for position in range(1, sample.itemsize)]
    if near[0x80] == sample.size and not values.any():
        return 0, 0
    form, cost = PLANES, _plane_cost(near + far) + sum(map(_plane_cost, upper))
    for bits in PACKED_BITS:
        packed = _packed_cost(near, far, upper, bits, is_mixed)
        if packed * _PACKING_MARGIN[0] < cost * _PACKING_MARGIN[1]:
            form, cost = bits, packed
    return form, cost * values.size // sample.size


def _count(plane: NDArray[np.uint8]) -> Counts:
    return np.bincount(plane, minlength=256)


def _packed_cost(
    near: Counts, far: Counts, upper: Sequence[Counts], bits: int, is_mixed: bool
) -> int:
    """What packed codes take, and the planes of the residuals outside of them."""
    codes = slice(0x80 - zero_code(bits), 0x80 - zero_code(bits) + escape_code(bits))
    total = int(near.sum() + far.sum())
    outside = total - int(near[codes].sum())
    entropy = _times_log(total) - _times_log(near[codes]) - _times_log(outside)
    # How often all codes of a byte stand for zero, should neighbours have nothing in common.
    likely = (int(near[0x80]) << _FIXED) // total
    for _ in range(3 - (bits.bit_length() - 1)):
        likely = likely * likely >> _FIXED
    cost = _coded(entropy, (total * bits + 7) // 8, likely)
    if not outside:
        return cost
    lowest = near + far
    lowest[codes] = far[codes]
    planes = [lowest]
    for plane in upper:
        planes.append(plane.copy())
        planes[-1][0x80] -= total - outside
    apart = sum(map(_plane_cost, planes))
    # Those of all groups are stored together, which loses what grouping has gained.
    return cost + apart + (apart // 8 if is_mixed else 0)


def _plane_cost(counts: Counts) -> int:
    """What a plane of bytes takes that occur so often."""
    total = int(counts.sum())
    entropy = _times_log(total) - _times_log(counts)
    return _coded(entropy, total, (int(counts.max()) << _FIXED) // total)


def _times_log(counts: Counts | int) -> int:
    """The sum of each count times its logarithm."""
    return int(np.sum(counts * _LOGS[counts].astype(np.int64)))


def _coded(entropy: int, count: int, likely: int) -> int:
    """What bytes take, coded or raw.

    Args:
        entropy: Of all of them together.
        count: How many.
        likely: The share of the most frequent one, in units of 2**-16.
    """
    cost = entropy + count * int(_LOSSES[likely >> _FIXED - _LOSS_BITS])
    one = count << _FIXED
    return 8 * one if 10 * cost > _RAW_TENTHS * one else cost
