r"""What leaves the program: lines on standard output, remarks on standard error, names as bytes.

File and model names are bytes. They are shown as UTF-8, with the bytes that are none carried
through unchanged, so that `fragfs ls | xargs -d '\n'` works on any name; on a terminal, where a
name could move the cursor or change the title, control characters are escaped.
"""

from __future__ import annotations

import json
import sys
from typing import Any

import click

from fragfs.library.names import printable

__all__ = ["emit_json", "escape", "is_terminal", "json_name", "remark", "say", "show_name"]


def is_terminal(stream: Any) -> bool:
    """True if `stream` is an open terminal."""
    try:
        return bool(stream.isatty())
    except (AttributeError, ValueError):  # replaced or closed streams
        return False


def escape(text: str) -> str:
    r"""Replace what is not printable by `\n`, `\x1b`, `\xff` (a byte that is not UTF-8), ..."""
    return printable(text.encode("utf-8", "surrogateescape"))


def show_name(name: bytes) -> str:
    """A name for standard output: escaped on a terminal, byte for byte anywhere else."""
    return printable(name) if is_terminal(sys.stdout) else json_name(name)


def json_name(name: bytes) -> str:
    r"""A name for JSON; bytes that are not UTF-8 become `\udcXX`, as in Python's `os.fsdecode`."""
    return name.decode("utf-8", "surrogateescape")


def say(text: str = "") -> None:
    """Write a line to standard output."""
    click.echo(text.encode("utf-8", "surrogateescape"))


def remark(text: str) -> None:
    """Write a line to standard error, escaped: it may carry names from anywhere."""
    click.echo("\n".join(escape(line) for line in text.split("\n")), err=True)


def emit_json(value: object) -> None:
    """Write `value` to standard output as JSON in ASCII."""
    say(json.dumps(value, indent=2))
