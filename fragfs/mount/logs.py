"""Where the daemon's log goes: a file, the system's journal, or the terminal."""

from __future__ import annotations

import contextlib
import logging
import logging.handlers
import os
import sys
from collections.abc import Iterator

from fragfs.errors import StorageError
from fragfs.mount.options import MountOptions

__all__ = ["logging_to"]

_SYSLOG_SOCKET = "/dev/log"
_LOGGERS = ("fragfs", "pyfuse3")


@contextlib.contextmanager
def logging_to(options: MountOptions, *, foreground: bool) -> Iterator[None]:
    """Log to `options.log_file`, else stderr in the foreground, else syslog, else stderr.

    Raises:
        StorageError: The log file cannot be opened.
    """
    handler = _make_handler(options, foreground=foreground)
    handler.addFilter(_is_worth_logging)
    loggers = [logging.getLogger(name) for name in _LOGGERS]
    for logger in loggers:
        logger.addHandler(handler)
        logger.setLevel(logging.INFO)
    if options.verbose:
        logging.getLogger("fragfs").setLevel(logging.DEBUG)
    try:
        yield
    finally:
        for logger in loggers:
            logger.removeHandler(handler)
        handler.close()


def _make_handler(options: MountOptions, *, foreground: bool) -> logging.Handler:
    handler: logging.Handler | None
    if options.log_file is not None:
        try:
            # Watched, so that log rotation works without telling the daemon.
            handler = logging.handlers.WatchedFileHandler(options.log_file)
        except OSError as error:
            raise StorageError(
                f"cannot write the log file {options.log_file}: {error.strerror}",
                path=os.fspath(options.log_file),
                errno=error.errno,
                remedy="name another with --log-file",
            ) from error
        form = "%(asctime)s %(levelname)s %(process)d: %(message)s"
    elif not foreground and (handler := _connect_syslog()) is not None:
        form = "fragfs[%(process)d]: %(message)s"
    else:
        handler = logging.StreamHandler(sys.stderr)
        form = "fragfs: %(levelname)s: %(message)s"
    handler.setFormatter(logging.Formatter(form))
    return handler


def _connect_syslog() -> logging.Handler | None:
    try:
        return logging.handlers.SysLogHandler(_SYSLOG_SOCKET)
    except OSError:  # no such socket, or nobody listens: most containers
        return None


def _is_worth_logging(record: logging.LogRecord) -> bool:
    # pyfuse3 calls it an error when the process that asked was killed before the answer came.
    return not (
        record.name == "pyfuse3"
        and "fuse_reply_" in record.getMessage()
        and "No such file" in record.getMessage()
    )
