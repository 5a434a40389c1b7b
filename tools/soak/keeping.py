"""What looks after the library or copies from it, and changes nothing of what it holds."""

from __future__ import annotations

import os
import random
import shutil
import time
from collections.abc import Callable
from pathlib import Path

from fragfs.cli.main import COMMANDS
from tools.soak.changes import check_model
from tools.soak.runner import Runner, SoakError
from tools.soak.shelf import Shelf
from tools.soak.sources import Version

__all__ = ["Keeper", "library_bytes"]

_DISTURBED = 0.3
_LIBRARY_FACTOR_MAX = 4
"""Of the sources: more than a few generations of everything at one time is growth without bound."""

_LIBRARY_SPARE_BYTES = 200_000_000


def library_bytes(library: Path) -> int:
    """Bytes of everything in a library's directory; what vanishes meanwhile counts as nothing."""
    total = 0
    for parent, _, names in os.walk(library):
        for name in names:
            try:
                total += os.stat(os.path.join(parent, name)).st_size
            except FileNotFoundError:
                continue
    return total


class Keeper:
    """Runs commands that keep the library in order, at random; one for each thread.

    Args:
        runner: Runs them.
        shelf: What the library holds.
        directory: For exports.
        mountpoint: A mount that lives all the time.
        chosen: Chooses.
    """

    def __init__(
        self,
        runner: Runner,
        shelf: Shelf,
        directory: Path,
        mountpoint: Path,
        chosen: random.Random,
    ) -> None:
        self._mountpoint = mountpoint
        self._runner = runner
        self._shelf = shelf
        self._directory = directory
        self._chosen = chosen

    def run_reorganizing(self) -> None:
        """Optimize, collect garbage and check, until the soak ends."""
        levels = ("fast", "balanced", "small")
        actions: list[list[str]] = [["optimize"], *(["optimize", "--level", x] for x in levels)]
        if "gc" in COMMANDS:
            # Without grace what killed adds left goes at once, and a running one must not notice.
            actions += [["gc", "--grace", "0"]] * 4 + [["gc"], ["gc", "--dry-run"]]
        if "check" in COMMANDS:
            actions += [["check"]] * 3 + [["check", "--data"]] * 2
        self._repeat(lambda: self._reorganize(self._chosen.choice(actions)), pause_s=2.0)

    def run_reading(self) -> None:
        """Verify, export, list and explain, until the soak ends."""
        self._repeat(self._read, pause_s=1.0)

    def _repeat(self, action: Callable[[], None], pause_s: float) -> None:
        while not self._runner.stopping.is_set():
            action()
            time.sleep(self._chosen.random() * pause_s)

    def _reorganize(self, arguments: list[str]) -> None:
        disturb = self._chosen if self._chosen.random() < _DISTURBED else None
        self._runner.run(" ".join(arguments), *arguments, disturb=disturb)
        size, allowed = library_bytes(self._runner.library), self._allowed_bytes()
        if size > allowed:
            raise SoakError(f"the library has grown to {size:,} bytes, more than {allowed:,}")

    def _allowed_bytes(self) -> int:
        return _LIBRARY_FACTOR_MAX * self._shelf.size + _LIBRARY_SPARE_BYTES

    def _read(self) -> None:
        whole = self._chosen.choice(("verify", "ls", "stats", "model", "model", "export", "warm"))
        if whole in ("verify", "ls", "stats"):
            disturb = self._chosen if self._chosen.random() < _DISTURBED else None
            self._runner.run(whole, whole, disturb=disturb)
            return
        with self._shelf.shared(self._chosen) as shared:
            if shared is None:
                return
            name, version = shared
            if whole == "export":
                self._export(name, version)
            elif whole == "warm":
                # Short of memory, or not shown yet: it says so with 1. Only through the mount that
                # stays: who warms keeps others from being unmounted.
                place = ("--mountpoint", self._mountpoint)
                self._runner.run("warm", "warm", name, *place, allowed=(0, 1))
            elif self._chosen.random() < 0.5:
                self._runner.run("explain", "explain", name)
            else:
                check_model(self._runner, name, version)

    def _export(self, name: str, version: Version) -> None:
        place = self._directory / f"export{self._chosen.getrandbits(48):x}"
        disturb = self._chosen if self._chosen.random() < _DISTURBED else None
        try:
            result = self._runner.run("export", "export", name, place, disturb=disturb)
            if result.status == 0:
                found = Version.of(place)
                if found.sums != version.sums:
                    raise SoakError(f"{name} was exported as {found.sums}, not {version.sums}")
        finally:
            shutil.rmtree(place, ignore_errors=True)
