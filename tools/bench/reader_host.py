"""Readers as processes of their own: one program that has imported everything forks them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from tools.bench.workplace import ROOT, BenchError

__all__ = ["ReaderHost", "reader_host"]

_ENDS_S = 10.0


class ReaderHost:
    """Starts readers.

    Attributes:
        loader: What safetensors fills: "torch", "numpy", or None if it is not installed.
    """

    def __init__(self, requests: IO[str], answers: IO[str]) -> None:
        self._requests = requests
        self._answers = answers
        self.loader: str | None = self._answer()["loader"]

    def run(self, method: str, path: Path, memory_bytes: int) -> dict[str, Any]:
        """Read a file in a new process.

        Args:
            method: One of the reader's, or "touch".
            path: What to read.
            memory_bytes: How much memory the page cache and the server will need for it.

        Raises:
            BenchError: It could not.
        """
        try:
            self._requests.write(json.dumps([method, os.fspath(path), memory_bytes]) + "\n")
            self._requests.flush()
        except BrokenPipeError as error:
            raise BenchError("the process that starts readers has ended") from error
        return self._answer()

    def _answer(self) -> dict[str, Any]:
        line = self._answers.readline()
        if not line:
            raise BenchError("the process that starts readers has ended")
        found: dict[str, Any] = json.loads(line)
        if "error" in found:
            raise BenchError(f"a reader failed: {found['error']}")
        return found


@contextmanager
def reader_host() -> Iterator[ReaderHost]:
    """A host of readers; it is gone afterwards, with the reader that may still run."""
    process = subprocess.Popen(
        [sys.executable, "-m", "tools.bench.reader", "serve"],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        yield ReaderHost(process.stdin, process.stdout)
    finally:
        # The session is its own: this ends its readers as well, and nobody else.
        process.stdin.close()
        try:
            process.wait(_ENDS_S)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, 9)
            process.wait()
        process.stdout.close()
