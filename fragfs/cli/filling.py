"""`fragfs init` and `fragfs add`: make a library, put models into it."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from fragfs.cli.options import (
    Session,
    example,
    json_option,
    level_option,
    pass_session,
    shared_options,
)
from fragfs.cli.tables import format_bytes, format_count, format_share, list_savings
from fragfs.cli.terminal import emit_json, json_name, remark, say, show_name
from fragfs.types import Level, LibraryConfig

if TYPE_CHECKING:
    from fragfs.library.add import AddOptions, AddReport

__all__ = ["add_command", "init_command"]

_DEFAULTS = LibraryConfig()
_LISTED_MAX = 20


@click.command(
    "init",
    epilog=example(
        "fragfs init /srv/models.fragfs",
    ),
)
@click.argument("directory", metavar="[LIBRARY]", required=False, type=Path)
@click.option(
    "--fragment-elements",
    type=int,
    default=_DEFAULTS.fragment_elements,
    show_default=True,
    metavar="N",
    help="Elements of a tensor per fragment, a power of two. Fixed from then on.",
)
@level_option(
    "What encodings to prefer: fast reads quickest, small takes the least space; balanced, the"
    " default, is near small in size and near fast in speed."
)
@click.option(
    "--zstd-level",
    type=int,
    default=_DEFAULTS.zstd_level,
    show_default=True,
    metavar="N",
    help="zstd level of bytes that are not tensors, 1 to 19.",
)
@click.option(
    "--closure-max",
    type=int,
    default=_DEFAULTS.closure_max,
    show_default=True,
    metavar="N",
    help="Fragments that reading one fragment may have to decode, itself included, 1 to 8; 1 stores"
    " no differences. Fixed from then on.",
)
@shared_options()
@pass_session
def init_command(
    session: Session,
    directory: Path | None,
    fragment_elements: int,
    level: Level | None,
    zstd_level: int,
    closure_max: int,
) -> None:
    """Create an empty library.

    LIBRARY is a new or empty directory; without it, the library of --library, the environment or
    your data directory is created.
    """
    from fragfs.library.filesystem import network_kind
    from fragfs.library.library import FragmentLibrary

    path = directory.absolute() if directory else session.library_path
    config = LibraryConfig(
        fragment_elements=fragment_elements,
        closure_max=closure_max,
        zstd_level=zstd_level,
        level=_DEFAULTS.level if level is None else level,
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    FragmentLibrary.create(path, config).close()
    kind = network_kind(path)
    if kind is not None:
        remark(
            f"fragfs: warning: {show_name(os.fsencode(path))} is on a network file system ({kind});"
            " use it from one machine only, or keep the library on a local disk"
        )
    if not session.quiet:
        say(f"created library {show_name(os.fsencode(path))}")


@click.command(
    "add",
    epilog=example(
        "fragfs add ./all-MiniLM-L6-v2 --name sentence-transformers/all-MiniLM-L6-v2",
    ),
)
@click.argument("paths", nargs=-1, required=True, type=Path)
@click.option("--name", metavar="MODEL", help="The model's name. [default: the directory's]")
@click.option("--into", metavar="MODEL[/DIR]", help="Add to this model, which exists.")
@click.option(
    "--update",
    is_flag=True,
    help="Bring a model that exists up to date; files of equal size and time are not read.",
)
@click.option("--checksum", is_flag=True, help="With --update, read every file all the same.")
@click.option(
    "--remove-source",
    is_flag=True,
    help="Delete the source files, once all are stored and were read back and compared.",
)
@click.option("--follow-links", is_flag=True, help="Store what links lead to, wherever that is.")
@click.option(
    "--force", is_flag=True, help="Store truncated model files and LFS pointers as they are."
)
@click.option("--no-space-check", is_flag=True, help="Do not ask for free space beforehand.")
@click.option("--workers", type=click.IntRange(min=1), metavar="N", help="Encoder threads.")
@json_option
@shared_options()
@pass_session
def add_command(
    session: Session,
    paths: tuple[Path, ...],
    name: str | None,
    into: str | None,
    update: bool,
    checksum: bool,
    remove_source: bool,
    follow_links: bool,
    force: bool,
    no_space_check: bool,
    workers: int | None,
    as_json: bool,
) -> None:
    """Add directories or files to the library as models.

    Each directory becomes a model of its own name, or of the one --name gives it; a single file
    needs --name or --into. What the library holds already is not stored again. An interrupted add
    leaves no half model, and what it had stored is found again by the next one.
    """
    from fragfs.library.add import AddOptions

    options = AddOptions(
        name=os.fsencode(name) if name is not None else None,
        into=os.fsencode(into).rstrip(b"/") if into is not None else None,
        update=update,
        checksum=checksum,
        remove_source=remove_source,
        follow_links=follow_links,
        force=force,
        space_check=not no_space_check,
        workers=workers,
    )
    batches = _split_models(paths, options)
    reports = []
    for batch in batches:
        report = _add(session, batch, options)
        reports.append(report)
        for text in report.warnings:
            remark(f"fragfs: warning: {text}")
        if not (as_json or session.quiet):
            _print_report(report)
    if as_json:
        emit_json({"added": [_report_as_json(report) for report in reports]})


def _split_models(paths: tuple[Path, ...], options: AddOptions) -> list[list[Path]]:
    """The paths of each add: one by one where each is a model, so that each gets its report."""
    # Made absolute by text alone: '.' must have a name, and links must stay links.
    absolute = [Path(os.path.abspath(path)) for path in paths]
    if options.into is not None or options.name is not None:
        return [absolute]
    return [[path] for path in absolute]


def _add(session: Session, paths: list[Path], options: AddOptions) -> AddReport:
    from fragfs.cli.progress import show_progress

    with session.open_library() as library, show_progress(session) as progress:
        return library.add(paths, options, progress)


def _print_report(report: AddReport) -> None:
    models = ", ".join(show_name(model) for model in report.models)
    counts = format_count(report.file_count, "file")
    say(f"added {models}: {counts}, {format_bytes(report.logical_bytes)}")
    share = format_share(report.new_bytes, report.logical_bytes)
    say(f"  stored    {format_bytes(report.new_bytes)} new ({share} of it)")
    for size, how in list_savings(report.saved_bytes):
        say(f"  saved     {size} {how}")
    if report.unchanged_count:
        say(f"  unchanged {format_count(report.unchanged_count, 'file')}, not read again")
    if report.removed_count:
        say(f"  removed   {format_count(report.removed_count, 'file')} gone from the source")
    if report.removed_source_count:
        say(f"  deleted   {format_count(report.removed_source_count, 'source file')}")
    _print_some("skipped", [f"{show_name(path)}: {why}" for path, why in report.skipped])
    _print_some("note", [f"{show_name(path)}: {text}" for path, text in report.verdicts])
    _print_some("healed", report.healed)


def _print_some(label: str, texts: Sequence[str]) -> None:
    for text in texts[:_LISTED_MAX]:
        say(f"  {label:<9} {text}")
    if len(texts) > _LISTED_MAX:
        say(f"  {label:<9} and {len(texts) - _LISTED_MAX:,} more; --json lists them all")


def _report_as_json(report: AddReport) -> dict[str, object]:
    return {
        "models": [json_name(model) for model in report.models],
        "file_count": report.file_count,
        "logical_bytes": report.logical_bytes,
        "new_bytes": report.new_bytes,
        "reused_bytes": report.reused_bytes,
        "saved_bytes": report.saved_bytes,
        "unchanged_count": report.unchanged_count,
        "removed_count": report.removed_count,
        "removed_source_count": report.removed_source_count,
        "skipped": [{"path": json_name(path), "why": why} for path, why in report.skipped],
        "verdicts": [{"path": json_name(path), "remark": text} for path, text in report.verdicts],
        "healed": list(report.healed),
        "warnings": list(report.warnings),
    }
