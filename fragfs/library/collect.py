"""`fragfs gc`: drop the fragments that nothing needs, then give back the space of their records.

What is needed is found from the models' files through bases; what leases keep (`lease.py`) and what
an add stored a short while ago stays. Fragments are dropped some at a time, and packs given back
one at a time; other writers get the lock in between. Every commit leaves a library that lacks
nothing, so a run that was killed is finished by the next.

Source: FORMAT.md, "What may be deleted".
"""

from __future__ import annotations

import logging
import sqlite3
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from fragfs.errors import FormatError, StorageError
from fragfs.library.catalog import Catalog
from fragfs.library.compact import Compactor
from fragfs.library.lease import LeaseState, Ranges, live_leases, no_new_leases
from fragfs.library.progress import Progress
from fragfs.library.stats import FragmentTable, Numbers, kept_as_bases, named_fragments
from fragfs.library.writer import LibraryWriter
from fragfs.types import Predictor

__all__ = ["GRACE_S", "Collector", "GcReport", "LeaseKept"]

log = logging.getLogger(__name__)

GRACE_S = 86_400.0
"""A killed add can be resumed for a day."""

WAIT_S = 3.0
"""A mount sees a change within a second."""

_DROPPED_AT_ONCE = 50_000
"""Each part costs a pass over `similar`, which has no index by fragment."""

_POLL_S = 0.05

_UNKNOWN_HOLDER = "a reader that may not write to this library"

Mask = NDArray[np.bool_]
"""Whether each fragment is meant, by number."""


@dataclass(frozen=True, slots=True)
class LeaseKept:
    """What one holder of a lease keeps.

    Attributes:
        process: Its process id; 0 where it is not known.
        what: What it is, for example "mount on /mnt/models".
        kept_bytes: Record bytes that nothing but leases needs and that stay for it.
        everything: It may need anything, or has not said in time what it needs.
    """

    process: int
    what: str
    kept_bytes: int
    everything: bool


@dataclass(frozen=True, slots=True)
class GcReport:
    """What a garbage collection did, or would do.

    Attributes:
        dry_run: Nothing was changed: what is said to be dropped and freed would be, about.
        dropped_count: Fragments dropped.
        dropped_bytes: Their record bytes.
        freed_bytes: By how much the packs shrank; negative if they grew.
        leases: What stays for whom; two may keep the same.
        leased_bytes: Record bytes that stay for leases.
        recent_bytes: Other record bytes that stay because an add stored them within
            the grace period and no model names them yet.
        base_bytes: Record bytes that are in no file and stay because others are predicted from
            them.
        base_users: The models those others are in and the record bytes each needs, most first.
        kept_packs: Packs that were left as they are because a record in them is damaged, and why.
    """

    dry_run: bool
    dropped_count: int
    dropped_bytes: int
    freed_bytes: int
    leases: tuple[LeaseKept, ...]
    leased_bytes: int
    recent_bytes: int
    base_bytes: int
    base_users: tuple[tuple[bytes, int], ...]
    kept_packs: tuple[tuple[int, str], ...]


@dataclass(slots=True)
class _Marks:
    """What was found to be unneeded.

    Attributes:
        generation: The catalog's generation it was found at.
        table: All fragments.
        unneeded: What no model needs.
        recent: What of it an add needs that may be resumed.
        settled: Rows of `unpublished` that are older than the grace period.
        future: Rows of `unpublished` from the future.
    """

    generation: int
    table: FragmentTable
    unneeded: Mask
    recent: Mask
    settled: list[int]
    future: list[int]

    @property
    def droppable(self) -> Mask:
        """What may go, as far as leases allow."""
        return self.unneeded & ~self.recent

    def stored(self, mask: Mask) -> int:
        return int(self.table.record[mask].sum())


@dataclass(slots=True)
class _Kept:
    """What leases keep of what is unneeded."""

    mask: Mask
    leases: list[LeaseKept] = field(default_factory=list)


class Collector:
    """Runs garbage collections of one library.

    Args:
        directory: The library's directory.
        catalog: Its catalog.
        writer: Begins batches, and shrinks the catalog.
        compactor: Gives packs back.
        now_ns: The clock.
    """

    def __init__(
        self,
        directory: Path,
        catalog: Catalog,
        writer: LibraryWriter,
        compactor: Compactor,
        now_ns: Callable[[], int],
    ) -> None:
        self._directory = directory
        self._catalog = catalog
        self._writer = writer
        self._compactor = compactor
        self._now_ns = now_ns

    def run(
        self,
        progress: Progress,
        *,
        grace_s: float = GRACE_S,
        wait_s: float = WAIT_S,
        dry_run: bool = False,
    ) -> GcReport:
        """Drop what nothing needs and give its space back; see `FragmentLibrary.collect`."""
        if dry_run:
            return self._foresee(grace_s)
        before = self.pack_bytes()
        dropped, marks, kept = self._drop(grace_s, wait_s)
        try:
            self._writer.shrink_catalog()
        except StorageError as error:
            # It takes as much free space as the catalog has bytes; nothing else depends on it.
            log.warning("the catalog keeps its size: %s", error)
        kept_packs = self._compactor.run(progress)
        return self._report(
            marks,
            kept,
            dropped,
            dry_run=False,
            freed_bytes=before - self.pack_bytes(),
            kept_packs=kept_packs,
        )

    def pack_bytes(self) -> int:
        """Bytes of all pack files."""
        return self._compactor.pack_bytes()

    # --- finding what is unneeded

    def _mark(self, grace_s: float) -> _Marks:
        generation, _ = self._catalog.generation()
        table = FragmentTable(self._catalog)
        needed = np.zeros(table.size, np.bool_)
        needed[table.closure(named_fragments(self._catalog, table.size))] = True
        self._check_needed(table, np.flatnonzero(needed))
        now_ns = self._now_ns()
        young: list[tuple[int, int]] = []
        settled, future = [], []
        for first, last, stored_ns in self._catalog.rows(
            "SELECT first, last, stored_ns FROM unpublished ORDER BY first"
        ):
            if now_ns - min(stored_ns, now_ns) >= grace_s * 1e9:
                settled.append(first)
                continue
            young.append((first, last))
            if stored_ns > now_ns:
                future.append(first)
        recent = _closure(table, tuple(young)) & ~needed
        unneeded = ~needed & (table.record > 0)
        return _Marks(generation, table, unneeded, recent, settled, future)

    def _check_needed(self, table: FragmentTable, numbers: Numbers) -> None:
        """Check that all that is needed is known: where a row is lost, so is what it leads to.

        Raises:
            FormatError: The catalog is damaged.
        """
        predictor = table.predictor[numbers]
        base_count = np.count_nonzero(table.bases[:, numbers], axis=0)
        lost = table.record[numbers] <= 0
        lost |= (predictor >= Predictor.DELTA) != (base_count > 0)
        lost |= (predictor == Predictor.BLEND) & (base_count < 2)
        if lost.any():
            raise FormatError(
                f"the catalog lacks {int(np.count_nonzero(lost))} fragments that models need, or"
                " what they are predicted from; nothing was dropped",
                path=str(self._catalog.path),
                remedy="see what is wrong with: fragfs check; mend it with: fragfs check --repair",
            )

    def _kept(self, marks: _Marks, leases: Sequence[LeaseState], *, alone: bool) -> _Kept:
        """What leases keep of what is unneeded."""
        found = _Kept(np.zeros(marks.table.size, np.bool_))
        if not alone:
            leases = [*leases, LeaseState(0, _UNKNOWN_HOLDER)]
        for lease in leases:
            everything = lease.generation is None or lease.generation < marks.generation
            mask = marks.unneeded
            if not everything:
                mask = _closure(marks.table, lease.pins) & marks.unneeded
            found.mask |= mask
            if kept_bytes := marks.stored(mask):
                found.leases.append(LeaseKept(lease.process, lease.what, kept_bytes, everything))
        return found

    def _foresee(self, grace_s: float) -> GcReport:
        marks = self._mark(grace_s)
        with no_new_leases(self._directory) as alone:
            kept = self._kept(marks, live_leases(self._directory), alone=alone)
        doomed = marks.droppable & ~kept.mask
        left = marks.table.record * ~doomed
        live = np.bincount(marks.table.pack, left)
        return self._report(
            marks,
            kept,
            (int(np.count_nonzero(doomed)), marks.stored(doomed)),
            dry_run=True,
            freed_bytes=self._compactor.estimate(dict(enumerate(live.astype(np.int64).tolist()))),
            kept_packs=(),
        )

    # --- dropping

    def _drop(self, grace_s: float, wait_s: float) -> tuple[tuple[int, int], _Marks, _Kept]:
        """Drop part after part, until nothing is left that may be dropped.

        Returns:
            (count and record bytes of what was dropped, what was found last, what leases keep).
        """
        count = dropped_bytes = 0
        marks: _Marks | None = None
        generation = -1
        patience_s = wait_s
        while True:
            with self._writer.batch() as batch:
                now, _ = self._catalog.generation()
                if marks is None or now != generation:
                    # Others may have made needed what was not: under this lock nobody does.
                    marks, generation = self._mark(grace_s), now
                with no_new_leases(self._directory) as alone:
                    leases = live_leases(self._directory, remove_dead=True)
                    wait = (
                        patience_s > 0
                        and bool(marks.droppable.any())
                        and _are_behind(leases, marks)
                    )
                    if not wait:
                        kept = self._kept(marks, leases, alone=alone)
                        # Last in, first out: at no moment is a fragment there without its bases.
                        doomed = marks.table.deepest_first(
                            np.flatnonzero(marks.droppable & ~kept.mask)
                        )[:_DROPPED_AT_ONCE]
                        if doomed.size or marks.settled or marks.future:
                            batch.drop_fragments(doomed.tolist())
                            batch.commit(self._settle(marks))
                            generation += 1
            if wait:
                patience_s -= self._wait_for_leases(marks, patience_s)
                continue
            count += doomed.size
            dropped_bytes += int(marks.table.record[doomed].sum())
            marks.unneeded[doomed] = False
            marks.settled, marks.future = [], []
            if doomed.size < _DROPPED_AT_ONCE:
                return (count, dropped_bytes), marks, kept
            patience_s = wait_s

    def _settle(self, marks: _Marks) -> Callable[[sqlite3.Connection], None]:
        """Forget ranges older than the grace period; let those from the future age from now on."""
        now_ns = self._now_ns()
        settled, future = marks.settled, marks.future

        def apply(connection: sqlite3.Connection) -> None:
            connection.executemany(
                "DELETE FROM unpublished WHERE first = ?", ((first,) for first in settled)
            )
            connection.executemany(
                "UPDATE unpublished SET stored_ns = ? WHERE first = ?",
                ((now_ns, first) for first in future),
            )

        return apply

    def _wait_for_leases(self, marks: _Marks, patience_s: float) -> float:
        """Wait until every lease has seen the change; gives the seconds that took."""
        started_s = time.monotonic()
        while (waited_s := time.monotonic() - started_s) < patience_s and _are_behind(
            live_leases(self._directory), marks
        ):
            time.sleep(_POLL_S)
        return max(waited_s, _POLL_S)

    def _report(
        self,
        marks: _Marks,
        kept: _Kept,
        dropped: tuple[int, int],
        *,
        dry_run: bool,
        freed_bytes: int,
        kept_packs: tuple[tuple[int, str], ...],
    ) -> GcReport:
        base_bytes, base_users = kept_as_bases(self._catalog)
        return GcReport(
            dry_run=dry_run,
            dropped_count=dropped[0],
            dropped_bytes=dropped[1],
            freed_bytes=freed_bytes,
            leases=tuple(kept.leases),
            leased_bytes=marks.stored(kept.mask),
            recent_bytes=marks.stored(marks.recent & ~kept.mask),
            base_bytes=base_bytes,
            base_users=tuple(base_users),
            kept_packs=kept_packs,
        )


def _are_behind(leases: Sequence[LeaseState], marks: _Marks) -> bool:
    """Whether a holder that will say what it needs has not seen the catalog as it is."""
    return any(
        lease.generation is not None and lease.generation < marks.generation for lease in leases
    )


def _closure(table: FragmentTable, ranges: Ranges) -> Mask:
    """The fragments of some ranges that there are, and all that decoding them takes."""
    mask = np.zeros(table.size, np.bool_)
    for first, last in ranges:
        mask[max(first, 0) : last + 1] = True
    mask &= table.record > 0
    mask[table.closure(np.flatnonzero(mask))] = True
    return mask
