"""Looking up base candidates: rows under keys, merged, ranked, and cut off.

A query reads a bounded number of rows under each of its keys, so its cost does not grow with the
library. A key that few fragments share says much about them, and all of them are looked at; a key
that a large family shares says little, and a few of its oldest and newest rows do. Rows come from
the catalog and, for fragments that are not committed yet, from memory.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Protocol

from fragfs.errors import UsageError
from fragfs.similarity.signature import (
    DEFAULT_SIGNATURE_CONFIG,
    Buffer,
    FragmentSignature,
    SignatureConfig,
    sign_fragment,
)
from fragfs.similarity.sketch import sketch_distances, sketch_dtype
from fragfs.types import Dtype

__all__ = [
    "DEFAULT_SIMILARITY_THRESHOLD",
    "MemorySignatureRows",
    "SignatureRows",
    "SimilarityIndex",
    "SimilarityMatch",
    "SimilarityThreshold",
    "split_limit",
]


@dataclass(frozen=True, slots=True)
class SimilarityMatch:
    """A fragment that is worth trying as a base.

    Attributes:
        fragment: Its number in the catalog.
        distance: How far its numbers are from the query's, as `sketch_distance` has it.
        dtype: How its bytes read.
    """

    fragment: int
    distance: float
    dtype: Dtype


@dataclass(frozen=True, slots=True)
class SimilarityThreshold:
    """How alike fragments must be for one to be tried as a base of the other.

    A match only nominates: whether the base is used is decided by the bytes it saves.

    Attributes:
        distance_max: The largest sketch distance worth trying; above 0, below 1.
    """

    distance_max: float

    def __post_init__(self) -> None:
        if not 0 < self.distance_max < 1:
            raise UsageError(f"a distance threshold is above 0 and below 1: {self.distance_max}")

    def admits(self, distance: float) -> bool:
        """Whether a fragment this far away is worth trying."""
        return distance <= self.distance_max


DEFAULT_SIMILARITY_THRESHOLD = SimilarityThreshold(0.6)


class SignatureRows(Protocol):
    """Signatures of fragments that may serve as bases, by key."""

    def fragments_of(self, keys: Sequence[int], limit: int) -> list[tuple[int, bytes]]:
        """The fragments under any of `keys`.

        Args:
            keys: Signed 64-bit integers; repetitions count once.
            limit: The most rows to take under one key, at least 1. The key is crowded if there are
                more: then take only a few, those with the smallest numbers (a family's oldest
                members, which others already build on) and those with the largest (neighbours of
                what is being added), as many of either as `split_limit` says.

        Returns:
            (number, sketch) of each fragment once, in ascending order of numbers.
        """
        ...


_CROWDED_SHARE = 10
"""A crowded key gives the limit divided by this. In a family of 1,000 with 40 rows to a key, 4 of a
crowded one find more neighbours and bases than 16 of every key do, from 20 rows instead of 35
(`python -m tests.similarity.measure_recall`)."""


def split_limit(limit: int) -> tuple[int, int]:
    """How many of the oldest and of the newest rows of a crowded key to take."""
    few = max(1, limit // _CROWDED_SHARE)
    return few - few // 2, few // 2


class MemorySignatureRows:
    """Signature rows in memory, for fragments that are not in the catalog yet. Not thread-safe."""

    def __init__(self) -> None:
        self._sketches: dict[int, bytes] = {}
        self._fragments: dict[int, list[int]] = {}

    def __len__(self) -> int:
        return len(self._sketches)

    def add(self, number: int, signature: FragmentSignature, hint_keys: Iterable[int] = ()) -> None:
        """Index a fragment under its signature's keys and `hint_keys`; adding it again adds keys.

        Args:
            number: The fragment's number; no other fragment in any rows of the same index has it.
            signature: Its signature.
            hint_keys: Further keys to find it by, as of `name_key`.
        """
        self._sketches[number] = signature.sketch
        for key in dict.fromkeys(chain(signature.keys, hint_keys)):
            numbers = self._fragments.setdefault(key, [])
            place = bisect_left(numbers, number)
            if numbers[place : place + 1] != [number]:
                numbers.insert(place, number)

    def fragments_of(self, keys: Sequence[int], limit: int) -> list[tuple[int, bytes]]:
        """See `SignatureRows`."""
        oldest, newest = split_limit(limit)
        found: set[int] = set()
        for key in keys:
            numbers = self._fragments.get(key, [])
            if len(numbers) > limit:
                numbers = numbers[:oldest] + numbers[len(numbers) - newest :]
            found.update(numbers)
        return [(number, self._sketches[number]) for number in sorted(found)]


class SimilarityIndex:
    """Nominates bases for fragments.

    Args:
        *rows: Where signatures are kept. A fragment has one number in all of them.
        config: How fragments are signed, here and in `rows`, and how far a query goes.
        threshold: What is too far away to be worth trying.
    """

    def __init__(
        self,
        *rows: SignatureRows,
        config: SignatureConfig = DEFAULT_SIGNATURE_CONFIG,
        threshold: SimilarityThreshold = DEFAULT_SIMILARITY_THRESHOLD,
    ) -> None:
        self._rows = rows
        self._config = config
        self._threshold = threshold

    def sign(self, raw: Buffer, dtype: Dtype) -> FragmentSignature | None:
        """Sign a fragment the way this index looks for it; see `sign_fragment`."""
        return sign_fragment(raw, dtype, self._config)

    def query(
        self,
        signature: FragmentSignature,
        hint_keys: Sequence[int] = (),
        count: int = 4,
        exclude: Collection[int] = (),
    ) -> list[SimilarityMatch]:
        """Find fragments that may predict the signed one.

        Args:
            signature: Signature of the fragment to predict.
            hint_keys: Further keys to look under, as of `name_key`.
            count: The most matches to return.
            exclude: Numbers of fragments not to return, such as the fragment itself.

        Returns:
            Matches within the threshold, closest first; the older one where distances are equal.
        """
        keys = list(dict.fromkeys(chain(signature.keys, hint_keys)))
        candidates: dict[int, bytes] = {}
        for rows in self._rows:
            candidates.update(rows.fragments_of(keys, self._config.rows_per_key))
        for number in exclude:
            candidates.pop(number, None)
        distances = sketch_distances(signature.sketch, list(candidates.values())).tolist()
        near = sorted(
            (distance, number)
            for number, distance in zip(candidates, distances, strict=True)
            if self._threshold.admits(distance)
        )
        return [
            SimilarityMatch(number, distance, dtype)
            for distance, number in near[:count]
            if (dtype := sketch_dtype(candidates[number])) is not None
        ]
