"""`fragfs warm`: bring models into memory before they are needed; see what is there; let it go."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from fragfs.cli.names import find_target, is_below
from fragfs.cli.options import (
    EXIT_FAILED,
    Session,
    example,
    json_option,
    pass_session,
    shared_options,
)
from fragfs.cli.tables import format_bytes, format_count, format_share, format_table
from fragfs.cli.terminal import emit_json, json_name, remark, say, show_name
from fragfs.errors import NotFoundError, UsageError

if TYPE_CHECKING:
    from fragfs.mount.live import LiveMount
    from fragfs.mount.warm import FileResidency, WarmFile, WarmReport

__all__ = ["warm_command"]

_ANSWER_S = 5.0


@click.command(
    "warm",
    epilog=example(
        "fragfs warm all-MiniLM-L6-v2",
        "fragfs warm --check all-MiniLM-L6-v2/model.safetensors",
    ),
)
@click.argument("targets", metavar="MODEL[/FILE]...", nargs=-1, required=True)
@click.option(
    "--mountpoint",
    type=Path,
    metavar="DIR",
    help="Only through this mount. [default: every mount of the library]",
)
@click.option("--check", is_flag=True, help="Only say what is in memory; read nothing.")
@click.option("--evict", is_flag=True, help="Drop the pages instead.")
@json_option
@shared_options()
@pass_session
def warm_command(
    session: Session,
    targets: tuple[str, ...],
    mountpoint: Path | None,
    check: bool,
    evict: bool,
    as_json: bool,
) -> int:
    """Read models into memory before they are needed.

    Reads the files through the mount of the library: decoded pieces come into the fragment cache,
    files into the kernel's page cache, from where any program then reads them at the speed of
    memory. FILE may also be a folder. Stops before others would be pushed out of memory, says what
    is left out, and exits with 1.

    --check prints the share of each file that is in memory, and exits with 1 unless all of it is.
    --evict drops the pages that no process has mapped. What the fragment cache has stays: decoded
    pieces, and files that were put together of them for the kernel to read.
    """
    if check and evict:
        raise UsageError("--check and --evict exclude each other", remedy="give one of them")
    from fragfs.mount.warm import check_files, drop_files

    names = _names(session, targets)
    mounts = _mounts(session.library_path, mountpoint)
    complete = True
    found = []
    for mount in mounts:
        where = mount.entry.mountpoint
        files = _find_files(where, names)
        if check or evict:
            shares = (check_files if check else drop_files)(files)
            wanted = [share.is_complete if check else share.error is None for share in shares]
            complete &= all(wanted)
            found.append(_shares_as_json(where, shares))
            if not (as_json or (evict and session.quiet)):
                _show_shares(where, shares, several=len(mounts) > 1)
        else:
            report = _warm(session, files)
            complete &= not (report.failed or report.left_out_bytes)
            found.append(_report_as_json(where, report))
            if not (as_json or session.quiet):
                size, count = format_bytes(report.read_bytes), format_count(len(files), "file")
                say(f"warmed {count}, {size}, on {show_name(os.fsencode(where))}")
    if as_json:
        emit_json({"complete": complete, "mounts": found})
    return 0 if complete else EXIT_FAILED


def _names(session: Session, targets: Sequence[str]) -> list[bytes]:
    """Model and path of all files that are meant, each once."""
    names: dict[bytes, None] = {}
    with session.open_library() as library:
        for argument in targets:
            target = find_target(library, argument)
            for file in library.files(target.model):
                if is_below(file.path, target.path):
                    names[target.model + b"/" + file.path] = None
    return list(names)


def _mounts(library: Path, mountpoint: Path | None) -> list[LiveMount]:
    from fragfs.mount.live import live_mounts, named_mount

    if mountpoint is not None:
        return [named_mount(library, mountpoint.absolute(), _ANSWER_S)]
    mounts = live_mounts(library, _ANSWER_S)
    if not mounts:
        raise NotFoundError(
            f"the library {library} is mounted nowhere, or not for you",
            path=os.fspath(library),
            remedy="mount it: fragfs mount MOUNTPOINT; 'fragfs doctor' looks at mounts that fail",
        )
    return mounts


def _find_files(mountpoint: Path, names: Sequence[bytes]) -> list[WarmFile]:
    from fragfs.mount.warm import find_files

    files, missing = find_files(mountpoint, names)
    if not files and missing:
        name, error = missing[0]
        raise NotFoundError(
            f"{mountpoint} does not show {os.fsdecode(name)}: {error.strerror}",
            path=os.fspath(mountpoint),
            remedy="mount it with that model, or name another mount with --mountpoint",
        )
    for name, error in missing:
        remark(f"fragfs: warning: {mountpoint}/{json_name(name)}: {error.strerror}")
    return files


def _warm(session: Session, files: Sequence[WarmFile]) -> WarmReport:
    from fragfs.cli.progress import show_progress
    from fragfs.mount.warm import measure_need, warm_files

    needed, room = measure_need(files)
    if needed > room:
        remark(
            f"fragfs: warning: {format_bytes(needed)} are to be read and memory has room for"
            f" {format_bytes(room)}: the rest is left out"
        )
    with show_progress(session) as progress:
        report = warm_files(files, progress)
    for file, error in report.failed:
        why = f"cannot be read: {error.strerror}; see why: fragfs doctor"
        remark(f"fragfs: {json_name(file.name)} {why}")
    if report.left_out_bytes:
        remark(
            f"fragfs: {format_bytes(report.left_out_bytes)} are left out, for want of memory;"
            " end what needs it, or warm fewer files"
        )
    return report


def _show_shares(mountpoint: Path, shares: Sequence[FileResidency], *, several: bool) -> None:
    if several:
        say(f"on {show_name(os.fsencode(mountpoint))}")
    rows = [("in memory", "size", "file")]
    rows += [(_share(share), format_bytes(share.file.size), _label(share)) for share in shares]
    for line in format_table(rows, "rrl"):
        say(line)


def _share(share: FileResidency) -> str:
    residency = share.residency
    if residency is None or residency.resident is None:
        return "?"
    return format_share(residency.resident, residency.pages) if residency.pages else "100.0 %"


def _label(share: FileResidency) -> str:
    name = show_name(share.file.name)
    if share.error is not None:
        return f"{name}  ({share.error})"
    if share.residency is not None and share.residency.resident is None:
        return f"{name}  (the kernel tells only the owner)"
    return name


def _shares_as_json(mountpoint: Path, shares: Sequence[FileResidency]) -> dict[str, object]:
    files = [
        {
            "name": json_name(share.file.name),
            "size": share.file.size,
            "pages": share.residency.pages if share.residency else None,
            "resident_pages": share.residency.resident if share.residency else None,
            "error": share.error,
        }
        for share in shares
    ]
    return {"mountpoint": os.fspath(mountpoint), "files": files}


def _report_as_json(mountpoint: Path, report: WarmReport) -> dict[str, object]:
    return {
        "mountpoint": os.fspath(mountpoint),
        "file_count": report.file_count,
        "total_bytes": report.total_bytes,
        "read_bytes": report.read_bytes,
        "left_out_bytes": report.left_out_bytes,
        "failed": [
            {"name": json_name(file.name), "error": error.strerror} for file, error in report.failed
        ],
    }
