"""`fragfs optimize`: make the library smaller, or quicker to read."""

from __future__ import annotations

import click

from fragfs.cli.options import (
    Session,
    example,
    json_option,
    level_option,
    pass_session,
    shared_options,
)
from fragfs.cli.tables import format_bytes, format_count, format_share
from fragfs.cli.terminal import emit_json, remark, say
from fragfs.types import Level

__all__ = ["optimize_command"]

_NOTHING_BYTES = 4096
"""A run that finds nothing to do has written a batch of its own."""


@click.command(
    "optimize",
    epilog=example(
        "fragfs optimize --level small",
    ),
)
@level_option(
    "What encodings to prefer, this time; another level than the library's own encodes everything"
    " anew. [default: the library's own]"
)
@click.option("--workers", type=click.IntRange(min=1), metavar="N", help="Planner threads.")
@json_option
@shared_options()
@pass_session
def optimize_command(
    session: Session, level: Level | None, workers: int | None, as_json: bool
) -> None:
    """Plan again what is predicted from what, for space.

    Adding predicts a model from what was there before it. This looks at all models together, so
    that the order of adding hardly matters, and gives back the space of replaced records and of
    what no model needs any more.

    Mounts may stay, and programs go on reading. What they have open of removed models stays, and
    everything while something is being added; 'fragfs gc' frees it afterwards. It can be
    interrupted at any moment; the next run finds the rest. New records are written before old ones
    go, so it may need as much free space as it rewrites.
    """
    from fragfs.cli.progress import show_progress

    with session.open_library() as library, show_progress(session) as progress:
        report = library.optimize(level, progress, workers)
    if report.leased_bytes:
        remark(
            f"fragfs: warning: {format_bytes(report.leased_bytes)} that no model needs stay for"
            " who has them open or is adding; see who with: fragfs gc --dry-run"
        )
    for pack, why in report.kept:
        remark(f"fragfs: warning: pack {pack} was left as it is: {why}")
    if as_json:
        emit_json(
            {
                "examined_count": report.examined_count,
                "changed_count": report.changed_count,
                "before_bytes": report.before_bytes,
                "after_bytes": report.after_bytes,
                "freed_bytes": report.freed_bytes,
                "leased_bytes": report.leased_bytes,
                "kept_packs": [{"pack": pack, "why": why} for pack, why in report.kept],
            }
        )
        return
    if session.quiet:
        return
    say(
        f"examined {format_count(report.examined_count, 'fragment')}, changed"
        f" {report.changed_count:,}"
    )
    share = format_share(report.after_bytes, report.before_bytes)
    say(f"  before    {format_bytes(report.before_bytes)} of records")
    say(f"  after     {format_bytes(report.after_bytes)} ({share})")
    say(f"  on disk   {_difference(report.freed_bytes)}")


def _difference(freed_bytes: int) -> str:
    if abs(freed_bytes) < _NOTHING_BYTES:
        return "no change"
    return f"{format_bytes(abs(freed_bytes))} {'less' if freed_bytes > 0 else 'more'}"
