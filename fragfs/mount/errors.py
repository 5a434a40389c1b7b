"""How errors become errno: one table, one decorator, and a log that says each fault once.

pyfuse3 answers nothing but `FUSEError`; any other exception that leaves a handler ends the mount.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import logging
import time
from collections import deque
from collections.abc import Callable, Coroutine, Iterator
from typing import Any, Concatenate, ParamSpec, Protocol, TypeVar

from pyfuse3 import FUSEError

from fragfs.errors import (
    FormatError,
    FragmentError,
    IntegrityError,
    LimitError,
    NotFoundError,
    StorageError,
    UsageError,
)

__all__ = ["FaultLog", "answering", "answering_at_once", "errno_of"]

log = logging.getLogger(__name__)

_ERRNO_BY_ERROR: dict[type, int] = {
    NotFoundError: errno.ENOENT,
    UsageError: errno.EINVAL,
    FormatError: errno.EIO,
    IntegrityError: errno.EIO,
    LimitError: errno.EIO,
    StorageError: errno.EIO,
}

_FAULTS_MAX = 4096
_RECENT_MAX = 5
_RECENT_LENGTH_MAX = 500

Handlers = TypeVar("Handlers", bound="_Reporting")
Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")


def errno_of(error: Exception) -> int:
    """The errno a request that met this error is answered with; EIO for what nobody foresaw."""
    for kind in type(error).__mro__:
        if kind in _ERRNO_BY_ERROR:
            return _ERRNO_BY_ERROR[kind]
    return errno.EIO


class FaultLog:
    """Logs every fault that a reader is told of as an I/O error: once per fragment and cause.

    A loader that meets a damaged fragment asks again and again; the log says it once. Belongs to
    the event loop's thread.
    """

    def __init__(self) -> None:
        self._seen: set[tuple[str | None, str]] = set()
        self._recent: deque[dict[str, object]] = deque(maxlen=_RECENT_MAX)

    def report(
        self, error: Exception, what: str, models: Callable[[], list[bytes]] | None = None
    ) -> None:
        """Log an error with what it means for the user, unless that was done before.

        Args:
            error: A `FragmentError` names fragment, pack, offset and remedy; anything else is a
                bug and is logged with its traceback.
            what: The file that was read, or the request that failed.
            models: Finds the names of the models concerned; called only if the error is logged.
        """
        if not self._is_new(error):
            return
        text = str(error) if isinstance(error, FragmentError) else repr(error)
        self._recent.append(
            {
                "at_s": int(time.time()),
                "what": what[:_RECENT_LENGTH_MAX],
                "error": text[:_RECENT_LENGTH_MAX],
            }
        )
        if not isinstance(error, FragmentError):
            log.error("%s failed unexpectedly; the caller got EIO", what, exc_info=error)
        elif models is None:
            log.error("%s failed: %s", what, error)
        else:
            log.error("I/O error reading %s (models: %s): %s", what, _names(models), error)

    def recent(self) -> list[dict[str, object]]:
        """The last few faults, the newest at the end: when first met, reading what, and what."""
        return list(self._recent)

    def _is_new(self, error: Exception) -> bool:
        key = (getattr(error, "fragment", None), f"{type(error).__name__}: {error}")
        if key in self._seen:
            return False
        if len(self._seen) >= _FAULTS_MAX:
            self._seen.clear()
        self._seen.add(key)
        return True


class _Reporting(Protocol):
    faults: FaultLog


def answering(
    handler: Callable[Concatenate[Handlers, Arguments], Coroutine[Any, Any, Result]],
) -> Callable[Concatenate[Handlers, Arguments], Coroutine[Any, Any, Result]]:
    """Let nothing but `FUSEError` and cancellation leave a request handler."""

    @functools.wraps(handler)
    async def answered(
        self: Handlers, /, *args: Arguments.args, **kwargs: Arguments.kwargs
    ) -> Result:
        with _refusing(self, handler.__name__):
            return await handler(self, *args, **kwargs)

    return answered


def answering_at_once(
    handler: Callable[Concatenate[Handlers, Arguments], Result],
) -> Callable[Concatenate[Handlers, Arguments], Result]:
    """Let nothing but `FUSEError` leave a request handler that waits for nothing."""

    @functools.wraps(handler)
    def answered(self: Handlers, /, *args: Arguments.args, **kwargs: Arguments.kwargs) -> Result:
        with _refusing(self, handler.__name__):
            return handler(self, *args, **kwargs)

    return answered


@contextlib.contextmanager
def _refusing(handlers: _Reporting, what: str) -> Iterator[None]:
    try:
        yield
    except FUSEError:
        raise
    except Exception as error:
        number = errno_of(error)
        if number == errno.EIO:
            handlers.faults.report(error, what)
        raise FUSEError(number) from error


def _names(models: Callable[[], list[bytes]]) -> str:
    try:
        names = ", ".join(name.decode(errors="backslashreplace") for name in models())
    except FragmentError as failure:
        return f"unknown, {failure.message}"
    return names or "none any more"
