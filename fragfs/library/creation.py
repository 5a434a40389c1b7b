"""`fragfs init`: an empty library in a new or empty directory."""

from __future__ import annotations

import os
import uuid as uuid_module
from pathlib import Path

from fragfs.errors import UsageError
from fragfs.library.catalog import CATALOG_NAME, create_catalog
from fragfs.library.files import Files
from fragfs.library.lease import LEASES_NAME, make_lease_file
from fragfs.library.packs import PACKS_NAME
from fragfs.library.writer import STAGING_NAME
from fragfs.types import LibraryConfig

__all__ = ["create_library"]


def create_library(files: Files, directory: Path, config: LibraryConfig, now_ns: int) -> None:
    """Create a library; it exists from the moment its catalog has its name.

    Args:
        files: How to write.
        directory: Where; missing parents are created.
        config: Settings that never change afterwards.
        now_ns: The time.

    Raises:
        UsageError: The directory holds something.
        StorageError: It cannot be written.
    """
    if directory.exists() and not directory.is_dir():
        raise UsageError(f"{directory} is not a directory", path=str(directory))
    for parent in reversed([directory, *directory.parents]):
        if not parent.exists():
            files.make_directory(parent)
    staging = directory / STAGING_NAME
    leftovers = set(files.names(directory)) - {STAGING_NAME, PACKS_NAME, LEASES_NAME}
    if (directory / PACKS_NAME).exists() and files.names(directory / PACKS_NAME):
        leftovers.add(PACKS_NAME)
    if CATALOG_NAME in leftovers:
        raise UsageError(
            f"{directory} is a fragfs library already",
            path=str(directory),
            remedy="add models to it, or name a new directory",
        )
    if leftovers:
        raise UsageError(
            f"{directory} is not empty", path=str(directory), remedy="name a new directory"
        )
    files.make_directory(directory / PACKS_NAME)
    files.make_directory(staging)
    make_lease_file(directory)
    temporary = staging / f"{CATALOG_NAME}.{os.getpid()}"
    files.unlink(temporary)
    create_catalog(temporary, uuid_module.uuid4().bytes, config, now_ns)
    # A library exists once its catalog has its name: all else is there by then, and durable.
    files.sync_directory(directory)
    files.rename(temporary, directory / CATALOG_NAME)
    files.sync_directory(directory)
    files.sync_directory(directory.parent)
