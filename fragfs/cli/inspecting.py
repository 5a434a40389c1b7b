"""`fragfs check`: is the library sound, what is wrong, and what mends it?"""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from fragfs.cli.options import (
    EXIT_FAILED,
    Session,
    example,
    json_option,
    pass_session,
    shared_options,
)
from fragfs.cli.tables import format_bytes, format_count
from fragfs.cli.terminal import emit_json, escape, json_name, say, show_name
from fragfs.errors import UsageError

if TYPE_CHECKING:
    from fragfs.library.findings import CheckReport, Problem
    from fragfs.library.rebuild import RebuildReport

__all__ = ["check_command"]


@click.command(
    "check",
    epilog=example(
        "fragfs check",
        "fragfs check --data --repair",
    ),
)
@click.option("--data", is_flag=True, help="Also decode everything, and compare ids and SHA-256.")
@click.option(
    "--repair",
    is_flag=True,
    help="Derive again what can be derived; put damaged fragments in quarantine.",
)
@click.option(
    "--rebuild",
    is_flag=True,
    help="Make a new catalog from the packs alone, and keep the old one beside it.",
)
@click.option("--workers", type=click.IntRange(min=1), metavar="N", help="Threads that decode.")
@json_option
@shared_options()
@pass_session
def check_command(
    session: Session,
    *,
    data: bool,
    repair: bool,
    rebuild: bool,
    workers: int | None,
    as_json: bool,
) -> int:
    """Look whether all of the library is as it must be, and mend it.

    Catalog and packs are compared with the format's rules and their checksums. Every byte of the
    packs is read, nothing is decoded unless --data is given; mounts and other commands may go on.
    Each problem is printed with what, where, the models and files that cannot be read because of
    it, and what to do; then the exit status is 1. Notes are no problems.

    --repair derives again indexes, sizes, bases and the copy of the catalog for other users,
    removes what interrupted commands left, and puts damaged fragments in quarantine: no new model
    is built on them. Adding a model that holds their bytes heals them. It removes no other data.

    --rebuild is for a catalog that is lost, damaged, or older than the packs (a backup put back).
    It needs a library that is not mounted and that nothing is added to.
    """
    if rebuild and repair:
        raise UsageError("--rebuild and --repair exclude each other", remedy="rebuild first")
    from fragfs.cli.progress import show_progress
    from fragfs.library.library import FragmentLibrary

    rebuilt = None
    with show_progress(session) as progress:
        if rebuild:
            rebuilt = FragmentLibrary.rebuild(session.library_path, progress=progress)
        with session.open_library() as library:
            report = library.check(data=data, repair=repair, progress=progress, workers=workers)
    if as_json:
        emit_json(_as_json(report, rebuilt))
    else:
        _print(session, report, rebuilt)
    return EXIT_FAILED if report.problems else 0


def _print(session: Session, report: CheckReport, rebuilt: RebuildReport | None) -> None:
    if rebuilt is not None and not session.quiet:
        _print_rebuilt(rebuilt)
    for problem in report.problems:
        _print_problem(problem)
    if session.quiet:
        return
    for text in report.notes:
        say(f"note: {escape(text)}")
    for text in report.repaired:
        say(f"repaired: {escape(text)}")
    packs = format_count(report.pack_count, "pack")
    fragments = format_count(report.fragment_count, "fragment")
    files = format_count(report.file_count, "file")
    decoded = ""
    if report.decoded_count is not None:
        decoded = f", {format_count(report.decoded_count, 'fragment')} decoded"
    count = len(report.problems)
    outcome = f"{count} PROBLEM{'S' if count > 1 else ''}" if count else "sound"
    size = format_bytes(report.pack_bytes)
    say(f"checked {packs}, {size}, {fragments}, {files}{decoded}: {outcome}")


def _print_problem(problem: Problem) -> None:
    say(f"{problem.kind}: {escape(problem.what)}")
    for model, path in problem.files:
        say(f"  file    {show_name(model + b'/' + path)}")
    say(f"  to do   {escape(problem.remedy)}")


def _print_rebuilt(rebuilt: RebuildReport) -> None:
    models = format_count(rebuilt.model_count, "model")
    files = format_count(rebuilt.file_count, "file")
    fragments = format_count(rebuilt.fragment_count, "fragment")
    say(f"rebuilt the catalog: {models}, {files}, {fragments}")
    for kept in rebuilt.kept:
        say(f"  kept    {escape(str(kept))}: the old one; remove it once all is well")
    for text in rebuilt.notes:
        say(f"note: {escape(text)}")
    say("note: new models find similar ones again after: fragfs optimize")


def _as_json(report: CheckReport, rebuilt: RebuildReport | None) -> dict[str, object]:
    return {
        "ok": not report.problems,
        "problems": [
            {
                "kind": str(problem.kind),
                "what": problem.what,
                "remedy": problem.remedy,
                "files": [
                    {"model": json_name(model), "path": json_name(path)}
                    for model, path in problem.files
                ],
                "fragments": list(problem.fragments),
                "path": problem.path or None,
                "offset": problem.offset,
            }
            for problem in report.problems
        ],
        "notes": list(report.notes),
        "repaired": list(report.repaired),
        "pack_count": report.pack_count,
        "pack_bytes": report.pack_bytes,
        "fragment_count": report.fragment_count,
        "decoded_count": report.decoded_count,
        "file_count": report.file_count,
        "rebuilt": None
        if rebuilt is None
        else {
            "model_count": rebuilt.model_count,
            "file_count": rebuilt.file_count,
            "fragment_count": rebuilt.fragment_count,
            "kept": [str(kept) for kept in rebuilt.kept],
            "notes": list(rebuilt.notes),
        },
    }
