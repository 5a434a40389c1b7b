"""A batch: records appended to a pack, then one catalog transaction.

The order of the steps is FORMAT.md's "Write order". Nothing in a pack counts until the batch's
trailer is durable and the transaction has committed.
"""

from __future__ import annotations

import os
import sqlite3
import time
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Protocol

import xxhash

from fragfs.errors import LimitError
from fragfs.library.appender import PackAppender, PackState
from fragfs.library.catalog import Catalog
from fragfs.library.closure import closure_of
from fragfs.library.records import (
    BatchTrailer,
    RecordHeader,
    RecordKind,
    pack_batch_trailer,
    pack_fragment_record,
    pack_index,
    pack_plain_record,
    parse_record_header,
)
from fragfs.types import Fragment, FragmentId, FragmentMetadata, LibraryConfig

if TYPE_CHECKING:
    from fragfs.similarity.signature import FragmentSignature

__all__ = ["Batch", "PackKeeper", "Replacement"]


@dataclass(frozen=True, slots=True)
class Replacement:
    """Another record for a stored fragment.

    Attributes:
        number: The fragment's number.
        fragment: It, encoded anew.
        signature: What later fragments find it by; None leaves what the catalog has.
    """

    number: int
    fragment: Fragment
    signature: FragmentSignature | None = None


class PackKeeper(Protocol):
    """Where a batch is written to: `LibraryWriter`, which holds the lock meanwhile."""

    @property
    def catalog(self) -> Catalog:
        """The library's catalog."""

    @property
    def config(self) -> LibraryConfig:
        """Its settings."""

    def clean_staging(self) -> None:
        """Remove what killed writers left unfinished."""

    def examine_leftovers(self) -> list[tuple[int, int, int, int]]:
        """Rows that mark what a crash left in packs as abandoned."""

    def open_pack(self, retired: Collection[int] = ()) -> PackAppender:
        """The pack to append to."""

    def write_intent(self, batch: bytes) -> None:
        """Leave a durable note of the batch whose trailer is about to be written."""

    def remove_intent(self) -> None:
        """Remove the note."""

    def sync_packs(self) -> None:
        """Make the names of new packs durable."""


class Batch:
    """Records on their way into the library. Made by `LibraryWriter.batch`, used by one thread.

    Attributes:
        started_s: time.monotonic() when the batch began.
    """

    def __init__(self, writer: PackKeeper) -> None:
        self._writer = writer
        self._catalog = writer.catalog
        writer.clean_staging()
        self.started_s = time.monotonic()
        self._generation, self._parent = self._catalog.generation()
        self._abandoned = writer.examine_leftovers()
        self._pack: PackAppender | None = None
        self._next_fragment = self._catalog.next_number("fragments")
        self._pending: dict[FragmentId, FragmentMetadata] = {}
        self._moved: dict[int, FragmentMetadata] = {}
        self._bases: dict[int, tuple[int, ...]] = {}
        self._signatures: dict[int, FragmentSignature | None] = {}
        self._retired: set[int] = set()
        self._dropped: list[int] = []
        self._healed: set[int] = set()
        self._committing = False
        self._record_count = 0
        self._batch_offset = 0
        self._headers = xxhash.xxh3_64()

    @property
    def fragment_count(self) -> int:
        """Fragments appended that the library did not have."""
        return len(self._pending)

    @property
    def new_numbers(self) -> range:
        """The numbers of those fragments."""
        return range(self._next_fragment - len(self._pending), self._next_fragment)

    @property
    def is_full(self) -> bool:
        """True once the pack has reached its largest size and the batch should be committed."""
        return self._pack is not None and self._pack.size >= self._writer.config.pack_bytes_max

    def find(self, fragment: FragmentId) -> FragmentMetadata | None:
        """A fragment of this batch, or None. Safe from other threads."""
        return self._pending.get(fragment)

    def bases(self, number: int) -> tuple[int, ...]:
        """The bases of a fragment, of this batch or an earlier one."""
        pending = self._bases.get(number)
        return self._catalog.bases(number) if pending is None else pending

    def append_fragment(
        self, fragment: Fragment, signature: FragmentSignature | None = None
    ) -> FragmentMetadata:
        """Append a fragment unless the library has it by now; returns where it is.

        Args:
            fragment: The fragment; its bases must be in the library, or in this batch before it.
            signature: What later fragments find it by, if they may be predicted from it.

        Raises:
            LimitError: Decoding it would take more fragments than the library allows, or a base
                is gone; nothing was appended. Encode it from nothing.
        """
        known = self._pending.get(fragment.id) or self._catalog.find_fragment(fragment.id)
        if known is not None:
            return known
        number = self._next_fragment
        bases = self._base_numbers(fragment)
        # Nothing is predicted yet from a fragment that is new.
        self._check_closure(number, lambda of: bases if of == number else self.bases(of))
        metadata = self._append(fragment, number)
        self._next_fragment += 1
        self._pending[fragment.id] = metadata
        self._bases[number] = bases
        self._signatures[number] = signature
        return metadata

    def replace_fragments(self, changes: Sequence[Replacement]) -> list[FragmentMetadata]:
        """Append other records for fragments that are stored already.

        The old ones are damaged, or smaller ones were found. The catalog points to the new ones
        once the batch is committed. The changes are made together: only what results must keep to
        the limits.

        Raises:
            LimitError: Decoding one of them, or a fragment predicted from one, would take more
                fragments than the library allows, or a base is gone; nothing was appended.
        """
        for change in changes:
            found = self._pending.get(change.fragment.id) or self._catalog.find_fragment(
                change.fragment.id
            )
            if found is None or found.number != change.number:
                raise LimitError(f"fragment {change.fragment.id.short} is not there any more")
        bases = {change.number: self._base_numbers(change.fragment) for change in changes}

        def changed(number: int) -> tuple[int, ...]:
            found = bases.get(number)
            return self.bases(number) if found is None else found

        for number in bases.keys() | self._all_dependents(bases):
            self._check_closure(number, changed)
        replaced = []
        for change in changes:
            metadata = self._append(change.fragment, change.number)
            self._moved[change.number] = metadata
            self._healed.add(change.number)
            self._bases[change.number] = bases[change.number]
            if change.signature is not None:
                self._signatures[change.number] = change.signature
            replaced.append(metadata)
        return replaced

    def index_fragment(self, number: int, signature: FragmentSignature) -> None:
        """Let a stored fragment be found as a base."""
        self._signatures[number] = signature

    def move_fragment(self, metadata: FragmentMetadata, record: bytes) -> None:
        """Append a copy of a fragment's record, which the catalog shall point to from now on."""
        pack = self._appender()
        offset = pack.append(record)
        self._count(parse_record_header(record, "a copied record"))
        self._moved[metadata.number] = replace(metadata, pack=pack.number, offset=offset)
        self._bases.setdefault(metadata.number, self._catalog.bases(metadata.number))

    def drop_fragments(self, numbers: Sequence[int]) -> None:
        """Forget fragments that nothing needs, and all that is known about them."""
        self._dropped += numbers

    def retire_pack(self, number: int) -> None:
        """Nothing in a pack counts any more once this batch is committed; call it first."""
        self._retired.add(number)

    def _base_numbers(self, fragment: Fragment) -> tuple[int, ...]:
        """Numbers of a fragment's bases; the lock is held, so they stay what they are."""
        numbers = []
        for base in fragment.bases:
            found = self._pending.get(base) or self._catalog.find_fragment(base)
            if found is None:
                raise LimitError(f"fragment {base.short} is not in the library any more")
            numbers.append(found.number)
        return tuple(numbers)

    def _check_closure(self, number: int, bases: Callable[[int], Sequence[int]]) -> None:
        if number in closure_of(bases(number), bases):
            raise LimitError("a fragment cannot be predicted from itself")
        closure = closure_of([number], bases)
        if len(closure) > self._writer.config.closure_max:
            raise LimitError("a prediction would take more fragments than the library allows")
        known = {metadata.number for metadata in self._pending.values()}
        for member in closure - known - {number}:
            if self._catalog.row("SELECT 1 FROM fragments WHERE number = ?", (member,)) is None:
                raise LimitError("a fragment that a prediction would take was dropped meanwhile")

    def _all_dependents(self, numbers: Iterable[int]) -> set[int]:
        """Every fragment that cannot be decoded without one of these."""
        found: set[int] = set()
        waiting = list(numbers)
        while waiting:
            number = waiting.pop()
            direct = set(self._catalog.dependents(number))
            direct |= {of for of, bases in self._bases.items() if number in bases}
            waiting += direct - found
            found |= direct
        return found

    def append_plain(self, kind: RecordKind, payload: bytes) -> None:
        """Append a MANIFEST or REMOVAL record."""
        record = pack_plain_record(kind, payload)
        self._appender().append(record)
        self._count(parse_record_header(record, "a new record"))

    def _append(self, fragment: Fragment, number: int) -> FragmentMetadata:
        header, payload = pack_fragment_record(fragment)
        pack = self._appender()
        offset = pack.append(header, payload)
        self._count(parse_record_header(header, "a new record"))
        return FragmentMetadata(
            number=number,
            id=fragment.id,
            pack=pack.number,
            offset=offset,
            record_size=len(header) + len(payload),
            raw_size=fragment.raw_size,
            predictor=fragment.predictor,
        )

    def _count(self, header: RecordHeader) -> None:
        self._headers.update(header.header_checksum.to_bytes(8, "little"))
        self._record_count += 1

    def _appender(self) -> PackAppender:
        if self._pack is None:
            self._pack = self._writer.open_pack(self._retired)
            self._batch_offset = self._pack.size
        return self._pack

    def commit(self, apply: Callable[[sqlite3.Connection], None] | None = None) -> None:
        """Make the batch durable and part of the library.

        Args:
            apply: Further changes to the catalog, in the same transaction.
        """
        pack = self._appender()
        batch = os.urandom(16)
        self._writer.write_intent(batch)
        pack.append(
            pack_batch_trailer(
                BatchTrailer(
                    self._generation + 1,
                    batch,
                    self._parent,
                    self._batch_offset,
                    self._record_count,
                    self._headers.intdigest(),
                )
            )
        )
        state = PackState.OPEN
        if self.is_full:
            entries = pack.index_entries()
            if entries is not None:
                pack.append(pack_index(entries, pack.size))
            state = PackState.SEALED
        pack.sync()
        if pack.new:
            self._writer.sync_packs()
        self._committing = True
        with self._catalog.transaction() as connection:
            connection.executemany(
                "INSERT INTO fragments VALUES (?, ?, ?, ?, ?, ?, ?)",
                (
                    (m.number, m.id, m.pack, m.offset, m.record_size, m.raw_size, m.predictor)
                    for m in self._pending.values()
                ),
            )
            connection.executemany(
                "UPDATE fragments SET pack = ?, offset = ?, record_size = ?, raw_size = ?,"
                " predictor = ? WHERE number = ?",
                (
                    (m.pack, m.offset, m.record_size, m.raw_size, m.predictor, m.number)
                    for m in self._moved.values()
                ),
            )
            connection.executemany(
                "DELETE FROM bases WHERE fragment = ?", ((number,) for number in self._moved)
            )
            connection.executemany(
                "INSERT INTO bases VALUES (?, ?, ?)",
                (
                    (number, position, base)
                    for number, bases in self._bases.items()
                    for position, base in enumerate(bases)
                ),
            )
            connection.executemany(
                "DELETE FROM quarantine WHERE fragment = ?", ((number,) for number in self._healed)
            )
            self._insert_signatures(connection)
            self._delete_dropped(connection)
            connection.executemany(
                "INSERT OR REPLACE INTO packs VALUES (?, ?, ?, ?)", self._abandoned
            )
            connection.execute(
                "INSERT OR REPLACE INTO packs VALUES (?, ?, ?, ?)",
                (pack.number, pack.size, pack.size, state),
            )
            connection.executemany(
                "UPDATE packs SET state = ? WHERE number = ?",
                ((PackState.RETIRED, number) for number in self._retired),
            )
            connection.execute(
                "UPDATE library SET generation = ?, batch = ?", (self._generation + 1, batch)
            )
            if apply is not None:
                apply(connection)
        self._writer.remove_intent()

    def _delete_dropped(self, connection: sqlite3.Connection) -> None:
        if not self._dropped:
            return
        connection.execute("CREATE TEMP TABLE dropped (number INTEGER PRIMARY KEY)")
        connection.executemany(
            "INSERT OR IGNORE INTO dropped VALUES (?)", ((number,) for number in self._dropped)
        )
        for table, column in (
            ("fragments", "number"),
            ("bases", "fragment"),
            ("signatures", "fragment"),
            ("similar", "fragment"),
            ("quarantine", "fragment"),
        ):
            connection.execute(
                f"DELETE FROM {table} WHERE {column} IN (SELECT number FROM dropped)"
            )
        connection.execute("DROP TABLE dropped")

    def _insert_signatures(self, connection: sqlite3.Connection) -> None:
        limit = self._writer.config.closure_max
        moved = [number for number in self._moved if number in self._bases]
        too_deep = {
            number
            for number in (*moved, *self._all_dependents(moved))
            if len(closure_of([number], self.bases)) >= limit
        }
        self._delete_signatures(connection, too_deep)
        signed = {
            number: signature
            for number, signature in self._signatures.items()
            if signature is not None and number not in too_deep
        }
        connection.executemany(
            "INSERT OR REPLACE INTO signatures VALUES (?, ?)",
            ((number, signature.sketch) for number, signature in signed.items()),
        )
        # In key order: neighbours in the table, so that pages are touched once.
        connection.executemany(
            "INSERT OR IGNORE INTO similar VALUES (?, ?)",
            sorted((key, number) for number, signature in signed.items() for key in signature.keys),
        )

    def _delete_signatures(self, connection: sqlite3.Connection, numbers: set[int]) -> None:
        """What reads as many fragments as are allowed serves as a base no more."""
        for table in ("signatures", "similar"):
            connection.executemany(
                f"DELETE FROM {table} WHERE fragment = ?", ((number,) for number in numbers)
            )

    def close(self) -> None:
        """Let go of the pack; one that nobody was told of goes with the batch.

        What an add that fills the disk leaves must not keep it full.
        """
        if self._pack is None:
            return
        self._pack.close()
        # Once the transaction has begun, only the catalog knows whether it will count.
        if self._pack.new and not self._committing:
            self._pack.discard()
