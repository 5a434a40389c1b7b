"""What a library's packs say about its past, the catalog not asked.

Which batches were committed, in what order, and which models come of that: see FORMAT.md, "Recovery
by scan".
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass

from fragfs.errors import FragmentError
from fragfs.library.manifests import StoredManifest, parse_manifest
from fragfs.library.records import RecordKind, RetiredBatch, parse_retirement
from fragfs.library.scan import FoundBatch, FoundRecord, PackScan

__all__ = [
    "CommittedBatches",
    "History",
    "ModelsOfPacks",
    "committed_batches",
    "is_believed",
    "replay_models",
]

_FIRST_PARENT = bytes(16)


@dataclass(frozen=True, slots=True)
class CommittedBatches:
    """The chain of parents, from the first batch to the newest.

    Attributes:
        batches: Those that are in the packs, in the order of their commits.
        tip: The newest; None if there is none.
        missing: (first, last) generations of each stretch that no pack has and no RETIREMENT
            vouches for, the newest first.
    """

    batches: tuple[FoundBatch, ...]
    tip: FoundBatch | None
    missing: tuple[tuple[int, int], ...]


def committed_batches(
    batches: Iterable[FoundBatch], interrupted: Collection[bytes]
) -> CommittedBatches:
    """Tell the batches that were committed from what interrupted commits left.

    A batch that another names as its parent was committed. The newest is nobody's parent: it is the
    one with the highest generation, and of those the last to be written, for a writer that finds
    leavings begins a new pack.

    Args:
        batches: Every batch with a trailer.
        interrupted: Ids that `batch.intent` names; one of them is only believed if it is whole.
    """
    found = sorted(batches, key=lambda b: (b.trailer.generation, b.pack, b.end))
    by_id = {batch.trailer.batch: batch for batch in found}
    gone = {link.batch: link for batch in found for link in _vouched_for(batch)}
    chain: list[FoundBatch] = []
    missing: list[tuple[int, int]] = []
    candidates = [b for b in found if b.whole or b.trailer.batch not in interrupted]
    tip = candidates[-1] if candidates else None
    link: RetiredBatch | None = None if tip is None else _link(tip)
    seen: set[bytes] = set()
    while link is not None:
        if link.batch in seen:
            break  # only a forged pack can make a ring
        seen.add(link.batch)
        if link.batch in by_id:
            chain.append(by_id[link.batch])
        if link.parent == _FIRST_PARENT:
            break
        below = by_id.get(link.parent)
        if below is not None:
            link = _link(below)
        elif link.parent in gone:
            link = gone[link.parent]
        else:
            # The pack with the parent is lost. A batch of the parent's generation that is not the
            # parent was never committed; of those before it the newest is believed.
            older = [b for b in candidates if b.trailer.generation < link.generation - 1]
            last = link.generation - 1
            first = older[-1].trailer.generation + 1 if older else 1
            missing.append((first, last))
            link = _link(older[-1]) if older else None
    chain.reverse()
    return CommittedBatches(tuple(chain), tip, tuple(missing))


def _link(batch: FoundBatch) -> RetiredBatch:
    return RetiredBatch(batch.trailer.generation, batch.trailer.batch, batch.trailer.parent)


def _vouched_for(batch: FoundBatch) -> list[RetiredBatch]:
    found = []
    for record in batch.records:
        if record.header.kind is RecordKind.RETIREMENT and record.intact:
            try:
                found += parse_retirement(record.payload)
            except FragmentError:
                continue
    return found


@dataclass(frozen=True, slots=True)
class ModelsOfPacks:
    """What the records of committed batches amount to.

    Attributes:
        models: The newest manifest of each model that was not removed since, the newest last.
        damaged: (pack, offset) of manifests and removals that cannot be read.
        content_number_max: The highest content number of any manifest, also of removed models.
    """

    models: dict[bytes, StoredManifest]
    damaged: tuple[tuple[int, int], ...]
    content_number_max: int


def replay_models(batches: Sequence[FoundBatch]) -> ModelsOfPacks:
    """Apply manifests and removals, in the order of commits."""
    models: dict[bytes, StoredManifest] = {}
    damaged = []
    highest = 0
    for batch in batches:
        for record in batch.records:
            kind = record.header.kind
            if kind not in (RecordKind.MANIFEST, RecordKind.REMOVAL):
                continue
            if not is_believed(batch, record):
                damaged.append((batch.pack, record.offset))
                continue
            if kind is RecordKind.REMOVAL:
                models.pop(record.payload, None)
                continue
            try:
                manifest = parse_manifest(
                    record.payload, f"pack {batch.pack} at offset {record.offset}"
                )
            except FragmentError:
                damaged.append((batch.pack, record.offset))
                continue
            models.pop(manifest.name, None)  # the newest shall be last
            models[manifest.name] = manifest
            highest = max([highest, *(content.number for content in manifest.contents)])
    return ModelsOfPacks(models, tuple(damaged), highest)


def is_believed(batch: FoundBatch, record: FoundRecord) -> bool:
    """Whether a record that does not prove itself is one that a writer wrote, and as it was."""
    return record.intact and (not record.found_by_search or batch.counted)


class History:
    """Collects what packs say besides fragments, pack by pack."""

    def __init__(self) -> None:
        self._batches: list[FoundBatch] = []

    def add(self, scan: PackScan) -> None:
        """Remember the batches of a pack, without their fragments."""
        for batch in scan.batches:
            plain = tuple(r for r in batch.records if r.header.kind is not RecordKind.FRAGMENT)
            self._batches.append(
                FoundBatch(batch.pack, batch.trailer, plain, batch.whole, batch.counted, batch.end)
            )

    def committed(self, interrupted: Collection[bytes]) -> CommittedBatches:
        """See `committed_batches`."""
        return committed_batches(self._batches, interrupted)
