"""Which record of each fragment a rebuilt catalog points to. Pure.

A fragment may have several records: it was replaced, or copied to another pack. The newest counts,
unless it is damaged or rests on what is lost: then an older one does. A record is only taken once
all its bases are settled, so what is taken can never form a cycle.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from fragfs.types import FragmentId

__all__ = ["Candidate", "Resolved", "resolve_fragments"]


@dataclass(frozen=True, slots=True)
class Candidate:
    """A record of a fragment.

    Attributes:
        pack: The pack it is in.
        offset: Where in it.
        record_size: Its bytes.
        raw_size: Bytes after decoding.
        predictor: What its residual is taken against.
        bases: Ids of the fragments its prediction reads.
        sound: Whether its stored bytes match their checksum, in a pack that can be read.
        found_by_search: Whether damage before it made it a guess, which must be proven by decoding.
    """

    pack: int
    offset: int
    record_size: int
    raw_size: int
    predictor: int
    bases: tuple[FragmentId, ...]
    sound: bool
    found_by_search: bool


@dataclass(frozen=True, slots=True)
class Resolved:
    """What was decided.

    Attributes:
        records: The record of each fragment that has a usable one.
        lost: Why, by id, for fragments that others need and that have none.
    """

    records: dict[FragmentId, Candidate]
    lost: dict[FragmentId, str]


def resolve_fragments(
    candidates: Mapping[FragmentId, Sequence[Candidate]], closure_max: int
) -> Resolved:
    """Choose a record for each fragment.

    Args:
        candidates: The records of each fragment, the newest first.
        closure_max: How many fragments decoding one may take.
    """
    resolver = _Resolver(candidates, closure_max)
    resolver.settle(lambda record: record.sound and not record.found_by_search)
    resolver.settle(lambda record: record.sound)
    resolver.settle(lambda _: True)
    while resolver.give_up_bases():
        resolver.settle(lambda _: True)
    resolver.give_up_rings()
    return Resolved(resolver.records, resolver.lost)


class _Resolver:
    def __init__(
        self, candidates: Mapping[FragmentId, Sequence[Candidate]], closure_max: int
    ) -> None:
        self._candidates = candidates
        self._closure_max = closure_max
        self._pending = set(candidates)
        self.records: dict[FragmentId, Candidate] = {}
        self.lost: dict[FragmentId, str] = {}

    def settle(self, admits: Callable[[Candidate], bool]) -> None:
        """Take the newest admitted record that rests on settled fragments, older ones last."""
        rank = 1
        while self._pending:
            taken = False
            deepest = 0
            for fragment in list(self._pending):
                admitted = [record for record in self._candidates[fragment] if admits(record)]
                deepest = max(deepest, len(admitted))
                for record in admitted[:rank]:
                    if self._is_usable(record):
                        self.records[fragment] = record
                        self._pending.discard(fragment)
                        taken = True
                        break
            if taken:
                rank = 1
            elif rank >= deepest:
                return
            else:
                rank += 1

    def give_up_bases(self) -> bool:
        """Count bases without any record as lost, so that what rests on them can be named."""
        found = {
            base
            for fragment in self._pending
            for record in self._candidates[fragment]
            for base in record.bases
            if base not in self._candidates and base not in self.lost
        }
        self.lost.update(dict.fromkeys(sorted(found), "no pack has its record any more"))
        return bool(found)

    def give_up_rings(self) -> None:
        """What is left is predicted from itself, or from too many others."""
        reason = "its records are predicted from each other, or from too many others"
        self.lost.update(dict.fromkeys(sorted(self._pending), reason))

    def _is_usable(self, record: Candidate) -> bool:
        closure: set[FragmentId] = set()
        waiting = list(record.bases)
        while waiting:
            base = waiting.pop()
            if base in closure:
                continue
            settled = self.records.get(base)
            if settled is None and base not in self.lost:
                return False
            closure.add(base)
            if len(closure) >= self._closure_max:
                return False
            waiting += settled.bases if settled is not None else ()
        return True
