"""`fragfs explain` and `fragfs estimate`: where bytes live, and what more bytes would take."""

from __future__ import annotations

import os
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING

import click

from fragfs.cli.names import find_target
from fragfs.cli.options import Session, example, json_option, pass_session, shared_options
from fragfs.cli.tables import (
    describe_mechanism,
    format_bytes,
    format_count,
    format_share,
    format_table,
)
from fragfs.cli.terminal import emit_json, escape, json_name, remark, say, show_name

if TYPE_CHECKING:
    from fragfs.library.estimate import EstimateReport
    from fragfs.library.explain import Explanation, ModelShare
    from fragfs.library.places import BasePlace, FragmentPlace, TensorPlace

__all__ = ["estimate_command", "explain_command"]

_LISTED_MAX = 10
_NO_MODEL = "(no model any more)"


@click.command(
    "explain",
    epilog=example(
        "fragfs explain all-MiniLM-L6-v2",
        "fragfs explain all-MiniLM-L6-v2/model.safetensors",
    ),
)
@click.argument("target", metavar="MODEL[/FILE]")
@click.option("--fragments", is_flag=True, help="List every fragment of every tensor.")
@json_option
@shared_options()
@pass_session
def explain_command(session: Session, target: str, fragments: bool, as_json: bool) -> None:
    """Say where bytes live, what predicts them, and who shares them.

    FILE may also be a folder of the model. Of a file or folder, the tensors are listed as well.
    "Exclusive" is what no other model needs, bases included; "bases" are pieces that are not in
    these files and that reading them takes. A piece is "needed" by a model whose files hold it, or
    hold something that is predicted from it.
    """
    with session.open_library() as library:
        place = find_target(library, target)
        explanation = library.explain(
            place.model, place.path, tensors=fragments or bool(place.path)
        )
    if as_json:
        emit_json(_as_json(explanation, fragments=fragments))
        return
    for line in _total_lines(explanation):
        say(line)
    for line in _section_lines(explanation):
        say(line)
    for file, found in groupby(explanation.tensors, lambda tensor: tensor.file):
        tensors = list(found)
        say()
        if explanation.file_count > 1:
            say(show_name(file))
        rows = _fragment_rows(tensors) if fragments else _tensor_rows(tensors)
        for line in format_table(rows, "rrrllll" if fragments else "rrrlll"):
            say(line)


def _total_lines(explanation: Explanation) -> list[str]:
    name = show_name(explanation.model)
    what = f"{name}/{show_name(explanation.path)}" if explanation.path else name
    logical = explanation.logical_bytes
    rows = [
        ("model" if not explanation.path else "file", what, ""),
        ("holds", format_count(explanation.file_count, "file"), ""),
        ("logical", format_bytes(logical), "as added"),
        ("unique", format_bytes(explanation.unique_bytes), "each distinct piece once"),
        (
            "stored",
            format_bytes(explanation.stored_bytes),
            f"{format_share(explanation.stored_bytes, logical)} of logical",
        ),
        ("exclusive", format_bytes(explanation.exclusive_bytes), "needed by no other model"),
        ("shared", format_bytes(explanation.shared_bytes), "needed by other models as well"),
    ]
    if explanation.base_bytes:
        rows.append(
            ("bases", format_bytes(explanation.base_bytes), "elsewhere, and needed to read it")
        )
    return [*format_table(rows[:1], "lll"), *format_table(rows[1:], "lll")]


def _section_lines(explanation: Explanation) -> list[str]:
    lines: list[str] = []

    def section(title: str, head: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> None:
        if not rows:
            return
        shown = [head, *rows[:_LISTED_MAX]]
        lines.extend(["", title, *(f"  {line}" for line in format_table(shown, "rrrl"))])
        if len(rows) > _LISTED_MAX:
            lines.append(f"  and {len(rows) - _LISTED_MAX:,} more; --json lists them all")

    section(
        "how it is stored",
        ("pieces", "raw", "stored", "by"),
        [
            (
                f"{mechanism.fragment_count:,}",
                format_bytes(mechanism.raw_bytes),
                format_bytes(mechanism.stored_bytes),
                describe_mechanism(mechanism.name),
            )
            for mechanism in explanation.mechanisms
        ],
    )
    section("predicted from", _SHARE_HEAD, _share_rows(explanation.bases))
    section("base of", _SHARE_HEAD, _share_rows(explanation.dependents))
    section("shared with", _SHARE_HEAD, _share_rows(explanation.sharers))
    total = explanation.unique_bytes
    section(
        "fragments that a read decodes",
        ("count", "raw", "", ""),
        [
            (f"{count}", format_bytes(size), format_share(size, total), "")
            for count, size in explanation.closure_sizes.items()
        ],
    )
    section(
        "where it is",
        ("pieces", "", "stored", "pack"),
        [
            (f"{pack.fragment_count:,}", "", format_bytes(pack.stored_bytes), f"{pack.number}")
            for pack in explanation.packs
        ],
    )
    return lines


_SHARE_HEAD = ("pieces", "raw", "stored", "model")


def _share_rows(shares: Sequence[ModelShare]) -> list[tuple[str, ...]]:
    return [
        (
            f"{share.fragment_count:,}",
            format_bytes(share.raw_bytes),
            format_bytes(share.stored_bytes),
            show_name(share.model) if share.model is not None else _NO_MODEL,
        )
        for share in shares
    ]


def _tensor_rows(tensors: Sequence[TensorPlace]) -> list[tuple[str, ...]]:
    rows: list[tuple[str, ...]] = [("size", "stored", "", "how", "tensor", "predicted from")]
    for tensor in tensors:
        rows.append(
            (
                format_bytes(tensor.size),
                format_bytes(tensor.stored_bytes),
                format_share(tensor.stored_bytes, tensor.size),
                "+".join(dict.fromkeys(piece.mechanism for piece in tensor.fragments)),
                _tensor_text(tensor),
                _bases_text(tensor, tensor.fragments),
            )
        )
    return rows


def _fragment_rows(tensors: Sequence[TensorPlace]) -> list[tuple[str, ...]]:
    rows: list[tuple[str, ...]] = [
        ("size", "stored", "", "how", "pack:offset", "tensor", "predicted from")
    ]
    for tensor in tensors:
        for piece in tensor.fragments:
            index = f" [{piece.index}]" if len(tensor.fragments) > 1 else ""
            rows.append(
                (
                    format_bytes(piece.raw_size),
                    format_bytes(piece.stored_bytes),
                    format_share(piece.stored_bytes, piece.raw_size),
                    piece.mechanism,
                    f"{piece.pack}:{piece.offset}",
                    f"{_tensor_text(tensor)}{index}",
                    _bases_text(tensor, [piece]),
                )
            )
    return rows


def _tensor_text(tensor: TensorPlace) -> str:
    if not tensor.dtype:
        return f"({tensor.kind.name.lower()})"
    shape = ", ".join(map(str, tensor.shape))
    return f"{escape(tensor.name)} {tensor.dtype} [{shape}]"


def _bases_text(tensor: TensorPlace, pieces: Sequence[FragmentPlace]) -> str:
    """The bases of some pieces, each once; what is the same as in the tensor itself is left out."""
    texts = dict.fromkeys(
        _base_text(tensor, piece, base) for piece in pieces for base in piece.bases
    )
    return ", ".join(texts)


def _base_text(tensor: TensorPlace, piece: FragmentPlace, base: BasePlace) -> str:
    if base.model is None:
        return f"{base.id.short} {_NO_MODEL}"
    text = show_name(base.model)
    # A piece that several small tensors share is named after the first of them.
    if base.tensor in (tensor.name, "") or piece.size != piece.raw_size:
        return text
    return f"{text}: {escape(base.tensor)}"


def _as_json(explanation: Explanation, *, fragments: bool) -> dict[str, object]:
    return {
        "model": json_name(explanation.model),
        "path": json_name(explanation.path) if explanation.path else None,
        "file_count": explanation.file_count,
        "logical_bytes": explanation.logical_bytes,
        "unique_bytes": explanation.unique_bytes,
        "stored_bytes": explanation.stored_bytes,
        "exclusive_bytes": explanation.exclusive_bytes,
        "shared_bytes": explanation.shared_bytes,
        "base_bytes": explanation.base_bytes,
        "mechanisms": [
            {
                "mechanism": mechanism.name,
                "fragment_count": mechanism.fragment_count,
                "raw_bytes": mechanism.raw_bytes,
                "stored_bytes": mechanism.stored_bytes,
            }
            for mechanism in explanation.mechanisms
        ],
        "bases": [_share_as_json(share) for share in explanation.bases],
        "dependents": [_share_as_json(share) for share in explanation.dependents],
        "sharers": [_share_as_json(share) for share in explanation.sharers],
        "closure_sizes": [
            {"fragment_count": count, "raw_bytes": size}
            for count, size in explanation.closure_sizes.items()
        ],
        "packs": [
            {
                "pack": pack.number,
                "fragment_count": pack.fragment_count,
                "stored_bytes": pack.stored_bytes,
            }
            for pack in explanation.packs
        ],
        "tensors": [_tensor_as_json(tensor, fragments=fragments) for tensor in explanation.tensors],
    }


def _share_as_json(share: ModelShare) -> dict[str, object]:
    return {
        "model": json_name(share.model) if share.model is not None else None,
        "fragment_count": share.fragment_count,
        "raw_bytes": share.raw_bytes,
        "stored_bytes": share.stored_bytes,
    }


def _tensor_as_json(tensor: TensorPlace, *, fragments: bool) -> dict[str, object]:
    pieces = tensor.fragments
    bases = {base.id: base for piece in pieces for base in piece.bases}
    found: dict[str, object] = {
        "file": json_name(tensor.file),
        "name": tensor.name or None,
        "kind": tensor.kind.name.lower(),
        "dtype": tensor.dtype or None,
        "shape": list(tensor.shape),
        "offset": tensor.offset,
        "size": tensor.size,
        "stored_bytes": tensor.stored_bytes,
        "mechanisms": list(dict.fromkeys(piece.mechanism for piece in pieces)),
        "bases": [_base_as_json(base) for base in bases.values()],
    }
    if fragments:
        found["fragments"] = [
            {
                "id": piece.id.hex(),
                "index": piece.index,
                "size": piece.size,
                "raw_size": piece.raw_size,
                "stored_bytes": piece.stored_bytes,
                "mechanism": piece.mechanism,
                "pack": piece.pack,
                "offset": piece.offset,
                "closure_size": piece.closure_size,
                "model_count": piece.model_count,
                "bases": [_base_as_json(base) for base in piece.bases],
            }
            for piece in pieces
        ]
    return found


def _base_as_json(base: BasePlace) -> dict[str, object]:
    return {
        "id": base.id.hex(),
        "model": json_name(base.model) if base.model is not None else None,
        "file": json_name(base.file) if base.file else None,
        "tensor": base.tensor or None,
        "index": base.index,
    }


@click.command(
    "estimate",
    epilog=example(
        "fragfs estimate ./all-MiniLM-L6-v2 ./all-MiniLM-L6-v2-tuned",
    ),
)
@click.argument("paths", metavar="PATH...", nargs=-1, required=True, type=Path)
@click.option("--follow-links", is_flag=True, help="Count what links outside the source lead to.")
@click.option("--force", is_flag=True, help="Count truncated files and LFS pointers as they are.")
@click.option("--workers", type=click.IntRange(min=1), metavar="N", help="Encoder threads.")
@json_option
@shared_options()
@pass_session
def estimate_command(
    session: Session,
    paths: tuple[Path, ...],
    follow_links: bool,
    force: bool,
    workers: int | None,
    as_json: bool,
) -> None:
    """Say what adding directories or files would store.

    Nothing is added. Everything is read, so what is stored already is known exactly. Of the rest a
    sample is encoded; how much its parts differ gives the margin. Paths count as added one after
    the other, so that later ones may share with earlier ones, or be predicted from them.
    """
    from fragfs.cli.progress import show_progress
    from fragfs.library.add import AddOptions

    options = AddOptions(follow_links=follow_links, force=force, workers=workers)
    absolute = [Path(os.path.abspath(path)) for path in paths]
    with session.open_library() as library, show_progress(session) as progress:
        report = library.estimate(absolute, options, progress)
    for text in report.warnings:
        remark(f"fragfs: warning: {text}")
    if as_json:
        emit_json(_estimate_as_json(report))
        return
    for line in _estimate_lines(report):
        say(line)


def _estimate_lines(report: EstimateReport) -> list[str]:
    logical = report.logical_bytes
    rows = [
        ("logical", format_bytes(logical), format_count(report.file_count, "file")),
        ("equal", format_bytes(report.exact_bytes), "stored already, or more than once in these"),
        ("new", format_bytes(logical - report.exact_bytes), ""),
        ("to store", format_bytes(report.stored_bytes), _certainty(report)),
    ]
    lines = format_table(rows, "lll")
    if report.mechanisms:
        table = [("new", "to store", "by")]
        table += [
            (format_bytes(raw_bytes), format_bytes(stored_bytes), describe_mechanism(name))
            for name, (raw_bytes, stored_bytes) in _ranked(report.mechanisms)
        ]
        lines += ["", *format_table(table, "rrl")]
    new_bytes = logical - report.exact_bytes
    if report.sampled_bytes < new_bytes:
        share = format_share(report.sampled_bytes, new_bytes)
        lines += ["", f"from a sample of {format_bytes(report.sampled_bytes)}, {share} of the new"]
    if report.skipped:
        lines.append(f"left out: {format_count(len(report.skipped), 'file')}; --json lists them")
    return lines


def _certainty(report: EstimateReport) -> str:
    share = f"{format_share(report.stored_bytes, report.logical_bytes)} of logical"
    if report.sampled_bytes == report.logical_bytes - report.exact_bytes:
        return f"{share}; all that is new was encoded"
    return f"{share}, estimated, ± {format_bytes(report.margin_bytes)}"


def _ranked(mechanisms: dict[str, tuple[int, int]]) -> list[tuple[str, tuple[int, int]]]:
    return sorted(mechanisms.items(), key=lambda item: -item[1][0])


def _estimate_as_json(report: EstimateReport) -> dict[str, object]:
    return {
        "file_count": report.file_count,
        "logical_bytes": report.logical_bytes,
        "exact_bytes": report.exact_bytes,
        "stored_bytes": report.stored_bytes,
        "margin_bytes": report.margin_bytes,
        "sampled_bytes": report.sampled_bytes,
        "mechanisms": [
            {"mechanism": name, "raw_bytes": raw_bytes, "stored_bytes": stored_bytes}
            for name, (raw_bytes, stored_bytes) in _ranked(report.mechanisms)
        ],
        "skipped": [{"path": json_name(path), "why": why} for path, why in report.skipped],
        "warnings": list(report.warnings),
    }
