"""What one process sees of the decoded fragments: what it holds, then what all share."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from fragfs.cache.memory import MemoryFragmentCache
from fragfs.cache.shared import FragmentFile, SharedFragmentCache
from fragfs.types import Fragment, FragmentIdentity

__all__ = ["BASE_CREDIT_S", "SERVED_CREDIT_S", "LayeredFragmentCache", "leaving_credit_s"]

_IDENTITIES_MAX = 1 << 14
_FILE_BYTES_MIN = 64 << 10
_CREDIT_S = 10.0
BASE_CREDIT_S = 600.0
SERVED_CREDIT_S = -3600.0
"""See `SharedFragmentCache.touch`: of what others are predicted from, and of other fragments once
they were served."""

_TYPICAL_NS_PER_BYTE = 1.0


def leaving_credit_s(decode_ns: int, raw_size: int, *, is_base: bool) -> float:
    """How much later than its last use a fragment counts as used, for what its loss would cost.

    Args:
        decode_ns: What its decode took, bases not included.
        raw_size: Bytes it has.
        is_base: Whether others are predicted from it.
    """
    cost = min(8.0, decode_ns / max(1, raw_size) / _TYPICAL_NS_PER_BYTE)
    return cost * (BASE_CREDIT_S if is_base else _CREDIT_S)


class LayeredFragmentCache:
    """A `DecodedSource` over views held by this process and the files shared with others.

    Args:
        identify_all: What fragments are, by number; asked for what is not known from before.
        held: What this process has at hand: open files of the shared cache, or bytes.
        shared: What all hold; None keeps to what this process holds.
    """

    def __init__(
        self,
        identify_all: Callable[[Sequence[int]], list[FragmentIdentity]],
        held: MemoryFragmentCache[memoryview | FragmentFile],
        shared: SharedFragmentCache | None,
    ) -> None:
        self._identify_all = identify_all
        # To ask each time would be half the cost of finding a fragment.
        self._identities: dict[int, FragmentIdentity] = {}
        self.held = held
        self.shared = shared

    def find(self, number: int, *, check: bool = False) -> memoryview | FragmentFile | None:
        """A fragment, or None if it has to be decoded.

        Args:
            number: The fragment.
            check: Check its bytes now; those that only this process holds nobody can have changed.
        """
        return self._find(number, check=check, is_base=False)

    def _find(self, number: int, *, check: bool, is_base: bool) -> memoryview | FragmentFile | None:
        found = self.held.get(number)
        if self.shared is None:
            return found
        if found is None:
            return self._find_shared(self.shared, number, check=check, is_base=is_base)
        if (
            check
            and isinstance(found, FragmentFile)
            and not self.shared.recheck(found, self.identify(number).id)
        ):
            self.held.drop(number)
            return None
        return found

    def _find_shared(
        self, shared: SharedFragmentCache, number: int, *, check: bool, is_base: bool
    ) -> FragmentFile | None:
        identity = self.identify(number)
        # A small one is not worth a descriptor; once it is copied, nobody could check it any more.
        is_small = identity.raw_size < _FILE_BYTES_MIN
        file = shared.get(identity.id, identity.raw_size, check=check or is_small)
        if file is not None:
            self.held.put(number, file.view() if is_small else file)
            shared.touch(identity.id, BASE_CREDIT_S if is_base else self.served_credit_s(number))
        return file

    def served_credit_s(self, number: int) -> float:
        """How much later than its last use a fragment counts as used, once it was served."""
        return BASE_CREDIT_S if self.identify(number).is_base else SERVED_CREDIT_S

    def get(self, number: int) -> memoryview | None:
        """The bytes of a fragment to decode another with, or None if they have to be decoded.

        What anybody could have changed is checked each time: what is decoded from wrong bytes is
        refused, and the blame falls on a pack that is right. That costs a thirtieth of a
        decode: 0.05 ms for a base of 1 MiB just used, 0.1 ms for one that is not in the processor's
        caches, of 1.5 ms for what is predicted from it (bf16, EPYC, 2026-11).
        """
        # Whoever asks for one decodes with it, whether or not that is known here.
        found = self._find(number, check=True, is_base=True)
        return found.view() if isinstance(found, FragmentFile) else found

    def drop_identities(self) -> None:
        """Ask again what fragments are: others may have become bases, or have been given some."""
        self._identities = {}

    def identify(self, number: int) -> FragmentIdentity:
        """What a fragment is; whether it has bases or is one as of when it was first asked for."""
        identity = self._identities.get(number)
        return identity if identity is not None else self.identify_all((number,))[0]

    def note_identity(self, fragment: FragmentIdentity) -> None:
        """Learn what a fragment is from somebody who knows."""
        if len(self._identities) >= _IDENTITIES_MAX:
            self._identities = {}
        self._identities[fragment.number] = fragment

    def identify_all(self, numbers: Sequence[int]) -> list[FragmentIdentity]:
        """What some fragments are, in their order: a third of the time of one after the other."""
        known = self._identities
        unknown = [number for number in numbers if number not in known]
        if unknown:
            found = {identity.number: identity for identity in self._identify_all(unknown)}
            if len(known) + len(found) > _IDENTITIES_MAX:
                found |= {number: known[number] for number in numbers if number in known}
                known = self._identities = {}
            known.update(found)
        return [known[number] for number in numbers]

    def holds(self, number: int) -> bool:
        """Whether a fragment is at hand; one in the shared cache may leave at any moment."""
        if self.held.holds(number):
            return True
        return self.shared is not None and self.shared.holds(self.identify(number).id)

    def put(self, number: int, raw: memoryview, record: Fragment | None = None) -> None:
        """Keep the bytes of a fragment, for this process and, if there is room, for all."""
        self.held.put(number, raw)
        if self.shared is not None:
            self.publish(self.identify(number), raw, record)

    def publish(
        self,
        fragment: FragmentIdentity,
        raw: memoryview,
        record: Fragment | None = None,
        *,
        decode_ns: int | None = None,
    ) -> bool:
        """Put a fragment where all processes find it; False if there is no room for it.

        Args:
            fragment: What it is.
            raw: All its bytes, checked.
            record: What they were decoded from, whose id and checksum are right in any case.
            decode_ns: What its decode took, bases not included; None if nobody knows.
        """
        if self.shared is None:
            return False
        if decode_ns is None:
            decode_ns = int(raw.nbytes * _TYPICAL_NS_PER_BYTE)
        credit_s = leaving_credit_s(decode_ns, fragment.raw_size, is_base=fragment.is_base)
        if record is None:
            return self.shared.put(fragment.id, raw, credit_s)
        return self.shared.put(record.id, raw, credit_s, record.raw_checksum)
