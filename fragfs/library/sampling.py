"""What a sample says about all: stored sizes of fragments of which only some were encoded. Pure.

Fragments that resemble one another form a *stratum*: those of one tensor in all layers, say.
Samples are spread evenly over it in file order, because what a fine-tune changed varies smoothly
along layers and vocabularies. What was not encoded is interpolated between its neighbours. Where
those differ much, more is sampled.
"""

from __future__ import annotations

import math
import re
from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate, pairwise

from fragfs.library.records import FRAGMENT_HEADER, RECORD_HEADER
from fragfs.types import Dtype, SpanKind

__all__ = ["MARGIN_AIM", "Outcome", "Stratum", "StratumKey", "form_strata", "margin_of", "pick"]

MARGIN_AIM = 0.05
"""Margin, as a share of the estimate, at which sampling stops."""

_FIRST_SHARE = 1 / 12
"""Share of a stratum's fragments that is sampled first."""
_BYTES_SHARE_MAX = 0.3
"""Share of all bytes that may be sampled: encoding is nearly all that an add takes its time for."""
_BYTES_FREE = 1 << 20
"""Where no more bytes than these are new, all are encoded."""
_SAMPLES_MIN = 2
"""Fewest samples of a stratum of twice as many: one says nothing about how fragments differ."""
_ALONE_MIN = 1 / 200
"""Strata with a smaller share of all bytes are joined with others of their dtype."""
_DEVIATIONS = 1.6
"""Standard deviations that a margin stands for: nine estimates of ten are no further off."""

_OVERHEAD = RECORD_HEADER.size + FRAGMENT_HEADER.size
"""Record bytes that do not depend on a fragment's size."""


@dataclass(frozen=True, slots=True)
class StratumKey:
    """What fragments of a stratum have in common.

    Attributes:
        source: Which of the paths they are from: models differ more than tensors of one.
        dtype: How their bytes read.
        kind: What they are.
        name: Name of their tensor with all numbers left out; "" for a mixture.
    """

    source: int
    dtype: Dtype
    kind: SpanKind
    name: str

    @classmethod
    def of(cls, source: int, dtype: Dtype, kind: SpanKind, tensor: str | None) -> StratumKey:
        """The key of a fragment of the tensor of this name."""
        return cls(source, dtype, kind, re.sub(r"\d+", "#", tensor or ""))


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a sampled fragment is stored.

    Attributes:
        stored_bytes: Bytes of its record.
        mechanism: What it is predicted by.
    """

    stored_bytes: int
    mechanism: str


@dataclass(slots=True)
class Stratum:
    """Fragments that resemble one another, in file order.

    Attributes:
        key: What they have in common.
        pieces: Which fragments they are, by the caller's count.
        sizes: Their raw bytes.
        outcomes: What became of the sampled ones, by position in the stratum.
    """

    key: StratumKey
    pieces: list[int] = field(default_factory=list)
    sizes: list[int] = field(default_factory=list)
    outcomes: dict[int, Outcome] = field(default_factory=dict)

    def add(self, piece: int, size: int) -> None:
        """Take the next fragment."""
        self.pieces.append(piece)
        self.sizes.append(size)

    @property
    def raw_bytes(self) -> int:
        """Bytes of all fragments."""
        return sum(self.sizes)

    def spread(self, count: int) -> list[int]:
        """Positions to sample, so that with those known about `count` lie evenly among the bytes.

        By bytes, because a tensor's last fragment is a short one: in turn with others it might be
        all that is sampled.
        """
        ends = list(accumulate(self.sizes))
        if count >= len(ends):
            return sorted(set(range(len(ends))) - self.outcomes.keys())
        wanted = {
            bisect_right(ends, (2 * index + 1) * ends[-1] // (2 * count)) for index in range(count)
        }
        return sorted(wanted - self.outcomes.keys())

    def shares(self) -> list[tuple[int, float]]:
        """(position, stored bytes per raw byte, without what every record takes) of the samples."""
        return [
            (at, max(0, outcome.stored_bytes - _OVERHEAD) / self.sizes[at])
            for at, outcome in sorted(self.outcomes.items())
        ]

    def estimate(self) -> list[tuple[str, int, float]]:
        """(mechanism, raw bytes, stored bytes) of each fragment, in order."""
        shares = self.shares()
        places = [at for at, _ in shares]
        found = []
        for at, size in enumerate(self.sizes):
            known = self.outcomes.get(at)
            if known is not None:
                found.append((known.mechanism, size, float(known.stored_bytes)))
                continue
            after = bisect_left(places, at)
            low, high = shares[max(0, after - 1)], shares[min(after, len(shares) - 1)]
            part = (at - low[0]) / (high[0] - low[0]) if low[0] < at < high[0] else 0.0
            share = low[1] + (high[1] - low[1]) * part
            nearer = high[0] if part > 0.5 else low[0]
            found.append((self.outcomes[nearer].mechanism, size, _OVERHEAD + share * size))
        return found

    def steps(self) -> list[float]:
        """Squared differences between the shares of neighbouring samples."""
        shares = [share for _, share in self.shares()]
        return [(high - low) ** 2 for low, high in pairwise(shares)]

    def variance(self, prior: float) -> float:
        """Variance of the sum of stored bytes, from how much neighbouring samples differ.

        Args:
            prior: Mean squared difference in strata of the same kind. It counts as one more pair:
                few samples that agree may do so by chance.
        """
        unknown = [size for at, size in enumerate(self.sizes) if at not in self.outcomes]
        steps = [*self.steps(), prior]
        # Each sample stands for its neighbours, whose own differences average out.
        return (sum(steps) / 2 / len(steps)) * (
            sum(unknown) ** 2 / max(1, len(self.outcomes)) + sum(size**2 for size in unknown)
        )


def form_strata(pieces: Sequence[tuple[StratumKey, int]]) -> list[Stratum]:
    """Sort fragments into strata.

    Args:
        pieces: Key and raw bytes of each fragment.
    """
    sizes: dict[StratumKey, int] = {}
    for key, size in pieces:
        sizes[key] = sizes.get(key, 0) + size
    limit = sum(sizes.values()) * _ALONE_MIN
    strata: dict[StratumKey, Stratum] = {}
    # By name, for the mixtures: in file order, kinds of tensors take turns, and so might samples.
    for number in sorted(range(len(pieces)), key=lambda number: pieces[number][0].name):
        key, size = pieces[number]
        if sizes[key] < limit:
            key = replace(key, name="")
        strata.setdefault(key, Stratum(key)).add(number, size)
    return list(strata.values())


def margin_of(strata: Sequence[Stratum]) -> float:
    """How far off the sum of the estimates may be, in bytes."""
    return _DEVIATIONS * math.sqrt(sum(_variances(strata)))


def _variances(strata: Sequence[Stratum]) -> list[float]:
    """Variance of each stratum's estimate."""
    steps: dict[StratumKey, list[float]] = {}
    for stratum in strata:
        steps.setdefault(replace(stratum.key, name=""), []).extend(stratum.steps())
    priors = {kind: sum(found) / len(found) if found else 0.0 for kind, found in steps.items()}
    return [stratum.variance(priors[replace(stratum.key, name="")]) for stratum in strata]


def pick(strata: Sequence[Stratum]) -> list[tuple[Stratum, int]]:
    """What to sample next: (stratum, position in it); empty once the estimate is good enough."""
    raw_bytes = sum(stratum.raw_bytes for stratum in strata)
    if not any(stratum.outcomes for stratum in strata):
        return [
            (stratum, at)
            for stratum in strata
            for at in stratum.spread(_first_count(stratum, raw_bytes))
        ]
    stored = sum(part for stratum in strata for _, _, part in stratum.estimate())
    if margin_of(strata) <= MARGIN_AIM * stored:
        return []
    left = raw_bytes * _BYTES_SHARE_MAX - sum(
        stratum.sizes[at] for stratum in strata for at in stratum.outcomes
    )
    # Where most can be learnt first. A few strata at a time: they may settle it.
    picked: list[tuple[Stratum, int]] = []
    ranked = sorted(zip(_variances(strata), strata, strict=True), key=lambda item: -item[0])
    for variance, stratum in ranked:
        if not variance or len(picked) >= len(strata):
            break
        for at in stratum.spread(2 * len(stratum.outcomes) + 1):
            left -= stratum.sizes[at]
            if left < 0:
                return picked
            picked.append((stratum, at))
    return picked


def _first_count(stratum: Stratum, total_bytes: int) -> int:
    count = len(stratum.sizes)
    if total_bytes <= _BYTES_FREE:
        return count
    return max(_SAMPLES_MIN if count >= 2 * _SAMPLES_MIN else 1, math.ceil(count * _FIRST_SHARE))
