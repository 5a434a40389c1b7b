"""What the cells of the catalog may hold. Pure.

SQLite lets any column hold a value of any type, and a damaged page does. Rows are checked where
they leave the catalog, so that no other room meets a string where a number is due.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

__all__ = ["odd_cell"]

_BYTES, _NUMBER, _TEXT = frozenset((bytes,)), frozenset((int,)), frozenset((str,))
_TYPES = {
    **dict.fromkeys("uuid batch id name parent path directory".split(), _BYTES),
    **dict.fromkeys("sha256 extents sketch".split(), _BYTES),
    **dict.fromkeys("number fragment_elements closure_max zstd_level level".split(), _NUMBER),
    **dict.fromkeys("pack_bytes_max generation committed_size file_size state".split(), _NUMBER),
    **dict.fromkeys("pack offset record_size raw_size predictor position".split(), _NUMBER),
    **dict.fromkeys("base fragment key model added_ns mode stored_bytes".split(), _NUMBER),
    # NULL where a directory has no content to join with.
    **dict.fromkeys("content size mtime_ns".split(), _NUMBER | {type(None)}),
    "verdict": _TEXT,
}


def odd_cell(
    description: Iterable[Sequence[object]], rows: Iterable[tuple[object, ...]]
) -> str | None:
    """Find a cell that holds what its column never does.

    Args:
        description: Of the cursor: the name of each column first. Names that are no column of ours
            (expressions) are not checked.
        rows: What was fetched.

    Returns:
        What is odd, for a message; None if nothing is.
    """
    allowed = [_TYPES.get(str(column[0])) for column in description]
    names = [column[0] for column in description]
    for kinds in {tuple(map(type, row)) for row in rows}:
        for name, kind, known in zip(names, kinds, allowed, strict=True):
            if known is not None and kind not in known:
                return f"a cell of column {name} holds {kind.__name__}"
    return None
