import io
import sys

import pytest

from fragfs.cli.options import Session
from fragfs.cli.progress import show_progress
from fragfs.library.progress import NO_PROGRESS


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.mark.parametrize("session", [Session(), Session(quiet=True)])
def test_no_bar_without_a_terminal_or_when_quiet(monkeypatch, session):
    monkeypatch.setattr(sys, "stderr", Terminal() if session.quiet else io.StringIO())
    with show_progress(session) as progress:
        assert progress is NO_PROGRESS
    assert sys.stderr.getvalue() == ""


def test_a_bar_on_a_terminal(monkeypatch):
    monkeypatch.setattr(sys, "stderr", Terminal())
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "120")
    with show_progress(Session()) as progress:
        progress.start("adding", 4_000_000)
        progress.advance(1_000_000)
        progress.note("a/very/long/path/of/a/file/\x1b[2J/model-00001-of-00002.safetensors")
        progress.advance(1_000_000)
    drawn = sys.stderr.getvalue()
    assert "adding" in drawn
    assert "2.0/4.0 MB" in drawn
    assert "…" in drawn
    assert "model-00001-of-00002.safetensors" not in drawn
    assert "00001-of-00002.safetensors" in drawn
    assert "\x1b[2J" not in drawn
