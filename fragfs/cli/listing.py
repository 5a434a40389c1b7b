"""`fragfs ls` and `fragfs stats`: what the library holds. Light: only the catalog is read."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from fragfs.cli.names import find_target, is_below
from fragfs.cli.options import Session, example, json_option, pass_session, shared_options
from fragfs.cli.tables import (
    format_bytes,
    format_count,
    format_share,
    format_table,
    format_time,
    list_savings,
)
from fragfs.cli.terminal import emit_json, json_name, say, show_name
from fragfs.types import LIBRARY_FORMAT_VERSION, FileEntry, LibraryStats, ModelInfo

if TYPE_CHECKING:
    from fragfs.mount.live import LiveMount

__all__ = ["ls_command", "stats_command"]

_LISTED_MAX = 8
_NO_MODEL = "(no model any more)"
_ANSWER_S = 1.0


@click.command(
    "ls",
    epilog=example(
        "fragfs ls -l all-MiniLM-L6-v2",
    ),
)
@click.argument("model", required=False)
@click.option("-l", "--long", "is_long", is_flag=True, help="Also sizes, times and remarks.")
@json_option
@shared_options()
@pass_session
def ls_command(session: Session, model: str | None, is_long: bool, as_json: bool) -> None:
    """List the models, or the files of one.

    MODEL may also be a folder of models, or a file or folder inside a model. With -l, "stored" is
    what the fragments of a file take in the packs; what several files share counts for each, and
    what they are predicted from is not counted.
    """
    with session.open_library() as library:
        models = library.models()
        if model is not None:
            folder = os.fsencode(model).rstrip(b"/")
            inside = [info for info in models if is_below(info.name, folder)]
            if not inside or inside[0].name == folder:
                target = find_target(library, model)
                files = [f for f in library.files(target.model) if is_below(f.path, target.path)]
                _show_files(target.model, files, is_long, as_json)
                return
            models = inside
        _show_models(str(library.path), models, is_long, as_json)


def _show_models(library: str, models: Sequence[ModelInfo], is_long: bool, as_json: bool) -> None:
    if as_json:
        emit_json({"library": library, "models": [_model_as_json(info) for info in models]})
        return
    if not is_long:
        for info in models:
            say(show_name(info.name))
        return
    rows = [("files", "logical", "stored", "", "added", "model")]
    rows += [
        (
            f"{info.file_count:,}",
            format_bytes(info.logical_bytes),
            format_bytes(info.stored_bytes),
            format_share(info.stored_bytes, info.logical_bytes),
            format_time(info.added_ns),
            show_name(info.name),
        )
        for info in models
    ]
    for line in format_table(rows, "rrrrll"):
        say(line)


def _show_files(model: bytes, files: Sequence[FileEntry], is_long: bool, as_json: bool) -> None:
    if as_json:
        emit_json({"model": json_name(model), "files": [_file_as_json(file) for file in files]})
        return
    if not is_long:
        for file in files:
            say(show_name(file.path))
        return
    rows = [("size", "stored", "", "modified", "file")]
    rows += [
        (
            format_bytes(file.size),
            format_bytes(file.stored_bytes),
            format_share(file.stored_bytes, file.size),
            format_time(file.mtime_ns),
            show_name(file.path) + (f"  ({file.verdict})" if file.verdict else ""),
        )
        for file in files
    ]
    for line in format_table(rows, "rrrll"):
        say(line)


def _model_as_json(info: ModelInfo) -> dict[str, object]:
    return {
        "name": json_name(info.name),
        "file_count": info.file_count,
        "logical_bytes": info.logical_bytes,
        "stored_bytes": info.stored_bytes,
        "added_ns": info.added_ns,
        "mtime_ns": info.mtime_ns,
    }


def _file_as_json(file: FileEntry) -> dict[str, object]:
    return {
        "path": json_name(file.path),
        "size": file.size,
        "stored_bytes": file.stored_bytes,
        "sha256": file.sha256.hex(),
        "mode": file.mode,
        "mtime_ns": file.mtime_ns,
        "verdict": file.verdict,
    }


@click.command(
    "stats",
    epilog=example(
        "fragfs stats",
    ),
)
@click.argument("model", required=False)
@json_option
@shared_options()
@pass_session
def stats_command(session: Session, model: str | None, as_json: bool) -> None:
    """Show what is stored and what was saved, and how.

    Without MODEL, of the whole library. All figures are recomputed from the catalog. "Unique" is
    what is left once every distinct piece counts once; "stored" is what those pieces take in the
    packs. "Predicted" says how much is stored as differences to pieces of which models; what
    is predicted from several counts for each. 'fragfs explain' tells more of a model.

    Of the whole library, also what its mounts keep decoded: of what they looked for, how much was
    there, and how much had to leave. A mount that does not answer within a second is passed over.
    """
    name = os.fsencode(model).rstrip(b"/") if model else None
    with session.open_library() as library:
        stats = library.stats(name)
        path = str(library.path)
        mounts = _live_mounts(library.path) if name is None else []
    if as_json:
        about = {"library": path, "model": json_name(name) if name is not None else None}
        shown = {"mounts": [_mount_as_json(mount) for mount in mounts]}
        emit_json(about | dataclasses.asdict(stats) | shown)
        return
    if name is None:
        say(f"library    {show_name(os.fsencode(path))} (format {LIBRARY_FORMAT_VERSION})")
    else:
        say(f"model      {show_name(name)}")
    for line in _stats_lines(stats, mounts, whole_library=name is None):
        say(line)


def _live_mounts(library: Path) -> list[LiveMount]:
    from fragfs.mount.live import live_mounts

    return live_mounts(library, _ANSWER_S)


def _mount_as_json(mount: LiveMount) -> dict[str, object]:
    kept = (
        *("pid", "reads", "bytes_returned", "decodes", "bytes_decoded"),
        *("cache", "prefill", "passthrough"),
    )
    return {
        "mountpoint": os.fspath(mount.entry.mountpoint),
        **{key: mount.status.get(key) for key in kept},
    }


def _cache_row(mount: LiveMount) -> tuple[str, str, str]:
    where = show_name(os.fsencode(mount.entry.mountpoint))
    cache = mount.status.get("cache")
    if cache is None:
        return "cached", "-", f"the mount on {where} has no fragment cache"
    found = format_share(cache["hits"], cache["hits"] + cache["misses"])
    kind = "in memory" if cache["in_memory"] else "on disk"
    return (
        "cached",
        format_bytes(cache["bytes_held"]),
        f"decoded, {kind}, for {where}; {found} found, {cache['evictions']:,} evicted",
    )


def _stats_lines(
    stats: LibraryStats, mounts: Sequence[LiveMount], *, whole_library: bool
) -> list[str]:
    models = f"{format_count(stats.model_count, 'model')}, " if whole_library else ""
    rows = [
        ("holds", f"{models}{format_count(stats.file_count, 'file')}", ""),
        ("logical", format_bytes(stats.logical_bytes), "the files as added"),
        ("unique", format_bytes(stats.unique_bytes), "each distinct piece once"),
        (
            "stored",
            format_bytes(stats.stored_bytes),
            f"{format_share(stats.stored_bytes, stats.logical_bytes)} of logical",
        ),
    ]
    rows += [("saved", size, how) for size, how in list_savings(stats.saved_bytes)]
    rows.append(
        (
            "fragments",
            f"{stats.fragment_count:,}",
            f"{stats.shared_fragment_count:,} needed by several models",
        )
    )
    if not whole_library:
        rows.append(
            (
                "exclusive",
                format_bytes(stats.exclusive_bytes),
                "needed by no other model, with bases",
            )
        )
    rows.append(("shared", format_bytes(stats.shared_bytes), "needed by several models"))
    if stats.base_bytes:
        rows.append(
            ("bases", format_bytes(stats.base_bytes), "in none of the files, needed to read them")
        )
    ranked = sorted(stats.predicted_bytes.items(), key=lambda item: -item[1])
    rows += [
        ("predicted", format_bytes(size), f"from {show_name(os.fsencode(name)) or _NO_MODEL}")
        for name, size in ranked[:_LISTED_MAX]
    ]
    if len(ranked) > _LISTED_MAX:
        rows.append(("predicted", "", f"from {len(ranked) - _LISTED_MAX:,} more; see --json"))
    if whole_library:
        rows.append(("on disk", format_bytes(stats.disk_bytes), "the library's directory"))
        if stats.unreferenced_bytes:
            rows.append(
                (
                    "unused",
                    format_bytes(stats.unreferenced_bytes),
                    "needed by no model any more; free them with: fragfs gc",
                )
            )
    rows += map(_cache_row, mounts)
    return format_table(rows, "lll")
