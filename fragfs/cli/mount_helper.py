"""`mount.fuse.fragfs`: what mount(8) runs for fstab lines of type `fuse.fragfs`.

The convention (mount(8), "External helpers"): `mount.fuse.fragfs SOURCE MOUNTPOINT [-sfnv]
[-o OPTIONS] [-t TYPE]`. Here SOURCE is a library.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import click

from fragfs.cli.main import run
from fragfs.cli.mount_options import parse_fstab_options
from fragfs.cli.options import example
from fragfs.cli.serving import start_mount

__all__ = ["main"]


@click.command(
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog=example(
        "/srv/models.fragfs /mnt/models fuse.fragfs defaults,allow_other,nofail 0 0",
    ),
)
@click.argument("source", type=Path)
@click.argument("mountpoint", type=Path)
@click.option("-o", "option_list", multiple=True, metavar="OPTIONS", help="As in fstab.")
@click.option("-f", "--fake", is_flag=True, help="Check the options, mount nothing.")
@click.option("-v", "--verbose", is_flag=True, help="Say what was mounted.")
@click.option("-s", is_flag=True, expose_value=False, help="Accepted; changes nothing.")
@click.option("-n", is_flag=True, expose_value=False, help="Accepted; changes nothing.")
@click.option("-t", metavar="TYPE", expose_value=False, help="Accepted; changes nothing.")
def _command(
    source: Path, mountpoint: Path, option_list: tuple[str, ...], fake: bool, verbose: bool
) -> None:
    """Mount the library SOURCE. For mount(8); people use 'fragfs mount'."""
    # `rw` is no wish here: mount(8) puts it first in the list unless the line says `ro`.
    words = parse_fstab_options(",".join(option_list))
    from fragfs.mount.options import MountOptions

    options = MountOptions(
        library=(words.library or source).absolute(),
        mountpoint=mountpoint.absolute(),
        models=words.models,
        allow_other=words.allow_other,
        allow_root=words.allow_root,
        uid=words.uid,
        gid=words.gid,
        umask=words.umask,
        nonempty=words.nonempty,
    )
    if not fake:
        start_mount(options, quiet=not verbose)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the mount helper.

    Args:
        arguments: What follows the program's name; None takes them from `sys.argv`.

    Returns:
        The exit status, as mount(8) reads it: 0 mounted, anything else is an error.
    """
    return run(_command, "mount.fuse.fragfs", arguments)
