"""Verifying: every file decoded and compared with its SHA-256, several at once.

A run writes down which contents it has found good, so that one that was interrupted can go on. What
was written down counts only for the same state of the library: a later batch may have replaced any
record.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import threading
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from fragfs.errors import FragmentError, IntegrityError, NotFoundError
from fragfs.library.extents import OpenContent
from fragfs.library.files import storage_error
from fragfs.library.names import printable
from fragfs.library.progress import Progress
from fragfs.library.readback import WINDOW_BYTES_MAX, read_content
from fragfs.types import FileEntry

__all__ = ["VerifiedFile", "VerifyState", "verify_files"]

_STATE_MAGIC = "fragfs-verify-1"


@dataclass(frozen=True, slots=True)
class VerifiedFile:
    """One file, decoded and compared with its recorded SHA-256.

    Attributes:
        model: The model's name.
        path: Path inside the model.
        size: Bytes of the file.
        sha256: The recorded digest.
        error: What is wrong; None if the file is good.
        resumed: Whether an interrupted run has found it good, and this one has not read it.
    """

    model: bytes
    path: bytes
    size: int
    sha256: bytes
    error: FragmentError | None
    resumed: bool = False


class VerifyState:
    """What a run has found good, in a file that outlives it. Used by one thread.

    The file is locked while it is in use: a second run of the same user on the same library keeps
    no state.

    Args:
        path: The file; its directory is made if it is missing.
        uuid: The library's identity.
        batch: Id of the batch committed last.
        catalog: Which file the catalog is: a rebuild may have it mean other records.
        resume: Whether to believe what an interrupted run has left.

    Attributes:
        done: Contents that an earlier run has found good.

    Raises:
        StorageError: The file cannot be made.
    """

    def __init__(
        self, path: Path, uuid: bytes, batch: bytes, catalog: str, *, resume: bool
    ) -> None:
        self._path = path
        self.done: set[int] = set()
        self._descriptor = -1
        head = f"{_STATE_MAGIC} {uuid.hex()} {batch.hex()} {catalog}\n".encode()
        try:
            path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise storage_error(error, f"cannot keep the state of verify in {path}") from error
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            data = os.pread(descriptor, os.fstat(descriptor).st_size, 0)
            if resume and data.startswith(head):
                # A line that was cut off by the interruption has no end.
                lines = data[len(head) :].split(b"\n")[:-1]
                self.done = {int(line) for line in lines if line.isdigit()}
                os.ftruncate(descriptor, len(data) - len(data.rpartition(b"\n")[2]))
            else:
                os.ftruncate(descriptor, 0)
                os.write(descriptor, head)
        except BlockingIOError:
            os.close(descriptor)
            return
        except OSError as error:
            os.close(descriptor)
            raise storage_error(error, f"cannot keep the state of verify in {path}") from error
        self._descriptor = descriptor

    def add(self, content: int) -> None:
        """A content was read to its end and is good."""
        if self._descriptor >= 0:
            try:
                os.write(self._descriptor, b"%d\n" % content)
            except OSError as error:
                raise storage_error(error, f"cannot write {self._path}") from error

    def finish(self) -> None:
        """All is verified: there is nothing to resume."""
        if self._descriptor >= 0:
            self._path.unlink(missing_ok=True)
        self.close()

    def close(self) -> None:
        """Leave the state for another run."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1


class _Interrupted(Exception):
    pass


class _Steps:
    """Lets several threads report progress."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self._lock = threading.Lock()
        self.stop = threading.Event()

    def advance(self, size: int) -> None:
        if self.stop.is_set():
            raise _Interrupted
        with self._lock:
            self._progress.advance(size)

    def note(self, text: str) -> None:
        with self._lock:
            self._progress.note(text)


def verify_files(
    files: Sequence[tuple[bytes, FileEntry]],
    open_content: Callable[[int], OpenContent],
    decode: Callable[[int], memoryview],
    workers: int,
    progress: Progress,
    state: VerifyState | None = None,
) -> Generator[VerifiedFile, None, None]:
    """Decode files and compare their SHA-256, several at once; each distinct content is read once.

    Files that are removed or replaced meanwhile are passed over.

    Args:
        files: (model name, file) pairs; results come in this order.
        open_content: Gives a content by number.
        decode: Decodes a fragment by number.
        workers: Threads that decode, and at most as many that hash.
        progress: Told about bytes decoded.
        state: What an interrupted run has found good, and where to write it down.
    """
    done = state.done if state is not None else set()
    entries = {file.content: file for _, file in files if file.content not in done}
    progress.start("verifying", sum(file.size for file in entries.values()))
    hashers = max(1, min(workers, len(entries)))
    steps = _Steps(progress)
    with (
        ThreadPoolExecutor(workers, "fragfs-decode") as decoders,
        ThreadPoolExecutor(hashers, "fragfs-verify") as pool,
    ):

        def verify(file: FileEntry) -> FragmentError | None:
            steps.note(printable(file.path))
            return _problem(file, open_content, decode, decoders, hashers, steps)

        futures: dict[int, Future[FragmentError | None]] = {
            content: pool.submit(verify, file) for content, file in entries.items()
        }
        told: set[int] = set()
        try:
            for model, file in files:
                if file.content in done:
                    yield VerifiedFile(model, file.path, file.size, file.sha256, None, resumed=True)
                    continue
                error = futures[file.content].result()
                if error is not None and _is_gone(file.content, open_content):
                    continue
                if error is None and state is not None and file.content not in told:
                    state.add(file.content)
                told.add(file.content)
                yield VerifiedFile(model, file.path, file.size, file.sha256, error)
        finally:
            steps.stop.set()
            pool.shutdown(cancel_futures=True)


def _is_gone(content: int, open_content: Callable[[int], OpenContent]) -> bool:
    try:
        open_content(content)
    except NotFoundError:
        return True
    except FragmentError:
        return False  # it is there, and damaged: that is what the error tells
    return False


def _problem(
    file: FileEntry,
    open_content: Callable[[int], OpenContent],
    decode: Callable[[int], memoryview],
    decoders: ThreadPoolExecutor,
    hashers: int,
    steps: _Steps,
) -> FragmentError | None:
    """What is wrong with a file; None if it is good."""
    digest = hashlib.sha256()
    try:
        content = open_content(file.content)
        for piece in read_content(content, decode, decoders, WINDOW_BYTES_MAX // hashers):
            digest.update(piece)
            steps.advance(len(piece))
    except FragmentError as error:
        return error
    if digest.digest() == file.sha256:
        return None
    return IntegrityError(
        f"{printable(file.path)}: SHA-256 differs although every fragment is intact",
        path=os.fsdecode(file.path),
        expected=file.sha256.hex(),
        actual=digest.hexdigest(),
        remedy="see what can be done with: fragfs check --data",
    )
