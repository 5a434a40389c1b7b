"""The `fragfs` command: finds the command, runs it, turns errors into lines and exit codes.

A command's module is imported when the command is used (or listed by `--help`), and rooms such as
`library` and `mount` when it does its work, so that `fragfs ls` pays for nothing else.
"""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Sequence

import click

from fragfs.cli.environment import LIBRARY_VARIABLE
from fragfs.cli.options import (
    EXIT_FAILED,
    EXIT_INTERRUPTED,
    EXIT_USAGE,
    Session,
    example,
    shared_options,
)
from fragfs.cli.terminal import remark
from fragfs.errors import FragmentError, UsageError
from fragfs.library.files import remedy_of

__all__ = ["COMMANDS", "cli", "main", "run"]

COMMANDS = {
    "init": "fragfs.cli.filling",
    "add": "fragfs.cli.filling",
    "estimate": "fragfs.cli.explaining",
    "ls": "fragfs.cli.listing",
    "stats": "fragfs.cli.listing",
    "explain": "fragfs.cli.explaining",
    "mount": "fragfs.cli.serving",
    "umount": "fragfs.cli.serving",
    "warm": "fragfs.cli.warming",
    "doctor": "fragfs.cli.diagnosing",
    "export": "fragfs.cli.checking",
    "verify": "fragfs.cli.checking",
    "check": "fragfs.cli.inspecting",
    "rm": "fragfs.cli.changing",
    "mv": "fragfs.cli.changing",
    "gc": "fragfs.cli.collecting",
    "optimize": "fragfs.cli.optimizing",
}
"""Every command, in the order of `--help`, and the module that defines it under its own name."""


class _LazyGroup(click.Group):
    """A group that imports a command when it is asked for."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        command = getattr(importlib.import_module(COMMANDS[cmd_name]), f"{cmd_name}_command")
        assert isinstance(command, click.Command)
        return command


@click.group(
    cls=_LazyGroup,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    epilog=example(
        "fragfs init ~/models.fragfs",
        f"export {LIBRARY_VARIABLE}=~/models.fragfs",
        "fragfs add ./all-MiniLM-L6-v2",
        "fragfs mount ~/models",
    ),
)
@shared_options(environment=True)
@click.version_option(package_name="fragfs", message="fragfs %(version)s")
def cli() -> None:
    """One deduplicated, compressed library for all your model files.

    Models are added to a library, which stores each distinct piece once, and similar ones as
    differences. They are read back as ordinary files under a mount point, every byte identical to
    what was added. 'fragfs COMMAND --help' explains a command, with an example.

    Exit status: 0 done, 1 failed, 2 usage, 130 interrupted.
    """


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the `fragfs` command.

    Args:
        arguments: What follows the program's name; None takes them from `sys.argv`.

    Returns:
        The exit status: 0 done, 1 failed, 2 usage, 130 interrupted.
    """
    return run(cli, "fragfs", arguments)


def run(command: click.Command, program: str, arguments: Sequence[str] | None = None) -> int:
    """Run a click command behind the error handling that all our programs share."""
    session = Session()
    try:
        status = command.main(
            args=None if arguments is None else list(arguments),
            prog_name=program,
            standalone_mode=False,
            obj=session,
        )
        # Errors of writing out must surface here, not in the interpreter's last breath.
        sys.stdout.flush()
    except BrokenPipeError:
        return _close_broken_pipe()
    except (click.Abort, KeyboardInterrupt):
        return _report(program, "interrupted", EXIT_INTERRUPTED)
    except Exception as error:
        if session.debug:
            import traceback  # with what it needs, a tenth of the time that `ls` takes to start

            traceback.print_exc()
        return _report(program, *_explain(error, program))
    return status if isinstance(status, int) else 0


def _explain(error: Exception, program: str) -> tuple[str, int]:
    """What to say about an error, and the exit status it means."""
    match error:
        case click.UsageError():
            where = error.ctx.command_path if error.ctx else program
            return f"{error.format_message().rstrip('.')}; see '{where} --help'", EXIT_USAGE
        case click.ClickException():
            return error.format_message(), EXIT_FAILED
        case UsageError():
            return str(error), EXIT_USAGE
        case FragmentError():
            return str(error), EXIT_FAILED
        case OSError(strerror=str(reason)):
            known = isinstance(error.filename, (str, bytes))  # else a descriptor, or nothing
            where = f"{os.fsdecode(error.filename)}: " if known else ""
            remedy = remedy_of(error)
            return f"{where}{reason}{f'; {remedy}' if remedy else ''}", EXIT_FAILED
    name = type(error).__name__
    return (
        f"internal error: {name}: {error}; please report this, with what --debug shows",
        EXIT_FAILED,
    )


def _report(program: str, message: str, status: int) -> int:
    try:
        remark(f"{program}: {message}")
    except BrokenPipeError:
        return _close_broken_pipe()
    return status


def _close_broken_pipe() -> int:
    """Nobody reads our output any more: be quiet, also when the interpreter flushes at exit."""
    sink = os.open(os.devnull, os.O_WRONLY)
    for stream in (sys.stdout, sys.stderr):
        os.dup2(sink, stream.fileno())
    os.close(sink)
    return EXIT_FAILED
