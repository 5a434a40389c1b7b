"""The life of one mount: mount, serve until unmounted or told to stop, clean up.

Signals: SIGTERM, SIGINT and SIGHUP detach the mount, so that nothing new is opened, and let open
files be read on for a grace time; then those who still read are named in the log and cut off. A
second signal cuts them off at once.

The process never looks at its own mount: the answer could only come from itself.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import resource
import signal
import threading
from collections.abc import Callable, Sequence
from pathlib import Path

import pyfuse3
import trio

from fragfs.errors import FormatError, FragmentError, StorageError
from fragfs.library.lease import Lease
from fragfs.library.library import FragmentLibrary
from fragfs.library.tree import Directory
from fragfs.mount.device import DeviceNotifier, find_device
from fragfs.mount.front import Front, find_front_module
from fragfs.mount.inodes import InodeTable, KnownDirectory
from fragfs.mount.logs import logging_to
from fragfs.mount.operations import MountOperations, Ownership
from fragfs.mount.options import MountOptions
from fragfs.mount.pins import MountLease
from fragfs.mount.reading import MountReading
from fragfs.mount.table import SOURCE_NAME, MountEntry, find_mount, is_mounted
from fragfs.mount.unmount import detach
from fragfs.mount.users import describe_users, find_users
from fragfs.mount.view import TreeView
from fragfs.mount.watch import CatalogWatcher, StaleName

__all__ = ["run"]

log = logging.getLogger(__name__)

_DESCRIPTORS_MAX = 65536

_REQUESTS_MIN, _REQUESTS_MAX = 8, 512
"""Tasks that take requests. Each mapped page fault occupies one while its fragment is decoded, so
there are more of them than threads a loader uses: a cached page must not wait for a decode."""

_SETTLED_S = 0.5
_STOP_WATCHING_S = 2.0
_LAST_RESORT_S = 5.0

_GONE = (errno.ECONNABORTED, errno.ENODEV, errno.ENOTCONN)


def run(
    options: MountOptions,
    on_ready: Callable[[], None],
    *,
    foreground: bool,
    open_library: Callable[[Path], FragmentLibrary] = FragmentLibrary.open,
) -> int:
    """Mount and serve in this process; blocks until the mount has ended.

    Args:
        options: What to mount; `mountpoint` as the mount table will spell it.
        on_ready: Called once the mount is in the mount table and about to be served.
        foreground: Nobody waits for the mount to answer: read-ahead is raised here. Log to stderr
            rather than to syslog where no log file is named.
        open_library: Opens the library; takes its path.

    Returns:
        0, or 1 if readers were cut off.

    Raises:
        FragmentError: The library cannot be opened, a model is missing, or mounting failed.
    """
    _raise_descriptor_limit()
    with (
        logging_to(options, foreground=foreground),
        open_library(options.library) as library,
        library.hold_lease(f"mount on {options.mountpoint}") as lease,
    ):
        for name in options.models:
            library.model(name)
        daemon = _Daemon(options, library, lease, is_alone=foreground)
        try:
            trio.run(daemon.serve, on_ready)
        except BaseExceptionGroup as group:
            error = _only_error(group)
            if not isinstance(error, FragmentError):
                log.critical("the mount on %s ended", options.mountpoint, exc_info=error)
            raise error from group
        finally:
            daemon.leave_cache()
            daemon.last_resort.cancel()
        return daemon.exit_code


class _Daemon:
    """The tasks of one mount. Everything but the watcher's thread runs in the event loop."""

    def __init__(
        self, options: MountOptions, library: FragmentLibrary, lease: Lease, *, is_alone: bool
    ) -> None:
        self._lease = lease
        self._is_alone = is_alone
        self._options = options
        self._library = library
        self._tree = TreeView(library, options.models)
        root = self._tree.lookup(b"")
        if not isinstance(root, Directory):
            raise FormatError(
                f"the library {options.library} has no root directory",
                path=os.fspath(options.library),
            )
        self._inodes = InodeTable(root)
        self._stop_watching = threading.Event()
        self._watching_ended = trio.Event()
        self._main_scope = trio.CancelScope()
        self._reading: MountReading | None = None
        self._device = -1
        self._serving = trio.CancelScope()
        self._serving_ended = trio.Event()
        self._is_closed = False
        self.exit_code = 0
        # If a decode or the kernel never returned, neither would the orderly end.
        self.last_resort = threading.Timer(_LAST_RESORT_S, os._exit, (1,))
        self.last_resort.daemon = True

    def leave_cache(self) -> None:
        """Give up the shared cache, after everything else has ended."""
        if self._reading is not None:
            self._reading.leave_cache()

    async def serve(self, on_ready: Callable[[], None]) -> None:
        async with trio.open_nursery() as decoders, trio.open_nursery() as helpers:
            signals = await helpers.start(self._receive_signals)
            reading = self._reading = MountReading(self._options, self._library, decoders)
            operations = self._make_operations(reading)
            entry = self._mount(operations)
            front = self._make_front(reading.held_bytes_max)
            try:
                if front is not None:
                    helpers.start_soon(self._serve_reads, front, operations)
                reading.start(entry, front)
                helpers.start_soon(self._obey_signals, signals, operations, entry)
                helpers.start_soon(self._watch, operations)
                if self._is_alone and self._options.read_ahead_kb is not None:
                    helpers.start_soon(_raise_read_ahead, entry, self._options.read_ahead_kb)
                log.info("mounted %s on %s", self._options.library, entry.mountpoint)
                on_ready()
                await self._serve_requests()
            finally:
                # Whatever ended it: first nobody new gets in, and the rest has to end in time.
                self._detach(entry)
                self._arm_last_resort()
                self._stop_watching.set()
                with trio.CancelScope(shield=True):
                    await self._watching_ended.wait()
                reading.close()
                if front is not None:
                    # Nothing may use the device or the session any more when they are given up.
                    self._serving.cancel()
                    with trio.CancelScope(shield=True):
                        await self._serving_ended.wait()
                    front.close()
                self._is_closed = True
                pyfuse3.close(unmount=False)
            log.info("unmounted %s", entry.mountpoint)
            helpers.cancel_scope.cancel()
            decoders.cancel_scope.cancel()

    def _make_operations(self, reading: MountReading) -> MountOperations:
        options = self._options
        ownership = Ownership(
            os.getuid() if options.uid is None else options.uid,
            os.getgid() if options.gid is None else options.gid,
            options.umask_or_default,
        )
        return MountOperations(self._library, self._tree, self._inodes, reading, ownership)

    def _mount(self, operations: MountOperations) -> MountEntry:
        options = set(pyfuse3.default_options)
        options |= {"ro", f"fsname={SOURCE_NAME}", f"subtype={SOURCE_NAME}"}
        if self._options.allow_other:
            options.add("allow_other")
        if self._options.allow_root:
            options.add("allow_root")
        mountpoint = self._options.mountpoint
        try:
            pyfuse3.init(operations, os.fspath(mountpoint), options)
        except RuntimeError as error:
            raise StorageError(
                f"cannot mount on {mountpoint}",
                path=os.fspath(mountpoint),
                remedy="see what fusermount3 said, and check that the directory is yours",
            ) from error
        entry = find_mount(mountpoint)
        if entry is None or not entry.is_fragfs:
            pyfuse3.close(unmount=True)
            raise StorageError(
                f"the new mount on {mountpoint} is not in the mount table",
                path=os.fspath(mountpoint),
                remedy="name the directory without symbolic links",
            )
        return entry

    async def _serve_requests(self) -> None:
        with self._main_scope:
            try:
                await pyfuse3.main(min_tasks=_REQUESTS_MIN, max_tasks=_REQUESTS_MAX)
            except BaseExceptionGroup as group:
                error = _only_error(group)
                if not isinstance(error, OSError) or error.errno not in _GONE:
                    raise
                log.warning("the connection to the kernel was aborted")

    def _make_front(self, bytes_max: int) -> Front | None:
        module = find_front_module()
        try:
            front = Front(module, bytes_max) if module is not None else None
            self._device = front.device if front is not None else find_device()
        except BaseException:
            pyfuse3.close(unmount=True)
            raise
        return front

    async def _serve_reads(self, front: Front, operations: MountOperations) -> None:
        try:
            with self._serving:
                number = await front.run(operations)
                if number not in (0, errno.ENODEV):
                    log.warning("the connection to the kernel ended: %s", os.strerror(number))
                pyfuse3.terminate()
        finally:
            self._serving_ended.set()

    # --- changes of the catalog

    async def _watch(self, operations: MountOperations) -> None:
        lease = MountLease(
            self._lease,
            self._library.generation,
            lambda: trio.from_thread.run_sync(operations.open_contents),
            self._library.has_content,
        )
        watcher = CatalogWatcher(
            self._tree,
            self._look_at_library,
            lambda: trio.from_thread.run_sync(self._on_change),
            lambda names: trio.from_thread.run_sync(self._drop_names, names),
            DeviceNotifier(self._device),
            lease,
        )
        try:
            # Never abandoned: a thread that outlived the session would notify freed memory.
            await trio.to_thread.run_sync(
                watcher.run,
                self._stop_watching,
                limiter=trio.CapacityLimiter(1),
                abandon_on_cancel=False,
            )
        finally:
            self._watching_ended.set()

    def _look_at_library(self) -> int:
        # Not only after a change: packs are removed some time after the commit that retires them.
        self._library.close_removed_packs()
        return self._library.data_version()

    def _on_change(self) -> list[KnownDirectory]:
        """Have what is remembered of the catalog asked again; returns the names the kernel has."""
        assert self._reading is not None
        self._reading.on_change()
        return self._inodes.known_directories()

    def _drop_names(self, names: Sequence[StaleName]) -> None:
        for name in names:
            self._inodes.drop_name(name.parent, name.name, name.number)

    # --- the end

    async def _receive_signals(
        self, task_status: trio.TaskStatus[trio.MemoryReceiveChannel[int]]
    ) -> None:
        send, receive = trio.open_memory_channel[int](8)
        with trio.open_signal_receiver(signal.SIGTERM, signal.SIGINT, signal.SIGHUP) as received:
            task_status.started(receive)
            async for number in received:
                with contextlib.suppress(trio.WouldBlock):
                    send.send_nowait(number)

    async def _obey_signals(
        self,
        signals: trio.MemoryReceiveChannel[int],
        operations: MountOperations,
        entry: MountEntry,
    ) -> None:
        number = await signals.receive()
        grace_s = self._options.grace_s
        log.info(
            "%s: detaching %s; open files stay readable for %g s",
            signal.Signals(number).name,
            entry.mountpoint,
            grace_s,
        )
        await trio.to_thread.run_sync(self._detach, entry, limiter=trio.CapacityLimiter(1))
        # Without open files the detached mount has ended by now and so does `pyfuse3.main`.
        with trio.move_on_after(grace_s):
            await signals.receive()
        await self._cut_off(operations, entry)

    async def _cut_off(self, operations: MountOperations, entry: MountEntry) -> None:
        """Stop serving although files are open; their readers get errors from now on."""
        users = await trio.to_thread.run_sync(
            find_users, entry, limiter=trio.CapacityLimiter(1), abandon_on_cancel=True
        )
        paths = [path.decode(errors="backslashreplace") for path in operations.open_paths()]
        who = describe_users(users) or "readers"
        if paths:
            self.exit_code = 1
            log.warning("cutting off %s; open: %s", who, ", ".join(paths))
        else:
            log.info("leaving %s, who need no answer to what they have open", who)
        self._arm_last_resort()
        # The watcher is stopped while requests are still served: its notifications wait for them.
        self._stop_watching.set()
        with trio.move_on_after(_STOP_WATCHING_S):
            await self._watching_ended.wait()
        if not self._is_closed:
            pyfuse3.terminate()
        self._main_scope.cancel()

    def _arm_last_resort(self) -> None:
        if not self.last_resort.is_alive():
            self.last_resort.start()

    def _detach(self, entry: MountEntry) -> None:
        if not is_mounted(entry):
            return
        try:
            detach(entry)
        except FragmentError as error:
            log.error("%s", error)


async def _raise_read_ahead(entry: MountEntry, read_ahead_kb: int) -> None:
    """Who mounts in the background does it when the mount answers; here, some time after that."""
    await trio.sleep(_SETTLED_S)
    entry.raise_read_ahead(read_ahead_kb)


def _raise_descriptor_limit() -> None:
    """Packs are many; the soft limit of a login session is 1024."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = _DESCRIPTORS_MAX if hard == resource.RLIM_INFINITY else min(hard, _DESCRIPTORS_MAX)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def _only_error(error: BaseException) -> BaseException:
    """The error inside nested groups of one; a group of several as it is."""
    while isinstance(error, BaseExceptionGroup) and len(error.exceptions) == 1:
        error = error.exceptions[0]
    return error
