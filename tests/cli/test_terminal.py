import io
import json
import sys

import pytest

from fragfs.cli.terminal import emit_json, escape, is_terminal, json_name, say, show_name

NASTY = b"caf\xc3\xa9\xff\x1b[2J\n"


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_control_characters_and_foreign_bytes_are_escaped():
    assert escape("plain café") == "plain café"
    assert escape("\x1b]0;title\x07") == "\\x1b]0;title\\x07"
    assert escape("line\nbreak\udcff\u202e") == "line\\nbreak\\xff\\u202e"


def test_names_are_escaped_on_a_terminal_only(monkeypatch):
    monkeypatch.setattr(sys, "stdout", Terminal())
    assert show_name(NASTY) == "café\\xff\\x1b[2J\\n"
    monkeypatch.setattr(sys, "stdout", io.StringIO())
    assert show_name(NASTY).encode("utf-8", "surrogateescape") == NASTY


def test_names_reach_a_pipe_byte_for_byte(capfdbinary):
    say(show_name(NASTY))
    assert capfdbinary.readouterr().out == NASTY + b"\n"


def test_names_survive_json(capfdbinary):
    emit_json({"name": json_name(NASTY)})
    out = capfdbinary.readouterr().out
    assert out.isascii()
    assert json.loads(out)["name"].encode("utf-8", "surrogateescape") == NASTY


@pytest.mark.parametrize(
    ("stream", "expected"), [(Terminal(), True), (io.StringIO(), False), (None, False)]
)
def test_what_is_a_terminal(stream, expected):
    assert is_terminal(stream) is expected
