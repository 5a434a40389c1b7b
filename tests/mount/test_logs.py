import logging
from pathlib import Path

import pytest

import fragfs.mount.logs
from fragfs.errors import StorageError
from fragfs.mount.logs import logging_to
from fragfs.mount.options import MountOptions

log = logging.getLogger("fragfs.mount.test")


def options(**values):
    return MountOptions(Path("/l"), Path("/m"), **values)


@pytest.fixture(autouse=True)
def _levels_restored():
    loggers = [logging.getLogger(name) for name in ("fragfs", "pyfuse3")]
    levels = [logger.level for logger in loggers]
    yield
    for logger, level in zip(loggers, levels, strict=True):
        logger.setLevel(level)
        assert logger.handlers == []


def test_a_log_file_is_used_and_survives_rotation(tmp_path):
    path = tmp_path / "log"
    with logging_to(options(log_file=path), foreground=False):
        log.error("one")
        path.rename(tmp_path / "log.1")
        log.error("two")
        log.debug("not asked for")
    assert "ERROR" in (tmp_path / "log.1").read_text()
    assert "one" in (tmp_path / "log.1").read_text()
    assert "two" in path.read_text()
    assert "not asked for" not in path.read_text()


def test_verbose_logs_more(tmp_path):
    with logging_to(options(log_file=tmp_path / "log", verbose=True), foreground=False):
        log.debug("details")
    assert "details" in (tmp_path / "log").read_text()


def test_the_foreground_logs_to_the_terminal(capsys):
    with logging_to(options(), foreground=True):
        log.warning("look")
    assert capsys.readouterr().err == "fragfs: WARNING: look\n"


def test_without_syslog_the_daemon_falls_back(capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(fragfs.mount.logs, "_SYSLOG_SOCKET", str(tmp_path / "nobody"))
    with logging_to(options(), foreground=False):
        log.warning("look")
    assert "look" in capsys.readouterr().err


def test_a_log_file_that_cannot_be_written_is_refused(tmp_path):
    with (
        pytest.raises(StorageError, match="log file"),
        logging_to(options(log_file=tmp_path / "no" / "log"), foreground=False),
    ):
        pass


def test_a_reader_that_was_killed_is_no_error(tmp_path):
    with logging_to(options(log_file=tmp_path / "log"), foreground=False):
        pyfuse3 = logging.getLogger("pyfuse3")
        pyfuse3.error("fuse_read(): fuse_reply_* failed with %s", "No such file or directory")
        pyfuse3.error("fuse_read(): fuse_reply_* failed with %s", "Invalid argument")
    text = (tmp_path / "log").read_text()
    assert "Invalid argument" in text
    assert "No such file" not in text
