"""`fragfs verify` and `fragfs export`: read everything back and compare."""

from __future__ import annotations

import os
from contextlib import ExitStack, closing
from pathlib import Path
from typing import TYPE_CHECKING

import click

from fragfs.cli.environment import default_state
from fragfs.cli.options import (
    EXIT_FAILED,
    Session,
    example,
    json_option,
    pass_session,
    shared_options,
)
from fragfs.cli.tables import format_bytes, format_count
from fragfs.cli.terminal import emit_json, json_name, remark, say, show_name
from fragfs.errors import StorageError, UsageError

if TYPE_CHECKING:
    from fragfs.library.library import FragmentLibrary
    from fragfs.library.verify import VerifiedFile, VerifyState

__all__ = ["export_command", "verify_command"]


@click.command(
    "verify",
    epilog=example(
        "fragfs verify",
        "fragfs verify --resume",
        "fragfs verify all-MiniLM-L6-v2 --sha256sum > SHA256SUMS",
    ),
)
@click.argument("model", required=False)
@click.option(
    "--sha256sum",
    "as_sums",
    is_flag=True,
    help="Print a line per good file, as 'sha256sum -c' reads it.",
)
@click.option(
    "--workers",
    type=click.IntRange(min=1),
    metavar="N",
    help="Files read at once, and threads that decode. [default: one per core]",
)
@click.option(
    "--resume",
    is_flag=True,
    help="Go on where an interrupted run stopped, if the library has not changed since.",
)
@json_option
@shared_options()
@pass_session
def verify_command(
    session: Session,
    *,
    model: str | None,
    as_sums: bool,
    workers: int | None,
    resume: bool,
    as_json: bool,
) -> int:
    """Decode everything and compare it with its SHA-256.

    Without MODEL, every file of the library.

    Every failure is named on standard error, with the fragment, the place in its pack and what to
    do; then the exit status is 1. An interrupted run can go on with --resume: what it has found
    good is not read again. With --sha256sum, paths are relative to the model's directory,
    or to the mount point where no MODEL is given.
    """
    if as_sums and as_json:
        raise UsageError("--sha256sum and --json exclude each other", remedy="give one of them")
    from fragfs.cli.progress import show_progress

    name = os.fsencode(model).rstrip(b"/") if model else None
    results: list[VerifiedFile] = []
    with (
        session.open_library() as library,
        show_progress(session) as progress,
        ExitStack() as ends,
    ):
        state = _open_state(library, resume=resume)
        if state is not None:
            ends.callback(state.close)
        if resume and not (state and state.done):
            remark("fragfs: there is nothing to resume: everything is read")
        # Closed by hand: an interruption must stop its threads now, not when it is collected.
        with closing(library.verify(name, progress, workers, state)) as verified:
            for result in verified:
                results.append(result)
                if result.error is not None:
                    remark(f"fragfs: {json_name(_full_name(result))}: {result.error}")
                elif as_sums:
                    path = result.path if name is not None else _full_name(result)
                    say(format_sum(path, result.sha256))
        if state is not None:
            state.finish()
    failed = [result for result in results if result.error is not None]
    if as_json:
        emit_json(_results_as_json(results))
    elif not (as_sums or session.quiet):
        counts = format_count(len(results), "file")
        size = format_bytes(sum(result.size for result in results))
        outcome = f"{len(failed)} FAILED" if failed else "all as they were added"
        resumed = sum(result.resumed for result in results)
        if resumed:
            outcome += f"; {format_count(resumed, 'file')} of these before the interruption"
        say(f"verified {counts}, {size}: {outcome}")
    return EXIT_FAILED if failed else 0


def _open_state(library: FragmentLibrary, *, resume: bool) -> VerifyState | None:
    """Where this run writes down how far it got; None if this user has no place for that."""
    try:
        return library.verify_state(default_state() / f"verify-{library.uuid.hex()}", resume=resume)
    except StorageError:
        if resume:
            raise
        return None


def _full_name(result: VerifiedFile) -> bytes:
    return result.model + b"/" + result.path


def format_sum(path: bytes, sha256: bytes) -> str:
    r"""A line as `sha256sum` writes it: a leading backslash marks escapes in the name."""
    if path == b"-":
        path = b"./-"  # alone it means standard input
    escaped = path.replace(b"\\", b"\\\\").replace(b"\n", b"\\n").replace(b"\r", b"\\r")
    mark = "" if escaped == path else "\\"
    return f"{mark}{sha256.hex()}  {escaped.decode('utf-8', 'surrogateescape')}"


def _results_as_json(results: list[VerifiedFile]) -> dict[str, object]:
    return {
        "file_count": len(results),
        "resumed_count": sum(result.resumed for result in results),
        "failed_count": sum(result.error is not None for result in results),
        "logical_bytes": sum(result.size for result in results),
        "files": [
            {
                "model": json_name(result.model),
                "path": json_name(result.path),
                "size": result.size,
                "sha256": result.sha256.hex(),
                "ok": result.error is None,
                "error": None
                if result.error is None
                else {
                    "message": result.error.message,
                    "remedy": result.error.remedy,
                    "fragment": result.error.fragment,
                    "path": result.error.path,
                    "offset": result.error.offset,
                },
            }
            for result in results
        ],
    }


@click.command(
    "export",
    epilog=example(
        "fragfs export all-MiniLM-L6-v2 ./all-MiniLM-L6-v2",
    ),
)
@click.argument("model")
@click.argument("destination", metavar="DEST", type=Path)
@shared_options()
@pass_session
def export_command(session: Session, model: str, destination: Path) -> int:
    """Write the original files of a model to a directory.

    DEST is created.

    Bytes, permissions and modification times are those of the files that were added, and every
    file is compared with its SHA-256 on the way. Nothing needs to be mounted. A file that is
    damaged in the library is named and left out; then the exit status is 1.
    """
    from fragfs.cli.progress import show_progress

    name = os.fsencode(model).rstrip(b"/")
    with session.open_library() as library, show_progress(session) as progress:
        report = library.export(name, destination.absolute(), progress)
    for path, error in report.failed:
        remark(f"fragfs: {show_name(path)} is not exported: {error}")
    if not session.quiet:
        counts = format_count(report.file_count, "file")
        where = show_name(os.fsencode(destination))
        outcome = f"; {len(report.failed)} FAILED" if report.failed else ""
        size = format_bytes(report.logical_bytes)
        say(f"exported {show_name(name)} to {where}: {counts}, {size}{outcome}")
    return EXIT_FAILED if report.failed else 0
