"""Leases: who may still need fragments that no model names.

A mount keeps files readable that are open while their model is removed, and an add stores fragments
before a model names them. Each holder has a file of its own, locked as long as it lives (the kernel
frees it when the holder dies), that says what it needs. Garbage collection reads these files.

Whatever goes wrong errs on the safe side: a statement that is missing, torn or out of date keeps
more, never less. So nothing here is synced, and a failed write is no error.

Source: FORMAT.md, "Leases".
"""

from __future__ import annotations

import fcntl
import json
import os
import secrets
import time
from collections.abc import Generator, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import xxhash

from fragfs.errors import StorageError
from fragfs.library.filesystem import lacks_locks, lock_error

__all__ = [
    "LEASES_NAME",
    "PINS_ONLY",
    "Lease",
    "LeaseState",
    "Ranges",
    "as_ranges",
    "hold_lease",
    "leased",
    "live_leases",
    "make_lease_file",
    "no_leases",
    "no_new_leases",
]

_Item = TypeVar("_Item")

LEASES_NAME = "leases"
_SHARED_NAME = "shared"
_SUFFIX = ".lease"

PINS_ONLY = 2**63 - 1
"""The generation of a holder that needs its pins and opens nothing more."""

# No link, and no pipe that would never answer: the directory may be somebody else's.
_READ = os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
_STATEMENT_BYTES_MAX = 64 << 20
_TORN_TRIES = 5
_POLL_S = 0.02
_BUSY_S = 1.0
"""Others lock the shared file for the moment in which they make their own."""

Ranges = tuple[tuple[int, int], ...]
"""Fragment numbers as (first, last), ascending, both ends included."""


def as_ranges(numbers: Iterable[int]) -> Ranges:
    """Fragment numbers as ranges; files mostly have consecutive ones."""
    found: list[list[int]] = []
    for number in sorted(set(numbers)):
        if found and found[-1][1] == number - 1:
            found[-1][1] = number
        else:
            found.append([number, number])
    return tuple((first, last) for first, last in found)


@dataclass(frozen=True, slots=True)
class LeaseState:
    """What a lease says.

    Attributes:
        process: The holder's process id; 0 where it is not known.
        what: What the holder is, for messages.
        generation: The catalog generation it has seen; None: it may need anything.
        pins: Fragments it needs although the catalog of that generation names them no more.
    """

    process: int
    what: str
    generation: int | None = None
    pins: Ranges = ()

    def pack(self) -> bytes:
        """The content of a lease file."""
        body = json.dumps(
            {
                "process": self.process,
                "what": self.what,
                "generation": self.generation,
                "pins": self.pins,
            }
        ).encode()
        return b"%016x\n%s\n" % (xxhash.xxh3_64_intdigest(body), body)

    @classmethod
    def parse(cls, data: bytes) -> LeaseState | None:
        """Read what `pack` wrote; None if it is torn, or written by something else."""
        digest, _, body = data.partition(b"\n")
        body = body.removesuffix(b"\n")
        if digest != b"%016x" % xxhash.xxh3_64_intdigest(body):
            return None
        try:
            found = json.loads(body)
            generation = found["generation"]
            return cls(
                int(found["process"]),
                str(found["what"]),
                None if generation is None else int(generation),
                tuple((int(first), int(last)) for first, last in found["pins"]),
            )
        except (ValueError, KeyError, TypeError, OverflowError, RecursionError):
            return None


class Lease:
    """A lease that is held. Used by one thread at a time.

    Args:
        descriptor: The locked file to write statements to; None where there is none to be had:
            then the holder needs anything, or nobody knows of it.
        what: What the holder is.
    """

    def __init__(self, descriptor: int | None, what: str) -> None:
        self._descriptor = descriptor
        self._what = what
        self._said: tuple[int | None, Ranges] | None = None

    def say(self, generation: int | None, pins: Ranges = ()) -> None:
        """State what the holder needs from now on; see `LeaseState`.

        Cheap where nothing has changed. A failure is ignored: the last statement, or a torn one,
        keeps more.
        """
        if self._descriptor is None or self._said == (generation, pins):
            return
        data = LeaseState(os.getpid(), self._what, generation, pins).pack()
        with suppress(OSError):
            if os.pwrite(self._descriptor, data, 0) == len(data):
                os.ftruncate(self._descriptor, len(data))
                self._said = (generation, pins)

    def pin(self, pins: Ranges) -> None:
        """State that the holder needs these fragments and nothing else."""
        self.say(PINS_ONLY, pins)


def make_lease_file(directory: Path) -> None:
    """Make what is locked by those who may only read."""
    descriptor = _open_shared(directory)
    if descriptor is not None:
        os.close(descriptor)


@contextmanager
def hold_lease(directory: Path, what: str, *, required: bool = False) -> Iterator[Lease]:
    """Hold a lease for as long as the context lasts; it keeps everything until it says less.

    Where this user may not make a file, the lease keeps everything and cannot say less. Where it
    may not even open the shared one, or the file system has no locks, there is nothing to hold.

    Args:
        directory: The library's directory.
        what: What the holder is, for messages: "mount on /mnt/models".
        required: Whether a file system without locks is an error: who writes needs them anyway.

    Raises:
        StorageError: The lease cannot be taken.
    """
    process = os.getpid()
    shared = _open_shared(directory)
    if shared is None and required:
        raise StorageError(
            f"cannot open {directory / LEASES_NAME / _SHARED_NAME}",
            path=str(directory),
            remedy="check the owner and the permissions, or raise the limit on open files"
            " (ulimit -n)",
        )
    own: tuple[int, Path] | None = None
    try:
        if shared is not None:
            try:
                fcntl.flock(shared, fcntl.LOCK_SH)
            except OSError as error:
                # Who only reads goes on: without locks nobody drops anything from here.
                if required or not lacks_locks(error):
                    what_failed = f"cannot take a lease in {directory}"
                    raise lock_error(error, what_failed, directory) from error
            else:
                own = _make_own(directory / LEASES_NAME)
        if own is None:
            yield Lease(None, what)
            return
        lease = Lease(own[0], what)
        lease.say(None)
        assert shared is not None, "an own file is made under the shared lock"
        fcntl.flock(shared, fcntl.LOCK_UN)
        yield lease
    finally:
        # A forked child that lets go of its copy must not end its parent's lease.
        if own is not None and os.getpid() == process:
            # Unlinked first: whoever could lock it would take its holder for dead, as it is.
            with suppress(OSError):
                os.unlink(own[1])
        if own is not None:
            os.close(own[0])
        if shared is not None:
            os.close(shared)


def leased(directory: Path, what: str, items: Iterator[_Item]) -> Generator[_Item, None, None]:
    """Hold a lease that keeps everything while something is iterated over."""
    with hold_lease(directory, what):
        yield from items


def _make_own(directory: Path) -> tuple[int, Path] | None:
    """A new lease file, locked; None where this user may not make one."""
    while True:
        path = directory / f"{os.getpid()}-{secrets.token_hex(4)}{_SUFFIX}"
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)
        except FileExistsError:
            continue
        except OSError:
            return None
        try:
            # Whatever the umask: the library's owner must be able to see when its holder has died.
            os.fchmod(descriptor, 0o644)
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            if os.fstat(descriptor).st_nlink:
                return descriptor, path
        except OSError:
            with suppress(OSError):
                os.unlink(path)
            os.close(descriptor)
            return None
        # Somebody took it for a dead holder's between the two calls.
        os.close(descriptor)


def live_leases(directory: Path, *, remove_dead: bool = False) -> list[LeaseState]:
    """What the living holders of leases need.

    Args:
        directory: The library's directory.
        remove_dead: Whether to remove the files of holders that are gone.
    """
    found = []
    place = directory / LEASES_NAME
    try:
        names = sorted(os.listdir(place))
    except FileNotFoundError:
        return []
    except OSError:
        return [LeaseState(0, "somebody whose lease cannot be read")]
    for name in names:
        if name.endswith(_SUFFIX):
            state = _read_own(place / name, remove_dead=remove_dead)
            if state is not None:
                found.append(state)
    return found


def _read_own(path: Path, *, remove_dead: bool) -> LeaseState | None:
    """What a lease file says; None if its holder is gone."""
    unknown = LeaseState(_process_of(path), "a reader whose lease cannot be read")
    try:
        descriptor = os.open(path, _READ)
    except FileNotFoundError:
        return None
    except OSError:
        return unknown
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return _read_statement(descriptor) or unknown
        if remove_dead:
            path.unlink(missing_ok=True)
        return None
    except OSError:
        return unknown
    finally:
        os.close(descriptor)


def _read_statement(descriptor: int) -> LeaseState | None:
    for _ in range(_TORN_TRIES):
        state = LeaseState.parse(os.pread(descriptor, _STATEMENT_BYTES_MAX, 0))
        if state is not None:
            return state
        time.sleep(_POLL_S)  # it is being written
    return None


def _process_of(path: Path) -> int:
    number = path.name.partition("-")[0]
    return int(number) if number.isdecimal() else 0


@contextmanager
def no_new_leases(directory: Path) -> Iterator[bool]:
    """Let nobody take a lease while the context lasts.

    Yields:
        Whether that worked. If not, somebody who may only read holds one that keeps everything, or
        this user may not lock.
    """
    descriptor = _open_shared(directory)
    if descriptor is None:
        yield False
        return
    try:
        yield _lock_alone(descriptor)
    finally:
        os.close(descriptor)


def _lock_alone(descriptor: int) -> bool:
    deadline_s = time.monotonic() + _BUSY_S
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() >= deadline_s:
                return False
            time.sleep(_POLL_S)
        except OSError:
            return False
        else:
            return True


@contextmanager
def no_leases(directory: Path) -> Iterator[bool]:
    """Whether nobody holds a lease; if so, nobody gets one while the context lasts.

    Args:
        directory: The library's directory.
    """
    with no_new_leases(directory) as alone:
        yield alone and not live_leases(directory)


def _open_shared(directory: Path) -> int | None:
    """The file that all lock, made where this user may; None where it is not to be had."""
    path = directory / LEASES_NAME / _SHARED_NAME
    try:
        path.parent.mkdir(exist_ok=True)
        return os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o666)
    except OSError:
        pass
    try:
        return os.open(path, _READ)
    except OSError:
        return None
