"""Fragments that an add has stored and no model names yet: the table `unpublished`.

A killed add leaves them behind, and adding the same again finds them, for as long as garbage
collection lets them be. Each function makes a change for a batch's commit.

Source: FORMAT.md, "What may be deleted".
"""

from __future__ import annotations

import sqlite3
from collections.abc import Callable, Set

from fragfs.library.lease import as_ranges

__all__ = ["note_unpublished", "settle_published"]


def note_unpublished(numbers: range, now_ns: int) -> Callable[[sqlite3.Connection], None]:
    """Note that these fragments wait for a model.

    Args:
        numbers: Their numbers.
        now_ns: The time.
    """

    def apply(connection: sqlite3.Connection) -> None:
        if numbers:
            # A clock that was set back must not make them look old when it is right again.
            connection.execute(
                "INSERT INTO unpublished VALUES"
                " (?, ?, max(?, (SELECT coalesce(max(added_ns), 0) FROM models)))",
                (numbers[0], numbers[-1], now_ns),
            )

    return apply


def settle_published(connection: sqlite3.Connection, numbers: Set[int]) -> None:
    """Take fragments that a model names now out of all ranges; in the commit that publishes it.

    Args:
        connection: The transaction.
        numbers: The fragments of the model's new contents.
    """
    if not numbers:
        return
    for first, last, stored_ns in connection.execute(
        "SELECT first, last, stored_ns FROM unpublished WHERE first <= ? AND last >= ?",
        (max(numbers), min(numbers)),
    ).fetchall():
        left = [number for number in range(first, last + 1) if number not in numbers]
        if len(left) == last - first + 1:
            continue
        connection.execute("DELETE FROM unpublished WHERE first = ?", (first,))
        connection.executemany(
            "INSERT INTO unpublished VALUES (?, ?, ?)",
            ((*part, stored_ns) for part in as_ranges(left)),
        )
