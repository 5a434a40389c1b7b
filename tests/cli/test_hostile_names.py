"""Names and sources as nobody should make them: through the commands, never out of their place."""

from __future__ import annotations

import os
import socket
import sqlite3
import subprocess
import sys
import threading

import pytest

from fragfs.errors import StorageError
from fragfs.library.library import FragmentLibrary
from fragfs.library.source import read_source, scan_source

pytestmark = pytest.mark.slow

NAMES = (
    b"new\nline",
    b"carriage\rreturn",
    b"\xff\xfe is no UTF-8",
    b"cut \xe2\x82",
    b"\xed\xa0\x80 a surrogate",
    b"n" * 255,
    b"-rf",
    b"--help",
    b"\x1b[31mred\x1b[0m",
    b"\x01\x7f\x85",
    b" spaces ",
    b"tab\t",
    b"'quotes\" `and` $(more) ; | & < > * ? [x] {a,b} \\",
    b"...",
    b"..data",
    b"%2e%2e%2f",
    b"a:b",
    b"\xe2\x80\xaertl",
    b"#",
    b"~",
)


@pytest.fixture
def odd(tmp_path):
    """A directory with files of odd names, one below another with an odd name."""
    source = os.fsencode(tmp_path / "odd")
    for name in NAMES:
        os.makedirs(os.path.join(source, b"d" + name[:200]), exist_ok=True)
        for path in (name, os.path.join(b"d" + name[:200], name)):
            with open(os.path.join(source, path), "wb") as file:
                file.write(b"content of " + path)
    return tmp_path / "odd"


def files_below(root):
    found = {}
    for parent, _, names in os.walk(os.fsencode(root)):
        for name in names:
            path = os.path.join(parent, name)
            with open(path, "rb") as file:
                found[os.path.relpath(path, os.fsencode(root))] = file.read()
    return found


def test_odd_names_go_in_and_come_out(fragfs, odd, tmp_path):
    expected = files_below(odd)
    assert fragfs("add", odd, "--name", "m").status == 0
    listed = {os.fsencode(file["path"]) for file in fragfs("ls", "m", "--json").json["files"]}
    assert listed == expected.keys()
    assert fragfs("ls", "-l", "m").status == 0
    assert fragfs("verify").status == 0
    assert fragfs("check").status == 0
    assert fragfs("export", "m", tmp_path / "out").status == 0
    assert files_below(tmp_path / "out") == expected
    for path in list(expected)[::7]:
        assert fragfs("explain", os.fsdecode(b"m/" + path)).status == 0
        assert fragfs("rm", os.fsdecode(b"m/" + path)).status == 0
        del expected[path]
    assert fragfs("export", "m", tmp_path / "again").status == 0
    assert files_below(tmp_path / "again") == expected


@pytest.mark.parametrize("name", NAMES)
def test_models_of_odd_names(fragfs, odd, name):
    model = os.fsdecode(b"org/" + name)
    assert fragfs("add", odd, os.fsdecode(b"--name=org/" + name)).status == 0
    assert [os.fsencode(m["name"]) for m in fragfs("ls", "--json").json["models"]] == [
        b"org/" + name
    ]
    assert fragfs("verify", model).status == 0
    assert fragfs("mv", model, "moved").status == 0
    assert fragfs("mv", "moved", model).status == 0
    assert fragfs("rm", model).status == 0


def test_a_terminal_is_shown_escaped_names(fragfs, odd):
    """What a listing writes to a terminal must not move its cursor."""
    assert fragfs("add", odd, "--name", "m").status == 0
    program = (
        "import pty, sys; sys.exit(pty.spawn([sys.executable, '-m', 'fragfs', '--library',"
        " sys.argv[1], 'ls', 'm']) >> 8)"
    )
    shown = subprocess.run(
        [sys.executable, "-c", program, fragfs.library],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        timeout=60,
        check=True,
    ).stdout
    lines = shown.replace(b"\r\n", b"\n").decode().split("\n")
    assert len([line for line in lines if line]) == 2 * len(NAMES)
    assert all(line.isprintable() for line in lines)
    assert "new\\nline" in lines


@pytest.mark.parametrize("name", ["..", ".", "../up", "a/../b", "/absolute", "a//b", ""])
def test_names_that_lead_elsewhere_are_refused(fragfs, odd, name):
    assert fragfs("add", odd, "--name", name).status in (1, 2)
    assert fragfs("add", odd, "--name", "m").status == 0
    assert fragfs("mv", "m", name).status in (1, 2)
    fragfs("add", odd / "#", "--into", f"m/{name}" if name else "/")
    with FragmentLibrary.open(fragfs.library) as library:
        assert [model.name for model in library.models()] == [b"m"]
        paths = [file.path for file in library.files("m")]
    assert not [path for path in paths if {b"..", b".", b""} & set(path.split(b"/"))]


def test_a_component_of_256_bytes_is_refused(fragfs, odd):
    done = fragfs("add", odd, "--name", "n" * 256)
    assert done.status == 1
    assert "255" in done.stderr


# --- sources


def test_what_is_no_file_is_left_out_and_named(fragfs, tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    (source / "file").write_bytes(b"a file")
    os.mkfifo(source / "pipe")
    (source / "loop").symlink_to("loop2")
    (source / "inside").symlink_to("file")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(source / "socket"))
        done = fragfs("add", source, "--name", "m")
        assert done.status == 2, "a link to nothing is refused"
        assert "loop" in done.stderr
        (source / "loop").unlink()
        if os.geteuid() == 0:
            os.mknod(source / "device", 0o600 | 0o020000, os.makedev(1, 5))
        done = fragfs("add", source, "--name", "m")
    assert done.status == 0, done.stderr
    said = done.text + done.stderr
    assert "pipe" in said
    assert "socket" in said
    with FragmentLibrary.open(fragfs.library) as library:
        assert [file.path for file in library.files("m")] == [b"file", b"inside"]


@pytest.mark.parametrize("target", ["/etc/hostname", "../secret", ".."])
def test_links_out_of_the_source_are_refused(fragfs, tmp_path, target):
    (tmp_path / "secret").write_bytes(b"secret")
    source = tmp_path / "source"
    source.mkdir()
    (source / "link").symlink_to(target)
    done = fragfs("add", source, "--name", "m")
    assert done.status != 0
    assert "link" in done.stderr
    assert fragfs("ls", "--json").json["models"] == []


def test_directories_that_contain_themselves_end(fragfs, tmp_path):
    source = tmp_path / "source"
    (source / "deep").mkdir(parents=True)
    (source / "file").write_bytes(b"x")
    (source / "deep" / "up").symlink_to("..")
    assert fragfs("add", source, "--name", "m").status != 0
    assert fragfs("add", source, "--name", "m", "--follow-links").status == 0
    assert len(fragfs("ls", "m", "--json").json["files"]) == 1


def test_a_pipe_given_as_the_source_is_refused(fragfs, tmp_path):
    os.mkfifo(tmp_path / "pipe")
    done = fragfs("add", tmp_path / "pipe", "--name", "m")
    assert done.status != 0
    assert "regular file" in done.stderr


def test_a_pipe_that_takes_the_place_of_a_file_holds_nobody_up(tmp_path):
    (tmp_path / "s").mkdir()
    (tmp_path / "s" / "file").write_bytes(b"x")
    (found,) = scan_source(tmp_path / "s", follow_links=False).files
    (tmp_path / "s" / "file").unlink()
    os.mkfifo(tmp_path / "s" / "file")
    errors = []

    def read():
        try:
            read_source(found)
        except StorageError as error:
            errors.append(error)

    thread = threading.Thread(target=read, daemon=True)
    thread.start()
    thread.join(30)
    assert "no regular file" in str(errors[0])


# --- somebody else's library


def edit(library, statement, *values):
    connection = sqlite3.connect(library / "catalog.sqlite")
    connection.execute(statement, values)
    connection.commit()
    connection.close()


@pytest.mark.parametrize("column", ["name", "directory"])
@pytest.mark.parametrize("value", [b"../../escape", b"/tmp/escape", b"..", b"a/../../../escape"])
def test_an_export_stays_in_its_place_whatever_the_catalog_says(
    fragfs, make_model, tmp_path, column, value
):
    assert fragfs("add", make_model("m"), "--name", "m").status == 0
    edit(
        fragfs.library,
        f"UPDATE files SET {column} = ? WHERE name = x'{b'config.json'.hex()}'",
        value,
    )
    place = tmp_path / "a" / "b" / "out"
    place.parent.mkdir(parents=True)
    before = {path for path in tmp_path.rglob("*") if "library" not in path.parts}
    done = fragfs("export", "m", place)
    assert done.status == 1
    written = {path for path in tmp_path.rglob("*") if "library" not in path.parts} - before
    assert all(path == place or place in path.parents for path in written)
    assert not os.path.exists("/tmp/escape")
    assert (place / "model.safetensors").exists()
    assert fragfs("check").status == 1


@pytest.mark.parametrize("what", ["lock", "leases/shared", "staging"])
def test_no_writer_follows_a_link_out_of_a_library(fragfs, make_model, tmp_path, what):
    precious = tmp_path / "precious"
    precious.mkdir()
    (precious / "file").write_bytes(b"precious")
    path = fragfs.library / what
    path.rmdir() if path.is_dir() else path.unlink(missing_ok=True)
    path.symlink_to(precious if what == "staging" else precious / "file")
    fragfs("add", make_model("m"), "--name", "m")
    fragfs("gc")
    assert [file.name for file in precious.iterdir()] == ["file"]
    assert (precious / "file").read_bytes() == b"precious"


@pytest.mark.parametrize(
    "statement",
    [
        "CREATE VIEW v AS WITH RECURSIVE n(x) AS (SELECT 1 UNION ALL SELECT x FROM n) SELECT 1",
        "CREATE TRIGGER t AFTER INSERT ON packs BEGIN DELETE FROM models; END",
    ],
)
def test_a_catalog_that_would_run_something_is_refused(fragfs, statement):
    edit(fragfs.library, statement)
    done = fragfs("ls")
    assert done.status == 1
    assert "views, triggers" in done.stderr
