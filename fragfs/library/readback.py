"""Reading whole files back, and export.

Contents stream in order: a bounded window of fragments is decoded in threads ahead of the consumer,
so memory stays small and all cores work.
"""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from fragfs.errors import FormatError, FragmentError, IntegrityError, UsageError
from fragfs.library.catalog import CATALOG_REMEDY
from fragfs.library.extents import OpenContent
from fragfs.library.files import storage_error
from fragfs.library.names import as_name, printable
from fragfs.library.progress import Progress
from fragfs.types import FileEntry

__all__ = ["WINDOW_BYTES_MAX", "ExportReport", "export_files", "read_content"]

WINDOW_BYTES_MAX = 64 << 20
"""Bytes of fragments decoded ahead of whoever reads."""

OpenContentFunction = Callable[[int], OpenContent]
DecodeFunction = Callable[[int], memoryview]


@dataclass(frozen=True, slots=True)
class ExportReport:
    """What an export wrote.

    Attributes:
        file_count: Files written.
        logical_bytes: Their bytes.
        failed: (path, error) of files that are damaged in the library and were not written.
    """

    file_count: int
    logical_bytes: int
    failed: tuple[tuple[bytes, FragmentError], ...]


def read_content(
    content: OpenContent,
    decode: DecodeFunction,
    pool: ThreadPoolExecutor,
    window_bytes: int = WINDOW_BYTES_MAX,
) -> Iterator[memoryview]:
    """The bytes of a content, front to back, decoded ahead in `pool`.

    Args:
        content: The content.
        decode: Decodes a fragment by number.
        pool: Threads that decode.
        window_bytes: How much to decode ahead.

    Raises:
        FragmentError: From the decode that failed.
    """
    waiting: deque[tuple[int, int, Future[memoryview]]] = deque()
    waiting_bytes = 0
    try:
        for extent in content.extents:
            while waiting and waiting_bytes + extent.size > window_bytes:
                start, size, future = waiting.popleft()
                waiting_bytes -= size
                yield future.result()[start : start + size]
            waiting.append(
                (extent.fragment_offset, extent.size, pool.submit(decode, extent.fragment))
            )
            waiting_bytes += extent.size
        while waiting:
            start, size, future = waiting.popleft()
            yield future.result()[start : start + size]
    finally:
        for _, _, future in waiting:
            future.cancel()


def export_files(
    files: Sequence[FileEntry],
    directories: Sequence[tuple[bytes, int, int]],
    destination: Path,
    open_content: OpenContentFunction,
    decode: DecodeFunction,
    workers: int,
    progress: Progress,
) -> ExportReport:
    """Write files back, bit-exact, with their modes and times; each appears whole or not at all.

    Args:
        files: What to write.
        directories: (path, mode, mtime_ns); b"" is the destination itself.
        destination: A directory that does not exist yet, or is empty.
        open_content: Gives a content by number.
        decode: Decodes a fragment by number.
        workers: Threads that decode.
        progress: Told about bytes written.

    Raises:
        UsageError: The destination holds something.
        StorageError: It cannot be written.
    """
    if destination.exists() and (not destination.is_dir() or any(destination.iterdir())):
        raise UsageError(
            f"{destination} exists and is not an empty directory",
            path=str(destination),
            remedy="name a new directory",
        )
    total = sum(file.size for file in files)
    progress.start("exporting", total)
    failed: list[tuple[bytes, FragmentError]] = []
    try:
        for path, _, _ in sorted(directories):
            _inside(destination, path).mkdir(parents=True, exist_ok=True)
        with ThreadPoolExecutor(workers, "fragfs-decode") as pool:
            for file in files:
                progress.note(printable(file.path))
                try:
                    target = _inside(destination, file.path)
                    _export_file(file, open_content(file.content), target, decode, pool, progress)
                except FragmentError as error:
                    # One damaged file must not cost the others: they may be all that is left.
                    failed.append((file.path, error))
        for path, mode, mtime_ns in sorted(directories, reverse=True):
            directory = _inside(destination, path)
            directory.chmod(mode & 0o777)
            os.utime(directory, ns=(mtime_ns, mtime_ns))
    except OSError as error:
        raise storage_error(error, f"cannot export to {destination}") from error
    lost = {path for path, _ in failed}
    written = [file.size for file in files if file.path not in lost]
    return ExportReport(len(written), sum(written), tuple(failed))


def _inside(destination: Path, path: bytes) -> Path:
    """Where a path of a model goes: below the destination, whatever the catalog says.

    Raises:
        FormatError: It would be elsewhere.
    """
    try:
        return destination / os.fsdecode(as_name(path)) if path else destination
    except FragmentError as error:
        raise FormatError(
            f"the catalog is damaged: it names a file that cannot be: {error.message}",
            remedy=CATALOG_REMEDY,
        ) from error


def _export_file(
    file: FileEntry,
    content: OpenContent,
    target: Path,
    decode: DecodeFunction,
    pool: ThreadPoolExecutor,
    progress: Progress,
) -> None:
    digest = hashlib.sha256()
    descriptor, temporary = tempfile.mkstemp(prefix=".fragfs-", dir=target.parent)
    try:
        with os.fdopen(descriptor, "wb", buffering=0) as stream:
            for piece in read_content(content, decode, pool):
                digest.update(piece)
                view = piece
                while view:
                    view = view[stream.write(view) :]
                progress.advance(len(piece))
            # No setuid or setgid: an export must not hand out rights the source had.
            os.fchmod(stream.fileno(), file.mode & 0o777)
        if digest.digest() != file.sha256:
            raise IntegrityError(
                f"{printable(file.path)}: SHA-256 of what was decoded differs",
                path=str(target),
                expected=file.sha256.hex(),
                actual=digest.hexdigest(),
                remedy="run fragfs verify",
            )
        os.utime(temporary, ns=(file.mtime_ns, file.mtime_ns))
        os.replace(temporary, target)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
