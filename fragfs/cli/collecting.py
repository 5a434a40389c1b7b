"""`fragfs gc`: give back the space of what nothing needs."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from fragfs.cli.names import predicted_users
from fragfs.cli.options import Session, example, json_option, pass_session, shared_options
from fragfs.cli.tables import format_bytes, format_count
from fragfs.cli.terminal import emit_json, json_name, remark, say

if TYPE_CHECKING:
    from fragfs.library.collect import GcReport, LeaseKept

__all__ = ["gc_command"]

_NOTHING_BYTES = 4096
"""A run that frees nothing may have written a batch of its own."""


@click.command(
    "gc",
    epilog=example(
        "fragfs gc --dry-run",
        "fragfs gc",
    ),
)
@click.option("-n", "--dry-run", is_flag=True, help="Only say what would be dropped.")
@click.option(
    "--grace",
    "grace_s",
    type=click.FloatRange(min=0),
    metavar="SECONDS",
    help="How long what an interrupted add stored stays, so that it can be resumed. "
    " [default: 86400, a day]",
)
@json_option
@shared_options()
@pass_session
def gc_command(session: Session, dry_run: bool, grace_s: float | None, as_json: bool) -> None:
    """Give back the space of what no model needs.

    Mounts and readers may stay: what they have open of removed models stays, and stays readable;
    the next run frees it. What models are predicted from stays as long as those models do;
    'fragfs optimize' looks for other bases.

    It can be interrupted at any moment; the next run does the rest. Packs are copied without what
    is dropped before the old ones go, so it needs as much free space as the largest pack takes.
    """
    from fragfs.cli.progress import show_progress

    with session.open_library() as library, show_progress(session) as progress:
        report = library.collect(progress, grace_s=grace_s, dry_run=dry_run)
    for pack, why in report.kept_packs:
        remark(f"fragfs: warning: pack {pack} was left as it is: {why}")
    if as_json:
        emit_json(_as_json(report))
    elif not session.quiet:
        for line in _lines(report):
            say(line)


def _lines(report: GcReport) -> list[str]:
    done = "would drop" if report.dry_run else "dropped"
    counts = format_count(report.dropped_count, "fragment")
    lines = [f"{done} {counts} that nothing needs: {format_bytes(report.dropped_bytes)}"]
    lines.append(f"  on disk   {_difference(report)}")
    lines += [f"  stays     {_lease(kept)}" for kept in report.leases]
    if report.recent_bytes:
        lines.append(
            f"  stays     {format_bytes(report.recent_bytes)} of an add that was interrupted: add"
            " the same again to resume it, or free it with: fragfs gc --grace 0"
        )
    if report.base_bytes:
        lines.append(
            f"  stays     {format_bytes(report.base_bytes)} of removed models that others are"
            f" predicted from: {predicted_users(report.base_users)}"
        )
    return lines


def _lease(kept: LeaseKept) -> str:
    who = f"process {kept.process} ({kept.what})" if kept.process else kept.what
    why = "which may need anything while it lasts" if kept.everything else "which has it open"
    return f"{format_bytes(kept.kept_bytes)} for {who}, {why}"


def _difference(report: GcReport) -> str:
    size = report.freed_bytes
    if abs(size) < _NOTHING_BYTES:
        return "no change"
    about = "about " if report.dry_run else ""
    return f"{about}{format_bytes(abs(size))} {'less' if size > 0 else 'more'}"


def _as_json(report: GcReport) -> dict[str, object]:
    return {
        "dry_run": report.dry_run,
        "dropped_count": report.dropped_count,
        "dropped_bytes": report.dropped_bytes,
        "freed_bytes": report.freed_bytes,
        "leased_bytes": report.leased_bytes,
        "leases": [
            {
                "process": kept.process,
                "what": kept.what,
                "kept_bytes": kept.kept_bytes,
                "everything": kept.everything,
            }
            for kept in report.leases
        ],
        "recent_bytes": report.recent_bytes,
        "base_bytes": report.base_bytes,
        "base_users": [
            {"model": json_name(name), "stored_bytes": size} for name, size in report.base_users
        ],
        "kept_packs": [{"pack": pack, "why": why} for pack, why in report.kept_packs],
    }
