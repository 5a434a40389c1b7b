"""The daemon's process: `python -m fragfs.mount.detached FD`, started by `launch.mount`.

Options come on standard input. On FD go lines of JSON: first the process id, then either
{"ready": true} or what went wrong. It is a new program, not a fork of the command line: a fork
would inherit locks, threads and SQLite connections. The one fork here happens before any of those
exist; it makes the daemon a child of init, so that nobody has to reap it.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import sys
import traceback
from typing import Any

from fragfs.errors import FragmentError, StorageError
from fragfs.mount.options import MountOptions

__all__ = ["main"]

log = logging.getLogger(__name__)


def main(arguments: list[str]) -> int:
    """Serve the mount described on standard input; returns the exit status."""
    pipe = int(arguments[0])
    os.set_inheritable(pipe, False)
    options = MountOptions.from_json(sys.stdin.read())
    if os.fork():
        os._exit(0)
    ready = False

    def on_ready() -> None:
        nonlocal ready
        ready = True
        _redirect_output()
        try:
            _tell(pipe, {"ready": True})
        except BrokenPipeError as error:
            log.info("whoever started the mount has given up waiting for it: ending")
            raise StorageError("nobody waits for the mount any more") from error
        os.close(pipe)

    try:
        _tell(pipe, {"pid": os.getpid()})
        from fragfs.mount.daemon import run

        return run(options, on_ready, foreground=False)
    except BaseException as error:
        if not ready:
            if not isinstance(error, FragmentError):
                traceback.print_exc()
            with contextlib.suppress(BrokenPipeError):
                _tell(pipe, _describe(error))
        return 1


def _describe(error: BaseException) -> dict[str, Any]:
    if isinstance(error, FragmentError):
        return {
            "error": error.message,
            "kind": type(error).__name__,
            "remedy": error.remedy,
            "path": error.path,
        }
    return {"error": f"{type(error).__name__}: {error}", "kind": None}


def _redirect_output() -> None:
    """From now on the log is the only voice: nobody reads the launcher's temporary file."""
    null = os.open(os.devnull, os.O_RDWR)
    for descriptor in (0, 1, 2):
        os.dup2(null, descriptor)
    os.close(null)


def _tell(pipe: int, message: dict[str, Any]) -> None:
    os.write(pipe, json.dumps(message).encode() + b"\n")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
