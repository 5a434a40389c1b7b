"""Exit codes, error texts, help, and what starting costs."""

import os
import re
import signal
import subprocess
import sys
import time

import click
import pytest

from fragfs.cli.main import COMMANDS
from fragfs.cli.main import run as run_command
from fragfs.cli.options import example, shared_options
from fragfs.errors import IntegrityError, UsageError

HEAVY = {"numpy", "trio", "pyfuse3", "rich", "blake3"}


def make_command(action):
    @click.command()
    @shared_options()
    def command():
        action()

    return command


def ends_with(capfd, action, *arguments):
    status = run_command(make_command(action), "fragfs", arguments)
    return status, capfd.readouterr().err


def raise_(error):
    raise error


@pytest.mark.parametrize(
    ("error", "status", "message"),
    [
        (IntegrityError("pack 1 is damaged", remedy="add it again"), 1, "; add it again"),
        (UsageError("that makes no sense"), 2, "that makes no sense"),
        (click.UsageError("No such option."), 2, "No such option; see 'fragfs --help'"),
        (FileNotFoundError(2, "No such file or directory", "/x"), 1, "/x: No such file"),
        (FileNotFoundError(2, "No such file or directory", b"/\xff"), 1, "/\\xff: No such file"),
        (ZeroDivisionError("oh"), 1, "internal error: ZeroDivisionError: oh; please report"),
        (KeyboardInterrupt(), 130, "interrupted"),
    ],
)
def test_an_error_is_one_line_and_a_status(capfd, error, status, message):
    ended, shown = ends_with(capfd, lambda: raise_(error))
    assert ended == status
    line = shown.strip()  # click puts an empty line after the terminal's ^C
    assert line.startswith("fragfs: ")
    assert message in line
    assert "\n" not in line


def test_debug_shows_the_traceback(capfd):
    status, shown = ends_with(capfd, lambda: raise_(UsageError("no")), "--debug")
    assert status == 2
    assert "Traceback" in shown
    assert shown.endswith("fragfs: no\n")


def test_messages_cannot_drive_the_terminal(capfd):
    _, shown = ends_with(capfd, lambda: raise_(UsageError("bad name \x1b[2J")))
    assert shown == "fragfs: bad name \\x1b[2J\n"


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help_with_an_example(run, command):
    result = run(command, "--help")
    assert result.status == 0
    assert f"Usage: fragfs {command}" in result.text
    assert "Example:\n    fragfs" in result.text
    for option in ("--library", "--quiet", "--debug"):
        assert option in result.text


def test_the_group_lists_every_command_in_full(run):
    text = run("--help").text
    for command in COMMANDS:
        assert re.search(rf"^  {command} +[A-Z].*\.$", text, re.MULTILINE), command
    assert not re.search(r"\w\.\.\.$", text, re.MULTILINE), "a summary is too long"


def test_examples_keep_their_lines():
    assert example("one", "two") == "\b\nExample:\n  one\n  two"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["frobnicate"], "No such command 'frobnicate'"),
        (["ls", "--frobnicate"], "No such option"),
        (["add"], "Missing argument 'PATHS...'"),
        (["mv", "one"], "Missing argument 'NEW'"),
        (["mount", "/tmp", "--cache", "many"], "'many' is not a size"),
    ],
)
def test_usage_errors_end_with_2(run, arguments, message):
    result = run(*arguments)
    assert result.status == 2
    assert message in result.stderr
    assert result.stderr.count("\n") == 1


def test_version(run):
    assert re.fullmatch(r"fragfs \d+\.\d+\.\d+\n", run("--version").text)


def test_the_library_may_be_named_before_or_after_the_command(run, tmp_path, monkeypatch):
    assert run("init", tmp_path / "one").status == 0
    assert run("--library", tmp_path / "one", "ls").status == 0
    assert run("ls", "--library", tmp_path / "one").status == 0
    assert run("--library", tmp_path / "none", "ls", "--library", tmp_path / "one").status == 0
    monkeypatch.setenv("FRAGFS_LIBRARY", str(tmp_path / "one"))
    assert run("ls").status == 0
    assert run("ls", "--library", tmp_path / "none").status == 1
    assert run("--library", tmp_path / "none", "ls").status == 1


@pytest.mark.parametrize(
    "command", [["ls"], ["stats"], ["warm", "x"], ["rm", "x"], ["mv", "x", "y"], ["verify"]]
)
def test_a_missing_library_is_named_with_the_remedy(run, tmp_path, command):
    result = run("--library", tmp_path / "none", *command)
    assert result.status == 1
    assert f"no fragfs library in {tmp_path}/none; create one with: fragfs init" in result.stderr
    assert not (tmp_path / "none").exists()


def test_without_a_name_the_library_is_in_the_data_directory(run, home):
    where = home / ".local/share/fragfs/library"
    assert f"no fragfs library in {where};" in run("ls").stderr
    assert run("init").status == 0
    assert (where / "catalog.sqlite").exists()
    assert run("ls").status == 0


@pytest.mark.slow
def test_light_commands_load_nothing_heavy(fragfs, make_model):
    assert fragfs("add", make_model("one")).status == 0
    program = (
        "import sys; from fragfs.cli.main import main\n"
        "status = main(sys.argv[2:]); found = set(sys.argv[1].split()) & set(sys.modules)\n"
        "sys.exit(f'{status} {found}' if status or found else 0)"
    )
    for unwanted, *command in (
        (HEAVY, "ls"),
        (HEAVY, "ls", "-l"),
        (HEAVY, "ls", "-l", "one"),
        (HEAVY, "ls", "--json", "one"),
        (HEAVY, "mv", "one", "two"),
        (HEAVY, "init", f"{fragfs.library}-2"),
        (HEAVY, "--help"),
        (HEAVY - {"numpy"}, "stats"),  # counting columns of fragments
        (HEAVY, "warm", "--help"),
        (HEAVY - {"numpy"}, "rm", "two"),
    ):
        arguments = [" ".join(unwanted), "--library", str(fragfs.library), *command]
        done = subprocess.run(
            [sys.executable, "-c", program, *arguments], capture_output=True, text=True
        )
        assert (command, done.returncode, done.stderr) == (command, 0, "")


def test_a_reader_that_leaves_is_no_error(fragfs):
    read_end, write_end = os.pipe()
    os.close(read_end)
    done = subprocess.run(
        [sys.executable, "-m", "fragfs", "ls", "--json", "--library", str(fragfs.library)],
        stdout=write_end,
        stderr=subprocess.PIPE,
    )
    os.close(write_end)
    assert (done.returncode, done.stderr) == (1, b"")


@pytest.mark.slow
def test_ctrl_c_ends_with_130(fragfs):
    slow = "import time; from fragfs.library.library import FragmentLibrary as L\n"
    slow += "L.models = lambda self: (print('ready', flush=True), time.sleep(60))\n"
    slow += "import sys; from fragfs.cli.main import main; sys.exit(main())"
    process = subprocess.Popen(
        [sys.executable, "-c", slow, "ls", "--library", str(fragfs.library)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert process.stdout.readline() == b"ready\n"
    start = time.monotonic()
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=20)
    assert process.returncode == 130
    assert stderr.strip() == b"fragfs: interrupted"
    assert time.monotonic() - start < 10
