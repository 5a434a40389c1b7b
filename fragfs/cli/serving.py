"""`fragfs mount` and `fragfs umount`."""

from __future__ import annotations

import dataclasses
import os
import shlex
from pathlib import Path
from typing import TYPE_CHECKING

import click

from fragfs.cli.environment import default_cache, default_log_file
from fragfs.cli.mount_options import FstabOptions, parse_fstab_options, parse_number
from fragfs.cli.options import (
    Session,
    example,
    json_option,
    parse_size,
    pass_session,
    shared_options,
)
from fragfs.cli.terminal import emit_json, escape, remark, say, show_name
from fragfs.errors import UsageError

if TYPE_CHECKING:
    from fragfs.mount.options import MountOptions

__all__ = ["mount_command", "start_mount", "umount_command"]

_GRACE_S = 30.0
_READ_AHEAD_DEFAULT_KB = 128

# Paths are `Path`, never `click.Path`: that one asks the file system about them, and a mount point
# whose daemon hangs would hang the command that is to end it.


@click.command(
    "mount",
    epilog=example(
        "fragfs mount ~/models",
        "fragfs umount ~/models",
    ),
)
@click.argument("mountpoint", type=Path)
@click.option("-f", "--foreground", is_flag=True, help="Stay in the foreground.")
@click.option("-o", "option_list", multiple=True, metavar="OPTS", help="Options as in fstab.")
@click.option(
    "--model", "models", multiple=True, metavar="NAME", help="Show only this model; repeatable."
)
@click.option("--allow-other", is_flag=True, help="Let all users read. [default: only you]")
@click.option("--uid", metavar="N", help="Owner of all files. [default: you]")
@click.option("--gid", metavar="N", help="Group of all files. [default: yours]")
@click.option("--umask", metavar="OCTAL", help="Permission bits taken away from all files.")
@click.option(
    "--cache",
    "cache_bytes_max",
    type=parse_size,
    metavar="SIZE",
    help="Budget of the shared fragment cache; 0 is none. [default: a quarter of free memory]",
)
@click.option(
    "--cache-dir",
    type=Path,
    metavar="DIR",
    help="Keep it below DIR. [default: shared memory, else your cache directory]",
)
@click.option(
    "--prefill/--no-prefill",
    default=True,
    help="Whether to decode, and to fill the kernel's page cache, ahead of readers.",
)
@click.option(
    "--passthrough/--no-passthrough",
    default=True,
    help="Whether the kernel may read files that were read before by itself; only for root.",
)
@click.option(
    "--read-ahead",
    "read_ahead_kb",
    type=click.IntRange(0, 1 << 20),
    metavar="KIB",
    help="How far the kernel reads ahead; only root may say. 0 leaves it. [default: 512]",
)
@click.option(
    "--log-file",
    type=Path,
    metavar="FILE",
    help="Log here. [default: the system log, else a file in your state directory]",
)
@click.option(
    "--grace",
    "grace_s",
    type=click.FloatRange(min=0),
    default=_GRACE_S,
    show_default=True,
    metavar="SECONDS",
    help="How long open files may be read on after SIGTERM.",
)
@json_option
@shared_options()
@pass_session
def mount_command(
    session: Session,
    mountpoint: Path,
    foreground: bool,
    option_list: tuple[str, ...],
    models: tuple[str, ...],
    allow_other: bool,
    uid: str | None,
    gid: str | None,
    umask: str | None,
    cache_bytes_max: int | None,
    cache_dir: Path | None,
    prefill: bool,
    passthrough: bool,
    read_ahead_kb: int | None,
    log_file: Path | None,
    grace_s: float,
    as_json: bool,
) -> int:
    """Show the models as ordinary files under a mount point.

    MOUNTPOINT is an existing directory; the files in it are read-only. Returns when the mount is
    ready and goes on in the background. Models that are added or removed later appear and
    disappear within a second.

    -o takes ro, allow_other, allow_root, nonempty, uid=, gid=, umask=, library=, model=, and
    passes over what is meant for mount(8) and systemd.
    """
    words = parse_fstab_options(",".join(option_list))
    if words.writable:
        raise UsageError("a library is mounted read-only", remedy="leave out 'rw'")
    from fragfs.mount.options import READ_AHEAD_KB, MountOptions

    options = MountOptions(
        library=words.library.absolute() if words.library else session.library_path,
        mountpoint=mountpoint.absolute(),
        models=(*words.models, *map(os.fsencode, models)),
        allow_other=allow_other or words.allow_other,
        allow_root=words.allow_root,
        uid=_number("uid", uid, words),
        gid=_number("gid", gid, words),
        umask=_number("umask", umask, words),
        nonempty=words.nonempty,
        cache_bytes_max=cache_bytes_max,
        cache_directory=cache_dir.absolute() if cache_dir else None,
        cache_on_disk=default_cache(),
        prefill=prefill,
        passthrough=passthrough,
        read_ahead_kb=READ_AHEAD_KB if read_ahead_kb is None else read_ahead_kb or None,
        log_file=log_file.absolute() if log_file else None,
        verbose=session.debug,
        grace_s=grace_s,
    )
    if foreground:
        if as_json:
            raise UsageError(
                "--json says how a mount in the background began",
                remedy="leave out --foreground or --json",
            )
        from fragfs.mount.launch import serve

        return serve(options)
    start_mount(options, quiet=session.quiet, as_json=as_json)
    return 0


def _number(name: str, text: str | None, words: FstabOptions) -> int | None:
    """An option's own value, else what `-o` says."""
    if text is not None:
        return parse_number(name, text)
    value: int | None = getattr(words, name)
    return value


def start_mount(options: MountOptions, *, quiet: bool, as_json: bool = False) -> None:
    """Mount in the background and say so.

    Args:
        options: What to mount; without a log file, one is chosen if there is no system log.
        quiet: Only print warnings.
        as_json: Print what a script wants to know instead.
    """
    from fragfs.cache.place import SHARED_MEMORY
    from fragfs.mount.doctor import has_small_pages
    from fragfs.mount.launch import mount

    if options.log_file is None:
        try:
            options = dataclasses.replace(options, log_file=default_log_file())
        except OSError as error:
            remark(f"fragfs: warning: no place for a log ({error}); name one with --log-file")
    report = mount(options)
    for text in report.warnings:
        remark(f"fragfs: warning: {text}")
    if as_json:
        cache = report.cache_directory
        emit_json(
            {
                "pid": report.pid,
                "mountpoint": os.fspath(report.mountpoint),
                "read_ahead_kb": report.read_ahead_kb,
                "max_background": report.max_background,
                "cache_directory": None if cache is None else os.fspath(cache),
                "warnings": list(report.warnings),
            }
        )
    elif not quiet:
        shown = show_name(os.fsencode(report.mountpoint))
        typed = shlex.quote(shown)
        say(f"mounted on {shown}; end it with: fragfs umount {typed}")
        slow = []
        was_wanted = options.read_ahead_kb is not None
        if was_wanted and report.read_ahead_kb == _READ_AHEAD_DEFAULT_KB:
            slow.append("read-ahead is the kernel's default")
        cache = report.cache_directory
        if cache is not None and SHARED_MEMORY in cache.parents and has_small_pages(SHARED_MEMORY):
            slow.append("shared memory uses small pages")
        if slow:
            say(f"  {', and '.join(slow)}; see: fragfs doctor {typed}")


@click.command(
    "umount",
    epilog=example(
        "fragfs umount ~/models",
    ),
)
@click.argument("mountpoint", type=Path)
@click.option("--lazy", is_flag=True, help="Detach now; those who still read go on.")
@click.option(
    "--force", is_flag=True, help="Cut off who still reads; for root and for who mounted it."
)
@shared_options()
@pass_session
def umount_command(session: Session, mountpoint: Path, lazy: bool, force: bool) -> None:
    """End a mount.

    If MOUNTPOINT is busy, the processes that use it are named.

    Also clears a mount whose process has died ("Transport endpoint is not connected").
    """
    from fragfs.mount.unmount import unmount
    from fragfs.mount.users import describe_users

    report = unmount(mountpoint.absolute(), lazy=lazy, force=force)
    if session.quiet:
        return
    where = show_name(os.fsencode(mountpoint))
    say(f"cleared the dead mount on {where}" if report.was_dead else f"unmounted {where}")
    if report.users:
        fate = "were cut off" if force else "go on reading"
        say(f"  {escape(describe_users(list(report.users)))} {fate}")
