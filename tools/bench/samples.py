"""What readers took, round by round, and what that comes to: medians, and medians of ratios.

Pure. A machine's speed changes while a benchmark runs: only what was measured in the same round is
divided by each other.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

__all__ = ["Sample", "Samples", "median"]


@dataclass(frozen=True)
class Sample:
    """One run of one reader.

    Attributes:
        seconds: What it took.
        size: Bytes it read.
        p50: Median of single touches, in seconds; None if it did not time them.
        p99: Their 99th percentile.
        cpu_s: Processor time of the server meanwhile; None without a server.
        anon_bytes: Most RssAnon of the server.
        counters: By how much the server's counters grew; empty if it has none.
        leftover: Share of the file that was in the page cache although it should not have been.
    """

    seconds: float
    size: int
    p50: float | None = None
    p99: float | None = None
    cpu_s: float | None = None
    anon_bytes: int | None = None
    counters: Mapping[str, float] = field(default_factory=dict)
    leftover: float = 0.0

    @property
    def rate(self) -> float:
        """Bytes per second."""
        return self.size / self.seconds


Key = tuple[str, str]
"""State and method."""


def median(values: Iterable[float | None]) -> float | None:
    """The median of what is known; None if nothing is."""
    known = [value for value in values if value is not None]
    return statistics.median(known) if known else None


class Samples:
    """All samples of a run, by state, method and round."""

    def __init__(self) -> None:
        self._rounds: dict[Key, dict[int, Sample]] = {}

    def add(self, state: str, method: str, round_number: int, sample: Sample) -> None:
        """Keep one."""
        self._rounds.setdefault((state, method), {})[round_number] = sample

    def of(self, state: str, method: str) -> list[Sample]:
        """Those of one state and method, in the order of rounds."""
        return [sample for _, sample in sorted(self._rounds.get((state, method), {}).items())]

    def states(self) -> list[str]:
        """The states that have samples."""
        return list(dict.fromkeys(state for state, _ in self._rounds))

    def rate(self, state: str, method: str) -> float | None:
        """Median of bytes per second."""
        return median(sample.rate for sample in self.of(state, method))

    def seconds(self, state: str, method: str) -> float | None:
        """Median of what it took."""
        return median(sample.seconds for sample in self.of(state, method))

    def p50(self, state: str, method: str) -> float | None:
        """Median of the medians of single touches."""
        return median(sample.p50 for sample in self.of(state, method))

    def p99(self, state: str, method: str) -> float | None:
        """Median of the 99th percentiles of single touches."""
        return median(sample.p99 for sample in self.of(state, method))

    def counter(self, state: str, method: str, name: str) -> float | None:
        """Median of what a counter of the server grew by."""
        return median(sample.counters.get(name) for sample in self.of(state, method))

    def ratio(self, over: Key, under: Key) -> float | None:
        """Median over rounds of one rate divided by another of the same round."""
        tops, bottoms = self._rounds.get(over, {}), self._rounds.get(under, {})
        return median(
            tops[number].rate / bottoms[number].rate for number in tops.keys() & bottoms.keys()
        )

    def ratio_of_p50(self, over: Key, under: Key) -> float | None:
        """Median over rounds of one median touch divided by another of the same round."""
        pairs = ((self._rounds.get(key, {})) for key in (over, under))
        tops, bottoms = pairs
        found = []
        for number in tops.keys() & bottoms.keys():
            top, bottom = tops[number].p50, bottoms[number].p50
            if top is not None and bottom:
                found.append(top / bottom)
        return median(found)

    def share_of_bound(self, what: Key, parts: Iterable[tuple[float, Key]]) -> float | None:
        """Median over rounds of seconds divided by a weighted sum of others' seconds."""
        weighted = list(parts)
        found = []
        for number, sample in self._rounds.get(what, {}).items():
            others = [self._rounds.get(key, {}).get(number) for _, key in weighted]
            if all(others):
                bound = sum(
                    weight * other.seconds
                    for (weight, _), other in zip(weighted, others, strict=True)
                    if other is not None
                )
                found.append(sample.seconds / bound)
        return median(found)
