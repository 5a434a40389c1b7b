"""`fragfs verify --sha256sum` says what the real sha256sum finds in a real mount."""

import os
import shutil
import subprocess
import sys

import pytest

from tests.mount.support import TIMEOUT_S, make_library

pytestmark = [
    pytest.mark.mount,
    pytest.mark.skipif(shutil.which("sha256sum") is None, reason="sha256sum is not installed"),
]

NAMES = [
    b"plain.txt",
    b"back\\slash",
    b"new\nline",
    b"both\\\n.bin",
    b"return\r",
    b" blanks  ",
    b"*star",
    b"\xff\xfe not UTF-8",
    "ünï".encode(),
    b"deep/er/file",
    b"n" * 255,
]


def test_sha256sum_accepts_every_line_in_the_mount(mounts, tmp_path):
    source = tmp_path / "odd"
    for number, name in enumerate(NAMES):
        path = source / os.fsdecode(name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"%d" % number * (1 + 50_000 * (number % 3)))
    library = make_library(tmp_path / "lib", {b"org/odd \xff": source})
    mountpoint = mounts(library).mountpoint
    for model, where in (
        ([], mountpoint),
        ([os.fsdecode(b"org/odd \xff")], mountpoint / os.fsdecode(b"org/odd \xff")),
    ):
        sums = subprocess.run(
            [
                *(sys.executable, "-m", "fragfs", "--library", library),
                *("verify", *model, "--sha256sum"),
            ],
            capture_output=True,
            timeout=TIMEOUT_S,
            check=True,
            env={**os.environ, "XDG_STATE_HOME": str(tmp_path / "state")},
        ).stdout
        assert sums.count(b"\n") == len(NAMES)
        done = subprocess.run(
            ["sha256sum", "-c", "--strict"],
            input=sums,
            cwd=where,
            capture_output=True,
            timeout=TIMEOUT_S,
            check=False,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        assert done.stdout.count(b": OK") == len(NAMES)
