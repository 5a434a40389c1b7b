"""`fragfs rm` and `fragfs mv`: change what the library shows. Light: only the catalog changes."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING

import click

from fragfs.cli.names import find_target, predicted_users
from fragfs.cli.options import Session, example, json_option, pass_session, shared_options
from fragfs.cli.tables import format_bytes, format_count
from fragfs.cli.terminal import emit_json, json_name, say, show_name

if TYPE_CHECKING:
    from fragfs.library.library import FragmentLibrary
    from fragfs.library.publish import RemoveReport

__all__ = ["mv_command", "rm_command"]


@click.command(
    "rm",
    epilog=example(
        "fragfs rm old-model all-MiniLM-L6-v2/onnx",
    ),
)
@click.argument("targets", metavar="MODEL[/FILE]...", nargs=-1, required=True)
@json_option
@shared_options()
@pass_session
def rm_command(session: Session, targets: tuple[str, ...], as_json: bool) -> None:
    """Remove models, or files or folders of models, from the library.

    Nothing is asked. All arguments are looked up before anything is removed. Who has a removed
    file open in a mount can go on reading it.

    The bytes stay in the packs until 'fragfs gc' gives back what no model needs; adding the same
    bytes before that finds them again. Pieces that other models are predicted from stay as long as
    those models do, or until 'fragfs optimize' has found other bases for them.
    """
    reports = []
    with session.open_library() as library:
        for model, paths in _plan_removal(library, targets).items():
            report = library.remove(model, paths)
            reports.append((model, report))
            if not (as_json or session.quiet):
                what = show_name(model) if not paths else f"from {show_name(model)}"
                counts = format_count(report.file_count, "file")
                say(f"removed {what}: {counts}, {format_bytes(report.removed_bytes)}")
                _say_kept(report)
    unreferenced = reports[-1][1].unreferenced_bytes
    if as_json:
        removed = [
            {
                "model": json_name(model),
                "file_count": report.file_count,
                "removed_bytes": report.removed_bytes,
                "kept_bytes": report.kept_bytes,
                "kept_for": [
                    {"model": json_name(name), "stored_bytes": size}
                    for name, size in report.kept_for
                ],
            }
            for model, report in reports
        ]
        emit_json({"removed": removed, "unreferenced_bytes": unreferenced})
    elif not session.quiet:
        remedy = "; free them with: fragfs gc" if unreferenced else ""
        say(f"{format_bytes(unreferenced)} are needed by no model any more{remedy}")


def _say_kept(report: RemoveReport) -> None:
    """Say what of the removed pieces stays, and for whom."""
    if report.kept_bytes:
        say(
            f"  stays     {format_bytes(report.kept_bytes)} that others are predicted from:"
            f" {predicted_users(report.kept_for)}"
        )


def _plan_removal(
    library: FragmentLibrary, arguments: Sequence[str]
) -> dict[bytes, tuple[bytes, ...]]:
    """What to remove: files or directories by model; none of them means the whole model."""
    plan: dict[bytes, list[bytes]] = {}
    whole = set()
    for argument in arguments:
        target = find_target(library, argument)
        plan.setdefault(target.model, []).append(target.path)
        if not target.path:
            whole.add(target.model)
    return {model: () if model in whole else tuple(paths) for model, paths in plan.items()}


@click.command(
    "mv",
    epilog=example(
        "fragfs mv all-MiniLM-L6-v2 sentence-transformers/all-MiniLM-L6-v2",
    ),
)
@click.argument("old")
@click.argument("new")
@shared_options()
@pass_session
def mv_command(session: Session, old: str, new: str) -> None:
    """Rename a model. Its files stay what they are, and open ones stay open."""
    before, after = os.fsencode(old).rstrip(b"/"), os.fsencode(new).rstrip(b"/")
    with session.open_library() as library:
        library.move(before, after)
    if not session.quiet:
        say(f"renamed {show_name(before)} to {show_name(after)}")
