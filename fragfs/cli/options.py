"""Options every command shares, and what a command gets from them: the `Session`.

`--library`, `--quiet` and `--debug` work before and after the command's name; what stands after
it wins.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from fragfs.cli.environment import LIBRARY_VARIABLE, default_library
from fragfs.types import Level

if TYPE_CHECKING:
    from fragfs.library.library import FragmentLibrary

__all__ = [
    "EXIT_FAILED",
    "EXIT_INTERRUPTED",
    "EXIT_USAGE",
    "Session",
    "example",
    "json_option",
    "level_option",
    "parse_size",
    "pass_session",
    "shared_options",
]

EXIT_FAILED = 1
EXIT_USAGE = 2
EXIT_INTERRUPTED = 130  # 128 + SIGINT, as shells report it

_Function = TypeVar("_Function", bound=Callable[..., Any])


@dataclass(slots=True)
class Session:
    """What the shared options say; one per run, carried by click's context.

    Attributes:
        library: The library named by `--library` or the environment, if one was.
        quiet: Print only what was asked for, errors and warnings.
        debug: Show tracebacks.
    """

    library: Path | None = None
    quiet: bool = False
    debug: bool = False

    @property
    def library_path(self) -> Path:
        """The library to work on: absolute, not necessarily there."""
        return (self.library or default_library()).absolute()

    def open_library(self) -> FragmentLibrary:
        """Open the library; raises NotFoundError, with the remedy, if there is none."""
        from fragfs.library.library import FragmentLibrary

        return FragmentLibrary.open(self.library_path)


pass_session = click.make_pass_decorator(Session)


def _store(name: str) -> Callable[[click.Context, click.Parameter, Any], None]:
    def callback(context: click.Context, _parameter: click.Parameter, value: Any) -> None:
        if value:
            setattr(context.ensure_object(Session), name, value)

    return callback


def shared_options(*, environment: bool = False) -> Callable[[_Function], _Function]:
    """Give a command `--library`, `--quiet` and `--debug`.

    Args:
        environment: Also take the library from the environment. Only for the group: its options
            are read first, so that an explicit option of a command is stronger.
    """

    def decorate(function: _Function) -> _Function:
        function = click.option(
            "--debug",
            is_flag=True,
            expose_value=False,
            callback=_store("debug"),
            help="Show the traceback of an error.",
        )(function)
        function = click.option(
            "-q",
            "--quiet",
            is_flag=True,
            expose_value=False,
            callback=_store("quiet"),
            help="No progress and no summaries.",
        )(function)
        return click.option(
            "--library",
            type=Path,
            metavar="PATH",
            envvar=LIBRARY_VARIABLE if environment else None,
            expose_value=False,
            callback=_store("library"),
            help=f"The library. [default: ${LIBRARY_VARIABLE}, else one in your data directory]",
        )(function)

    return decorate


json_option = click.option(
    "--json", "as_json", is_flag=True, help="Print JSON, with sizes in bytes and times in ns."
)


def level_option(text: str) -> Callable[[_Function], _Function]:
    """Give a command `--level`, which it gets as a `Level` or None."""

    def parse(_context: click.Context, _parameter: click.Parameter, value: str | None) -> Any:
        return None if value is None else Level[value.upper()]

    return click.option(
        "--level",
        type=click.Choice(
            [level.name.lower() for level in (Level.FAST, Level.BALANCED, Level.SMALL)]
        ),
        callback=parse,
        help=text,
    )


def parse_size(text: str) -> int:
    """Read a number of bytes: `4096`, `96M`, `1.5GiB`; K, M, G, T count by 1024, KB, MB by 1000.

    Raises:
        click.BadParameter: `text` is no size.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([kmgt]?)(i?b)?", text.strip().lower())
    if match is None:
        raise click.BadParameter(f"{text!r} is not a size; write it like 96M or 2GiB")
    number, prefix, suffix = match.groups()
    step = 1000 if suffix == "b" else 1024
    return int(float(number) * step ** ("kmgt".index(prefix) + 1 if prefix else 0))


def example(*lines: str) -> str:
    """The end of a command's help: lines to type, each as it stands."""
    return "\b\n" + "\n".join(["Example:", *(f"  {line}" for line in lines)])
