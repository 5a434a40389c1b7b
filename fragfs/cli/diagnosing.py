"""`fragfs doctor`: what mounts and the machine have, and what to do about it."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence
from pathlib import Path
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
from fragfs.cli.tables import format_table
from fragfs.cli.terminal import emit_json, escape, remark, say, show_name

if TYPE_CHECKING:
    from fragfs.mount.doctor import Diagnosis, Repair
    from fragfs.mount.findings import Finding, MountFacts

__all__ = ["LOADERS", "doctor_command"]

LOADERS = (
    ("vLLM", "--safetensors-load-strategy=prefetch", "it does not detect fragfs by itself"),
    (
        "SGLang",
        "--weight-loader-prefetch-checkpoints",
        "or --weight-loader-disable-mmap: whole reads instead of page by page",
    ),
    ("transformers, diffusers", "disable_mmap=True", "if the first load is slow"),
    ("llama.cpp", "mapped, the default, or without mmap", "not direct I/O"),
    ("ComfyUI", "nothing", "'fragfs warm MODEL' before a large workflow"),
    ("AUTOMATIC1111", "reading checkpoints without memory mapping", "an option of its settings"),
    ("fastsafetensors", "FASTSAFETENSORS_ODIRECT=0", "so that the page cache is used"),
    ("any", "fragfs warm MODEL", "a second read never reaches fragfs"),
)
"""(loader, what to tell it, remark)."""


@click.command(
    "doctor",
    epilog=example(
        "fragfs doctor",
        "fragfs doctor --fix ~/models",
    ),
)
@click.argument("mountpoint", required=False, type=Path)
@click.option("--fix", is_flag=True, help="Repair what you may, and say what was done.")
@click.option("--loaders", is_flag=True, help="Also say what to tell each known loader.")
@json_option
@shared_options()
@pass_session
def doctor_command(
    session: Session, mountpoint: Path | None, fix: bool, loaders: bool, as_json: bool
) -> int:
    """Look at mounts and the machine, and say what to do.

    Without MOUNTPOINT, at every fragfs mount, whatever its library. A mount that hangs does not
    hang this.

    Each finding is "ok", "advice" (it works, and could be better) or "problem"; with --quiet, only
    the latter two are shown. --fix clears dead mounts, raises the kernel's read-ahead and
    background requests as far as you may, and, without MOUNTPOINT, has all of /dev/shm use large
    pages and removes fragment caches that nobody uses. Exits with 1 if a problem is left.
    """
    from fragfs.mount.doctor import diagnose, find_entries, repair

    diagnosis = diagnose(find_entries(mountpoint))
    repairs: list[Repair] = []
    if fix:
        repairs = repair(diagnosis, machine=mountpoint is None)
        if repairs:
            # One that was named and cleared is no more.
            diagnosis = diagnose([] if _is_gone(diagnosis) else find_entries(mountpoint))
    if as_json:
        emit_json(_as_json(diagnosis, repairs))
    else:
        for tried in repairs:
            if tried.error is None:
                say(f"fixed: {escape(tried.text)}")
            else:
                remark(f"fragfs: not fixed: {tried.text}: {tried.error}")
        _show(diagnosis, quiet=session.quiet)
        if loaders:
            _show_loaders()
        elif diagnosis.mounts and not session.quiet:
            say("what to tell vLLM, SGLang, transformers and others: fragfs doctor --loaders")
    return EXIT_FAILED if diagnosis.has_problem else 0


def _is_gone(diagnosis: Diagnosis) -> bool:
    """Whether none of the mounts that were looked at is left."""
    from fragfs.mount.table import is_mounted

    return not any(is_mounted(facts.entry) for facts in diagnosis.mounts)


def _show(diagnosis: Diagnosis, *, quiet: bool) -> None:
    _show_findings("this machine", diagnosis, None, quiet=quiet)
    for facts in diagnosis.mounts:
        place = facts.entry.mountpoint
        _show_findings(show_name(os.fsencode(place)), diagnosis, place, quiet=quiet)
    if not (diagnosis.mounts or quiet):
        say("no fragfs library is mounted; mount one: fragfs mount MOUNTPOINT")


def _show_findings(title: str, diagnosis: Diagnosis, place: Path | None, *, quiet: bool) -> None:
    from fragfs.mount.findings import Severity

    findings = [
        finding
        for finding in diagnosis.findings
        if finding.mountpoint == place and not (quiet and finding.severity is Severity.OK)
    ]
    if not findings:
        return
    say(title)
    for line in _lines(findings):
        say(f"  {line}")


def _lines(findings: Sequence[Finding]) -> list[str]:
    rows = []
    for finding in findings:
        rows.append((finding.severity.value, finding.topic, escape(finding.text)))
        if finding.remedy is not None:
            rows.append(("", "", f"> {escape(finding.remedy)}"))
    return format_table(rows, "lll")


def _show_loaders() -> None:
    say("what to tell loaders")
    for line in format_table(LOADERS, "lll"):
        say(f"  {line}")


def _as_json(diagnosis: Diagnosis, repairs: Sequence[Repair]) -> dict[str, object]:
    system = dataclasses.asdict(diagnosis.system)
    system["abandoned"] = [
        {"directory": os.fspath(directory), "bytes": size}
        for directory, size in diagnosis.system.abandoned
    ]
    return {
        "has_problem": diagnosis.has_problem,
        "findings": [
            {
                "severity": finding.severity.value,
                "topic": finding.topic,
                "mountpoint": None if finding.mountpoint is None else os.fspath(finding.mountpoint),
                "text": finding.text,
                "remedy": finding.remedy,
            }
            for finding in diagnosis.findings
        ],
        "repairs": [{"text": tried.text, "error": tried.error} for tried in repairs],
        "system": system,
        "mounts": [_mount_as_json(facts) for facts in diagnosis.mounts],
        "loaders": [
            {"loader": name, "setting": setting, "remark": text} for name, setting, text in LOADERS
        ],
    }


def _mount_as_json(facts: MountFacts) -> dict[str, object]:
    return {
        "mountpoint": os.fspath(facts.entry.mountpoint),
        "state": facts.answer.state.value,
        "read_ahead_kb": facts.read_ahead_kb,
        "max_background": facts.max_background,
        "congestion_threshold": facts.congestion_threshold,
        "library_format": facts.library_format,
        "status": facts.answer.status,
    }
