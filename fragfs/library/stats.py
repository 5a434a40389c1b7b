"""What a library holds and what was saved, counted from the catalog each time it is asked."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from fragfs.library.catalog import Catalog
from fragfs.library.extents import ExtentMap
from fragfs.types import LibraryStats, Predictor

__all__ = ["library_stats", "unreferenced_bytes"]

_ROWS_AT_ONCE = 100_000


class _Fragments:
    """Columns of the fragments table, indexed by fragment number."""

    def __init__(self, catalog: Catalog) -> None:
        size = catalog.next_number("fragments")
        self.raw: NDArray[np.int64] = np.zeros(size, np.int64)
        self.record: NDArray[np.int64] = np.zeros(size, np.int64)
        self.predictor: NDArray[np.int8] = np.zeros(size, np.int8)
        start = 0
        while rows := catalog.rows(
            "SELECT number, raw_size, record_size, predictor FROM fragments WHERE number > ?"
            " ORDER BY number LIMIT ?",
            (start, _ROWS_AT_ONCE),
        ):
            columns = np.array(rows, np.int64)
            numbers = columns[:, 0]
            # A fragment committed after `size` was read is not counted yet.
            known = columns[numbers < size]
            self.raw[known[:, 0]] = known[:, 1]
            self.record[known[:, 0]] = known[:, 2]
            self.predictor[known[:, 0]] = known[:, 3]
            start = int(numbers[-1])


def _fragments_of(catalog: Catalog, model: int, size: int) -> NDArray[np.int64]:
    """The distinct fragment numbers a model's files need."""
    parts = [
        np.frombuffer(ExtentMap.parse(blob).fragments, np.int64)
        for (blob,) in catalog.rows(
            "SELECT extents FROM contents WHERE number IN"
            " (SELECT content FROM files WHERE model = ?)",
            (model,),
        )
    ]
    numbers = np.unique(np.concatenate(parts)) if parts else np.zeros(0, np.int64)
    return numbers[numbers < size]


def library_stats(catalog: Catalog, directory: Path, model: int | None) -> LibraryStats:
    """Count a whole library, or one model of it.

    Args:
        catalog: The library's catalog.
        directory: The library's directory.
        model: A model's number, or None for all.
    """
    fragments = _Fragments(catalog)
    size = len(fragments.raw)
    users = np.zeros(size, np.int32)
    chosen = np.zeros(size, np.bool_)
    for (number,) in catalog.rows("SELECT number FROM models"):
        needed = _fragments_of(catalog, number, size)
        users[needed] += 1
        if model is None or number == model:
            chosen[needed] = True
    where, parameters = ("", ()) if model is None else (" WHERE model = ?", (model,))
    row = catalog.row(
        "SELECT count(DISTINCT model), count(content), coalesce(sum(size), 0)"
        f" FROM files LEFT JOIN contents ON contents.number = content{where}",
        parameters,
    )
    _, file_count, logical_bytes = row or (0, 0, 0)
    model_count = 1 if model is not None else len(catalog.rows("SELECT 1 FROM models"))
    unique_bytes = int(fragments.raw[chosen].sum())
    saved = {"exact": logical_bytes - unique_bytes}
    for predictor in Predictor:
        mask = chosen & (fragments.predictor == predictor)
        gain = int((fragments.raw[mask] - fragments.record[mask]).sum())
        if gain:
            saved[predictor.name.lower()] = gain
    return LibraryStats(
        model_count=model_count,
        file_count=file_count,
        logical_bytes=logical_bytes,
        unique_bytes=unique_bytes,
        stored_bytes=int(fragments.record[chosen].sum()),
        exclusive_bytes=int(
            fragments.record[chosen & (users == 1) if model is not None else chosen].sum()
        ),
        fragment_count=int(chosen.sum()),
        shared_fragment_count=int((chosen & (users > 1)).sum()),
        unreferenced_bytes=int(fragments.record[users == 0].sum()),
        disk_bytes=_apparent_bytes(directory) if model is None else 0,
        saved_bytes=saved,
    )


def unreferenced_bytes(catalog: Catalog) -> int:
    """Record bytes that no model needs."""
    fragments = _Fragments(catalog)
    used = np.zeros(len(fragments.raw), np.bool_)
    for (number,) in catalog.rows("SELECT number FROM models"):
        used[_fragments_of(catalog, number, len(used))] = True
    return int(fragments.record[~used].sum())


def _apparent_bytes(directory: Path) -> int:
    total = 0
    for folder, _, names in os.walk(directory):
        for name in names:
            try:
                total += os.lstat(os.path.join(folder, name)).st_size
            except FileNotFoundError:  # a staging file that was published meanwhile
                continue
    return total
