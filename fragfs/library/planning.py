"""Base planning: which stored fragments a new one may be predicted from, and which of them it is.

Candidates come from the similarity index: fragments of the same tensor name and index in other
models, and whatever has alike numbers, under any name and in any float format. The closest are
decoded and tried; `codec.choose` decides by what they save. Nothing here is believed: an encoding
is decoded again and compared before anyone stores it.
"""

from __future__ import annotations

import threading
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np

from fragfs.codec.choose import Choice, encode_best
from fragfs.codec.encoding import decode
from fragfs.codec.solo import Encoding, encode_solo
from fragfs.codec.trials import NO_ROWS, Candidate, Rows
from fragfs.errors import FragmentError, IntegrityError, NotFoundError, StorageError
from fragfs.library.catalog import Catalog
from fragfs.library.closure import CLOSURE_LIMIT, Closures
from fragfs.library.decode import FragmentDecoder
from fragfs.library.recent import RecentFragments
from fragfs.library.records import checksum
from fragfs.similarity.index import (
    MemorySignatureRows,
    SimilarityIndex,
    SimilarityMatch,
    split_limit,
)
from fragfs.similarity.signature import FragmentSignature, name_key
from fragfs.types import Dtype, Fragment, FragmentId, Level, LibraryConfig, Predictor

__all__ = [
    "BasePlanner",
    "CatalogSignatureRows",
    "Hints",
    "Planned",
    "look_up_ahead",
    "prove",
]

_RECENT_BYTES_MAX = 192 << 20
"""Decoded bases kept: two workers with four candidates each of 2 MiB, and what siblings will
need."""

_MATCHES_MAX = 24
"""Fragments looked at; how many of them are decoded and tried is up to `codec.choose`."""

_LOOKED_UP = 12
"""Matches whose closures are looked up at a time: `codec.choose` takes no more of them."""

_COPY_SHARE_MAX = 0.01
"""A fragment stored in less than this share of its bytes is a copy of its base."""

_NEAR = 1.6
"""Candidates further away than the closest by this factor are not decoded: they would lose."""
_NEAR_ABOVE = 0.02
"""And this much on top, below which distances tell nothing."""


@dataclass(frozen=True, slots=True)
class Hints:
    """What is known about a fragment besides its bytes.

    Attributes:
        name: Name of its tensor; None if it is of none.
        index: Its position among the fragments of the tensor.
        rows: How its words lie in the rows of the tensor.
    """

    name: str | None = None
    index: int = 0
    rows: Rows = NO_ROWS


@dataclass(frozen=True, slots=True)
class Planned:
    """A fragment as it shall be stored.

    Attributes:
        fragment: The fragment, encoded.
        bases: Numbers of its bases.
        signature: What later fragments find it by; None if it cannot serve as a base.
    """

    fragment: Fragment
    bases: tuple[int, ...]
    signature: FragmentSignature | None


class CatalogSignatureRows:
    """The signatures in a catalog; a `SignatureRows`. Safe in any thread."""

    def __init__(self, catalog: Catalog) -> None:
        self._catalog = catalog

    def fragments_of(self, keys: Sequence[int], limit: int) -> list[tuple[int, bytes]]:
        """See `SignatureRows`. All keys in one query: each by itself would take twice the time."""
        return self._catalog.rows(_signatures_query(len(keys), limit), keys) if keys else []


@lru_cache(maxsize=64)
def _signatures_query(key_count: int, limit: int) -> str:
    """Numbers and sketches of what is under any of some keys, as `SignatureRows` has it."""
    oldest, newest = split_limit(limit)
    parts = []
    for key in range(1, key_count + 1):
        rows = f"SELECT fragment FROM similar WHERE key = ?{key} ORDER BY fragment"
        is_crowded = f"EXISTS (SELECT 1 FROM similar WHERE key = ?{key} LIMIT 1 OFFSET {limit})"
        parts += [
            f"SELECT * FROM ({rows} LIMIT CASE WHEN {is_crowded} THEN {oldest} ELSE {limit} END)",
            f"SELECT * FROM ({rows} DESC LIMIT {newest})",
        ]
    union = " UNION ALL ".join(parts)
    return f"SELECT fragment, sketch FROM signatures WHERE fragment IN ({union}) ORDER BY fragment"


class _LockedRows:
    """Signatures of fragments that are not committed yet: added by one thread, read by workers."""

    def __init__(self) -> None:
        self._rows = MemorySignatureRows()
        self._lock = threading.Lock()

    def add(self, number: int, signature: FragmentSignature) -> None:
        with self._lock:
            self._rows.add(number, signature)

    def fragments_of(self, keys: Sequence[int], limit: int) -> list[tuple[int, bytes]]:
        with self._lock:
            return self._rows.fragments_of(keys, limit)

    def clear(self) -> None:
        with self._lock:
            self._rows = MemorySignatureRows()


class BasePlanner:
    """Encodes fragments against what the library holds. `plan` is safe in any thread.

    Args:
        catalog: Where bases and signatures are recorded.
        decoder: Decodes candidates.
        config: The library's settings.
        level: What encodings to prefer.
    """

    def __init__(
        self, catalog: Catalog, decoder: FragmentDecoder, config: LibraryConfig, level: Level
    ) -> None:
        self._catalog = catalog
        self._decoder = decoder
        self._config = config
        self._level = level
        self._pending = _LockedRows()
        self._pending_ids: dict[int, tuple[FragmentId, tuple[int, ...]]] = {}
        self._index = SimilarityIndex(CatalogSignatureRows(catalog), self._pending)
        self._recent = RecentFragments(_RECENT_BYTES_MAX)

    # --- what is not committed yet, told by the thread that appends

    def add_pending(self, number: int, planned: Planned, raw: bytes) -> None:
        """A fragment got its number: from now on others may be predicted from it."""
        if planned.signature is not None:
            self._recent.put(number, memoryview(raw))
            self._pending_ids[number] = (planned.fragment.id, planned.bases)
            self._pending.add(number, planned.signature)

    def forget_pending(self) -> None:
        """The batch is committed: the catalog knows its fragments."""
        self._pending.clear()
        self._pending_ids = {}

    # --- planning, in workers

    def sign(self, raw: bytes | memoryview, dtype: Dtype, hints: Hints) -> FragmentSignature | None:
        """What a fragment is found by, its tensor's name included."""
        signature = self._index.sign(raw, dtype)
        if signature is None or hints.name is None:
            return signature
        return replace(signature, keys=(*signature.keys, name_key(hints.name, hints.index)))

    def plan(
        self,
        raw: bytes | memoryview,
        dtype: Dtype,
        fragment_id: FragmentId,
        hints: Hints,
        exclude: Collection[int] = (),
    ) -> Planned:
        """Encode a fragment the smallest way the library allows, and prove it.

        Args:
            raw: Its bytes.
            dtype: How to read them.
            fragment_id: Its id.
            hints: What else is known about it.
            exclude: Fragments that decoding it must not take.

        Raises:
            FragmentError: The encoding does not decode to what was encoded.
        """
        signature = self.sign(raw, dtype, hints)
        numbers: list[int] = []
        closures = Closures(self._bases_of)
        if signature is not None:
            limit = self._config.closure_max
            exclude = {*exclude, *self._catalog.quarantined()}
            found = self._candidates(signature, dtype, exclude, closures, numbers)

            def may_combine(indices: Sequence[int]) -> bool:
                return len(closures.of([numbers[index] for index in indices])) < limit

            choice = encode_best(
                raw,
                dtype,
                found,
                level=self._level,
                zstd_level=self._config.zstd_level,
                may_combine=may_combine,
                rows=hints.rows,
            )
        else:
            choice = Choice(encode_solo(raw, dtype, zstd_level=self._config.zstd_level))
        bases = tuple(numbers[index] for index in choice.bases)
        fragment = prove(
            raw,
            dtype,
            fragment_id,
            choice.encoding,
            [(self._id(number), raw) for number, raw in zip(bases, choice.raws, strict=True)],
        )
        # Only what may serve as a base is indexed: one more fragment must fit its closure. A copy
        # does not: its original serves in its place.
        is_copy = bool(bases) and choice.encoding.size < len(raw) * _COPY_SHARE_MAX
        if is_copy or len(closures.of(bases)) + 2 > self._config.closure_max:
            signature = None
        return Planned(fragment, bases, signature)

    def plan_solo(
        self, raw: bytes | memoryview, dtype: Dtype, fragment_id: FragmentId, hints: Hints
    ) -> Planned:
        """Encode a fragment from nothing, and prove it."""
        encoding = encode_solo(raw, dtype, zstd_level=self._config.zstd_level)
        fragment = prove(raw, dtype, fragment_id, encoding, ())
        return Planned(fragment, (), self.sign(raw, dtype, hints))

    def _candidates(
        self,
        signature: FragmentSignature,
        dtype: Dtype,
        exclude: Collection[int],
        closures: Closures,
        numbers: list[int],
    ) -> Iterator[Candidate]:
        """The closest fragments that may be bases, decoded when they are asked for.

        Args:
            signature: Of the fragment to predict.
            dtype: How it reads.
            exclude: Fragments that decoding it must not take.
            closures: Knows what decoding a fragment takes.
            numbers: Gets the number of each candidate.
        """
        matches = self._index.query(signature, count=_MATCHES_MAX, exclude=exclude)
        if dtype.bits == 8:
            # Rounding to a byte makes all of a family look alike: originals before later copies.
            matches.sort(key=lambda match: (match.dtype.bits == 8, match.fragment))
        else:
            matches = _near(matches)
        for match in look_up_ahead(matches, closures):
            number, candidate_dtype = self._original(match.fragment, match.dtype, closures)
            closure = closures.of((number,))
            if number in numbers or len(closure) >= self._config.closure_max:
                continue
            if not closure.isdisjoint(exclude):
                continue
            raw = self._raw(number)
            if raw is not None:
                numbers.append(number)
                yield Candidate(raw, candidate_dtype, len(closure))

    def _original(self, number: int, dtype: Dtype, closures: Closures) -> tuple[int, Dtype]:
        """What a fragment is a copy of, in another precision or nearly so; or itself.

        What is predicted from the original reads one fragment less than what is predicted from
        the copy, and says as much.
        """
        # Not for ever, should a damaged catalog have copies of each other.
        for _ in range(CLOSURE_LIMIT):
            bases = closures.bases(number)
            if len(bases) != 1 or number in self._pending_ids:
                break
            try:
                metadata = self._catalog.fragment(number)
                if metadata.record_size > metadata.raw_size * _COPY_SHARE_MAX:
                    break
                original = self._decoder.read_header(self._catalog.fragment(bases[0]))
            except FragmentError:
                break  # damaged, or dropped meanwhile
            number, dtype = bases[0], original.dtype
        return number, dtype

    def _raw(self, number: int) -> memoryview | None:
        """A candidate's bytes; None if they are not to be had: nothing new shall rest on damage."""
        if number in self._pending_ids:
            return self._recent.get(number)
        try:
            return self._decoder.decode(number, self._recent)
        except (IntegrityError, NotFoundError):
            return None
        except StorageError as error:
            if error.retryable:
                raise
            return None

    def _id(self, number: int) -> FragmentId:
        pending = self._pending_ids.get(number)
        return pending[0] if pending is not None else self._catalog.fragment(number).id

    def _bases_of(self, numbers: Collection[int]) -> dict[int, tuple[int, ...]]:
        found: dict[int, tuple[int, ...]] = {}
        for number in numbers:
            pending = self._pending_ids.get(number)
            if pending is not None:
                found[number] = pending[1]
        stored = [number for number in numbers if number not in found]
        return found | self._catalog.bases_of(stored) if stored else found


def look_up_ahead(
    matches: Sequence[SimilarityMatch], closures: Closures
) -> Iterator[SimilarityMatch]:
    """The matches, closures of some looked up together before these come: not all are asked for."""
    for start in range(0, len(matches), _LOOKED_UP):
        some = matches[start : start + _LOOKED_UP]
        closures.load(match.fragment for match in some)
        yield from some


def _near(matches: Sequence[SimilarityMatch]) -> list[SimilarityMatch]:
    """The matches that have a chance against the closest."""
    if not matches:
        return []
    limit = matches[0].distance * _NEAR + _NEAR_ABOVE
    return [match for match in matches if match.distance <= limit]


def prove(
    raw: bytes | memoryview,
    dtype: Dtype,
    fragment_id: FragmentId,
    encoding: Encoding,
    bases: Sequence[tuple[FragmentId, memoryview]],
) -> Fragment:
    """The fragment, once its encoding has decoded to what was encoded.

    Args:
        raw: Its bytes.
        dtype: How they read.
        fragment_id: Its id.
        encoding: How it shall be stored.
        bases: Id and bytes of each base, in the predictor's order.

    Raises:
        FragmentError: It does not decode to these bytes.
    """
    if encoding.predictor is not Predictor.RAW:
        decoded = decode(
            encoding.predictor,
            dtype,
            encoding.params,
            memoryview(encoding.payload),
            len(raw),
            [base for _, base in bases],
        )
        if not np.array_equal(np.frombuffer(decoded, np.uint8), np.frombuffer(raw, np.uint8)):
            raise FragmentError(
                f"fragment {fragment_id.short} does not decode to what was encoded (a defect of"
                " fragfs or of this machine's memory); nothing was stored",
                fragment=fragment_id.hex(),
                remedy="test the memory of this machine and report this",
            )
    return Fragment(
        id=fragment_id,
        dtype=dtype,
        raw_size=len(raw),
        raw_checksum=checksum(raw),
        predictor=encoding.predictor,
        params=encoding.params,
        payload=encoding.payload,
        bases=tuple(base for base, _ in bases),
    )
