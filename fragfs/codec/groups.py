"""Residuals sorted into groups by the exponent of their prediction.

A fine-tune moves all weights of a tensor by about the same absolute amount, so in units of the last
place a large weight moves little and a small one much: the exponent of the prediction, which the
decoder has as well, tells how large a residual can be. Entropy coding each group by itself stores 7
to 25 % less than one code for all (facts in the README's benchmarks).

The order is a stable distribution: groups in order, and in word order inside each. Where the
compiled loop is not there, an argsort gives the same bytes in about four times the time. Format:
library/FORMAT.md, "Residuals".
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from fragfs.codec.kernels import find_kernels
from fragfs.errors import FormatError
from fragfs.types import Dtype

__all__ = [
    "GROUPS_MAX",
    "Groups",
    "Words",
    "join_groups",
    "key_field",
    "plan_groups",
    "split_groups",
]

Words: TypeAlias = NDArray[np.unsignedinteger[Any]]

GROUPS_MAX = 16

_KEYS = 256

_WORDS_PER_GROUP_MIN = 2048
"""Below this the tables of another group cost more than it saves."""
_GROUP_SHARE_MIN, _FINE_SHARE_MIN = 1 / 32, 1 / 96
"""Exponents rarer than this share are joined with the next one: the largest weights of a tensor.
Fine groups save 0.6 % of a bf16 checkpoint, and take an eighth longer to decode."""


_kernels = find_kernels()


@dataclass(frozen=True, slots=True)
class Groups:
    """Which words belong together.

    Attributes:
        last_keys: The highest key of each group, ascending; the last is 255.
        sizes: Words in each group.
    """

    last_keys: tuple[int, ...]
    sizes: tuple[int, ...]

    def lookup(self) -> NDArray[np.uint8]:
        """Group of each key, shape (256,)."""
        table = np.zeros(_KEYS, np.uint8)
        for last in self.last_keys[:-1]:
            table[last + 1 :] += 1
        return table


def key_field(dtype: Dtype) -> tuple[int, int]:
    """(shift, mask) of a word's key: the exponent, or its low 8 bits. Mask 0: there is no key."""
    if dtype.bits < 8:
        return 0, 0
    return dtype.mantissa_bits, (1 << min(8, dtype.exponent_bits)) - 1


def plan_groups(prediction: Words, dtype: Dtype, *, fine: bool = False) -> Groups:
    """Choose groups for a prediction, coarse or fine; one group if more would not pay."""
    shift, mask = key_field(dtype)
    count = prediction.size
    share_min = _FINE_SHARE_MIN if fine else _GROUP_SHARE_MIN
    size_min = max(_WORDS_PER_GROUP_MIN, int(count * share_min))
    if not mask or count < 2 * size_min:
        return Groups((_KEYS - 1,), (count,))
    last_keys, sizes = [], []
    size = 0
    counts = _count_keys(prediction, shift, mask)
    for key in np.flatnonzero(counts).tolist():
        size += int(counts[key])
        if size >= size_min:
            last_keys.append(key)
            sizes.append(size)
            size = 0
    if size or not sizes:
        if sizes and size < size_min:
            sizes[-1] += size
        else:
            sizes.append(size)
            last_keys.append(_KEYS - 1)
    last_keys[-1] = _KEYS - 1
    while len(sizes) > GROUPS_MAX:
        smallest = min(range(len(sizes) - 1), key=lambda index: sizes[index] + sizes[index + 1])
        sizes[smallest : smallest + 2] = [sizes[smallest] + sizes[smallest + 1]]
        del last_keys[smallest]
    return Groups(tuple(last_keys), tuple(sizes))


def split_groups(words: Words, prediction: Words, groups: Groups, dtype: Dtype) -> Words:
    """`words - prediction`, modulo the width of a word, group after group.

    Args:
        words: What is to be stored.
        prediction: As many words of the same type.
        groups: From `plan_groups` of this prediction.
        dtype: How the prediction reads.
    """
    if len(groups.sizes) == 1:
        return words - prediction
    shift, mask = key_field(dtype)
    out = np.empty_like(words)
    if _kernels is not None:
        sizes = np.array(groups.sizes, np.uint32)
        _kernels.split(words.itemsize, words, prediction, groups.lookup(), sizes, out, shift, mask)
        return out
    order = _order(prediction, groups, shift, mask)
    return (words - prediction)[order]


def join_groups(
    residual: Words, prediction: Words, groups: Groups, dtype: Dtype, out: Words
) -> None:
    """Undo `split_groups` into `out`, which may be the prediction. The compiled loop is `rebuild`.

    Raises:
        FormatError: The groups' sizes are not those of this prediction.
    """
    if len(groups.sizes) == 1:
        np.add(residual, prediction, out=out)
        return
    order = _order(prediction, groups, *key_field(dtype))
    placed = np.empty_like(residual)
    placed[order] = residual
    np.add(placed, prediction, out=out)


def _order(prediction: Words, groups: Groups, shift: int, mask: int) -> NDArray[np.intp]:
    """Indices of the words, group after group."""
    keys = (prediction >> prediction.dtype.type(shift)).astype(np.uint8) & np.uint8(mask)
    group_of = groups.lookup()[keys]
    sizes = np.bincount(group_of, minlength=len(groups.sizes))
    if sizes.tolist() != list(groups.sizes):
        raise FormatError("groups of a residual have other sizes than they should")
    return np.argsort(group_of, kind="stable")


def _count_keys(prediction: Words, shift: int, mask: int) -> NDArray[np.uint32]:
    if _kernels is not None:
        counts = np.empty(_KEYS, np.uint32)
        _kernels.count_keys(prediction.itemsize, prediction, counts, shift, mask)
        return counts
    keys = (prediction >> prediction.dtype.type(shift)).astype(np.uint8) & np.uint8(mask)
    return np.bincount(keys, minlength=_KEYS).astype(np.uint32)
