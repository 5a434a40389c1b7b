"""The soak itself: it must see what it looks for, and pass where there is nothing to see."""

import json
import os
import random
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from tests.mount.conftest import reason_without_fuse
from tools.soak import processes
from tools.soak.changes import parse_sums
from tools.soak.mounting import Mount
from tools.soak.reader import MISSING, REFUSED, WRONG
from tools.soak.runner import Runner, SoakError
from tools.soak.shelf import Shelf
from tools.soak.soak import Soak
from tools.soak.sources import KINDS, SourceMaker, Version

ROOT = Path(__file__).parents[2]

needs_fuse = pytest.mark.skipif(reason_without_fuse() is not None, reason="needs FUSE")


@pytest.fixture
def maker(tmp_path):
    return SourceMaker(tmp_path / "sources", 1)


@pytest.fixture
def runner(tmp_path):
    made = Runner(tmp_path, tmp_path / "library", os.fspath(tmp_path))
    yield made
    made.close()


# --- readers


def start_reader(mode, model, versions, seconds=0.5, seed=1):
    task = {
        "mode": mode,
        "model": os.fspath(model),
        "versions": list(map(os.fspath, versions)),
        "seed": seed,
        "seconds": seconds,
        "patience": 0.3,
    }
    return subprocess.Popen(
        [sys.executable, "-m", "tools.soak.reader", json.dumps(task)],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def read(*arguments, **keywords):
    reader = start_reader(*arguments, **keywords)
    output, errors = reader.communicate("go\n", timeout=60)
    return reader.returncode, output, errors


@pytest.fixture
def pair(tmp_path):
    """A model and its source: plain directories do for a reader."""
    for name in ("model", "source"):
        (tmp_path / name / "sub").mkdir(parents=True)
        (tmp_path / name / "sub" / "large").write_bytes(random.Random(1).randbytes(300_000))
        (tmp_path / name / "empty").write_bytes(b"")
    return tmp_path / "model", tmp_path / "source"


def flip(path, at):
    with path.open("r+b") as file:
        file.seek(at)
        byte = file.read(1)[0]
        file.seek(at)
        file.write(bytes([byte ^ 1]))


@pytest.mark.slow
def test_a_reader_of_the_right_bytes(pair):
    model, source = pair
    status, output, errors = read("plain", model, [source], seconds=1.0)
    assert (status, errors) == (0, "")
    assert sum(int(line.split()[1]) for line in output.splitlines()) >= 300_000


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["plain", "hold", "race"])
def test_a_reader_sees_a_wrong_byte(pair, mode):
    model, source = pair
    flip(model / "sub" / "large", 123_456)
    # In some way of reading it is not touched: it must be seen in one of a few.
    found = [read(mode, model, [source], seed=seed) for seed in range(4)]
    assert WRONG in [status for status, _, _ in found], found
    assert {status for status, _, _ in found} <= {0, WRONG}


@pytest.mark.slow
def test_a_reader_sees_what_is_missing(pair, tmp_path):
    model, source = pair
    (source / "more").write_bytes(b"x")
    assert read("plain", model, [source])[0] == MISSING
    assert read("plain", tmp_path / "nothing", [source])[0] == MISSING
    assert read("gone", model, [])[0] == MISSING
    assert read("gone", tmp_path / "nothing", [])[0] == 0


@pytest.mark.slow
def test_a_reader_that_holds_what_is_removed(pair):
    model, source = pair
    reader = start_reader("hold", model, [source])
    assert reader.stdout.readline() == "ready\n"
    for path in (model / "sub" / "large", model / "empty"):
        path.unlink()
    _, errors = reader.communicate("go\n", timeout=60)
    assert (reader.returncode, errors) == (0, "")


@pytest.mark.slow
def test_a_reader_of_what_changes_takes_both_but_no_mixture(pair, tmp_path):
    model, source = pair
    later = tmp_path / "later"
    (later / "sub").mkdir(parents=True)
    old = (source / "sub" / "large").read_bytes()
    new = random.Random(2).randbytes(len(old))
    (later / "sub" / "large").write_bytes(new)
    assert read("race", model, [source, later])[0] == 0
    (model / "sub" / "large").write_bytes(new)
    assert read("race", model, [source, later])[0] == 0
    (model / "sub" / "large").write_bytes(old[:150_000] + new[150_000:])
    assert WRONG in [read("race", model, [source, later], seed=seed)[0] for seed in range(4)]


@pytest.mark.slow
def test_a_reader_that_may_not_read(pair):
    model, source = pair
    (model / "empty").unlink()
    (model / "empty").symlink_to("empty")
    assert read("race", model, [source])[0] == REFUSED


# --- the oracle


def test_models_are_taken_and_shared(maker):
    shelf, chosen = Shelf(), random.Random(1)
    version = maker.make("odd", chosen, None)
    name = shelf.take_new(chosen)
    assert shelf.take(chosen) == []
    shelf.set(name, version)
    shelf.give_back([name])
    with shelf.shared(chosen) as shared:
        assert shared == (name, version)
        assert shelf.take(chosen) == []
    assert shelf.take(chosen, 3) == [name]
    with shelf.shared(chosen) as shared:
        assert shared is None
    shelf.keep(version)
    shelf.set(name, None)
    assert version.directory.exists(), "somebody still holds it"
    shelf.drop(version)
    assert not version.directory.exists()
    assert shelf.models() == {}


@pytest.mark.parametrize("kind", sorted(set(KINDS)))
def test_versions_are_what_they_say(maker, kind):
    chosen = random.Random(3)
    other = maker.make("odd", chosen, None)
    version = maker.make(kind, chosen, other)
    assert version.sums == Version.of(version.directory).sums != {}
    assert 1000 < version.size < 12_000_000
    changed = maker.change(version, chosen)
    assert changed.sums != version.sums
    grown, folder, paths = maker.grow(version, chosen)
    new = {os.fsencode(os.path.join(folder, path.name)) for path in paths}
    assert grown.sums.keys() - version.sums.keys() == new
    gone = set(sorted(version.sums)[:1])
    assert maker.shrink(version, gone, chosen).sums.keys() == version.sums.keys() - gone
    assert Version.of(version.directory).sums == version.sums, "nobody changed the first"


def test_sums_are_parsed_as_sha256sum_writes_them(tmp_path):
    names = [b"plain", b"two  spaces", b"new\nline", b"back\\slash", b"\\n", b"\xff"]
    for name in names:
        (tmp_path / os.fsdecode(name)).write_bytes(name)
    told = subprocess.run(
        ["sha256sum", "--", *names], cwd=tmp_path, capture_output=True, check=True
    ).stdout
    assert parse_sums(told) == Version.of(tmp_path).sums


# --- children


@pytest.mark.slow
def test_a_child_that_hangs_is_described(runner):
    runner.hang_s = 1.0
    child = runner.start(
        [sys.executable, "-c", "import time\ndef stuck():\n    time.sleep(99)\nstuck()"]
    )
    with pytest.raises(SoakError, match=r"(?s)it hangs.*thread.*in stuck"):
        runner.wait(child, "it")
    assert child.process.poll() is not None


@pytest.mark.slow
def test_a_command_that_fails_is_an_error(runner):
    with pytest.raises(SoakError, match="no fragfs library"):
        runner.run("ls", "ls")
    assert runner.run("ls", "ls", allowed=(1,)).status == 1


@pytest.mark.slow
def test_a_command_is_disturbed(runner):
    chosen = random.Random(1)
    for _ in range(8):
        runner.run("ls", "ls", disturb=chosen, allowed=(1,))
    assert runner.counts["ls"] == 8
    assert sum(n for name, n in runner.counts.items() if name.startswith("SIG")) > 0


def test_what_is_left_is_found(runner, tmp_path):
    assert processes.marked(os.fspath(tmp_path)) == []
    child = runner.start([sys.executable, "-c", "import time; time.sleep(99)"])
    assert processes.marked(os.fspath(tmp_path)) == [child.process.pid]
    assert f"process {child.process.pid}" in processes.describe(child.process.pid)


def test_an_error_in_a_log_is_seen(tmp_path):
    mount = Mount.__new__(Mount)
    mount.point = tmp_path / "point"
    log = tmp_path / "point.log"
    log.write_text("2026-11-28 07:00:00,000 WARNING 1: a decoder process (2) has ended\n")
    mount.check_log()
    log.write_text("2026-11-28 07:00:00,000 ERROR 1: fragment 3f9a: digest differs\n")
    with pytest.raises(SoakError, match="digest differs"):
        mount.check_log()


# --- all of it


@pytest.mark.slow
@pytest.mark.mount
@needs_fuse
def test_a_soak_sees_damage(tmp_path):
    """Bytes of packs change while it runs."""
    soak = Soak(tmp_path, 2)

    def damage():
        while not soak.runner.stopping.wait(1.0):
            for pack in (tmp_path / "library" / "packs").glob("*.pack"):
                size = pack.stat().st_size
                for at in range(5000, size, 20_000):
                    flip(pack, at)

    saboteur = threading.Thread(target=damage)
    saboteur.start()
    try:
        soak.run(60)
    finally:
        soak.close()
        saboteur.join()
    assert soak.runner.failures
    assert processes.mounts_below(tmp_path) == []
    assert processes.marked(os.fspath(tmp_path)) == []


@pytest.mark.slow
@pytest.mark.mount
@needs_fuse
def test_an_interrupted_soak_leaves_nothing(tmp_path):
    place = tmp_path / "soak"
    process = subprocess.Popen(
        [
            *(sys.executable, "-m", "tools.soak", "--minutes", "5", "--seed", "3"),
            *("--directory", place),
        ],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        text=True,
    )
    while not processes.mounts_below(place):
        assert process.poll() is None
        time.sleep(0.1)
    process.send_signal(2)
    output, _ = process.communicate(timeout=200)
    assert process.returncode == 130
    assert output.endswith("interrupted; everything was removed\n")
    assert not place.exists()
    assert processes.marked(os.fspath(place)) == []
    assert processes.mounts_below(place) == []
