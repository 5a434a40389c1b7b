"""Mounts of the library, what kills them and their helpers, and who reads through them."""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from tools.soak import processes
from tools.soak.reader import MISSING, REFUSED, WRONG
from tools.soak.runner import Child, Runner, SoakError
from tools.soak.sources import Version

__all__ = ["Mount", "Readers"]

_PATIENCE_S = 120.0
"""How long a mount may take to show what was committed: a second, unless the machine is busy."""

_ENDS_S = 60.0
_STOPPED_S_MAX = 2.0
_BAD_WORDS = (" ERROR ", " CRITICAL ", "Traceback")


class Mount:
    """A mount made with the command, and the processes that serve it.

    Args:
        runner: Runs the command.
        point: An existing directory.
        options: Of `fragfs mount`.

    Raises:
        SoakError: It cannot be mounted.
    """

    def __init__(self, runner: Runner, point: Path, options: Sequence[str] = ()) -> None:
        self._runner = runner
        self.point = point
        log = point.with_suffix(".log")
        result = runner.run("mount", "mount", point, "--json", "--log-file", log, *options)
        told = json.loads(result.output)
        self.pid = int(told["pid"])
        self.cache: str | None = told["cache_directory"]
        self.seen: set[int] = set()
        self.helpers()

    def helpers(self) -> dict[str, list[int]]:
        """Its helpers: decoders, the pusher, and the guard, which is the pusher's child."""
        found: dict[str, list[int]] = {"decoder": [], "pusher": [], "guard": []}
        for pid in processes.children(self.pid):
            line = processes.command_line(pid)
            if "fragfs.mount.pusher" in line:
                found["pusher"].append(pid)
                found["guard"] += processes.children(pid)
            elif "fragfs.reader.decoder" in line:
                found["decoder"].append(pid)
        for pids in found.values():
            self.seen.update(pids)
        return found

    @property
    def is_alive(self) -> bool:
        """Whether its daemon runs."""
        return processes.is_alive(self.pid)

    def disturb_helpers(self, chosen: random.Random) -> None:
        """Kill or stop a helper, or stop the daemon for a moment: no reader sees an error."""
        kind = chosen.choice(("decoder", "decoder", "pusher", "guard", "daemon"))
        pids = [self.pid] if kind == "daemon" else self.helpers()[kind]
        if not pids:
            return
        pid = chosen.choice(pids)
        if kind != "daemon" and chosen.random() < 0.7:
            if processes.kill(pid):
                self._note(kind, pid, "SIGKILL")
        elif processes.kill(pid, signal.SIGSTOP):
            self._note(kind, pid, "SIGSTOP")
            time.sleep(chosen.random() * _STOPPED_S_MAX)
            processes.kill(pid, signal.SIGCONT)

    def kill(self, chosen: random.Random) -> None:
        """Kill the daemon; perhaps the pusher as well, before it or after it."""
        pushers = self.helpers()["pusher"]
        pids = chosen.choice(([self.pid], [*pushers, self.pid], [self.pid, *pushers]))
        for pid in pids:
            if processes.kill(pid):
                self._note("daemon" if pid == self.pid else "pusher", pid, "SIGKILL")
        self.expect_end()

    def terminate(self, chosen: random.Random) -> None:
        """Ask the daemon to end; sometimes twice, which cuts readers off."""
        processes.kill(self.pid, signal.SIGTERM)
        self._note("daemon", self.pid, "SIGTERM")
        if chosen.random() < 0.5:
            time.sleep(chosen.random())
            processes.kill(self.pid, signal.SIGTERM)
        self.expect_end()

    def unmount(self, *options: str) -> None:
        """End it with the command.

        Raises:
            SoakError: It does not end.
        """
        self._runner.run("umount", "umount", *options, self.point)
        self.expect_end()

    def expect_end(self) -> None:
        """Wait until none of its processes is left.

        Raises:
            SoakError: Some are.
        """
        left = processes.wait_for_end([self.pid, *self.seen], _ENDS_S)
        if left:
            text = "\n".join(processes.describe(pid) for pid in left)
            raise SoakError(f"processes of the mount on {self.point} do not end:\n{text}")

    def _note(self, kind: str, pid: int, what: str) -> None:
        self._runner.log(f"{what} to {kind} {pid} of {self.point.name}")
        self._runner.count(f"{what} to {kind}")

    def check_log(self) -> None:
        """See that the daemon told of nothing but helpers that ended.

        Raises:
            SoakError: It logged an error.
        """
        path = self.point.with_suffix(".log")
        for line in path.read_text(errors="replace").splitlines():
            if any(word in line for word in _BAD_WORDS):
                raise SoakError(f"the daemon of {self.point} logged: {line}\n{self.log_text()}")

    def log_text(self) -> str:
        """The end of the daemon's log."""
        path = self.point.with_suffix(".log")
        return path.read_text(errors="replace")[-3000:] if path.exists() else "no log"


class Readers:
    """Starts readers and judges how they end.

    Args:
        runner: Runs them.
    """

    def __init__(self, runner: Runner) -> None:
        self._runner = runner

    def start(
        self,
        mode: str,
        mount: Mount,
        name: str,
        versions: Sequence[Version],
        chosen: random.Random,
        seconds: float,
        patience_s: float = _PATIENCE_S,
    ) -> Child:
        """Start a reader of a model; see `tools.soak.reader` for the modes."""
        task = {
            "mode": mode,
            "model": os.fspath(mount.point / name),
            "versions": [os.fspath(version.directory) for version in versions],
            "seed": chosen.getrandbits(32),
            "seconds": seconds,
            "patience": patience_s,
        }
        child = self._runner.start([sys.executable, "-m", "tools.soak.reader", json.dumps(task)])
        self._runner.log(f"{child.process.pid} reads {name} in {mount.point.name}: {mode}")
        return child

    def finish(self, child: Child, mount: Mount, mode: str, *, must_live: bool = True) -> None:
        """Wait for a reader's end.

        Args:
            child: The reader.
            mount: What it reads through.
            mode: What it does.
            must_live: Whether the mount lives all the time: if not, the reader may be cut off, but
                never see a wrong byte.

        Raises:
            SoakError: It saw what it must not see, or hangs.
        """
        what = f"reader {child.process.pid} ({mode}) of {mount.point.name}"
        result = self._runner.wait(child, what)
        compared = sum(int(line.split()[1]) for line in result.output.splitlines() if b" " in line)
        self._runner.count("bytes read", compared)
        self._runner.count(f"reader, {mode}")
        self._runner.log(f"{child.process.pid} read {compared:,} bytes, ended with {result.status}")
        if result.status == 0:
            return
        cut_off = result.status in (REFUSED, MISSING, -signal.SIGBUS)
        if must_live or not cut_off or result.status == WRONG:
            raise SoakError(
                f"{what} ended with {result.status}: {result.errors[-2000:]}\n"
                f"log of the mount:\n{mount.log_text()}"
            )
        self._runner.count("reader cut off")
