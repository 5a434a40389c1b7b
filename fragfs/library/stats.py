"""What a library holds and what was saved, counted from the catalog each time it is asked.

A fragment is *needed* by a model if it is in one of the model's files, or if decoding one of those
takes it: what others are predicted from is needed as much as they are. Everything works on arrays
indexed by fragment number, so that a million fragments take seconds and not objects.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from fragfs.library.catalog import NUMBERS_MAX, Catalog
from fragfs.library.closure import CLOSURE_LIMIT
from fragfs.library.extents import ExtentMap, check_seal
from fragfs.types import FileEntry, LibraryStats, Predictor

__all__ = [
    "NO_OWNER",
    "FragmentTable",
    "ModelFragments",
    "Numbers",
    "Owners",
    "RemovedFragments",
    "fragments_of",
    "kept_as_bases",
    "library_stats",
    "models_by_age",
    "named_fragments",
    "predicted_by_owner",
]

Numbers = NDArray[np.int64]
"""Distinct fragment numbers, ascending."""

NO_OWNER = -1
"""Stands for the model of a fragment that is in no model's files any more."""

_ROWS_AT_ONCE = 100_000
_PACKS_MAX = 1 << 24
_BYTES_MAX = 1 << 32
"""Beyond them a catalog is damaged; tables are made that have a row for each pack."""
_CONTENTS_AT_ONCE = 1000


class FragmentTable:
    """Columns of the fragments table, and who is predicted from whom, by fragment number.

    A fragment committed after the table was read is not in it.

    Attributes:
        size: One more than the largest number.
        raw: Bytes after decoding.
        record: Bytes of the record.
        pack: The pack that holds it.
        predictor: What its residual is taken against.
        bases: Shape (most bases of a fragment, size); 0 where there is none.
    """

    def __init__(self, catalog: Catalog) -> None:
        found = catalog.row("SELECT max(number) FROM fragments")
        highest = int(found[0] or 0) if found else 0
        self.size = max(highest + 1, catalog.next_number("fragments"))
        if not 0 < self.size <= NUMBERS_MAX:
            raise catalog.damaged(f"a fragment has the number {self.size - 1}")
        self.raw: NDArray[np.int64] = np.zeros(self.size, np.int64)
        self.record: NDArray[np.int64] = np.zeros(self.size, np.int64)
        self.pack: NDArray[np.int64] = np.zeros(self.size, np.int64)
        self.predictor: NDArray[np.int8] = np.zeros(self.size, np.int8)
        start = 0
        while rows := catalog.rows(
            "SELECT number, raw_size, record_size, pack, predictor FROM fragments"
            " WHERE number > ? ORDER BY number LIMIT ?",
            (start, _ROWS_AT_ONCE),
        ):
            start = rows[-1][0]
            columns = np.array(rows, np.int64)
            limits = (NUMBERS_MAX, _BYTES_MAX, _BYTES_MAX, _PACKS_MAX, 256)
            if ((columns < 0) | (columns >= limits)).any():
                raise catalog.damaged(f"the place of a fragment from {rows[0][0]} on cannot be")
            columns = columns[columns[:, 0] < self.size]
            numbers = columns[:, 0]
            self.raw[numbers] = columns[:, 1]
            self.record[numbers] = columns[:, 2]
            self.pack[numbers] = columns[:, 3]
            self.predictor[numbers] = columns[:, 4]
        self.bases = self._load_bases(catalog)

    def _load_bases(self, catalog: Catalog) -> NDArray[np.int64]:
        found = catalog.row("SELECT max(position) + 1 FROM bases")
        count = int(found[0] or 0) if found else 0
        bases: NDArray[np.int64] = np.zeros((count, self.size), np.int64)
        place = (0, -1)
        while rows := catalog.rows(
            "SELECT fragment, position, base FROM bases WHERE (fragment, position) > (?, ?)"
            " ORDER BY fragment, position LIMIT ?",
            (*place, _ROWS_AT_ONCE),
        ):
            place = rows[-1][:2]
            columns = np.array(rows, np.int64)
            columns = columns[
                (columns[:, 0] < self.size) & (columns[:, 1] < count) & (columns[:, 2] < self.size)
            ]
            bases[columns[:, 1], columns[:, 0]] = columns[:, 2]
        return bases

    def bases_of(self, numbers: Numbers) -> Numbers:
        """The fragments that predictions of any of `numbers` read."""
        found = np.zeros(self.size, np.bool_)
        found[self.bases[:, numbers]] = True
        found[:1] = False
        return np.flatnonzero(found)

    def deepest_first(self, numbers: Numbers) -> Numbers:
        """The fragments in an order in which each comes before those that it is predicted from."""
        depth: NDArray[np.int8] = np.zeros(self.size, np.int8)
        for _ in range(CLOSURE_LIMIT):
            below = np.where(self.bases > 0, depth[self.bases] + 1, 0)
            depth = below.max(axis=0, initial=0).astype(np.int8)
        return numbers[np.argsort(-depth[numbers], kind="stable")]

    def closure(self, numbers: Numbers) -> Numbers:
        """The fragments that decoding all of `numbers` takes, themselves included."""
        found = np.zeros(self.size, np.bool_)
        found[numbers] = True
        reached = numbers
        for _ in range(CLOSURE_LIMIT):
            below = self.bases_of(reached)
            reached = below[~found[below]]
            if not reached.size:
                break
            found[reached] = True
        return np.flatnonzero(found)

    def closure_sizes(self, numbers: Numbers) -> NDArray[np.int64]:
        """How many fragments decoding each of `numbers` takes, itself included."""
        # Row by row the closures, filled up with zeros: number 0 does not exist and has no bases.
        members = numbers[:, None]
        sizes = np.ones(numbers.size, np.int64)
        for _ in range(CLOSURE_LIMIT if numbers.size else 0):
            below = np.moveaxis(self.bases[:, members], 0, 2).reshape(numbers.size, -1)
            members = np.sort(np.concatenate([members, below], axis=1), axis=1)
            repeated = members[:, 1:] == members[:, :-1]
            members[:, 1:][repeated] = 0
            counts = np.count_nonzero(members, axis=1)
            if np.array_equal(counts, sizes):
                break
            sizes = counts
            members = np.sort(members, axis=1)[:, -int(counts.max()) :]
        return sizes

    def stored(self, numbers: Numbers) -> int:
        """Record bytes of fragments."""
        return int(self.record[numbers].sum())


@dataclass(frozen=True, slots=True)
class ModelFragments:
    """A model and the fragments of its files.

    Attributes:
        number: The catalog's integer for the model.
        name: Its name.
        own: The fragments in its files.
    """

    number: int
    name: bytes
    own: Numbers


def fragments_of(catalog: Catalog, where: str, parameters: Sequence[object], size: int) -> Numbers:
    """The fragments of contents.

    Args:
        catalog: The library's catalog.
        where: A condition on the contents, in SQL.
        parameters: Its parameters.
        size: Numbers from here on are left out.
    """
    parts = [
        np.frombuffer(ExtentMap.parse(blob).fragments, np.int64)
        for (blob,) in catalog.rows(f"SELECT extents FROM contents WHERE {where}", parameters)
    ]
    numbers = np.unique(np.concatenate(parts)) if parts else np.zeros(0, np.int64)
    return numbers[numbers < size]


def models_by_age(catalog: Catalog, size: int) -> Iterator[ModelFragments]:
    """Every model with the fragments of its files, the one that was added first first.

    Args:
        catalog: The library's catalog.
        size: Fragment numbers from here on are left out.
    """
    of_model = "number IN (SELECT content FROM files WHERE model = ?)"
    for number, name in catalog.rows("SELECT number, name FROM models ORDER BY added_ns, number"):
        yield ModelFragments(number, name, fragments_of(catalog, of_model, (number,), size))


class Owners:
    """Which model each fragment belongs to: the oldest that has it in its files.

    Args:
        size: One more than the largest fragment number.

    Attributes:
        names: Names of the models seen, the oldest first.
        of: Index into `names` by fragment number; `NO_OWNER` where there is none.
    """

    def __init__(self, size: int) -> None:
        self.names: list[bytes] = []
        self.of: NDArray[np.int32] = np.full(size, NO_OWNER, np.int32)

    def add(self, model: ModelFragments) -> None:
        """Take the next model, in order of age."""
        self.of[model.own[self.of[model.own] == NO_OWNER]] = len(self.names)
        self.names.append(model.name)

    def name(self, index: int) -> bytes | None:
        """A model's name; None for `NO_OWNER`."""
        return None if index == NO_OWNER else self.names[index]


def predicted_by_owner(
    table: FragmentTable, numbers: Numbers, owners: Owners
) -> list[tuple[bytes | None, Numbers]]:
    """The fragments that are predicted from each model's, by its name; what most are first.

    Args:
        table: All fragments.
        numbers: The fragments to look at.
        owners: Whose the bases are. None is the name of those that no model has any more.
    """
    below = table.bases[:, numbers]
    owner = owners.of[below]
    found = []
    for index in np.unique(owner[below > 0]).tolist():
        predicted = numbers[((owner == index) & (below > 0)).any(axis=0)]
        found.append((owners.name(index), predicted))
    found.sort(key=lambda item: -int(table.raw[item[1]].sum()))
    return found


def library_stats(catalog: Catalog, directory: Path, model: int | None) -> LibraryStats:
    """Count a whole library, or one model of it.

    Args:
        catalog: The library's catalog.
        directory: The library's directory.
        model: A model's number, or None for all.
    """
    table = FragmentTable(catalog)
    owners = Owners(table.size)
    users = np.zeros(table.size, np.int32)
    chosen = np.zeros(table.size, np.bool_)
    needed = np.zeros(table.size, np.bool_)
    model_count = 0
    for other in models_by_age(catalog, table.size):
        owners.add(other)
        closure = table.closure(other.own)
        users[closure] += 1
        if model is None or other.number == model:
            model_count += 1
            chosen[other.own] = True
            needed[closure] = True
    own = np.flatnonzero(chosen)
    where, parameters = ("", ()) if model is None else (" WHERE model = ?", (model,))
    row = catalog.row(
        "SELECT count(content), coalesce(sum(size), 0)"
        f" FROM files LEFT JOIN contents ON contents.number = content{where}",
        parameters,
    )
    file_count, logical_bytes = row or (0, 0)
    unique_bytes = int(table.raw[own].sum())
    exclusive = needed if model is None else needed & (users == 1)
    return LibraryStats(
        model_count=model_count,
        file_count=file_count,
        logical_bytes=logical_bytes,
        unique_bytes=unique_bytes,
        stored_bytes=table.stored(own),
        exclusive_bytes=int(table.record[exclusive].sum()),
        shared_bytes=int(table.record[chosen & (users > 1)].sum()),
        base_bytes=int(table.record[needed & ~chosen].sum()),
        fragment_count=own.size,
        shared_fragment_count=int((chosen & (users > 1)).sum()),
        unreferenced_bytes=int(table.record[users == 0].sum()),
        disk_bytes=_apparent_bytes(directory) if model is None else 0,
        saved_bytes={"exact": logical_bytes - unique_bytes, **_saved_bytes(table, own)},
        predicted_bytes={
            os.fsdecode(name or b""): int(table.raw[numbers].sum())
            for name, numbers in predicted_by_owner(table, own, owners)
        },
    )


def _saved_bytes(table: FragmentTable, own: Numbers) -> dict[str, int]:
    saved = {}
    for predictor in Predictor:
        numbers = own[table.predictor[own] == predictor]
        gain = int((table.raw[numbers] - table.record[numbers]).sum())
        if gain:
            saved[predictor.name.lower()] = gain
    return saved


def named_fragments(catalog: Catalog, size: int) -> Numbers:
    """The fragments that contents are made of, bases not included; below number `size`.

    Raises:
        FormatError: The extents of a content are damaged: what it needs is not known.
    """
    named = np.zeros(size, np.bool_)
    last = 0
    # The rows themselves, not by way of names: what an index does not find is needed as well.
    while rows := catalog.rows(
        "SELECT number, sha256, extents FROM contents WHERE number > ? ORDER BY number LIMIT ?",
        (last, _CONTENTS_AT_ONCE),
    ):
        last = rows[-1][0]
        for number, sha256, blob in rows:
            check_seal(blob, number, sha256)
            numbers = np.frombuffer(ExtentMap.parse(blob).fragments, np.int64)
            named[numbers[numbers < size]] = True
    return np.flatnonzero(named)


def kept_as_bases(catalog: Catalog) -> tuple[int, list[tuple[bytes, int]]]:
    """What is in no file and is needed because others are predicted from it.

    Returns:
        (its record bytes, the models those others are in with the record bytes that each needs,
        most first).
    """
    table = FragmentTable(catalog)
    in_files = np.zeros(table.size, np.bool_)
    in_files[named_fragments(catalog, table.size)] = True
    kept = np.zeros(table.size, np.bool_)
    users = []
    for model in models_by_age(catalog, table.size):
        below = table.closure(model.own)
        below = below[~in_files[below]]
        kept[below] = True
        users.append((model.name, table.stored(below)))
    users.sort(key=lambda item: -item[1])
    return int(table.record[kept].sum()), [(name, size) for name, size in users if size]


class RemovedFragments:
    """What becomes of the fragments of files that are removed. Made before that, asked after it.

    Args:
        catalog: The library's catalog.
        files: The files of a model some of which will be removed.
    """

    def __init__(self, catalog: Catalog, files: Sequence[FileEntry]) -> None:
        self._catalog = catalog
        size = catalog.next_number("fragments")
        self._of_content = {
            content: fragments_of(catalog, "number = ?", (content,), size)
            for content in {file.content for file in files}
        }

    def count(self, removed_files: Sequence[FileEntry]) -> tuple[int, int, list[tuple[bytes, int]]]:
        """Count, once files have been removed.

        Args:
            removed_files: Those of the files that were.

        Returns:
            (record bytes in the whole library that no model needs, record bytes of the removed
            files' fragments that are in no file any more and stay because others are predicted from
            them, the models that those others are in with the record bytes each needs, most first).
        """
        table = FragmentTable(self._catalog)
        in_files = np.zeros(table.size, np.bool_)
        needed = np.zeros(table.size, np.bool_)
        removed = np.zeros(table.size, np.bool_)
        for file in removed_files:
            removed[self._of_content[file.content]] = True
        below: list[tuple[bytes, Numbers]] = []
        for model in models_by_age(self._catalog, table.size):
            closure = table.closure(model.own)
            in_files[model.own] = True
            needed[closure] = True
            below.append((model.name, closure[removed[closure]]))
        kept = removed & needed & ~in_files
        users = [(name, table.stored(numbers[kept[numbers]])) for name, numbers in below]
        users.sort(key=lambda item: -item[1])
        return (
            int(table.record[~needed].sum()),
            int(table.record[kept].sum()),
            [(name, size) for name, size in users if size],
        )


def _apparent_bytes(directory: Path) -> int:
    total = 0
    for folder, _, names in os.walk(directory):
        for name in names:
            try:
                total += os.lstat(os.path.join(folder, name)).st_size
            except FileNotFoundError:  # a staging file that was published meanwhile
                continue
    return total
