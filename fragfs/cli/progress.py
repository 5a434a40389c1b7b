"""Progress of long commands: a bar on standard error if that is a terminal, else nothing."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from fragfs.cli.options import Session
from fragfs.cli.terminal import escape, is_terminal
from fragfs.library.progress import NO_PROGRESS, Progress

if TYPE_CHECKING:
    from rich.progress import Progress as RichProgress

__all__ = ["show_progress"]

_NAME_WIDTH = 32


class _Bar:
    """Draws what a `Progress` is told with rich; calls come from one thread."""

    def __init__(self, bar: RichProgress) -> None:
        self._bar = bar
        self._task = bar.add_task("", total=None, start=False, visible=False, name="")

    def start(self, what: str, total_bytes: int) -> None:
        """Begin a bar of `total_bytes`, in place of the one before."""
        self._bar.reset(
            self._task, start=True, total=total_bytes, description=escape(what), visible=True
        )

    def advance(self, size: int) -> None:
        """Move on by `size` bytes."""
        self._bar.advance(self._task, size)

    def note(self, text: str) -> None:
        """Show `text` beside the bar, its end if it is long."""
        shown = escape(text)
        if len(shown) > _NAME_WIDTH:
            shown = "…" + shown[1 - _NAME_WIDTH :]
        self._bar.update(self._task, name=shown)


@contextmanager
def show_progress(session: Session) -> Iterator[Progress]:
    """Yield what to report progress to; the bar disappears at the end."""
    if session.quiet or not is_terminal(sys.stderr):
        yield NO_PROGRESS
        return
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        TextColumn,
        TimeRemainingColumn,
        TransferSpeedColumn,
    )
    from rich.progress import Progress as RichProgress

    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=None),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[name]}", markup=False),
    )
    with RichProgress(*columns, console=Console(stderr=True), transient=True) as bar:
        yield _Bar(bar)
