"""Writing the tables of a rebuilt catalog: see `rebuild.py`."""

from __future__ import annotations

import sqlite3
from array import array
from collections.abc import Iterable, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path

from fragfs.errors import FragmentError
from fragfs.library.appender import PackState
from fragfs.library.catalog import NO_PACK, create_catalog
from fragfs.library.extents import ExtentMap
from fragfs.library.former import FormerCatalog
from fragfs.library.history import ModelsOfPacks
from fragfs.library.manifests import ManifestContent, StoredManifest
from fragfs.library.names import as_name, parents, printable, split
from fragfs.library.records import PackHeader
from fragfs.library.resolve import Resolved
from fragfs.library.schema import FIRST_CONTENT
from fragfs.types import FRAGMENT_BYTES_MAX, FragmentId, SpanKind

__all__ = ["PackRow", "RebuiltCatalog"]

_CONTENT_GAP = 1 << 24
"""Content numbers skipped where no catalog tells how many were used: more than any library has
removed, and 32-bit inode numbers last for 200 rebuilds."""
_NUMBER_MAX = 1 << 62
_FIRST_SPAN = 0x80
_SPAN_KINDS = {kind | first for kind in SpanKind for first in (0, _FIRST_SPAN)}


@dataclass(frozen=True, slots=True)
class PackRow:
    """A pack as the new catalog has it.

    Attributes:
        number: Its number.
        committed_size: Where the last committed batch in it ends, or what else is to be kept.
        file_size: Its bytes.
        has_index: Whether it is complete, with an index.
        has_header: Whether it has a header that readers accept.
        is_readable: Whether all its records are readable: nothing is written behind damage.
    """

    number: int
    committed_size: int
    file_size: int
    has_index: bool
    has_header: bool
    is_readable: bool


@dataclass(slots=True)
class RebuiltCatalog:
    """All that goes into a new catalog.

    Attributes:
        header: Identity and settings of the library.
        generation: Of the newest batch.
        batch: Its id.
        packs: Every pack.
        told: The models that packs tell of.
        resolved: The record of every fragment.
        record_count: Fragment records in all packs: no more numbers were used since `former`.
        formers: Older catalogs of this library.
        notes: Gets what could not be taken over.
    """

    header: PackHeader
    generation: int
    batch: bytes
    packs: Sequence[PackRow]
    told: ModelsOfPacks
    resolved: Resolved
    record_count: int
    formers: Sequence[FormerCatalog]
    notes: list[str]
    _numbers: dict[FragmentId, int] = field(default_factory=dict)
    _contents: dict[int, tuple[bytes, int]] = field(default_factory=dict)
    _used_fragments: int = 0

    def write(self, path: Path, now_ns: int) -> tuple[int, int, int]:
        """Write the database at a name that nobody uses.

        Args:
            path: Where.
            now_ns: The time.

        Returns:
            How many models, files and fragments are in it.
        """
        create_catalog(path, self.header.library_uuid, self.header.config, now_ns)
        models = self._sound_models()
        with closing(sqlite3.connect(path, isolation_level=None)) as connection:
            connection.execute("PRAGMA synchronous = FULL")
            connection.execute("BEGIN IMMEDIATE")
            fragment_count = self._write_fragments(connection, models, now_ns)
            self._write_packs(connection)
            file_count = self._write_models(connection, models, now_ns)
            generation = max([self.generation, *(f.generation for f in self.formers)])
            connection.execute(
                "UPDATE library SET generation = ?, batch = ?", (generation, self.batch)
            )
            connection.execute("COMMIT")
        return len(models), file_count, fragment_count

    # --- which models

    def _sound_models(self) -> list[StoredManifest]:
        """The models whose manifests make sense together, in the order of their commits."""
        accepted: dict[bytes, StoredManifest] = {}
        folders: set[bytes] = set()
        for name, manifest in reversed(self.told.models.items()):
            why = _nonsense(manifest) or self._beyond_a_fragment(manifest)
            if not why and (name in folders or any(above in accepted for above in parents(name))):
                why = "it lies inside a newer model, or a newer one inside it"
            if why:
                self.notes.append(f"the model {printable(name)} is left out: {why}")
                continue
            accepted[name] = manifest
            folders.update(parents(name))
        return list(reversed(accepted.values()))

    def _beyond_a_fragment(self, manifest: StoredManifest) -> str:
        records = self.resolved.records
        for content in manifest.contents:
            for fragment, size, offset in zip(
                _ids(content), content.sizes, content.offsets, strict=True
            ):
                if fragment in records and size + offset > records[fragment].raw_size:
                    return "it reaches beyond the end of a fragment"
        return ""

    # --- fragments

    def _write_fragments(
        self, connection: sqlite3.Connection, models: Iterable[StoredManifest], now_ns: int
    ) -> int:
        records, lost = self.resolved.records, dict(self.resolved.lost)
        raw_sizes: dict[FragmentId, int] = {}
        for manifest in models:
            for content in manifest.contents:
                for fragment, size, offset in zip(
                    _ids(content), content.sizes, content.offsets, strict=True
                ):
                    raw_sizes[fragment] = max(raw_sizes.get(fragment, 0), size + offset)
                    if fragment not in records and fragment not in lost:
                        lost[fragment] = "no pack has its record any more"
        needed = self._needed(raw_sizes.keys())
        kept = {f: record for f, record in records.items() if record.sound or f in needed}
        lost = {fragment: why for fragment, why in lost.items() if fragment in needed}
        self._number_fragments([*kept, *lost])
        rows = [
            (self._numbers[f], f, r.pack, r.offset, r.record_size, r.raw_size, r.predictor)
            for f, r in kept.items()
        ]
        # A record of one byte in no pack: there, so that it can be named, and never readable.
        rows += [
            (self._numbers[f], f, NO_PACK, 0, 1, raw_sizes.get(f, FRAGMENT_BYTES_MAX), 0)
            for f in lost
        ]
        connection.executemany("INSERT INTO fragments VALUES (?, ?, ?, ?, ?, ?, ?)", sorted(rows))
        connection.executemany(
            "INSERT INTO bases VALUES (?, ?, ?)",
            sorted(
                (self._numbers[f], position, self._numbers[base])
                for f, record in kept.items()
                for position, base in enumerate(record.bases)
            ),
        )
        damaged = "its stored bytes, or the header of its pack, are damaged"
        reasons = {f: damaged for f, record in kept.items() if not record.sound} | lost
        connection.executemany(
            "INSERT INTO quarantine VALUES (?, ?, ?)",
            sorted(
                (self._numbers[f], now_ns, f"fragment {f.short}: {why}")
                for f, why in reasons.items()
            ),
        )
        return len(rows)

    def _needed(self, named: Iterable[FragmentId]) -> set[FragmentId]:
        """Some fragments, and all that decoding them, or anything sound, takes."""
        records = self.resolved.records
        needed: set[FragmentId] = set()
        waiting = [*named, *(f for f, record in records.items() if record.sound)]
        while waiting:
            fragment = waiting.pop()
            if fragment not in needed:
                needed.add(fragment)
                record = records.get(fragment)
                waiting += record.bases if record is not None else ()
        return needed

    def _number_fragments(self, fragments: Iterable[FragmentId]) -> None:
        """Give every fragment the number it had, else one that was never used."""
        newest = max(self.formers, key=lambda former: former.generation, default=None)
        used = max((former.used.get("fragments", 0) for former in self.formers), default=0)
        if newest is None or newest.generation < self.generation:
            used += self.record_count
        taken = set()
        for fragment in fragments:
            number = newest.numbers.get(fragment) if newest is not None else None
            if number is None or number in taken:
                used += 1
                number = used
            taken.add(number)
            self._numbers[fragment] = number
        self._used_fragments = used

    # --- packs

    def _write_packs(self, connection: sqlite3.Connection) -> None:
        last = max((pack.number for pack in self.packs), default=0)
        rows = []
        for pack in self.packs:
            if pack.has_index:
                rows.append((pack.number, pack.file_size, pack.file_size, PackState.SEALED))
                continue
            is_whole = pack.has_header and pack.committed_size == pack.file_size
            is_open = is_whole and pack.is_readable and pack.number == last
            state = PackState.OPEN if is_open else PackState.ABANDONED
            rows.append((pack.number, pack.committed_size, pack.file_size, state))
        known = max((former.pack_max for former in self.formers), default=0)
        if known > last:
            # Gone, and its number is never used again.
            rows.append((known, 0, 0, PackState.RETIRED))
        connection.executemany("INSERT INTO packs VALUES (?, ?, ?, ?)", rows)

    # --- models

    def _write_models(
        self, connection: sqlite3.Connection, models: Iterable[StoredManifest], now_ns: int
    ) -> int:
        used = max(
            [FIRST_CONTENT - 1, self.told.content_number_max]
            + [former.used.get("contents", 0) for former in self.formers]
        )
        if not any(former.generation >= self.generation for former in self.formers):
            used += _CONTENT_GAP
        model_number = max((former.used.get("models", 0) for former in self.formers), default=0)
        file_count = 0
        for manifest in models:
            model_number += 1
            connection.execute(
                "INSERT INTO models VALUES (?, ?, ?, ?, ?, ?)",
                (
                    model_number,
                    manifest.name,
                    split(manifest.name)[0],
                    manifest.added_ns,
                    manifest.mtime_ns,
                    manifest.mode,
                ),
            )
            for folder in parents(manifest.name):
                connection.execute(
                    "INSERT OR IGNORE INTO folders VALUES (?, ?, ?)",
                    (folder, split(folder)[0], now_ns),
                )
            numbers = {}
            for content in manifest.contents:
                number, is_new = self._content_number(content, used)
                used = max(used, number)
                numbers[content.number] = number
                if is_new:
                    self._write_content(connection, number, content)
            for file in manifest.files:
                shown = None if file.content is None else numbers[file.content]
                connection.execute(
                    "INSERT INTO files VALUES (?, ?, ?, ?, ?, ?)",
                    (model_number, *split(file.path), shown, file.mode, file.mtime_ns),
                )
                file_count += shown is not None
        for table, highest in (
            ("fragments", self._used_fragments),
            ("contents", used),
            ("models", model_number),
        ):
            connection.execute("DELETE FROM sqlite_sequence WHERE name = ?", (table,))
            connection.execute("INSERT INTO sqlite_sequence VALUES (?, ?)", (table, highest))
        return file_count

    def _content_number(self, content: ManifestContent, used: int) -> tuple[int, bool]:
        """The number of a content, and whether it has no row yet."""
        what = (content.sha256, sum(content.sizes))
        known = self._contents.get(content.number)
        number = content.number
        if known == what:
            return number, False
        if known is not None:
            number = used + 1  # two histories gave this number to different bytes
        self._contents[number] = what
        return number, True

    def _write_content(
        self, connection: sqlite3.Connection, number: int, content: ManifestContent
    ) -> None:
        fragments = _ids(content)
        extents = ExtentMap(
            content.sizes,
            array("q", (self._numbers[fragment] for fragment in fragments)),
            content.offsets,
            content.kinds,
        )
        records = self.resolved.records
        stored = sum(records[f].record_size if f in records else 1 for f in set(fragments))
        connection.execute(
            "INSERT INTO contents VALUES (?, ?, ?, ?, ?, ?, ?)",
            (
                number,
                content.sha256,
                extents.size,
                content.mtime_ns,
                stored,
                content.verdict,
                extents.pack(number, content.sha256),
            ),
        )


def _ids(content: ManifestContent) -> list[FragmentId]:
    return [FragmentId(content.ids[at : at + 32]) for at in range(0, len(content.ids), 32)]


def _nonsense(manifest: StoredManifest) -> str:
    """Why a manifest is none that fragfs writes; "" if it may be one."""
    try:
        as_name(manifest.name)
        for file in manifest.files:
            as_name(file.path)
    except FragmentError as error:
        return error.message
    numbers = {content.number for content in manifest.contents}
    if not all(isinstance(n, int) and FIRST_CONTENT <= n < _NUMBER_MAX for n in numbers):
        return "its contents have impossible numbers"
    if not {file.content for file in manifest.files} - {None} <= numbers:
        return "its files show contents that it does not describe"
    if len({file.path for file in manifest.files}) != len(manifest.files):
        return "two of its files have one name"
    for content in manifest.contents:
        ranges = zip(content.sizes, content.offsets, strict=True)
        if (
            len(content.sha256) != 32
            or not set(content.kinds) <= _SPAN_KINDS
            or any(not 1 <= size <= FRAGMENT_BYTES_MAX - offset for size, offset in ranges)
        ):
            return "its contents are not described as fragfs does"
    return ""
