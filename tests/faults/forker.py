"""Runs `fragfs` commands in children that start at once: all that they import is imported already.

Reads from each line, as JSON, arguments and after how many seconds to kill the child, or null;
answers with its exit status, negative for a signal. Nothing here opens a library, so a child
inherits nothing of one.
"""

import importlib
import json
import os
import signal
import sys
import time

from fragfs.cli.main import COMMANDS, main

ROOMS = (
    "add",
    "collect",
    "ingest",
    "library",
    "publish",
    "readback",
    "reorganize",
    "stats",
    "writer",
)


def serve() -> None:
    for module in {*COMMANDS.values(), *(f"fragfs.library.{room}" for room in ROOMS)}:
        importlib.import_module(module)
    print("ready", flush=True)
    for line in sys.stdin:
        arguments, kill_after_s = json.loads(line)
        child = os.fork()
        if child == 0:
            sink = os.open(os.devnull, os.O_RDWR)
            for descriptor in (0, 1, 2):
                os.dup2(sink, descriptor)
            os._exit(main(arguments))
        if kill_after_s is not None:
            time.sleep(kill_after_s)
            os.kill(child, signal.SIGKILL)  # still there, if only as a zombie
        _, status = os.waitpid(child, 0)
        print(os.waitstatus_to_exitcode(status), flush=True)


if __name__ == "__main__":
    serve()
