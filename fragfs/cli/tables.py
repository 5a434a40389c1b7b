"""Figures and columns as people read them. Pure."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence

__all__ = [
    "describe_mechanism",
    "format_bytes",
    "format_count",
    "format_share",
    "format_table",
    "format_time",
    "list_savings",
]

_UNITS = ("kB", "MB", "GB", "TB", "PB", "EB")

_MECHANISMS = {
    "exact": "storing equal pieces once",
    "delta": "differences to similar pieces",
    "sparse": "the few elements that differ from similar pieces",
    "cast": "differences to copies in other precisions",
    "blend": "differences to mixtures of two pieces or more",
    "quantize": "differences to the originals of quantized copies",
    "decay": "differences to earlier checkpoints, weight decay allowed for",
    "planes": "byte planes",
    "zstd": "zstd",
    "constant": "pieces of one repeated value",
    "raw": "nothing: stored as they are",
}


def format_bytes(count: int) -> str:
    """A size in decimal units with three digits or more: `999 B`, `1.50 kB`, `90.9 MB`."""
    if abs(count) < 1000:
        return f"{count} B"
    value = float(count)
    for unit in _UNITS:
        value /= 1000
        # Compared after rounding, so that 999,999 is 1.00 MB and not 1000 kB.
        if abs(value) < 9.995:
            return f"{value:.2f} {unit}"
        if abs(value) < 99.95:
            return f"{value:.1f} {unit}"
        if abs(value) < 999.5:
            return f"{value:.0f} {unit}"
    return f"{value:.0f} {_UNITS[-1]}"


def format_share(part: int, whole: int) -> str:
    """`part` of `whole` in percent, `-` where there is no whole."""
    return f"{100 * part / whole:.1f} %" if whole else "-"


def format_count(count: int, singular: str, plural: str | None = None) -> str:
    """`1 file`, `2 files`, `12,000 files`."""
    return f"{count:,} {singular if count == 1 else plural or singular + 's'}"


def format_time(time_ns: int) -> str:
    """Local date and time to the minute."""
    return time.strftime("%Y-%m-%d %H:%M", time.localtime(time_ns // 1_000_000_000))


def format_table(rows: Sequence[Sequence[str]], align: str) -> list[str]:
    """Lay rows out in columns two spaces apart.

    Args:
        rows: Cells; every row as long as `align`.
        align: One letter per column: `l` left, `r` right. The last column is never padded.

    Returns:
        One line per row.
    """
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        cells = [
            cell.rjust(width) if side == "r" else cell.ljust(width)
            for cell, width, side in zip(row, widths, align, strict=True)
        ]
        lines.append("  ".join(cells).rstrip())
    return lines


def describe_mechanism(name: str) -> str:
    """What a mechanism does, in plain words."""
    return _MECHANISMS.get(name, name)


def list_savings(saved_bytes: Mapping[str, int]) -> list[tuple[str, str]]:
    """What was saved and how: (size, "by ..."), the largest first; nothing that saved nothing."""
    ranked = sorted(saved_bytes.items(), key=lambda item: -item[1])
    return [
        (format_bytes(saved), f"by {describe_mechanism(mechanism)}")
        for mechanism, saved in ranked
        if saved > 0
    ]
