"""Runs commands and readers in child processes, disturbs them, and keeps the log and the counts."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO

from tools.soak import processes

__all__ = ["Child", "Result", "Runner", "SoakError"]

ROOT = Path(__file__).resolve().parents[2]

_HANG_S = 300.0
"""Nothing here takes a tenth of it on an idle machine; those of tests are not idle."""

_STOPPED_S_MAX = 3.0
"""How long a stopped process stays so: far less than others wait for a lock."""

_LAST_WORDS_S = 5.0

_SIGNALS = (
    signal.SIGKILL,
    signal.SIGKILL,
    signal.SIGKILL,
    signal.SIGTERM,
    signal.SIGINT,
    signal.SIGSTOP,
)
_ENDS = {
    signal.SIGKILL: (0, -signal.SIGKILL),
    signal.SIGTERM: (0, -signal.SIGTERM, 143),
    # Before the command handles it, it ends the interpreter as any other.
    signal.SIGINT: (0, -signal.SIGINT, 130),
    signal.SIGSTOP: (0,),
}


class SoakError(Exception):
    """Something did not hold."""


@dataclass(frozen=True, slots=True)
class Result:
    """How a command ended.

    Attributes:
        status: Its exit status.
        output: What it said.
        errors: What it complained about.
        ended_by: The signal it was sent to end it, None if it was not.
    """

    status: int
    output: bytes
    errors: str
    ended_by: int | None


class Child:
    """A child process whose output goes to files, so that it never waits for us."""

    def __init__(
        self, arguments: Sequence[str | os.PathLike[str]], place: Path, environment: dict[str, str]
    ) -> None:
        self._output: IO[bytes] = place.with_suffix(".out").open("w+b")
        self._errors: IO[bytes] = place.with_suffix(".err").open("w+b")
        self._place = place
        self.process = subprocess.Popen(
            [os.fspath(argument) for argument in arguments],
            stdin=subprocess.PIPE,
            stdout=self._output,
            stderr=self._errors,
            env=environment,
            cwd=ROOT,
            process_group=0,  # an interrupt at the terminal is for the soak alone
        )
        assert self.process.stdin is not None
        self._input = self.process.stdin

    @property
    def said(self) -> int:
        """Bytes it has written to standard output."""
        return os.fstat(self._output.fileno()).st_size

    def output(self) -> bytes:
        """What it has written to standard output."""
        return os.pread(self._output.fileno(), self.said, 0)

    def errors(self) -> str:
        """What it has written to standard error."""
        size = os.fstat(self._errors.fileno()).st_size
        return os.pread(self._errors.fileno(), size, 0).decode(errors="backslashreplace")

    def say(self, text: str) -> None:
        """Write to its standard input; whether it has ended already is for others to find."""
        with suppress(BrokenPipeError):
            self._input.write(text.encode())
            self._input.flush()

    def close(self) -> None:
        """Forget it, and its files."""
        with suppress(BrokenPipeError):
            self._input.close()
        self._output.close()
        self._errors.close()
        for suffix in (".out", ".err"):
            self._place.with_suffix(suffix).unlink(missing_ok=True)


class Runner:
    """Everything that threads of a soak share: children, the log, the counts, the end.

    Attributes:
        hang_s: How long a child may say nothing.

    Args:
        directory: Where the log and output of children go.
        library: The library.
        mark: What children are marked with.
    """

    def __init__(self, directory: Path, library: Path, mark: str) -> None:
        self.library = library
        self.hang_s = _HANG_S
        self.stopping = threading.Event()
        self.counts: Counter[str] = Counter()
        self.failures: list[str] = []
        self._output = directory / "output"
        self._output.mkdir()
        home = directory / "home"
        home.mkdir()
        self.environment = {
            "PATH": os.environ["PATH"],
            "HOME": os.fspath(home),
            "TMPDIR": os.fspath(self._output),
            "FRAGFS_LIBRARY": os.fspath(library),
            "PYTHONFAULTHANDLER": "1",  # SIGABRT then shows what Python was at
            "PYTHONPATH": os.fspath(ROOT),
            processes.MARK: mark,
        }
        self._log = (directory / "log").open("w", buffering=1, errors="backslashreplace")
        self._started = time.monotonic()
        self._lock = threading.Lock()
        self._children: dict[int, Child] = {}
        self._number = 0
        self._durations: dict[str, float] = {}

    # --- log, counts, failure

    def log(self, text: str) -> None:
        """Write a line of the log."""
        self._log.write(f"{time.monotonic() - self._started:9.3f} {text}\n")

    def count(self, name: str, by: int = 1) -> None:
        """Count something that was done."""
        with self._lock:
            self.counts[name] += by

    def fail(self, text: str) -> None:
        """Note that something did not hold; everybody stops."""
        with self._lock:
            self.failures.append(text)
        self.log(f"FAILED: {text}")
        self.stopping.set()

    # --- children

    def start(self, arguments: Sequence[str | os.PathLike[str]]) -> Child:
        """Start a child process."""
        with self._lock:
            self._number += 1
            place = self._output / f"{self._number}"
        child = Child(arguments, place, self.environment)
        with self._lock:
            self._children[child.process.pid] = child
        return child

    def end(self, child: Child) -> Result:
        """What an ended child left behind; closes it."""
        result = Result(child.process.returncode, child.output(), child.errors(), None)
        with self._lock:
            del self._children[child.process.pid]
        child.close()
        return result

    def wait(self, child: Child, what: str) -> Result:
        """Wait for a child's end.

        Raises:
            SoakError: It neither ends nor says anything for long.
        """
        while child.process.poll() is None:
            self.wait_for_word(child, what)
        return self.end(child)

    def wait_for_word(self, child: Child, what: str) -> None:
        """Wait until a child says something more, or ends.

        Raises:
            SoakError: It does neither for long.
        """
        said, since = child.said, time.monotonic()
        while child.process.poll() is None and child.said == said:
            if time.monotonic() - since > self.hang_s:
                raise SoakError(f"{what} hangs\n{self._examine(child)}")
            time.sleep(0.02)

    def _examine(self, child: Child) -> str:
        """What a hanging child waits for; ends it."""
        text = processes.describe(child.process.pid)
        child.process.send_signal(signal.SIGABRT)
        with suppress(subprocess.TimeoutExpired):
            child.process.wait(_LAST_WORDS_S)
        child.process.kill()
        return f"{text}\n{child.errors()}"

    def run(
        self,
        action: str,
        *arguments: str | os.PathLike[str],
        disturb: random.Random | None = None,
        allowed: Sequence[int] = (0,),
    ) -> Result:
        """Run a fragfs command.

        Args:
            action: What it is counted as.
            *arguments: Of the command.
            disturb: Stop or kill it at a moment that this chooses; None to leave it alone.
            allowed: Exit statuses that are all right if it is left alone.

        Raises:
            SoakError: It hangs, or ends as it must not.
        """
        started = time.monotonic()
        child = self.start([sys.executable, "-m", "fragfs", *arguments])
        shown = f"fragfs {' '.join(map(os.fspath, arguments))}"
        self.log(f"{child.process.pid} {shown}")
        sent = self._disturb(child, action, disturb) if disturb is not None else None
        result = self.wait(child, f"{shown} (process {child.process.pid})")
        took = time.monotonic() - started
        self.log(f"{child.process.pid} {action} ended with {result.status} after {took:.2f} s")
        self.count(action)
        ended_by = sent if sent not in (None, signal.SIGSTOP) else None
        # Before the interpreter has started, its death is an error of its own.
        if sent == signal.SIGINT and result.status == 1 and "KeyboardInterrupt" in result.errors:
            result = replace(result, status=-signal.SIGINT)
        # It may have been done before the signal came.
        ends = _ENDS[signal.Signals(sent)] if ended_by is not None and sent else ()
        expected = {*allowed, *ends}
        # What is interrupted may say so with a traceback, even if it was done already.
        is_bug = "internal error" in result.errors or (
            ended_by is None and "Traceback" in result.errors
        )
        if result.status not in expected or is_bug:
            said = result.errors[-3000:] or result.output[-1000:].decode(errors="replace")
            raise SoakError(f"{shown} ended with {result.status} (sent: {sent}):\n{said}")
        if sent is None:
            self._durations[action] = 0.7 * self._durations.get(action, took) + 0.3 * took
        return Result(result.status, result.output, result.errors, ended_by)

    def _disturb(self, child: Child, action: str, chosen: random.Random) -> int | None:
        """Send a signal at a random moment of a life as long as those before; says which."""
        moment_s = chosen.random() * 1.1 * self._durations.get(action, 2.0)
        try:
            child.process.wait(moment_s)
        except subprocess.TimeoutExpired:
            pass
        else:
            return None
        number = chosen.choice(_SIGNALS)
        self.log(f"{child.process.pid} is sent {signal.Signals(number).name}")
        child.process.send_signal(number)
        self.count(f"{signal.Signals(number).name} to {action}")
        if number == signal.SIGSTOP:
            time.sleep(chosen.random() * _STOPPED_S_MAX)
            child.process.send_signal(signal.SIGCONT)
        return int(number)

    def kill_children(self) -> None:
        """Kill every child that still runs; who waits for it will find that."""
        with self._lock:
            for child in self._children.values():
                child.process.kill()

    def close(self) -> None:
        """Kill what is left, and close the log; no other thread uses this any more."""
        self.kill_children()
        for child in list(self._children.values()):
            child.process.wait()
            self.end(child)
        self._log.close()
