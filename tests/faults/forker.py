"""Runs `fragfs` commands in children that start at once: all that they import is imported already.

Reads a request from each line, as JSON: `arguments`, and if wanted `kill_after_s`, the `user` to
run as (a number), `files_max`, the limit on open files, and `output`, a file for what it prints.
Answers with the exit status, negative for a signal. Nothing here opens a library, so a child
inherits nothing of one.
"""

import importlib
import json
import os
import resource
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
        request = json.loads(line)
        child = os.fork()
        if child == 0:
            become(request)
            os._exit(main(request["arguments"]))
        if "kill_after_s" in request:
            time.sleep(request["kill_after_s"])
            os.kill(child, signal.SIGKILL)  # still there, if only as a zombie
        _, status = os.waitpid(child, 0)
        print(os.waitstatus_to_exitcode(status), flush=True)


def become(request: dict) -> None:
    """Make this child what the request wants it to be."""
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    output = os.open(request.get("output", os.devnull), os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(output, 1)
    os.dup2(output, 2)
    os.closerange(3, 64)
    if "user" in request:
        os.setgroups([])
        os.setgid(request["user"])
        os.setuid(request["user"])
    if "files_max" in request:
        limit = request["files_max"]
        resource.setrlimit(resource.RLIMIT_NOFILE, (limit, limit))


if __name__ == "__main__":
    serve()
