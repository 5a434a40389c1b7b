"""Reading whole files back: verify, export, and the check before sources are removed.

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

from fragfs.errors import FormatError, FragmentError, IntegrityError, NotFoundError, UsageError
from fragfs.library.extents import OpenContent
from fragfs.library.files import storage_error
from fragfs.library.names import as_name, printable
from fragfs.library.progress import Progress
from fragfs.types import FileEntry

__all__ = ["ExportReport", "VerifiedFile", "export_files", "read_content", "verify_files"]

_WINDOW_BYTES_MAX = 64 << 20

OpenContentFunction = Callable[[int], OpenContent]
DecodeFunction = Callable[[int], memoryview]


@dataclass(frozen=True, slots=True)
class VerifiedFile:
    """One file, decoded and compared with its recorded SHA-256.

    Attributes:
        model: The model's name.
        path: Path inside the model.
        size: Bytes of the file.
        sha256: The recorded digest.
        error: What is wrong; None if the file is good.
    """

    model: bytes
    path: bytes
    size: int
    sha256: bytes
    error: FragmentError | None


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
    content: OpenContent, decode: DecodeFunction, pool: ThreadPoolExecutor
) -> Iterator[memoryview]:
    """The bytes of a content, front to back, decoded ahead in `pool`.

    Raises:
        FragmentError: From the decode that failed.
    """
    waiting: deque[tuple[int, int, Future[memoryview]]] = deque()
    waiting_bytes = 0
    try:
        for extent in content.extents:
            while waiting and waiting_bytes + extent.size > _WINDOW_BYTES_MAX:
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


def _digest(
    content: OpenContent, decode: DecodeFunction, pool: ThreadPoolExecutor, progress: Progress
) -> bytes:
    digest = hashlib.sha256()
    for piece in read_content(content, decode, pool):
        digest.update(piece)
        progress.advance(len(piece))
    return digest.digest()


def verify_files(
    files: Sequence[tuple[bytes, FileEntry]],
    open_content: OpenContentFunction,
    decode: DecodeFunction,
    workers: int,
    progress: Progress,
) -> Iterator[VerifiedFile]:
    """Decode every file and compare its SHA-256; each distinct content is read once.

    Files that are removed or replaced meanwhile are passed over.

    Args:
        files: (model name, file) pairs; results come in this order.
        open_content: Gives a content by number.
        decode: Decodes a fragment by number.
        workers: Threads that decode.
        progress: Told about bytes decoded.
    """
    sizes = {file.content: file.size for _, file in files}
    progress.start("verifying", sum(sizes.values()))
    known: dict[int, FragmentError | None] = {}
    with ThreadPoolExecutor(workers, "fragfs-decode") as pool:
        for model, file in files:
            if file.content not in known:
                progress.note(printable(model + b"/" + file.path))
                known[file.content] = _problem(file, open_content, decode, pool, progress)
            if known[file.content] is not None and _is_gone(file.content, open_content):
                continue
            yield VerifiedFile(model, file.path, file.size, file.sha256, known[file.content])


def _is_gone(content: int, open_content: OpenContentFunction) -> bool:
    try:
        open_content(content)
    except NotFoundError:
        return True
    return False


def _problem(
    file: FileEntry,
    open_content: OpenContentFunction,
    decode: DecodeFunction,
    pool: ThreadPoolExecutor,
    progress: Progress,
) -> FragmentError | None:
    try:
        found = _digest(open_content(file.content), decode, pool, progress)
    except FragmentError as error:
        return error
    if found == file.sha256:
        return None
    return IntegrityError(
        f"{printable(file.path)}: SHA-256 differs although every fragment is intact",
        path=os.fsdecode(file.path),
        expected=file.sha256.hex(),
        actual=found.hex(),
        remedy="restore the catalog from a backup, or add the file again",
    )


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
            remedy="restore it, with the packs, from one backup",
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
