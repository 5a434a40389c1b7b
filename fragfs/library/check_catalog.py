"""Is the catalog in itself what FORMAT.md says: SQLite's own checks, then the invariants."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from fragfs.errors import FragmentError
from fragfs.library.appender import PackState
from fragfs.library.catalog import NUMBERS_MAX, Catalog
from fragfs.library.closure import closure_of
from fragfs.library.extents import ExtentMap, check_seal
from fragfs.library.findings import Findings
from fragfs.library.names import parents, printable, split
from fragfs.types import LibraryConfig

__all__ = ["check_catalog", "check_database"]

_TOLD_MAX = 5
"""How many of the same kind are named one by one."""


def check_database(catalog: Catalog, findings: Findings) -> bool:
    """SQLite's integrity check; whether rows can be read and believed.

    Args:
        catalog: The library's catalog.
        findings: Told what is wrong.
    """
    try:
        rows = catalog.rows(f"PRAGMA integrity_check({_TOLD_MAX})")
    except FragmentError as error:
        findings.distrust(error.message)
        return False
    found = [str(text) for (text,) in rows if text != "ok"]
    for text in found:
        findings.distrust(f"catalog {catalog.path} is damaged: {text}")
    return not found


def check_catalog(catalog: Catalog, config: LibraryConfig, findings: Findings) -> None:
    """The invariants between tables.

    Args:
        catalog: A catalog that passed `check_database`.
        config: The library's settings.
        findings: Told what is wrong.
    """
    row = catalog.row("SELECT min(number), max(number) FROM fragments")
    if row is not None and row[0] is not None and not 0 < row[0] <= row[1] < NUMBERS_MAX:
        findings.distrust(f"fragments have the numbers {row[0]} to {row[1]}")
        return
    raw_sizes = _raw_sizes(catalog)
    _check_fragments(catalog, findings)
    _check_contents(catalog, raw_sizes, findings)
    _check_names(catalog, findings)
    _check_bases(catalog, config, findings)
    _check_signatures(catalog, findings)
    _check_numbers(catalog, findings)


def _raw_sizes(catalog: Catalog) -> NDArray[np.int64]:
    """Bytes of each fragment by number; -1 where there is none."""
    row = catalog.row("SELECT max(number) FROM fragments")
    sizes: NDArray[np.int64] = np.full(int(row[0] or 0) + 1 if row else 1, -1, np.int64)
    for number, raw_size in catalog.rows("SELECT number, raw_size FROM fragments"):
        sizes[number] = raw_size
    return sizes


def _tell(findings: Findings, texts: Iterator[str]) -> None:
    """Distrust the catalog for each text, but not a thousand times for the same."""
    count = 0
    for text in texts:
        count += 1
        if count <= _TOLD_MAX:
            findings.distrust(text)
    if count > _TOLD_MAX:
        findings.distrust(f"... and {count - _TOLD_MAX} more of these in {_CATALOG}")


_CATALOG = "the catalog"


def _check_fragments(catalog: Catalog, findings: Findings) -> None:
    rows = catalog.rows(
        "SELECT fragments.number, fragments.pack, offset + record_size,"
        " coalesce(committed_size, 0), coalesce(state, -1), length(id)"
        " FROM fragments LEFT JOIN packs ON packs.number = fragments.pack"
        " WHERE length(id) != 32 OR state IS NULL OR state = ? OR offset + record_size >"
        " committed_size",
        (PackState.RETIRED,),
    )
    lost = {number for (number,) in catalog.rows("SELECT fragment FROM quarantine")}

    def texts() -> Iterator[str]:
        for number, pack, end, committed, state, id_size in rows:
            if pack == 0 and number in lost:
                continue  # a rebuild found no record of it: it is in quarantine until it is added
            if id_size != 32:
                yield f"fragment {number} of the catalog has an id of {id_size} bytes"
            elif state < 0:
                yield f"fragment {number} is said to be in pack {pack}, which is not in the catalog"
            elif state == PackState.RETIRED:
                yield f"fragment {number} is said to be in pack {pack}, which is retired"
            else:
                yield (
                    f"fragment {number} is said to reach to byte {end} of pack {pack}, of which"
                    f" {committed} bytes count"
                )

    _tell(findings, texts())


def _check_contents(catalog: Catalog, raw_sizes: NDArray[np.int64], findings: Findings) -> None:
    records = dict(catalog.rows("SELECT number, record_size FROM fragments"))

    def texts() -> Iterator[str]:
        for number, sha256, size, stored_bytes, blob in catalog.rows(
            "SELECT number, sha256, size, stored_bytes, extents FROM contents"
        ):
            try:
                extents = ExtentMap.parse(blob)
                check_seal(blob, number, sha256)
            except FragmentError as error:
                yield f"content {number}: {error.message}"
                continue
            text = _wrong_extents(extents, size, raw_sizes)
            if text or len(sha256) != 32:
                yield f"content {number}: {text or 'its SHA-256 has not 32 bytes'}"
                continue
            if sum(records[fragment] for fragment in set(extents.fragments)) != stored_bytes:
                findings.wrong_stored_bytes.add(number)

    _tell(findings, texts())
    if findings.wrong_stored_bytes:
        # Only a figure that `ls` shows: an interrupted command may have replaced records.
        findings.notes.append(
            f"the stored size of {len(findings.wrong_stored_bytes)} contents is out of date;"
            " `fragfs check --repair` counts it anew"
        )


def _wrong_extents(extents: ExtentMap, size: int, raw_sizes: NDArray[np.int64]) -> str:
    """What is wrong with a content's extents; "" if nothing is."""
    if extents.size != size:
        return f"its extents cover {extents.size} bytes of {size}"
    if not len(extents):
        return ""
    sizes, offsets, _ = extents.columns()
    fragments = np.frombuffer(extents.fragments, np.int64)
    inside = (fragments > 0) & (fragments < raw_sizes.size)
    if not inside.all() or (raw_sizes[fragments] < 0).any():
        return "its extents name fragments that are not in the catalog"
    ends = np.frombuffer(offsets, np.uint32).astype(np.int64) + np.frombuffer(sizes, np.uint32)
    if (ends > raw_sizes[fragments]).any():
        return "its extents reach beyond the end of a fragment"
    return ""


def _check_names(catalog: Catalog, findings: Findings) -> None:
    def texts() -> Iterator[str]:
        for (content,) in catalog.rows(
            "SELECT DISTINCT content FROM files WHERE content IS NOT NULL AND content NOT IN"
            " (SELECT number FROM contents)"
        ):
            yield f"a file shows content {content}, which is not in the catalog"
        for (model,) in catalog.rows(
            "SELECT DISTINCT model FROM files WHERE model NOT IN (SELECT number FROM models)"
        ):
            yield f"files belong to model number {model}, which is not in the catalog"
        folders = dict(catalog.rows("SELECT path, parent FROM folders"))
        names = {}
        for name, parent in catalog.rows("SELECT name, parent FROM models"):
            names[name] = parent
            for folder in parents(name):
                if folder not in folders:
                    yield f"the folder {printable(folder)!r} above a model is not in the catalog"
        for name, parent in (*names.items(), *folders.items()):
            if parent != split(name)[0]:
                yield f"{printable(name)!r} is listed in {printable(parent)!r}, where it is not"
            if any(above in names for above in parents(name)[:-1]):
                yield f"{printable(name)!r} lies inside another model"

    _tell(findings, texts())
    orphans = catalog.row(
        "SELECT count(*) FROM contents WHERE number NOT IN"
        " (SELECT content FROM files WHERE content IS NOT NULL)"
    )
    if orphans and orphans[0]:
        findings.notes.append(f"{orphans[0]} contents are shown by no file")


def _check_bases(catalog: Catalog, config: LibraryConfig, findings: Findings) -> None:
    known = {number for (number,) in catalog.rows("SELECT number FROM fragments")}
    bases: dict[int, tuple[int, ...]] = {}
    gaps = set()
    for fragment, position, base in catalog.rows(
        "SELECT fragment, position, base FROM bases ORDER BY fragment, position"
    ):
        before = bases.get(fragment, ())
        if position != len(before):
            gaps.add(fragment)
        bases[fragment] = (*before, base)

    def bases_of(number: int) -> tuple[int, ...]:
        return bases.get(number, ())

    def texts() -> Iterator[str]:
        for number, found in bases.items():
            if number not in known:
                yield f"fragment {number} has bases and is not in the catalog"
            elif number in gaps or not known.issuperset(found):
                yield f"the bases of fragment {number} are not all in the catalog"
            elif number in closure_of(found, bases_of):
                yield f"fragment {number} is predicted from itself"
            elif len(closure_of([number], bases_of)) > config.closure_max:
                yield (
                    f"decoding fragment {number} takes more than the {config.closure_max} fragments"
                    " that this library allows"
                )

    _tell(findings, texts())


def _check_signatures(catalog: Catalog, findings: Findings) -> None:
    stale = findings.stale_signatures
    for table in ("signatures", "similar"):
        stale.update(
            number
            for (number,) in catalog.rows(
                f"SELECT fragment FROM {table} WHERE fragment NOT IN (SELECT number FROM fragments)"
                f" UNION SELECT fragment FROM {table} WHERE fragment IN"
                " (SELECT fragment FROM quarantine)"
            )
        )
    stale.update(
        number
        for (number,) in catalog.rows(
            "SELECT fragment FROM similar WHERE fragment NOT IN (SELECT fragment FROM signatures)"
        )
    )
    if stale:
        findings.mend(f"{len(stale)} signatures are of fragments that cannot serve as bases")
    strays = catalog.row(
        "SELECT count(*) FROM quarantine WHERE fragment NOT IN (SELECT number FROM fragments)"
    )
    if strays and strays[0]:
        findings.mend(f"{strays[0]} fragments in quarantine are not in the catalog any more")


def _check_numbers(catalog: Catalog, findings: Findings) -> None:
    def texts() -> Iterator[str]:
        for table in ("fragments", "contents", "models"):
            row = catalog.row(f"SELECT coalesce(max(number), 0) FROM {table}")
            if row and row[0] >= catalog.next_number(table):
                yield f"the catalog would use numbers of {table} again"

    _tell(findings, texts())
